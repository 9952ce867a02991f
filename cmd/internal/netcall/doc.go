// Package netcall is a call for tests: flows of datagrams at a steady rate
// through a SOCKS5 proxy, each in an association of its own, which a far end
// stamps and sends back.
//
//	far := netcall.NewFar(t, pair.Far)
//	c := netcall.Begin(t, pair.Near, proxy, far, netcall.Sound(100, 160), netcall.Picture(100, 1000))
//	cut := time.Now()
//	… the path changes …
//	c.End()
//	gap, oldest := c.Gap(cut, time.Now()), c.Oldest(cut, time.Now())
//
// It promises that its packets look like RTP (RFC 3550), that its delays are
// one-way, since both ends have this process's clock, and that all it has
// started is gone when the test has ended.
//
// It is for tests on Linux. It knows no tunnel, changes no path, and judges
// nothing: the tests do.
package netcall
