// Package netpair gives tests two network namespaces with one link between
// them: a near one for a sidecar and its apps, a far one for a cloud proxy.
// Whoever watches the link sees all that passes between the two.
//
//	p := netpair.New(t)
//	p.Far.Start(t, exec.Command("culvert-cloudproxy", "run", "-c", file))
//	c := p.Watch(t, 443)
//	… traffic …
//	seen := c.Stop()
//
// It promises that the namespaces have no names, so that tests do not meet each
// other's, and that they are gone, with all that was started in them, when the
// test has ended. Where namespaces can not be made it skips the test with the
// reason, or fails it where CI=true.
//
// It is for tests on Linux, with root. It does not speak the tunnel's
// protocol. New's link is as good as the kernel makes it, NewBad's as bad as
// package link is told to make it.
package netpair
