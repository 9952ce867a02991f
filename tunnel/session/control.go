package session

import (
	"sync"

	"culvert/tunnel"
	"culvert/tunnel/wire"
)

// maxControlQueue bounds the control messages that wait for a peer that does
// not read. A peer this far behind is cut.
const maxControlQueue = 1 << 16

// control is one end of the control stream. Sending never waits: messages are
// queued and written by one goroutine.
type control struct {
	mu     sync.Mutex // guards queue, over, stream
	queue  []wire.Message
	over   bool          // the queue has overflowed, or the stream has ended
	stream tunnel.Stream // nil before run
	wake   chan struct{} // capacity 1
}

func newControl() *control { return &control{wake: make(chan struct{}, 1)} }

// send queues a message. After the stream's end it does nothing.
func (c *control) send(m wire.Message) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.over {
		return
	}
	if len(c.queue) == maxControlQueue {
		c.over, c.queue = true, nil
		if c.stream != nil {
			// The writer is the one that is stuck: end the stream under it.
			go c.stream.Abort(tunnel.Errorf(tunnel.LimitExceeded, "the peer does not read its control stream"))
		}
	} else {
		c.queue = append(c.queue, m)
	}
	select {
	case c.wake <- struct{}{}:
	default:
	}
}

func (c *control) take() (queue []wire.Message, over bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	queue, c.queue = c.queue, nil
	return queue, c.over
}

// run serves the stream until it fails, done is closed, or handle returns an
// error; it closes the stream. handle runs on this goroutine.
func (c *control) run(s tunnel.Stream, peer wire.Version, done <-chan struct{}, handle func(wire.Message) error) error {
	c.mu.Lock()
	c.stream = s
	c.mu.Unlock()
	stop := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		defer s.Close() // ends the blocked Read below
		for {
			queue, over := c.take()
			for _, m := range queue {
				if wire.Write(s, m) != nil {
					return
				}
			}
			if over {
				return
			}
			select {
			case <-c.wake:
			case <-done:
				return
			case <-stop:
				return
			}
		}
	})
	var err error
	for err == nil {
		var m wire.Message
		if m, err = wire.Read(s, peer); err == nil {
			err = handle(m)
		}
	}
	close(stop)
	c.mu.Lock()
	c.over, c.queue = true, nil
	c.mu.Unlock()
	s.Close()
	wg.Wait()
	return err
}
