package session

import (
	"math"
	"testing"
	"testing/synctest"
	"time"

	"culvert/tunnel"
	"culvert/tunnel/tunneltest"
	"culvert/tunnel/wire"
)

// A peer may say in its reports what it likes, and as often.
func TestReportsThatLieAreBounded(t *testing.T) {
	const most32, most16 = math.MaxUint32, math.MaxUint16
	for name, lie := range map[string]wire.Report{
		"nothing":                  {},
		"the most of all":          {Use: wire.Use{N: most32, Way: 255, Also: 255}, Live: true, Often: true, Strained: true, Time: most32, Echo: most32, Sent: most32, Lost: most16, Rate: most32, Delay: most16 - 1, Seen: most32, Held: most32},
		"all is lost":              {Lost: most16, Rate: 0, Delay: most16 - 1, Held: most32},
		"what was never sent":      {Sent: 1 << 31, Rate: most32, Delay: wire.NoDelay, Seen: 1 << 30, Held: 0},
		"an answer before we sent": {Echo: most32, Time: 1 << 31, Held: 1 << 31, Seen: 4},
		"a way that is not there":  {Use: wire.Use{N: 1 << 30, Way: wire.WayLanes, Also: wire.WayLanes}, Lost: most16},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				p := join(t, NewNear(0), tunneltest.Config{Flow: true, Queue: 1000}, FarConfig{})
				defer p.end()
				other := join(t, NewNear(0), tunneltest.Config{Flow: true, Queue: 1000}, FarConfig{})
				defer other.end()
				in, otherIn := newInbox(), newInbox()
				a, _ := p.near.OpenPackets(tunnel.Peer{}, in)
				b, _ := other.near.OpenPackets(tunnel.Peer{}, otherIn)
				p.at.Use(wire.WaySealed, wire.NoWay)
				other.at.Use(wire.WaySealed, wire.NoWay)
				say := func(n int) {
					for range n {
						a.Send(make([]byte, 100), alpha)
						b.Send(make([]byte, 100), alpha)
						time.Sleep(20 * time.Millisecond)
					}
				}
				say(100)
				came, otherCame := len(in.got), len(otherIn.got)
				record := lie.Append(nil)
				for range 500 { // ten seconds
					for _, end := range []*plane{p.far.plane, p.at.plane} {
						for _, y := range end.ways {
							if y != nil {
								for range 10 {
									y.receive(record)
								}
							}
						}
					}
					say(1)
				}
				// 40 kbit/s are below the least that a report can make of a way.
				if n := len(in.got) - came; n < 490 {
					t.Errorf("%d of 500 datagrams came back", n)
				}
				if n := len(otherIn.got) - otherCame; n < 495 {
					t.Errorf("of another session's 500 datagrams %d came back", n)
				}
				for reason := range other.near.Stats().Dropped {
					t.Errorf("another session has lost datagrams: %s", reason)
				}
				// It is over when the truth is told again.
				p.at.Use(wire.WaySealed, wire.NoWay)
				say(1000)
				came = len(in.got)
				say(100)
				if n := len(in.got) - came; n < 95 {
					t.Errorf("afterwards %d of 100 datagrams came back", n)
				}
			})
		})
	}
}

func TestAReportTakesNoMemory(t *testing.T) {
	p := join(t, NewNear(0), tunneltest.Config{Flow: true, Queue: 1000}, FarConfig{})
	y := newWay(p.far.plane, wire.WaySealed)
	n := uint32(0)
	if allocs := testing.AllocsPerRun(1000, func() {
		n++
		y.report(&wire.Report{Time: n * 7919, Sent: n * 13, Seen: n * 4, Lost: uint16(n), Delay: uint16(n)}, time.Now())
	}); allocs >= 1 {
		t.Errorf("%v allocations for each", allocs)
	}
}
