package uplink

import (
	"context"
	"crypto/ed25519"
	"io"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"

	"culvert/tunnel"
	"culvert/tunnel/session"
	"culvert/tunnel/tunneltest"
	"culvert/tunnel/wire"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const (
	first  = "192.0.2.1:443"
	second = "192.0.2.2:443"
)

// dialled is one dial, and when it was made.
type dialled struct {
	kind, address string
	at            time.Duration
}

// far is cloud proxies that do what a test says, on a UDP and a TCP network
// in memory. It must be used inside a synctest bubble.
type far struct {
	t     *testing.T
	began time.Time
	nets  map[string]*tunneltest.Net
	wg    sync.WaitGroup
	ls    []tunnel.Listener

	// answer is what is said to an Open or a Join; nil: nothing is.
	answer func(kind, address string, m wire.Message) *wire.Message
	// carry serves a connection that was welcomed to a session; nil: whatever
	// comes is discarded.
	carry func(id, as string, c tunnel.Candidate)

	sessions []*session.Far // to be closed at the end
	carriers atomic.Int64   // that were welcomed and live, where carry is nil

	mu    sync.Mutex // guards what follows; before the first run nothing else looks
	dials []dialled
	asked []string       // "quic open 192.0.2.1:443"
	last  tunnel.Carrier // that real has begun to serve
	// dial is asked before each dial; n counts those of the kind, from 1.
	dial func(ctx context.Context, kind, address string, n int) error
}

// newFar has a cloud proxy at each address that welcomes everybody.
func newFar(t *testing.T, addresses ...string) *far {
	return newFarOn(t, tunneltest.Config{}, addresses...)
}

// newFarOn is newFar on networks of this kind. What befalls datagrams is UDP's:
// TCP loses nothing.
func newFarOn(t *testing.T, on tunneltest.Config, addresses ...string) *far {
	f := &far{t: t, began: time.Now(), nets: map[string]*tunneltest.Net{}}
	f.dial = func(context.Context, string, string, int) error { return nil }
	f.answer = func(_, _ string, m wire.Message) *wire.Message { return welcome(m) }
	for _, kind := range []string{"quic", "tls"} {
		if on.Kind = kind; kind == "tls" {
			on.Datagram = nil
		}
		on.Dial = func(ctx context.Context, address string) error {
			f.mu.Lock()
			f.dials = append(f.dials, dialled{kind, address, time.Since(f.began)})
			n := 0
			for _, d := range f.dials {
				if d.kind == kind {
					n++
				}
			}
			dial := f.dial
			f.mu.Unlock()
			return dial(ctx, kind, address, n)
		}
		f.nets[kind] = tunneltest.NewNet(on)
		for _, address := range addresses {
			l, err := f.nets[kind].Listen(address)
			if err != nil {
				t.Fatal(err)
			}
			f.ls = append(f.ls, l)
			f.wg.Go(func() {
				for {
					c, err := l.Accept(context.Background())
					if err != nil {
						return
					}
					f.wg.Go(func() { f.serve(c, kind, address) })
				}
			})
		}
	}
	return f
}

// end waits until the sidecar has closed every connection that it made.
func (f *far) end() {
	f.t.Helper()
	for _, l := range f.ls {
		l.Close()
	}
	f.mu.Lock()
	for _, s := range f.sessions {
		s.Close(nil)
	}
	f.mu.Unlock()
	over := make(chan struct{})
	go func() { f.wg.Wait(); close(over) }()
	select {
	case <-over:
	case <-time.After(time.Hour):
		f.t.Error("a connection to the cloud proxy was left open")
		f.nets["quic"].Cut()
		f.nets["tls"].Cut()
		<-over
	}
}

func welcome(m wire.Message) *wire.Message {
	id := "0102"
	if m.Join != nil {
		id = m.Join.Session
	}
	return &wire.Message{Welcome: &wire.Welcome{Version: wire.Current, Session: id}}
}

func refused(code tunnel.Code) *wire.Message {
	return &wire.Message{Refused: &wire.Refused{Code: code, Text: "because"}}
}

func redirect(to ...string) *wire.Message {
	return &wire.Message{Redirect: &wire.Redirect{Addresses: to}}
}

// serve is one connection at the cloud proxy's end. It lasts until the sidecar
// ends it.
func (f *far) serve(c tunnel.Candidate, kind, address string) {
	defer c.Close()
	var m wire.Message
	var reply *wire.Message
	for {
		var err error
		if m, err = wire.Read(c, wire.Version{}); err != nil {
			return
		}
		what := " open "
		if m.Join != nil {
			what = " join "
		}
		f.mu.Lock()
		f.asked = append(f.asked, kind+what+address)
		f.mu.Unlock()
		if reply = f.answer(kind, address, m); reply != nil {
			wire.Write(c, *reply)
		}
		if m.Join == nil || m.Join.As != wire.AsCarrier || reply == nil || reply.Refused == nil || reply.Refused.Code != tunnel.SessionUnknown {
			break // else it may go on with an Open
		}
	}
	switch {
	case reply == nil || reply.Welcome == nil:
		io.Copy(io.Discard, c)
	case f.carry != nil:
		as := ""
		if m.Join != nil {
			as = m.Join.As
		}
		f.carry(reply.Welcome.Session, as, c)
	case m.Join != nil && m.Join.As == wire.AsLane:
		if l, err := c.Lane(); err == nil {
			l.Start(func([]byte) {}, func() {})
			<-l.Done()
			l.Close(nil)
		}
	default:
		if k, err := c.Carrier(); err == nil {
			f.carriers.Add(1)
			defer f.carriers.Add(-1)
			if w := k.Datagrams(); w != nil {
				w.Start(func([]byte) {}, func() {})
			}
			<-k.Done()
			k.Close(nil)
		}
	}
}

// dialNow changes dial while an uplink runs.
func (f *far) dialNow(dial func(ctx context.Context, kind, address string, n int) error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.dial = dial
}

func (f *far) askedFor() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.asked)
}

func (f *far) dialsOf(kind string) []dialled {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.DeleteFunc(slices.Clone(f.dials), func(d dialled) bool { return d.kind != kind })
}

// running is an uplink that runs.
type running struct {
	*Uplink
	t      *testing.T
	cancel context.CancelFunc
	over   chan error

	mu     sync.Mutex // guards what follows
	states []tunnel.LinkState
	waits  []time.Duration // what jitter was asked for
}

// run runs an uplink; change may alter its configuration. Pauses are not
// jittered.
func (f *far) run(mode tunnel.Mode, change func(*Config)) *running {
	f.t.Helper()
	key := ed25519.NewKeyFromSeed(make([]byte, ed25519.SeedSize)).Public().(ed25519.PublicKey)
	r := &running{t: f.t, over: make(chan error, 1)}
	cfg := Config{
		Proxies: []string{first}, QUIC: f.nets["quic"].Dialer(key), TLS: f.nets["tls"].Dialer(key),
		Open: func() (wire.Open, error) { return wire.Open{App: "app", Token: "secret"}, nil },
		jitter: func(d time.Duration) time.Duration {
			r.mu.Lock()
			defer r.mu.Unlock()
			r.waits = append(r.waits, d)
			return d
		},
	}
	if change != nil {
		change(&cfg)
	}
	u, err := New(cfg)
	if err != nil {
		f.t.Fatal(err)
	}
	r.Uplink = u
	ctx, cancel := context.WithCancel(context.Background())
	r.cancel = cancel
	go func() {
		r.over <- u.Run(ctx, mode, func(s tunnel.LinkState) {
			r.mu.Lock()
			defer r.mu.Unlock()
			r.states = append(r.states, s)
		})
	}()
	return r
}

// stop ends the uplink and returns Run's error.
func (r *running) stop() error {
	r.cancel()
	return <-r.over
}

// pauses returns what jitter was asked for since it was last called.
func (r *running) pauses() []time.Duration {
	r.mu.Lock()
	defer r.mu.Unlock()
	w := r.waits
	r.waits = nil
	return w
}

// all returns the states so far.
func (r *running) all() []tunnel.LinkState {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.states)
}

// up waits until the link is up, and returns its state.
func (r *running) up() tunnel.LinkState {
	r.t.Helper()
	for range 100_000 {
		if s := r.all(); len(s) > 0 && s[len(s)-1].Phase == tunnel.LinkUp {
			return s[len(s)-1]
		}
		time.Sleep(time.Millisecond)
	}
	r.t.Fatalf("the link is not up after 100 s: %v", r.all())
	return tunnel.LinkState{}
}

// failed waits for the nth state with a code, from 1.
func (r *running) failed(n int) tunnel.LinkState {
	r.t.Helper()
	for range 100_000 {
		left := n
		for _, s := range r.all() {
			if s.Code != "" {
				if left--; left == 0 {
					return s
				}
			}
		}
		time.Sleep(time.Millisecond)
	}
	r.t.Fatalf("no failure %d in 100 s: %v", n, r.all())
	return tunnel.LinkState{}
}
