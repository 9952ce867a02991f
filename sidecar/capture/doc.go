// Package capture takes the traffic that the kernel hands to a sidecar by
// TPROXY: the apps it comes from know nothing of a proxy.
//
//	sockets, err := capture.Listen(capture.DefaultPort, rules.OwnMark)
//	c, err := capture.New(capture.Config{Sockets: sockets, Next: opener})
//	err = c.Run(ctx)
//
// A captured TCP connection becomes one stream to where the app wanted to go. A
// local UDP socket, its address and port, becomes one association, whatever it
// sends to, so that peers see one egress port and ICE works. What comes back
// reaches the app from the address that it came from. What is refused is refused
// at once, in the app's own words: RST, or ICMP.
//
// It promises that a datagram costs no goroutine and no allocation, that the
// number of associations and streams is bounded, that a flood of new sources
// ends those that never had an answer first, that an association ends soon after
// its socket, and that nothing is left behind when Run's context ends.
//
// It does not decide what is captured: the kernel does, see package rules. It
// does not resolve names, decide what is allowed, or know a tunnel: all of that
// is the Opener's. It needs Linux and CAP_NET_RAW.
package capture
