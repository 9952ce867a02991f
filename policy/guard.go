package policy

import (
	"context"
	"maps"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"culvert/tunnel"
)

// A Guard is an Opener that asks the policy and passes on to the next stage what
// it allows. Everything else fails with PolicyDenied.
//
// The policy is asked for each stream and each datagram. A datagram that is
// refused is an error of its Send and is reported to Receiver.Unreachable, once
// per second for each target at most. The association lives. Undecided names
// pass: behind the stage that resolves names, where no target is without an
// address, there are none.
type Guard struct {
	// Denied is told of each refusal that is an error of OpenStream or a report to
	// a receiver, and of what Review ends. It must not wait. Set it before the
	// guard is used; nil: nobody is told.
	Denied func(Denial)
	// Own reports whether a target is a program on this very host, by an address
	// that others reach it at. It may trust what comes from its own host, as a
	// firewall does, so only listing the address under special lets anybody there.
	// It is called for every datagram. Set it before the guard is used; nil: nothing is.
	Own func(Proto, tunnel.Target) bool

	next   tunnel.Opener
	policy func(by tunnel.Peer) *Policy
	drops  atomic.Uint64

	mu      sync.Mutex // guards the fields below
	streams map[*guardedStream]struct{}
	packets map[*guardedPackets]struct{}
}

// A Denial is one refusal.
type Denial struct {
	By    tunnel.Peer
	Proto Proto
	To    tunnel.Target
	Err   error // the sentence, with the code PolicyDenied
	Live  bool  // it was allowed before, and a new policy has ended it
}

// NewGuard makes a guard. policy returns the one in force for a peer and must be
// cheap: it is called for every datagram. After it has begun to return another
// one, Review ends what that forbids.
func NewGuard(next tunnel.Opener, policy func(by tunnel.Peer) *Policy) *Guard {
	return &Guard{next: next, policy: policy, streams: map[*guardedStream]struct{}{}, packets: map[*guardedPackets]struct{}{}}
}

// OpenStream implements tunnel.Opener.
func (g *Guard) OpenStream(ctx context.Context, by tunnel.Peer, to tunnel.Target) (tunnel.Stream, error) {
	asked := g.policy(by)
	if d := g.decide(asked, TCP, to); !d.Allow {
		return nil, g.refuse(by, TCP, to, d, false)
	}
	next, err := g.next.OpenStream(ctx, by, to)
	if err != nil {
		return nil, err
	}
	s := &guardedStream{Stream: next, guard: g, by: by, to: to}
	g.mu.Lock()
	g.streams[s] = struct{}{}
	g.mu.Unlock()
	if g.policy(by) != asked { // meanwhile, and Review may have passed by
		if err := s.review(); err != nil {
			return nil, err
		}
	}
	return s, nil
}

// OpenPackets implements tunnel.Opener.
func (g *Guard) OpenPackets(by tunnel.Peer, r tunnel.Receiver) (tunnel.Packets, error) {
	p := &guardedPackets{guard: g, by: by}
	p.receiver = &guardedReceiver{Receiver: r, packets: p}
	next, err := g.next.OpenPackets(by, p.receiver)
	if err != nil {
		return nil, err
	}
	p.Packets = next
	g.mu.Lock()
	defer g.mu.Unlock()
	if !p.receiver.closed.Load() { // else nobody would take it out
		g.packets[p] = struct{}{}
	}
	return p, nil
}

// Review judges what is open by the policy that is in force now: streams that it
// forbids are aborted, and of associations nothing comes any more from where it
// does not allow them to send to.
func (g *Guard) Review() {
	g.mu.Lock()
	streams := slices.Collect(maps.Keys(g.streams))
	packets := slices.Collect(maps.Keys(g.packets))
	g.mu.Unlock()
	for _, s := range streams {
		s.review()
	}
	for _, p := range packets {
		p.review()
	}
}

// Dropped counts datagrams that came for an association from where a new policy
// does not allow it to send to.
func (g *Guard) Dropped() uint64 { return g.drops.Load() }

// decide is Policy.Decide with what only this host knows.
func (g *Guard) decide(p *Policy, proto Proto, to tunnel.Target) Decision {
	if d := p.Decide(proto, to); !d.Allow || !g.own(p, proto, to) {
		return d
	}
	return ownHost
}

// ownHost is the decision about what is on this host and not listed.
var ownHost = Decision{Reason: reasonOwn, Class: "own host"}

// own reports whether a target is on this host and the policy does not list it.
func (g *Guard) own(p *Policy, proto Proto, to tunnel.Target) bool {
	return g.Own != nil && g.Own(proto, to) && !p.special.Contains(to.Addr)
}

// refuse makes the error of a refusal and tells of it.
func (g *Guard) refuse(by tunnel.Peer, proto Proto, to tunnel.Target, d Decision, live bool) error {
	err := Denied(proto, to, d)
	g.tell(Denial{by, proto, to, err, live})
	return err
}

func (g *Guard) tell(d Denial) {
	if g.Denied != nil {
		g.Denied(d)
	}
}

func (g *Guard) forget(p *guardedPackets) {
	g.mu.Lock()
	defer g.mu.Unlock()
	delete(g.packets, p)
}

// guardedStream is a stream that Review can find.
type guardedStream struct {
	tunnel.Stream
	guard *Guard
	by    tunnel.Peer
	to    tunnel.Target
}

func (s *guardedStream) Close() error {
	s.forget()
	return s.Stream.Close()
}

func (s *guardedStream) Abort(err error) {
	s.forget()
	s.Stream.Abort(err)
}

// forget reports whether the stream was known.
func (s *guardedStream) forget() bool {
	s.guard.mu.Lock()
	defer s.guard.mu.Unlock()
	_, known := s.guard.streams[s]
	delete(s.guard.streams, s)
	return known
}

// review aborts a stream that the policy forbids.
func (s *guardedStream) review() error {
	d := s.guard.decide(s.guard.policy(s.by), TCP, s.to)
	if d.Allow || !s.forget() {
		return nil
	}
	err := s.guard.refuse(s.by, TCP, s.to, d, true)
	s.Stream.Abort(err)
	return err
}

// Denied puts a refusal into a sentence. The error's code is PolicyDenied.
func Denied(proto Proto, to tunnel.Target, d Decision) error {
	what := "add an allow rule to the policy, or ask whoever runs the cloud proxy"
	switch {
	case d.Rule != nil:
		what = "if it should be reachable, change that rule"
	case d.Class != "":
		what = "if it should be reachable, list it under special and add an allow rule, here and at the cloud proxy"
	}
	return tunnel.Errorf(tunnel.PolicyDenied, "%s to %s is refused: %s; %s", proto, destination(to), d.Reason, what)
}

// destination is Target.String for a host that may hold anything.
func destination(t tunnel.Target) string {
	if t.Host == "" {
		return t.String()
	}
	host := t.Host
	for _, c := range []byte(host) {
		if c <= ' ' || c >= 0x7f {
			host = quote(host)
			break
		}
	}
	if len(host) > maxName {
		host = quote(host)
	}
	s := net.JoinHostPort(host, strconv.Itoa(int(t.Port)))
	if t.Addr.IsValid() {
		s += " (" + t.Addr.String() + ")"
	}
	return s
}

const (
	// maxVerdicts bounds what one association remembers: as many remotes as the
	// cloud proxy lets answer it.
	maxVerdicts = 256
	// maxReported bounds the targets that are reported within reportEvery.
	maxReported = 64
	// reportEvery is the shortest time between two reports for one target.
	reportEvery = time.Second
)

type guardedPackets struct {
	tunnel.Packets
	guard    *Guard
	by       tunnel.Peer
	receiver *guardedReceiver
	changed  atomic.Bool // the policy has changed since the association was opened

	mu      sync.Mutex
	asked   *Policy                    // whose verdicts these are
	last    verdict                    // most associations have one target at a time
	allowed map[tunnel.Target]struct{} // made when there is a second target. A refusal is not kept: it is larger, and anybody can cause many
	came    map[netip.Addr]bool        // whether what comes from an address is let in, once changed
}

type verdict struct {
	to    tunnel.Target
	err   error
	valid bool
}

func (g *guardedPackets) Send(p []byte, to tunnel.Target) error {
	err := g.judge(to)
	if err == nil && g.guard.own(g.guard.policy(g.by), UDP, to) { // not remembered: associations of this host come and go
		err = Denied(UDP, to, ownHost)
	}
	if err != nil {
		if g.receiver.closed.Load() {
			return net.ErrClosed
		}
		g.receiver.report(to, err, false)
		return err
	}
	return g.Packets.Send(p, to)
}

func (g *guardedPackets) Close() error {
	g.receiver.closed.Store(true)
	g.guard.forget(g)
	return g.Packets.Close()
}

// judge returns nil where the policy allows the target.
func (g *guardedPackets) judge(to tunnel.Target) error {
	policy := g.guard.policy(g.by)
	g.mu.Lock()
	defer g.mu.Unlock()
	g.followLocked(policy)
	if g.last.valid && g.last.to == to {
		return g.last.err
	}
	var err error
	_, known := g.allowed[to]
	if !known {
		err = judged(policy, to)
		delete(g.came, to.Addr)
	}
	if g.last.valid && g.last.err == nil && g.allowed == nil {
		g.allowed = map[tunnel.Target]struct{}{g.last.to: {}}
	}
	if g.allowed != nil && !known && err == nil {
		if len(g.allowed) >= maxVerdicts {
			for any := range g.allowed {
				delete(g.allowed, any)
				break
			}
		}
		g.allowed[to] = struct{}{}
	}
	g.last = verdict{to, err, true}
	return err
}

// judged returns nil where the policy allows a datagram.
func judged(policy *Policy, to tunnel.Target) error {
	if d := policy.Decide(UDP, to); !d.Allow {
		return Denied(UDP, to, d)
	}
	return nil
}

// followLocked judges what is remembered by another policy. g.mu is held.
func (g *guardedPackets) followLocked(policy *Policy) {
	if policy == g.asked {
		return
	}
	if g.asked != nil {
		g.changed.Store(true)
	}
	g.asked, g.came = policy, nil
	for to := range g.allowed {
		if judged(policy, to) != nil {
			delete(g.allowed, to)
		}
	}
	if g.last.valid {
		g.last.err = judged(policy, g.last.to)
	}
}

// review judges what is remembered by the policy in force, and tells of the
// targets that were allowed and are not any more.
func (g *guardedPackets) review() {
	policy := g.guard.policy(g.by)
	var ended []verdict
	g.mu.Lock()
	allowed := g.allowedLocked()
	g.followLocked(policy)
	for _, to := range allowed {
		if err := judged(policy, to); err != nil {
			ended = append(ended, verdict{to, err, true})
		}
	}
	g.mu.Unlock()
	for _, v := range ended {
		g.receiver.report(v.to, v.err, true)
	}
}

// allowedLocked lists the targets that may be sent to. g.mu is held.
func (g *guardedPackets) allowedLocked() []tunnel.Target {
	all := slices.Collect(maps.Keys(g.allowed))
	if g.allowed == nil && g.last.valid && g.last.err == nil {
		all = append(all, g.last.to)
	}
	return all
}

// mayCome reports whether a datagram from an address is let in after the policy
// has changed: from where the association may send to. Where it has sent to
// names whose addresses are not known here, only a rule against the address
// keeps it out.
func (g *guardedPackets) mayCome(from netip.AddrPort) bool {
	policy := g.guard.policy(g.by)
	addr := from.Addr()
	g.mu.Lock()
	defer g.mu.Unlock()
	g.followLocked(policy)
	ok, known := g.came[addr]
	if known {
		return ok
	}
	names := false
	for _, to := range g.allowedLocked() {
		ok = ok || to.Addr == addr
		names = names || !to.Addr.IsValid()
	}
	if !ok {
		d := policy.Decide(UDP, tunnel.TargetOf(from))
		ok = d.Allow || names && d.Rule == nil && d.Class == ""
	}
	if g.came == nil || len(g.came) >= maxVerdicts {
		g.came = map[netip.Addr]bool{}
	}
	g.came[addr] = ok
	return ok
}

// guardedReceiver keeps Closed the last call, and reports within their rate.
type guardedReceiver struct {
	tunnel.Receiver
	packets *guardedPackets
	closed  atomic.Bool // by either end

	mu       sync.Mutex // held while Unreachable is called
	reported map[tunnel.Target]time.Time
}

// Deliver is on the path of each datagram that comes: while the policy has not
// changed it asks nothing.
func (r *guardedReceiver) Deliver(p []byte, from netip.AddrPort) {
	if r.packets.changed.Load() && !r.packets.mayCome(from) {
		r.packets.guard.drops.Add(1)
		return
	}
	r.Receiver.Deliver(p, from)
}

// report tells the receiver of a refusal. Two at a time are not waited for:
// the later one is told with its next datagram.
func (r *guardedReceiver) report(to tunnel.Target, err error, live bool) {
	if !r.mu.TryLock() {
		return
	}
	defer r.mu.Unlock()
	if r.closed.Load() {
		return
	}
	now := time.Now()
	if at, ok := r.reported[to]; ok && now.Sub(at) < reportEvery {
		return
	}
	if len(r.reported) >= maxReported {
		for old, at := range r.reported {
			if now.Sub(at) >= reportEvery {
				delete(r.reported, old)
			}
		}
		if len(r.reported) >= maxReported {
			return // the sender has the error
		}
	}
	if r.reported == nil {
		r.reported = map[tunnel.Target]time.Time{}
	}
	r.reported[to] = now
	addr := netip.AddrPort{}
	if to.Addr.IsValid() {
		addr = to.AddrPort()
	}
	r.packets.guard.tell(Denial{r.packets.by, UDP, to, err, live})
	r.Receiver.Unreachable(addr, err)
}

// Closed is called by the stage behind the guard.
func (r *guardedReceiver) Closed(err error) {
	r.mu.Lock() // a report that has begun ends first
	r.closed.Store(true)
	r.mu.Unlock()
	r.packets.guard.forget(r.packets)
	r.Receiver.Closed(err)
}
