package bulk

import "time"

// How the rate follows the queue. A report speaks of what was written 100 to
// 200 ms ago, so the loop must not react faster than about twice in a second.
const (
	floor = 256_000 // bits per second for all bulk together, whatever the path

	// aim is for the least queueing of a report's interval, which is what is
	// reported: the median lies some ms above, and shall be 25.
	aim  = 15 * time.Millisecond
	full = 4 * aim // the queue has to be emptied, not steered

	// The rate falls by pushBack of itself for each second by which the queue
	// has grown, and rises by pull for each second below aim and second of
	// time. A queue grows by the surplus of the rate, so this is an oscillator
	// with a natural frequency of 1.4/s, about critically damped.
	pushBack = 3.0 // 1/s
	pull     = 2.0 // 1/s²

	mostGrowth = 0.25 // of itself per second, after a while with an empty queue
	mostReturn = 1.0  // the same, far below what the path has borne before
	farBelow   = 0.7
	mostFall   = 0.3                    // of itself at one report
	deeper     = 0.7                    // of its rate after a drain, for each drainTime that it takes
	after      = 0.85                   // of what bulk had when the queue was full: its rate after a drain
	atFirst    = 0.6                    // the same for the first drain beside a call: bulk ran free, faster than the path
	drainTime  = 500 * time.Millisecond // without success: less after it
	learnTime  = 700 * time.Millisecond // the first drain beside a call: until reports have seen the path without a queue
	settleTime = 200 * time.Millisecond // after a drain: until reports speak of what came later
	giveTime   = 2 * time.Second        // at the floor: until what TCP had taken before is through

	silence  = time.Second            // without a report: halve
	shortest = 50 * time.Millisecond  // how far apart they are at least
	oldest   = 250 * time.Millisecond // how far apart reports are at most, as far as the loop is concerned
	averaged = 500 * time.Millisecond // over which what is written is averaged
)

// A controller finds the rate for all bulk together. Times are since the
// pacer's beginning. Guarded by the pacer's mu.
type controller struct {
	rate  float64       // bits per second; 0: not known yet
	queue time.Duration // the newest report's
	seen  time.Duration // when it came
	cut   time.Duration // when silence was last answered

	// learned: the queue has been empty beside this call. Before that reports
	// may take one that has always stood for the length of the path: the rate
	// would hold it there.
	learned  bool
	draining bool
	begun    time.Duration // when the drain was
	resume   float64       // the rate after the drain
	acted    time.Duration // when the drain was begun, deepened or ended
	low      time.Duration // when the rate came down to the floor; valid while it is there
	growth   float64       // of itself per second, while the queue is about empty
	ceiling  float64       // the rate when the queue was last not so

	written float64       // bits since counted
	counted time.Duration // when written was last averaged
	average float64       // bits per second
}

// start begins with bulk that has run free at the rate; 0: there is none yet.
func (c *controller) start(rate float64, now time.Duration) {
	*c = controller{queue: c.queue, seen: now, cut: now, acted: now - settleTime, counted: now, average: rate, learned: c.learned}
	if rate > 0 {
		c.set(rate, now)
		if !c.learned {
			c.drain(now, 0)
		}
	}
}

// set changes the rate.
func (c *controller) set(rate float64, now time.Duration) {
	if rate <= floor && c.rate != floor {
		c.low = now
	}
	c.rate = max(floor, rate)
}

// spent reports whether bulk has given way as far as it does, and long enough
// for that to have told.
func (c *controller) spent(now time.Duration) bool {
	return c.rate == floor && now-c.low >= giveTime
}

// join takes in a stream that has run free beside the others.
func (c *controller) join(rate float64, now time.Duration) {
	c.average += rate
	if c.draining {
		c.resume += rate
	} else {
		c.set(c.rate+rate, now)
	}
}

// drain lets the queue run empty: what has gone too far already takes a while.
// The queue has grown by so much of each second: the path bears 1/(1+slope) of
// what came to it.
func (c *controller) drain(now time.Duration, slope float64) {
	part := after
	if !c.learned {
		part, c.ceiling = atFirst, c.rate
	}
	c.resume = max(floor, part*min(c.rate, c.average)/(1+max(0, slope)))
	c.set(floor, now)
	c.draining, c.begun, c.acted, c.growth = true, now, now, 0
}

// wrote counts what bulk was let write.
func (c *controller) wrote(bytes int) { c.written += 8 * float64(bytes) }

// tick answers silence.
func (c *controller) tick(now time.Duration) {
	if now-max(c.seen, c.cut) >= silence {
		c.set(c.rate/2, now)
		c.resume = c.rate
		c.growth = 0
		c.cut = now
	}
}

// report takes a measurement; busy: bulk is being paced; held: media is itself
// held back.
func (c *controller) report(now, queue time.Duration, busy, held bool) {
	elapsed := now - c.seen
	grown := (queue - c.queue).Seconds()
	if elapsed > 2*oldest {
		grown = 0 // too long ago to tell a slope
	}
	dt := max(0, min(elapsed, oldest)).Seconds()
	c.seen, c.queue = now, queue
	if span := now - c.counted; span >= averaged/10 {
		c.average += min(1, span.Seconds()/averaged.Seconds()) * (c.written/span.Seconds() - c.average)
		c.written, c.counted = 0, now
	}
	if !busy || c.rate == 0 {
		c.growth = 0
		return
	}
	switch {
	case held && c.spent(now):
		// What media leaves free is its own, to come back to.
		c.draining, c.growth = false, 0
	case c.draining && queue <= aim && !c.learned && now-c.begun < learnTime:
	case c.draining && queue <= aim:
		c.draining, c.learned, c.acted = false, true, now
		c.set(c.resume, now)
		c.average = c.resume // what was written to drain says nothing
	case c.draining:
		if now-c.acted >= drainTime {
			c.resume = max(floor, deeper*c.resume)
			c.acted = now
		}
	case now-c.acted < settleTime:
	case queue > full:
		c.drain(now, grown/max(dt, shortest.Seconds()))
	default:
		change := pull*(aim-queue).Seconds()*dt - pushBack*grown
		if queue < aim/2 {
			most := mostGrowth
			if c.rate < farBelow*c.ceiling {
				most = mostReturn
			}
			c.growth = min(c.growth+dt, most)
			change += c.growth * dt
		} else {
			c.growth, c.ceiling = 0, c.rate
		}
		// A rate that nobody uses is not proven: it must not grow further.
		if change < 0 || c.rate < 2*c.average {
			c.set(c.rate*(1+max(change, -mostFall)), now)
		}
	}
}
