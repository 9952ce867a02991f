package uplink

import (
	"context"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"culvert/tunnel"
	"culvert/tunnel/session"
	"culvert/tunnel/tunneltest"
	"culvert/tunnel/wire"
)

// real makes the far's cloud proxies serve real sessions, which answer probes.
// lanes is what they say of lanes. It returns how many lanes are joined.
func (f *far) real(lanes int) *atomic.Int64 {
	var mu sync.Mutex
	ends := map[string]*session.Far{}
	sealed := map[string]*wire.Sealed{}
	var joined atomic.Int64
	ids := 0
	f.answer = func(kind, _ string, m wire.Message) *wire.Message {
		mu.Lock()
		defer mu.Unlock()
		w := &wire.Welcome{Version: wire.Current, Lanes: lanes}
		switch {
		case m.Open != nil:
			ids++
			w.Session = strings.Repeat("0", 31) + string(rune('0'+ids))
			ends[w.Session] = session.NewFar(session.FarConfig{Next: &tunneltest.Echo{}, Peered: wire.Current, ID: w.Session})
			f.mu.Lock()
			f.sessions = append(f.sessions, ends[w.Session])
			f.mu.Unlock()
			if kind == "quic" {
				w.Sealed = session.OfferSealed(m.Open.Sealed)
				sealed[w.Session] = w.Sealed
			}
		case ends[m.Join.Session] == nil:
			return refused(tunnel.SessionUnknown)
		default:
			w.Session = m.Join.Session
		}
		return &wire.Message{Welcome: w}
	}
	f.carry = func(id, as string, c tunnel.Candidate) {
		mu.Lock()
		end, how := ends[id], sealed[id]
		mu.Unlock()
		switch as {
		case wire.AsLane:
			if l, err := c.Lane(); err == nil {
				joined.Add(1)
				end.ServeLane(l)
				joined.Add(-1)
			}
		default:
			ready, err := session.ReadySealed(c, id, how)
			if err != nil {
				f.t.Error(err)
			}
			if k, err := c.Carrier(); err == nil {
				f.mu.Lock()
				f.last = k
				f.mu.Unlock()
				end.Serve(k, ready)
			}
		}
	}
	return &joined
}

// callee receives nothing of interest.
type callee struct{ got atomic.Int64 }

func (c *callee) Deliver([]byte, netip.AddrPort)    { c.got.Add(1) }
func (c *callee) Unreachable(netip.AddrPort, error) {}
func (c *callee) Closed(error)                      {}

var mediaAt = tunnel.TargetOf(netip.MustParseAddrPort("203.0.113.9:3478"))

// call sends 50 datagrams a second until ctx ends. None may come back twice.
func (r *running) call(ctx context.Context) (ended <-chan struct{}) {
	r.t.Helper()
	c := &callee{}
	a, err := r.OpenPackets(tunnel.Peer{}, c)
	if err != nil {
		r.t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		defer a.Close()
		var sent int64
		for ; ctx.Err() == nil; sent++ {
			a.Send(make([]byte, 800), mediaAt)
			time.Sleep(20 * time.Millisecond)
		}
		if got := c.got.Load(); got == 0 || got > sent {
			r.t.Errorf("of %d datagrams %d came back", sent, got)
		}
	}()
	return done
}

// by waits until datagrams go by a way.
func (r *running) by(way wire.Way) tunnel.LinkState {
	r.t.Helper()
	for range 100_000 {
		if s := r.up(); s.Way == way.String() && s.WayWhy != wayAtHand[way] {
			return s
		}
		time.Sleep(time.Millisecond)
	}
	r.t.Fatalf("datagrams do not go by %v after 100 s: %+v", way, r.up())
	return tunnel.LinkState{}
}

func TestTheWayIsChosenByWhatArrives(t *testing.T) {
	delay := 20 * time.Millisecond
	for name, c := range map[string]struct {
		packet func(p []byte) tunneltest.Fate
		way    wire.Way
		why    string
		within time.Duration
	}{
		"sealed packets arrive":          {func([]byte) tunneltest.Fate { return tunneltest.Fate{Delay: delay} }, wire.WaySealed, "were answered in 40ms", 2 * 40 * time.Millisecond},
		"they do not":                    {func([]byte) tunneltest.Fate { return tunneltest.Fate{Drop: true} }, wire.WayDatagram, "sealed packets were not answered in 500ms", time.Second},
		"short ones do, long ones never": {func(p []byte) tunneltest.Fate { return tunneltest.Fate{Delay: delay, Drop: len(p) > 300} }, wire.WaySealed, "were answered in", time.Second},
		"half of them do":                {everySecond(delay), wire.WaySealed, "were answered in", time.Second},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := newFarOn(t, tunneltest.Config{Flow: true, Packet: func(_ bool, p []byte) tunneltest.Fate { return c.packet(p) }}, first)
				defer f.end()
				f.real(0)
				r := f.run(tunnel.ModeAuto, nil)
				r.up()
				began := time.Now()
				if s := r.by(c.way); !strings.Contains(s.WayWhy, c.why) {
					t.Errorf("because %q, want %q", s.WayWhy, c.why)
				}
				if took := time.Since(began); took > c.within {
					t.Errorf("it took %v, want at most %v", took, c.within)
				}
				r.stop()
			})
		})
	}
}

func everySecond(delay time.Duration) func([]byte) tunneltest.Fate {
	var n atomic.Int64
	return func([]byte) tunneltest.Fate { return tunneltest.Fate{Delay: delay, Drop: n.Add(1)%2 == 0} }
}

func TestSealedPacketsThatStopArrivingAreLeftAndTriedAgain(t *testing.T) {
	for name, shut := range map[string]func(up bool) bool{
		"both ways": func(bool) bool { return true },
		"upwards":   func(up bool) bool { return up },
		"downwards": func(up bool) bool { return !up },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var off atomic.Bool
				f := newFarOn(t, tunneltest.Config{Flow: true, Packet: func(up bool, _ []byte) tunneltest.Fate {
					return tunneltest.Fate{Delay: 20 * time.Millisecond, Drop: off.Load() && shut(up)}
				}}, first)
				defer f.end()
				f.real(0)
				r := f.run(tunnel.ModeAuto, nil)
				r.up()
				r.by(wire.WaySealed)
				ctx, cancel := context.WithCancel(context.Background())
				ended := r.call(ctx)
				time.Sleep(3 * time.Second)
				off.Store(true)
				began := time.Now()
				s := r.by(wire.WayDatagram)
				if took := time.Since(began); took > 3*time.Second {
					t.Errorf("they were left after %v (%s)", took, s.WayWhy)
				}
				if !strings.Contains(s.WayWhy, "quic-datagram passes") {
					t.Errorf("because %q", s.WayWhy)
				}
				off.Store(false)
				r.by(wire.WaySealed)
				cancel()
				<-ended
				r.stop()
			})
		})
	}
}

func TestLanesAreOpenedForACallAndReplaced(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFar(t, first)
		defer f.end()
		joined := f.real(6)
		r := f.run(tunnel.ModeTCP, func(c *Config) { c.Lanes = 4 })
		if s := r.up(); s.Way != "lanes" {
			t.Errorf("state %+v", s)
		}
		time.Sleep(time.Minute)
		if n := joined.Load(); n != 1 {
			t.Errorf("an idle sidecar has %d lanes, want 1", n)
		}
		ctx, cancel := context.WithCancel(context.Background())
		ended := r.call(ctx)
		time.Sleep(time.Second)
		if n := joined.Load(); n != 6 {
			t.Errorf("a call has %d lanes, want the 6 that the cloud proxy asks for", n)
		}
		f.nets["tls"].CutLanes()
		time.Sleep(2 * time.Second)
		if n := joined.Load(); n != 6 {
			t.Errorf("%d lanes after all had been cut, want 6 again", n)
		}
		states := slices.DeleteFunc(r.all(), func(s tunnel.LinkState) bool { return s.Change != nil }) // what is told may be one more
		if len(states) != 2 {
			t.Errorf("the link's states are %v: it should have stayed up", states)
		}
		cancel()
		<-ended
		r.stop()
	})
}

// proxied is a dialer whose connections go through a proxy, with some delay.
type proxied struct {
	tunnel.Dialer
	delay time.Duration
}

func (p proxied) Dial(ctx context.Context, address string) (tunnel.Candidate, error) {
	select {
	case <-time.After(p.delay):
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	c, err := p.Dialer.Dial(ctx, address)
	if err != nil {
		return nil, err
	}
	return beyond{c}, nil
}

type beyond struct{ tunnel.Candidate }

func (beyond) Via() string { return "the proxy http://proxy:3128" }

// TCP's round trip is that of the way to the proxy, and tells nothing of the rest.
func TestLanesThroughAProxyHaveTheTimeThatTheConnectionBesideThemTook(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFar(t, first)
		defer f.end()
		joined := f.real(0)
		r := f.run(tunnel.ModeTCP, func(c *Config) { c.TLS = proxied{c.TLS, laneDial + 200*time.Millisecond} })
		if s := r.up(); s.Why != "mode is tcp; through the proxy http://proxy:3128" {
			t.Errorf("state %+v", s)
		}
		time.Sleep(2 * time.Second)
		if n := joined.Load(); n != 1 {
			t.Errorf("%d lanes are joined, want 1", n)
		}
		r.stop()
	})
}

// balanced dials the first cloud proxy, whatever it is asked for, which it notes.
type balanced struct {
	tunnel.Dialer
	mu sync.Mutex
	to []string
}

func (b *balanced) Dial(ctx context.Context, address string) (tunnel.Candidate, error) {
	b.mu.Lock()
	b.to = append(b.to, address)
	b.mu.Unlock()
	return b.Dialer.Dial(ctx, first)
}

// What is reached by WebSocket is reached so in each join, whatever address it
// names; but not by UDP.
func TestJoinsGoToTheURLThatWasOpened(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const url = "wss://lb.example.net/cloud"
		f := newFar(t, first)
		defer f.end()
		joined := f.real(0)
		answer := f.answer
		f.answer = func(kind, address string, m wire.Message) *wire.Message {
			m = *answer(kind, address, m)
			if m.Welcome != nil {
				m.Welcome.Address = first
			}
			return &m
		}
		blocked := true // UDP
		f.dial = func(_ context.Context, kind, _ string, _ int) error {
			if kind == "quic" && blocked {
				return tunnel.Errorf(tunnel.UDPBlocked, "no")
			}
			return nil
		}
		quic, tls := &balanced{}, &balanced{}
		r := f.run(tunnel.ModeAuto, func(c *Config) {
			quic.Dialer, tls.Dialer = c.QUIC, c.TLS
			c.Proxies, c.QUIC, c.TLS = []string{url}, quic, tls
		})
		r.up()
		time.Sleep(time.Second)
		if n := joined.Load(); n != 1 {
			t.Errorf("%d lanes are joined, want 1", n)
		}
		f.mu.Lock()
		blocked = false
		f.mu.Unlock()
		for end := time.Now().Add(time.Minute); r.up().Carrier != "quic" && time.Now().Before(end); {
			time.Sleep(100 * time.Millisecond)
		}
		r.stop()
		for _, to := range tls.to {
			if to != url {
				t.Errorf("TLS was dialled to %s", to)
			}
		}
		if last := quic.to[len(quic.to)-1]; quic.to[0] != url || last != first {
			t.Errorf("QUIC was dialled to %s first and to %s last", quic.to[0], last)
		}
	})
}

func TestLanesOutliveTheConnectionBesideThem(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFar(t, first)
		defer f.end()
		joined := f.real(0)
		r := f.run(tunnel.ModeTCP, nil)
		r.up()
		ctx, cancel := context.WithCancel(context.Background())
		ended := r.call(ctx)
		time.Sleep(time.Second)
		lanes, dials := joined.Load(), len(f.dialsOf("tls"))
		f.mu.Lock()
		lost := f.last
		f.mu.Unlock()
		lost.Close(tunnel.TimedOut)
		time.Sleep(time.Second)
		f.mu.Lock()
		now := f.last
		f.mu.Unlock()
		if now == lost {
			t.Error("no other connection has joined")
		}
		if n := joined.Load(); n != lanes {
			t.Errorf("%d lanes, want %d as before", n, lanes)
		}
		if n := len(f.dialsOf("tls")) - dials; n != 1 {
			t.Errorf("%d connections were made, want 1: the lanes are there", n)
		}
		cancel()
		<-ended
		r.stop()
	})
}

func TestUDPIsJoinedAtOnceWhenLanesFallSilent(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFarOn(t, tunneltest.Config{Flow: true}, first)
		defer f.end()
		joined := f.real(0)
		only := func(kind string) func(context.Context, string, string, int) error {
			return func(ctx context.Context, k, _ string, _ int) error {
				if k != kind {
					return silent(ctx)
				}
				return nil
			}
		}
		f.dialNow(only("tls"))
		r := f.run(tunnel.ModeAuto, nil)
		r.up()
		ctx, cancel := context.WithCancel(context.Background())
		ended := r.call(ctx)
		time.Sleep(5 * time.Minute) // it has become rare that QUIC is tried
		if joined.Load() == 0 {
			t.Error("there are no lanes")
		}
		f.dialNow(only("quic"))
		f.nets["tls"].CutLanes()
		began := time.Now()
		if s := r.by(wire.WayDatagram); time.Since(began) > 1500*time.Millisecond {
			t.Errorf("it took %v: %+v", time.Since(began), s)
		}
		cancel()
		<-ended
		r.stop()
	})
}

func TestTCPIsGivenUpWhereNothingComesByItWhileUDPPasses(t *testing.T) {
	now := time.Unix(1000, 0)
	ago := func(d time.Duration) time.Time { return now.Add(-d) }
	const long = 2 * time.Second
	for name, c := range map[string]struct {
		way     wire.Way
		flowing bool
		joined  time.Time
		lanes   time.Time // heard
		udp     time.Time // heard
		want    time.Duration
	}{
		"lanes are silent":                {wire.WaySealed, true, ago(time.Hour), ago(long), now, long},
		"all is silent":                   {wire.WaySealed, true, ago(time.Hour), ago(long), ago(long), 0},
		"lanes are heard":                 {wire.WaySealed, true, ago(time.Hour), now, now, 0},
		"it has just been joined":         {wire.WaySealed, true, now, time.Time{}, now, 0},
		"no datagrams flow":               {wire.WaySealed, false, ago(time.Hour), ago(long), now, 0},
		"datagrams go by lanes":           {wire.WayLanes, true, ago(time.Hour), ago(long), now, 0},
		"lanes that ended were heard too": {wire.WaySealed, true, ago(time.Hour), time.Time{}, now, long},
	} {
		r := &run{tcp: &path{carrier: idleCarrier{}, since: c.joined}, choose: chooser{way: c.way}}
		r.tcpHeard = ago(long)
		v := view{now: now, flowing: c.flowing}
		v.ways[wire.WayLanes].Heard, v.ways[wire.WaySealed].Heard = c.lanes, c.udp
		if got := r.tcpQuiet(now, v); got != c.want {
			t.Errorf("%s: quiet for %v, want %v", name, got, c.want)
		}
		r.tcp.carrier = nil
		if got := r.tcpQuiet(now, v); got != 0 {
			t.Errorf("%s, not joined: quiet for %v", name, got)
		}
	}
}

// idleCarrier is a carrier of which nothing is asked.
type idleCarrier struct{ tunnel.Carrier }
