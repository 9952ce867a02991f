//go:build race

package media

// sealedRace: the race detector makes sync.Pool drop things at random.
const sealedRace = true
