package session

import (
	"sync"
	"sync/atomic"
	"time"

	"culvert/tunnel/wire"
)

const (
	reportEvery = 250 * time.Millisecond
	// reportOften is the pace while bulk is being paced, here or at the peer,
	// while much of what the peer sends is lost, and while its reports do not come:
	// most may be lost on a full path. So often this end looks, too.
	reportOften = 50 * time.Millisecond
	// A report is overdue after reportDue, and no more hoped for after reportGone.
	reportDue  = reportEvery + 100*time.Millisecond
	reportGone = 10 * time.Second
	// mediaRest is how long after the last datagram reports go on.
	mediaRest = time.Second
)

// reports sends a report on each way while datagrams flow, while a channel is
// live, and while bulk is being paced. An idle session has no timer.
type reports struct {
	plane   *plane
	running atomic.Bool
	wish    atomic.Int64 // until when the peer wants them often, Unix ns

	mu      sync.Mutex // guards the fields below
	timer   *time.Timer
	ended   bool
	began   time.Time // of this run of ticks
	moved   uint64    // datagrams, at the last tick
	movedAt time.Time // the tick by which the last had passed
	told    time.Time // the tick that last reported on all ways
}

// begin makes reports flow. It is called for each datagram.
func (r *reports) begin() {
	if r.running.Load() || r.running.Swap(true) {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	switch {
	case r.ended:
	case r.timer == nil:
		r.timer = time.AfterFunc(reportOften, r.tick)
	default:
		r.timer.Reset(reportOften)
	}
}

// end ends them for good. A tick that runs is not waited for.
func (r *reports) end() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.ended = true
	if r.timer != nil {
		r.timer.Stop()
	}
}

// often notes whether the peer wants reports every 50 ms.
func (r *reports) often(wanted bool) {
	if wanted {
		r.wish.Store(time.Now().Add(mediaRest).UnixNano())
		r.begin() // whoever paces bulk must hear, also where media rests
	}
}

// flowing reports whether they have flowed for some rounds.
func (r *reports) flowing() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.running.Load() && !r.began.IsZero() && time.Since(r.began) > 3*reportEvery
}

func (r *reports) tick() {
	p, now := r.plane, time.Now()
	p.mu.RLock()
	use, ways := p.said, p.ways
	p.mu.RUnlock()
	if p.open != nil {
		use = wire.Use{} // the far end has nothing to say
	}
	live := p.isLive()
	active := p.pacer.Active()
	often := active
	trouble := false
	for _, y := range ways {
		if y != nil {
			trouble = y.look(now) || trouble
			often = often || y.bad() || y.overdue(now)
		}
	}
	r.mu.Lock()
	if n := p.moved.Load(); n != r.moved || r.movedAt.IsZero() {
		r.moved, r.movedAt = n, now
	}
	flows := now.Sub(r.movedAt) < mediaRest || active || live
	often = often && flows // else two ends that rest would keep each other awake
	// What is asked often is the way in use: on a slow path the reports of three
	// would be a fifth of all that passes.
	due := often || trouble || now.UnixNano() < r.wish.Load()
	all := now.Sub(r.told) > reportEvery-reportOften/2
	if all {
		r.told = now
	}
	r.mu.Unlock()
	u := p.using.Load()
	for _, y := range ways {
		if y != nil && (all || due && u != nil && (y == u.first || y == u.also)) {
			y.tick(now, use, live, often)
		}
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.began.IsZero() {
		r.began = now
	}
	switch {
	case r.ended:
	case flows || now.UnixNano() < r.wish.Load():
		r.timer.Reset(reportOften)
	default:
		r.movedAt, r.began = time.Time{}, time.Time{}
		r.running.Store(false)
		if (p.moved.Load() != r.moved || p.isLive()) && !r.running.Swap(true) { // something has begun meanwhile
			r.timer.Reset(reportOften)
		}
	}
}
