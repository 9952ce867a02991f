package session

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"

	"culvert/tunnel"
	"culvert/tunnel/bulk"
	"culvert/tunnel/media"
	"culvert/tunnel/tunneltest"
	"culvert/tunnel/wire"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// path is a near and a far end joined by a carrier in memory.
type path struct {
	near *Near
	far  *Far
	at   *Attached
	echo *tunneltest.Echo
	done chan struct{} // both ends have finished
}

func join(t *testing.T, near *Near, net tunneltest.Config, cfg FarConfig) *path {
	t.Helper()
	if cfg.Next == nil {
		cfg.Next = &tunneltest.Echo{}
	}
	cfg.Peered = wire.Current
	const id = "0f5e9a6c2f6d4c0c8f0d3a4be1d2c3f4"
	cfg.ID = id
	p := &path{near: near, far: NewFar(cfg), done: make(chan struct{})}
	p.echo, _ = cfg.Next.(*tunneltest.Echo)
	client, server := tunneltest.Pair(t, net, nil)
	cc, err := client.Carrier()
	if err != nil {
		t.Fatal(err)
	}
	sc, err := server.Carrier()
	if err != nil {
		t.Fatal(err)
	}
	sealed := OfferSealed(media.PreferredAEADs())
	ready, err := ReadySealed(server, id, sealed)
	if err != nil {
		t.Fatal(err)
	}
	p.at = near.Attach(wire.Welcome{Version: wire.Current, Session: id, Limits: p.far.Limits(), Sealed: sealed})
	if err := p.at.AddCarrier(cc, sealed); err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() { p.far.Serve(sc, ready) })
	wg.Go(func() { p.at.Run(); p.at.RemoveCarrier(cc); cc.Close(nil) })
	wg.Go(func() { <-cc.Done(); p.at.End(cc.Err()) }) // as a sidecar does that finds no session any more
	go func() { wg.Wait(); close(p.done) }()
	t.Cleanup(p.end)
	return p
}

func (p *path) end() {
	p.far.Close(nil)
	<-p.done
}

// inbox is a receiver that keeps what it gets.
type inbox struct {
	got         chan string
	unreachable chan error
	closed      chan error
}

func newInbox() *inbox {
	return &inbox{make(chan string, 10000), make(chan error, 100), make(chan error, 2)}
}
func (i *inbox) Deliver(p []byte, from netip.AddrPort)    { i.got <- fmt.Sprintf("%s from %s", p, from) }
func (i *inbox) Unreachable(to netip.AddrPort, err error) { i.unreachable <- err }
func (i *inbox) Closed(err error)                         { i.closed <- err }

// patience is how long the tests wait for what must come, on a slow machine too.
const patience = time.Minute

func next[T any](t *testing.T, c <-chan T) T {
	t.Helper()
	select {
	case v := <-c:
		return v
	case <-time.After(patience):
		t.Fatal("nothing came in ", patience)
		panic("not reached")
	}
}

// eventually waits for a condition.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(patience); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("not in %v: %s", patience, what)
		}
	}
}

var (
	alpha = tunnel.TargetOf(netip.MustParseAddrPort("203.0.113.9:3478"))
	beta  = tunnel.TargetOf(netip.MustParseAddrPort("[2001:db8::9]:3479"))
)

func TestDatagramsComeBackFromWhereTheyWereSent(t *testing.T) {
	p := join(t, NewNear(0), tunneltest.Config{}, FarConfig{})
	in := newInbox()
	a, err := p.near.OpenPackets(tunnel.Peer{Held: true}, in)
	if err != nil {
		t.Fatal(err)
	}
	for i := range 50 {
		for _, to := range []tunnel.Target{alpha, beta} {
			if err := a.Send([]byte{byte(i)}, to); err != nil {
				t.Fatal(err)
			}
			if got, want := next(t, in.got), fmt.Sprintf("%s from %s", []byte{byte(i)}, to.AddrPort()); got != want {
				t.Fatalf("got %q, want %q", got, want)
			}
		}
	}
	a.Send([]byte("?"), tunnel.Target{Host: "media.example", Port: 5})
	if got := next(t, in.got); got != "? from 192.0.2.53:5" {
		t.Errorf("a name answers %q", got)
	}
	if !p.echo.Open()[0].By.Held {
		t.Error("the far end does not know that the association is held")
	}
	a.Close()
	eventually(t, "the far end closes the association", func() bool { return len(p.echo.Open()) == 0 })
	if err := a.Send([]byte("x"), alpha); !errors.Is(err, net.ErrClosed) {
		t.Errorf("after Close: %v", err)
	}
}

func TestHeadersAreShortOnceTheContextIsKnown(t *testing.T) {
	var mu sync.Mutex
	var lengths []int
	p := join(t, NewNear(0), tunneltest.Config{Datagram: func(up bool, b []byte) tunneltest.Fate {
		if _, _, _, notice, _ := wire.ParseRecord(b); up && !notice {
			mu.Lock()
			lengths = append(lengths, len(b))
			mu.Unlock()
		}
		return tunneltest.Fate{}
	}}, FarConfig{})
	in := newInbox()
	a, _ := p.near.OpenPackets(tunnel.Peer{}, in)
	for range 5 {
		a.Send(make([]byte, 100), alpha)
		next(t, in.got) // the acknowledgement came before the echo
	}
	mu.Lock()
	defer mu.Unlock()
	if lengths[0] != 100+16 || lengths[4] != 100+wire.ShortHeader {
		t.Errorf("records of 100 bytes are %v long", lengths)
	}
}

func TestLossReorderingAndDuplicatesOfRecordsDoNotConfuseAssociations(t *testing.T) {
	n := 0
	var mu sync.Mutex
	p := join(t, NewNear(0), tunneltest.Config{Queue: 10000, Datagram: func(bool, []byte) tunneltest.Fate {
		mu.Lock()
		defer mu.Unlock()
		n++
		return tunneltest.Fate{Drop: n%5 == 0, Extra: n % 3, Delay: time.Duration(n%7) * time.Millisecond}
	}}, FarConfig{})
	var wg sync.WaitGroup
	for flow := range 8 {
		wg.Go(func() {
			in := newInbox()
			a, err := p.near.OpenPackets(tunnel.Peer{}, in)
			if err != nil {
				t.Error(err)
				return
			}
			defer a.Close()
			seen := map[string]bool{}
			// A slow machine drops what has become too old: it sends more.
			end := time.Now().Add(patience)
			for i := 0; i < 200 || len(seen) < 50 && time.Now().Before(end); i++ {
				a.Send(fmt.Appendf(nil, "%d/%d", flow, i), alpha)
				for len(in.got) > 0 {
					got := <-in.got
					if seen[got] || !strings.HasPrefix(got, fmt.Sprintf("%d/", flow)) {
						t.Errorf("flow %d got %q (again: %v)", flow, got, seen[got])
					}
					seen[got] = true
				}
				time.Sleep(200 * time.Microsecond)
			}
			if len(seen) < 50 {
				t.Errorf("flow %d: only %d came back at 20 %% loss each way", flow, len(seen))
			}
		})
	}
	wg.Wait()
}

func TestAnAssociationOutlivesItsSession(t *testing.T) {
	near := NewNear(0)
	first := join(t, near, tunneltest.Config{}, FarConfig{})
	in := newInbox()
	a, _ := near.OpenPackets(tunnel.Peer{}, in)
	a.Send([]byte("one"), alpha)
	next(t, in.got)
	first.end()
	if err := a.Send([]byte("lost"), alpha); err != nil {
		t.Errorf("without a session Send says %v", err)
	}
	if _, err := near.OpenPackets(tunnel.Peer{}, newInbox()); tunnel.CodeOf(err) != tunnel.CloudUnreachable {
		t.Errorf("a new association without a session: %v", err)
	}
	join(t, near, tunneltest.Config{}, FarConfig{})
	a.Send([]byte("two"), alpha)
	if got := next(t, in.got); got != "two from "+alpha.String() {
		t.Errorf("got %q", got)
	}
	if near.Stats().Dropped[media.NoWay.String()] != 1 {
		t.Errorf("drops %v", near.Stats().Dropped)
	}
}

func TestTheFarEndSaysWhyAnAssociationEnds(t *testing.T) {
	p := join(t, NewNear(0), tunneltest.Config{}, FarConfig{})
	in := newInbox()
	a, _ := p.near.OpenPackets(tunnel.Peer{}, in)
	a.Send([]byte("x"), alpha)
	next(t, in.got)
	p.echo.Open()[0].Receiver.Unreachable(alpha.AddrPort(), tunnel.ConnectionRefused)
	if err := next(t, in.unreachable); tunnel.CodeOf(err) != tunnel.ConnectionRefused {
		t.Errorf("unreachable: %v", err)
	}
	p.echo.Open()[0].Receiver.Closed(tunnel.Errorf(tunnel.TimedOut, "idle"))
	if err := next(t, in.closed); tunnel.CodeOf(err) != tunnel.TimedOut || tunnel.Sentence(err) != "idle" {
		t.Errorf("closed: %v", err)
	}
	if err := a.Send([]byte("x"), alpha); !errors.Is(err, net.ErrClosed) {
		t.Errorf("Send afterwards: %v", err)
	}
	if n := p.near.Stats().Associations; n != 0 {
		t.Errorf("%d associations left", n)
	}
}

func TestAClosedAssociationIsNotOpenedAgainByALateRecord(t *testing.T) {
	p := join(t, NewNear(0), tunneltest.Config{}, FarConfig{})
	in := newInbox()
	a, _ := p.near.OpenPackets(tunnel.Peer{}, in)
	a.Send([]byte("x"), alpha)
	next(t, in.got)
	a.Close()
	eventually(t, "closed at the far end", func() bool { return len(p.echo.Open()) == 0 })
	h := wire.Header{Full: true, Association: 1, Target: alpha}
	p.far.plane.receive(newWay(p.far.plane, wire.WayDatagram), append(h.Append(nil), "late"...))
	if n := len(p.echo.Open()); n != 0 || p.far.drops.Get(media.Unknown) != 1 {
		t.Errorf("%d associations, %d dropped as unknown", n, p.far.drops.Get(media.Unknown))
	}
}

func TestLimitsOfASession(t *testing.T) {
	near := NewNear(0)
	p := join(t, near, tunneltest.Config{}, FarConfig{Limits: Limits{Associations: 2, Streams: 1}})
	for range 2 {
		if _, err := near.OpenPackets(tunnel.Peer{}, newInbox()); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := near.OpenPackets(tunnel.Peer{}, newInbox()); tunnel.CodeOf(err) != tunnel.LimitExceeded {
		t.Errorf("the near end lets a third association through: %v", err)
	}
	// A sidecar that does not keep to it is held to it.
	for id := uint32(10); id < 13; id++ {
		p.far.plane.receive(newWay(p.far.plane, wire.WayDatagram), (&wire.Header{Full: true, Association: id, Target: alpha}).Append(nil))
	}
	if n := len(p.echo.Open()); n != 2 {
		t.Errorf("%d associations at the far end, the limit is 2", n)
	}
	s, err := near.OpenStream(t.Context(), tunnel.Peer{}, alpha)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if _, err := near.OpenStream(t.Context(), tunnel.Peer{}, alpha); tunnel.CodeOf(err) != tunnel.LimitExceeded {
		t.Errorf("a second stream: %v", err)
	}
}

// closings is a receiver that counts only how often it was closed.
type closings struct{ n atomic.Int64 }

func (*closings) Deliver([]byte, netip.AddrPort)    {}
func (*closings) Unreachable(netip.AddrPort, error) {}
func (c *closings) Closed(error)                    { c.n.Add(1) }

func TestLiveAssociationsSurviveAReconnectAboveTheRateOfOpening(t *testing.T) {
	near := NewNear(0)
	first := join(t, near, tunneltest.Config{Queue: 10000}, FarConfig{})
	var all []tunnel.Packets
	in := &closings{}
	for range 300 {
		a, err := near.OpenPackets(tunnel.Peer{Held: true}, in)
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, a)
	}
	first.end()
	p := join(t, near, tunneltest.Config{Queue: 10000}, FarConfig{Limits: Limits{OpensPerSecond: 100}})
	p.far.opens.SetLimit(0) // as if no time passed: what may be opened at once, and no more
	sent := func(open int) func() bool {
		return func() bool {
			for _, a := range all {
				if err := a.Send([]byte("x"), alpha); err != nil {
					t.Fatal(err)
				}
			}
			time.Sleep(20 * time.Millisecond) // as a call's packets come
			return len(p.echo.Open()) == open && p.far.drops.Get(media.OverLimit) > 0
		}
	}
	eventually(t, "a hundred are open again, and more were refused", sent(100))
	p.far.opens.SetLimit(100)
	eventually(t, "all are open again", sent(len(all)))
	if n := near.Stats().Associations; n != len(all) || in.n.Load() > 0 {
		t.Errorf("%d of %d associations live, %d were closed", n, len(all), in.n.Load())
	}
}

// hasty is an Opener whose associations do at once, beside OpenPackets, what it says.
type hasty struct {
	tunneltest.Echo
	first func(tunnel.Receiver)
	done  sync.WaitGroup
}

func (h *hasty) OpenPackets(by tunnel.Peer, r tunnel.Receiver) (tunnel.Packets, error) {
	p, err := h.Echo.OpenPackets(by, r)
	if err == nil {
		h.done.Go(func() { h.first(r) })
	}
	return p, err
}

func TestAnAssociationMayDeliverWhileItIsBeingOpened(t *testing.T) {
	h := &hasty{first: func(r tunnel.Receiver) {
		for range 20 {
			r.Deliver([]byte("early"), alpha.AddrPort())
		}
	}}
	p := join(t, NewNear(0), tunneltest.Config{}, FarConfig{Next: h})
	for range 20 {
		in := newInbox()
		a, _ := p.near.OpenPackets(tunnel.Peer{}, in)
		a.Send([]byte("x"), alpha)
		next(t, in.got)
		h.done.Wait()
		a.Close()
	}
}

func TestAnAssociationMayEndWhileItIsBeingOpened(t *testing.T) {
	h := &hasty{first: func(r tunnel.Receiver) {
		r.Closed(tunnel.Errorf(tunnel.TimedOut, "over"))
	}}
	p := join(t, NewNear(0), tunneltest.Config{}, FarConfig{Next: h})
	for range 20 {
		in := newInbox()
		a, _ := p.near.OpenPackets(tunnel.Peer{}, in)
		a.Send([]byte("x"), alpha)
		if err := next(t, in.closed); tunnel.CodeOf(err) != tunnel.TimedOut {
			t.Errorf("closed: %v", err)
		}
		h.done.Wait()
	}
	eventually(t, "nothing is left at the far end", func() bool { return p.far.Live() == 0 })
}

func TestAClosedThatOvertakesTheFirstDatagramLeavesNothingOpen(t *testing.T) {
	p := join(t, NewNear(0), tunneltest.Config{}, FarConfig{})
	if err := p.far.handle(wire.Message{Closed: &wire.Closed{Association: 7}}); err != nil {
		t.Fatal(err)
	}
	p.far.plane.receive(newWay(p.far.plane, wire.WayDatagram), (&wire.Header{Full: true, Held: true, Association: 7, Target: alpha}).Append(nil))
	if n := len(p.echo.Open()); n != 0 {
		t.Errorf("%d associations are open", n)
	}
}

func TestAContextThatMovesBetweenAssociationsCostsNoMemory(t *testing.T) {
	p := newPlane(0, &media.Drops{}, bulk.New())
	a := p.add(&leg{plane: p, id: 1, deliver: func([]byte, tunnel.Target) {}})
	b := p.add(&leg{plane: p, id: 2, deliver: func([]byte, tunnel.Target) {}})
	for n := range uint16(1000) {
		for id := uint32(1); id <= 2; id++ {
			p.receive(nil, (&wire.Header{Context: 5, Number: n, Full: true, Association: id, Target: alpha}).Append(nil))
		}
	}
	if len(a.learned)+len(b.learned) != 1 {
		t.Errorf("%d and %d contexts are remembered for one", len(a.learned), len(b.learned))
	}
	p.remove(b)
	if len(p.in) != 0 {
		t.Errorf("%d contexts live on", len(p.in))
	}
}

func TestAPeerThatDoesNotReadItsControlStreamIsCut(t *testing.T) {
	client, server := tunneltest.Pair(t, tunneltest.Config{Buffer: 256}, nil)
	cc, err := client.Carrier()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := server.Carrier(); err != nil { // it reads nothing
		t.Fatal(err)
	}
	s, err := cc.OpenStream(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	c, ended := newControl(), make(chan error, 1)
	go func() {
		ended <- c.run(s, wire.Current, cc.Done(), func(wire.Message) error { return nil })
	}()
	eventually(t, "the stream is served", func() bool {
		c.mu.Lock()
		defer c.mu.Unlock()
		return c.stream != nil
	})
	for range 2*maxControlQueue + 100 { // the writer may have taken one queue full
		c.send(wire.Message{Closed: &wire.Closed{Association: 1}})
	}
	if err := next(t, ended); err == nil {
		t.Error("it ended without an error")
	}
}

func TestStreamsCarryBytesAndTheirEnds(t *testing.T) {
	p := join(t, NewNear(0), tunneltest.Config{}, FarConfig{})
	s, err := p.near.OpenStream(t.Context(), tunnel.Peer{}, tunnel.Target{Host: "signal.example", Port: 443})
	if err != nil {
		t.Fatal(err)
	}
	data := bytes.Repeat([]byte("0123456789"), 100_000)
	go func() { s.Write(data); s.CloseWrite() }()
	if got, err := io.ReadAll(s); err != nil || !bytes.Equal(got, data) {
		t.Errorf("%d of %d bytes came back, %v", len(got), len(data), err)
	}
	s.Close()
	st := p.near.Stats()
	if st.Streams != 0 || st.StreamBytesUp != uint64(len(data)) || st.StreamBytesDown != uint64(len(data)) {
		t.Errorf("stats %+v", st)
	}
}

func TestARefusedStreamSaysWhy(t *testing.T) {
	p := join(t, NewNear(0), tunneltest.Config{}, FarConfig{Next: &tunneltest.Echo{Stream: func(context.Context, tunnel.Target) error {
		return tunnel.Errorf(tunnel.PolicyDenied, "not there")
	}}})
	if _, err := p.near.OpenStream(t.Context(), tunnel.Peer{}, alpha); tunnel.CodeOf(err) != tunnel.PolicyDenied || tunnel.Sentence(err) != "not there" {
		t.Errorf("%v", err)
	}
}

func TestAnAppThatLeavesCancelsItsDial(t *testing.T) {
	dialling, cancelled := make(chan struct{}), make(chan struct{})
	p := join(t, NewNear(0), tunneltest.Config{}, FarConfig{Next: &tunneltest.Echo{Stream: func(ctx context.Context, _ tunnel.Target) error {
		close(dialling)
		<-ctx.Done()
		close(cancelled)
		return ctx.Err()
	}}})
	ctx, cancel := context.WithCancel(t.Context())
	go func() { <-dialling; cancel() }()
	if _, err := p.near.OpenStream(ctx, tunnel.Peer{}, alpha); !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
	next(t, cancelled)
}

func TestStreamsEndWithTheSession(t *testing.T) {
	p := join(t, NewNear(0), tunneltest.Config{}, FarConfig{})
	s, err := p.near.OpenStream(t.Context(), tunnel.Peer{}, alpha)
	if err != nil {
		t.Fatal(err)
	}
	p.end()
	if _, err := s.Read(make([]byte, 1)); err == nil || err == io.EOF {
		t.Errorf("reading after the end says %v, which an app would take for an orderly end", err)
	}
}

func TestAfterDrainNothingNewIsTaken(t *testing.T) {
	p := join(t, NewNear(0), tunneltest.Config{}, FarConfig{})
	in := newInbox()
	a, _ := p.near.OpenPackets(tunnel.Peer{}, in)
	a.Send([]byte("x"), alpha)
	next(t, in.got)
	p.far.Drain(time.Minute)
	next(t, p.at.Going())
	if _, err := p.near.OpenStream(t.Context(), tunnel.Peer{}, alpha); tunnel.CodeOf(err) != tunnel.CloudUnreachable {
		t.Errorf("a new stream: %v", err)
	}
	a.Send([]byte("y"), alpha)
	if got := next(t, in.got); got != "y from "+alpha.String() {
		t.Errorf("the live association says %q", got)
	}
}

func TestGarbageOnAWayIsCountedAndHarmless(t *testing.T) {
	p := join(t, NewNear(0), tunneltest.Config{}, FarConfig{})
	for _, g := range [][]byte{nil, {0}, {0xff, 0xff, 0xff, 0xff}, {0, 0, 0, 9}, bytes.Repeat([]byte{0xff}, 1200), {0x12, 0x34, 0, 0, 1}} {
		p.far.plane.receive(newWay(p.far.plane, wire.WayDatagram), g)
		p.at.plane.receive(newWay(p.at.plane, wire.WayDatagram), g)
	}
	in := newInbox()
	a, _ := p.near.OpenPackets(tunnel.Peer{}, in)
	a.Send([]byte("still here"), alpha)
	next(t, in.got)
	if p.far.drops.Get(media.Malformed) == 0 || p.far.drops.Get(media.Unknown) == 0 {
		t.Error("the garbage was not counted")
	}
}

func TestASteadyDatagramCostsFewAllocations(t *testing.T) {
	// The carrier in memory allocates for itself; only the plane is measured.
	pl := newPlane(0, &media.Drops{}, bulk.New())
	defer pl.close()
	pl.addWay(wire.WaySealed, sink{})
	y := pl.ways[wire.WaySealed]
	l := pl.add(&leg{plane: pl, id: 1, deliver: func([]byte, tunnel.Target) {}})
	payload := make([]byte, 800)
	l.send(payload, alpha)
	y.receive((&wire.Notice{Ack: 1}).Append(nil))
	y.receive((&wire.Header{Context: 3, Full: true, Association: 1, Target: alpha}).Append(nil))
	rec := (&wire.Header{Context: 3}).Append(nil)
	n := byte(0)
	if a := testing.AllocsPerRun(200, func() {
		l.send(payload, alpha)
		n++
		rec[3] = n
		y.receive(rec)
	}); a > 0 {
		t.Errorf("%v allocations for one datagram each way", a)
	}
}

type sink struct{}

func (sink) Start(func([]byte), func()) {}
func (sink) Send([]byte) error          { return nil }
func (sink) Max() int                   { return 1200 }
func (sink) Name() string               { return "sink" }
func (sink) Lost() map[string]uint64    { return nil }
