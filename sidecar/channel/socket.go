package channel

import (
	"sync"
	"time"
)

const (
	maxAsked   = 32  // STUN requests that may wait for their answers, per socket
	maxRemotes = 128 // remote addresses followed per socket
	fewRemotes = 8   // up to here a search is cheaper than a map
)

// A party is one socket or stream of an app: what ends together.
type party struct {
	w     *Watcher
	owner Owner
	ask   sync.Once // owner.Resolve

	mu        sync.Mutex // guards what follows, and the flows
	hot       bool       // listed in w.hot
	closed    bool
	app       string // what Resolve said, or the owner's own
	pid       int
	asked     *[maxAsked]transaction
	nextAsked uint
	flows     []*flow
}

// heat lists the party among those that the watcher looks at. p.mu is held.
func (p *party) heat() {
	if p.hot || p.closed {
		return
	}
	p.hot = true
	p.w.mu.Lock()
	p.w.hot[p] = struct{}{}
	p.w.mu.Unlock()
}

// cool remembers why a flow ended, for the event. p.mu is held.
func (p *party) cool(why string) {
	p.w.mu.Lock()
	if len(p.w.why) < maxWhy {
		p.w.why[p.key()] = why
	}
	p.w.mu.Unlock()
}

// close ends everything at once.
func (p *party) close(why string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return
	}
	p.closed = true
	p.w.flows.Add(-int64(len(p.flows)))
	p.flows, p.asked = nil, nil
	if p.hot {
		p.hot = false
		p.cool(why)
		p.w.mu.Lock()
		delete(p.w.hot, p)
		p.w.mu.Unlock()
	}
}

// A Socket is one UDP association of an app. It is safe for concurrent use.
type Socket struct {
	party
	last  *flow
	index map[Target]*flow // only beyond fewRemotes
	hand  int              // where the search for a flow to give up goes on
}

// Packet takes the facts of one datagram: up is from the app to the remote. p
// is borrowed until Packet returns; it never blocks on anything slow.
func (s *Socket) Packet(up bool, remote Target, p []byte, now time.Time) {
	t := s.w.at(now)
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return
	}
	f := s.last
	if f == nil || f.remote != remote && f.alias != remote {
		if f = s.flow(up, remote, t); f == nil {
			return
		}
		s.last = f
	}
	s.datagram(f, up, p, len(p), t)
}

// Refused says that what the app sent to a remote is not let through, so that
// nothing it sends there is evidence.
func (s *Socket) Refused(remote Target) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, f := range s.flows {
		if f.remote == remote {
			if f.by != byNone {
				s.cool("the policy refuses it")
			}
			f.end()
			return
		}
	}
}

// Close ends the socket's flows at once.
func (s *Socket) Close(time.Time) { s.close("its socket was closed") }

// flow finds or makes the flow for a remote; nil: there is no room.
func (s *Socket) flow(up bool, remote Target, t int64) *flow {
	if s.index != nil {
		if f := s.index[remote]; f != nil {
			return f
		}
	} else {
		for _, f := range s.flows {
			if f.remote == remote || f.alias == remote {
				return f
			}
		}
	}
	// What comes from an address that nothing was sent to answers a name.
	if !up {
		for _, f := range s.flows[:min(fewRemotes, len(s.flows))] {
			if f.remote.Host != "" && f.remote.Port == remote.Port && f.alias == (Target{}) {
				f.alias = remote
				if s.index != nil {
					s.index[remote] = f
				}
				return f
			}
		}
	}
	f := s.room(t)
	if f == nil {
		return nil
	}
	*f = flow{remote: remote, used: t}
	if s.w.cfg.MediaRule != nil {
		f.tagged = s.w.cfg.MediaRule(remote)
	}
	if s.index == nil && len(s.flows) > fewRemotes {
		s.index = make(map[Target]*flow, 2*fewRemotes)
		for _, g := range s.flows {
			s.index[g.remote] = g
			if g.alias != (Target{}) {
				s.index[g.alias] = g
			}
		}
	}
	if s.index != nil {
		s.index[remote] = f
	}
	return f
}

// room returns a flow to fill: a new one, or one that does not count and was
// used long ago.
func (s *Socket) room(t int64) *flow {
	if len(s.flows) < maxRemotes {
		if s.w.flows.Add(1) <= int64(s.w.cfg.MaxFlows) {
			f := new(flow)
			s.flows = append(s.flows, f)
			return f
		}
		s.w.flows.Add(-1)
	}
	// A few steps of a clock hand: a scan of all would make an app that talks
	// to thousands of peers expensive.
	var old *flow
	for range min(fewRemotes, len(s.flows)) {
		s.hand = (s.hand + 1) % len(s.flows)
		if f := s.flows[s.hand]; f.by == byNone && (old == nil || f.used < old.used) {
			old = f
		}
	}
	if old == nil {
		return nil
	}
	if s.index != nil {
		delete(s.index, old.remote)
		delete(s.index, old.alias)
	}
	if s.asked != nil {
		for i := range s.asked {
			if s.asked[i].flow == old {
				s.asked[i] = transaction{}
			}
		}
	}
	if s.last == old {
		s.last = nil
	}
	return old
}
