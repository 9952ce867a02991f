// Package session is what lives while carriers come and go: the associations
// and TCP streams of one sidecar, at both ends. Near is the sidecar's end, Far
// the cloud proxy's.
//
// It promises that an association and a stream outlive the carriers that serve
// them, that a session without any is held for a time, that an association at
// the near end outlives even its session (a new one carries it on, from a new
// egress port), that a datagram is delivered at most once, and that nothing here
// waits for the network on a carrier's reading goroutine. It sends by the ways
// that it is told to, says what arrives by each, and lets bulk give way to a
// live call. It does not connect, choose ways or authorize: tunnel/uplink and
// cloudproxy do, and hand in carriers and ways that are already admitted.
package session
