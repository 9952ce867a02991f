package session

import (
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"culvert/tunnel"
	"culvert/tunnel/media"
	"culvert/tunnel/wire"
)

// A plane is the datagram side of one session at one end: contexts in both
// directions and the legs of its associations. The path of a datagram:
//
//	 leg.send                                 plane.receive
//	1 find the context for the address       5 parse the record
//	2 number it                               6 learn or look up the context, answer it
//	3 write header and payload once           7 drop duplicates by number
//	4 Room: send, wait, or drop               8 leg.deliver
type plane struct {
	age   time.Duration
	drops *media.Drops
	// open makes the leg of an association that is new here; nil: none can be
	// (the near end). It is called on a reading goroutine.
	open func(id uint32, held bool) *leg

	room atomic.Pointer[media.Room]

	mu   sync.RWMutex      // guards the fields below
	lost map[string]uint64 // datagrams lost by ways of the past, by reason
	legs map[uint32]*leg
	in   map[uint16]inContext
	out  map[uint16]*outContext
	next uint16 // the highest context ever given out
	// freed are contexts of ended associations, oldest first. They rest before
	// they are used again, so that a late record with the short header is not
	// taken for another association's.
	freed []freedContext
}

type inContext struct {
	leg *leg
	at  tunnel.Target
}

type outContext struct {
	id    uint16
	to    tunnel.Target
	known atomic.Bool // the peer has acknowledged it
}

type freedContext struct {
	id   uint16
	when time.Time
}

// contextRest is longer than a record can be under way.
const contextRest = 10 * time.Second

// maxContexts bounds the addresses of one association that get a context;
// others travel with the full header.
const maxContexts = 256

// A leg is one association in one session, at one end.
type leg struct {
	plane *plane
	id    uint32
	held  bool

	// deliver and unreachable take what comes from the peer.
	deliver     func(p []byte, at tunnel.Target)
	unreachable func(at netip.AddrPort, err error)

	mu     sync.Mutex // guards number, out, last
	number uint16
	out    map[tunnel.Target]*outContext
	last   *outContext

	learned map[uint16]struct{} // contexts of the peer that stand for this leg; guarded by plane.mu

	inMu   sync.Mutex // guards window and spans deliver, so that ended can wait for it
	window media.Window
	ended  atomic.Bool
}

func newPlane(age time.Duration, drops *media.Drops) *plane {
	return &plane{age: age, drops: drops, lost: map[string]uint64{}, legs: map[uint32]*leg{}, in: map[uint16]inContext{}, out: map[uint16]*outContext{}}
}

// setWay makes w the way of everything sent from now on; nil: there is none.
func (p *plane) setWay(w tunnel.Way) {
	var room *media.Room
	if w != nil {
		room = media.NewRoom(w, p.age, p.drops, p.receive)
	}
	p.retire(p.room.Swap(room))
}

// dropWay forgets w if it is still the way in use.
func (p *plane) dropWay(w tunnel.Way) {
	if r := p.room.Load(); r != nil && r.Way() == w && p.room.CompareAndSwap(r, nil) {
		p.retire(r)
	}
}

// retire keeps the counts of a way that is no longer in use.
func (p *plane) retire(r *media.Room) {
	if r == nil {
		return
	}
	r.Discard()
	p.mu.Lock()
	defer p.mu.Unlock()
	for reason, n := range r.Way().Lost() {
		p.lost[reason] += n
	}
}

// lostTo adds what the session's ways have lost, by reason.
func (p *plane) lostTo(m map[string]uint64) {
	if r := p.room.Load(); r != nil {
		for reason, n := range r.Way().Lost() {
			m[reason] += n
		}
	}
	p.mu.RLock()
	defer p.mu.RUnlock()
	for reason, n := range p.lost {
		m[reason] += n
	}
}

func (p *plane) add(l *leg) *leg {
	l.plane = p
	p.mu.Lock()
	defer p.mu.Unlock()
	p.legs[l.id] = l
	return l
}

// remove ends a leg here. It does not wait, and reports whether it was there.
func (p *plane) remove(l *leg) bool {
	l.ended.Store(true)
	l.mu.Lock()
	out := l.out
	l.out, l.last = nil, nil
	l.mu.Unlock()

	p.mu.Lock()
	defer p.mu.Unlock()
	if p.legs[l.id] != l {
		return false
	}
	delete(p.legs, l.id)
	now := time.Now()
	for _, c := range out {
		delete(p.out, c.id)
		p.freed = append(p.freed, freedContext{c.id, now})
	}
	for id := range l.learned {
		delete(p.in, id)
	}
	return true
}

// wait returns once no deliver is running and none will.
func (l *leg) wait() {
	l.ended.Store(true)
	l.inMu.Lock()
	//lint:ignore SA2001 the lock is taken only to wait
	l.inMu.Unlock()
}

var buffers = sync.Pool{New: func() any { b := make([]byte, 0, 2048); return &b }}

// send sends one datagram. The error is tunnel.ErrTooLarge or net.ErrClosed.
func (l *leg) send(payload []byte, at tunnel.Target) error {
	if l.ended.Load() {
		return net.ErrClosed
	}
	room := l.plane.room.Load()
	if room == nil {
		l.plane.drops.Add(media.NoWay)
		return nil
	}
	h := wire.Header{Association: l.id, Held: l.held, Target: at}
	l.mu.Lock()
	c := l.last
	if c == nil || c.to != at {
		c = l.contextLocked(at)
	}
	h.Number = l.number
	l.number++
	l.mu.Unlock()
	if c != nil {
		h.Context, h.Full = c.id, !c.known.Load()
	} else {
		h.Full = true
	}

	b := buffers.Get().(*[]byte)
	*b = append(h.Append((*b)[:0]), payload...)
	err := room.Send(*b)
	buffers.Put(b)
	return err
}

// contextLocked returns the context for an address, a new one where there is
// room, else nil. l.mu is held.
func (l *leg) contextLocked(at tunnel.Target) *outContext {
	c := l.out[at]
	if c == nil {
		if l.ended.Load() || len(l.out) >= maxContexts {
			return nil
		}
		if c = l.plane.newContext(at); c == nil {
			return nil
		}
		if l.out == nil {
			l.out = map[tunnel.Target]*outContext{}
		}
		l.out[at] = c
	}
	l.last = c
	return c
}

func (p *plane) newContext(at tunnel.Target) *outContext {
	p.mu.Lock()
	defer p.mu.Unlock()
	c := &outContext{to: at}
	switch {
	case len(p.freed) > 0 && time.Since(p.freed[0].when) > contextRest:
		c.id = p.freed[0].id
		p.freed = p.freed[1:]
	case p.next < wire.MaxContext:
		p.next++
		c.id = p.next
	default:
		return nil
	}
	p.out[c.id] = c
	return c
}

// receive takes one record from a way. It runs on the way's reading goroutine.
func (p *plane) receive(record []byte) {
	h, payload, notice, isNotice, err := wire.ParseRecord(record)
	switch {
	case err != nil:
		p.drops.Add(media.Malformed)
		return
	case isNotice:
		p.notice(notice)
		return
	}
	at := h.Target
	var l *leg
	if h.Full {
		if l = p.learn(h); l == nil {
			return
		}
	} else {
		p.mu.RLock()
		c, ok := p.in[h.Context]
		p.mu.RUnlock()
		if !ok {
			p.drops.Add(media.Unknown)
			p.tell(wire.Notice{Unknown: h.Context})
			return
		}
		l, at = c.leg, c.at
	}
	l.inMu.Lock()
	defer l.inMu.Unlock()
	switch {
	case l.ended.Load():
		p.drops.Add(media.Unknown)
	case !l.window.Fresh(h.Number):
		p.drops.Add(media.Duplicate)
	default:
		l.deliver(payload, at)
	}
}

// learn finds or makes the leg of a full header, and its context.
func (p *plane) learn(h wire.Header) *leg {
	p.mu.RLock()
	l := p.legs[h.Association]
	p.mu.RUnlock()
	if l == nil && p.open != nil {
		l = p.open(h.Association, h.Held)
	}
	if l == nil {
		p.drops.Add(media.Unknown)
		return nil
	}
	if h.Context != 0 {
		p.mu.Lock()
		if p.legs[h.Association] == l { // else it has ended meanwhile
			if old := p.in[h.Context].leg; old != l {
				if old != nil {
					delete(old.learned, h.Context)
				}
				if l.learned == nil {
					l.learned = map[uint16]struct{}{}
				}
				l.learned[h.Context] = struct{}{}
			}
			p.in[h.Context] = inContext{l, h.Target}
		}
		p.mu.Unlock()
		p.tell(wire.Notice{Ack: h.Context})
	}
	return l
}

func (p *plane) notice(n wire.Notice) {
	p.mu.RLock()
	ack, unknown, l := p.out[n.Ack], p.out[n.Unknown], p.legs[n.Association]
	p.mu.RUnlock()
	switch {
	case ack != nil:
		ack.known.Store(true)
	case unknown != nil:
		unknown.known.Store(false)
	case n.Unreachable && l != nil && l.unreachable != nil:
		l.inMu.Lock()
		defer l.inMu.Unlock()
		if !l.ended.Load() {
			l.unreachable(n.Address, n.Code)
		}
	}
}

// tell sends a notice. A lost one is repeated by need: the full header comes
// again, the unknown context too.
func (p *plane) tell(n wire.Notice) {
	if room := p.room.Load(); room != nil {
		b := buffers.Get().(*[]byte)
		*b = n.Append((*b)[:0])
		room.Send(*b)
		buffers.Put(b)
	}
}
