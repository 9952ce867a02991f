// Package egress turns streams and datagrams into the host's own traffic.
//
// It has two stages, and the policy stands between them:
//
//	path := egress.NewResolve(policy.NewGuard(exit, current), egress.ResolveConfig{})
//
// Resolve makes addresses of names, never on the packet path, and hands each
// address to the next stage so that each one is checked. Egress dials TCP and
// binds UDP: for an association one socket per address family, with
// endpoint-independent mapping (RFC 4787 REQ-1) and address-dependent filtering
// (REQ-8), hairpinning (REQ-9) and ICMP errors.
//
// It promises that no Send waits: a full socket is a counted drop. Idle
// associations hold no read buffer and, on Linux, no goroutine.
//
// On Unix its sockets do not broadcast, not even to an address that only this
// host's networks tell from any other.
//
// Where the places for associations or streams become few, each App ID gets a
// share of them: no one takes them all.
//
// It does not decide what may be reached: without a guard it sends to private
// and loopback addresses like any program on this host.
package egress
