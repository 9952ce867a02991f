package uplink

import (
	"context"
	"errors"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"culvert/tunnel"
	"culvert/tunnel/wire"
)

// silent is a dial that nobody answers.
func silent(ctx context.Context) error { <-ctx.Done(); return ctx.Err() }

func TestNewRefuses(t *testing.T) {
	f := newFar(t)
	d := f.nets["tls"].Dialer(nil)
	open := func() (wire.Open, error) { return wire.Open{}, nil }
	for name, c := range map[string]Config{
		"no cloud proxy":    {TLS: d, Open: open},
		"no address":        {TLS: d, Open: open, Proxies: []string{first, "x"}},
		"no dialer":         {Open: open, Proxies: []string{first}},
		"nothing to say":    {TLS: d, Proxies: []string{first}},
		"an empty address":  {TLS: d, Open: open, Proxies: []string{""}},
		"a port too large":  {TLS: d, Open: open, Proxies: []string{"a:65536"}},
		"a scheme in front": {TLS: d, Open: open, Proxies: []string{"https://a:443"}},
	} {
		if _, err := New(c); tunnel.CodeOf(err) != tunnel.ConfigInvalid {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestTLSIsTriedWhenQUICsHeadStartIsOver(t *testing.T) {
	for name, c := range map[string]struct {
		quic func(context.Context) error
		tls  []time.Duration // when it is dialled first
		kind string
		why  string
	}{
		"QUIC is silent":           {silent, []time.Duration{150 * time.Millisecond}, "tls", "UDP had not answered"},
		"QUIC answers at once":     {func(context.Context) error { return nil }, nil, "quic", "QUIC answered in less than 1ms"},
		"QUIC answers at 149 ms":   {func(context.Context) error { time.Sleep(149 * time.Millisecond); return nil }, nil, "quic", "QUIC answered in 149ms"},
		"QUIC fails before":        {func(context.Context) error { time.Sleep(30 * time.Millisecond); return tunnel.UDPBlocked }, []time.Duration{30 * time.Millisecond}, "tls", "QUIC failed (udp_blocked)"},
		"QUIC answers before TLS":  {func(context.Context) error { time.Sleep(160 * time.Millisecond); return nil }, []time.Duration{150 * time.Millisecond}, "quic", "before TLS over TCP"},
		"QUIC shows a certificate": {func(context.Context) error { return tunnel.CertificateUntrusted }, []time.Duration{0}, "tls", "certificate_untrusted"},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := newFar(t, first)
				defer f.end()
				f.dial = func(ctx context.Context, kind, _ string, n int) error {
					if kind == "quic" {
						return c.quic(ctx)
					}
					if n == 1 {
						select {
						case <-time.After(50 * time.Millisecond):
						case <-ctx.Done():
						}
					}
					return ctx.Err()
				}
				r := f.run(tunnel.ModeAuto, nil)
				s := r.up()
				if s.Carrier != c.kind || !strings.Contains(s.Why, c.why) {
					t.Errorf("state %+v", s)
				}
				var at []time.Duration
				for i, d := range f.dialsOf("tls") {
					if i == 0 {
						at = append(at, d.at)
					}
				}
				if !slices.Equal(at, c.tls) {
					t.Errorf("TLS was dialled at %v, want %v", at, c.tls)
				}
				if err := r.stop(); err != nil {
					t.Error(err)
				}
			})
		})
	}
}

func TestTheLoserOfTheRaceIsClosedAndAwaited(t *testing.T) {
	for name, quic := range map[string]time.Duration{"that comes in the same moment": 250 * time.Millisecond, "that heeds no cancelling": 2 * time.Second} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := newFar(t, first)
				defer f.end() // fails where a connection is left open
				dialled := 0
				f.dial = func(_ context.Context, kind, _ string, n int) error {
					if kind == "quic" {
						time.Sleep(quic)
						dialled++
					} else if n == 1 {
						time.Sleep(100 * time.Millisecond)
					}
					return nil
				}
				r := f.run(tunnel.ModeAuto, nil)
				r.up()
				if dialled != 1 {
					t.Error("the link was up while the losing dial still ran")
				}
				opens := slices.DeleteFunc(f.askedFor(), func(s string) bool { return strings.Contains(s, "join") })
				if len(opens) != 1 {
					t.Errorf("asked for %v: only one connection may open a session", opens)
				}
				r.stop()
			})
		})
	}
}

func TestARefusalOverQUICIsNotTriedAgainOverTLS(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFar(t, first)
		defer f.end()
		f.answer = func(kind, _ string, m wire.Message) *wire.Message {
			if kind == "quic" {
				return refused(tunnel.TokenRejected)
			}
			return welcome(m)
		}
		r := f.run(tunnel.ModeAuto, nil)
		if err := <-r.over; tunnel.CodeOf(err) != tunnel.TokenRejected || tunnel.Sentence(err) != "because" {
			t.Errorf("the link ended with %v", err)
		}
		if got := f.askedFor(); !slices.Equal(got, []string{"quic open " + first}) {
			t.Errorf("asked for %v", got)
		}
	})
}

func TestRedirects(t *testing.T) {
	const third, fourth, fifth = "192.0.2.3:443", "192.0.2.4:443", "192.0.2.5:443"
	for name, c := range map[string]struct {
		to     map[string][]string
		asked  []string
		remote string // "": it fails
	}{
		"one is followed":              {map[string][]string{first: {second}}, []string{first, second}, second},
		"three are followed":           {map[string][]string{first: {second}, second: {third}, third: {fourth}}, []string{first, second, third, fourth}, fourth},
		"a fourth is not":              {map[string][]string{first: {second}, second: {third}, third: {fourth}, fourth: {fifth}}, []string{first, second, third, fourth}, ""},
		"a circle ends":                {map[string][]string{first: {first}}, []string{first, first, first, first}, ""},
		"the first that answers is it": {map[string][]string{first: {"192.0.2.9:443", third, second}}, []string{first, third}, third},
		"to nowhere":                   {map[string][]string{first: {}}, []string{first}, ""},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := newFar(t, first, second, third, fourth, fifth)
				defer f.end()
				f.answer = func(_, address string, m wire.Message) *wire.Message {
					if to, ok := c.to[address]; ok {
						return redirect(to...)
					}
					return welcome(m)
				}
				r := f.run(tunnel.ModeUDP, nil)
				if c.remote != "" {
					if s := r.up(); s.Remote.String() != c.remote {
						t.Errorf("up at %s, want %s", s.Remote, c.remote)
					}
				} else if s := r.failed(1); s.Code == "" {
					t.Errorf("state %+v", s)
				}
				r.stop()
				var want []string
				for _, a := range c.asked {
					want = append(want, "quic open "+a)
				}
				if got := f.askedFor(); !slices.Equal(got, want) {
					t.Errorf("asked for %v, want %v", got, want)
				}
			})
		})
	}
}

func TestCloudProxiesAreTriedInTheirOrder(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFar(t, first, second)
		defer f.end()
		f.dial = func(_ context.Context, _, address string, _ int) error {
			if address == first {
				return tunnel.Errorf(tunnel.CloudUnreachable, "the first is down")
			}
			return nil
		}
		r := f.run(tunnel.ModeUDP, func(c *Config) { c.Proxies = []string{first, second} })
		if s := r.up(); s.Remote.String() != second || len(r.all()) != 2 {
			t.Errorf("states %+v", r.all())
		}
		// The first is preferred again as soon as there is a choice.
		f.dialNow(func(context.Context, string, string, int) error { return nil })
		f.answer = func(_, _ string, m wire.Message) *wire.Message {
			if m.Join != nil {
				return refused(tunnel.SessionUnknown)
			}
			return welcome(m)
		}
		f.nets["quic"].Cut()
		r.failed(1)
		if s := r.up(); s.Remote.String() != first {
			t.Errorf("state %+v", s)
		}
		r.stop()
	})
	synctest.Test(t, func(t *testing.T) {
		f := newFar(t, second)
		defer f.end()
		f.answer = func(string, string, wire.Message) *wire.Message { return refused(tunnel.LimitExceeded) }
		r := f.run(tunnel.ModeUDP, func(c *Config) { c.Proxies = []string{first, second} })
		if s := r.failed(1); s.Code != tunnel.CloudUnreachable || !strings.Contains(s.Why, first) {
			t.Errorf("where all fail the first's error counts: %+v", s)
		}
		r.stop()
	})
}

// After a restart of a cloud proxy all its sidecars come at once.
func TestANewSessionNeedsNoOtherConnectionThanTheOneThatAskedForTheOld(t *testing.T) {
	for name, c := range map[string]struct {
		silent bool // to an Open after a Join
		dials  int
		pauses []time.Duration
	}{
		"usually":                               {false, 2, nil},
		"where the cloud proxy does not answer": {true, 3, []time.Duration{firstBackoff * 2}},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := newFar(t, first)
				defer f.end()
				f.answer = func(_, _ string, m wire.Message) *wire.Message {
					switch n := len(f.askedFor()); {
					case m.Join != nil:
						return refused(tunnel.SessionUnknown)
					case c.silent && n == 3:
						return nil
					}
					return welcome(m)
				}
				r := f.run(tunnel.ModeUDP, nil)
				r.up()
				time.Sleep(time.Minute)
				r.pauses()
				f.nets["quic"].Cut()
				r.failed(1)
				r.up()
				if n := len(f.dialsOf("quic")); n != c.dials {
					t.Errorf("%d connections, want %d; asked for %v", n, c.dials, f.askedFor())
				}
				if got := r.pauses(); !slices.Equal(got, c.pauses) {
					t.Errorf("pauses %v, want %v", got, c.pauses)
				}
				// One that comes and goes as fast as it can is not followed that fast.
				f.nets["quic"].Cut()
				for range 100_000 {
					if len(r.pauses()) > 0 {
						r.stop()
						return
					}
					time.Sleep(time.Millisecond)
				}
				t.Error("there is no pause")
			})
		})
	}
}

func TestUDPThatStopsAfterTheHandshakeLeavesTLS(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFar(t, first)
		defer f.end()
		f.answer = func(kind, _ string, m wire.Message) *wire.Message {
			if kind == "quic" {
				return nil
			}
			return welcome(m)
		}
		r := f.run(tunnel.ModeAuto, nil)
		if s := r.up(); s.Carrier != "tls" || s.Way != "lanes" || !strings.Contains(s.Why, "UDP stopped passing") || s.Took != openTime {
			t.Errorf("state %+v", s)
		}
		r.stop()
		began := time.Now()
		r = f.run(tunnel.ModeUDP, nil)
		if s := r.failed(1); s.Code != tunnel.CloudUnreachable || !strings.Contains(s.Why, first) {
			t.Errorf("mode udp: state %+v", s)
		}
		if d := time.Since(began); d < openTime || d > openTime+time.Millisecond {
			t.Errorf("the welcome was awaited for %v, want %v", d, openTime)
		}
		r.stop()
	})
}

func TestALaneThatFailsIsNamedAndTheLinkTriesAgain(t *testing.T) {
	for name, c := range map[string]struct {
		dial   error
		answer *wire.Message // to a Join
		code   tunnel.Code
		why    string
	}{
		"not dialled":                 {tunnel.Errorf(tunnel.CloudUnreachable, "the lane was cut"), nil, tunnel.CloudUnreachable, "the lane was cut"},
		"refused":                     {nil, refused(tunnel.SessionUnknown), tunnel.SessionUnknown, "because"},
		"not answered":                {nil, nil, tunnel.CloudUnreachable, "did not answer"},
		"welcomed to another session": {nil, &wire.Message{Welcome: &wire.Welcome{Version: wire.Current, Session: "ffff"}}, tunnel.Internal, "something else"},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := newFar(t, first)
				defer f.end()
				f.dial = func(_ context.Context, _, _ string, n int) error {
					if n == 2 {
						return c.dial
					}
					return nil
				}
				joins := 0
				f.answer = func(_, _ string, m wire.Message) *wire.Message {
					if m.Join != nil {
						if joins++; joins == 1 && c.dial == nil {
							return c.answer
						}
					}
					return welcome(m)
				}
				r := f.run(tunnel.ModeTCP, nil)
				if s := r.failed(1); s.Code != c.code || !strings.Contains(s.Why, c.why) {
					t.Errorf("state %+v", s)
				}
				if s := r.up(); s.Way != "lanes" {
					t.Errorf("state %+v", s)
				}
				r.stop()
			})
		})
	}
}

func TestALaneThatCanNotBeReplacedEndsTheCarrier(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFar(t, first)
		defer f.end()
		r := f.run(tunnel.ModeTCP, nil)
		r.up()
		f.dialNow(func(context.Context, string, string, int) error { return tunnel.Errorf(tunnel.CloudUnreachable, "cut") })
		began := time.Now()
		f.nets["tls"].CutLanes()
		if s := r.failed(1); s.Why != "cut" {
			t.Errorf("state %+v", s)
		}
		for f.carriers.Load() > 0 {
			time.Sleep(time.Millisecond)
		}
		if d := time.Since(began); d < laneTime || d > laneTime+2*time.Second {
			t.Errorf("the carrier was given up after %v, want %v", d, laneTime)
		}
		f.dialNow(func(context.Context, string, string, int) error { return nil })
		if s := r.up(); s.Way != "lanes" {
			t.Errorf("state %+v", s)
		}
		r.stop()
	})
}

func TestPausesDoubleUpToTenSecondsAndBeginAnew(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFar(t, first)
		defer f.end()
		// Each failure reads differently, since only a change is reported.
		down := func(_ context.Context, _, _ string, n int) error {
			return tunnel.Errorf(tunnel.CloudUnreachable, "down the %d. time", n)
		}
		f.dial = down
		r := f.run(tunnel.ModeTCP, nil)
		r.failed(9)
		synctest.Wait()
		want := []time.Duration{250, 500, 1000, 2000, 4000, 8000, 10000, 10000, 10000}
		for i := range want {
			want[i] *= time.Millisecond
		}
		if got := r.pauses(); !slices.Equal(got, want) {
			t.Errorf("the pauses are %v, want %v", got, want)
		}
		at := time.Duration(0)
		for i, d := range f.dialsOf("tls") {
			if d.at != at {
				t.Errorf("dial %d at %v, want %v", i, d.at, at)
			}
			at += want[i]
		}
		f.dialNow(func(context.Context, string, string, int) error { return nil })
		r.up()
		time.Sleep(maxBackoff + time.Second) // one that ends sooner counts as another failure
		r.pauses()
		f.dialNow(down)
		f.nets["tls"].Cut()
		r.failed(10)
		synctest.Wait()
		if got := r.pauses(); len(got) == 0 || got[0] != joinStagger {
			t.Errorf("after a success the pauses are %v, want %v first, while the session is held", got, joinStagger)
		}
		r.stop()
	})
}

func TestTheSameFailureIsReportedOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFar(t, first)
		defer f.end()
		f.dial = func(context.Context, string, string, int) error {
			return tunnel.Errorf(tunnel.CloudUnreachable, "down")
		}
		r := f.run(tunnel.ModeTCP, nil)
		r.failed(1)
		time.Sleep(time.Minute)
		synctest.Wait()
		if n := len(r.pauses()); n < 5 {
			t.Errorf("%d tries in a minute", n)
		}
		r.mu.Lock()
		down := 0
		for _, s := range r.states {
			if s.Why == "down" {
				down++
			}
		}
		r.mu.Unlock()
		if down != 1 {
			t.Errorf("reported %d times", down)
		}
		r.stop()
	})
}

func TestJitterIsHalfToOneAndAHalf(t *testing.T) {
	f := newFar(t)
	u, err := New(Config{Proxies: []string{first}, TLS: f.nets["tls"].Dialer(nil), Open: func() (wire.Open, error) { return wire.Open{}, nil }})
	if err != nil {
		t.Fatal(err)
	}
	const d = 10 * time.Second
	low, high := d, d
	for range 10_000 {
		j := u.cfg.jitter(d)
		low, high = min(low, j), max(high, j)
	}
	if low < d/2 || high >= d+d/2 || high-low < 9*d/10 {
		t.Errorf("from %v to %v", low, high)
	}
}

func TestCancellingLeavesNothingAtAnyStage(t *testing.T) {
	lane := func(n int) bool { return n == 2 }
	for name, c := range map[string]struct {
		mode   tunnel.Mode
		dial   func(ctx context.Context, kind string, n int) error
		answer func(m wire.Message) *wire.Message
		before func(f *far, r *running)
		at     time.Duration
	}{
		"in both dials":             {mode: tunnel.ModeAuto, dial: func(ctx context.Context, _ string, _ int) error { return silent(ctx) }, at: time.Second},
		"in the head start":         {mode: tunnel.ModeAuto, dial: func(ctx context.Context, _ string, _ int) error { return silent(ctx) }, at: 100 * time.Millisecond},
		"in a dial":                 {mode: tunnel.ModeTCP, dial: func(ctx context.Context, _ string, _ int) error { return silent(ctx) }, at: time.Second},
		"before the welcome":        {mode: tunnel.ModeAuto, answer: func(wire.Message) *wire.Message { return nil }, at: time.Second},
		"in the fallback's opening": {mode: tunnel.ModeAuto, answer: func(wire.Message) *wire.Message { return nil }, at: openTime + time.Second},
		"in the lane's dial": {mode: tunnel.ModeTCP, dial: func(ctx context.Context, _ string, n int) error {
			if lane(n) {
				return silent(ctx)
			}
			return nil
		}, at: time.Second},
		"before the lane's welcome": {mode: tunnel.ModeTCP, answer: func(m wire.Message) *wire.Message {
			if m.Join != nil {
				return nil
			}
			return welcome(m)
		}, at: time.Second},
		"in a pause":         {mode: tunnel.ModeTCP, dial: func(context.Context, string, int) error { return tunnel.CloudUnreachable }, at: 12 * time.Second},
		"while up over QUIC": {mode: tunnel.ModeUDP, at: time.Second},
		"while up over TLS":  {mode: tunnel.ModeTCP, at: time.Second},
		"after a redirect":   {mode: tunnel.ModeUDP, answer: func(wire.Message) *wire.Message { return redirect("192.0.2.9:443", second) }, at: time.Millisecond},
		"while a lane is lost": {mode: tunnel.ModeTCP, dial: func(ctx context.Context, _ string, n int) error {
			if n > 2 {
				return tunnel.CloudUnreachable
			}
			return nil
		}, before: func(f *far, r *running) { r.up(); f.nets["tls"].CutLanes() }, at: 100 * time.Millisecond},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := newFar(t, first, second)
				if c.dial != nil {
					f.dial = func(ctx context.Context, kind, _ string, n int) error { return c.dial(ctx, kind, n) }
				}
				if c.answer != nil {
					f.answer = func(_, _ string, m wire.Message) *wire.Message { return c.answer(m) }
				}
				r := f.run(c.mode, nil)
				if c.before != nil {
					c.before(f, r)
				}
				time.Sleep(c.at)
				began := time.Now()
				if err := r.stop(); err != nil {
					t.Errorf("Run returned %v", err)
				}
				f.end()                                    // every connection is closed
				if d := time.Since(began); d > leaveTime { // the cloud proxy here does not answer
					t.Errorf("the end took %v", d)
				}
			})
		})
	}
}

func TestStatesAreReportedInTheirOrder(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFar(t, first)
		defer f.end()
		f.dial = func(_ context.Context, _, _ string, n int) error {
			if n == 1 || n == 3 {
				return tunnel.Errorf(tunnel.CloudUnreachable, "failure %d", n)
			}
			return nil
		}
		r := f.run(tunnel.ModeUDP, nil)
		r.up()
		f.nets["quic"].Cut()
		r.failed(2)
		r.up()
		time.Sleep(time.Hour) // a link that is up has nothing more to say
		var got []string
		for _, s := range r.all() {
			if what := string(s.Phase) + " " + string(s.Code); len(got) == 0 || got[len(got)-1] != what { // the loss and the failure may be seen as one
				got = append(got, what)
			}
		}
		want := []string{"connecting ", "connecting cloud_unreachable", "up ", "connecting cloud_unreachable", "up "}
		if !slices.Equal(got, want) {
			t.Errorf("the states are %q, want %q", got, want)
		}
		if err := r.stop(); err != nil {
			t.Error(err)
		}
	})
}

func TestWhatEndsALink(t *testing.T) {
	never := [4]bool{}
	said := [4]bool{0: true, 1: true}
	for code, want := range map[tunnel.Code][4]bool{ // refused at the start, later; met elsewhere at the start, later
		tunnel.TokenExpired:         said,
		tunnel.TokenRejected:        said,
		tunnel.VersionMismatch:      said, // what some other TLS server says is not the cloud proxy's word
		tunnel.NotPermitted:         said, // a firewall here is not either
		tunnel.ConfigInvalid:        {0: true, 2: true},
		tunnel.CertificateUntrusted: never, // it may be a captive portal
		tunnel.QuotaExceeded:        never, // another sidecar may leave
		tunnel.CloudUnreachable:     never,
		tunnel.UDPBlocked:           never,
		tunnel.LimitExceeded:        never,
		tunnel.SessionUnknown:       never,
		tunnel.Internal:             never,
	} {
		err := tunnel.Errorf(code, "x")
		got := [4]bool{final(refusal{err}, false), final(refusal{err}, true), final(err, false), final(err, true)}
		if got != want {
			t.Errorf("%s ends the link: %v, want %v", code, got, want)
		}
	}
}

func TestATokenThatCanNotBeReadIsNamed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFar(t, first)
		defer f.end()
		r := f.run(tunnel.ModeTCP, func(c *Config) {
			c.Open = func() (wire.Open, error) {
				return wire.Open{}, tunnel.Errorf(tunnel.ConfigInvalid, "token can not be read")
			}
		})
		if err := <-r.over; tunnel.CodeOf(err) != tunnel.ConfigInvalid {
			t.Errorf("the link ended with %v", err)
		}
	})
}

type lastWord chan error

func (l lastWord) Deliver([]byte, netip.AddrPort)    {}
func (l lastWord) Unreachable(netip.AddrPort, error) {}
func (l lastWord) Closed(err error)                  { l <- err }

func TestTheEndOfTheLinkEndsAssociationsWithItsReason(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFar(t, first)
		defer f.end()
		f.dial = func(_ context.Context, _, _ string, n int) error {
			if n > 1 {
				return tunnel.Errorf(tunnel.TokenExpired, "over")
			}
			return nil
		}
		r := f.run(tunnel.ModeUDP, nil)
		r.up()
		closed := make(lastWord, 1)
		if _, err := r.OpenPackets(tunnel.Peer{}, closed); err != nil {
			t.Fatal(err)
		}
		f.nets["quic"].Cut()
		if err := <-r.over; !errors.Is(err, tunnel.TokenExpired) {
			t.Errorf("the link ended with %v", err)
		}
		if err := <-closed; !errors.Is(err, tunnel.TokenExpired) {
			t.Errorf("the association ended with %v", err)
		}
		if _, err := r.OpenStream(t.Context(), tunnel.Peer{}, tunnel.Target{Host: "x", Port: 1}); tunnel.CodeOf(err) != tunnel.CloudUnreachable {
			t.Errorf("a stream without a link: %v", err)
		}
	})
	synctest.Test(t, func(t *testing.T) {
		f := newFar(t, first)
		defer f.end()
		r := f.run(tunnel.ModeUDP, nil)
		r.up()
		closed := make(lastWord, 1)
		r.OpenPackets(tunnel.Peer{}, closed)
		r.stop()
		if err := <-closed; !errors.Is(err, tunnel.ProxyStopped) {
			t.Errorf("after a stop the association ended with %v", err)
		}
	})
}
