package media

import (
	"errors"
	"math"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"culvert/tunnel"
)

// MaxAge is how long a datagram may wait by default. A later one is as bad as
// lost to a call.
const MaxAge = 150 * time.Millisecond

const (
	// maxWaiting bounds a room's memory, in bytes of buffers. At 150 ms it is
	// reached above 150 Mbit/s of media on a way that can not take it.
	maxWaiting = 4 << 20
	// quantum is what an association may send in its turn, in bytes.
	quantum = 1500
	// patience is how long an association stays with a blocked outlet.
	patience = 20 * time.Millisecond
	// doubling is how long small packets go twice after their outlet stalled.
	doubling = 200 * time.Millisecond
	// burst is what a shaped room may send at once: so much of its rate, or a packet.
	burst = 20 * time.Millisecond
	// soundLeaves is the part of a shaped rate that pictures are reckoned to get.
	soundLeaves = 0.85
	// lookEvery is how often lanes are asked what is overdue, while something is sent.
	lookEvery = 5 * time.Millisecond
	// maxFresh is how long what an outlet last said of its Max is believed.
	maxFresh = 100 * time.Millisecond
)

// The classes, in the order in which they are served.
const (
	high = iota
	low
	classes
)

// A Room is the waiting room in front of one kind of way. While its outlets take
// datagrams these pass straight through, without a lock that is common to the
// room. What can not leave at once waits here:
//
//	Send -> straight to the outlet, if nothing waits for it, it is not blocked and the room not shaped
//	     -> seat of the association, high or low queue -> outlet's ring of seats of that class
//	writable, the clock, a new arrival -> pump: high before low, deficit round robin in each ring
//
// An outlet is a way; only lanes are several in one room. An association stays
// with one outlet, its home, so that nothing of it is reordered, and leaves it
// while that has been blocked for 20 ms or has stalled, and for good when it has failed or is
// removed. When an outlet is added the associations are spread anew, each once.
// So each outlet keeps its share of them, which is what shows a lane's
// TCP quickly that a packet is lost.
//
// What a lane has taken and does not know to have arrived in time goes once
// more, on another one; the far end drops whichever comes later.
type Room struct {
	age   time.Duration
	drops *Drops
	id    uint16 // tells rooms apart in what flows remember
	own   Line   // of our notices

	only    atomic.Pointer[outlet] // the outlet, while there is exactly one
	spread  atomic.Uint32          // counts Adds; written under mu
	looked  atomic.Int64           // when the lanes were last asked what is overdue, in Unix ns
	waiting atomic.Int64           // datagrams that wait; written under mu

	mu      sync.Mutex // guards the fields below and seats; taken before no other lock but a way's
	outlets []*outlet
	turn    int // the outlet to be tried next where any will do
	homes   int // the home of the next association
	bytes   int // of buffers that wait
	seated  int // seats where something waits
	rate    float64
	// tokens are the bytes that a class may send while the room is shaped; less
	// than 0: overdrawn. What a class sends is taken from those behind it as well: a
	// voice has all of the rate, and does not wait because a picture has overdrawn it.
	tokens [classes]float64
	filled time.Time    // when tokens were counted
	next   [classes]int // the outlet whose turn it is while shaped
	share  [classes]int // datagrams that it may still send in its turn
	timer  *time.Timer
	armed  bool
}

var rooms atomic.Uint32

// An outlet is a way and who waits for it.
type outlet struct {
	way     tunnel.Way
	stalled func() bool // nil: it can not tell
	lane    repeater    // nil: it does not know what arrives
	// slow is false while datagrams may go straight to the way.
	slow atomic.Bool

	// Guarded by the room's mu.
	rings   [classes]ring
	waiting int
	blocked bool      // Send was refused and writable has not been called since
	since   time.Time // blocked since then
	late    bool      // something in it is overdue
	failed  bool      // Send returned another error
	gone    bool      // removed
	max     int       // what the way's Max returned
	asked   time.Time // at that time
}

// A seat is a line's place in one room.
type seat struct {
	room   *Room
	line   *Line
	older  *seat                  // the line's next seat; guarded by its mu
	out    atomic.Pointer[outlet] // written under the room's mu
	away   atomic.Bool            // out is not home; written under the room's mu
	double atomic.Bool            // small packets go twice; written under the room's mu
	spread atomic.Uint32          // Room.spread when home was chosen; written under the room's mu

	// Guarded by the room's mu.
	home    *outlet
	queues  [classes]queue
	waiting int
	bytes   int
	until   time.Time // the end of double
}

// NewRoom makes a room. age 0 means MaxAge. What it drops is counted in drops
// and at the line.
func NewRoom(age time.Duration, drops *Drops) *Room {
	if age <= 0 {
		age = MaxAge
	}
	return &Room{age: age, drops: drops, id: uint16(rooms.Add(1))}
}

// A repeater is a way that knows what has become of what it has taken.
type repeater interface {
	// Overdue offers to again, oldest first, the datagrams that may be lost or
	// held up, each until again returns true. It returns whether there are any.
	Overdue(again func(p []byte, since time.Time) bool) bool
	// Resend sends a copy of what another one took at since.
	Resend(p []byte, since time.Time) error
}

// Add starts w with recv and makes it an outlet of the room. A way that has a
// method Stalled() bool is passed over while that returns true; it is called
// for each datagram and must be cheap and safe for concurrent use. For what a
// way may have beside, so that others send again what may be lost there, see
// repeater.
func (r *Room) Add(w tunnel.Way, recv func(p []byte)) {
	o := &outlet{way: w}
	if s, ok := w.(interface{ Stalled() bool }); ok {
		o.stalled = s.Stalled
	}
	o.lane, _ = w.(repeater)
	for c := range o.rings {
		o.rings[c].class = c
	}
	r.mu.Lock() // before Start: what recv answers at once waits until o is there
	defer r.mu.Unlock()
	w.Start(recv, func() { r.writable(o) })
	o.slow.Store(r.rate > 0)
	r.outlets = append(r.outlets, o)
	r.spread.Add(1)
	r.pointLocked()
}

// Remove takes w out of the room. What waits for it goes to another outlet;
// where there is none it is dropped and counted as NoWay.
func (r *Room) Remove(w tunnel.Way) {
	r.mu.Lock()
	defer r.mu.Unlock()
	i := slices.IndexFunc(r.outlets, func(o *outlet) bool { return o.way == w })
	if i < 0 {
		return
	}
	o := r.outlets[i]
	r.outlets = slices.Delete(r.outlets, i, i+1)
	o.gone = true
	o.slow.Store(true)
	r.pointLocked()
	if len(r.outlets) == 0 {
		r.discardLocked(o)
	}
	now := time.Now()
	r.handOnLocked(o, now)
	r.pumpLocked(now)
}

// pointLocked keeps only right after outlets has changed.
func (r *Room) pointLocked() {
	if len(r.outlets) == 1 {
		r.only.Store(r.outlets[0])
	} else {
		r.only.Store(nil)
	}
}

// Send sends record now, lets it wait, or drops and counts it. payload is the
// application's datagram that record carries (or carries a piece of), looked at
// only for its class; l is its association's line. l nil: a notice of ours,
// which goes before others. Both slices are borrowed. The only error is
// tunnel.ErrTooLarge, for a record longer than Max; it is not counted.
func (r *Room) Send(l *Line, record, payload []byte) error {
	m := mark{high: true}
	if l != nil {
		if m = l.look(r, payload); m.sheds(r) {
			r.count(l, FrameShed)
			return nil
		}
	} else {
		l = &r.own
	}
	o := r.only.Load()
	if o == nil {
		// Several outlets, or none.
		r.repeat()
		if s := l.seat(r); s.double.Load() || s.away.Load() {
			return r.admit(l, m, record, nil)
		} else if o = s.out.Load(); o == nil || s.spread.Load() != r.spread.Load() || o.stalled != nil && o.stalled() {
			return r.admit(l, m, record, nil)
		}
	}
	if o.slow.Load() {
		return r.admit(l, m, record, nil)
	}
	switch err := o.way.Send(record); {
	case err == nil:
		return nil
	case errors.Is(err, tunnel.ErrTooLarge):
		return tunnel.ErrTooLarge
	case errors.Is(err, tunnel.ErrBlocked):
		return r.admit(l, m, record, nil)
	default:
		return r.admit(l, m, record, o)
	}
}

// repeat has what is overdue in a lane go once more on another.
func (r *Room) repeat() {
	now := time.Now()
	last := r.looked.Load()
	if now.UnixNano()-last < int64(lookEvery) || !r.looked.CompareAndSwap(last, now.UnixNano()) {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, o := range r.outlets {
		if o.lane == nil {
			continue
		}
		o.late = o.lane.Overdue(func(p []byte, since time.Time) bool {
			to := r.healthyLocked(o, now)
			return to != nil && to.lane.Resend(p, since) == nil
		})
	}
}

// healthyLocked returns a lane in turn for copies of what is in another one:
// if possible one in which nothing is overdue. nil: there is none, or the
// copies would take what others wait for.
func (r *Room) healthyLocked(not *outlet, now time.Time) (to *outlet) {
	if r.rate > 0 {
		return nil
	}
	for range r.outlets {
		o := r.pickLocked(not, now)
		if o == nil {
			break
		}
		if o.lane == nil || o.waiting > 0 {
			continue
		}
		if to = o; !o.late {
			break
		}
	}
	return to
}

// admit is Send where the straight way is not open. failed is an outlet that
// has just returned an error for the record; nil: none.
func (r *Room) admit(l *Line, m mark, record []byte, failed *outlet) error {
	s := l.seat(r)
	r.mu.Lock()
	defer r.mu.Unlock()
	now := time.Now()
	if failed != nil {
		if n := len(r.outlets); n == 0 || n == 1 && r.outlets[0] == failed {
			r.count(l, WayFailed)
			return nil
		}
		r.failLocked(failed, now)
	}
	o := r.placeLocked(s, now)
	switch {
	case o == nil:
		r.count(l, NoWay)
		return nil
	case len(record) > o.largestLocked(now):
		return tunnel.ErrTooLarge
	case r.rate > 0 && l == &r.own && s.waiting == 0 && !o.blocked && o.way.Send(record) == nil:
		// A notice counts, but the shape does not hold it up: it is what ends the shape.
		r.refillLocked(now)
		r.takeTokens(0, len(record))
		return nil
	}
	r.putLocked(s, m, record, now)
	if !o.blocked {
		r.pumpLocked(now)
	}
	r.doubleLocked(s, record, now)
	r.settleLocked(now)
	return nil
}

// largestLocked is the way's Max. It may cost the way an allocation, so it is
// not asked for each datagram.
func (o *outlet) largestLocked(now time.Time) int {
	if now.Sub(o.asked) >= maxFresh {
		o.max, o.asked = o.way.Max(), now
	}
	return o.max
}

// shunned says whether associations leave the outlet.
func (o *outlet) shunned(now time.Time) bool {
	return o.gone || o.failed || o.blocked && now.Sub(o.since) >= patience || o.stalled != nil && o.stalled()
}

// pickLocked returns the next outlet in turn that takes datagrams; nil: none does.
func (r *Room) pickLocked(not *outlet, now time.Time) *outlet {
	for range r.outlets {
		o := r.outlets[r.turn%len(r.outlets)]
		r.turn = (r.turn + 1) % len(r.outlets)
		if o != not && !o.blocked && !o.shunned(now) {
			return o
		}
	}
	return nil
}

// placeLocked returns the outlet of a seat, chosen anew where there is reason
// to; nil: the room has none.
func (r *Room) placeLocked(s *seat, now time.Time) *outlet {
	if len(r.outlets) == 0 {
		return nil
	}
	if s.home == nil || s.home.gone || s.spread.Load() != r.spread.Load() {
		s.home = r.outlets[r.homes%len(r.outlets)]
		r.homes = (r.homes + 1) % len(r.outlets)
		s.spread.Store(r.spread.Load())
	}
	o := s.out.Load()
	none := o == nil || o.gone
	to := o
	switch {
	case (none || s.waiting == 0) && !s.home.blocked && !s.home.shunned(now):
		to = s.home
	case none || o.shunned(now):
		if next := r.pickLocked(nil, now); next != nil {
			to = next
		} else if none {
			to = s.home
		}
	}
	if to != o {
		r.moveLocked(s, to, now)
	}
	s.away.Store(to != s.home)
	return to
}

// moveLocked gives a seat, with what waits there, another outlet.
func (r *Room) moveLocked(s *seat, to *outlet, now time.Time) {
	from := s.out.Load()
	for c := range s.queues {
		if q := &s.queues[c]; q.ring != nil {
			q.ring.remove(s)
			to.rings[c].push(s)
		}
	}
	if from != nil {
		from.waiting -= s.waiting
		from.flagLocked(r)
		if from.stalled != nil && !from.gone && from.stalled() {
			s.double.Store(true)
			s.until = now.Add(doubling)
		}
	}
	to.waiting += s.waiting
	s.out.Store(to)
	s.away.Store(to != s.home)
	to.flagLocked(r)
}

// handOnLocked moves all that waits for o to others, where there are any.
func (r *Room) handOnLocked(o *outlet, now time.Time) {
	for c := range o.rings {
		for o.rings[c].head != nil {
			to := r.pickLocked(o, now)
			if to == nil && o.gone && len(r.outlets) > 0 {
				to = r.outlets[r.turn%len(r.outlets)]
			}
			if to == nil {
				return
			}
			r.moveLocked(o.rings[c].head, to, now)
		}
	}
}

// failLocked takes note of an error that a way among several has returned.
func (r *Room) failLocked(o *outlet, now time.Time) {
	o.failed = true
	o.flagLocked(r)
	r.handOnLocked(o, now)
}

// doubleLocked sends a small record on a second outlet shortly after the
// first one of its association has stalled. The far end drops the later copy.
func (r *Room) doubleLocked(s *seat, record []byte, now time.Time) {
	switch {
	case !s.double.Load():
	case now.After(s.until):
		s.double.Store(false)
	case len(record) < smallMean:
		if o := r.pickLocked(s.out.Load(), now); o != nil && o.waiting == 0 && r.rate == 0 {
			if o.lane != nil { // so that it knows a copy
				o.lane.Resend(record, now)
			} else {
				r.sendLocked(o, record, now)
			}
		}
	}
}

// putLocked lets a datagram wait.
func (r *Room) putLocked(s *seat, m mark, record []byte, now time.Time) {
	need := itemSize(len(record))
	for r.bytes+need > maxWaiting {
		// Whoever has more than a fair share makes room.
		victim := s
		if share := maxWaiting / (r.seated + 1); s.bytes+need <= share {
			victim = r.largestSeatLocked()
		}
		if victim.waiting == 0 {
			r.count(s.line, Full)
			return
		}
		c := low
		if victim.queues[low].head == nil {
			c = high
		}
		r.dropLocked(victim, c, Full)
	}
	it := newItem(record)
	it.mark, it.since = m, now
	m.waits(1)
	c := low
	if m.high {
		c = high
	}
	if m.flow != nil {
		if here := uint32(r.id)<<1 | uint32(c); m.flow.where.Swap(here) != here {
			r.followLocked(s, &m, c)
		}
	}
	o, q := s.out.Load(), &s.queues[c]
	q.insert(q.tail, it)
	if q.ring == nil {
		q.deficit = 0
		o.rings[c].push(s)
	}
	if s.waiting++; s.waiting == 1 {
		r.seated++
	}
	s.bytes += need
	o.waiting++
	r.bytes += need
	r.waiting.Add(1)
	o.slow.Store(true)
	r.expireLocked(s, now)
}

// followLocked brings what waits of the flow of m into class c, in the order in
// which it came: so its class may change at any time, and nothing of it
// overtakes. An SSRC that has proved to be one takes its first packets along.
func (r *Room) followLocked(s *seat, m *mark, c int) {
	from, to := &s.queues[1-c], &s.queues[c]
	for it := to.head; it != nil; it = it.next {
		it.mark.settle(m)
	}
	var after *item // in to; what is moved comes behind it
	for prev, it := (*item)(nil), from.head; it != nil; {
		next := it.next
		it.mark.settle(m)
		if it.mark.flow != m.flow {
			prev = it
		} else {
			from.cut(prev)
			for n := to.after(after); n != nil && !n.since.After(it.since); n = to.after(after) {
				after = n
			}
			to.insert(after, it)
			after = it
		}
		it = next
	}
	if from.ring != nil && from.head == nil {
		from.ring.remove(s)
	}
	if to.ring == nil && to.head != nil {
		to.deficit = 0
		s.out.Load().rings[c].push(s)
	}
}

// largestSeatLocked returns the seat with the most bytes. Something waits.
func (r *Room) largestSeatLocked() *seat {
	var most *seat
	for _, o := range r.outlets {
		for c := range o.rings {
			for s := o.rings[c].head; s != nil; s = s.queues[c].next {
				if most == nil || s.bytes > most.bytes {
					most = s
				}
			}
		}
	}
	return most
}

// takeLocked removes an item from a seat, which leaves its ring when it was the last.
func (r *Room) takeLocked(s *seat, c int, prev *item) *item {
	q := &s.queues[c]
	it := q.cut(prev)
	it.mark.waits(-1)
	if q.head == nil {
		q.ring.remove(s)
	}
	n := cap(it.p)
	s.bytes -= n
	r.bytes -= n
	s.out.Load().waiting--
	r.waiting.Add(-1)
	if s.waiting--; s.waiting == 0 {
		r.seated--
	}
	return it
}

// dropLocked drops the oldest of a seat's class, and with a packet of a
// video frame the frame's rest: a part of a frame is worth nothing.
func (r *Room) dropLocked(s *seat, c int, why Reason) {
	it := r.takeLocked(s, c, nil)
	r.count(s.line, why)
	m := it.mark
	it.free()
	if !m.rtp || c == high || why != Aged && why != Full && why != FrameShed {
		return
	}
	m.flow.shedRest(m.time, r)
	q := &s.queues[c]
	for prev, at := (*item)(nil), q.head; at != nil; {
		next := at.next
		switch {
		case at.mark.flow != m.flow || !at.mark.rtp:
			prev = at
		case at.mark.time != m.time:
			return // the next frame: nothing of this one comes after it
		default:
			r.takeLocked(s, c, prev).free()
			r.count(s.line, FrameShed)
		}
		at = next
	}
}

func (r *Room) count(l *Line, why Reason) {
	r.drops.Add(why)
	l.drops.Add(why)
}

// expireLocked drops what a seat has held for too long.
func (r *Room) expireLocked(s *seat, now time.Time) {
	for c := range s.queues {
		for q := &s.queues[c]; q.head != nil && now.Sub(q.head.since) > r.age; {
			r.dropLocked(s, c, Aged)
		}
	}
}

// pumpLocked sends what waits and may leave.
func (r *Room) pumpLocked(now time.Time) {
	r.refillLocked(now)
	for c := range classes {
		if r.rate > 0 {
			r.shareLocked(c, now)
			continue
		}
		for _, o := range r.outlets {
			r.serveLocked(o, c, math.MaxInt, now)
		}
	}
	for _, o := range r.outlets {
		o.flagLocked(r)
	}
}

// shareLocked gives the outlets their turns while the room is shaped, each for as
// many datagrams as there are seats in its ring: else the first would take all that
// may leave.
func (r *Room) shareLocked(c int, now time.Time) {
	for idle := 0; idle < len(r.outlets) && r.tokens[c] > 0; {
		o := r.outlets[r.next[c]%len(r.outlets)]
		if r.share[c] == 0 {
			r.share[c] = o.rings[c].seats
		}
		sent := r.serveLocked(o, c, r.share[c], now)
		r.share[c] -= sent
		idle++
		if sent > 0 {
			idle = 0
		}
		if sent == 0 || r.share[c] == 0 {
			r.next[c], r.share[c] = (r.next[c]+1)%len(r.outlets), 0
		}
	}
}

// serveLocked gives the seats of one ring their turns (M. Shreedhar, G.
// Varghese, Efficient Fair Queuing using Deficit Round Robin, 1995), until most
// datagrams have left, and returns how many have.
func (r *Room) serveLocked(o *outlet, c, most int, now time.Time) (sent int) {
	g := &o.rings[c]
	for g.head != nil && sent < most && !o.blocked && !o.failed && (r.rate == 0 || r.tokens[c] > 0) {
		s := g.head
		if r.expireLocked(s, now); g.head != s {
			continue
		}
		q := &s.queues[c]
		if c == low && r.vainLocked(q, now) {
			r.dropLocked(s, c, FrameShed)
			continue
		}
		if n := len(q.head.p); q.deficit < n {
			q.deficit += quantum
			g.remove(s)
			g.push(s)
			continue
		}
		p := q.head.p
		err := r.sendLocked(o, p, now)
		if err == errStays {
			return sent
		}
		sent++
		q.deficit -= len(p)
		r.takeTokens(c, len(p))
		it := r.takeLocked(s, c, nil)
		switch {
		case errors.Is(err, tunnel.ErrTooLarge):
			r.count(s.line, TooLarge)
		case err != nil:
			r.count(s.line, WayFailed)
		}
		it.free()
	}
	return sent
}

// vainLocked says whether the head of q begins a video frame that a shaped room
// can not send whole in time: then one that is younger goes in its place.
func (r *Room) vainLocked(q *queue, now time.Time) bool {
	m := &q.head.mark
	if r.rate == 0 || !m.rtp || m.flow.begun.Load() == uint64(m.time)<<1|1 {
		return false
	}
	bytes := 0
	for it := q.head; it != nil && (it.mark.flow != m.flow || it.mark.time == m.time); it = it.next {
		if it.mark.flow == m.flow {
			bytes += len(it.p)
		}
	}
	// The other associations that wait get as much; sound takes its part before.
	need := time.Duration(float64(bytes*8*r.seated) / (soundLeaves * r.rate) * float64(time.Second))
	if need > r.age { // no frame of this size can: what comes of a young one is for the application to judge
		need = r.age / 2
	}
	if q.head.since.Add(r.age).Before(now.Add(need)) {
		return true
	}
	m.flow.begun.Store(uint64(m.time)<<1 | 1)
	return false
}

// errStays says that a datagram was not sent and waits on.
var errStays = errors.New("the datagram waits on")

// sendLocked offers p to an outlet and draws the conclusions.
func (r *Room) sendLocked(o *outlet, p []byte, now time.Time) error {
	err := o.way.Send(p)
	switch {
	case err == nil, errors.Is(err, tunnel.ErrTooLarge):
		return err
	case errors.Is(err, tunnel.ErrBlocked):
		o.blocked, o.since = true, now
		o.slow.Store(true)
		return errStays
	case len(r.outlets) > 1:
		r.failLocked(o, now)
		if o.waiting == 0 {
			return errStays
		}
	}
	return err
}

// flagLocked keeps slow right.
func (o *outlet) flagLocked(r *Room) {
	o.slow.Store(o.blocked || o.failed || o.gone || o.waiting > 0 || r.rate > 0)
}

// writable is what an outlet calls when it takes datagrams again.
func (r *Room) writable(o *outlet) {
	r.mu.Lock()
	defer r.mu.Unlock()
	now := time.Now()
	o.blocked = false
	o.flagLocked(r)
	r.pumpLocked(now)
	r.settleLocked(now)
}

// settleLocked keeps the clock running while something waits.
func (r *Room) settleLocked(now time.Time) {
	if r.waiting.Load() == 0 || r.armed {
		return
	}
	d := r.age / 8
	if len(r.outlets) > 1 {
		d = min(d, patience/4)
	}
	if r.rate > 0 {
		for _, t := range r.tokens {
			if t <= 0 {
				d = min(d, time.Duration((1-t)*8/r.rate*float64(time.Second)))
			}
		}
		d = max(d, time.Millisecond)
	}
	r.armed = true
	if r.timer == nil {
		r.timer = time.AfterFunc(d, r.tick)
	} else {
		r.timer.Reset(d)
	}
}

// tick moves what waits, or lets it age, where nothing else happens.
func (r *Room) tick() {
	r.mu.Lock()
	defer r.mu.Unlock()
	now := time.Now()
	r.armed = false
	for _, o := range r.outlets {
		for c := range o.rings {
			for s := o.rings[c].head; s != nil; {
				next := s.queues[c].next
				r.expireLocked(s, now)
				s = next
			}
		}
		if len(r.outlets) > 1 && o.waiting > 0 && o.shunned(now) {
			r.handOnLocked(o, now)
		}
	}
	// A blocked outlet is tried once more: should its call of writable be lost,
	// it costs a few milliseconds and not the call.
	for _, o := range r.outlets {
		if o.blocked && o.waiting > 0 {
			since := o.since
			o.blocked = false
			r.pumpLocked(now)
			if o.blocked {
				o.since = since
			}
		}
	}
	r.pumpLocked(now)
	r.settleLocked(now)
}

// refillLocked counts the bytes that may leave.
func (r *Room) refillLocked(now time.Time) {
	if r.rate == 0 {
		return
	}
	most := max(r.rate/8*burst.Seconds(), quantum)
	for c := range r.tokens {
		r.tokens[c] = min(most, r.tokens[c]+r.rate/8*now.Sub(r.filled).Seconds())
	}
	r.filled = now
}

// takeTokens counts what a class has sent.
func (r *Room) takeTokens(class, bytes int) {
	for c := class; c < classes; c++ {
		r.tokens[c] -= float64(bytes)
	}
}

// Shape bounds what leaves to so many bits a second, in bursts of at most 20 ms
// or two packets; 0: it is free. What then has to wait is treated as on a way that is
// blocked. Notices count but are not held up.
func (r *Room) Shape(bitsPerSecond float64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	now := time.Now()
	r.refillLocked(now)
	if r.rate == 0 {
		clear(r.tokens[:])
	}
	r.rate, r.filled = max(0, bitsPerSecond), now
	if r.armed && r.timer.Stop() {
		r.armed = false
	}
	r.pumpLocked(now)
	r.settleLocked(now)
}

// Max is the largest record that all outlets take at the moment, in bytes; 0:
// there is none.
func (r *Room) Max() int {
	if o := r.only.Load(); o != nil {
		return o.way.Max()
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	least := 0
	for i, o := range r.outlets {
		if n := o.way.Max(); i == 0 || n < least {
			least = n
		}
	}
	return least
}

// Outlets returns how many ways the room has.
func (r *Room) Outlets() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.outlets)
}

// Waiting returns the datagrams that wait.
func (r *Room) Waiting() int { return int(r.waiting.Load()) }

// Discard drops what waits and counts it as NoWay.
func (r *Room) Discard() {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, o := range r.outlets {
		r.discardLocked(o)
		o.flagLocked(r)
	}
}

func (r *Room) discardLocked(o *outlet) {
	for c := range o.rings {
		for g := &o.rings[c]; g.head != nil; {
			r.dropLocked(g.head, c, NoWay)
		}
	}
}
