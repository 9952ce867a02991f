package check

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"net"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"culvert/tunnel"
	"culvert/tunnel/wire"
)

// world is a path with an echo at its end, and a tunnel.Link.
type world struct {
	up, down time.Duration
	loses    float64 // each way
	denies   bool    // the echo
	no       error   // to a session
	denied   []tunnel.Target

	mu    sync.Mutex // guards modes
	modes []tunnel.Mode
}

func (w *world) Run(ctx context.Context, mode tunnel.Mode, report func(tunnel.LinkState)) error {
	w.mu.Lock()
	w.modes = append(w.modes, mode)
	w.mu.Unlock()
	report(tunnel.LinkState{Phase: tunnel.LinkConnecting})
	time.Sleep(w.up + w.down)
	if w.no != nil {
		report(tunnel.LinkState{Phase: tunnel.LinkConnecting, Code: tunnel.CodeOf(w.no), Why: tunnel.Sentence(w.no), Refused: true})
	} else {
		s := tunnel.LinkState{Phase: tunnel.LinkUp, Carrier: "quic", Way: "sealed"}
		if mode == tunnel.ModeTCP {
			s.Carrier, s.Way = "tls", "lanes"
		}
		report(s)
	}
	<-ctx.Done()
	return nil
}

func (w *world) Stats() tunnel.LinkStats { return tunnel.LinkStats{} }

func (w *world) isDenied(to tunnel.Target) bool {
	for _, d := range w.denied {
		if d == to {
			return true
		}
	}
	return false
}

func (w *world) OpenStream(_ context.Context, _ tunnel.Peer, to tunnel.Target) (tunnel.Stream, error) {
	if w.isDenied(to) {
		return nil, tunnel.PolicyDenied
	}
	return nil, tunnel.ConnectionRefused
}

func (w *world) OpenPackets(_ tunnel.Peer, r tunnel.Receiver) (tunnel.Packets, error) {
	return &association{w: w, r: r, end: make(chan struct{})}, nil
}

type association struct {
	w     *world
	r     tunnel.Receiver
	once  sync.Once
	end   chan struct{}
	mu    sync.Mutex // guards count
	count uint32
}

func (a *association) Send(p []byte, to tunnel.Target) error {
	select {
	case <-a.end:
		return net.ErrClosed
	default:
	}
	p = bytes.Clone(p)
	go func() {
		time.Sleep(a.w.up)
		switch {
		case a.w.isDenied(to), a.w.denies && to == wire.Echo:
			a.r.Unreachable(to.AddrPort(), tunnel.PolicyDenied)
			return
		case to != wire.Echo || rand.Float64() < a.w.loses:
			return
		}
		a.mu.Lock()
		a.count++
		wire.EchoStamp{Count: a.count, Time: time.Duration(time.Now().UnixNano())}.Put(p)
		a.mu.Unlock()
		if rand.Float64() < a.w.loses {
			return
		}
		time.Sleep(a.w.down)
		a.r.Deliver(p, wire.EchoFrom)
	}()
	return nil
}
func (a *association) Flush()       {}
func (a *association) Close() error { a.once.Do(func() { close(a.end) }); return nil }

func TestATestCallMeasuresThePath(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		began := time.Now()
		w, err := Measure(t.Context(), &world{up: 60 * ms, down: 60 * ms, loses: 0.1}, 10*time.Second)
		if err != nil {
			t.Fatal(err)
		}
		if d := time.Since(began); d > 13*time.Second {
			t.Errorf("it took %v", d)
		}
		for _, row := range w.Rows() {
			if row.Loss < 0.03 || row.Loss > 0.2 || row.Delay != 60*ms || row.Jitter > ms {
				t.Errorf("%s: %+v", row.What, row.Figures)
			}
		}
		if w.Audio.Up.Sent != 500 || w.Video.Up.Sent != 1250 || w.Audio.Grade != GradeDegraded {
			t.Errorf("sent %d and %d, audio is %s (%s)", w.Audio.Up.Sent, w.Video.Up.Sent, w.Audio.Grade, w.Audio.Why)
		}
		if _, err := Measure(t.Context(), &world{denies: true}, time.Second); !errors.Is(err, tunnel.PolicyDenied) {
			t.Errorf("where the echo is denied: %v", err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		time.AfterFunc(time.Second, cancel)
		if _, err := Measure(ctx, &world{}, 10*time.Second); !errors.Is(err, context.Canceled) {
			t.Errorf("when it is cancelled: %v", err)
		}
		time.Sleep(time.Second) // what is under way arrives
	})
}

func TestEachWayHasASessionOfItsOwn(t *testing.T) {
	target := func(s string) tunnel.Target {
		to, err := tunnel.ParseTarget(s)
		if err != nil {
			t.Fatal(err)
		}
		return to
	}
	destinations := []Destination{{UDP: true, To: target("198.51.100.1:3478")}, {To: target("198.51.100.2:443")}, {To: target("a.example:443")}}
	quota := tunnel.Errorf(tunnel.QuotaExceeded, "all 10 places are taken")
	measures := func(context.Context, time.Duration) (Way, error) { return *measured("quic", "sealed", 0, 10*ms), nil }
	for name, c := range map[string]struct {
		world  *world
		change func(*run)
		want   string // steps and statuses
		modes  int
	}{
		"both":              {&world{}, nil, "token good, policy good, media_quic good, media_lanes good", 2},
		"one denied":        {&world{denied: []tunnel.Target{target("198.51.100.1:3478")}}, nil, "token good, policy degraded, media_quic good, media_lanes good", 2},
		"UDP shut":          {&world{}, func(r *run) { r.udpOK = false }, "token good, policy good, media_lanes good, media_quic skipped", 1},
		"TLS shut":          {&world{}, func(r *run) { r.tlsOK = false }, "token good, policy good, media_quic good, media_lanes skipped", 1},
		"mode tcp":          {&world{}, func(r *run) { r.cfg.Mode = tunnel.ModeTCP }, "token good, policy good, media_lanes good, media_quic skipped", 1},
		"nothing":           {&world{}, func(r *run) { r.udpOK, r.tlsOK = false, false }, "token skipped, policy skipped, media_quic skipped, media_lanes skipped", 0},
		"no place":          {&world{no: quota}, nil, "token failed, policy skipped, media_quic skipped, media_lanes skipped", 1},
		"no place but ours": {&world{no: quota}, func(r *run) { r.cfg.Beside = measures }, "token good, policy skipped, media_sidecar good, media_lanes skipped", 1},
		"a shared key":      {&world{}, func(r *run) { r.cfg.Shared, r.cfg.Beside = "bound", measures }, "token skipped, policy skipped, media_sidecar good", 0},
		"an app in a call":  {&world{}, func(r *run) { r.cfg.Busy = "zoom is in a channel" }, "token good, policy good, media_quic skipped, media_lanes skipped", 2},
		"no echo":           {&world{denies: true}, nil, "token good, policy good, media_quic skipped, media_lanes skipped", 2},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				c.world.up, c.world.down = 10*ms, 10*ms
				r := &run{report: &Report{}, udpOK: true, tlsOK: true, cfg: Config{Mode: tunnel.ModeAuto, Link: c.world, Destinations: destinations, Media: time.Second}}
				if c.change != nil {
					c.change(r)
				}
				r.tunnel(t.Context())
				time.Sleep(time.Second) // what is under way arrives
				var got []string
				for _, s := range r.report.Steps {
					got = append(got, s.Name+" "+string(s.Status))
				}
				if strings.Join(got, ", ") != c.want || len(c.world.modes) != c.modes {
					t.Errorf("%s; %d sessions\nwant %s; %d", strings.Join(got, ", "), len(c.world.modes), c.want, c.modes)
				}
			})
		})
	}
}
