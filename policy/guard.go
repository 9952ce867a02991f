package policy

import (
	"context"
	"net"
	"net/netip"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"culvert/tunnel"
)

// NewGuard returns an Opener that asks the policy and passes on to next what
// it allows. Everything else fails with PolicyDenied.
//
// The policy is asked for each stream and each datagram. policy returns the
// one in force and must be cheap: an association asks it for every datagram
// and drops what it has remembered when the answer is another pointer. Streams
// that are open stay open.
//
// A datagram that is refused is an error of its Send and is reported to
// Receiver.Unreachable, once per second for each target at most. The
// association lives. Undecided names pass: behind the stage that resolves
// names, where no target is without an address, there are none.
func NewGuard(next tunnel.Opener, policy func() *Policy) tunnel.Opener {
	return &guard{next: next, policy: policy}
}

type guard struct {
	next   tunnel.Opener
	policy func() *Policy
}

func (g *guard) OpenStream(ctx context.Context, by tunnel.Peer, to tunnel.Target) (tunnel.Stream, error) {
	if d := g.policy().Decide(TCP, to); !d.Allow {
		return nil, Denied(TCP, to, d)
	}
	return g.next.OpenStream(ctx, by, to)
}

func (g *guard) OpenPackets(by tunnel.Peer, r tunnel.Receiver) (tunnel.Packets, error) {
	gr := &guardedReceiver{Receiver: r}
	next, err := g.next.OpenPackets(by, gr)
	if err != nil {
		return nil, err
	}
	return &guardedPackets{Packets: next, policy: g.policy, receiver: gr}, nil
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
	// maxVerdicts bounds what one association remembers. Twice the remotes
	// that ICE tries for a large call; more only costs time.
	maxVerdicts = 64
	// reportEvery is the shortest time between two reports for one target.
	reportEvery = time.Second
)

type guardedPackets struct {
	tunnel.Packets
	policy   func() *Policy
	receiver *guardedReceiver

	mu       sync.Mutex
	asked    *Policy                 // whose verdicts these are
	last     verdict                 // most associations have one target at a time
	verdicts map[tunnel.Target]error // made when there is a second target; nil error: allowed
}

type verdict struct {
	to    tunnel.Target
	err   error
	valid bool
}

func (g *guardedPackets) Send(p []byte, to tunnel.Target) error {
	if err := g.judge(to); err != nil {
		if g.receiver.closed.Load() {
			return net.ErrClosed
		}
		g.receiver.report(to, err)
		return err
	}
	return g.Packets.Send(p, to)
}

func (g *guardedPackets) Close() error {
	g.receiver.closed.Store(true)
	return g.Packets.Close()
}

// judge returns nil where the policy allows the target.
func (g *guardedPackets) judge(to tunnel.Target) error {
	policy := g.policy()
	g.mu.Lock()
	defer g.mu.Unlock()
	if policy != g.asked {
		g.asked, g.last, g.verdicts = policy, verdict{}, nil
	}
	if g.last.valid && g.last.to == to {
		return g.last.err
	}
	err, known := g.verdicts[to]
	if !known {
		if d := policy.Decide(UDP, to); !d.Allow {
			err = Denied(UDP, to, d)
		}
	}
	if g.last.valid && g.verdicts == nil {
		g.verdicts = map[tunnel.Target]error{g.last.to: g.last.err}
	}
	if g.verdicts != nil && !known {
		if len(g.verdicts) >= maxVerdicts {
			clear(g.verdicts)
		}
		g.verdicts[to] = err
	}
	g.last = verdict{to, err, true}
	return err
}

// guardedReceiver keeps Closed the last call, and reports within their rate.
type guardedReceiver struct {
	tunnel.Receiver
	closed atomic.Bool // by either end

	mu       sync.Mutex // held while Unreachable is called
	reported map[tunnel.Target]time.Time
}

// report tells the receiver of a refusal. Two at a time are not waited for:
// the later one is told with its next datagram.
func (r *guardedReceiver) report(to tunnel.Target, err error) {
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
	if len(r.reported) >= maxVerdicts {
		for old, at := range r.reported {
			if now.Sub(at) >= reportEvery {
				delete(r.reported, old)
			}
		}
		if len(r.reported) >= maxVerdicts {
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
	r.Receiver.Unreachable(addr, err)
}

// Closed is called by the stage behind the guard.
func (r *guardedReceiver) Closed(err error) {
	r.mu.Lock() // a report that has begun ends first
	r.closed.Store(true)
	r.mu.Unlock()
	r.Receiver.Closed(err)
}
