package netio

import "net/netip"

// A Message is one datagram to be sent.
type Message struct {
	P  []byte // borrowed until the call returns
	To netip.AddrPort
	// From is the local address it leaves from; invalid: the system chooses.
	From netip.Addr
}
