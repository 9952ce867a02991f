// Package tunnelquic is the QUIC carrier: streams are QUIC streams, datagrams
// are DATAGRAM frames (RFC 9221). It is the only package that knows quic-go.
//
//	listener, err := tunnelquic.Listen(socket, tunnelquic.Config{TLS: serverTLS})
//	dialer, err := tunnelquic.NewDialer(tunnelquic.Config{TLS: clientTLS})
//	candidate, err := dialer.Dial(ctx, "proxy.example:443")
//
// The client's first stream carries the opening exchange of a candidate and is
// over when the candidate becomes a carrier; streams of the carrier follow.
//
// It promises that a peer that has not been answered holds at most 64 KiB of
// stream data, that a listener ends connections whose peers flood it with frames
// that bring nothing, that sending a datagram never waits, that an error of the
// socket which may pass does not end a connection, and that Close of a carrier
// leaves no goroutine and no socket behind. It uses no 0-RTT and no session
// tickets: every connection proves its keys anew.
//
// It does not judge certificates (the TLS configuration handed in does), does
// not read what is said in the opening exchange, and does not make datagrams
// wait: those that QUIC's congestion control holds back are refused with
// tunnel.ErrBlocked once a few have been taken.
package tunnelquic
