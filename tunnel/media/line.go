package media

import (
	"sync"
	"sync/atomic"
	"time"
)

const (
	// smallMean and slowRate are what sound stays below: the mean size of its
	// packets in bytes, and packets a second.
	smallMean = 300
	slowRate  = 100

	// A flow is judged every judgeEvery packets, once they span judgeAfter or
	// are judgeAtMost: a burst alone is no rate.
	judgeEvery  = 16
	judgeAtMost = 64
	judgeAfter  = 500 * time.Millisecond

	// maxFlows bounds the SSRCs known of one association, maxProbation those
	// among them that have not yet shown that they are one.
	maxFlows     = 16
	maxProbation = 4
	// sequential is how many sequence numbers in a row make an SSRC (RFC 3550
	// appendix A.1 asks for two), and maxStep how far each may be from the last.
	sequential = 3
	maxStep    = 64

	// maxShed is how many packets may still be shed of one RTP timestamp: a
	// bound for what only looks like RTP.
	maxShed = 1024

	// maxSeats bounds the rooms that a line remembers its standing in.
	maxSeats = 4
	// meterMoves is how many datagrams a line sends into another room alone
	// before it is measured there.
	meterMoves = 8
)

// A Line is one association's standing: what its streams are, where it waits
// and what was dropped of it. The zero value is ready; it must not be copied.
// It may be used with several rooms, concurrently. It takes about half a
// kilobyte, and at most three while it carries many SSRCs.
type Line struct {
	drops Drops

	mu     sync.Mutex // guards the fields below; never held over a room's
	rest   flow       // what belongs to no SSRC; its class is the association's
	flows  []*flow    // by SSRC
	seats  *seat      // the latest used first
	meter  *Room      // where it is measured: the copies in other rooms are not counted
	aside  uint8      // datagrams for other rooms since one for meter
	counts uint32     // datagrams looked at, to tell which flow is oldest
}

// Dropped returns what the rooms have dropped of this association, by reason.
func (l *Line) Dropped() map[string]uint64 {
	m := map[string]uint64{}
	l.drops.AddTo(m)
	return m
}

// A flow is what a class belongs to: an SSRC, or all else of an association.
type flow struct {
	waiting atomic.Int32 // its packets that wait, in all rooms: while there are any it can not be reused
	// where is the room and class in which it last had to wait. Guarded by no
	// lock: each room compares it with its own, and looks closer when it differs.
	where atomic.Uint32
	// shed is the RTP timestamp (32 bits), room (16) and number of packets (16)
	// that are still to be dropped when they come.
	shed atomic.Uint64
	// begun is the RTP timestamp that a shaped room has last begun to send, and a 1.
	begun atomic.Uint64

	// Guarded by the line's mu.
	ssrc   uint32
	time   uint32
	seq    uint16
	steps  uint8  // sequence numbers in a row
	moved  bool   // its timestamp has changed
	proven bool   // an SSRC of its own
	judged bool   // high is more than a guess
	high   bool   // its class; a room lets what waits follow when it changes
	used   uint32 // Line.counts when it was seen last
	meter  meter
}

// A meter measures size and rate.
type meter struct {
	since          time.Time // of the first packet
	packets, bytes uint32
}

// add counts a packet of n bytes and tells, now and then, the class.
func (m *meter) add(n int) (high, judged bool) {
	if m.packets == 0 {
		m.since = time.Now()
	}
	m.packets++
	m.bytes += uint32(n)
	if m.packets%judgeEvery != 0 {
		return false, false
	}
	took := time.Since(m.since)
	small := m.small()
	if small && took < judgeAfter && m.packets < judgeAtMost {
		return false, false
	}
	high = small && float64(m.packets-1) < slowRate*took.Seconds()
	*m = meter{}
	return high, true
}

func (m *meter) small() bool { return m.bytes < smallMean*m.packets }

// measure counts a packet. The first ones give a class by their size alone.
func (f *flow) measure(n int) {
	if high, judged := f.meter.add(n); judged {
		f.high, f.judged = high, true
	} else if !f.judged {
		f.high = f.meter.small()
	}
}

// A mark is what a room needs to know of a datagram.
type mark struct {
	flow *flow // what its class belongs to; nil: none, and always high
	may  *flow // an SSRC that it may prove to belong to; nil: none
	high bool
	rtp  bool   // time is its timestamp
	time uint32 // RTP timestamp
}

// waits counts the datagram among those that wait, or no longer.
func (m *mark) waits(n int32) {
	if m.flow != nil {
		m.flow.waiting.Add(n)
	}
	if m.may != nil {
		m.may.waiting.Add(n)
	}
}

// settle has the mark of a waiting datagram belong to the SSRC of m, if that
// is what it may belong to and m says that it is one.
func (m *mark) settle(by *mark) {
	if m.may != nil && m.may == by.flow {
		m.flow.waiting.Add(-1)
		m.flow, m.may, m.high = by.flow, nil, by.high
	}
}

// look reads, measures and classifies a datagram that is about to enter r.
func (l *Line) look(r *Room, p []byte) mark {
	h := read(p)
	if h.kind == control {
		return mark{high: true}
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.counts++
	count := l.meteredLocked(r)
	m := mark{flow: &l.rest}
	if h.kind == stream {
		f := l.flowLocked(h.ssrc)
		f.used = l.counts
		if count {
			f.follow(h, len(p))
		}
		if f.proven {
			return mark{flow: f, high: f.high, rtp: true, time: h.time}
		}
		m.may = f
	}
	if count {
		l.rest.measure(len(p))
	}
	m.high = l.rest.high
	return m
}

// Vital reports whether a datagram, which a room has just been given, is sound,
// STUN or RTCP, by what is known of its line so far: little enough that sending
// it twice costs a path next to nothing, and what a call misses first. p is
// borrowed.
func (l *Line) Vital(p []byte) bool {
	h := read(p)
	if h.kind == control {
		return true
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if h.kind == stream {
		for _, f := range l.flows {
			if f.ssrc == h.ssrc && f.proven {
				return f.high
			}
		}
	}
	return l.rest.high
}

// meteredLocked says whether a datagram for r counts: while datagrams are sent
// twice, into two rooms, only one of them does.
func (l *Line) meteredLocked(r *Room) bool {
	if l.meter == r {
		l.aside = 0
		return true
	}
	if l.aside++; l.meter != nil && l.aside <= meterMoves {
		return false
	}
	l.meter, l.aside = r, 0
	return true
}

// flowLocked finds or begins the flow of an SSRC.
func (l *Line) flowLocked(ssrc uint32) *flow {
	probation := 0
	var oldest, oldestProbation = -1, -1
	for i, f := range l.flows {
		if f.ssrc == ssrc {
			return f
		}
		if oldest < 0 || l.counts-f.used > l.counts-l.flows[oldest].used {
			oldest = i
		}
		if !f.proven {
			probation++
			if oldestProbation < 0 || l.counts-f.used > l.counts-l.flows[oldestProbation].used {
				oldestProbation = i
			}
		}
	}
	at := oldest
	if oldestProbation >= 0 {
		at = oldestProbation
	}
	switch {
	case probation < maxProbation && len(l.flows) < maxFlows:
		l.flows = append(l.flows, &flow{ssrc: ssrc})
		return l.flows[len(l.flows)-1]
	case l.flows[at].waiting.Load() > 0: // its packets keep the old one
		l.flows[at] = &flow{ssrc: ssrc}
	default:
		l.flows[at].begin(ssrc)
	}
	return l.flows[at]
}

// begin makes the flow another SSRC's.
func (f *flow) begin(ssrc uint32) {
	f.shed.Store(0)
	f.begun.Store(0)
	f.where.Store(0)
	f.ssrc, f.time, f.seq, f.steps, f.meter = ssrc, 0, 0, 0, meter{}
	f.moved, f.proven, f.judged, f.high = false, false, false, false
}

// follow takes a packet's header into account.
func (f *flow) follow(h head, n int) {
	if !f.proven && f.meter.packets > 0 {
		if step := h.seq - f.seq; step == 0 || step > maxStep {
			f.steps = 0
		} else {
			f.steps++
		}
		f.moved = f.moved || h.time != f.time
		f.proven = f.steps >= sequential && f.moved
	}
	f.seq, f.time = h.seq, h.time
	f.measure(n)
}

// shedRest has the rest of a timestamp dropped when it comes into room r.
func (f *flow) shedRest(time uint32, r *Room) {
	f.shed.Store(uint64(time)<<32 | uint64(r.id)<<16 | maxShed)
}

// sheds says whether a packet that comes into room r is the rest of a
// timestamp that is shed there.
func (m *mark) sheds(r *Room) bool {
	if !m.rtp {
		return false
	}
	s := m.flow.shed.Load()
	if s&0xffff == 0 || uint16(s>>16) != r.id {
		return false
	}
	if uint32(s>>32) != m.time {
		// The next timestamp has begun. A reordered straggler of the old one is
		// worthless but harmless.
		m.flow.shed.CompareAndSwap(s, 0)
		return false
	}
	m.flow.shed.CompareAndSwap(s, s-1)
	return true
}

// seat returns the line's place in room r.
func (l *Line) seat(r *Room) *seat {
	l.mu.Lock()
	defer l.mu.Unlock()
	n, last := 0, &l.seats
	for at := &l.seats; *at != nil; at = &(*at).older {
		if s := *at; s.room == r {
			*at = s.older
			s.older, l.seats = l.seats, s
			return s
		}
		n, last = n+1, at
	}
	if n == maxSeats {
		*last = nil // what waits there still leaves
	}
	l.seats = &seat{room: r, line: l, older: l.seats}
	return l.seats
}
