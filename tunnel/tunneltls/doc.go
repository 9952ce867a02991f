// Package tunneltls carries a session over TLS 1.3 on TCP, for networks where
// UDP does not pass. It is the only user of yamux.
//
// A connection begins as a candidate: the opening exchange is plain bytes on
// the TLS connection, so a peer that has not been admitted holds no yamux
// stream and no window. Then it becomes one of two things:
//
//   - a carrier: yamux, for streams. Each yamux stream holds the bytes of one
//     tunnel.Stream and nothing else; how a stream ends is told on a control
//     stream (control.go), because yamux has no abort, and its Close followed
//     by a timeout would cut a stream that is half-closed for hours.
//   - a lane: length-prefixed datagrams with the sender's clock (record.go), and
//     nothing else on that TCP connection, so that media never waits behind bulk.
//
// It promises that a stream's bytes arrive whole, in order and once or the
// stream fails; that an abort does not wait for a full window; that a slow
// reader stops only its own stream; that a lane hands over no datagram that it
// knows to be older than Config.MaxAge; that a stalled network ends a carrier
// within seconds, a lane with data on its way after 600 ms (on Linux), and never
// holds up Close for more than a second; and that
// all a peer can make this end hold is bounded by Config.
//
// It does not decide whom to admit (Config.TLS does, and tunnel/session), which
// connection to use (tunnel/uplink), or what waits when a lane is blocked
// (tunnel/media). It does not hide the head-of-line blocking of TCP: a lost
// segment delays everything behind it on the same connection. It tells which
// datagrams may suffer from that, so that others can carry them too (kept.go).
package tunneltls
