package netio

import "net/netip"

// A Reader takes what arrives on one socket of a Poller. Its calls never
// overlap and must not block: the Poller's other sockets wait for them.
type Reader interface {
	// Take hands over one datagram, or some bytes of a stream (from is then
	// invalid). p is borrowed until it returns.
	Take(p []byte, from netip.AddrPort)
	// Flush follows the Takes of one batch.
	Flush()
	// Failed says that a datagram socket has an error pending, perhaps in its
	// error queue, which must then be emptied; or that a stream has ended or
	// broken, which is its last call.
	Failed()
}

// A TransparentReader is the Reader of a socket that takes datagrams for other
// addresses than its own (TPROXY). It gets them by TakeFor alone.
type TransparentReader interface {
	Reader
	// TakeFor is Take with the address that the datagram was sent to; invalid:
	// the kernel does not say.
	TakeFor(p []byte, from, to netip.AddrPort)
}
