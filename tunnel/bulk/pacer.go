package bulk

import (
	"container/heap"
	"sync"
	"sync/atomic"
	"time"

	"culvert/tunnel"
)

const (
	// Bytes are let go in pieces worth pieceTime, within these bounds: TCP puts
	// a piece on the wire at once.
	pieceTime  = 5 * time.Millisecond
	leastPiece = 1200
	mostPiece  = 64 << 10
	// slack is how much may be caught up after a timer that was late.
	slack = 5 * time.Millisecond
	// lately is how long bulk counts as being paced after its last write.
	lately = time.Second
	// A stream that says nothing of its rate begins with this, in bits per second.
	unknownRate = 2_000_000
)

// A Pacer paces what one end of a session writes to its streams. It is safe
// for concurrent use.
type Pacer struct {
	begin time.Time
	live  atomic.Bool

	// mu guards what is below. A stream's mu may be locked while it is held,
	// never the other way round.
	mu      sync.Mutex
	bulk    map[*stream]struct{}
	control controller
	waiting queue
	timer   *time.Timer   // runs dispatch
	next    time.Duration // when what has been let go will have left at the rate
	served  time.Duration // when bulk was last let go
	virtual float64       // start-time fair queuing: the tag of the piece last let go, in bytes
}

// Stats says what a Pacer does at the moment.
type Stats struct {
	Streams  int           // that count as bulk
	Rate     float64       // what they may write together, in bits per second; 0: as much as they like
	Queueing time.Duration // the newest that Delay was told
}

// New makes a Pacer. No channel is live at first.
func New() *Pacer {
	p := &Pacer{begin: time.Now(), bulk: map[*stream]struct{}{}}
	p.served = -lately
	p.timer = time.AfterFunc(time.Hour, p.dispatch)
	p.timer.Stop()
	return p
}

// now is the time since the pacer's beginning, by the monotonic clock.
func (p *Pacer) now() time.Duration { return time.Since(p.begin) }

// Wrap returns s with Writes that wait for their share while they have to. It
// is called before the first byte of what the stream carries, and after what
// opens it. The stream must be ended by Close or Abort.
func (p *Pacer) Wrap(s tunnel.Stream) tunnel.Stream {
	w := &stream{Stream: s, p: p}
	w.meter.begin = p.now()
	w.turn.place = -1
	return w
}

// Live says whether a channel is live. When none is, all that waits goes on at
// once.
func (p *Pacer) Live(live bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.live.Load() == live {
		return
	}
	p.live.Store(live)
	if !live {
		for len(p.waiting) > 0 {
			heap.Pop(&p.waiting).(*stream).turn.ready <- struct{}{}
		}
		p.timer.Stop()
		return
	}
	now := p.now()
	var rate float64
	for s := range p.bulk {
		s.mu.Lock()
		rate += s.meter.rate(now)
		s.mu.Unlock()
	}
	p.control.learned = false
	p.control.start(rate, now) // with a drain: until reports say that nothing queues
	p.next = now
	if rate > 0 {
		p.served = now
	}
}

// Delay takes the newest measurement of queueing above the base delay in the
// direction of our Writes, which came at now. held says that media is itself
// held back there: what it leaves free is not for bulk.
func (p *Pacer) Delay(now time.Time, queueing time.Duration, held bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	at := now.Sub(p.begin)
	p.control.report(at, queueing, p.activeLocked(at), held)
}

// Gives reports whether bulk is being paced and still gives way to a full path,
// so that media need not: it is above its floor, or has been there for less
// than two seconds.
func (p *Pacer) Gives() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	now := p.now()
	return p.activeLocked(now) && !p.control.spent(now)
}

// Active reports whether something is being paced. The caller then asks for
// reports every 50 ms, otherwise every 250 ms.
func (p *Pacer) Active() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.activeLocked(p.now())
}

func (p *Pacer) activeLocked(now time.Duration) bool {
	return p.live.Load() && (len(p.waiting) > 0 || now-p.served < lately)
}

// Stats returns what the pacer does at the moment.
func (p *Pacer) Stats() Stats {
	p.mu.Lock()
	defer p.mu.Unlock()
	now := p.now()
	st := Stats{Queueing: p.control.queue}
	for s := range p.bulk {
		s.mu.Lock()
		s.meter.roll(now)
		if s.meter.bulk {
			st.Streams++
		}
		s.mu.Unlock()
	}
	if p.activeLocked(now) {
		st.Rate = p.control.rate
	}
	return st
}

// settle notes that a stream has become bulk, or is so no more.
func (p *Pacer) settle(s *stream) {
	p.mu.Lock()
	defer p.mu.Unlock()
	now := p.now()
	s.mu.Lock()
	rate := s.meter.rate(now)
	bulk := s.meter.bulk && !s.ended
	s.known = bulk
	s.mu.Unlock()
	_, known := p.bulk[s]
	switch {
	case known && !bulk:
		delete(p.bulk, s)
	case bulk && !known:
		p.bulk[s] = struct{}{}
		if p.live.Load() {
			if p.activeLocked(now) {
				p.control.join(rate, now)
			} else {
				p.control.start(rate, now) // what was right for others some time ago says nothing
			}
			p.served = now
		}
	}
}

// share asks for the next piece of n bytes that s wants to write. It returns
// how much of it is let go at once; with 0, s waits for its turn, and then the
// size of the piece is turn.size.
func (p *Pacer) share(s *stream, n int) int {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.live.Load() {
		return n
	}
	now := p.now()
	if p.control.rate == 0 {
		p.control.start(unknownRate, now)
	}
	p.control.tick(now)
	piece := int(p.control.rate / 8 * pieceTime.Seconds())
	s.turn.size = min(n, max(leastPiece, min(piece, mostPiece)))
	s.turn.tag = max(p.virtual, s.turn.end)
	if len(p.waiting) == 0 && p.next <= now {
		p.letGo(s, now)
		return s.turn.size
	}
	if s.turn.ready == nil {
		s.turn.ready = make(chan struct{}, 1)
	}
	heap.Push(&p.waiting, s)
	if len(p.waiting) == 1 {
		p.timer.Reset(p.next - now)
	}
	return 0
}

// letGo spends the rate for the stream's piece. mu is held.
func (p *Pacer) letGo(s *stream, now time.Duration) {
	size := s.turn.size
	p.next = max(p.next, now-slack) + time.Duration(8*float64(size)/p.control.rate*float64(time.Second))
	p.virtual = s.turn.tag
	s.turn.end = s.turn.tag + float64(size)
	p.served = now
	p.control.wrote(size)
}

// dispatch lets go whose turn it is.
func (p *Pacer) dispatch() {
	p.mu.Lock()
	defer p.mu.Unlock()
	now := p.now()
	for len(p.waiting) > 0 && p.next <= now {
		p.control.tick(now)
		s := heap.Pop(&p.waiting).(*stream)
		p.letGo(s, now)
		s.turn.ready <- struct{}{}
	}
	if len(p.waiting) > 0 {
		p.timer.Reset(p.next - now)
	}
}

// giveUp takes a stream out of the queue whose Write does not wait any more.
func (p *Pacer) giveUp(s *stream) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if s.turn.place < 0 { // let go meanwhile
		<-s.turn.ready
		return
	}
	heap.Remove(&p.waiting, s.turn.place)
}

// A turn is a stream's place in the queue. Guarded by the pacer's mu.
type turn struct {
	place int     // in the heap; -1: not waiting
	size  int     // bytes that it asks for
	tag   float64 // where its piece begins in virtual time
	end   float64 // where its last piece ended
	ready chan struct{}
}

// A queue is a heap of streams that wait, by tag.
type queue []*stream

func (q queue) Len() int           { return len(q) }
func (q queue) Less(i, j int) bool { return q[i].turn.tag < q[j].turn.tag }
func (q queue) Swap(i, j int) {
	q[i], q[j] = q[j], q[i]
	q[i].turn.place, q[j].turn.place = i, j
}
func (q *queue) Push(x any) {
	s := x.(*stream)
	s.turn.place = len(*q)
	*q = append(*q, s)
}
func (q *queue) Pop() any {
	last := len(*q) - 1
	s := (*q)[last]
	(*q)[last] = nil
	*q = (*q)[:last]
	s.turn.place = -1
	return s
}
