package tunneltls

import (
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"syscall"
	"time"

	"github.com/hashicorp/yamux"

	"culvert/tunnel"
)

// past is a deadline that makes yamux return instead of waiting.
var past = time.Unix(1, 0)

// stream implements tunnel.Stream on a yamux stream.
//
// It is over when both sides have said how they end, and everything has been
// read or will not be. Only then is the yamux stream closed, by both sides: so
// yamux never sees a half-closed stream, and none that is closed before it was
// acknowledged (its account of those leaks).
//
// yamux waits in two places. For window: there writes never wait with its
// deadline, which stays in the past; see awaitWindow. For TCP, at most
// WriteTimeout, where neither deadline nor Close can reach a frame that is on
// its way; the carrier's slots keep the number of those small.
type stream struct {
	c *carrier
	y *yamux.Stream

	writeTurn chan struct{} // one Write at a time
	readTurn  sync.Mutex    // one Read at a time
	writeBy   deadline
	noWrites  chan struct{} // closed: no Write begins or goes on
	told      chan struct{} // closed: the peer has said how it ends

	mu       sync.Mutex
	finished bool  // CloseWrite was called
	closed   bool  // Close was called
	broken   error // aborted, by either side; or yamux has dropped the stream
	code     tunnel.Code
	silent   bool // the peer takes no more bytes
	writing  bool // a Write is going on
	waiting  bool // it waits for window
	stopped  bool // noWrites is closed
	over     bool // the yamux stream is being closed
	said     byte // the strongest end that has been told to the peer
	heard    byte // the strongest that the peer has told
	sent     uint64
	read     uint64
	total    uint64 // how many bytes the peer has sent in all; valid once heard
	readBy   time.Time
	yamuxBy  time.Time // the read deadline that yamux has
}

func newStream(c *carrier, y *yamux.Stream) *stream {
	s := &stream{
		c: c, y: y,
		writeTurn: make(chan struct{}, 1),
		noWrites:  make(chan struct{}),
		told:      make(chan struct{}),
	}
	s.writeBy.init()
	y.SetWriteDeadline(past)
	return s
}

func (s *stream) LocalAddr() net.Addr  { return s.c.link.LocalAddr() }
func (s *stream) RemoteAddr() net.Addr { return s.c.link.RemoteAddr() }

func (s *stream) SetDeadline(t time.Time) error {
	s.SetReadDeadline(t)
	return s.SetWriteDeadline(t)
}

func (s *stream) SetReadDeadline(t time.Time) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.readBy = t
	s.yamuxReadBy(t)
	return nil
}

func (s *stream) SetWriteDeadline(t time.Time) error {
	s.writeBy.set(t)
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.waiting {
		s.y.SetWriteDeadline(t)
	}
	return nil
}

// yamuxReadBy is called with mu held. yamux wakes its reader at each change.
func (s *stream) yamuxReadBy(t time.Time) {
	if s.yamuxBy != t {
		s.yamuxBy = t
		s.y.SetReadDeadline(t)
	}
}

func (s *stream) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	s.readTurn.Lock()
	defer s.readTurn.Unlock()
	for {
		limit, err := s.readable(len(p))
		if err != nil {
			return 0, err
		}
		n, err := s.y.Read(p[:limit])
		if errors.Is(err, yamux.ErrConnectionWriteTimeout) {
			s.c.end(s.c.reason(err))
		}
		if n > 0 {
			s.c.frames.unread.took(s.y.StreamID(), n)
			return s.took(n), nil
		}
		switch {
		case errors.Is(err, yamux.ErrTimeout):
			// Our own, or somebody woke us: readable knows.
			if s.c.isDone() {
				return 0, s.c.Err()
			}
		case errors.Is(err, io.EOF):
			if err := s.explain(); err != nil {
				return 0, err
			}
		case errors.Is(err, yamux.ErrConnectionReset):
			s.lost()
		case err != nil:
			s.c.end(s.c.reason(err))
			return 0, s.c.Err()
		}
	}
}

// readable returns how many bytes may be read, at most n, or why none.
func (s *stream) readable(n int) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.broken != nil:
		return 0, s.broken
	case s.closed:
		return 0, net.ErrClosed
	case s.heard != saysNothing && s.read >= s.total:
		return 0, io.EOF
	case !s.readBy.IsZero() && !time.Now().Before(s.readBy):
		return 0, os.ErrDeadlineExceeded
	case s.c.isDone():
		s.yamuxReadBy(past) // what is here can be read, nothing more comes
	default:
		s.yamuxReadBy(s.readBy)
	}
	if s.heard != saysNothing {
		n = int(min(uint64(n), s.total-s.read))
	}
	return n, nil
}

// took counts n bytes that were read, and returns how many of them are the
// stream's: not those behind the end that the peer has announced.
func (s *stream) took(n int) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.heard != saysNothing {
		n = int(min(uint64(n), s.total-s.read))
	}
	s.read += uint64(n)
	s.settle()
	return n
}

// explain is called when yamux has ended the stream. A peer says how it ends
// before it lets yamux close, but another goroutine hears it.
func (s *stream) explain() error {
	select {
	case <-s.told:
	case <-s.c.done:
		return s.c.Err()
	case <-time.After(closeTimeout):
	}
	s.mu.Lock()
	missing := s.heard == saysNothing || s.read < s.total
	s.mu.Unlock()
	if missing {
		s.lost()
	}
	return nil
}

// lost marks a stream that yamux has dropped.
func (s *stream) lost() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.broken == nil {
		s.broken = tunnel.Errorf(tunnel.Internal, "the peer dropped the stream: %w", syscall.ECONNRESET)
	}
	if s.heard == saysNothing {
		s.heard = saysAbort
		close(s.told)
	}
	s.wake()
	s.settle()
}

func (s *stream) Write(p []byte) (n int, err error) {
	if len(p) == 0 {
		return 0, nil
	}
	select {
	case <-s.writeBy.passed():
		return 0, os.ErrDeadlineExceeded
	default:
	}
	select {
	case s.writeTurn <- struct{}{}:
	case <-s.writeBy.passed():
		return 0, os.ErrDeadlineExceeded
	case <-s.noWrites:
		return 0, s.whyNot()
	}
	defer func() { <-s.writeTurn }()

	s.mu.Lock()
	if s.stopped {
		s.mu.Unlock()
		return 0, s.whyNot()
	}
	s.writing = true
	s.mu.Unlock()
	defer func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.writing = false
		s.sent += uint64(n)
		s.settle()
	}()

	for n < len(p) {
		m, err := s.writeFrame(p[n:min(len(p), n+int(s.c.frame.Load()))])
		n += m
		if errors.Is(err, yamux.ErrTimeout) { // the window is used up
			m, err = s.awaitWindow(p[n:])
			n += m
		}
		if err != nil {
			return n, err
		}
	}
	return n, nil
}

// writeFrame writes what the window allows, at once. Slots bound how much is on
// its way into TCP, so that yamux's time limit for a frame means that TCP
// stands still, not that many streams share a slow one.
func (s *stream) writeFrame(p []byte) (int, error) {
	select {
	case <-s.noWrites:
		return 0, s.whyNot()
	case <-s.writeBy.passed():
		return 0, os.ErrDeadlineExceeded
	default:
	}
	select {
	case s.c.slots <- struct{}{}:
	case <-s.noWrites:
		return 0, s.whyNot()
	case <-s.writeBy.passed():
		return 0, os.ErrDeadlineExceeded
	case <-s.c.done:
		return 0, s.c.Err()
	}
	begin := time.Now()
	n, err := s.y.Write(p)
	<-s.c.slots
	switch took := time.Since(begin); {
	case took > slowFrame:
		s.c.frame.Store(smallFrame)
	case took < quickFrame && n >= smallFrame:
		s.c.frame.Store(largeFrame)
	}
	if err == nil || errors.Is(err, yamux.ErrTimeout) {
		return n, err
	}
	return n, s.failed(err)
}

// awaitWindow writes one byte of p as soon as there is window for it: yamux has
// no other way to wait. It takes no slot while it waits.
func (s *stream) awaitWindow(p []byte) (int, error) {
	s.mu.Lock()
	if s.stopped {
		s.mu.Unlock()
		return 0, s.whyNot()
	}
	if s.c.isDone() {
		s.mu.Unlock()
		return 0, s.c.Err()
	}
	s.waiting = true
	s.y.SetWriteDeadline(s.writeBy.time())
	s.mu.Unlock()

	n, err := s.y.Write(p[:min(len(p), 1)])

	s.mu.Lock()
	s.waiting = false
	s.y.SetWriteDeadline(past)
	stopped := s.stopped
	s.mu.Unlock()
	switch {
	case err == nil:
		return n, nil
	case !errors.Is(err, yamux.ErrTimeout):
		return n, s.failed(err)
	case stopped:
		return n, s.whyNot()
	case s.c.isDone():
		return n, s.c.Err()
	}
	select {
	case <-s.writeBy.passed():
		return n, os.ErrDeadlineExceeded
	default:
		return n, nil // the deadline has been moved meanwhile
	}
}

// failed turns yamux's error on writing into the stream's or the carrier's.
func (s *stream) failed(err error) error {
	if errors.Is(err, yamux.ErrConnectionReset) {
		s.lost()
	}
	s.mu.Lock()
	stopped := s.stopped
	s.mu.Unlock()
	if stopped {
		return s.whyNot()
	}
	// ErrConnectionWriteTimeout leaves it open whether the frame will still be
	// sent: bytes would be missing or repeated, so the carrier must end.
	s.c.end(s.c.reason(err))
	return s.c.Err()
}

// whyNot says why nothing can be written.
func (s *stream) whyNot() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.broken != nil:
		return s.broken
	case s.closed, s.finished:
		return net.ErrClosed
	case s.silent:
		return tunnel.Errorf(tunnel.Internal, "the peer has closed the stream: %w", syscall.EPIPE)
	}
	return s.c.Err()
}

func (s *stream) CloseWrite() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.broken != nil {
		return s.broken
	}
	s.finished = true
	s.stopWrites()
	s.settle()
	return nil
}

func (s *stream) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil
	}
	s.closed = true
	s.wake()
	s.settle()
	return nil
}

func (s *stream) Abort(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.broken != nil || s.over {
		return
	}
	if err == nil {
		err = net.ErrClosed
	}
	s.broken, s.code = tunnel.Errorf(tunnel.CodeOf(err), "the stream was aborted: %w", err), tunnel.CodeOf(err)
	s.wake()
	s.settle()
}

// hear takes what the peer says of its end.
func (s *stream) hear(m message) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if m.what <= s.heard {
		return
	}
	if s.heard == saysNothing {
		close(s.told)
		s.total = m.total
	}
	s.heard = m.what
	if m.what >= saysClose {
		s.silent = true
		s.stopWrites()
	}
	if m.what == saysAbort && s.broken == nil && !s.over {
		code := m.code
		if code == "" {
			code = tunnel.Internal
		}
		s.broken = tunnel.Errorf(code, "the other end aborted the stream: %w", syscall.ECONNRESET)
	}
	s.yamuxReadBy(past)
	s.settle()
}

// wake ends a Read and a Write that wait. Called with mu held.
func (s *stream) wake() {
	s.yamuxReadBy(past)
	s.stopWrites()
}

func (s *stream) stopWrites() {
	if !s.stopped {
		s.stopped = true
		close(s.noWrites)
		s.y.SetWriteDeadline(past)
	}
}

// carrierDone ends whatever waits inside yamux, which would otherwise spin
// while it shuts down.
func (s *stream) carrierDone() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.wake()
}

// settle tells the peer what it does not know yet and closes the yamux stream
// when all is said. Called with mu held, after each change.
func (s *stream) settle() {
	if s.over {
		return
	}
	end := byte(saysNothing)
	switch {
	case s.broken != nil:
		end = saysAbort
	case s.writing: // what it writes still counts
	case s.closed:
		end = saysClose
	case s.finished, s.silent:
		end = saysFinish
	}
	if end > s.said {
		s.said = end
		s.c.say(message{what: end, stream: s.y.StreamID(), total: s.sent, code: s.code})
	}
	nothingToRead := s.broken != nil || s.closed || s.read >= s.total
	if s.said != saysNothing && s.heard != saysNothing && nothingToRead && !s.writing {
		s.over = true
		s.c.forget(s)
	}
}

var _ tunnel.Stream = (*stream)(nil)
