package sidecar

import (
	"context"
	"errors"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"culvert/sidecar/channel"
	"culvert/tunnel"
)

// switchLink is a link that does what the test says.
type switchLink struct {
	do    chan func(report func(tunnel.LinkState)) error // nil: go on
	onOpn func()                                         // called inside OpenPackets

	mu      sync.Mutex
	streams []*switchFakeStream
	packets []*switchFakePackets
}

var errSwitchGoOn = errors.New("go on")

func (l *switchLink) Run(ctx context.Context, _ tunnel.Mode, report func(tunnel.LinkState)) error {
	report(tunnel.LinkState{Phase: tunnel.LinkConnecting})
	for {
		select {
		case f := <-l.do:
			if err := f(report); err != errSwitchGoOn {
				return err
			}
		case <-ctx.Done():
			return nil
		}
	}
}

func (l *switchLink) Stats() tunnel.LinkStats { return tunnel.LinkStats{} }

func (l *switchLink) OpenStream(context.Context, tunnel.Peer, tunnel.Target) (tunnel.Stream, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	s := &switchFakeStream{}
	l.streams = append(l.streams, s)
	return s, nil
}

func (l *switchLink) OpenPackets(_ tunnel.Peer, r tunnel.Receiver) (tunnel.Packets, error) {
	if l.onOpn != nil {
		l.onOpn()
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	p := &switchFakePackets{r: r}
	l.packets = append(l.packets, p)
	return p, nil
}

func (l *switchLink) up() {
	l.do <- func(report func(tunnel.LinkState)) error {
		report(tunnel.LinkState{Phase: tunnel.LinkUp, Carrier: "quic"})
		return errSwitchGoOn
	}
}

func (l *switchLink) failing(code tunnel.Code) {
	l.do <- func(report func(tunnel.LinkState)) error {
		report(tunnel.LinkState{Phase: tunnel.LinkConnecting, Code: code, Why: "it does not answer"})
		return errSwitchGoOn
	}
}

func (l *switchLink) end(err error) { l.do <- func(func(tunnel.LinkState)) error { return err } }

type switchFakeStream struct {
	tunnel.Stream
	aborted error
}

func (s *switchFakeStream) Abort(err error) { s.aborted = err }
func (s *switchFakeStream) Close() error    { return nil }

type switchFakePackets struct {
	r      tunnel.Receiver
	sent   int
	closed bool
}

func (p *switchFakePackets) Send([]byte, tunnel.Target) error { p.sent++; return nil }
func (p *switchFakePackets) Flush()                           {}
func (p *switchFakePackets) Close() error                     { p.closed = true; return nil }

type switchFakeReceiver struct {
	mu     sync.Mutex
	got    int
	closed []error
	hook   func()
}

func (r *switchFakeReceiver) Deliver([]byte, netip.AddrPort) {
	if r.hook != nil {
		r.hook()
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.got++
}
func (r *switchFakeReceiver) Unreachable(netip.AddrPort, error) {}
func (r *switchFakeReceiver) Closed(err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.closed = append(r.closed, err)
}

// switchBench is a switch in a bubble.
type switchBench struct {
	*Switch
	t    *testing.T
	link *switchLink
	mu   sync.Mutex
	in   []channel.Channel
	// look is called by each look at the channels.
	look func()
}

func (b *switchBench) set(list ...channel.Channel) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.in = list
}

func (b *switchBench) want(s SwitchState) {
	b.t.Helper()
	synctest.Wait()
	if got := b.Status().State; got != s {
		b.t.Fatalf("state %s, want %s", got, s)
	}
}

func (b *switchBench) wantCode(err error, c tunnel.Code) {
	b.t.Helper()
	if tunnel.CodeOf(err) != c {
		b.t.Fatalf("error %v, want code %q", err, c)
	}
}

// running starts it.
func (b *switchBench) running() {
	b.t.Helper()
	go func() { b.link.up() }()
	if already, err := b.Start(b.t.Context(), StartOptions{}); already || err != nil {
		b.t.Fatal(already, err)
	}
	b.want(Running)
}

func switchTest(t *testing.T, change func(*SwitchConfig), test func(*testing.T, *switchBench)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		b := &switchBench{t: t, link: &switchLink{do: make(chan func(func(tunnel.LinkState)) error)}}
		cfg := SwitchConfig{Link: b.link, Channels: func() []channel.Channel {
			b.mu.Lock()
			look := b.look
			b.mu.Unlock()
			if look != nil {
				look()
			}
			b.mu.Lock()
			defer b.mu.Unlock()
			return b.in
		}}
		if change != nil {
			change(&cfg)
		}
		s, err := NewSwitch(cfg)
		if err != nil {
			t.Fatal(err)
		}
		b.Switch = s
		ctx, cancel := context.WithCancel(context.Background())
		done := make(chan error)
		go func() { done <- s.Run(ctx) }()
		test(t, b)
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
		if st := s.Status(); st.State != Stopped || st.Streams+st.Associations != 0 {
			t.Errorf("after Run: %+v", st)
		}
	})
}

var switchCall = channel.Channel{Name: "zoom/7", App: "zoom", State: "live", Evidence: []string{"20 RTP packets"}}

func TestSwitchStartsAndStops(t *testing.T) {
	switchTest(t, nil, func(t *testing.T, b *switchBench) {
		if already, err := b.Stop(t.Context(), StopOptions{}); !already || err != nil {
			t.Fatal("a stop of what is stopped:", already, err)
		}
		_, err := b.OpenStream(t.Context(), tunnel.Peer{}, tunnel.Target{})
		b.wantCode(err, tunnel.ProxyStopped)
		b.running()
		if already, err := b.Start(t.Context(), StartOptions{Mode: tunnel.ModeAuto}); !already || err != nil {
			t.Fatal("a start of what runs:", already, err)
		}
		_, err = b.Start(t.Context(), StartOptions{Mode: tunnel.ModeTCP})
		b.wantCode(err, tunnel.NotPermitted)

		if _, err = b.OpenStream(t.Context(), tunnel.Peer{}, tunnel.Target{}); err != nil {
			t.Fatal(err)
		}
		over, err := b.OpenStream(t.Context(), tunnel.Peer{}, tunnel.Target{})
		if err != nil {
			t.Fatal(err)
		}
		over.Close()
		r := &switchFakeReceiver{}
		p, err := b.OpenPackets(tunnel.Peer{}, r)
		if err != nil {
			t.Fatal(err)
		}
		if st := b.Status(); st.Streams != 1 || st.Associations != 1 {
			t.Fatalf("%+v", st)
		}
		if already, err := b.Stop(t.Context(), StopOptions{}); already || err != nil {
			t.Fatal(already, err)
		}
		b.want(Stopped)
		b.wantCode(b.link.streams[0].aborted, tunnel.ProxyStopped)
		if b.link.streams[1].aborted != nil {
			t.Error("a stream that was closed in order was aborted")
		}
		if len(r.closed) != 1 || !b.link.packets[0].closed {
			t.Fatalf("closed %v", r.closed)
		}
		b.wantCode(r.closed[0], tunnel.ProxyStopped)
		b.link.packets[0].r.Deliver(nil, netip.AddrPort{})
		if r.got != 0 {
			t.Error("a delivery after Closed")
		}
		if p.Close() == nil {
			t.Error("a second end of an association")
		}
	})
}

func TestSwitchFailsWithTheLinksCause(t *testing.T) {
	switchTest(t, nil, func(t *testing.T, b *switchBench) {
		go b.link.end(tunnel.TokenExpired)
		_, err := b.Start(t.Context(), StartOptions{})
		b.wantCode(err, tunnel.TokenExpired)
		b.want(Failed)
		_, err = b.OpenPackets(tunnel.Peer{}, &switchFakeReceiver{})
		b.wantCode(err, tunnel.TokenExpired)
		b.running()
		r := &switchFakeReceiver{}
		if _, err := b.OpenPackets(tunnel.Peer{}, r); err != nil {
			t.Fatal(err)
		}
		b.link.failing(tunnel.CloudUnreachable)
		b.want(Running) // reconnecting
		if st := b.Status(); st.Code != tunnel.CloudUnreachable || len(r.closed) != 0 {
			t.Fatalf("%+v, closed %v", st, r.closed)
		}
		b.link.end(tunnel.CloudUnreachable)
		b.want(Failed)
		if len(r.closed) != 1 {
			t.Fatal("the association outlived the link")
		}
		if already, err := b.Stop(t.Context(), StopOptions{}); already || err != nil {
			t.Fatal(already, err)
		}
		b.want(Stopped)
	})
}

func TestSwitchStartEndsWithTheLastCause(t *testing.T) {
	for _, keep := range []bool{false, true} {
		switchTest(t, func(c *SwitchConfig) { c.StartTimeout = 20 * time.Second }, func(t *testing.T, b *switchBench) {
			go b.link.failing(tunnel.UDPBlocked)
			began := time.Now()
			_, err := b.Start(t.Context(), StartOptions{Keep: keep})
			b.wantCode(err, tunnel.UDPBlocked)
			if d := time.Since(began); d != 20*time.Second {
				t.Error("it took", d)
			}
			if keep {
				b.want(Starting)
				b.link.up()
				b.want(Running)
			} else {
				b.want(Failed)
			}
		})
	}
}

func TestSwitchRefusesToBreakAChannel(t *testing.T) {
	for _, state := range []string{"live", "quiet"} {
		switchTest(t, nil, func(t *testing.T, b *switchBench) {
			b.running()
			call := switchCall
			call.State = state
			b.set(call)
			_, err := b.Stop(t.Context(), StopOptions{})
			b.wantCode(err, tunnel.ChannelActive)
			var active *ChannelActiveError
			if !errors.As(err, &active) || len(active.Channels) != 1 || active.Channels[0].Evidence[0] != "20 RTP packets" {
				t.Fatal(err)
			}
			b.want(Running)
			if _, err := b.OpenStream(t.Context(), tunnel.Peer{}, tunnel.Target{}); err != nil {
				t.Fatal("after a refused stop:", err)
			}
			if _, err := b.Stop(t.Context(), StopOptions{Force: true}); err != nil {
				t.Fatal(err)
			}
			b.want(Stopped)
		})
	}
}

func TestSwitchStopWaits(t *testing.T) {
	switchTest(t, nil, func(t *testing.T, b *switchBench) {
		b.running()
		b.set(switchCall)
		stop := func(wait time.Duration) chan error {
			c := make(chan error, 1)
			go func() {
				_, err := b.Stop(context.Background(), StopOptions{Wait: wait})
				c <- err
			}()
			synctest.Wait()
			return c
		}
		first := stop(30 * time.Second)
		_, err := b.OpenPackets(tunnel.Peer{}, &switchFakeReceiver{})
		b.wantCode(err, tunnel.ProxyStopped)
		if !b.Status().Draining {
			t.Error("status does not say that a stop waits")
		}
		began := time.Now()
		b.wantCode(<-first, tunnel.ChannelActive)
		if d := time.Since(began); d != 30*time.Second {
			t.Error("it waited", d)
		}
		b.want(Running)
		if _, err := b.OpenPackets(tunnel.Peer{}, &switchFakeReceiver{}); err != nil {
			t.Fatal("the stop did not revert:", err)
		}
		second := stop(30 * time.Second)
		time.Sleep(10 * time.Second)
		b.set()
		if err := <-second; err != nil {
			t.Fatal(err)
		}
		b.want(Stopped)
	})
}

// A request that comes while a stop looks at the channels is neither lost nor
// overlooked: it is held, and goes on when the stop is refused.
func TestSwitchStopAndOpenRace(t *testing.T) {
	for _, refused := range []bool{false, true} {
		switchTest(t, nil, func(t *testing.T, b *switchBench) {
			b.running()
			r := &switchFakeReceiver{}
			// The first was let in just before: its call is seen.
			b.link.onOpn = func() {
				b.link.onOpn = nil
				if refused {
					b.set(switchCall)
				}
			}
			admitted := &switchFakeReceiver{}
			if _, err := b.OpenPackets(tunnel.Peer{}, admitted); err != nil {
				t.Fatal(err)
			}
			b.mu.Lock()
			b.look = func() {
				if _, err := b.OpenPackets(tunnel.Peer{}, r); err != nil {
					t.Error("refused before the stop was decided:", err)
				}
				synctest.Wait()
				if n := len(b.link.packets); n != 1 {
					t.Error("let through while the stop looked")
				}
			}
			b.mu.Unlock()
			_, err := b.Stop(t.Context(), StopOptions{})
			b.mu.Lock()
			b.look = nil
			b.mu.Unlock()
			synctest.Wait()
			if refused {
				b.wantCode(err, tunnel.ChannelActive)
				if len(b.link.packets) != 2 || len(r.closed) != 0 {
					t.Error("the held association was not attached:", r.closed)
				}
				return
			}
			if err != nil || len(r.closed) != 1 || len(admitted.closed) != 1 {
				t.Error(err, r.closed, admitted.closed)
			}
		})
	}
}

func TestSwitchHoldsRequestsWhileStarting(t *testing.T) {
	switchTest(t, nil, func(t *testing.T, b *switchBench) {
		go b.Start(context.Background(), StartOptions{Keep: true})
		b.want(Starting)
		r := &switchFakeReceiver{}
		p, err := b.OpenPackets(tunnel.Peer{}, r)
		if err != nil {
			t.Fatal(err)
		}
		gone := &switchFakeReceiver{}
		q, err := b.OpenPackets(tunnel.Peer{}, gone)
		if err != nil {
			t.Fatal(err)
		}
		q.Close()
		p.Send([]byte("early"), tunnel.Target{})
		stream := make(chan error, 1)
		go func() {
			_, err := b.OpenStream(context.Background(), tunnel.Peer{}, tunnel.Target{})
			stream <- err
		}()
		time.Sleep(4 * time.Second)
		b.link.up()
		if err := <-stream; err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		p.Send([]byte("late"), tunnel.Target{})
		if n := len(b.link.packets); n != 1 || b.link.packets[0].sent != 1 || b.Status().HeldDrops != 1 || len(gone.closed) != 0 {
			t.Fatal(n, b.Status().HeldDrops, gone.closed)
		}
		// The same while reconnecting, but this time nothing comes back.
		b.link.failing(tunnel.CloudUnreachable)
		synctest.Wait()
		late := &switchFakeReceiver{}
		if _, err := b.OpenPackets(tunnel.Peer{}, late); err != nil {
			t.Fatal(err)
		}
		began := time.Now()
		_, err = b.OpenStream(t.Context(), tunnel.Peer{}, tunnel.Target{})
		b.wantCode(err, tunnel.CloudUnreachable)
		if d := time.Since(began); d != 5*time.Second {
			t.Error("held for", d)
		}
		synctest.Wait()
		if len(late.closed) != 1 {
			t.Error("a held association did not end")
		}
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if _, err := b.OpenStream(ctx, tunnel.Peer{}, tunnel.Target{}); !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
	})
}

func TestSwitchPassesDirectlyOnlyWhileStopped(t *testing.T) {
	direct := &switchLink{}
	switchTest(t, func(c *SwitchConfig) { c.Direct = direct }, func(t *testing.T, b *switchBench) {
		r := &switchFakeReceiver{}
		if _, err := b.OpenPackets(tunnel.Peer{}, r); err != nil {
			t.Fatal(err)
		}
		b.set(switchCall)
		_, err := b.Start(t.Context(), StartOptions{})
		b.wantCode(err, tunnel.ChannelActive)
		b.set()
		b.running()
		if len(direct.packets) != 1 || len(r.closed) != 1 {
			t.Error("the direct association goes on beside the tunnel")
		}
		b.link.end(tunnel.TokenExpired)
		b.want(Failed)
		if _, err := b.OpenStream(t.Context(), tunnel.Peer{}, tunnel.Target{}); err == nil || len(direct.streams) != 0 {
			t.Error("a failed tunnel leaks")
		}
	})
}

func TestSwitchTellsSubscribersWithoutWaitingForThem(t *testing.T) {
	switchTest(t, nil, func(t *testing.T, b *switchBench) {
		events, cancel := b.Subscribe()
		if e := <-events; e.To != "stopped" || e.From != "" {
			t.Fatalf("%+v", e)
		}
		b.running()
		var to []string
		for len(events) > 0 {
			if e := <-events; e.Kind == "switch" {
				to = append(to, e.To)
			}
		}
		if len(to) != 2 || to[0] != "starting" || to[1] != "running" {
			t.Fatal(to)
		}
		for range 10 * switchBacklog {
			b.ChannelEvent(channel.Event{Is: "live"})
		}
		b.ChannelEvent(channel.Event{Was: "live", Why: "last"})
		var last Event
		for len(events) > 0 {
			last = <-events
		}
		if last.Cause != "last" {
			t.Errorf("the newest was lost: %+v", last)
		}
		cancel()
		cancel()
		if _, ok := <-events; ok {
			t.Error("events after cancel")
		}
	})
}

func TestSwitchTellsAndRemembersWhatChangedOfTheLink(t *testing.T) {
	switchTest(t, nil, func(t *testing.T, b *switchBench) {
		b.running()
		events, cancel := b.Subscribe()
		defer cancel()
		<-events
		change := func(c tunnel.Change) {
			b.link.do <- func(report func(tunnel.LinkState)) error {
				report(tunnel.LinkState{Phase: tunnel.LinkConnecting, Change: &c})
				return errSwitchGoOn
			}
		}
		first := tunnel.Change{What: tunnel.ChangedDatagrams, From: "sealed", To: "lanes", Cause: tunnel.UDPBlocked, Why: "nothing came", Gap: 870 * time.Millisecond, Lost: 43}
		change(first)
		synctest.Wait()
		e := <-events
		if e.Kind != "change" || e.Name != first.What || e.Code != first.Cause || e.Change == nil || *e.Change != first {
			t.Errorf("told: %+v", e)
		}
		want := []any{"name", "datagrams", "from", "sealed", "to", "lanes", "code", "udp_blocked", "cause", "nothing came", "cost", "870ms without a datagram, 43 lost on their way to the apps"}
		if got := switchLogged(e, tunnel.LinkState{}); !slices.Equal(got, want) {
			t.Errorf("the log has %v, want %v", got, want)
		}
		if st := b.Status(); st.Link.Phase != tunnel.LinkUp || len(st.Changes) != 1 {
			t.Errorf("a change that is told alone changes the state: %+v", st)
		}
		for range 2 * switchChanges {
			change(tunnel.Change{What: tunnel.ChangedCarrier})
		}
		synctest.Wait()
		if st := b.Status(); len(st.Changes) != switchChanges || st.Changes[0].What != tunnel.ChangedCarrier {
			t.Errorf("%d changes are remembered, want the last %d", len(st.Changes), switchChanges)
		}
	})
}

func TestSwitchClosesAfterTheLastDelivery(t *testing.T) {
	switchTest(t, nil, func(t *testing.T, b *switchBench) {
		b.running()
		enter, leave := make(chan struct{}), make(chan struct{})
		r := &switchFakeReceiver{hook: func() { close(enter); <-leave }}
		if _, err := b.OpenPackets(tunnel.Peer{}, r); err != nil {
			t.Fatal(err)
		}
		go b.link.packets[0].r.Deliver(nil, netip.AddrPort{})
		<-enter
		if _, err := b.Stop(t.Context(), StopOptions{Force: true}); err != nil {
			t.Fatal(err)
		}
		if len(r.closed) != 0 {
			t.Error("Closed during Deliver")
		}
		close(leave)
		synctest.Wait()
		if len(r.closed) != 1 || r.got != 1 {
			t.Error(r.closed, r.got)
		}
	})
}

func TestSwitchLogsWhatChanged(t *testing.T) {
	up := tunnel.LinkState{Phase: tunnel.LinkUp, Carrier: "quic", Way: "quic-datagram", Streams: "quic"}
	mixed, figures := up, up
	mixed.Streams, mixed.Why = "tls", "QUIC lost much"
	figures.Took = time.Second
	lanes, why := up, up
	lanes.Way, lanes.Carrier, lanes.WayWhy = "lanes", "tls", "nothing came"
	why.WayWhy = "no answer"
	moved := lanes
	moved.Session = "02"
	for name, tc := range map[string]struct {
		e    Event
		want []any
	}{
		"switch":                                {Event{Kind: "switch", From: "starting", To: "running"}, []any{"from", "starting", "to", "running"}},
		"channel":                               {Event{Kind: "channel", Name: "a/1", To: "live", Cause: "RTP"}, []any{"name", "a/1", "to", "live", "cause", "RTP"}},
		"figures":                               {Event{Kind: "link", From: "up", To: "up", Link: &figures}, nil},
		"streams":                               {Event{Kind: "link", From: "up", To: "up", Cause: mixed.Why, Link: &mixed}, []any{"phase", "up", "streams", "tls", "cause", "QUIC lost much"}},
		"the way, of which another event tells": {Event{Kind: "link", From: "up", To: "up", Link: &lanes}, nil},
		"the way, in another session":           {Event{Kind: "link", From: "up", To: "up", Link: &moved}, []any{"phase", "up", "way_why", "nothing came", "session", "02"}},
		"why it is this way":                    {Event{Kind: "link", From: "up", To: "up", Link: &why}, []any{"phase", "up", "way_why", "no answer"}},
		"lost":                                  {Event{Kind: "link", From: "up", To: "connecting", Code: tunnel.CloudUnreachable, Link: &tunnel.LinkState{}}, []any{"from", "up", "to", "connecting", "code", string(tunnel.CloudUnreachable)}},
	} {
		if got := switchLogged(tc.e, up); !slices.Equal(got, tc.want) {
			t.Errorf("%s: %v, want %v", name, got, tc.want)
		}
	}
}
