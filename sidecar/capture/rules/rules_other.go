//go:build !linux

package rules

import "culvert/tunnel"

func unsupported() error {
	return tunnel.Errorf(tunnel.Unsupported, "capturing traffic needs Linux; set the app's proxy instead")
}

// On is for Linux.
func On(Rules) error { return unsupported() }

// Off is for Linux.
func Off() (bool, error) { return false, unsupported() }

// CgroupID is for Linux.
func CgroupID(string) (uint64, error) { return 0, unsupported() }

// Read is for Linux.
func Read() (State, error) { return State{}, unsupported() }

// Halved is for Linux.
func Halved() bool { return false }

// Text is for Linux.
func (Rules) Text() (string, error) { return "", unsupported() }
