package session

import (
	"errors"
	"io"
	"math"
	"strings"
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

// A peer that says to have received bytes of a stream which were never sent.
func TestAnAcknowledgementOfWhatWasNeverSentEndsItsStreamAloneAndByName(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := join(t, NewNear(0), tunneltest.Config{}, FarConfig{})
		defer p.end()
		open := func() tunnel.Stream {
			s, err := p.near.OpenStream(t.Context(), tunnel.Peer{}, alpha)
			if err != nil {
				t.Fatal(err)
			}
			return s
		}
		echoes := func(s tunnel.Stream) error {
			if _, err := s.Write([]byte("hello")); err != nil {
				return err
			}
			_, err := io.ReadFull(s, make([]byte, 5))
			return err
		}
		one := open()
		var number uint64
		p.far.mu.Lock()
		for n := range p.far.lines {
			number = max(number, n)
		}
		p.far.mu.Unlock()
		two := open()
		defer two.Close()
		if err := errors.Join(echoes(one), echoes(two)); err != nil {
			t.Fatal(err)
		}
		s, err := p.at.carriers[0].carrier.OpenStream(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		wire.Write(s, wire.Message{Resume: &wire.Resume{Number: number, Received: 1 << 40}})
		wire.Read(s, wire.Current)
		synctest.Wait()
		s.Abort(nil)
		if err := echoes(one); !errors.Is(err, tunnel.SessionExpired) || !strings.Contains(err.Error(), "the stream has ended at the cloud proxy") {
			t.Errorf("the stream ends with %v", err)
		}
		one.Close()
		if err := echoes(two); err != nil {
			t.Errorf("another stream of the session: %v", err)
		}
		if p.far.ctx.Err() != nil {
			t.Error("the session has ended")
		}
	})
}
