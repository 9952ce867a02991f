package cloudproxy

import (
	"errors"
	"net/netip"
	"sync"
	"time"

	"golang.org/x/time/rate"

	"culvert/tunnel"
	"culvert/tunnel/crowd"
)

const (
	// strikeRate and strikeBurst are how many refusals a source may have: a whole
	// hospital may stand behind one address, so only failures count, and what a
	// wrong configuration causes there is below this.
	strikeRate, strikeBurst = 1, 100
	// floodStrikes is what a session costs that was cut for a flood.
	floodStrikes = 25
	// maxStrikers bounds the sources that are remembered.
	maxStrikers = 4096
)

// strikes remembers which sources were refused lately, to slow down who tries
// tokens. What has a session, and what joins one, is never kept out by it.
type strikes struct {
	mu     sync.Mutex // guards the fields below
	by     map[netip.Prefix]*rate.Limiter
	tidied time.Time
}

// add counts n failures of a source. What comes by loopback came by a reverse
// proxy on this host, and may be anybody.
func (s *strikes) add(from netip.Addr, n int) {
	if n == 0 || from.Unmap().IsLoopback() {
		return
	}
	source := crowd.SourceOf(from)
	s.mu.Lock()
	defer s.mu.Unlock()
	l := s.by[source]
	if l == nil {
		if len(s.by) >= maxStrikers {
			s.tidyLocked()
		}
		if s.by == nil {
			s.by = map[netip.Prefix]*rate.Limiter{}
		}
		l = rate.NewLimiter(strikeRate, strikeBurst)
		s.by[source] = l
	}
	for range n {
		l.Allow()
	}
}

// tidyLocked makes room: those that have recovered go, or any one. It looks at all
// once a second at most, so that many sources cost no more than few.
func (s *strikes) tidyLocked() {
	if now := time.Now(); now.Sub(s.tidied) >= time.Second {
		s.tidied = now
		for source, l := range s.by {
			if l.Tokens() >= strikeBurst {
				delete(s.by, source)
			}
		}
	}
	for source := range s.by {
		if len(s.by) < maxStrikers {
			break
		}
		delete(s.by, source)
	}
}

// out says why a source is not heard at the moment; nil: it is.
func (s *strikes) out(from netip.Addr) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if l := s.by[crowd.SourceOf(from)]; l == nil || l.Tokens() >= 1 {
		return nil
	}
	return tunnel.Errorf(tunnel.LimitExceeded, "too many sidecars at this address were refused lately; Culvert tries again by itself, and its log says which have a wrong token")
}

// strikesFor is how many failures an error is.
func strikesFor(err error) int {
	var said *tunnel.Error
	if !errors.As(err, &said) { // the peer has gone before it had said all, as many do that come at once
		return 0
	}
	switch said.Code {
	case tunnel.TokenRejected, tunnel.NotPermitted, tunnel.Internal:
		return 1
	}
	return 0 // an expired token is genuine, and a full quota or a lost session nobody's fault
}
