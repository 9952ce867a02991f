package tunneltls

import (
	"context"
	"errors"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/yamux"

	"culvert/tunnel"
)

const (
	// backlog is how many streams of the peer wait for AcceptStream.
	backlog = 256
	// openTimeout is how long yamux waits for a stream's acknowledgement before
	// it closes the session. A peer of this package acknowledges at once, so
	// this fires when TCP stands still.
	openTimeout = 10 * time.Second
	// framesAtOnce is how many data frames may be on their way into TCP: one
	// being written and the next one ready.
	framesAtOnce = 2
	// A frame that took longer than slowFrame is followed by small ones, so that
	// a stream's message never waits behind more than a few of those; one that
	// took less than quickFrame by large ones.
	slowFrame  = 50 * time.Millisecond
	quickFrame = 5 * time.Millisecond
)

// carrier implements tunnel.Carrier. Its goroutines, besides yamux's:
//
//	accept    takes the peer's streams from yamux
//	speak     writes the control stream, and closes yamux streams that are over
//	listen    reads the control stream
//	watch     asks for a sign of life
//	shut      waits for the end and takes everything down
type carrier struct {
	link    *link
	cfg     *Config
	frames  *frames
	session *yamux.Session

	accepted chan *stream
	opening  chan struct{} // one open at a time: stream numbers reach the peer in order
	slots    chan struct{} // frames on their way into TCP
	ready    chan struct{} // closed: the control stream exists
	news     chan struct{} // out or over hold something
	done     chan struct{}
	frame    atomic.Int64 // the size of the next frames
	wg       sync.WaitGroup

	mu      sync.Mutex // a leaf: nothing is locked while it is held
	err     error      // set before done is closed
	streams map[uint32]*stream
	last    [2]uint32            // the latest stream with an even and with an odd number
	early   map[uint32][]message // about streams that are not registered yet
	out     []byte               // messages for the control stream
	over    []*yamux.Stream      // to be closed after them
}

func newCarrier(l *link, cfg *Config) (*carrier, error) {
	keepShort(l.raw, carrierUnsent, 2*cfg.WriteTimeout)
	done := make(chan struct{})
	c := &carrier{
		link: l, cfg: cfg,
		frames:   &frames{link: l, buf: make([]byte, 0, maxPlaintext), flood: newFloodMeter(), done: done},
		accepted: make(chan *stream, backlog),
		opening:  make(chan struct{}, 1),
		slots:    make(chan struct{}, framesAtOnce),
		ready:    make(chan struct{}),
		news:     make(chan struct{}, 1),
		done:     done,
		streams:  make(map[uint32]*stream),
		early:    make(map[uint32][]message),
	}
	c.frames.unread = newUnread(cfg, c.shrink)
	c.frame.Store(smallFrame)
	conf := &yamux.Config{
		AcceptBacklog:          backlog,
		EnableKeepAlive:        false, // watch does it, and takes any byte for a sign of life
		KeepAliveInterval:      cfg.KeepAlive,
		ConnectionWriteTimeout: 2 * cfg.WriteTimeout, // gather.expect gives up first
		MaxStreamWindowSize:    uint32(cfg.Window),
		StreamOpenTimeout:      openTimeout,
		StreamCloseTimeout:     0, // never: the other side may read for hours
		Logger:                 &yamuxLog{to: cfg.Log},
	}
	make := yamux.Server
	if l.client {
		make = yamux.Client
	}
	session, err := make(c.frames, conf)
	if err != nil {
		l.shut()
		return nil, err
	}
	c.session = session
	c.wg.Go(c.shut)
	c.start(c.watch)
	c.start(c.accept)
	if l.client {
		c.start(func() {
			y, err := c.session.OpenStream()
			if err != nil {
				c.end(c.reason(err))
				return
			}
			c.converse(y)
		})
	}
	return c, nil
}

// start runs f unless the carrier has ended.
func (c *carrier) start(f func()) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err == nil {
		c.wg.Go(f)
	}
}

func (c *carrier) OpenStream(ctx context.Context) (tunnel.Stream, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	select {
	case <-c.ready: // the control stream is the first
	case <-ctx.Done():
		return nil, ctx.Err()
	case <-c.done:
		return nil, c.Err()
	}
	select {
	case c.opening <- struct{}{}:
	case <-ctx.Done():
		return nil, ctx.Err()
	case <-c.done:
		return nil, c.Err()
	}
	if c.count() >= c.cfg.MaxStreams {
		<-c.opening
		return nil, tunnel.Errorf(tunnel.LimitExceeded, "this connection carries %d streams, which is its limit; close some", c.cfg.MaxStreams)
	}
	// yamux does not know contexts: it may wait for TCP as long as WriteTimeout.
	made := make(chan *stream)
	c.start(func() {
		defer func() { <-c.opening }()
		y, err := c.session.OpenStream()
		if err != nil {
			c.end(c.reason(err))
			return
		}
		s := newStream(c, y)
		c.register(s)
		select {
		case made <- s:
		case <-ctx.Done():
			s.Abort(ctx.Err())
		case <-c.done:
		}
	})
	select {
	case s := <-made:
		return s, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	case <-c.done:
		return nil, c.Err()
	}
}

func (c *carrier) AcceptStream(ctx context.Context) (tunnel.Stream, error) {
	if c.isDone() {
		return nil, c.Err()
	}
	select {
	case s := <-c.accepted:
		return s, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	case <-c.done:
		return nil, c.Err()
	}
}

// Datagrams returns nil: datagrams have connections of their own, the lanes.
func (c *carrier) Datagrams() tunnel.Way { return nil }

func (c *carrier) Flow() tunnel.Flow { return c.link.Flow() }

func (c *carrier) ExportKey(label string, context []byte, n int) ([]byte, error) {
	return c.link.ExportKey(label, context, n)
}

func (c *carrier) Stats() tunnel.CarrierStats {
	return tunnel.CarrierStats{
		Kind:   kind,
		Local:  tunnel.AddrPortOf(c.link.LocalAddr()),
		Remote: tunnel.AddrPortOf(c.link.RemoteAddr()),
		RTT:    roundTrip(c.link.raw),
	}
}

func (c *carrier) Done() <-chan struct{} { return c.done }

func (c *carrier) Err() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.err
}

// Close ends the carrier; it returns within a second.
func (c *carrier) Close(err error) error {
	if err == nil {
		err = net.ErrClosed
	}
	c.end(err)
	c.wg.Wait()
	return nil
}

func (c *carrier) isDone() bool {
	select {
	case <-c.done:
		return true
	default:
		return false
	}
}

// end makes err the reason, unless there is one. It does not wait.
func (c *carrier) end(err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err == nil {
		c.err = err
		close(c.done)
	}
}

// reason finds what is behind an error of yamux.
func (c *carrier) reason(err error) error {
	if below := c.frames.why(); below != nil {
		err = below
	}
	return ended(err)
}

func (c *carrier) shut() {
	<-c.done
	c.mu.Lock()
	var all []*stream
	for _, s := range c.streams {
		all = append(all, s)
	}
	c.mu.Unlock()
	for _, s := range all {
		s.carrierDone()
	}
	c.session.Close()
	c.frames.unread.end()
}

// count is how many streams yamux holds besides the control stream: also those
// that the peer has not closed yet.
func (c *carrier) count() int { return c.session.NumStreams() - 1 }

func (c *carrier) accept() {
	for first := !c.link.client; ; first = false {
		y, err := c.session.AcceptStream()
		if err != nil {
			c.end(c.reason(err))
			return
		}
		if first {
			if y.StreamID() != 1 {
				c.end(tunnel.Errorf(tunnel.Internal, "the peer opened stream %d before the control stream", y.StreamID()))
				return
			}
			c.start(func() { c.converse(y) })
			continue
		}
		s := newStream(c, y)
		limit := "the connection carries as many streams as it may"
		// yamux may hold younger ones already, which are not this one's concern.
		if c.register(s) <= c.cfg.MaxStreams {
			select {
			case c.accepted <- s:
				continue
			default:
				limit = "too many streams wait to be accepted"
			}
		}
		s.Abort(tunnel.Errorf(tunnel.LimitExceeded, "%s", limit))
		// The peer must close what was refused, or it is not of our kind.
		if c.count() > c.cfg.MaxStreams+2*backlog {
			c.end(tunnel.Errorf(tunnel.LimitExceeded, "the peer keeps opening streams beyond the limit of %d", c.cfg.MaxStreams))
			return
		}
	}
}

// register makes a stream known to the control stream, which may have heard of
// it already: a peer can answer before yamux has returned from opening it, and
// end what accept has not seen yet. Each side's numbers come here in order. It
// returns how many are known with it.
func (c *carrier) register(s *stream) int {
	id := s.y.StreamID()
	c.frames.unread.open(id)
	c.mu.Lock()
	c.last[id%2] = id
	c.streams[id] = s
	known, early := len(c.streams), c.early[id]
	for old := range c.early { // yamux refused those before, and told nobody
		if old <= id && old%2 == id%2 {
			delete(c.early, old)
		}
	}
	c.mu.Unlock()
	for _, m := range early {
		s.hear(m)
	}
	return known
}

// shrink gives back the buffer of a stream, where it is empty.
func (c *carrier) shrink(id uint32) {
	c.mu.Lock()
	s := c.streams[id]
	c.mu.Unlock()
	if s != nil {
		s.y.Shrink()
	}
}

// converse runs the control stream until the carrier ends.
func (c *carrier) converse(y *yamux.Stream) {
	close(c.ready)
	c.start(func() { c.listen(y) })
	for {
		select {
		case <-c.news:
		case <-c.done:
			return
		}
		c.mu.Lock()
		out, over := c.out, c.over
		c.out, c.over = nil, nil
		c.mu.Unlock()
		if len(out) > 0 {
			if _, err := y.Write(out); err != nil {
				c.end(c.reason(err))
				return
			}
		}
		for _, y := range over {
			y.Shrink() // the peer may never close it
			y.Close()
			c.frames.unread.leave(y.StreamID())
		}
	}
}

func (c *carrier) listen(y *yamux.Stream) {
	for {
		m, err := readMessage(y)
		if err != nil {
			if errors.Is(err, errControl) {
				err = tunnel.Errorf(tunnel.Internal, "the peer broke the protocol: %w", err)
			}
			c.end(c.reason(err))
			return
		}
		if s := c.find(m); s != nil {
			s.hear(m)
		}
	}
}

// find returns the stream that a message is about; nil: it is over, or not
// here yet.
func (c *carrier) find(m message) *stream {
	c.mu.Lock()
	defer c.mu.Unlock()
	if s := c.streams[m.stream]; s != nil {
		return s
	}
	if m.stream <= c.last[m.stream%2] {
		return nil
	}
	if len(c.early) < 2*backlog && len(c.early[m.stream]) < saysAbort {
		c.early[m.stream] = append(c.early[m.stream], m)
	} else if c.err == nil {
		c.err = tunnel.Errorf(tunnel.Internal, "the peer ends streams that nobody has opened")
		close(c.done)
	}
	return nil
}

// say queues a message; forget queues the end of a yamux stream, which follows
// what was said before. Neither waits, and both are short: a stream says three
// things at most.
func (c *carrier) say(m message) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.out = m.append(c.out)
	c.notify()
}

func (c *carrier) forget(s *stream) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.streams, s.y.StreamID())
	c.over = append(c.over, s.y)
	c.notify()
}

func (c *carrier) notify() {
	select {
	case c.news <- struct{}{}:
	default:
	}
}

// watch ends a carrier whose peer gives no sign of life. A late answer on a
// busy path is no reason: any byte that arrives counts.
func (c *carrier) watch() {
	tick := time.NewTicker(c.cfg.KeepAlive)
	defer tick.Stop()
	heard := int64(-1)
	for {
		select {
		case <-tick.C:
		case <-c.done:
			return
		}
		if now := c.frames.heard.Load(); now != heard {
			heard = now
			continue
		}
		full := c.frames.unread.full.Load()
		_, err := c.session.Ping()
		now := c.frames.heard.Load()
		if err == nil || now != heard {
			heard = now
			continue
		}
		if full && c.frames.unread.full.Load() {
			c.end(tunnel.Errorf(tunnel.LimitExceeded, "streams of this connection hold more than may wait to be read, and nobody has read of them for %v", 2*c.cfg.WriteTimeout))
			return
		}
		c.end(tunnel.Errorf(tunnel.CloudUnreachable, "the peer did not answer for %v, so the connection was given up: %w", 2*c.cfg.WriteTimeout, err))
		return
	}
}

var _ tunnel.Carrier = (*carrier)(nil)
