package tunnelquic

import (
	"context"
	"encoding/binary"
	"errors"
	"maps"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/quic-go/quic-go"

	"culvert/tunnel"
	"culvert/tunnel/age"
)

const (
	// handoff is how many datagrams may wait for SendDatagram, which blocks
	// when quic-go holds 32: enough to keep it busy, no queue of ours.
	handoff = 4
	// maxPacket is more than any QUIC packet that quic-go sends (1,452 bytes).
	maxPacket = 2048
	// stamp is the length of the send time before each datagram. quic-go keeps
	// up to 32 for as long as its congestion window is shut, and sends them when
	// a path is back: the receiver drops what has become too old.
	stamp = 2
)

// origin is that of the clock of send times.
var origin = time.Now()

// A way sends DATAGRAM frames.
//
//	Send -> free slot -> filled -> send goroutine -> SendDatagram (may block)
//	recv <- receive goroutine <- ReceiveDatagram
type way struct {
	link   *link
	free   chan []byte // empty buffers
	filled chan []byte // datagrams; never blocks, since it has room for all buffers
	want   atomic.Bool // a Send found no free buffer since writable was called

	max       atomic.Int64 // what Max has last said
	tooLarge  atomic.Uint64
	late      atomic.Uint64
	malformed atomic.Uint64
	failed    atomic.Uint64

	mu       sync.Mutex // guards running.Go against running.Wait
	stopped  bool
	running  sync.WaitGroup
	oversize []byte // see Max
}

func newWay(l *link) *way {
	w := &way{link: l, free: make(chan []byte, handoff), filled: make(chan []byte, handoff), oversize: make([]byte, maxPacket)}
	for range handoff {
		w.free <- make([]byte, 0, maxPacket)
	}
	return w
}

func (w *way) Start(recv func([]byte), writable func()) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.stopped {
		return
	}
	w.running.Go(func() { w.receive(recv) })
	w.running.Go(func() { w.send(writable) })
}

func (w *way) receive(recv func([]byte)) {
	var ages age.Ages
	for {
		p, err := w.link.conn.ReceiveDatagram(context.Background())
		w.link.idle.datagram()
		switch {
		case err != nil: // the connection has ended
			return
		case len(p) < stamp:
			w.malformed.Add(1)
		case ages.Of(time.Since(origin), binary.BigEndian.Uint16(p)) > w.link.maxAge:
			w.late.Add(1)
		default:
			recv(p[stamp:])
		}
	}
}

func (w *way) send(writable func()) {
	ended := w.link.conn.Context().Done()
	for {
		select {
		case <-ended:
			return
		case p := <-w.filled:
			var large *quic.DatagramTooLargeError
			switch err := w.link.conn.SendDatagram(p); {
			case errors.As(err, &large): // the path has narrowed since Send looked
				w.max.Store(max(0, large.MaxDatagramPayloadSize-stamp))
				w.tooLarge.Add(1)
			case err != nil:
				w.failed.Add(1)
			default:
				w.link.idle.wrote(len(p))
			}
			w.free <- p
			if w.want.CompareAndSwap(true, false) {
				writable()
			}
		}
	}
}

func (w *way) Send(p []byte) error {
	select {
	case <-w.link.conn.Context().Done():
		return w.link.reason()
	default:
	}
	if len(p) > int(w.max.Load()) && len(p) > w.Max() {
		return tunnel.ErrTooLarge
	}
	var b []byte
	select {
	case b = <-w.free:
	default:
		// Say that we want a buffer, then look again: one that was given back
		// between the two looks would not be announced otherwise.
		w.want.Store(true)
		select {
		case b = <-w.free:
		default:
			return tunnel.ErrBlocked
		}
	}
	b = binary.BigEndian.AppendUint16(b[:0], uint16(time.Since(origin).Milliseconds()))
	w.filled <- append(b, p...)
	return nil
}

// Max asks quic-go, whose answer follows path MTU discovery: a datagram larger
// than any packet is refused before anything is done with it, and the error
// says what would fit. quic-go reckons with the longest connection ID (20
// bytes; ours have 8), which leaves room for the frame's own header.
func (w *way) Max() int {
	var large *quic.DatagramTooLargeError
	if err := w.link.conn.SendDatagram(w.oversize); errors.As(err, &large) {
		w.max.Store(max(0, large.MaxDatagramPayloadSize-stamp))
	}
	return int(w.max.Load())
}

func (w *way) Name() string { return "quic-datagram" }

// Reasons returns the words of Lost.
func Reasons() []string { return slices.Collect(maps.Keys(new(way).Lost())) }

// Lost counts what had to be dropped, by reason: "too_large" and
// "connection_ended" when sending, "late" and "malformed" when receiving.
func (w *way) Lost() map[string]uint64 {
	return map[string]uint64{"too_large": w.tooLarge.Load(), "connection_ended": w.failed.Load(), "late": w.late.Load(), "malformed": w.malformed.Load()}
}

// wait returns when nothing of the way runs any more. The connection has ended.
func (w *way) wait() {
	w.mu.Lock()
	w.stopped = true
	w.mu.Unlock()
	w.running.Wait()
}
