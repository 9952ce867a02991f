// Package crowd shares a bounded number of places among those who have not
// proved who they are, so that one source can not take them all.
//
//	places := crowd.New(1000)
//	place, ok := places.Enter(from, func() { conn.Close() })
//	if !ok { conn.Close(); return }
//	defer place.Leave()
//
// It promises that a newcomer gets a place as long as its source has fewer than
// another one: then the oldest of the source that has the most is turned out.
// While there is room nobody is, however many come from one address, as from
// behind a hospital's NAT. An IPv6 source is a network of /64.
//
// It does not close anything itself, and does not remember who was turned out.
package crowd
