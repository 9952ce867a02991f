package egress

import (
	"context"
	"errors"
	"net/netip"
	"slices"
	"strconv"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"culvert/tunnel"
)

var (
	a4 = netip.MustParseAddr("192.0.2.1")
	b4 = netip.MustParseAddr("192.0.2.2")
	a6 = netip.MustParseAddr("2001:db8::1")
	b6 = netip.MustParseAddr("2001:db8::2")
)

// okStream is a stream that remembers being aborted.
type okStream struct {
	tunnel.Stream
	addr    netip.Addr
	aborted chan struct{}
}

func (s *okStream) Abort(error) { close(s.aborted) }

func TestFamiliesAlternate(t *testing.T) {
	got := interleave([]netip.Addr{a6, b6, a4, b4})
	if want := []netip.Addr{a6, a4, b6, b4}; !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
}

func TestAddressesAreTriedAsRFC8305Says(t *testing.T) {
	refused := tunnel.Errorf(tunnel.ConnectionRefused, "refused")
	denied := tunnel.Errorf(tunnel.PolicyDenied, "denied")
	type try struct {
		takes time.Duration
		err   error
	}
	for name, c := range map[string]struct {
		tries []try // a6, a4, b6, b4
		want  netip.Addr
		code  tunnel.Code
		took  time.Duration
		asked int
	}{
		"the first answers":      {[]try{{time.Millisecond, nil}, {}, {}, {}}, a6, "", time.Millisecond, 1},
		"the first hangs":        {[]try{{time.Hour, nil}, {time.Millisecond, nil}, {}, {}}, a4, "", 251 * time.Millisecond, 2},
		"the first fails":        {[]try{{time.Millisecond, refused}, {time.Millisecond, nil}, {}, {}}, a4, "", 2 * time.Millisecond, 2},
		"the first is just late": {[]try{{300 * time.Millisecond, nil}, {time.Hour, nil}, {}, {}}, a6, "", 300 * time.Millisecond, 2},
		"all denied":             {[]try{{0, denied}, {0, denied}, {0, denied}, {0, denied}}, netip.Addr{}, tunnel.PolicyDenied, 0, 4},
		"denied and refused":     {[]try{{0, refused}, {0, denied}, {0, denied}, {0, denied}}, netip.Addr{}, tunnel.ConnectionRefused, 0, 4},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				addrs := []netip.Addr{a6, a4, b6, b4}
				var mu sync.Mutex
				asked := 0
				next := &nextStage{stream: func(ctx context.Context, to tunnel.Target) (tunnel.Stream, error) {
					mu.Lock()
					asked++
					mu.Unlock()
					if to.Host != "x.example" || to.Port != 443 {
						t.Errorf("the target became %v", to)
					}
					try := c.tries[slices.Index(addrs, to.Addr)]
					select {
					case <-time.After(try.takes):
					case <-ctx.Done():
						return nil, ctx.Err()
					}
					if try.err != nil {
						return nil, try.err
					}
					return &okStream{addr: to.Addr, aborted: make(chan struct{})}, nil
				}}
				r := NewResolve(next, ResolveConfig{Resolver: &names{addrs: map[string][]netip.Addr{"x.example.": {a6, b6, a4, b4}}}})
				start := time.Now()
				s, err := r.OpenStream(t.Context(), tunnel.Peer{}, tunnel.Target{Host: "x.example", Port: 443})
				if tunnel.CodeOf(err) != c.code {
					t.Fatal(err)
				}
				if err == nil && s.(*okStream).addr != c.want {
					t.Errorf("used %s", s.(*okStream).addr)
				}
				if took := time.Since(start); took != c.took {
					t.Errorf("took %s, want %s", took, c.took)
				}
				synctest.Wait()
				if asked != c.asked {
					t.Errorf("%d attempts, want %d", asked, c.asked)
				}
			})
		})
	}
}

func TestALoserThatAnswersIsAborted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		loser := &okStream{aborted: make(chan struct{})}
		next := &nextStage{stream: func(ctx context.Context, to tunnel.Target) (tunnel.Stream, error) {
			if to.Addr == a4 {
				time.Sleep(time.Second) // ctx comes too late for it
				return loser, nil
			}
			time.Sleep(300 * time.Millisecond)
			return &okStream{}, nil
		}}
		r := NewResolve(next, ResolveConfig{Resolver: &names{addrs: map[string][]netip.Addr{"x": {a4, b4}}}})
		if _, err := r.OpenStream(t.Context(), tunnel.Peer{}, tunnel.Target{Host: "x", Port: 1}); err != nil {
			t.Fatal(err)
		}
		<-loser.aborted
	})
}

func TestNamesThatDoNotResolve(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := &names{}
		r := NewResolve(&nextStage{}, ResolveConfig{Resolver: n})
		ask := func(host string) tunnel.Code {
			_, err := r.OpenStream(t.Context(), tunnel.Peer{}, tunnel.Target{Host: host, Port: 1})
			return tunnel.CodeOf(err)
		}
		for _, host := range []string{"none.example", "none.example", "a b", "", "x\x00y"} {
			if code := ask(host); code != tunnel.NameUnresolved {
				t.Errorf("%q: %s", host, code)
			}
		}
		if n.asked != 1 {
			t.Errorf("DNS was asked %d times, want once", n.asked)
		}
		time.Sleep(failureTTL + time.Second)
		ask("none.example")
		if n.asked != 2 {
			t.Errorf("a failure was believed for longer than %s", failureTTL)
		}
		n.wait = make(chan struct{}) // never answers
		start := time.Now()
		if code := ask("slow.example"); code != tunnel.NameUnresolved || time.Since(start) != 5*time.Second {
			t.Errorf("%s after %s", code, time.Since(start))
		}
	})
}

type sentTo struct {
	p  string
	to tunnel.Target
}

func TestDatagramsToANameWaitWithoutBlocking(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := &names{wait: make(chan struct{}), addrs: map[string][]netip.Addr{"x": {a6, a4}}}
		var out []sentTo
		denied := tunnel.Errorf(tunnel.PolicyDenied, "denied")
		next := &nextStage{send: func(p []byte, to tunnel.Target) error {
			if to.Addr == a6 {
				return denied
			}
			out = append(out, sentTo{string(p), to})
			return nil
		}}
		r := NewResolve(next, ResolveConfig{Resolver: n})
		p, err := r.OpenPackets(tunnel.Peer{}, newReceiver())
		if err != nil {
			t.Fatal(err)
		}
		to := tunnel.Target{Host: "x", Port: 9}
		buf := make([]byte, 1)
		for i := range 10 {
			buf[0] = byte('0' + i) // Send only borrows it
			if err := p.Send(buf, to); err != nil {
				t.Fatal(err)
			}
		}
		p.Send([]byte("numeric"), tunnel.Target{Addr: b4, Port: 1})
		if len(out) != 1 {
			t.Fatalf("%v left before the answer", out)
		}
		close(n.wait)
		synctest.Wait()
		p.Send([]byte("after"), to)
		var text string
		for _, s := range out[1:] {
			text += s.p
			if s.to != (tunnel.Target{Host: "x", Addr: a4, Port: 9}) {
				t.Errorf("sent to %+v", s.to)
			}
		}
		if text != "23456789after" || r.Dropped() != 2 || n.asked != 1 {
			t.Errorf("sent %q, dropped %d, asked %d times", text, r.Dropped(), n.asked)
		}
	})
}

func TestANameThatFailsIsReportedOncePerSecond(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := NewResolve(&nextStage{}, ResolveConfig{Resolver: &names{}})
		recv := newReceiver()
		p, _ := r.OpenPackets(tunnel.Peer{}, recv)
		for range 3 {
			p.Send([]byte("x"), tunnel.Target{Host: "none", Port: 9})
			synctest.Wait()
		}
		if len(recv.unreachable) != 1 {
			t.Fatalf("%d reports", len(recv.unreachable))
		}
		if u := <-recv.unreachable; u.to.IsValid() || !errors.Is(u.err, tunnel.NameUnresolved) {
			t.Errorf("%v", u)
		}
		if r.Dropped() != 3 {
			t.Errorf("%d dropped, want 3", r.Dropped())
		}
		p.Close()
	})
}

func TestOnePeerCanNotTakeAllLookups(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := &names{wait: make(chan struct{}), err: errors.New("not today")}
		r := NewResolve(&nextStage{}, ResolveConfig{Resolver: n})
		greedy := tunnel.Peer{App: "a", Addr: netip.AddrPortFrom(a4, 1)}
		next := 0
		ask := func(by tunnel.Peer) <-chan error {
			next++
			host := strconv.Itoa(next) + ".example"
			c := make(chan error, 1)
			go func() {
				_, err := r.OpenStream(t.Context(), by, tunnel.Target{Host: host, Port: 1})
				c <- err
			}()
			synctest.Wait()
			return c
		}
		// Two associations and streams together have one share.
		for range 2 {
			p, err := r.OpenPackets(greedy, newReceiver())
			if err != nil {
				t.Fatal(err)
			}
			defer p.Close()
			for range maxPending / 2 {
				next++
				p.Send([]byte("x"), tunnel.Target{Host: strconv.Itoa(next) + ".example", Port: 1})
			}
		}
		for range 2 * maxShare {
			ask(greedy)
		}
		if n.asked != maxShare {
			t.Errorf("%d lookups for one peer at once, want %d", n.asked, maxShare)
		}
		if err := <-ask(greedy); !errors.Is(err, tunnel.LimitExceeded) {
			t.Errorf("one more: %v", err)
		}
		// Nor can all peers of one App ID together.
		for peer := range 2 * maxOfApp / maxShare {
			for range maxShare {
				ask(tunnel.Peer{App: "many", Addr: netip.AddrPortFrom(a4, uint16(100+peer))})
			}
		}
		if want := maxShare + maxOfApp; n.asked != want {
			t.Errorf("%d lookups, want %d", n.asked, want)
		}
		for name, other := range map[string]tunnel.Peer{
			"another App ID": {App: "b", Addr: greedy.Addr}, "another sidecar": {App: "a", Addr: netip.AddrPortFrom(b4, 1)},
		} {
			before := n.asked
			if ask(other); n.asked != before+1 {
				t.Errorf("%s was not served", name)
			}
		}
		close(n.wait)
		synctest.Wait()
		before := n.asked
		if ask(greedy); n.asked != before+1 {
			t.Error("the share was not given back")
		}
		if len(r.shares)+len(r.ofApps) != 0 {
			t.Errorf("left: %v %v", r.shares, r.ofApps)
		}
	})
}

// Each that waits holds a goroutine and datagrams, whoever has asked first.
func TestAssociationsOfOnePeerThatWaitForNamesAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := &names{wait: make(chan struct{}), addrs: map[string][]netip.Addr{"x": {a4}, "y": {a4}}}
		sent := 0
		var mu sync.Mutex
		r := NewResolve(&nextStage{send: func([]byte, tunnel.Target) error {
			mu.Lock()
			defer mu.Unlock()
			sent++
			return nil
		}}, ResolveConfig{Resolver: n})
		send := func(by tunnel.Peer) {
			p, err := r.OpenPackets(by, newReceiver())
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { p.Close() })
			for _, host := range []string{"x", "y"} {
				if err := p.Send([]byte("x"), tunnel.Target{Host: host, Port: 1}); err != nil {
					t.Fatal(err)
				}
			}
		}
		greedy, other := tunnel.Peer{App: "a", Addr: netip.AddrPortFrom(a4, 1)}, tunnel.Peer{App: "a", Addr: netip.AddrPortFrom(b4, 1)}
		for range maxWaits {
			send(greedy)
		}
		send(other)
		if got := r.Dropped(); got != maxWaits {
			t.Errorf("%d dropped, want %d", got, maxWaits)
		}
		close(n.wait)
		synctest.Wait()
		if sent != maxWaits+2 || len(r.waits) != 0 {
			t.Errorf("%d sent, want %d; left %v", sent, maxWaits+2, r.waits)
		}
	})
}
