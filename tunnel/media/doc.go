// Package media keeps datagrams from being late because of us: the waiting
// room in front of a way that can block, and the window that removes
// duplicates.
//
// It promises that nothing waits longer than its age limit, that the oldest is
// dropped first, and that every drop is counted by its reason. It does not
// choose ways, retransmit, or reorder: what waits leaves in the order in which
// it came.
package media
