package session

import (
	"net/netip"
	"testing"

	"culvert/tunnel"
	"culvert/tunnel/media"
	"culvert/tunnel/wire"
)

func TestAWayKnowsWhatItHasSentInVain(t *testing.T) {
	var p passage
	p.sent.Store(10)
	p.heard.Store(p.alone())
	p.sent.Add(5)
	p.twice.Add(2) // by another way too
	if got := p.since(&p.heard); got != 3 {
		t.Errorf("%d, want 3", got)
	}
	p.twice.Add(9) // what waits is counted when it goes
	if got := p.since(&p.heard); got != 0 {
		t.Errorf("%d, want 0", got)
	}
}

// hole is a way into which everything falls.
type hole struct{ recv func([]byte) }

func (h *hole) Start(recv func([]byte), _ func()) { h.recv = recv }
func (h *hole) Send([]byte) error                 { return nil }
func (h *hole) Max() int                          { return 1200 }
func (h *hole) Name() string                      { return "hole" }
func (h *hole) Lost() map[string]uint64           { return nil }

type deaf struct{}

func (deaf) Deliver([]byte, netip.AddrPort)    {}
func (deaf) Unreachable(netip.AddrPort, error) {}
func (deaf) Closed(error)                      {}

func TestWhatWasSentByAWayThatEndsIsLost(t *testing.T) {
	n := NewNear(0)
	a := n.Attach(wire.Welcome{Version: wire.Current, Session: "01"})
	defer a.plane.close()
	h := &hole{}
	a.plane.addWay(wire.WayDatagram, h)
	p, err := n.OpenPackets(tunnel.Peer{}, deaf{})
	if err != nil {
		t.Fatal(err)
	}
	send := func(count int) {
		for range count {
			if err := p.Send(make([]byte, 100), tunnel.Target{Host: "far", Port: 1}); err != nil {
				t.Fatal(err)
			}
		}
	}
	send(7)
	ack := wire.Notice{Ack: 1}
	h.recv(ack.Append(nil)) // something comes: they count as arrived
	send(4)
	if got := a.Way(wire.WayDatagram).Unheard; got != 4 {
		t.Errorf("%d were sent since something came, want 4", got)
	}
	if got := n.Course().Lost; got != 0 {
		t.Errorf("%d are lost while the way is there", got)
	}
	a.plane.removeWay(wire.WayDatagram, h)
	send(2)
	if got, noWay := n.Course().Lost, n.drops.Get(media.NoWay); got != 6 || noWay != 2 {
		t.Errorf("%d are lost, %d for want of a way, want 6 and 2", got, noWay)
	}
	p.Close()
}
