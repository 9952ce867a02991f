package tunnelquic

import (
	"context"
	"errors"
	"os"
	"sync"
	"time"

	"culvert/tunnel"
)

// A candidate speaks on the client's first stream. The server learns of that
// stream with its first byte, and until the server has answered it is the only
// one that the client may open.
//
//	waiting ──first stream──► greeted ──first Write──► answered ──Carrier──► turned
type candidate struct {
	*link
	settled func() // the server counts us no more as unanswered; may be called again

	stopWatch   context.CancelFunc // ends watch
	watching    sync.WaitGroup
	stopDiscard context.CancelFunc // ends discard
	discarding  sync.WaitGroup
	arrived     chan struct{} // closed when greeting is set

	mu       sync.Mutex
	greeting *stream
	answered bool
	turned   bool      // Carrier or Close was called
	early    []*stream // came after the answer and before Carrier
	deadline time.Time
	changed  chan struct{} // closed when deadline changes
}

func newClientCandidate(l *link) (*candidate, error) {
	qs, err := l.conn.OpenStream()
	if err != nil {
		return nil, err
	}
	c := &candidate{link: l, greeting: &stream{qs: qs, link: l}, arrived: make(chan struct{}), changed: make(chan struct{}),
		settled: func() {}, stopWatch: func() {}, stopDiscard: func() {}}
	close(c.arrived)
	return c, nil
}

func newServerCandidate(l *link, settled func()) *candidate {
	c := &candidate{link: l, arrived: make(chan struct{}), changed: make(chan struct{}), settled: settled}
	var watch, discard context.Context
	watch, c.stopWatch = context.WithCancel(context.Background())
	discard, c.stopDiscard = context.WithCancel(context.Background())
	c.watching.Go(func() { c.watch(watch) })
	c.discarding.Go(func() { c.discard(discard) })
	return c
}

// discard drops the datagrams that come before the answer: quic-go would keep
// up to 180 KiB of them.
func (c *candidate) discard(ctx context.Context) {
	for {
		if _, err := c.conn.ReceiveDatagram(ctx); err != nil {
			return
		}
	}
}

// watch accepts streams until ctx ends.
func (c *candidate) watch(ctx context.Context) {
	for {
		qs, err := c.conn.AcceptStream(ctx)
		if err != nil {
			return
		}
		s := &stream{qs: qs, link: c.link}
		c.mu.Lock()
		switch {
		case c.greeting == nil:
			c.greeting = s
			qs.SetDeadline(c.deadline)
			close(c.arrived)
		case c.answered || c.turned:
			c.early = append(c.early, s)
		default:
			c.mu.Unlock()
			c.close(codeEarly, errors.New("a second stream was opened before the answer"))
			return
		}
		c.mu.Unlock()
	}
}

// first waits for the greeting's stream.
func (c *candidate) first() (*stream, error) {
	for {
		c.mu.Lock()
		s, changed, deadline := c.greeting, c.changed, c.deadline
		c.mu.Unlock()
		if s != nil {
			return s, nil
		}
		var late <-chan time.Time
		if !deadline.IsZero() {
			late = time.After(time.Until(deadline))
		}
		select {
		case <-c.arrived:
		case <-changed:
		case <-late:
			return nil, os.ErrDeadlineExceeded
		case <-c.conn.Context().Done():
			return nil, c.reason()
		}
	}
}

func (c *candidate) Read(p []byte) (int, error) {
	s, err := c.first()
	if err != nil {
		return 0, err
	}
	return s.Read(p)
}

func (c *candidate) Write(p []byte) (int, error) {
	s, err := c.first()
	if err != nil {
		return 0, err
	}
	c.answer()
	return s.Write(p)
}

// answer lifts what holds for a peer that has not been answered. It comes
// before the answer leaves: what the peer sends after it must not be lost.
func (c *candidate) answer() {
	c.mu.Lock()
	c.answered = true
	c.mu.Unlock()
	c.settled()
	c.stopDiscard()
	c.discarding.Wait()
}

func (c *candidate) SetDeadline(t time.Time) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.deadline = t
	close(c.changed)
	c.changed = make(chan struct{})
	if c.greeting != nil {
		return c.greeting.SetDeadline(t)
	}
	return nil
}

// turn takes the one right to become something.
func (c *candidate) turn() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.turned {
		return false
	}
	c.turned = true
	return true
}

func (c *candidate) Carrier() (tunnel.Carrier, error) {
	if !c.turn() {
		return nil, errors.New("the candidate has been used or closed")
	}
	c.answer()
	c.stopWatch()
	c.watching.Wait()
	if err := c.reason(); err != nil {
		return nil, err
	}
	if c.greeting != nil {
		c.greeting.Close()
	}
	return newCarrier(c.link, c.early), nil
}

func (c *candidate) Lane() (tunnel.Lane, error) {
	return nil, tunnel.Errorf(tunnel.Unsupported, "a QUIC connection can not be a lane; its datagrams go in DATAGRAM frames of a carrier")
}

func (c *candidate) Close() error {
	if !c.turn() {
		return nil
	}
	c.close(codeDone, nil)
	c.answer()
	c.stopWatch()
	c.watching.Wait()
	return nil
}
