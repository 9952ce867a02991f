package media

import (
	"sync/atomic"
	"time"

	"culvert/tunnel"
	"culvert/tunnel/wire"
)

// Only the far end roams. A packet with a counter above all others from another
// path makes that the candidate. Anybody can copy a packet and send it from
// elsewhere, so the candidate gets a probe that has to come back, three times
// what came from there at most, and the old path gets everything as before.
// Who carries every packet both ways, and faster than the peer's own path does,
// is followed nevertheless, until the first packet that overtakes them (RFC 9000 §9.3.3).
//
//	settled ──highest packet from elsewhere──► candidate ──answer from there──► settled there
//	   ▲                                        │      ▲
//	   └──────────────── 3 s ───────────────────┘      └─ the highest from a third path, when
//	                                                      this one has sent none for 200 ms
const (
	candidateLife = 3 * time.Second
	// candidateStale is how long a candidate that sends nothing new keeps the
	// place from others: one copied packet must not keep the peer from moving.
	candidateStale = 200 * time.Millisecond
	challengeGap   = 100 * time.Millisecond // between two probes to a candidate
	candidateGain  = 3                      // RFC 9000 §8.1
)

// A route is where packets go. It is never changed, only replaced.
type route struct {
	to        tunnel.Path
	candidate *candidate // gets copies; nil: there is none
}

// A candidate is a path that has not proved yet that the peer is there.
type candidate struct {
	path     tunnel.Path
	nonce    uint64
	until    time.Time
	probed   time.Time    // guarded by Sealed.mu
	heard    time.Time    // guarded by Sealed.mu: the latest packet that was the highest
	received atomic.Int64 // bytes of UDP payload, authentic packets only
	sent     atomic.Int64
}

// reserve takes n bytes from what may be sent to the candidate.
func (c *candidate) reserve(n int) bool {
	if c.sent.Add(int64(n)) <= candidateGain*c.received.Load() {
		return true
	}
	c.sent.Add(-int64(n))
	return false
}

// dueLocked reports whether another probe may be sent, and takes note of it.
func (c *candidate) dueLocked(now time.Time) bool {
	if now.Sub(c.probed) < challengeGap {
		return false
	}
	c.probed = now
	return true
}

// elsewhere is told of an authentic packet of n bytes that came by another path
// than the one in use.
func (s *Sealed) elsewhere(from tunnel.Path, n int, highest bool) {
	now := time.Now()
	s.mu.Lock()
	c := s.candidateLocked(now)
	r := s.route.Load()
	stale := c != nil && c.path != from && now.Sub(c.heard) >= candidateStale
	// A new candidate has a budget of its own, of what has come from it alone.
	if (c == nil || stale) && highest && from != r.to {
		c = &candidate{path: from, nonce: freshNonce(), until: now.Add(candidateLife)}
		s.route.Store(&route{r.to, c})
	}
	if c == nil || c.path != from {
		s.mu.Unlock()
		return
	}
	if highest {
		c.heard = now
	}
	c.received.Add(int64(n))
	due := c.dueLocked(now)
	s.mu.Unlock()
	if due {
		s.challenge(c)
	}
}

// candidateLocked returns the candidate, and forgets one that has had its time.
func (s *Sealed) candidateLocked(now time.Time) *candidate {
	r := s.route.Load()
	if r.candidate != nil && now.After(r.candidate.until) {
		r = &route{to: r.to}
		s.route.Store(r)
	}
	return r.candidate
}

// challenge sends a probe to the candidate, if the budget allows.
func (s *Sealed) challenge(c *candidate) {
	if c.reserve(wire.MinProbe + SealedOverhead) {
		p := wire.Probe{Nonce: c.nonce}
		s.send(p.Append(nil), c.path, nil)
	}
}

// provedLocked reports whether an answer proves the candidate, and moves there.
func (s *Sealed) provedLocked(nonce uint64, from tunnel.Path) bool {
	c := s.route.Load().candidate
	if c == nil || c.nonce != nonce {
		return false
	}
	if c.path == from { // else it was carried elsewhere: not a proof, but not the plane's either
		s.moveLocked(from)
		s.tellSoonLocked()
	}
	return true
}

// followLocked moves where the carrier sends. The near end's path is always that.
// The far end's is when that has changed: the carrier has validated its new path
// (RFC 9000 §8.2), and the peer may have nothing to send by which to roam.
func (s *Sealed) followLocked(carrier tunnel.Path) {
	changed := carrier != s.carrier
	s.carrier = carrier
	if (s.near || changed) && carrier != s.route.Load().to {
		s.moveLocked(carrier)
		s.tellSoonLocked()
	}
}

// moveLocked makes to the path. Nothing is known of its MTU.
func (s *Sealed) moveLocked(to tunnel.Path) {
	s.route.Store(&route{to: to})
	s.mtu.start(to.Remote.Addr())
	s.size.Store(mtuFloor)
	s.largest.Store(0)
	s.moves++
}
