package cloudproxy

import (
	"context"
	"net/netip"
	"sync/atomic"
	"time"

	"golang.org/x/time/rate"

	"culvert/tunnel"
)

// throttle bounds the bytes of one session in each direction, those of streams
// and those of datagrams apart: streams wait, datagrams are dropped.
type throttle struct {
	next    tunnel.Opener
	streams [2]*rate.Limiter // up, down
	packets [2]*rate.Limiter
	dropped atomic.Uint64
}

const (
	up, down = 0, 1
	// overRate is the reason for datagrams that a throttle drops.
	overRate = "over_rate"
	// throttleBurst is the least that may go at once, in bytes: a datagram, and
	// what a stream is read with.
	throttleBurst = 64 << 10
)

// newThrottle bounds next to n bytes a second.
func newThrottle(next tunnel.Opener, n int) *throttle {
	t := &throttle{next: next}
	for way := range t.streams {
		t.streams[way] = rate.NewLimiter(rate.Limit(n), max(n/4, throttleBurst))
		t.packets[way] = rate.NewLimiter(rate.Limit(n), max(n/4, throttleBurst))
	}
	return t
}

// OpenStream implements tunnel.Opener.
func (t *throttle) OpenStream(ctx context.Context, by tunnel.Peer, to tunnel.Target) (tunnel.Stream, error) {
	s, err := t.next.OpenStream(ctx, by, to)
	if err != nil {
		return nil, err
	}
	ts := &throttledStream{Stream: s, t: t}
	ts.ended, ts.end = context.WithCancel(context.Background())
	return ts, nil
}

// OpenPackets implements tunnel.Opener.
func (t *throttle) OpenPackets(by tunnel.Peer, r tunnel.Receiver) (tunnel.Packets, error) {
	p, err := t.next.OpenPackets(by, &throttledReceiver{r, t})
	if err != nil {
		return nil, err
	}
	return &throttledPackets{p, t}, nil
}

// pass reports whether a datagram may go.
func (t *throttle) pass(way, n int) bool {
	if t.packets[way].AllowN(time.Now(), n) {
		return true
	}
	t.dropped.Add(1)
	return false
}

type throttledStream struct {
	tunnel.Stream
	t     *throttle
	ended context.Context
	end   context.CancelFunc
}

// Read waits after what it has read, so that the target is slowed down.
func (s *throttledStream) Read(p []byte) (int, error) {
	n, err := s.Stream.Read(p[:min(len(p), throttleBurst)])
	if n > 0 && err == nil {
		s.t.streams[down].WaitN(s.ended, n) // fails only when the stream has ended, which the next Read says
	}
	return n, err
}

// Write waits before what it writes.
func (s *throttledStream) Write(p []byte) (n int, err error) {
	for len(p) > 0 && err == nil {
		part := p[:min(len(p), throttleBurst)]
		s.t.streams[up].WaitN(s.ended, len(part))
		var wrote int
		wrote, err = s.Stream.Write(part)
		n += wrote
		p = p[len(part):]
	}
	return n, err
}

func (s *throttledStream) Close() error {
	s.end()
	return s.Stream.Close()
}

func (s *throttledStream) Abort(err error) {
	s.end()
	s.Stream.Abort(err)
}

type throttledPackets struct {
	tunnel.Packets
	t *throttle
}

func (p *throttledPackets) Send(b []byte, to tunnel.Target) error {
	if !p.t.pass(up, len(b)) {
		return nil
	}
	return p.Packets.Send(b, to)
}

type throttledReceiver struct {
	tunnel.Receiver
	t *throttle
}

func (r *throttledReceiver) Deliver(b []byte, from netip.AddrPort) {
	if r.t.pass(down, len(b)) {
		r.Receiver.Deliver(b, from)
	}
}
