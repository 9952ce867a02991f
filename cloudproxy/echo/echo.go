package echo

import (
	"context"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/time/rate"

	"culvert/tunnel"
	"culvert/tunnel/wire"
)

// What one session may have echoed, in bytes: a test call of 1.2 Mbit/s twice as
// fast as it is, for two minutes at once, and one of twenty seconds each minute.
const (
	perSecond = 500_000
	burst     = 100_000
	allowance = 20_000_000
	refill    = 50_000 // per second
)

// reportEvery is the shortest time between two refusals of an association.
const reportEvery = time.Second

// Echo is the stage of one session.
type Echo struct {
	next  tunnel.Opener
	on    func() error
	epoch time.Time
	rate  *rate.Limiter
	total *rate.Limiter
}

// New makes the stage of one session. on says whether there is an echo, by
// returning nil; it is asked for each datagram to it.
func New(next tunnel.Opener, on func() error) *Echo {
	return &Echo{
		next: next, on: on, epoch: time.Now(),
		rate: rate.NewLimiter(perSecond, burst), total: rate.NewLimiter(refill, allowance),
	}
}

// OpenStream passes on: only datagrams are echoed.
func (e *Echo) OpenStream(ctx context.Context, by tunnel.Peer, to tunnel.Target) (tunnel.Stream, error) {
	return e.next.OpenStream(ctx, by, to)
}

// OpenPackets wraps the next stage's association.
func (e *Echo) OpenPackets(by tunnel.Peer, r tunnel.Receiver) (tunnel.Packets, error) {
	er := &receiver{Receiver: r}
	next, err := e.next.OpenPackets(by, er)
	if err != nil {
		return nil, err
	}
	return &packets{Packets: next, e: e, r: er}, nil
}

type packets struct {
	tunnel.Packets
	e *Echo
	r *receiver
}

// Send echoes what is meant for us and passes on the rest.
func (p *packets) Send(b []byte, to tunnel.Target) error {
	if to != wire.Echo {
		return p.Packets.Send(b, to)
	}
	if p.r.closed.Load() {
		return net.ErrClosed
	}
	now := time.Now()
	if err := p.e.on(); err != nil {
		p.r.refuse(now, err)
		return err
	}
	if len(b) < wire.EchoMin || !p.e.rate.AllowN(now, len(b)) || !p.e.total.AllowN(now, len(b)) {
		return nil // like a full queue
	}
	p.r.echo(b, now.Sub(p.e.epoch))
	return nil
}

// Close ends the association.
func (p *packets) Close() error {
	p.r.closed.Store(true)
	return p.Packets.Close()
}

// receiver keeps Closed the last call.
type receiver struct {
	tunnel.Receiver
	closed atomic.Bool // by either end

	mu      sync.Mutex // guards what follows, and spans the calls made here
	count   uint32
	refused time.Time
	buf     []byte // the echoed datagram: what was sent is only borrowed
}

func (r *receiver) echo(b []byte, at time.Duration) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed.Load() {
		return
	}
	r.count++
	r.buf = append(r.buf[:0], b...)
	wire.EchoStamp{Count: r.count, Time: at}.Put(r.buf)
	r.Receiver.Deliver(r.buf, wire.EchoFrom)
}

func (r *receiver) refuse(now time.Time, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed.Load() || now.Sub(r.refused) < reportEvery {
		return
	}
	r.refused = now
	r.Receiver.Unreachable(netip.AddrPort{}, err)
}

// Closed is called by the next stage.
func (r *receiver) Closed(err error) {
	r.mu.Lock() // an echo that has begun ends first
	r.closed.Store(true)
	r.mu.Unlock()
	r.Receiver.Closed(err)
}
