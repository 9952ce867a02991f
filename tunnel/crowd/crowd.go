package crowd

import (
	"container/list"
	"net/netip"
	"sync"
)

// A Crowd is who has a place. Its methods may be called concurrently.
type Crowd struct {
	limit int

	mu  sync.Mutex                  // guards the fields below
	all int                         // places taken
	by  map[netip.Prefix]*list.List // of *Place, oldest first; none is empty
}

// A Place is one taken.
type Place struct {
	crowd   *Crowd
	source  netip.Prefix
	at      *list.Element // nil: it has been given back; guarded by crowd.mu
	turnOut func()
}

// New makes a crowd of at most limit.
func New(limit int) *Crowd {
	return &Crowd{limit: limit, by: map[netip.Prefix]*list.List{}}
}

// Enter takes a place; false: there is none for this source. turnOut is called
// when the place is needed for another source; it must not wait and may be
// called from inside another Enter. The place has then been given back.
func (c *Crowd) Enter(from netip.Addr, turnOut func()) (*Place, bool) {
	p := &Place{crowd: c, source: SourceOf(from), turnOut: turnOut}
	c.mu.Lock()
	var out *Place
	if c.all >= c.limit {
		if out = c.oldestOfMostLocked(p.source); out == nil {
			c.mu.Unlock()
			return nil, false
		}
		out.leaveLocked()
	}
	l := c.by[p.source]
	if l == nil {
		l = list.New()
		c.by[p.source] = l
	}
	p.at = l.PushBack(p)
	c.all++
	c.mu.Unlock()
	if out != nil {
		out.turnOut()
	}
	return p, true
}

// oldestOfMostLocked is who makes room for a source; nil: nobody, since no source
// has more. c.mu is held.
func (c *Crowd) oldestOfMostLocked(source netip.Prefix) *Place {
	most := 0
	if l := c.by[source]; l != nil {
		most = l.Len()
	}
	var from *list.List
	for _, l := range c.by {
		if l.Len() > most {
			most, from = l.Len(), l
		}
	}
	if from == nil {
		return nil
	}
	return from.Front().Value.(*Place)
}

// Leave gives the place back, once.
func (p *Place) Leave() {
	p.crowd.mu.Lock()
	defer p.crowd.mu.Unlock()
	p.leaveLocked()
}

func (p *Place) leaveLocked() {
	if p.at == nil {
		return
	}
	c := p.crowd
	l := c.by[p.source]
	l.Remove(p.at)
	p.at = nil
	if l.Len() == 0 {
		delete(c.by, p.source)
	}
	c.all--
}

// Len is how many places are taken.
func (c *Crowd) Len() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.all
}

// SourceOf is what limits count as one: an IPv4 address, or an IPv6 network of
// /64, all of which one host may have.
func SourceOf(a netip.Addr) netip.Prefix {
	a = a.Unmap().WithZone("")
	bits := 64
	if a.Is4() {
		bits = 32
	}
	p, _ := a.Prefix(bits) // of an invalid address: the zero Prefix
	return p
}
