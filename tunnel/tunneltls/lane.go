package tunneltls

import (
	"maps"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"culvert/tunnel"
	"culvert/tunnel/age"
)

const (
	// maxPending is how many bytes of records wait for the writer. As many may
	// be on their way into TCP, and the kernel holds unsent bytes more: that is
	// all that can grow old on this side of a lane. One datagram that is larger
	// passes alone.
	maxPending = 8 << 10
	// readAtOnce is a lane's read buffer: one TLS record. It grows while a
	// longer record comes in.
	readAtOnce = 1 << 14
	// longSilence is well within what a send time can tell (age.Range), and longer
	// than a lane in use is silent.
	longSilence = time.Second
)

// origin is that of the clock of all lanes, so that a datagram that goes on a
// second one can keep its send time.
var origin = time.Now()

// lane implements tunnel.Lane on a connection that carries nothing else.
//
// Send puts a record into pending; the writer takes all of it at once, so that
// what gathers while TCP is busy leaves as one TLS record.
type lane struct {
	link   *link
	maxAge time.Duration
	done   chan struct{}
	news   chan struct{} // pending holds something
	wg     sync.WaitGroup
	late   atomic.Uint64

	kernel func() (progress, bool) // false: it tells nothing
	keeps  bool                    // it told something at the start, so kept is of use

	mu       sync.Mutex
	pending  []byte
	blocked  bool // a Send was refused: writable is owed
	full     bool // it was the window that refused: it is owed when that has room
	writable func()
	err      error // set before done is closed
	abort    bool  // so is this: there is nobody to say farewell to
	pulse    pulse
	window   window
	written  uint64 // bytes that TCP was given
	writing  int    // bytes that the writer holds
	kept     kept
	watch    *time.Timer // made by the first Send
	watching bool        // it runs
	fresh    bool        // something was sent since the watch last looked
}

func newLane(l *link, cfg *Config) *lane {
	keepShort(l.raw, unsent, cfg.WriteTimeout)
	w := &lane{
		link: l, maxAge: cfg.MaxAge,
		done:   make(chan struct{}),
		news:   make(chan struct{}, 1),
		kernel: func() (progress, bool) { return ask(l.raw) },
	}
	_, w.keeps = w.kernel()
	w.wg.Go(func() {
		<-w.done
		if w.abort {
			w.link.reset()
			return
		}
		w.link.shut()
	})
	return w
}

func (w *lane) Start(recv func([]byte), writable func()) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.err != nil {
		return
	}
	w.writable = writable
	w.wg.Go(func() { w.end(w.receive(recv)) })
	w.wg.Go(func() { w.end(w.transmit()) })
}

func (w *lane) Send(p []byte) error { return w.send(p, time.Now(), false) }

// Resend is Send for a copy of what another lane of this process took at since:
// the far end takes its age from then.
func (w *lane) Resend(p []byte, since time.Time) error { return w.send(p, since, true) }

func (w *lane) send(p []byte, since time.Time, again bool) error {
	if len(p) > maxDatagram {
		return tunnel.ErrTooLarge
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	switch {
	case w.err != nil:
		return w.err
	case len(w.pending) > 0 && len(w.pending)+recordHeader+len(p) > maxPending:
		w.blocked = true
		return tunnel.ErrBlocked
	}
	if w.fullLocked(recordHeader + len(p)) {
		w.freshLocked(time.Now())
		switch {
		case w.err != nil:
			return w.err
		case w.fullLocked(recordHeader + len(p)):
			w.watchLocked()
			if !w.full {
				w.blocked, w.full = true, true
				w.watch.Reset(sampled)
			}
			return tunnel.ErrBlocked
		}
	}
	w.watchLocked()
	if w.keeps && !again {
		w.kept.push(p, since)
	}
	w.pending = appendRecord(w.pending, uint16(since.Sub(origin).Milliseconds()), p)
	select {
	case w.news <- struct{}{}:
	default:
	}
	return nil
}

// transmit writes until the lane ends. It returns when TCP has taken nothing
// for WriteTimeout: such a lane is of no use any more.
func (w *lane) transmit() error {
	out := make([]byte, 0, maxPending)
	for {
		select {
		case <-w.news:
		case <-w.done:
			return nil
		}
		w.mu.Lock()
		w.pending, out = out[:0], w.pending
		w.writing = len(out)
		owed, last := w.blocked && !w.full, w.kept.last
		w.blocked = w.full
		w.mu.Unlock()
		if owed {
			w.writable() // there is room again, before and while TCP takes this
		}
		w.link.gather.expect()
		if _, err := w.link.Write(out); err != nil {
			return err
		}
		total := w.link.gather.total()
		w.mu.Lock()
		w.kept.wrote(last, total)
		w.written, w.writing = total, 0
		w.mu.Unlock()
		if cap(out) > 2*maxPending {
			out = make([]byte, 0, maxPending)
		}
	}
}

// receive reads until the lane ends.
func (w *lane) receive(recv func([]byte)) error {
	var ages age.Ages
	buf := make([]byte, readAtOnce)
	// Where nothing was read for a while, or nothing yet, the send times alone do
	// not tell what is late: this process may have stood still.
	read := time.Time{}
	for have := 0; ; {
		n, err := w.link.Read(buf[have:])
		if err != nil {
			return err
		}
		have += n
		now := time.Since(origin)
		old := time.Since(read) > longSilence && waited(w.link.raw) > w.maxAge
		if !old {
			read = time.Now()
		}
		at := 0
		for {
			sent, datagram, size, err := nextRecord(buf[at:have])
			if err != nil {
				return tunnel.Errorf(tunnel.Internal, "the peer broke the protocol: %w", err)
			}
			if size == 0 {
				break
			}
			at += size
			if old || ages.Of(now, sent) > w.maxAge {
				w.late.Add(1)
				continue
			}
			recv(datagram)
		}
		have = copy(buf, buf[at:have])
		if have == len(buf) { // a long record: grow with what has come, not with what it declares
			buf = append(make([]byte, 0, min(2*len(buf), maxRecord)), buf...)
			buf = buf[:cap(buf)]
		}
	}
}

func (w *lane) Max() int { return maxDatagram }

func (w *lane) Name() string { return "lane" }

// Reasons returns the words of Lost.
func Reasons() []string { return slices.Collect(maps.Keys(new(lane).Lost())) }

// Lost counts "late": datagrams that were dropped on arrival because they were
// older than Config.MaxAge.
func (w *lane) Lost() map[string]uint64 {
	return map[string]uint64{"late": w.late.Load()}
}

func (w *lane) Done() <-chan struct{} { return w.done }

func (w *lane) Err() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.err
}

// Close ends the lane; it returns within a second. It must not be called by
// recv or writable.
func (w *lane) Close(err error) error {
	if err == nil {
		err = net.ErrClosed
	}
	w.stop(err)
	w.wg.Wait()
	return nil
}

func (w *lane) end(err error) {
	if err != nil {
		w.stop(ended(err))
	}
}

func (w *lane) stop(err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.stopLocked(err)
}

func (w *lane) stopLocked(err error) {
	if w.err != nil {
		return
	}
	w.err = err
	if w.watch != nil {
		w.watch.Stop()
	}
	close(w.done)
}

var _ tunnel.Lane = (*lane)(nil)
