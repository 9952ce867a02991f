//go:build !race

package sidecar

const frontRace = false
