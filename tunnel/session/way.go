package session

import (
	"errors"
	"math"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"culvert/tunnel"
	"culvert/tunnel/media"
	"culvert/tunnel/wire"
)

// A way is one of a session's ways for datagrams at one end: the room in front
// of it, and what is known about it from records and reports.
type way struct {
	plane *plane
	kind  wire.Way
	room  *media.Room

	sent      atomic.Uint32 // records given to the transport
	sentBytes atomic.Uint64
	offered   atomic.Uint64 // bytes of datagrams' records that were to be sent
	received  atomic.Uint32 // records that came
	bytes     atomic.Uint64 // of received
	passage   passage

	mu      sync.Mutex // guards the fields below
	outlets []*outlet
	heard   uint32    // received, at the last look
	heardAt time.Time // the look by which the last record had come
	in      incoming
	out     outgoing
	probes  probes
	loaded  loaded
	breaker *media.Breaker // nil on QUIC DATAGRAM, which has a congestion control of its own
}

// incoming is what this end sees of the records that come, for its reports.
type incoming struct {
	base     media.Base
	echo     uint32 // Time of the peer's last report
	echoAt   time.Time
	since    time.Time // when the measured span began
	sent     uint32    // the peer's Sent, and what had been received, at that time
	records  uint32
	lost     uint16 // in the last span
	rate     uint32 // kbit/s, in the last span
	marks    marks
	by       numbered // what numbers the packets that are counted; nil: nothing does
	strained bool     // the peer's circuit breaker wants another way
	delay    time.Duration
	delayed  bool // delay has been measured since our last report
}

// outgoing is what the peer says of the records that we send.
type outgoing struct {
	at     time.Time // when the last report came
	since  time.Time // when the span of sent began
	sent   uint64    // bytes
	rate   float64   // bits/s sent in the last span
	rtt    time.Duration
	lost   float64
	delay  time.Duration
	base   media.Base // of delay
	bad    bool       // the circuit breaker wants another way
	shaped bool       // the circuit breaker holds us back

	// Of lanes, whose TCP is asked instead of the peer.
	still   time.Time // since when nothing has arrived; zero: something has
	weighed time.Time // when wanted was last measured
	offered uint64    // bytes that were to be sent by then
	wanted  float64   // bits/s
}

// largeProbe bounds a large probe on ways that take much more than a packet.
const largeProbe = 1400

// lossy is the loss from which on packets may be lost for their length.
const lossy = 0.03

// lossyDelay is the queueing from which on losses are those of a full queue.
const lossyDelay = 20 * time.Millisecond

// gross is the loss from which on what the rates say of it counts.
const gross = 0.5

// span is the shortest time over which losses and rates are counted.
const span = 200 * time.Millisecond

// standstill is how long nothing arrives by lanes of a path that is dead, and not
// slow. When it is alive again nothing is known of what it carries: a rate that was
// lowered meanwhile would hold the call back for seconds.
const standstill = 600 * time.Millisecond

// quietRecords are fewer than pass in a second of any media: where the peer's
// reports fail to come for longer, they are lost rather than not sent.
const quietRecords = 16

// An outlet counts what a transport takes.
type outlet struct {
	tunnel.Way
	of *way
}

func (o *outlet) Send(p []byte) error {
	err := o.Way.Send(p)
	if err == nil {
		o.of.sent.Add(1)
		o.of.sentBytes.Add(uint64(len(p)))
		if !wire.IsNotice(p) {
			o.of.passage.sent.Add(1)
		}
	}
	return err
}

// Stalled lets the room ask a lane.
func (o *outlet) Stalled() bool {
	s, ok := o.Way.(interface{ Stalled() bool })
	return ok && s.Stalled()
}

// Overdue lets the room ask a lane what is not known to have arrived.
func (o *outlet) Overdue(again func(p []byte, since time.Time) bool) bool {
	l, ok := o.Way.(interface {
		Overdue(func([]byte, time.Time) bool) bool
	})
	return ok && l.Overdue(again)
}

// Resend lets the room send a copy of what another lane took at since.
func (o *outlet) Resend(p []byte, since time.Time) error {
	l, ok := o.Way.(interface {
		Resend([]byte, time.Time) error
	})
	if !ok {
		return tunnel.ErrBlocked
	}
	err := l.Resend(p, since)
	if err == nil {
		o.of.sent.Add(1)
		o.of.sentBytes.Add(uint64(len(p)))
	}
	return err
}

func newWay(p *plane, kind wire.Way) *way {
	y := &way{plane: p, kind: kind, room: media.NewRoom(p.age, p.drops)}
	if kind != wire.WayDatagram {
		y.breaker = media.NewBreaker()
	}
	return y
}

func (y *way) add(t tunnel.Way) {
	o := &outlet{t, y}
	y.mu.Lock()
	y.outlets = append(y.outlets, o)
	y.mu.Unlock()
	y.room.Add(o, y.receive)
}

// remove takes a transport out, if it is there, and returns how many are left.
func (y *way) remove(t tunnel.Way) int {
	y.mu.Lock()
	i := slices.IndexFunc(y.outlets, func(o *outlet) bool { return o.Way == t })
	var gone *outlet
	if i >= 0 {
		gone = y.outlets[i]
		y.outlets = slices.Delete(y.outlets, i, i+1)
	}
	left := len(y.outlets)
	y.mu.Unlock()
	if gone != nil {
		y.room.Remove(gone)
		y.plane.retire(t)
	}
	return left
}

// transports returns what the way sends on at the moment.
func (y *way) transports() []tunnel.Way {
	y.mu.Lock()
	defer y.mu.Unlock()
	all := make([]tunnel.Way, len(y.outlets))
	for i, o := range y.outlets {
		all[i] = o.Way
	}
	return all
}

// send sends a record, in pieces where it is too long for the way in one.
func (y *way) send(l *media.Line, record, payload []byte) error {
	y.offered.Add(uint64(len(record)))
	err := y.room.Send(l, record, payload)
	if !errors.Is(err, tunnel.ErrTooLarge) {
		return err
	}
	err = y.plane.cutter.Cut(record, y.room.Max(), func(piece []byte) error { return y.room.Send(l, piece, payload) })
	if errors.Is(err, tunnel.ErrTooLarge) {
		y.plane.drops.Add(media.TooLarge)
	}
	return err
}

// receive takes one record from a transport, on its reading goroutine.
func (y *way) receive(record []byte) {
	if !wire.IsOwnProbe(record) { // which the peer has not counted either
		y.received.Add(1)
		y.bytes.Add(uint64(len(record)))
	}
	y.passage.heard.Store(y.passage.alone())
	y.plane.receive(y, record)
}

// numbered is a transport that numbers its packets, as sealed ones are.
type numbered interface {
	Arrivals() media.Arrivals
	Departed(number uint32) (us uint32, ok bool)
}

// numberedLocked returns the way's transport, if that numbers its packets and is
// the only one.
func (y *way) numberedLocked() numbered {
	if len(y.outlets) != 1 {
		return nil
	}
	n, _ := y.outlets[0].Way.(numbered)
	return n
}

// departedLocked returns when the packet left here that the peer has seen last.
func (y *way) departedLocked(r *wire.Report) (us uint32, ok bool) {
	if y.in.by == nil || r.Held == wire.NothingSeen {
		return 0, false
	}
	return y.in.by.Departed(r.Seen)
}

// look notes what has come so far, as often as reports may be sent. It returns
// whether so much is lost that the peer should know at once.
func (y *way) look(now time.Time) (trouble bool) {
	y.mu.Lock()
	defer y.mu.Unlock()
	y.hearLocked(now)
	in, m := &y.in, mark{at: now, bytes: y.bytes.Load()}
	if by := y.numberedLocked(); by != in.by { // others' numbers
		in.by, in.marks, in.lost = by, marks{}, 0
		y.out.base = media.Base{}
	}
	if in.by != nil {
		a := in.by.Arrivals()
		m.sent, m.came = a.Sent, a.Came
	}
	from := in.marks.before(m)
	in.marks.add(m)
	if from.at.IsZero() {
		in.rate = 0
		return false
	}
	in.rate = uint32(min(float64(m.bytes-from.bytes)*8/1000/now.Sub(from.at).Seconds(), math.MaxUint32))
	if in.by == nil {
		if y.kind == wire.WayLanes {
			y.weighLocked(now)
		}
		return false
	}
	sent, came := m.sent-from.sent, m.came-from.came
	in.lost = lostOf(sent, came)
	return in.lost > troubleLost && sent-came >= troubleLeast
}

// laden is a transport whose congestion control tells how much passes, as lanes'.
type laden interface {
	Load() (rate float64, queue time.Duration, ok bool)
}

// weighLocked has the breaker judge lanes by what TCP says of them: what their
// congestion control holds back is not lost, so no report tells of it.
func (y *way) weighLocked(now time.Time) {
	out, seen := &y.out, media.Seen{Yields: y.plane.pacer.Gives()}
	known := false
	held, told := 0.0, 0.0
	for _, o := range y.outlets {
		if l, ok := o.Way.(laden); ok {
			rate, queue, ok := l.Load()
			seen.Received += rate
			if ok {
				known = true
				told += rate
				held += rate * queue.Seconds()
			}
		}
	}
	if told > 0 { // of a usual byte: a lane by which hardly anything goes knows little
		seen.Delay = time.Duration(held / told * float64(time.Second))
	}
	offered := y.offered.Load()
	if took := now.Sub(out.weighed); took >= span {
		out.wanted = float64(offered-out.offered) * 8 / took.Seconds()
		out.weighed, out.offered = now, offered
	}
	switch {
	case seen.Received == 0 && out.still.IsZero():
		out.still = now
	case seen.Received == 0:
	case !out.still.IsZero() && now.Sub(out.still) >= standstill:
		y.breaker = media.NewBreaker()
		fallthrough
	default:
		out.still = time.Time{}
	}
	if !known {
		return
	}
	seen.Sent = out.wanted
	var rate float64
	out.bad, rate = y.breaker.Report(now, seen)
	out.shaped = rate > 0
	y.room.Shape(rate)
}

const (
	// From this loss on, of this many records, reports go often: a tenth, from
	// which on the circuit breaker may have to act.
	troubleLost  = math.MaxUint16 / 10
	troubleLeast = 5
)

// A mark is what had come at a time.
type mark struct {
	at         time.Time
	bytes      uint64
	sent, came uint32 // packets, where they are numbered
}

// marks are the last ones, the newest first.
type marks [8]mark

const (
	// shortSpan is enough to count losses in, where manyInIt packets are.
	shortSpan = 100 * time.Millisecond
	manyInIt  = 20
)

// before returns the mark to reckon from until now; zero: there is none.
func (s *marks) before(now mark) (from mark) {
	for _, m := range s {
		took := now.at.Sub(m.at)
		switch {
		case m.at.IsZero() || took > 4*reportEvery: // media was quiet
			return from
		case took >= span, took >= shortSpan && now.sent-m.sent >= manyInIt:
			return m
		}
	}
	return from
}

func (s *marks) add(m mark) {
	copy(s[1:], s[:])
	s[0] = m
}

// tick reports what this end sees.
func (y *way) tick(now time.Time, use wire.Use, live, often bool) {
	for _, t := range y.transports() {
		if t, ok := t.(interface{ Tick(time.Time) }); ok {
			t.Tick(now)
		}
	}
	y.mu.Lock()
	r := wire.Report{
		Use: use, Live: live, Often: often, Strained: y.out.bad, Time: y.plane.clock(now), Sent: y.sent.Load() + 1,
		Lost: y.in.lost, Rate: y.in.rate, Delay: wire.NoDelay, Held: wire.NothingSeen,
	}
	if y.in.by != nil {
		if a := y.in.by.Arrivals(); !a.SeenAt.IsZero() && now.Sub(a.SeenAt) < reportGone {
			r.Seen, r.Held = a.Seen, uint32(max(0, now.Sub(a.SeenAt)).Microseconds())
		}
	}
	if !y.in.echoAt.IsZero() {
		r.Echo = max(1, y.in.echo+uint32(now.Sub(y.in.echoAt).Microseconds()))
	}
	if y.in.delayed {
		r.Delay = uint16(min(y.in.delay/wire.DelayUnit, wire.NoDelay-1))
		y.in.delayed = false
	}
	if y.kind == wire.WaySealed && now.Sub(y.out.at) > 2*reportEvery {
		y.breaker.Silence(now)
	}
	y.mu.Unlock()
	b := buffers.Get().(*[]byte)
	*b = r.Append((*b)[:0])
	y.room.Send(nil, *b, nil)
	buffers.Put(b)
}

// hearLocked notes whether records have come since the last look.
func (y *way) hearLocked(now time.Time) {
	if n := y.received.Load(); n != y.heard {
		y.heard, y.heardAt = n, now
	}
}

// bad reports whether the circuit breaker is at work: it needs to hear often.
func (y *way) bad() bool {
	y.mu.Lock()
	defer y.mu.Unlock()
	return y.out.bad
}

// overdue reports whether the peer's next report fails to come.
func (y *way) overdue(now time.Time) bool {
	y.mu.Lock()
	defer y.mu.Unlock()
	late := now.Sub(y.out.at)
	return len(y.outlets) > 0 && !y.out.at.IsZero() && late > reportDue && late < reportGone
}

// report takes the peer's report about this way.
func (y *way) report(r *wire.Report, now time.Time) {
	y.mu.Lock()
	in := &y.in
	above := in.base.Above(now.Sub(y.plane.origin), r.Time)
	if !in.delayed || above < in.delay {
		in.delay, in.delayed = above, true
	}
	in.echo, in.echoAt, in.strained = r.Time, now, r.Strained
	records := y.received.Load()
	switch took := now.Sub(in.since); {
	case in.by != nil: // which is asked what was lost
	case in.since.IsZero(), took > 4*reportEvery && r.Sent-in.sent < quietRecords, took > reportGone: // media was quiet
		in.lost = 0
		in.since, in.sent, in.records = now, r.Sent, records
	case took >= span:
		in.lost = lostOf(r.Sent-in.sent, records-in.records)
		in.since, in.sent, in.records = now, r.Sent, records
	}

	out := &y.out
	fresh := !out.at.IsZero() && now.Sub(out.at) < 4*reportEvery
	out.at = now
	if r.Echo != 0 {
		out.rtt = time.Duration(y.plane.clock(now)-r.Echo) * time.Microsecond
	}
	out.lost = float64(r.Lost) / math.MaxUint16
	// How long a packet took that has come tells more than how long a report
	// took: where most is lost hardly a report comes.
	delayed := r.Delay != wire.NoDelay
	if left, ok := y.departedLocked(r); ok {
		out.delay, delayed = out.base.Over(now.Sub(y.plane.origin), r.Time-r.Held-left), true
	} else if delayed {
		out.delay = time.Duration(r.Delay) * wire.DelayUnit
	}
	sent := y.sentBytes.Load()
	if took := now.Sub(out.since); !fresh || took >= span {
		if fresh {
			out.rate = float64(sent-out.sent) * 8 / took.Seconds()
		}
		out.since, out.sent = now, sent
	}
	delay := out.delay
	if y.kind == wire.WaySealed && fresh {
		var rate float64
		out.bad, rate = y.breaker.Report(now, media.Seen{
			Sent: out.rate, Lost: out.lost, Received: float64(r.Rate) * 1000, Delay: out.delay, Yields: y.plane.pacer.Gives(),
		})
		out.shaped = rate > 0
		if l := y.breaker.Lost(); l > gross { // our reports are lost too, so the peer knows less of it
			out.lost = l
		}
		y.room.Shape(rate)
	}
	if out.lost < gross && r.Rate > 0 { // else the peer may know nothing new of what we send
		y.passage.proved.Store(y.passage.alone())
	}
	shaped := out.shaped
	// Behind a full queue it is not their length, and probes would make it longer.
	lossy := out.lost > lossy && out.delay < lossyDelay
	y.mu.Unlock()
	if lossy {
		for _, t := range y.transports() {
			if t, ok := t.(interface{ Doubt(time.Time) }); ok {
				t.Doubt(now)
			}
		}
	}
	if delayed {
		y.plane.queueing(y, now, delay, shaped)
	}
}

// lostOf is the loss among sent records in 65,535ths. Reordering around a
// report may make more arrive than were sent.
func lostOf(sent, received uint32) uint16 {
	if sent == 0 || sent > math.MaxInt32 || received >= sent {
		return 0
	}
	return uint16(uint64(sent-received) * math.MaxUint16 / uint64(sent))
}

// answer answers a probe on the way that it came by.
func (y *way) answer(r *wire.Probe) {
	a := wire.Answer{Nonce: r.Nonce, Size: uint16(min(r.Size, math.MaxUint16))}
	b := buffers.Get().(*[]byte)
	*b = a.Append((*b)[:0])
	if r.Full {
		*b = append(*b, padding[:max(0, min(r.Size, y.room.Max(), largeProbe)-len(*b))]...)
	}
	if r.Use.N == 0 { // of the way itself, at the other end: that takes the answer before it is counted
		for _, t := range y.transports() {
			t.Send(*b)
		}
	} else {
		y.room.Send(nil, *b, nil)
	}
	buffers.Put(b)
}

// padding is that of a full answer.
var padding [largeProbe]byte

// WayState is what is known about one way.
type WayState struct {
	Present    bool
	Transports int           // how many connections or flows serve it
	Max        int           // the longest record that it takes whole, in bytes
	Small      time.Time     // when a short probe was last answered; zero: never
	Large      time.Time     // when the longest was
	Heard      time.Time     // when a record was last known to have come: the time of the first look after it, and one is each 250 ms at least
	Reported   time.Time     // when the peer last reported about it
	RTT        time.Duration // of reports; 0: not known
	Lost       float64       // of what we send, 0 to 1, in the last report
	Delay      time.Duration // of what we send above the shortest of late, in the last report
	Bad        bool          // the circuit breaker of either end wants another way
	Shaped     bool          // the circuit breaker holds what we send back
	Rate       float64       // bits/s that go by it, the larger of both directions
	Carried    int           // full probes of the last load that were answered
	Unheard    uint64        // datagrams sent by it alone since a record last came by it
	Unproved   uint64        // the same, since the peer last showed that they arrive
}

func (y *way) state(now time.Time) WayState {
	y.mu.Lock()
	defer y.mu.Unlock()
	y.hearLocked(now)
	s := WayState{
		Present: len(y.outlets) > 0, Transports: len(y.outlets), Max: y.room.Max(), Heard: y.heardAt, Reported: y.out.at,
		RTT: y.out.rtt, Lost: y.out.lost, Delay: y.out.delay, Bad: y.out.bad || y.in.strained, Shaped: y.out.shaped,
	}
	s.Small, s.Large = y.probes.small, y.probes.large
	s.Rate = max(y.out.rate, float64(y.in.rate)*1000)
	s.Carried = y.loaded.carried
	s.Unheard, s.Unproved = y.passage.since(&y.passage.heard), y.passage.since(&y.passage.proved)
	return s
}

// probes are those that have not been answered yet, and what has been answered.
type probes struct {
	nonces [8]uint64 // a ring
	sizes  [8]int
	next   int
	small  time.Time
	large  time.Time
}

// probe asks whether records arrive by this way and back: a short one, or the
// longest that the way takes whole. The near end does.
func (y *way) probe(large bool, use wire.Use) {
	r := wire.Probe{Use: use, Nonce: rand.Uint64(), Size: wire.MinProbe}
	if large {
		r.Size = max(r.Size, min(y.room.Max(), largeProbe))
	}
	y.mu.Lock()
	y.probes.nonces[y.probes.next], y.probes.sizes[y.probes.next] = r.Nonce, r.Size
	y.probes.next = (y.probes.next + 1) % len(y.probes.nonces)
	y.mu.Unlock()
	y.room.Send(nil, r.Append(nil), nil)
}

// answered takes the answer to a probe.
func (y *way) answered(a *wire.Answer) {
	now := time.Now()
	y.mu.Lock()
	if y.loaded.takes(a) {
		y.mu.Unlock()
		return
	}
	i := slices.Index(y.probes.nonces[:], a.Nonce)
	if i >= 0 && y.probes.sizes[i] > 0 && int(a.Size) == y.probes.sizes[i] {
		y.heardAt = now
		y.passage.proved.Store(y.passage.alone())
		if y.probes.sizes[i] > wire.MinProbe {
			y.probes.large = now
		}
		y.probes.small = now
		y.probes.sizes[i] = 0
	} else {
		i = -1
	}
	y.mu.Unlock()
	if i >= 0 && y.plane.proved != nil {
		y.plane.proved()
	}
}

// loaded is a load of probes, which shows whether a way carries what a call
// sends. All of them have one nonce but for the last 16 bits, which count.
type loaded struct {
	nonce   uint64 // 0: there was none
	size    int    // of each, and of each answer
	asked   int
	carried int
	came    [maxLoad / 64]uint64 // bits, of each probe
}

// maxLoad bounds the probes of one load.
const maxLoad = 1 << 12

// takes takes the answer to one of them.
func (l *loaded) takes(a *wire.Answer) bool {
	n := int(a.Nonce & 0xffff)
	if l.nonce == 0 || a.Nonce&^0xffff != l.nonce || n >= l.asked || int(a.Size) != l.size {
		return false
	}
	if bit := uint64(1) << (n % 64); l.came[n/64]&bit == 0 {
		l.came[n/64] |= bit
		l.carried++
	}
	return true
}

// load sends n more probes as long as the way takes, with answers as long;
// begin: another load begins with them.
func (y *way) load(n int, begin bool, use wire.Use) {
	y.mu.Lock()
	l := &y.loaded
	if begin {
		*l = loaded{nonce: rand.Uint64() &^ 0xffff, size: max(wire.MinProbe+1, min(y.room.Max(), largeProbe))}
	}
	n = min(n, maxLoad-l.asked)
	r := wire.Probe{Use: use, Nonce: l.nonce + uint64(l.asked), Size: l.size, Full: true}
	l.asked += n
	y.mu.Unlock()
	for range n {
		y.room.Send(nil, r.Append(nil), nil)
		r.Nonce++
	}
}
