package cloudproxy_test

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"

	"culvert/cloudproxy"
	"culvert/tunnel"
	"culvert/tunnel/session"
	"culvert/tunnel/tunneltest"
	"culvert/tunnel/uplink"
	"culvert/tunnel/wire"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const address = "192.0.2.1:443"

// world is a cloud proxy on a UDP and a TCP network in memory.
type world struct {
	udp, tcp         *tunneltest.Net
	dialUDP, dialTCP func(context.Context) error // asked before each dial
	echo             *tunneltest.Echo
	authorize        cloudproxy.Authorize
	renew            func(token string) error
	log              *slog.Logger
	check            func() error
	token            atomic.Pointer[string] // nil: "secret"
	renewed          chan struct{}          // tells the sidecar of another token
	server           *cloudproxy.Server

	mu       sync.Mutex
	opens    []tunnel.Open
	released int
}

func newWorld() *world {
	w := &world{echo: &tunneltest.Echo{}}
	w.dialUDP = func(context.Context) error { return nil }
	w.dialTCP = w.dialUDP
	w.udp = tunneltest.NewNet(tunneltest.Config{Kind: "quic", Dial: func(ctx context.Context, _ string) error { return w.dialUDP(ctx) }})
	w.tcp = tunneltest.NewNet(tunneltest.Config{Kind: "tls", Dial: func(ctx context.Context, _ string) error { return w.dialTCP(ctx) }})
	return w
}

// serve runs a cloud proxy until stop is called, which waits for its end.
func (w *world) serve(t *testing.T) (stop func()) {
	t.Helper()
	lu, err := w.udp.Listen(address)
	if err != nil {
		t.Fatal(err)
	}
	lt, err := w.tcp.Listen(address)
	if err != nil {
		t.Fatal(err)
	}
	w.server, err = cloudproxy.New(cloudproxy.Config{
		Listeners: []tunnel.Listener{lu, lt}, Address: address, Region: "eu", Drain: 10 * time.Second, Log: w.log,
		Authorize: func(ctx context.Context, o tunnel.Open) (cloudproxy.Grant, error) {
			w.mu.Lock()
			w.opens = append(w.opens, o)
			w.mu.Unlock()
			if w.authorize != nil {
				return w.authorize(ctx, o)
			}
			return cloudproxy.Grant{Next: w.echo, Release: func() { w.mu.Lock(); w.released++; w.mu.Unlock() }, Renew: w.renew, Check: w.check}, nil
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- w.server.Run(ctx) }()
	return func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
}

// sidecar is a running uplink.
type sidecar struct {
	*uplink.Uplink
	states chan tunnel.LinkState
	stop   func() error // ends Run and returns its error
	over   chan struct{}
}

func key(n byte) ed25519.PublicKey {
	return ed25519.NewKeyFromSeed([]byte(strings.Repeat(string(rune('a'+n)), ed25519.SeedSize))).Public().(ed25519.PublicKey)
}

func (w *world) sidecar(t *testing.T, n byte, mode tunnel.Mode) *sidecar {
	t.Helper()
	u, err := uplink.New(uplink.Config{
		Proxies: []string{address}, QUIC: w.udp.Dialer(key(n)), TLS: w.tcp.Dialer(key(n)),
		Open: func() (wire.Open, error) {
			token := "secret"
			if t := w.token.Load(); t != nil {
				token = *t
			}
			return wire.Open{App: fmt.Sprintf("app%d", n), Token: token}, nil
		},
		Renewed: w.renewed,
	})
	if err != nil {
		t.Fatal(err)
	}
	s := &sidecar{Uplink: u, states: make(chan tunnel.LinkState, 1000), over: make(chan struct{})}
	ctx, cancel := context.WithCancel(context.Background())
	var result error
	go func() {
		result = u.Run(ctx, mode, func(st tunnel.LinkState) { s.states <- st })
		close(s.over)
	}()
	s.stop = func() error { cancel(); <-s.over; return result }
	return s
}

// up waits for the link to be up.
func (s *sidecar) up(t *testing.T) tunnel.LinkState {
	t.Helper()
	for {
		select {
		case st := <-s.states:
			if st.Phase == tunnel.LinkUp {
				return st
			}
		case <-s.over:
			t.Fatalf("the link ended: %v", s.stop())
		case <-time.After(time.Minute):
			t.Fatal("the link did not come up in a minute")
		}
	}
}

type inbox chan string

func (i inbox) Deliver(p []byte, from netip.AddrPort) { i <- fmt.Sprintf("%s from %s", p, from) }
func (i inbox) Unreachable(netip.AddrPort, error)     {}
func (i inbox) Closed(error)                          { close(i) }

var far = tunnel.TargetOf(netip.MustParseAddrPort("203.0.113.9:3478"))

// works says that a stream and an association pass.
func (s *sidecar) works(t *testing.T) {
	t.Helper()
	st, err := s.OpenStream(t.Context(), tunnel.Peer{}, far)
	if err != nil {
		t.Fatal(err)
	}
	go func() { st.Write([]byte("hello")); st.CloseWrite() }()
	if b, err := io.ReadAll(st); string(b) != "hello" || err != nil {
		t.Fatalf("the stream answers %q, %v", b, err)
	}
	st.Close()
	in := make(inbox, 10)
	p, err := s.OpenPackets(tunnel.Peer{}, in)
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	for range 30 { // one may be lost where a connection has just been
		p.Send([]byte("ping"), far)
		select {
		case got := <-in:
			if got != "ping from "+far.String() {
				t.Fatalf("the association answers %q", got)
			}
			return
		case <-time.After(time.Second):
		}
	}
	t.Fatal("the association does not answer")
}

func TestQUICIsUsedWhereItAnswersInItsHeadStart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld()
		defer w.serve(t)()
		var up atomic.Bool
		w.dialTCP = func(context.Context) error {
			if !up.Load() {
				t.Error("TCP was dialled in the head start")
			}
			return nil
		}
		w.dialUDP = func(context.Context) error { time.Sleep(100 * time.Millisecond); up.Store(true); return nil }
		s := w.sidecar(t, 0, tunnel.ModeAuto)
		defer s.stop()
		st := s.up(t)
		if st.Carrier != "quic" || st.Way != "quic-datagram" || !strings.Contains(st.Why, "100ms") || len(st.Info.Proxies) != 1 {
			t.Errorf("state %+v", st)
		}
		s.works(t)
	})
}

func TestWhereUDPIsSilentTLSCarriesStreamsAndALaneDatagrams(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld()
		defer w.serve(t)()
		w.dialUDP = func(ctx context.Context) error { <-ctx.Done(); return ctx.Err() }
		w.dialTCP = func(context.Context) error { time.Sleep(80 * time.Millisecond); return nil }
		began := time.Now()
		s := w.sidecar(t, 0, tunnel.ModeAuto)
		defer s.stop()
		st := s.up(t)
		if st.Carrier != "tls" || st.Way != "lanes" || !strings.Contains(st.Why, "UDP had not answered") {
			t.Errorf("state %+v", st)
		}
		if took := time.Since(began); took > 400*time.Millisecond {
			t.Errorf("it took %v", took)
		}
		s.works(t)
		if len(w.opens) != 1 {
			t.Errorf("%d opens, want one", len(w.opens))
		}
	})
}

func TestASlowQUICStillLosesToNobodyWhereTCPIsRefused(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld()
		defer w.serve(t)()
		w.dialUDP = func(context.Context) error { time.Sleep(time.Second); return nil }
		w.dialTCP = func(context.Context) error { return tunnel.Errorf(tunnel.CloudUnreachable, "refused") }
		s := w.sidecar(t, 0, tunnel.ModeAuto)
		defer s.stop()
		if st := s.up(t); st.Carrier != "quic" {
			t.Errorf("state %+v", st)
		}
	})
}

func TestStreamsRideTLSWhereTCPPassesAndOutliveIt(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld()
		defer w.serve(t)()
		var blocked atomic.Bool
		w.dialTCP = func(context.Context) error {
			if blocked.Load() {
				return tunnel.Errorf(tunnel.CloudUnreachable, "refused")
			}
			return nil
		}
		s := w.sidecar(t, 0, tunnel.ModeAuto)
		defer s.stop()
		streams := func(want string) {
			t.Helper()
			for st := s.up(t); st.Streams != want; st = s.up(t) {
				if st.Carrier != "quic" || st.Way != "quic-datagram" {
					t.Fatalf("state %+v", st)
				}
			}
		}
		streams("quic")
		st, err := s.OpenStream(t.Context(), tunnel.Peer{}, far)
		if err != nil {
			t.Fatal(err)
		}
		says := func(what string) {
			t.Helper()
			st.Write([]byte(what))
			b := make([]byte, len(what))
			if _, err := io.ReadFull(st, b); err != nil || string(b) != what {
				t.Fatalf("the stream says %q, %v", b, err)
			}
		}
		says("one")
		streams("tls")
		says("two")
		blocked.Store(true)
		w.tcp.Cut()
		streams("quic")
		says("three")
		s.works(t)
		blocked.Store(false)
		streams("tls")
		w.udp.Cut() // it does not ride QUIC any more, and QUIC is joined again
		says("four")
		st.Close()
		s.works(t)
		if len(w.opens) != 1 {
			t.Errorf("%d opens, want one", len(w.opens))
		}
	})
}

func TestModesUseOnlyTheirCarrier(t *testing.T) {
	for mode, want := range map[tunnel.Mode]string{tunnel.ModeUDP: "quic", tunnel.ModeTCP: "tls"} {
		synctest.Test(t, func(t *testing.T) {
			w := newWorld()
			defer w.serve(t)()
			s := w.sidecar(t, 0, mode)
			defer s.stop()
			if st := s.up(t); st.Carrier != want {
				t.Errorf("mode %s uses %s", mode, st.Carrier)
			}
			s.works(t)
		})
	}
}

func TestALostPathIsReplacedAndAssociationsLiveOn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld()
		defer w.serve(t)()
		s := w.sidecar(t, 0, tunnel.ModeUDP)
		defer s.stop()
		s.up(t)
		in := make(inbox, 10)
		p, err := s.OpenPackets(tunnel.Peer{}, in)
		if err != nil {
			t.Fatal(err)
		}
		p.Send([]byte("one"), far)
		<-in
		began := time.Now()
		w.udp.Cut()
		for got := ""; got == ""; { // the loss may pass before the link is said to be down
			p.Send([]byte("two"), far)
			select {
			case got = <-in:
				if got != "two from "+far.String() {
					t.Errorf("got %q", got)
				}
			case <-time.After(10 * time.Millisecond):
			}
			if d := time.Since(began); d > time.Second {
				t.Fatalf("it took more than %v", d)
			}
		}
		synctest.Wait()
		if n := len(w.opens); n != 1 || w.released != 0 || w.server.Sessions() != 1 {
			t.Errorf("%d opens, %d released, %d sessions: the session should live on", n, w.released, w.server.Sessions())
		}
		if n := len(w.echo.Open()); n != 1 {
			t.Errorf("%d associations at the cloud proxy, want the one that there was", n)
		}
	})
}

func TestALostLaneIsJoinedAgainWhileStreamsLiveOn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld()
		// The mux and the lanes are told apart by what dials them.
		defer w.serve(t)()
		s := w.sidecar(t, 0, tunnel.ModeTCP)
		defer s.stop()
		s.up(t)
		st, err := s.OpenStream(t.Context(), tunnel.Peer{}, far)
		if err != nil {
			t.Fatal(err)
		}
		w.tcp.CutLanes()
		synctest.Wait()
		s.works(t)
		go st.Write([]byte("still here"))
		b := make([]byte, 10)
		if _, err := io.ReadFull(st, b); err != nil || string(b) != "still here" {
			t.Errorf("the stream says %q, %v", b, err)
		}
		st.Close()
		if len(w.opens) != 1 {
			t.Errorf("%d opens", len(w.opens))
		}
	})
}

func TestARefusalThatRepeatingCanNotMendEndsTheLink(t *testing.T) {
	for code, ends := range map[tunnel.Code]bool{tunnel.TokenExpired: true, tunnel.TokenRejected: true, tunnel.QuotaExceeded: false, tunnel.CloudUnreachable: false} {
		t.Run(string(code), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld()
				defer w.serve(t)()
				w.authorize = func(context.Context, tunnel.Open) (cloudproxy.Grant, error) {
					return cloudproxy.Grant{}, tunnel.Errorf(code, "because")
				}
				s := w.sidecar(t, 0, tunnel.ModeAuto)
				time.Sleep(10 * time.Second)
				select {
				case <-s.over:
					if !ends {
						t.Error("the link has ended")
					}
				default:
					if ends {
						t.Error("the link still tries")
					}
				}
				if err := s.stop(); ends && (tunnel.CodeOf(err) != code || tunnel.Sentence(err) != "because") {
					t.Errorf("%v", err)
				}
			})
		})
	}
}

func TestALinkThatWasNeverUpIsSoughtForAsLongAsIsAsked(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld() // nobody listens
		s := w.sidecar(t, 0, tunnel.ModeAuto)
		defer s.stop()
		time.Sleep(3 * time.Hour)
		defer w.serve(t)()
		s.up(t)
		s.works(t)
	})
}

func TestTheLinkGivesUpTwentyMinutesAfterItsLoss(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld()
		stop := w.serve(t)
		s := w.sidecar(t, 0, tunnel.ModeAuto)
		s.up(t)
		stop()
		began := time.Now()
		<-s.over
		if d := time.Since(began); d < 20*time.Minute || d > 21*time.Minute {
			t.Errorf("after %v", d)
		}
		if err := s.stop(); tunnel.CodeOf(err) != tunnel.CloudUnreachable {
			t.Error(err)
		}
	})
}

func TestOfTwoSidecarsWithOneKeyTheLastIsServed(t *testing.T) {
	for _, mode := range []tunnel.Mode{tunnel.ModeUDP, tunnel.ModeTCP, tunnel.ModeAuto} {
		t.Run(string(mode), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld()
				defer w.serve(t)()
				first := w.sidecar(t, 0, mode)
				first.up(t)
				other := w.sidecar(t, 1, mode)
				defer other.stop()
				other.up(t)
				second := w.sidecar(t, 0, mode)
				defer second.stop()
				second.up(t)
				began := time.Now()
				<-first.over
				if err := first.stop(); !errors.Is(err, tunnel.NotPermitted) || !strings.Contains(err.Error(), "key_file") {
					t.Errorf("the first sidecar ends with %v", err)
				}
				if took := time.Since(began); took > time.Second {
					t.Errorf("the first sidecar ends after %v", took)
				}
				time.Sleep(time.Hour) // neither takes the session back
				if n := w.server.Sessions(); n != 2 {
					t.Errorf("%d sessions, want 2", n)
				}
				w.mu.Lock()
				if len(w.opens) != 3 || w.released != 1 {
					t.Errorf("%d sessions were opened and %d released, want 3 and 1", len(w.opens), w.released)
				}
				w.mu.Unlock()
				second.works(t)
				other.works(t)
			})
		})
	}
}

func TestAnOldSessionEndsAlsoWhereNobodyHears(t *testing.T) {
	for name, c := range map[string]struct {
		instance string
		took     time.Duration
	}{
		"of the same sidecar":                    {"one", 0},
		"of one that was killed and is back":     {"two", time.Second},
		"of one that does not say which it is":   {"", time.Second},
		"of one that says more than it needs to": {strings.Repeat("x", 10_000), -1},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld()
				defer w.serve(t)()
				open := func(instance string) (tunnel.Carrier, error) {
					cand, err := w.udp.Dialer(key(0)).Dial(t.Context(), address)
					if err != nil {
						t.Fatal(err)
					}
					if err := wire.Write(cand, wire.Message{Open: &wire.Open{Version: wire.Current, App: "app", Instance: instance}}); err != nil {
						t.Fatal(err)
					}
					m, err := wire.Read(cand, wire.Version{})
					if err != nil {
						t.Fatal(err)
					}
					if m.Refused != nil {
						cand.Close()
						return nil, m.Refused.Err()
					}
					c, err := cand.Carrier()
					if err != nil {
						t.Fatal(err)
					}
					return c, nil
				}
				first, _ := open("one")
				began := time.Now()
				second, err := open(c.instance)
				if c.took < 0 {
					if tunnel.CodeOf(err) != tunnel.LimitExceeded || first.Err() != nil {
						t.Errorf("it is answered with %v; the session: %v", err, first.Err())
					}
					first.Close(nil)
					return
				}
				<-first.Done()
				if took := time.Since(began); took != c.took {
					t.Errorf("it ended after %v, want %v", took, c.took)
				}
				synctest.Wait()
				if n := w.server.Sessions(); n != 1 || second.Err() != nil {
					t.Errorf("%d sessions, want 1; the new one: %v", n, second.Err())
				}
				second.Close(nil)
			})
		})
	}
}

func TestASessionWithoutConnectionsIsHeldForAMinute(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld()
		defer w.serve(t)()
		s := w.sidecar(t, 0, tunnel.ModeUDP)
		defer s.stop()
		s.up(t)
		in := make(inbox, 10)
		p, err := s.OpenPackets(tunnel.Peer{}, in)
		if err != nil {
			t.Fatal(err)
		}
		p.Send([]byte("one"), far)
		<-in
		var down atomic.Bool
		w.dialUDP = func(context.Context) error {
			if down.Load() {
				return tunnel.Errorf(tunnel.CloudUnreachable, "down")
			}
			return nil
		}
		for _, c := range []struct {
			away     time.Duration
			released int
		}{{50 * time.Second, 0}, {70 * time.Second, 1}} {
			down.Store(true)
			w.udp.Cut()
			time.Sleep(c.away)
			down.Store(false)
			for s.up(t); ; time.Sleep(10 * time.Millisecond) {
				p.Send([]byte("two"), far)
				select {
				case <-in:
				case <-time.After(time.Second):
					continue
				}
				break
			}
			if w.released != c.released {
				t.Errorf("after %v without a path %d sessions had ended, want %d", c.away, w.released, c.released)
			}
		}
	})
}

func TestAStopEndsTheSession(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld()
		defer w.serve(t)()
		s := w.sidecar(t, 0, tunnel.ModeUDP)
		s.up(t)
		s.works(t)
		s.stop()
		time.Sleep(2 * time.Second)
		synctest.Wait()
		if n := w.server.Sessions(); n != 0 || w.released != 1 {
			t.Errorf("%d sessions, %d released", n, w.released)
		}
	})
}

// join asks to join a session over TCP and returns the answer.
func (w *world) join(t *testing.T, k byte, session, as string) (tunnel.Candidate, wire.Message, error) {
	t.Helper()
	c, err := w.tcp.Dialer(key(k)).Dial(t.Context(), address)
	if err != nil {
		t.Fatal(err)
	}
	wire.Write(c, wire.Message{Join: &wire.Join{Version: wire.Current, Session: session, As: as}})
	m, err := wire.Read(c, wire.Version{})
	return c, m, err
}

func TestWhoeverAsksToJoinNoSessionLearnsTheTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld()
		defer w.serve(t)()
		c, m, err := w.join(t, 0, "", wire.AsLane)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		if m.Refused == nil || m.Refused.Code != tunnel.SessionUnknown || time.Since(m.Refused.Time).Abs() > time.Second {
			t.Errorf("at %v it is answered with %+v", time.Now(), m.Refused)
		}
	})
}

func TestAJoinNeedsTheSessionsKey(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld()
		defer w.serve(t)()
		s := w.sidecar(t, 0, tunnel.ModeTCP)
		defer s.stop()
		st := s.up(t)
		for name, j := range map[string]struct {
			key     byte
			session string
			as      string
			want    tunnel.Code
		}{
			"another key":     {1, st.Session, wire.AsLane, tunnel.SessionUnknown},
			"another session": {0, "00", wire.AsLane, tunnel.SessionUnknown},
			"as something":    {0, st.Session, "king", tunnel.Unsupported},
		} {
			c, m, err := w.join(t, j.key, j.session, j.as)
			if err != nil || m.Refused == nil || m.Refused.Code != j.want {
				t.Errorf("%s: %+v, %v", name, m, err)
			}
			c.Close()
		}
		s.works(t) // the living session is untouched
	})
}

func TestWhoeverJoinsASessionThatIsNotThereMayOpenOneInstead(t *testing.T) {
	for name, c := range map[string]struct {
		next wire.Message
		want tunnel.Code // "": it is welcome
	}{
		"an Open":      {wire.Message{Open: &wire.Open{Version: wire.Current, App: "app", Token: "secret"}}, ""},
		"another Join": {wire.Message{Join: &wire.Join{Version: wire.Current, Session: "01", As: wire.AsCarrier}}, tunnel.Internal},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld()
				defer w.serve(t)()
				cand, m, err := w.join(t, 0, "00", wire.AsCarrier)
				if err != nil || m.Refused == nil || m.Refused.Code != tunnel.SessionUnknown {
					t.Fatalf("%+v, %v", m, err)
				}
				defer cand.Close()
				wire.Write(cand, c.next)
				switch m, err = wire.Read(cand, wire.Version{}); {
				case err != nil:
					t.Error(err)
				case c.want != "":
					if m.Refused == nil || m.Refused.Code != c.want {
						t.Errorf("it is answered with %+v", m)
					}
				case m.Welcome == nil || w.server.Sessions() != 1:
					t.Errorf("it is answered with %+v; %d sessions", m, w.server.Sessions())
				}
			})
		})
	}
}

func TestPeersThatSayNothingOrGarbageAreCut(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld()
		defer w.serve(t)()
		var b bytes.Buffer
		wire.Write(&b, wire.Message{Join: &wire.Join{Version: wire.Current, Session: "00", As: wire.AsCarrier}})
		join := b.Bytes()
		for name, say := range map[string][]byte{"nothing": nil, "garbage": []byte("GET / HTTP/1.1\r\n\r\n"), "half": {0, 50, '{'}, "nothing more after a Join": join, "out of place": append([]byte{0, 13}, `{"opened":{}}`...)} {
			c, err := w.tcp.Dialer(key(3)).Dial(t.Context(), address)
			if err != nil {
				t.Fatal(err)
			}
			c.Write(say)
			began := time.Now()
			io.Copy(io.Discard, c)
			if d := time.Since(began); d > 5*time.Second {
				t.Errorf("%s: cut after %v", name, d)
			}
			c.Close()
		}
		s := w.sidecar(t, 0, tunnel.ModeAuto)
		defer s.stop()
		s.up(t)
		s.works(t)
	})
}

// Where a cloud proxy is slow to answer, sidecars give up and come again, and of
// two connections they drop the slower one.
func TestSidecarsThatGiveUpKeepNoOtherOfTheirAddressOut(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld()
		defer w.serve(t)()
		for i := range 500 {
			c, err := w.tcp.Dialer(key(3)).Dial(t.Context(), address)
			if err != nil {
				t.Fatal(err)
			}
			if i%2 == 0 {
				c.Write([]byte{0, 50, '{'}) // it was about to open
			}
			c.Close()
		}
		synctest.Wait()
		began := time.Now()
		s := w.sidecar(t, 0, tunnel.ModeTCP)
		defer s.stop()
		s.up(t)
		if took := time.Since(began); took > time.Second {
			t.Errorf("another is up after %v", took)
		}
	})
}

// breaking is a listener that can break.
type breaking struct {
	tunnel.Listener
	broken chan struct{}
}

func (b *breaking) Accept(ctx context.Context) (tunnel.Candidate, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	go func() {
		select {
		case <-b.broken:
			cancel()
		case <-ctx.Done():
		}
	}()
	c, err := b.Listener.Accept(ctx)
	select {
	case <-b.broken:
		return nil, tunnel.Errorf(tunnel.Internal, "the socket broke")
	default:
		return c, err
	}
}

func TestAListenerThatBreaksEndsTheServerWhateverIsUnderWay(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := tunneltest.NewNet(tunneltest.Config{Kind: "tls"})
		l, err := n.Listen(address)
		if err != nil {
			t.Fatal(err)
		}
		b := &breaking{l, make(chan struct{})}
		asked, answer := make(chan struct{}), make(chan struct{})
		s, err := cloudproxy.New(cloudproxy.Config{Listeners: []tunnel.Listener{b}, Authorize: func(context.Context, tunnel.Open) (cloudproxy.Grant, error) {
			close(asked)
			<-answer
			return cloudproxy.Grant{Next: &tunneltest.Echo{}, Release: func() {}}, nil
		}})
		if err != nil {
			t.Fatal(err)
		}
		done := make(chan error, 1)
		go func() { done <- s.Run(context.Background()) }()
		c, err := n.Dialer(key(0)).Dial(t.Context(), address)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		wire.Write(c, wire.Message{Open: &wire.Open{Version: wire.Current, App: "a", Token: "t"}})
		<-asked
		close(b.broken)
		time.Sleep(time.Second) // the server has closed what there was
		close(answer)
		select {
		case err := <-done:
			if err == nil {
				t.Error("it ended without an error")
			}
		case <-time.After(time.Minute):
			t.Fatalf("the server still runs, with %d sessions", s.Sessions())
		}
	})
}

func TestOnlySoManyConnectionsJoinASession(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld()
		defer w.serve(t)()
		s := w.sidecar(t, 0, tunnel.ModeTCP)
		defer s.stop()
		st := s.up(t)
		refused := tunnel.Code("")
		joined := 0
		for refused == "" && joined < 100 {
			c, m, err := w.join(t, 0, st.Session, wire.AsCarrier)
			defer w.tcp.Cut()
			switch {
			case err != nil:
				t.Fatal(err)
			case m.Refused != nil:
				refused = m.Refused.Code
				c.Close()
			default:
				joined++
			}
			synctest.Wait()
		}
		if refused != tunnel.LimitExceeded || joined > 20 {
			t.Errorf("%d joined, then %q", joined, refused)
		}
	})
}

func TestAStopLetsTheLiveFinish(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld()
		stop := w.serve(t)
		idle, busy := w.sidecar(t, 0, tunnel.ModeUDP), w.sidecar(t, 1, tunnel.ModeUDP)
		defer idle.stop()
		defer busy.stop()
		idle.up(t)
		busy.up(t)
		in := make(inbox, 10)
		p, err := busy.OpenPackets(tunnel.Peer{}, in)
		if err != nil {
			t.Fatal(err)
		}
		p.Send([]byte("one"), far)
		<-in
		stopped := make(chan time.Duration)
		began := time.Now()
		go func() { stop(); stopped <- time.Since(began) }()
		time.Sleep(3 * time.Second)
		p.Send([]byte("two"), far)
		if got := <-in; got != "two from "+far.String() {
			t.Errorf("got %q", got)
		}
		p.Close()
		if d := <-stopped; d < 3*time.Second || d > 4*time.Second {
			t.Errorf("stopped after %v, the call ended after 3 s", d)
		}
	})
}

func TestJoinsThatGoWrongLeaveTheLivingSessionAsItIs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld()
		defer w.serve(t)()
		s, other := w.sidecar(t, 0, tunnel.ModeTCP), w.sidecar(t, 1, tunnel.ModeTCP)
		defer s.stop()
		st, theirs := s.up(t), other.up(t)

		// Another App ID's session, with a key that has one of its own.
		c, m, err := w.join(t, 0, theirs.Session, wire.AsCarrier)
		if err != nil || m.Refused == nil || m.Refused.Code != tunnel.SessionUnknown {
			t.Errorf("another App ID's session: %+v, %v", m, err)
		}
		c.Close()
		// One that has just ended.
		other.stop()
		time.Sleep(2 * time.Second) // it may take one to say farewell
		c, m, err = w.join(t, 1, theirs.Session, wire.AsCarrier)
		if err != nil || m.Refused == nil || m.Refused.Code != tunnel.SessionUnknown {
			t.Errorf("a session that has ended: %+v, %v", m, err)
		}
		c.Close()
		// One that has just expired, as no connection has served it for a minute.
		c, err = w.tcp.Dialer(key(2)).Dial(t.Context(), address)
		if err != nil {
			t.Fatal(err)
		}
		wire.Write(c, wire.Message{Open: &wire.Open{Version: wire.Current, App: "app2", Token: "secret"}})
		m, err = wire.Read(c, wire.Version{})
		if err != nil || m.Welcome == nil {
			t.Fatalf("%+v, %v", m, err)
		}
		expired := m.Welcome.Session
		c.Close()
		time.Sleep(session.DefaultHold + time.Second)
		c, m, err = w.join(t, 2, expired, wire.AsCarrier)
		if err != nil || m.Refused == nil || m.Refused.Code != tunnel.SessionUnknown {
			t.Errorf("a session that has expired: %+v, %v", m, err)
		}
		c.Close()
		// The same one again, since its answer was lost: idempotent.
		for range 3 {
			c, m, err := w.join(t, 0, st.Session, wire.AsLane)
			if err != nil || m.Welcome == nil || m.Welcome.Session != st.Session {
				t.Errorf("a Join that is repeated: %+v, %v", m, err)
			}
			c.Close()
		}
		// The connection dies between the Join and its answer.
		for _, as := range []string{wire.AsCarrier, wire.AsLane} {
			c, err := w.tcp.Dialer(key(0)).Dial(t.Context(), address)
			if err != nil {
				t.Fatal(err)
			}
			if err := wire.Write(c, wire.Message{Join: &wire.Join{Version: wire.Current, Session: st.Session, As: as}}); err != nil {
				t.Fatal(err)
			}
			c.Close()
		}
		// Many at once, of which as many are taken as a session may have.
		var wg sync.WaitGroup
		var taken, refused atomic.Int64
		for range 200 {
			wg.Go(func() {
				c, m, err := w.join(t, 0, st.Session, wire.AsLane)
				switch {
				case err != nil:
					t.Error(err)
				case m.Welcome != nil:
					taken.Add(1)
				case m.Refused.Code == tunnel.LimitExceeded:
					refused.Add(1)
				default:
					t.Errorf("many at once: %+v", m.Refused)
				}
				time.Sleep(time.Second)
				c.Close()
			})
		}
		wg.Wait()
		if n := taken.Load(); n == 0 || n > 16 || n+refused.Load() != 200 {
			t.Errorf("of 200 Joins at once %d were taken and %d refused", taken.Load(), refused.Load())
		}
		time.Sleep(10 * time.Second)
		s.works(t)
		if w.server.Sessions() != 1 {
			t.Errorf("%d sessions", w.server.Sessions())
		}
	})
}
