package session

import (
	"net/netip"
	"sync/atomic"
	"testing"
	"time"

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

// held is a lane that takes datagrams, and holds them up where it is said to.
type held struct {
	hole
	stalled atomic.Bool
	copies  atomic.Int64
}

func (h *held) Stalled() bool                             { return h.stalled.Load() }
func (h *held) Overdue(func([]byte, time.Time) bool) bool { return false }
func (h *held) Resend([]byte, time.Time) error            { h.copies.Add(1); return nil }

func TestACopyOnAnotherLaneIsNoMoreThatCanBeLost(t *testing.T) {
	n := NewNear(0)
	a := n.Attach(wire.Welcome{Version: wire.Current, Session: "01"})
	defer a.plane.close()
	lanes := [3]held{}
	for i := range lanes {
		a.plane.addWay(wire.WayLanes, &lanes[i])
	}
	p, err := n.OpenPackets(tunnel.Peer{}, deaf{})
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	const sent = 20
	for i := range sent {
		if i == 1 {
			lanes[0].stalled.Store(true)
		}
		if err := p.Send(make([]byte, 100), tunnel.Target{Host: "far", Port: 1}); err != nil {
			t.Fatal(err)
		}
	}
	copies := lanes[1].copies.Load() + lanes[2].copies.Load()
	if got := a.Way(wire.WayLanes).Unheard; got != sent || copies == 0 {
		t.Errorf("%d of %d datagrams were sent, and %d copies", got, sent, copies)
	}
}
