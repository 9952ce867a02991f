package tunnelquic

import (
	"net/netip"
	"sync"
	"sync/atomic"
	"time"
)

const (
	// amplification is how many times its bytes an address gets that has not been
	// proved (RFC 9000 §8.1). quic-go looks before each packet whether it has sent
	// as much, so that its last one goes beyond.
	amplification = 3
	// maxUnproved bounds the addresses that are remembered: those that have begun
	// before the listener asks for proofs, and what waits in quic-go's queues.
	maxUnproved = 2048
	// minInitial is how long the datagram is that begins a connection (RFC 9000 §14.1).
	minInitial = 1200
)

// unproved counts what addresses send and get before they have been proved.
type unproved struct {
	wanted func() bool // a new address is to be counted; nil: none is
	n      atomic.Int64

	mu     sync.Mutex // guards the fields below
	by     map[netip.AddrPort]*exchange
	tidied time.Time
}

type exchange struct {
	in, out int // bytes
	since   time.Time
	open    bool // a handshake has begun
}

// came notes a datagram, where it has a long header: before the end of a
// handshake there are no others.
func (u *unproved) came(p []byte, from netip.AddrPort) {
	if u.wanted == nil || len(p) == 0 || p[0]>>6 != 3 {
		return
	}
	from = netip.AddrPortFrom(from.Addr().Unmap(), from.Port())
	u.mu.Lock()
	defer u.mu.Unlock()
	e := u.by[from]
	if e == nil {
		if len(p) < minInitial || !u.wanted() {
			return
		}
		u.tidyLocked()
		if len(u.by) >= maxUnproved {
			return
		}
		if u.by == nil {
			u.by = map[netip.AddrPort]*exchange{}
		}
		e = &exchange{since: time.Now()}
		u.by[from] = e
		u.n.Store(int64(len(u.by)))
	}
	e.in += len(p)
}

// tidyLocked forgets what has become no handshake, once a second.
func (u *unproved) tidyLocked() {
	now := time.Now()
	if now.Sub(u.tidied) < time.Second {
		return
	}
	u.tidied = now
	for from, e := range u.by {
		if !e.open && now.Sub(e.since) > time.Second {
			delete(u.by, from)
		}
	}
}

// may reports whether a datagram may go to an address. What may not is as if it
// were lost on its way. One with a short header always may: its connection has
// been proved, and goes on although somebody else has put its address into a
// datagram of his own.
func (u *unproved) may(p []byte, to netip.AddrPort) bool {
	if u.n.Load() == 0 || len(p) == 0 || p[0]>>7 == 0 {
		return true
	}
	to = netip.AddrPortFrom(to.Addr().Unmap(), to.Port())
	u.mu.Lock()
	defer u.mu.Unlock()
	e := u.by[to]
	if e == nil {
		return true
	}
	if e.out+len(p) > amplification*e.in {
		return false
	}
	e.out += len(p)
	return true
}

// begun says that an address has begun a handshake, over that it has ended or the
// address has been proved.
func (u *unproved) begun(from netip.AddrPort) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if e := u.by[from]; e != nil {
		e.open = true
	}
}

func (u *unproved) over(from netip.AddrPort) {
	u.mu.Lock()
	defer u.mu.Unlock()
	delete(u.by, from)
	u.n.Store(int64(len(u.by)))
}
