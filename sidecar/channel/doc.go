// Package channel answers one question about an app that knows nothing of
// Culvert: is it in a channel (a call, a conference, a live stream) right now?
//
// It promises a verdict that can be explained. Facts about packets go in, each
// with its time; out comes, for every app, whether it is in a channel and the
// evidence in words. It opens no socket, starts no goroutine, reads no clock
// and keeps no payload: it looks at headers only (STUN and TURN by RFC 8489 and
// 8656, DTLS by RFC 6347 and 9147, RTP and RTCP by RFC 3550, told apart by
// RFC 7983, framed on TCP by RFC 4571), and costs a packet about as much as a
// map lookup. First bytes alone are never evidence.
//
//	w := channel.New(channel.Config{})
//	s := w.OpenSocket(channel.Owner{Addr: client})
//	s.Packet(true, to, p, now)  // the app sent p
//	s.Packet(false, from, p, now)
//	for _, c := range w.Channels(now) { fmt.Println(c.Name, c.State, c.Evidence) }
//
// It does not see what is encrypted: a call whose only traffic is one TLS
// stream is recognised by its rhythm, and DTLS 1.3 alerts are not recognised.
// It decides nothing: refusing a stop is the switch's business.
package channel
