// Package link is a bad network for tests: it carries IP packets between two
// devices, with a delay, a rate for UDP, protocols that do not pass, a length
// that none exceeds, and a NAT that forgets.
//
//	l := link.New(near, far, link.Settings{Delay: 20 * time.Millisecond})
//	defer l.Close()
//	l.Change(func(s *link.Settings) { s.NoUDP = true })
//	l.Rebind()
//
// It promises that what it is told holds for every packet that comes after,
// that it keeps the order of UDP packets and that of all others, and that Close leaves nothing behind but
// the devices, which are the caller's to close first.
//
// It promises no exact times: a packet leaves when it is due or as soon after
// as the scheduler lets it. It makes no devices and no namespaces (package
// netpair does), knows IPv4 only for its NAT, and follows no IPv6 extension headers.
package link
