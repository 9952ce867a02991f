package tunneltls

import (
	"encoding/binary"
	"sync"
	"sync/atomic"
	"time"
)

const (
	// leastUnread is what may always have come on a carrier and wait to be read,
	// in bytes, also where all together hold too much.
	leastUnread = 1 << 20
	// mostIdle is how many bytes of buffers may be empty until they are given
	// back: yamux keeps a stream's as large as it ever was.
	mostIdle = 16 << 20
	// askAgain is how often a carrier looks whether others have made room.
	askAgain = 20 * time.Millisecond
)

// unread bounds what has come on a carrier and nobody has read. yamux bounds it
// for each stream alone, and a peer that opens thousands which nobody reads, as
// where their destinations do not, could fill the memory. So the carrier stops
// reading, between two frames, and TCP holds the peer back; QUIC's connection
// flow control does the same. What counts is the buffers, by the most that each has
// held.
type unread struct {
	shrink   func(id uint32) // gives a stream's empty buffer back
	limit    int             // of this carrier
	all      *atomic.Int64   // of all carriers of the listener or dialer
	allLimit int64

	read chan struct{} // capacity 1: a buffer is empty
	full atomic.Bool   // nothing is taken from TCP

	// Of the frame that is coming. Its reader's alone.
	head [yamuxHeader]byte
	have int    // bytes of head
	body uint32 // bytes of it that are still to come
	id   uint32

	mu    sync.Mutex // guards the fields below
	over  bool       // the carrier has ended
	total int        // bytes of buffers
	idle  int        // of total: those that are empty
	piles map[uint32]*pile
	early int       // of piles: those that are not known
	last  [2]uint32 // the latest stream that was opened, with an even and with an odd number
}

// A pile is what has come of one stream.
type pile struct {
	bytes int
	most  int  // since its buffer was last given back
	known bool // it has been opened here; else the frames have been quicker
	left  bool // this end has closed it in yamux
	ended bool // so has the peer: yamux has forgotten it when both have
}

func newUnread(cfg *Config, shrink func(id uint32)) *unread {
	return &unread{shrink: shrink, limit: cfg.Unread, all: cfg.unread, allLimit: int64(cfg.AllUnread), read: make(chan struct{}, 1), piles: map[uint32]*pile{}}
}

// tooMuch reports whether nothing more may come for the moment.
func (u *unread) tooMuch() bool {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.total > u.limit || u.total > leastUnread && u.all.Load() > u.allLimit || u.idle > mostIdle
}

// admit returns how many bytes may be taken from TCP, at most n. Between two
// frames it waits until something may; within one yamux holds a lock that the
// stream's reader needs.
func (u *unread) admit(n int, done <-chan struct{}) int {
	for u.tooMuch() {
		switch {
		case u.body > 0:
			return int(min(uint32(n), u.body))
		case u.have > 0:
			return min(n, yamuxHeader-u.have)
		case u.squeeze() && !u.tooMuch():
			continue
		}
		u.full.Store(true)
		select {
		case <-u.read:
		case <-time.After(askAgain):
		case <-done:
			return n
		}
	}
	u.full.Store(false)
	return n
}

// squeeze gives back the buffers that are empty, and reports whether there were any.
func (u *unread) squeeze() bool {
	var empty []uint32
	u.mu.Lock()
	for id, k := range u.piles {
		if k.bytes == 0 && k.most > 0 {
			empty = append(empty, id)
			u.giveLocked(k.most)
			k.most = 0
		}
	}
	u.idle = 0
	u.mu.Unlock()
	for _, id := range empty {
		u.shrink(id)
	}
	return len(empty) > 0
}

// came follows the frames in p.
func (u *unread) came(p []byte) {
	u.mu.Lock()
	defer u.mu.Unlock()
	for len(p) > 0 {
		if u.body > 0 {
			n := int(min(uint32(len(p)), u.body))
			u.body -= uint32(n)
			p = p[n:]
			u.countLocked(n)
			continue
		}
		n := copy(u.head[u.have:], p)
		p = p[n:]
		if u.have += n; u.have < yamuxHeader {
			return
		}
		const data, fin, rst = 0, 4, 8
		u.have, u.id = 0, binary.BigEndian.Uint32(u.head[4:])
		if u.head[1] == data {
			u.body = binary.BigEndian.Uint32(u.head[8:])
		}
		if u.head[3]&(fin|rst) != 0 {
			if k := u.pileLocked(); k != nil {
				k.ended = true
				u.forgetLocked(u.id, k)
			}
		}
	}
}

// pileLocked returns what there is of the stream whose frame is coming; nil: yamux
// knows no such stream, and throws away what comes of it.
func (u *unread) pileLocked() *pile {
	k := u.piles[u.id]
	if k == nil && !u.over && u.id > max(u.last[u.id%2], controlStream) && u.early < 2*backlog {
		k = &pile{}
		u.piles[u.id] = k
		u.early++
	}
	return k
}

// countLocked counts n bytes of it.
func (u *unread) countLocked(n int) {
	k := u.pileLocked()
	if k == nil {
		return
	}
	if k.bytes == 0 {
		u.idle -= k.most
	}
	k.bytes += n
	if more := k.bytes - k.most; more > 0 {
		k.most += more
		u.total += more
		u.all.Add(int64(more))
	}
}

// controlStream is read as it comes.
const controlStream = 1

// open makes a stream known. Each side's numbers come here in order, so that yamux
// has refused what is lower and not known.
func (u *unread) open(id uint32) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.last[id%2] = id
	if u.piles[id] == nil {
		u.piles[id] = &pile{}
		u.early++
	}
	u.piles[id].known = true
	u.early--
	if u.early == 0 {
		return
	}
	for old, k := range u.piles {
		if !k.known && old < id && old%2 == id%2 {
			u.dropLocked(old, k)
		}
	}
}

// took counts n bytes as read.
func (u *unread) took(id uint32, n int) {
	u.mu.Lock()
	defer u.mu.Unlock()
	k := u.piles[id]
	if k == nil || k.bytes == 0 {
		return
	}
	if k.bytes -= min(n, k.bytes); k.bytes == 0 {
		u.idle += k.most
		u.tell()
	}
}

// leave says that this end has closed a stream in yamux, and given its buffer back
// where that was empty.
func (u *unread) leave(id uint32) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if k := u.piles[id]; k != nil {
		k.left = true
		if k.bytes == 0 {
			u.idle -= k.most
			u.giveLocked(k.most)
			k.most = 0
		}
		u.forgetLocked(id, k)
	}
}

func (u *unread) forgetLocked(id uint32, k *pile) {
	if k.left && k.ended {
		u.dropLocked(id, k)
	}
}

func (u *unread) dropLocked(id uint32, k *pile) {
	if delete(u.piles, id); !k.known {
		u.early--
	}
	if k.bytes == 0 {
		u.idle -= k.most
	}
	u.giveLocked(k.most)
}

// end gives everything back.
func (u *unread) end() {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.over = true
	clear(u.piles)
	u.giveLocked(u.total)
	u.idle = 0
}

func (u *unread) giveLocked(n int) {
	u.total -= n
	u.all.Add(-int64(n))
	u.tell()
}

// tell wakes whoever waits.
func (u *unread) tell() {
	select {
	case u.read <- struct{}{}:
	default:
	}
}
