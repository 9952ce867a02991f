package session

import (
	"sync"
	"sync/atomic"
	"time"

	"culvert/tunnel"
	"culvert/tunnel/wire"
)

// succeed adds a transport that takes the place of the others of its kind once
// a record has come by it: before that the peer may not be listening on it yet,
// and the older may still serve. The returned function takes it out.
func (p *plane) succeed(kind wire.Way, t tunnel.Way) (remove func()) {
	p.mu.RLock()
	y := p.ways[kind]
	p.mu.RUnlock()
	if y == nil {
		p.addWay(kind, t)
		return func() { p.removeWay(kind, t) }
	}
	s := &successor{Way: t}
	var once sync.Once
	t.Start(func(record []byte) {
		once.Do(func() { p.replace(kind, s) })
		if s.recv != nil { // else it was over before
			s.recv(record)
		}
	}, func() {
		if writable := s.writable.Load(); writable != nil {
			(*writable)()
		}
	})
	return func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.over = true
		p.removeWay(kind, s)
	}
}

// replace puts s where the others of its kind are, unless it is over already.
func (p *plane) replace(kind wire.Way, s *successor) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.over {
		return
	}
	p.mu.RLock()
	y := p.ways[kind]
	p.mu.RUnlock()
	var older []tunnel.Way
	if y != nil {
		older = y.transports()
	}
	p.addWay(kind, s)
	for _, t := range older {
		p.removeWay(kind, t)
	}
}

// successor is a way that has been started before it is added to a plane.
type successor struct {
	tunnel.Way
	recv     func(p []byte) // set by Start, on the goroutine that then calls it
	writable atomic.Pointer[func()]

	mu   sync.Mutex // guards over; spans what adds and removes
	over bool
}

func (s *successor) Start(recv func(p []byte), writable func()) {
	s.recv = recv
	s.writable.Store(&writable)
}

// Tick passes time on to a way that needs it.
func (s *successor) Tick(now time.Time) {
	if t, ok := s.Way.(interface{ Tick(time.Time) }); ok {
		t.Tick(now)
	}
}
