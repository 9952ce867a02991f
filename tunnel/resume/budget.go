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
	// untakenMost is how long nobody may take anything of what a Conn has kept,
	// where others need the memory.
	untakenMost = 2 * time.Second
	// reliefPause is between two rounds in which Conns end for want of memory: what
	// the first give back is dealt out before more have to go.
	reliefPause = 50 * time.Millisecond
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
	used  int                   // more than limit only by what Conns take for their floors: a grant or two each
	ready []*Share              // somebody waits there and has room there; in turn
	keep  map[*account]struct{} // those that hold what has come, by a grant
}

// NewBudget makes a budget of so many bytes; 0: DefaultBudget.
func NewBudget(limit int) *Budget {
	if limit <= 0 {
		limit = DefaultBudget
	}
	return &Budget{limit: limit, keep: map[*account]struct{}{}}
}

// A Share is what one session may take of a Budget.
type Share struct {
	of    *Budget
	limit int

	// of.mu guards these.
	used   int
	queue  list.List // of the *accounts that wait
	listed bool      // it is among of.ready
	round  time.Time // when the last round of ends for want of memory began
	left   int       // how many more may end in it
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
func (s *Share) take(a *account, always bool) bool {
	s.of.mu.Lock()
	defer s.of.mu.Unlock()
	if !always && (s.queue.Len() > 0 || !s.roomLocked() || !s.of.roomLocked()) {
		return false
	}
	s.usedLocked(a)
	return true
}

func (s *Share) usedLocked(a *account) {
	s.used += grant
	s.of.used += grant
	if a.keeps {
		s.of.keep[a] = struct{}{}
	}
}

// give gives back what was taken; all: a has nothing more.
func (s *Share) give(a *account, n int, all bool) {
	s.of.mu.Lock()
	defer s.of.mu.Unlock()
	s.used -= n
	s.of.used -= n
	if all {
		delete(s.of.keep, a)
	}
	s.listLocked()
	s.of.dealLocked()
}

// wait has a.granted called, once, when there is a grant for it.
func (s *Share) wait(a *account) *list.Element {
	s.of.mu.Lock()
	defer s.of.mu.Unlock()
	e := s.queue.PushBack(a)
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
		a := s.queue.Remove(first).(*account)
		s.usedLocked(a)
		go a.granted() // its Conn may hold its lock, and wait for ours
		s.listLocked()
	}
}

// An account is what a Conn keeps of one direction, in bytes of capacity. The
// Conn's mu guards it.
type account struct {
	of     *Conn
	share  *Share // nil: nothing has to be paid for
	keeps  bool   // what has come and nobody has taken; else what has been sent
	held   int
	free   int
	paid   int           // taken from the share
	queued *list.Element // in the share's queue; nil: it is not
}

// mustPay is what has to be paid for to hold n bytes more.
func (a *account) mustPay(n int) int { return max(0, a.held+n-a.free) }

// fits pays for n bytes more and reports whether it could: always, where it must.
func (a *account) fits(n int, always bool) bool {
	if a.share == nil {
		return true
	}
	for a.mustPay(n) > a.paid {
		if !a.share.take(a, always) {
			return false
		}
		a.paid += grant
	}
	return true
}

// queue waits for a grant.
func (a *account) queue() {
	if a.queued == nil && !a.of.over {
		a.queued = a.share.wait(a)
	}
}

// granted takes what has been dealt to a.
func (a *account) granted() {
	c := a.of
	c.mu.Lock()
	defer c.mu.Unlock()
	a.queued = nil
	a.paid += grant
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
	for _, a := range []*account{&c.sentMemory, &c.keptMemory} {
		over := a.paid - a.mustPay(0)
		if n := over - over%grant; n > 0 {
			a.paid -= n
			a.share.give(a, n, a.paid == 0)
		}
		if a.queued != nil && c.over {
			a.share.leave(a.queued)
			a.queued = nil
		}
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

var errUntaken = tunnel.Errorf(tunnel.LimitExceeded, "nobody has taken what the stream brings for %v, and there is no memory left for more", untakenMost)

// watchUntakenLocked looks whether c still is full after a while, and nobody has
// taken anything of what was kept meanwhile. Then what comes on its carrier stream
// holds up others, and somebody must go.
func (c *Conn) watchUntakenLocked() {
	if c.cfg.Kept == nil || c.untaken {
		return
	}
	c.untaken = true
	if c.fullSince.IsZero() || c.fullAt != c.taken {
		c.fullSince, c.fullAt = time.Now(), c.taken
	}
	time.AfterFunc(max(untakenMost-time.Since(c.fullSince), reliefPause), func() {
		c.mu.Lock()
		c.untaken = false
		stays := c.full && !c.closed && c.err == nil
		if !stays {
			c.fullSince = time.Time{}
		}
		untaken := stays && c.fullAt == c.taken
		c.mu.Unlock()
		if untaken {
			c.cfg.Kept.relieve(c)
		}
		c.mu.Lock()
		defer c.mu.Unlock()
		if stays && c.err == nil {
			c.watchUntakenLocked()
		}
	})
}

// relieve ends a Conn of which nobody takes anything, so that there is memory
// again: c itself where its session has used up its share, else one of the session
// that keeps most. Where enough have ended just now, it does nothing.
func (s *Share) relieve(c *Conn) {
	if !s.mayRelieve() {
		return
	}
	worst, most := c, 0
	for _, other := range s.rivals() {
		if n := other.untakenFor(untakenMost); n > most {
			worst, most = other, n
		}
	}
	worst.mu.Lock()
	defer worst.mu.Unlock()
	if worst.failLocked(errUntaken, true); worst.err == errUntaken {
		worst.dropLocked(&worst.kept)
	}
}

// mayRelieve counts those that end: in each round a quarter of those that wait for
// memory, or one.
func (s *Share) mayRelieve() bool {
	s.of.mu.Lock()
	defer s.of.mu.Unlock()
	if now := time.Now(); now.Sub(s.round) >= reliefPause {
		s.round, s.left = now, max(s.queue.Len()/4, 1)
	}
	s.left--
	return s.left >= 0
}

// rivals returns, where memory is short for all, what keeps something in the session
// that keeps most, if that is another.
func (s *Share) rivals() (others []*Conn) {
	s.of.mu.Lock()
	defer s.of.mu.Unlock()
	if !s.roomLocked() || s.of.roomLocked() {
		return nil
	}
	most := s
	for a := range s.of.keep {
		if a.share.used > most.used {
			most, others = a.share, nil
		}
		if a.share == most && most != s {
			others = append(others, a.of)
		}
	}
	return others
}

// untakenFor is how many bytes c keeps where nobody has taken any for so long.
func (c *Conn) untakenFor(d time.Duration) int {
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.kept) == 0 || time.Since(c.lastTaken) < d {
		return 0
	}
	return int(c.got - c.taken)
}
