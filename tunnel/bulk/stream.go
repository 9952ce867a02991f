package bulk

import (
	"os"
	"sync"
	"time"

	"culvert/tunnel"
)

// A stream is a wrapped stream. One Write at a time is under way, so that the
// pieces of one are not mixed with another's.
type stream struct {
	tunnel.Stream
	p    *Pacer
	turn turn // guarded by p.mu

	mu      sync.Mutex // guards what is below
	meter   meter
	writing bool
	ended   bool          // no Write has to wait any more: the stream knows why it fails
	by      time.Time     // the write deadline
	changed chan struct{} // closed at the next change of the three above; nil: nobody waits
	known   bool          // the pacer has it among its bulk
}

func (s *stream) Read(b []byte) (int, error) {
	n, err := s.Stream.Read(b)
	if n > 0 {
		now := s.p.now()
		s.mu.Lock()
		s.meter.got(b[:n], now)
		turned := s.meter.bulk != s.known
		s.mu.Unlock()
		if turned {
			s.p.settle(s)
		}
	}
	return n, err
}

func (s *stream) Write(b []byte) (n int, err error) {
	bulk, err := s.enter()
	if err != nil {
		return 0, err
	}
	defer s.leave()
	for bulk && n < len(b) && s.p.live.Load() {
		size := s.p.share(s, len(b)-n)
		if size == 0 {
			if size, err = s.await(len(b) - n); err != nil {
				return n, err
			}
		}
		m, err := s.Stream.Write(b[n : n+size])
		bulk = s.count(b[n : n+m])
		n += m
		if err != nil {
			return n, err
		}
	}
	if n < len(b) || n == 0 {
		m, err := s.Stream.Write(b[n:])
		s.count(b[n : n+m])
		return n + m, err
	}
	return n, nil
}

// enter waits until no other Write is under way, and reports whether the
// stream counts as bulk.
func (s *stream) enter() (bulk bool, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for s.writing {
		by, changed := s.by, s.watch()
		s.mu.Unlock()
		sleep(by, changed, nil)
		s.mu.Lock()
		if s.passed() {
			return false, os.ErrDeadlineExceeded
		}
	}
	s.writing = true
	return s.meter.bulk && !s.ended, nil
}

func (s *stream) leave() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.writing = false
	s.change()
}

// count notes what was written and reports whether the stream counts as bulk.
func (s *stream) count(b []byte) (bulk bool) {
	now := s.p.now()
	s.mu.Lock()
	s.meter.wrote(b, now)
	bulk = s.meter.bulk
	turned := bulk != s.known
	s.mu.Unlock()
	if turned {
		s.p.settle(s)
	}
	return bulk
}

// await waits for the stream's turn. It returns how much of n bytes may be
// written now: all, when the stream has ended, so that the Write says why.
func (s *stream) await(n int) (int, error) {
	s.mu.Lock()
	s.meter.wait(s.p.now())
	defer func() {
		s.meter.goOn(s.p.now())
		s.mu.Unlock()
	}()
	for {
		by, changed := s.by, s.watch()
		ended, passed := s.ended, s.passed()
		s.mu.Unlock()
		let := false
		if ended || passed {
			s.p.giveUp(s)
		} else {
			let = sleep(by, changed, s.turn.ready)
		}
		s.mu.Lock()
		switch {
		case let:
			return s.turn.size, nil
		case ended:
			return n, nil
		case passed:
			return 0, os.ErrDeadlineExceeded
		}
	}
}

// sleep waits for whichever comes first, and reports whether it was ready.
func sleep(by time.Time, changed, ready <-chan struct{}) bool {
	var at <-chan time.Time
	if !by.IsZero() {
		t := time.NewTimer(time.Until(by))
		defer t.Stop()
		at = t.C
	}
	select {
	case <-ready:
		return true
	case <-changed:
	case <-at:
	}
	return false
}

// passed, watch and change are called with mu held.

func (s *stream) passed() bool { return !s.by.IsZero() && !time.Now().Before(s.by) }

func (s *stream) watch() <-chan struct{} {
	if s.changed == nil {
		s.changed = make(chan struct{})
	}
	return s.changed
}

func (s *stream) change() {
	if s.changed != nil {
		close(s.changed)
		s.changed = nil
	}
}

func (s *stream) SetDeadline(t time.Time) error {
	err := s.Stream.SetDeadline(t)
	s.setBy(t)
	return err
}

func (s *stream) SetWriteDeadline(t time.Time) error {
	err := s.Stream.SetWriteDeadline(t)
	s.setBy(t)
	return err
}

func (s *stream) setBy(t time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.by = t
	s.change()
}

func (s *stream) CloseWrite() error {
	err := s.Stream.CloseWrite()
	s.end()
	return err
}

func (s *stream) Close() error {
	err := s.Stream.Close()
	s.end()
	return err
}

func (s *stream) Abort(err error) {
	s.Stream.Abort(err)
	s.end()
}

// end ends a wait for the stream's share. The stream below has ended its
// writing before, so the Write that waited learns there why.
func (s *stream) end() {
	s.mu.Lock()
	s.ended = true
	known := s.known
	s.change()
	s.mu.Unlock()
	if known {
		s.p.settle(s)
	}
}

var _ tunnel.Stream = (*stream)(nil)
