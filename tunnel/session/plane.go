package session

import (
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"culvert/tunnel"
	"culvert/tunnel/bulk"
	"culvert/tunnel/media"
	"culvert/tunnel/wire"
)

// A plane is the datagram side of one session at one end: contexts in both
// directions, the legs of its associations, and the ways that records can go.
// The path of a datagram:
//
//	 leg.send                                    plane.receive
//	1 find the context for the address          6 parse the record
//	2 number it                                  7 learn or look up the context, answer it
//	3 write header and payload once              8 drop duplicates by number
//	4 the way that Use names, for sound two      9 leg.deliver
//	5 Room: send, wait, or drop
type plane struct {
	age    time.Duration
	drops  *media.Drops
	origin time.Time // of the clock in reports
	// open makes the leg of an association that is new here; nil: none can be
	// (the near end). It is called on a reading goroutine.
	open func(id uint32, held bool) *leg
	// live says whether a channel is live (the near end), and tells it what the
	// peer says (the far end).
	live   func() bool
	told   func(live bool)
	heard  atomic.Bool // what told was last given
	pacer  *bulk.Pacer
	proved func() // something about a way is new; the near end. May be nil

	using  atomic.Pointer[using]
	moved  atomic.Uint64 // datagrams, both ways
	course *course

	reports reports
	cutter  media.Cutter
	joiner  media.Joiner

	changing sync.Mutex // spans addWay and removeWay: lanes end while the session does

	mu   sync.RWMutex // guards the fields below
	ways [wire.WaysEnd]*way
	said wire.Use
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

// using is where records go; by also only sound, STUN and RTCP. also may be nil.
type using struct{ first, also *way }

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

	line media.Line // its standing in the rooms

	mu     sync.Mutex // guards number, out, last
	number uint16
	out    map[tunnel.Target]*outContext
	last   *outContext

	learned map[uint16]struct{} // contexts of the peer that stand for this leg; guarded by plane.mu

	inMu   sync.Mutex // guards window and spans deliver, so that ended can wait for it
	window media.Window
	ended  atomic.Bool
}

func newPlane(age time.Duration, drops *media.Drops, pacer *bulk.Pacer) *plane {
	p := &plane{
		course: &course{origin: time.Now()}, age: age, drops: drops, pacer: pacer, origin: time.Now(), lost: map[string]uint64{},
		legs: map[uint32]*leg{}, in: map[uint16]inContext{}, out: map[uint16]*outContext{},
	}
	p.reports.plane, p.joiner.Drops = p, drops
	return p
}

// clock is the time as reports tell it.
func (p *plane) clock(now time.Time) uint32 { return uint32(now.Sub(p.origin).Microseconds()) }

// isLive reports whether a channel is live, as the near end knows and tells.
func (p *plane) isLive() bool {
	if p.live != nil {
		return p.live()
	}
	return p.heard.Load()
}

// addWay adds a transport to a kind of way.
func (p *plane) addWay(kind wire.Way, t tunnel.Way) {
	p.changing.Lock()
	defer p.changing.Unlock()
	p.mu.Lock()
	y := p.ways[kind]
	if y == nil {
		y = newWay(p, kind)
		p.ways[kind] = y
	}
	p.mu.Unlock()
	if p.using.Load() == nil {
		p.choose() // before anything comes by it, which may be answered at once
	}
	y.add(t)
	p.choose()
}

// removeWay takes a transport back. One that is not there is not missed.
func (p *plane) removeWay(kind wire.Way, t tunnel.Way) {
	p.changing.Lock()
	defer p.changing.Unlock()
	p.mu.Lock()
	y := p.ways[kind]
	p.mu.Unlock()
	if y == nil || y.remove(t) > 0 {
		return
	}
	p.mu.Lock()
	p.ways[kind] = nil
	p.mu.Unlock()
	p.choose()
	y.room.Discard()
	p.course.vain.Add(y.passage.since(&y.passage.heard))
}

// close takes all ways out and ends the reports.
func (p *plane) close() {
	for kind, y := range p.allWays() {
		if y == nil {
			continue
		}
		for _, t := range y.transports() {
			p.removeWay(wire.Way(kind), t)
		}
	}
	p.reports.end()
}

func (p *plane) allWays() [wire.WaysEnd]*way {
	p.mu.RLock()
	defer p.mu.RUnlock()
	return p.ways
}

// transports returns those of a kind.
func (p *plane) transports(kind wire.Way) []tunnel.Way {
	p.mu.RLock()
	y := p.ways[kind]
	p.mu.RUnlock()
	if y == nil {
		return nil
	}
	return y.transports()
}

// say sets how datagrams go, at the near end, which decides.
func (p *plane) say(first, also wire.Way) {
	p.mu.Lock()
	p.said = wire.Use{N: p.said.N + 1, Way: first, Also: also}
	p.mu.Unlock()
	p.choose()
}

// obey takes what the near end says, at the far end.
func (p *plane) obey(u wire.Use) {
	p.mu.Lock()
	news := p.open != nil && u.N != 0 && (p.said.N == 0 || int32(u.N-p.said.N) > 0)
	if news {
		p.said = u
	}
	p.mu.Unlock()
	if news {
		p.choose()
	}
}

// unproved is the order in which ways are used that nobody has decided on:
// sealed packets are used only when they have been seen to arrive.
var unproved = [...]wire.Way{wire.WayDatagram, wire.WayLanes, wire.WaySealed}

// choose finds the ways for what was said last.
func (p *plane) choose() {
	p.mu.RLock()
	defer p.mu.RUnlock()
	find := func(k wire.Way) *way {
		if k >= wire.WaysEnd {
			return nil // of a newer minor version
		}
		return p.ways[k]
	}
	u := &using{first: find(p.said.Way), also: find(p.said.Also)}
	for _, k := range unproved {
		if u.first == nil {
			u.first = p.ways[k]
		}
	}
	if u.also == u.first {
		u.also = nil
	}
	if u.first == nil {
		u = nil
	}
	p.using.Store(u)
}

// retire keeps the counts of a transport that is no longer in use.
func (p *plane) retire(t tunnel.Way) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for reason, n := range t.Lost() {
		p.lost[reason] += n
	}
}

// lostTo adds what the session's ways have lost, by reason.
func (p *plane) lostTo(m map[string]uint64) {
	for _, y := range p.allWays() {
		if y == nil {
			continue
		}
		for _, t := range y.transports() {
			for reason, n := range t.Lost() {
				m[reason] += n
			}
		}
	}
	p.mu.RLock()
	defer p.mu.RUnlock()
	for reason, n := range p.lost {
		m[reason] += n
	}
}

// state tells what is known about a way.
func (p *plane) state(kind wire.Way) WayState {
	p.mu.RLock()
	y := p.ways[kind]
	p.mu.RUnlock()
	if y == nil {
		return WayState{}
	}
	return y.state(time.Now())
}

// add takes in a leg of this plane. It may be sending already.
func (p *plane) add(l *leg) *leg {
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

// keptBuffer is the largest buffer that goes back into the pool.
const keptBuffer = 4096

var buffers = sync.Pool{New: func() any { b := make([]byte, 0, 2048); return &b }}

// send sends one datagram. The error is tunnel.ErrTooLarge or net.ErrClosed.
func (l *leg) send(payload []byte, at tunnel.Target) error {
	if l.ended.Load() {
		return net.ErrClosed
	}
	p := l.plane
	u := p.using.Load()
	if u == nil {
		p.drops.Add(media.NoWay)
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
	record := *b
	payload = record[len(record)-len(payload):]
	err := u.first.send(&l.line, record, payload)
	if u.also != nil && (err != nil || l.line.Vital(payload)) {
		again := u.also.send(&l.line, record, payload)
		if err == nil && again == nil {
			u.first.passage.twice.Add(1)
			u.also.passage.twice.Add(1)
		}
		if err != nil {
			err = again
		}
	}
	if cap(*b) <= keptBuffer {
		buffers.Put(b)
	}
	p.moved.Add(1)
	p.reports.begin()
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

// receive takes one record from a way, on its reading goroutine.
func (p *plane) receive(y *way, record []byte) {
	h, payload, notice, isNotice, err := wire.ParseRecord(record)
	switch {
	case err != nil:
		p.drops.Add(media.Malformed)
		return
	case isNotice:
		p.notice(y, notice)
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
	case !p.course.fresh(&l.window, h.Number):
		p.drops.Add(media.Duplicate)
	default:
		l.deliver(payload, at)
		p.moved.Add(1)
		p.reports.begin()
	}
}

// learn finds or makes the leg of a full header, and its context.
func (p *plane) learn(h wire.Header) *leg {
	p.mu.RLock()
	l := p.legs[h.Association]
	p.mu.RUnlock()
	if l == nil && p.open != nil {
		if l = p.open(h.Association, h.Held); l == nil {
			return nil // which has been counted
		}
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

func (p *plane) notice(y *way, n wire.Notice) {
	switch {
	case n.Report != nil:
		p.obey(n.Report.Use)
		if p.told != nil {
			p.told(n.Report.Live)
			p.heard.Store(n.Report.Live)
			if n.Report.Live {
				p.reports.begin()
			}
		}
		p.reports.often(n.Report.Often)
		y.report(n.Report, time.Now())
		return
	case n.Probe != nil:
		p.obey(n.Probe.Use)
		y.answer(n.Probe)
		return
	case n.Answer != nil:
		y.answered(n.Answer)
		return
	case n.Fragment.Count > 0:
		if whole := p.joiner.Take(n.Fragment, time.Now()); whole != nil && !wire.IsNotice(whole) {
			p.receive(y, whole)
		}
		return
	}
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
	if u := p.using.Load(); u != nil {
		b := buffers.Get().(*[]byte)
		*b = n.Append((*b)[:0])
		u.first.room.Send(nil, *b, nil)
		buffers.Put(b)
	}
}

// queueing takes a measurement of the queueing in our outgoing direction, and
// whether media is held back there.
func (p *plane) queueing(y *way, now time.Time, d time.Duration, held bool) {
	if u := p.using.Load(); u != nil && u.first == y {
		p.pacer.Delay(now, d, held)
	}
}
