package tunneltest

import (
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"time"
)

// errAborted is what the peer of an aborted direction sees.
var errAborted = errors.New("the peer aborted the stream")

// A half is one direction of a stream: a bounded buffer between a writer and
// a reader, either of which may end it in its own way.
type half struct {
	mu     sync.Mutex
	change *sync.Cond // anything below has changed
	buf    []byte
	size   int // bytes that buf may hold

	ended    bool  // the writer has said that no more follows (FIN)
	readErr  error // what Read returns instead of bytes
	writeErr error // what Write returns

	readBy, writeBy deadline
}

func newHalf(size int) *half {
	h := &half{size: size}
	h.change = sync.NewCond(&h.mu)
	return h
}

// A deadline is guarded by its half's mu.
type deadline struct {
	timer  *time.Timer
	passed bool
}

func (h *half) setDeadline(d *deadline, at time.Time) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if d.timer != nil {
		d.timer.Stop()
		d.timer = nil
	}
	d.passed = false
	if at.IsZero() {
		return
	}
	if wait := time.Until(at); wait <= 0 {
		d.passed = true
	} else {
		var timer *time.Timer
		timer = time.AfterFunc(wait, func() {
			h.mu.Lock()
			defer h.mu.Unlock()
			if d.timer == timer { // not replaced since it fired
				d.passed = true
				h.change.Broadcast()
			}
		})
		d.timer = timer
	}
	h.change.Broadcast()
}

func (h *half) read(p []byte) (int, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for {
		switch {
		case h.readErr != nil:
			return 0, h.readErr
		case h.readBy.passed:
			return 0, os.ErrDeadlineExceeded
		case len(h.buf) > 0:
			n := copy(p, h.buf)
			h.buf = h.buf[:copy(h.buf, h.buf[n:])]
			h.change.Broadcast()
			return n, nil
		case h.ended:
			return 0, io.EOF
		case len(p) == 0:
			return 0, nil
		}
		h.change.Wait()
	}
}

func (h *half) write(p []byte) (n int, err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for {
		switch room := h.size - len(h.buf); {
		case h.writeErr != nil:
			return n, h.writeErr
		case h.ended:
			return n, net.ErrClosed
		case len(p) == 0:
			return n, nil
		case h.writeBy.passed:
			return n, os.ErrDeadlineExceeded
		case room > 0:
			m := min(room, len(p))
			h.buf = append(h.buf, p[:m]...)
			n, p = n+m, p[m:]
			h.change.Broadcast()
			continue
		}
		h.change.Wait()
	}
}

// end is the writer's FIN: what is in the buffer can still be read.
func (h *half) end() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.ended = true
	h.change.Broadcast()
}

// stop ends the direction at once and drops what is in it. The first reason
// given to either side stays.
func (h *half) stop(reader, writer error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.readErr == nil {
		h.readErr = reader
	}
	if h.writeErr == nil {
		h.writeErr = writer
	}
	h.buf = nil
	for _, d := range []*deadline{&h.readBy, &h.writeBy} {
		if d.timer != nil {
			d.timer.Stop()
			d.timer = nil
		}
	}
	h.change.Broadcast()
}

// A stream is one end of two halves.
type stream struct {
	in, out       *half
	local, remote net.Addr
	closed        func() // tells the connection that this end is done; at least once
}

func (s *stream) Read(p []byte) (int, error)  { return s.in.read(p) }
func (s *stream) Write(p []byte) (int, error) { return s.out.write(p) }
func (s *stream) LocalAddr() net.Addr         { return s.local }
func (s *stream) RemoteAddr() net.Addr        { return s.remote }

func (s *stream) CloseWrite() error {
	s.out.end()
	return nil
}

func (s *stream) Close() error {
	s.out.end()
	s.in.stop(net.ErrClosed, errAborted)
	s.closed()
	return nil
}

func (s *stream) Abort(error) {
	s.out.stop(errAborted, net.ErrClosed)
	s.in.stop(net.ErrClosed, errAborted)
	s.closed()
}

func (s *stream) SetDeadline(t time.Time) error {
	s.SetReadDeadline(t)
	return s.SetWriteDeadline(t)
}

func (s *stream) SetReadDeadline(t time.Time) error {
	s.in.setDeadline(&s.in.readBy, t)
	return nil
}

func (s *stream) SetWriteDeadline(t time.Time) error {
	s.out.setDeadline(&s.out.writeBy, t)
	return nil
}
