package sidecar

import "net/netip"

// A Process is what holds the app's end of a connection on this machine.
type Process struct {
	PID  int    `json:"pid,omitempty"`  // 0 where it is not ours to know
	Name string `json:"name,omitempty"` // of its program; empty without PID
	UID  int    `json:"uid"`
	User string `json:"user"` // the user's name, or the UID in digits
}

// ProcessOfTCP is ProcessOf for "tcp".
func ProcessOfTCP(client, server netip.AddrPort) (Process, error) {
	return ProcessOf(client, server, "tcp")
}
