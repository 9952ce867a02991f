package resume

import (
	"container/list"
	"sync"
	"time"

	"culvert/tunnel"
)

const (
	// floor is what a Conn always may keep of what it sends, in bytes, so that
	// it goes on where nothing is left: a peer acknowledges at the latest after
	// as many (PROTOCOL.md 4.3).
	floor = 64 << 10
	// keptFloor is the same of what has come and nobody has read.
	keptFloor = 16 << 10
	// Free is the memory that a Conn asks nobody for: its floors, where chunks
	// are full.
	Free     = freeSent + freeKept
	freeSent = 72 << 10
	freeKept = 33 << 10
	// grant is what a Conn takes from a budget at once.
	grant = 64 << 10
	// DefaultBudget is for one process, DefaultShare for one session: 16 streams
	// with a whole Window.
	DefaultBudget = 512 << 20
	DefaultShare  = 64 << 20
	// A Conn is stuck when it could keep nothing for so long, and nothing was
	// read or acknowledged; twice as long each time that it did not help.
	stuckAfter = 500 * time.Millisecond
	stuckMost  = time.Minute
)

// A Budget bounds the memory that the Conns of a process keep, beyond what
// is Free to each.
//
//	Conn: keeps more than Free ──take──► Share of its session ──► Budget
//	        ▲                       └─ nothing left: it waits, its Writes with it
//	        └── granted ◄── first of its Share ◄── Shares in turn ◄── give ◄── others
type Budget struct {
	mu    sync.Mutex
	limit int
	used  int      // more than limit only by what Conns take for their floors: a grant or two each
	ready []*Share // somebody waits there and has room there; in turn
}

// NewBudget makes a budget of so many bytes; 0: DefaultBudget.
func NewBudget(limit int) *Budget {
	if limit <= 0 {
		limit = DefaultBudget
	}
	return &Budget{limit: limit}
}

// A Share is what one session may take of a Budget.
type Share struct {
	of    *Budget
	limit int

	// of.mu guards these.
	used   int
	queue  list.List // of the *Conns that wait
	listed bool      // it is among of.ready
}

// Share makes a share of at most so many bytes; 0: DefaultShare.
func (b *Budget) Share(limit int) *Share {
	if limit <= 0 {
		limit = DefaultShare
	}
	return &Share{of: b, limit: limit}
}

// Used is how much is taken at the moment, in bytes.
func (b *Budget) Used() int {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.used
}

// take takes a grant, if there is one left and nobody waits for it, or always.
func (s *Share) take(always bool) bool {
	s.of.mu.Lock()
	defer s.of.mu.Unlock()
	if !always && (s.queue.Len() > 0 || !s.roomLocked() || !s.of.roomLocked()) {
		return false
	}
	s.used += grant
	s.of.used += grant
	return true
}

// give gives back what was taken.
func (s *Share) give(n int) {
	s.of.mu.Lock()
	defer s.of.mu.Unlock()
	s.used -= n
	s.of.used -= n
	s.listLocked()
	s.of.dealLocked()
}

// wait has c.granted called, once, when there is a grant for it.
func (s *Share) wait(c *Conn) *list.Element {
	s.of.mu.Lock()
	defer s.of.mu.Unlock()
	e := s.queue.PushBack(c)
	s.listLocked() // something may have been given back since it asked
	s.of.dealLocked()
	return e
}

// leave ends a wait, if it has not been granted.
func (s *Share) leave(e *list.Element) {
	s.of.mu.Lock()
	defer s.of.mu.Unlock()
	s.queue.Remove(e)
}

func (s *Share) roomLocked() bool  { return s.used+grant <= s.limit }
func (b *Budget) roomLocked() bool { return b.used+grant <= b.limit }

func (s *Share) listLocked() {
	if !s.listed && s.queue.Len() > 0 && s.roomLocked() {
		s.listed = true
		s.of.ready = append(s.of.ready, s)
	}
}

// dealLocked hands out what there is, to one Share after the other.
func (b *Budget) dealLocked() {
	for len(b.ready) > 0 && b.roomLocked() {
		s := b.ready[0]
		b.ready[0] = nil
		b.ready = b.ready[1:]
		s.listed = false
		first := s.queue.Front()
		if first == nil || !s.roomLocked() {
			continue // listed again when it has room
		}
		s.used += grant
		b.used += grant
		go s.queue.Remove(first).(*Conn).granted() // it may hold its lock, and wait for ours
		s.listLocked()
	}
}

// An account is what a Conn keeps of one direction, in bytes of capacity.
type account struct{ held, free int }

func (a account) beyond(n int) int { return max(0, a.held+n-a.free) }

// mustPayLocked is what has to be paid for to keep n bytes more of what is
// sent, and m of what has come.
func (c *Conn) mustPayLocked(n, m int) int { return c.sentMemory.beyond(n) + c.keptMemory.beyond(m) }

// fitsLocked pays for n and m bytes more and reports whether it could: always,
// where it must.
func (c *Conn) fitsLocked(n, m int, always bool) bool {
	if c.cfg.Share == nil {
		return true
	}
	for c.mustPayLocked(n, m) > c.paid {
		if !c.cfg.Share.take(always) {
			return false
		}
		c.paid += grant
	}
	return true
}

// queueLocked waits for a grant.
func (c *Conn) queueLocked() {
	if c.queued == nil && !c.over {
		c.queued = c.cfg.Share.wait(c)
	}
}

// granted takes what has been dealt to c.
func (c *Conn) granted() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.queued = nil
	c.paid += grant
	if c.over || c.waiting == 0 && !c.full {
		c.thriftLocked() // it needs it no longer
	}
	if c.full {
		c.full = false
		if c.owedLocked() {
			c.readOnLocked()
		}
	}
	c.cond.Broadcast()
}

// thriftLocked gives back what is paid for and not needed.
func (c *Conn) thriftLocked() {
	over := c.paid - c.mustPayLocked(0, 0)
	if n := over - over%grant; n > 0 {
		c.paid -= n
		c.cfg.Share.give(n)
	}
	if c.queued != nil && c.over {
		c.cfg.Share.leave(c.queued)
		c.queued = nil
	}
}

var errStuck = tunnel.Errorf(tunnel.LimitExceeded, "there is no memory left for what the stream brings")

// watchFullLocked looks whether c is stuck: a Write waits for acknowledgements,
// they lie behind data that can not be kept, and the application reads that
// when its Write is done, as an echo does. Then the carrier stream is given up,
// and with it what it still brings: whoever attaches another tells what the
// peer has received, and the peer says the rest again.
func (c *Conn) watchFullLocked() {
	if c.watched {
		return
	}
	c.watched = true
	taken, base := c.taken, c.base
	time.AfterFunc(c.stuckFor, func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		c.watched = false
		switch {
		case !c.full || c.waiting == 0 || c.under == nil:
		case c.taken != taken || c.base != base:
			c.watchFullLocked()
		default:
			if c.stuckFor = min(2*c.stuckFor, stuckMost); c.base > c.stuckAt {
				c.stuckFor = stuckAfter
			}
			c.stuckAt, c.full = c.base, false
			c.lostLocked(c.generation, errStuck)
		}
	})
}
