// Package media keeps datagrams from being late because of us: the waiting
// room in front of the ways, the circuit breaker that shapes a way which has no
// congestion control of its own, and the window that removes duplicates. It
// also cuts long records into fragments and joins them, and holds sealed
// packets: a way of its own on a carrier's UDP flow.
//
// It promises that nothing waits longer than its age limit, that the oldest is
// dropped first, that associations share what a way can take, that sound goes
// before pictures, and that every drop is counted by its reason and its
// association. Within one SSRC, and within an association that shows none,
// what waits leaves in the order in which it came. Sealed packets keep what
// PROTOCOL.md 5.4 promises: confidentiality, integrity, no replay, one key for
// one direction and epoch. Of
// several lanes each carries once more what another may have lost. It does not
// choose ways, retransmit otherwise, hide sizes, or look beyond the first bytes
// of a datagram.
package media
