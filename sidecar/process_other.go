//go:build !linux

package sidecar

import (
	"net/netip"

	"culvert/tunnel"
)

// ProcessOf finds the process behind a connection of this machine. It is not
// available on this system: the error's code is Unsupported.
func ProcessOf(_, _ netip.AddrPort, _ string) (Process, error) {
	return Process{}, tunnel.Errorf(tunnel.Unsupported, "finding the process behind a connection needs Linux")
}

// SocketOf does not know here: there may be one.
func SocketOf(_, _ netip.AddrPort) (socket uint32, open bool) { return 0, true }

// socketOwner can not tell users apart here.
type socketOwner struct{ strict bool }

// ownersKnown says that this system tells who is behind a connection.
const ownersKnown = false

func userOf(*frontConn) (uid uint32, known bool) { return 0, false }

func (socketOwner) of(*frontConn) {}

func (socketOwner) owns(_, _ netip.AddrPort) (owned, sure bool) { return true, false }
