package policy_test

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
	"unicode/utf8"

	"culvert/policy"
	"culvert/tunnel"
)

// sink is an Opener that counts.
type sink struct {
	streams  atomic.Int64
	sent     atomic.Int64
	closed   atomic.Int64
	receiver tunnel.Receiver
	fail     error
}

func (s *sink) OpenStream(context.Context, tunnel.Peer, tunnel.Target) (tunnel.Stream, error) {
	s.streams.Add(1)
	return nil, s.fail
}

func (s *sink) OpenPackets(_ tunnel.Peer, r tunnel.Receiver) (tunnel.Packets, error) {
	s.receiver = r
	return s, s.fail
}

func (s *sink) Send([]byte, tunnel.Target) error { s.sent.Add(1); return s.fail }
func (s *sink) Flush()                           {}
func (s *sink) Close() error                     { s.closed.Add(1); return nil }

// receiver records what it is told.
type receiver struct {
	mu          sync.Mutex
	unreachable []netip.AddrPort
	errs        []error
	closed      []error
	during      func() // called inside Unreachable
}

func (r *receiver) Deliver([]byte, netip.AddrPort) {}

func (r *receiver) Unreachable(to netip.AddrPort, err error) {
	if r.during != nil {
		r.during()
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.unreachable = append(r.unreachable, to)
	r.errs = append(r.errs, err)
}

func (r *receiver) Closed(err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.closed = append(r.closed, err)
}

func (r *receiver) reports() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.unreachable)
}

func always(p *policy.Policy) func(tunnel.Peer) *policy.Policy {
	return func(tunnel.Peer) *policy.Policy { return p }
}

// open returns an association through a guard.
func open(t testing.TB, get func(tunnel.Peer) *policy.Policy) (tunnel.Packets, *sink, *receiver) {
	t.Helper()
	s, r := &sink{}, &receiver{}
	p, err := policy.NewGuard(s, get).OpenPackets(tunnel.Peer{}, r)
	if err != nil {
		t.Fatal(err)
	}
	return p, s, r
}

func TestGuardAsksBeforeAStream(t *testing.T) {
	s := &sink{fail: errors.New("from behind")}
	g := policy.NewGuard(s, always(parse(t, mixed)))
	for to, want := range map[string]string{ // "": passes
		"a.example.com:443":   "",
		"else.example:443":    "", // undecided
		"47.74.211.17:443":    "",
		"old.example.com:443": "tcp to old.example.com:443 is refused: by the rule: deny any to old.example.com, 9.9.9.9 (test.yaml line 10); if it should be reachable, change that rule",
		"else.example:9":      "tcp to else.example:9 is refused: no rule allows it; add an allow rule to the policy, or ask whoever runs the cloud proxy",
		"[::ffff:1.2.3.4]:9":  "tcp to [::ffff:1.2.3.4]:9 is refused: it is a special address, IPv4-mapped, that the policy does not list under special; if it should be reachable, list it under special and add an allow rule, here and at the cloud proxy",
	} {
		before := s.streams.Load()
		_, err := g.OpenStream(t.Context(), tunnel.Peer{}, target(t, to))
		passed := s.streams.Load() > before
		if want == "" && (!passed || err != s.fail) {
			t.Errorf("%s: passed %v, error %v; want it passed on", to, passed, err)
		}
		if want != "" && (passed || !errors.Is(err, tunnel.PolicyDenied) || tunnel.Sentence(err) != want) {
			t.Errorf("%s: passed %v, error %v; want %s", to, passed, err, want)
		}
	}
}

// What listens on the cloud proxy's own host may trust its neighbours there.
func TestTheOwnHostIsReachedOnlyWhereItIsListed(t *testing.T) {
	const rules = "\nrules: [{allow: any, to: any}]\nprofiles: [public]"
	own, joined := target(t, "9.9.9.9:22"), target(t, "9.9.9.9:40000")
	for _, c := range []struct {
		special string
		want    bool
	}{{"[]", false}, {"[10.0.0.0/8, 9.9.9.8/32]", false}, {"[9.9.9.0/24]", true}} {
		s := &sink{fail: errors.New("from behind")}
		g := policy.NewGuard(s, always(parse(t, "special: "+c.special+rules)))
		g.Own = func(p policy.Proto, to tunnel.Target) bool {
			return to.Addr == own.Addr && (p == policy.TCP || to.Port == own.Port)
		}
		if _, err := g.OpenStream(t.Context(), tunnel.Peer{}, own); (err == s.fail) != c.want || err != s.fail && !errors.Is(err, tunnel.PolicyDenied) {
			t.Errorf("%s, TCP: %v", c.special, err)
		}
		if _, err := g.OpenStream(t.Context(), tunnel.Peer{}, target(t, "9.9.9.10:22")); err != s.fail {
			t.Errorf("TCP to another host: %v", err)
		}
		s.fail = nil
		r := &receiver{}
		p, err := g.OpenPackets(tunnel.Peer{}, r)
		if err != nil {
			t.Fatal(err)
		}
		for range 2 { // the second by what is remembered
			err := p.Send(nil, own)
			if (err == nil) != c.want || err != nil && !errors.Is(err, tunnel.PolicyDenied) {
				t.Errorf("%s, UDP: %v", c.special, err)
			}
			if err := p.Send(nil, joined); err != nil {
				t.Errorf("UDP to an association here: %v", err)
			}
		}
		if told := r.reports() == 1; told == c.want {
			t.Errorf("%s: %d reports", c.special, r.reports())
		}
	}
}

func TestDenialsShowHostileNamesOnOneShortLine(t *testing.T) {
	g := policy.NewGuard(&sink{}, always(parse(t, "")))
	for _, host := range []string{"a\r\nb", "\x1b[31m", strings.Repeat("x", 10_000), "\u202e", "\xff"} {
		_, err := g.OpenStream(t.Context(), tunnel.Peer{}, tunnel.Target{Host: host, Addr: addr("8.8.8.8"), Port: 1})
		if text := err.Error(); len(text) > 1024 || strings.ContainsAny(text, "\r\n\x1b\u202e") || !utf8.ValidString(text) {
			t.Errorf("%.20q: %q", host, text)
		}
	}
}

func TestDenialsByHugeRulesFitIntoALogLine(t *testing.T) {
	r := policy.Rule{Proto: policy.Any, Name: strings.Repeat("n", 64), File: "policy.yaml", Line: 1}
	for i := range 1000 {
		r.To = append(r.To, policy.Dest{Name: strings.Repeat("abcdefgh.", 27) + "x" + strconv.Itoa(i)})
		r.Ports = append(r.Ports, policy.PortRange{Low: uint16(10000 + 2*i), High: uint16(10000 + 2*i)})
	}
	p, err := policy.New(policy.Config{Rules: []policy.Rule{r}})
	if err != nil {
		t.Fatal(err)
	}
	_, err = policy.NewGuard(&sink{}, always(p)).OpenStream(t.Context(), tunnel.Peer{}, tunnel.Target{Host: r.To[999].Name, Port: 10000})
	if text := err.Error(); len(text) > 1024 || !strings.Contains(text, "and 999 more ports 10000,") || !strings.Contains(text, "policy.yaml line 1") {
		t.Errorf("%d bytes: %s", len(text), text)
	}
}

func TestGuardAsksForEveryDatagram(t *testing.T) {
	p, s, r := open(t, always(parse(t, mixed)))
	for range 3 { // the second and third answers are remembered ones
		for to, allow := range map[string]bool{
			"150.138.153.78:3478": true, "150.138.153.78:3479": true, "undecided.example:7": true,
			"150.138.153.78:9": false, "10.0.0.1:3478": false, "x.bad.example.com:443": false,
		} {
			before := s.sent.Load()
			err := p.Send([]byte("x"), target(t, to))
			if passed := s.sent.Load() > before; passed != allow || (err == nil) != allow || !allow && !errors.Is(err, tunnel.PolicyDenied) {
				t.Errorf("%s: passed %v, error %v; want allow %v", to, passed, err, allow)
			}
		}
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	named := 0
	for i, at := range r.unreachable {
		if !errors.Is(r.errs[i], tunnel.PolicyDenied) {
			t.Errorf("reported %v", r.errs[i])
		}
		if !at.IsValid() {
			named++
		}
	}
	if len(r.unreachable) != 3 || named != 1 {
		t.Errorf("reported %v, want each refused target once, the name without an address", r.unreachable)
	}
}

func TestGuardFollowsAChangedPolicy(t *testing.T) {
	var now atomic.Pointer[policy.Policy]
	now.Store(parse(t, "rules: [{allow: udp, to: 8.8.8.0/24}]"))
	p, _, _ := open(t, func(tunnel.Peer) *policy.Policy { return now.Load() })
	a, b := target(t, "8.8.8.8:1"), target(t, "8.8.8.9:1")
	send := func(to tunnel.Target, allow bool) {
		t.Helper()
		if err := p.Send(nil, to); (err == nil) != allow {
			t.Errorf("%s: %v, want allow %v", to, err, allow)
		}
	}
	send(a, true)
	send(b, true)
	now.Store(parse(t, "rules: [{allow: udp, to: 8.8.8.9}]"))
	send(a, false)
	send(b, true)
	now.Store(nil)
	send(a, false)
	send(b, false)
	now.Store(parse(t, "rules: [{allow: udp, to: public}]"))
	send(a, true)
	send(b, true)
}

func TestRefusalsAreReportedOncePerSecondAndTarget(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p, _, r := open(t, always(parse(t, "")))
		a, b := target(t, "8.8.8.8:1"), target(t, "8.8.8.8:2")
		step := func(want int, targets ...tunnel.Target) {
			t.Helper()
			for range 100 {
				for _, to := range targets {
					p.Send(nil, to)
				}
			}
			if got := r.reports(); got != want {
				t.Fatalf("%d reports, want %d", got, want)
			}
		}
		step(1, a)
		step(2, a, b)
		time.Sleep(999 * time.Millisecond)
		step(2, a, b)
		time.Sleep(time.Millisecond)
		step(4, a, b)

		// Many targets: what is remembered is bounded, the rate holds.
		var many []tunnel.Target
		for port := range 500 {
			many = append(many, tunnel.Target{Addr: addr("9.9.9.9"), Port: uint16(port + 1)})
		}
		before := r.reports()
		seen := map[netip.AddrPort]int{}
		for range 3 {
			for _, to := range many {
				if err := p.Send(nil, to); !errors.Is(err, tunnel.PolicyDenied) {
					t.Fatal(err)
				}
			}
		}
		for _, at := range r.unreachable[before:] {
			if seen[at]++; seen[at] > 1 {
				t.Fatalf("%s was reported twice within a second", at)
			}
		}
		if n := len(seen); n == 0 || n > 64 {
			t.Fatalf("%d reports for %d targets, want 1 to 64", n, len(many))
		}
		time.Sleep(time.Second)
		step(r.reports()+1, many[499])
	})
}

func TestGuardSaysNothingAfterTheEnd(t *testing.T) {
	p, s, r := open(t, always(parse(t, "")))
	gone := errors.New("gone")
	s.receiver.Closed(gone)
	if err := p.Send(nil, target(t, "8.8.8.8:1")); !errors.Is(err, net.ErrClosed) {
		t.Errorf("Send after Closed: %v", err)
	}
	if r.reports() != 0 || len(r.closed) != 1 || r.closed[0] != gone {
		t.Errorf("reports %v, closed %v", r.unreachable, r.closed)
	}

	p, s, r = open(t, always(parse(t, "")))
	if err := p.Close(); err != nil || s.closed.Load() != 1 {
		t.Errorf("Close: %v, passed on %d times", err, s.closed.Load())
	}
	if err := p.Send(nil, target(t, "8.8.8.8:1")); !errors.Is(err, net.ErrClosed) || r.reports() != 0 {
		t.Errorf("Send after Close: %v, %d reports", err, r.reports())
	}

	s = &sink{fail: errors.New("no")}
	if p, err := policy.NewGuard(s, always(nil)).OpenPackets(tunnel.Peer{}, r); p != nil || err != s.fail {
		t.Errorf("a failed open: %v, %v", p, err)
	}
}

func TestReceiverMaySendAndCloseInsideUnreachable(t *testing.T) {
	p, _, r := open(t, always(parse(t, "")))
	r.during = func() {
		if err := p.Send(nil, target(t, "8.8.8.8:2")); !errors.Is(err, tunnel.PolicyDenied) {
			t.Errorf("Send inside Unreachable: %v", err)
		}
		p.Close()
	}
	p.Send(nil, target(t, "8.8.8.8:1"))
	if r.reports() != 1 {
		t.Errorf("%d reports, want 1", r.reports())
	}
}

func TestGuardClosedWaitsForAReportInProgress(t *testing.T) {
	p, s, r := open(t, always(parse(t, "")))
	ended := make(chan struct{})
	r.during = func() {
		go func() { s.receiver.Closed(nil); close(ended) }()
		select {
		case <-ended:
			t.Error("Closed came while Unreachable was running")
		case <-time.After(20 * time.Millisecond): // as long as a wrong Closed would need
		}
	}
	p.Send(nil, target(t, "8.8.8.8:1"))
	<-ended
	if r.reports() != 1 || len(r.closed) != 1 {
		t.Errorf("%d reports, closed %v; want one of each", r.reports(), r.closed)
	}
}

func TestGuardSendsFromManyGoroutines(t *testing.T) {
	var now atomic.Pointer[policy.Policy]
	policies := []*policy.Policy{parse(t, "profiles: [public]"), parse(t, "rules: [{allow: udp, to: public, ports: 1-100}]")}
	now.Store(policies[0])
	p, s, r := open(t, func(tunnel.Peer) *policy.Policy { return now.Load() })
	var wg sync.WaitGroup
	for g := range 8 {
		wg.Go(func() {
			for i := range 500 {
				if i%50 == 0 {
					now.Store(policies[(i/50+g)%2])
				}
				port := uint16(1 + i%200)
				err := p.Send(nil, tunnel.Target{Addr: addr("8.8.8.8"), Port: port})
				if err != nil && port <= 100 {
					t.Errorf("port %d: %v", port, err)
				}
				if err := p.Send(nil, tunnel.Target{Addr: addr("10.0.0.1"), Port: port}); err == nil {
					t.Error("a private address passed")
				}
			}
		})
	}
	wg.Wait()
	s.receiver.Closed(nil)
	if len(r.closed) != 1 {
		t.Errorf("closed %v", r.closed)
	}
}

func TestGuardAllocatesNothingForAllowedDatagrams(t *testing.T) {
	p, _, _ := open(t, always(parse(t, "profiles: [public]\nrules: [{allow: any, to: '*.example.com'}]")))
	var few []tunnel.Target
	for port := range 20 {
		few = append(few, tunnel.Target{Addr: addr("8.8.8.8"), Port: uint16(port + 1)})
	}
	few = append(few, target(t, "a.example.com:5"), target(t, "undecided.example:5"))
	payload := make([]byte, 1200)
	for name, targets := range map[string][]tunnel.Target{"one target": few[:1], "a few": few} {
		for _, to := range targets {
			p.Send(payload, to)
		}
		i := 0
		n := testing.AllocsPerRun(1000, func() {
			if err := p.Send(payload, targets[i%len(targets)]); err != nil {
				t.Fatal(err)
			}
			i++
		})
		if n != 0 {
			t.Errorf("%s: %v allocations per datagram", name, n)
		}
	}
}

func BenchmarkGuardSend(b *testing.B) {
	for name, count := range map[string]int{"one-target": 1, "ten-targets": 10, "thousand-targets": 1000} {
		b.Run(name, func(b *testing.B) {
			p, _, _ := open(b, always(parse(b, "profiles: [public]")))
			targets := make([]tunnel.Target, count)
			for i := range targets {
				targets[i] = tunnel.Target{Addr: addr("8.8.8.8"), Port: uint16(i + 1)}
			}
			payload := make([]byte, 1200)
			b.ReportAllocs()
			for i := 0; b.Loop(); i++ {
				p.Send(payload, targets[i%count])
			}
		})
	}
}

// pipe is an Opener whose streams and associations tests can look at.
type pipe struct {
	mu       sync.Mutex
	aborted  map[string]error // by target
	receiver tunnel.Receiver
	during   func() // called inside OpenStream
}

type pipeStream struct {
	tunnel.Stream
	p  *pipe
	to string
}

func (s *pipeStream) Abort(err error) {
	s.p.mu.Lock()
	defer s.p.mu.Unlock()
	s.p.aborted[s.to] = err
}

func (s *pipeStream) Close() error { return nil }

func (p *pipe) OpenStream(_ context.Context, _ tunnel.Peer, to tunnel.Target) (tunnel.Stream, error) {
	if p.during != nil {
		p.during()
	}
	return &pipeStream{p: p, to: to.String()}, nil
}

func (p *pipe) OpenPackets(_ tunnel.Peer, r tunnel.Receiver) (tunnel.Packets, error) {
	p.receiver = r
	return &sink{}, nil
}

// came counts what is delivered from each address.
type came struct {
	receiver
	from map[netip.AddrPort]int
}

func (c *came) Deliver(_ []byte, from netip.AddrPort) { c.from[from]++ }

func TestANewPolicyEndsTheLiveFlowsThatItForbids(t *testing.T) {
	var now atomic.Pointer[policy.Policy]
	now.Store(parse(t, "rules: [{allow: any, to: [8.8.8.0/24, a.example.com, b.example.com]}]"))
	next := &pipe{aborted: map[string]error{}}
	g := policy.NewGuard(next, func(tunnel.Peer) *policy.Policy { return now.Load() })
	var told []policy.Denial
	g.Denied = func(d policy.Denial) { told = append(told, d) }
	named := func(host, a string) tunnel.Target { return tunnel.Target{Host: host, Addr: addr(a), Port: 5} }
	kept, cut, gone := target(t, "8.8.8.8:5"), target(t, "8.8.8.9:5"), target(t, "8.8.8.10:5")
	nameKept, nameCut := named("a.example.com", "1.1.1.1"), named("b.example.com", "1.1.1.2")
	in := &came{from: map[netip.AddrPort]int{}}
	p, err := g.OpenPackets(tunnel.Peer{App: "x"}, in)
	if err != nil {
		t.Fatal(err)
	}
	for _, to := range []tunnel.Target{kept, cut, gone, nameKept, nameCut} {
		s, err := g.OpenStream(t.Context(), tunnel.Peer{App: "x"}, to)
		if err != nil || p.Send(nil, to) != nil {
			t.Fatal(to, err)
		}
		if to == gone {
			s.Close()
		}
	}
	deliver := func() {
		clear(in.from)
		for _, to := range []tunnel.Target{kept, cut, nameKept, nameCut} {
			next.receiver.Deliver(nil, netip.AddrPortFrom(to.Addr, 99)) // also from another port
		}
	}
	if deliver(); len(in.from) != 4 {
		t.Fatalf("delivered %v", in.from)
	}

	now.Store(parse(t, "rules: [{allow: any, to: [8.8.8.8, a.example.com]}]"))
	g.Review()
	if len(next.aborted) != 2 || !errors.Is(next.aborted[cut.String()], tunnel.PolicyDenied) || !errors.Is(next.aborted[nameCut.String()], tunnel.PolicyDenied) {
		t.Errorf("aborted %v", next.aborted)
	}
	if deliver(); len(in.from) != 2 || in.from[netip.AddrPortFrom(kept.Addr, 99)] != 1 || in.from[netip.AddrPortFrom(nameKept.Addr, 99)] != 1 || g.Dropped() != 2 {
		t.Errorf("delivered %v, dropped %d", in.from, g.Dropped())
	}
	if n := in.reports(); n != 3 { // cut, gone and nameCut
		t.Errorf("the app was told of %d targets", n)
	}
	live := 0
	for _, d := range told {
		if !d.Live || d.By.App != "x" || !errors.Is(d.Err, tunnel.PolicyDenied) {
			t.Errorf("told of %+v", d)
		}
		live++
	}
	if live != 2+3 {
		t.Errorf("told of %d ends", live)
	}

	now.Store(parse(t, "rules: [{allow: any, to: any}]"))
	g.Review()
	if deliver(); len(in.from) != 4 {
		t.Errorf("allowed again, delivered %v", in.from)
	}
}

func TestAStreamThatOpensWhileThePolicyChangesDoesNotSlipThrough(t *testing.T) {
	var now atomic.Pointer[policy.Policy]
	now.Store(parse(t, "rules: [{allow: tcp, to: 8.8.8.8}]"))
	next := &pipe{aborted: map[string]error{}}
	g := policy.NewGuard(next, func(tunnel.Peer) *policy.Policy { return now.Load() })
	next.during = func() {
		now.Store(parse(t, "rules: []"))
		g.Review()
	}
	_, err := g.OpenStream(t.Context(), tunnel.Peer{}, target(t, "8.8.8.8:5"))
	if !errors.Is(err, tunnel.PolicyDenied) || len(next.aborted) != 1 {
		t.Errorf("%v, aborted %v", err, next.aborted)
	}
}

func TestWhatWasSentToANameMayAnswerUnlessARuleForbidsItsAddress(t *testing.T) {
	var now atomic.Pointer[policy.Policy]
	now.Store(parse(t, "rules: [{allow: udp, to: [a.example.com, 8.8.8.8]}]"))
	next := &pipe{}
	g := policy.NewGuard(next, func(tunnel.Peer) *policy.Policy { return now.Load() })
	in := &came{from: map[netip.AddrPort]int{}}
	p, _ := g.OpenPackets(tunnel.Peer{}, in)
	p.Send(nil, tunnel.Target{Host: "a.example.com", Port: 5})
	for text, want := range map[string]int{
		"rules: [{allow: udp, to: a.example.com}]":                              1,
		"rules: [{allow: udp, to: a.example.com}, {deny: any, to: 9.9.9.0/24}]": 0,
		"rules: [{allow: udp, to: b.example.com}]":                              0,
	} {
		now.Store(parse(t, text))
		g.Review()
		clear(in.from)
		next.receiver.Deliver(nil, netip.MustParseAddrPort("9.9.9.9:5"))
		if n := in.from[netip.MustParseAddrPort("9.9.9.9:5")]; n != want {
			t.Errorf("%s: delivered %d", text, n)
		}
	}
}

func TestWithoutAPolicyOfItsOwnAnEndLetsTheOtherDecide(t *testing.T) {
	for _, to := range []tunnel.Target{target(t, "127.0.0.1:1"), target(t, "10.0.0.1:1"), {Host: "a.example", Port: 1}} {
		if d := policy.Elsewhere().Decide(policy.TCP, to); !d.Allow || !d.Undecided || d.Tag != "" {
			t.Errorf("%s: %+v", to, d)
		}
	}
}
