package media

import (
	"math"
	"time"
)

const (
	// MinShape is the least that a Breaker shapes to, in bits/s: one voice.
	MinShape = 64_000

	lossBad  = 0.10 // above: the way is congested, if delay has risen too
	lossGood = 0.02 // below: it is not

	delayRisen = 20 * time.Millisecond // a queue has built up
	delayLong  = 40 * time.Millisecond // while shaped: it builds up again

	// tripHarm is the loss times its duration, in seconds, that trips: 10 %
	// for 1 s, 20 % for half of that. tripSpan is how long it takes at least:
	// one bad report is an accident, unless half is lost behind a full queue.
	tripHarm  = 0.1
	tripSpan  = 200 * time.Millisecond
	lossGross = 0.5
	delayFull = 100 * time.Millisecond

	// shapePart of what arrives is sent, less what empties the way's queue
	// within drainIn, drainMost of it at most: sound is to pass meanwhile.
	// settleIn is how long the effect then takes to be seen for certain.
	shapePart = 0.95
	drainIn   = 250 * time.Millisecond
	drainMost = 0.7
	settleIn  = 750 * time.Millisecond

	raiseLeast = 0.08                   // growth per second, at first and near the last limit
	raiseMost  = 1.0                    // it doubles each second, up to this
	unused     = 0.8                    // less than this part of the shape is sent: it is not needed
	freeAfter  = time.Second            // of good reports
	meanOver   = 300 * time.Millisecond // time constant of the received rate's mean
	maxGap     = 500 * time.Millisecond // what one report can stand for

	// A report speaks of what left here up to staleFor ago, over a full path:
	// the reports themselves wait in it.
	staleFor  = 750 * time.Millisecond
	mostStale = 16 // reports in that time, where they come every 50 ms
)

// A Breaker is a circuit breaker (RFC 8084) for one direction of a way that has
// no congestion control of its own. It is fed what the peer reports, and says
// whether another way should be tried and what to shape this one to:
//
//	free --- loss > 10 %, delay risen and received rate flat for 1 s; the more
//	 ^       is lost, the sooner -----> shaped to 0.95 x received, and first to
//	 |                                  less, which empties the way's queue
//	 |                                             | loss < 2 %, or no queue: upwards, 8 %/s at first
//	 +--- 1 s well and a fifth unused -------------+ loss > 10 % or a queue again: downwards
//
// While other traffic of ours yields it is free: a full path is answered there,
// which is one answer for both.
//
// A report is the peer's word. One that lies can make this end send the peer
// itself more slowly, never below MinShape, or not be shaped at all, which is
// what every way is without a breaker; it reaches no other session. It is pure
// and for one goroutine at a time.
type Breaker struct {
	rate     float64 // bits/s; 0: free
	bad      bool
	last     time.Time // of the last report; zero: none
	sent     [mostStale]sending
	next     int     // in sent, a ring
	received float64 // in the last report
	loss     float64 // as of the last report

	harm    float64       // loss x seconds in this run of bad reports
	run     int           // bad reports in a row
	span    time.Duration // from the first of them on
	carried float64       // bits that arrived in span
	lossy   time.Duration // how long the loss alone has been bad

	mean  float64       // of the received rate while shaped
	wall  float64       // the received rate at the last limit
	eased time.Time     // when the rate was last lowered
	good  time.Duration // how long all has been well while shaped
	spare time.Duration // how long the shape has not been used up, besides
	using float64       // the mean of the sent rate while shaped
	// draining: the rate is low until the queue is empty.
	draining bool
}

// sending is what left here at the time of a report.
type sending struct {
	at   time.Time
	rate float64
}

// Seen is what is known about one report interval of the outgoing direction.
type Seen struct {
	Sent     float64       // bits/s that left here, notices included
	Received float64       // bits/s that came to the peer, in the same unit
	Lost     float64       // of what was sent: 0 to 1
	Delay    time.Duration // of queueing: above the shortest of late
	Yields   bool          // other traffic of ours on the same path is giving way, and has more to give
}

// NewBreaker makes a breaker that is free.
func NewBreaker() *Breaker { return &Breaker{} }

// Report takes what a report of the peer says. It returns whether the way is
// bad, so that another should be tried, and what to shape it to in bits/s; 0:
// it is free. now must not go back.
func (b *Breaker) Report(now time.Time, s Seen) (bad bool, shape float64) {
	var dt time.Duration
	if !b.last.IsZero() {
		dt = min(max(0, now.Sub(b.last)), maxGap)
	}
	s.Lost = min(max(0, s.Lost), 1)
	s.Received, s.Sent = max(0, s.Received), max(0, s.Sent)
	queued := s.Delay >= delayRisen
	b.loss = b.lost(now, s)
	switch {
	case s.Yields:
		b.rate = 0
		b.calm()
	case b.rate == 0:
		b.watch(now, s, dt)
	default:
		b.steer(now, s, dt)
	}
	if b.loss > lossBad && !(s.Yields && queued) {
		b.lossy += dt
	} else {
		b.lossy = 0
	}
	switch {
	case b.rate > 0, b.harm >= tripHarm/2, b.lossy >= time.Second:
		b.bad = true
	case s.Lost < lossGood && b.run == 0, s.Yields && queued:
		b.bad = false
	}
	b.last, b.received = now, s.Received
	b.sent[b.next] = sending{now, s.Sent}
	b.next = (b.next + 1) % mostStale
	return b.bad, b.rate
}

// Silence says that the peer's reports fail to come. Time of which nothing is
// known counts neither for nor against the way: a shape stays as it is.
func (b *Breaker) Silence(now time.Time) {
	if !b.last.IsZero() {
		b.last = now
	}
	b.good = 0
}

// Lost is the loss as of the last report: what that says, or what the rates say
// where it is more, 0 to 1.
func (b *Breaker) Lost() float64 { return b.loss }

// lost is the loss, or what the rates say of it where that is more: the count
// of losses comes with reports, which are lost as well. The least that was
// sent of late is compared: media that has just begun is not lost.
func (b *Breaker) lost(now time.Time, s Seen) float64 {
	sent := s.Sent
	for i, before := range b.sent {
		if now.Sub(before.at) <= staleFor || i == (b.next+mostStale-1)%mostStale {
			sent = min(sent, before.rate)
		}
	}
	if sent > 0 {
		return max(s.Lost, 1-s.Received/sent)
	}
	return s.Lost
}

// watch looks for congestion while free.
func (b *Breaker) watch(now time.Time, s Seen, dt time.Duration) {
	lost := b.loss
	if lost <= lossBad || s.Delay < delayRisen || s.Received > 1.1*b.received {
		b.calm()
		return
	}
	if b.run++; b.run > 1 { // the first interval may hold something of the time before
		b.span += dt
		b.carried += s.Received * dt.Seconds()
	}
	b.harm += lost * dt.Seconds()
	gross := lost >= lossGross && s.Delay >= delayFull
	if b.harm < tripHarm || b.span < tripSpan && !gross {
		return
	}
	b.mean = s.Received
	if b.span > 0 {
		b.mean = b.carried / b.span.Seconds()
	}
	b.wall, b.using = b.mean, b.mean
	b.calm()
	b.lower(now, s.Delay, MinShape)
}

// calm ends a run of bad reports.
func (b *Breaker) calm() { b.run, b.harm, b.span, b.carried = 0, 0, 0, 0 }

// lower shapes to what arrives, and less while a queue has to be emptied.
func (b *Breaker) lower(now time.Time, delay time.Duration, least float64) {
	drain := min(drainMost, delay.Seconds()/drainIn.Seconds())
	b.rate = max(least, b.mean*(shapePart-drain), MinShape)
	b.eased, b.draining = now, true
	b.good, b.spare = 0, 0
}

// drained ends the time in which the queue is emptied.
func (b *Breaker) drained() {
	b.draining = false
	b.rate = max(b.rate, b.wall*shapePart)
}

// steer moves the rate while shaped.
func (b *Breaker) steer(now time.Time, s Seen, dt time.Duration) {
	part := 1 - math.Exp(-dt.Seconds()/meanOver.Seconds())
	b.mean += (s.Received - b.mean) * part
	b.using += (s.Sent - b.using) * part
	if now.Sub(b.eased) < settleIn {
		if s.Lost > lossBad && s.Delay >= delayFull && s.Received < unused*b.wall {
			// The interval that tripped held something of the time before.
			b.mean, b.wall = s.Received, s.Received
			b.lower(now, s.Delay, MinShape)
		} else if b.draining && s.Delay < delayRisen {
			b.drained()
		}
		return
	}
	used := b.using > unused*b.rate
	switch {
	case s.Lost > lossBad && s.Delay >= delayRisen:
		b.wall = b.mean
		b.lower(now, s.Delay, MinShape)
	case s.Delay >= delayLong && used:
		// A queue alone may be others': it does not push us far below what passed.
		b.wall = max(b.wall/2, b.mean)
		b.lower(now, s.Delay, b.wall/2)
	case s.Delay >= delayLong, s.Lost >= lossGood && s.Delay >= delayRisen, s.Lost > lossBad:
		b.good, b.spare = 0, 0
	case b.draining:
		b.drained()
	default:
		b.good += dt
		if b.spare += dt; used {
			b.spare = 0
		}
		if b.spare >= freeAfter {
			b.rate = 0
			return
		}
		g := min(raiseMost, raiseLeast*math.Exp2(b.good.Seconds()))
		if b.rate < 1.1*b.wall {
			g = raiseLeast
		}
		b.rate *= 1 + g*dt.Seconds()
	}
}
