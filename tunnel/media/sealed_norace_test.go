//go:build !race

package media

const sealedRace = false
