package session

import (
	"net/netip"
	"testing"

	"culvert/tunnel"
	"culvert/tunnel/media"
)

func TestTheWorstLossesComeFirst(t *testing.T) {
	n := NewNear(0)
	room := media.NewRoom(0, &media.Drops{}) // without an outlet: all is dropped
	for i, lost := range []int{1, 0, 5, 3} {
		l := &leg{}
		for range lost {
			room.Send(&l.line, make([]byte, 100), make([]byte, 90))
		}
		p := &nearPackets{near: n, by: tunnel.Peer{Addr: netip.AddrPortFrom(netip.IPv6Loopback(), uint16(i))}}
		p.leg.Store(l)
		n.assocs[uint32(i)] = p
	}
	for most, want := range map[int][]uint64{10: {5, 3, 1}, 2: {5, 3}, 0: {}} {
		got := n.Losses(most)
		if len(got) != len(want) {
			t.Fatalf("%d losses, want %d", len(got), len(want))
		}
		for i, l := range got {
			if l.Total != want[i] || l.Dropped[media.NoWay.String()] != want[i] {
				t.Errorf("loss %d is %+v, want %d", i, l, want[i])
			}
		}
	}
}
