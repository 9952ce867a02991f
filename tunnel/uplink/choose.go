package uplink

import (
	"fmt"
	"time"

	"culvert/tunnel"
	"culvert/tunnel/session"
	"culvert/tunnel/wire"
)

const (
	probeEvery = 50 * time.Millisecond // while an answer is awaited
	trialTime  = 500 * time.Millisecond
	calmEvery  = 50 * time.Millisecond // how often a call's ways are looked at
	// idleEvery is how often an idle sidecar's are. A probe is sent then: a cloud
	// proxy that was restarted answers it with a reset, other than QUIC's keep-alive,
	// which is too short for that (RFC 9000 §10.3.3).
	idleEvery = 3 * time.Second

	// Silence means that nothing authentic came: by doubtful the way is asked
	// about, by deaf it is left for one by which something comes.
	doubtful = 300 * time.Millisecond
	deaf     = 600 * time.Millisecond
	// bothTime bounds how long small datagrams go by two ways.
	bothTime = 2 * time.Second

	// A way that was left is tried again after a while. Where sealed packets
	// alone were left that is twice as long each time.
	sealedAgain, maxSealedAgain = 2 * time.Second, time.Minute
	// UDP is tried again after udpAgain, then each goodUDPAgain where it has
	// worked: a path that is open again is used within 30 s. Where it never has,
	// the time is doubled. Where it was used again and left soon it rests for
	// udpRest, twice as long each time.
	udpAgain, goodUDPAgain, maxUDPAgain = 5 * time.Second, 15 * time.Second, 5 * time.Minute
	udpRest                             = time.Minute
	settled                             = 30 * time.Second // used for so long, a way has proved itself

	// What was too narrow for the call has to carry as much as it before it is
	// used again: for loadTime, loadOver as much, nearly all of it with at most
	// loadWait more than a round trip.
	narrowAgain = 20 * time.Second
	loadTime    = time.Second
	loadOver    = 1.2
	loadLeast   = 64_000 // bits/s
	loadWait    = 100 * time.Millisecond
	loadLost    = 0.1
	loadMost    = 64 // probes at once

	// risen is the delay from which on silence is taken for congestion, which
	// sending everything twice would make worse.
	risen = 40 * time.Millisecond
	// awake is how long after another way has answered the one in use may take to
	// do so too: after an outage of all the first answer says little, and QUIC's
	// congestion control and TCP's begin anew then.
	awake = 60 * time.Millisecond
	// A way that loses nearly all is left after shutTime, but after narrowTime
	// where short packets pass: its packets may become shorter.
	shutTime, narrowTime = 150 * time.Millisecond, 2 * time.Second

	// gone is the loss from which on a way counts as shut in our direction.
	gone = 0.9
	// full is the loss from which on a way shows that it is overloaded.
	full = 0.1
	// strained is for how long a way must be seen to be overloaded while lanes
	// are not, before it is left for them. After the circuit breaker has acted it
	// no longer is, so this adds up over several tries.
	strained = 600 * time.Millisecond
	// sharedFor is how long after lanes have waited together with UDP the two are
	// taken to share a link that is too slow. Its queue comes and goes as the
	// breaker works, and what is known of lanes is often from when it was empty.
	sharedFor = 20 * time.Second
)

// view is what a chooser decides by.
type view struct {
	now     time.Time
	live    bool // a call may be there
	flowing bool // reports flow, so that silence means something
	ways    [wire.WaysEnd]session.WayState
}

// orders are what a chooser wants done.
type orders struct {
	first, also wire.Way
	short, long [wire.WaysEnd]bool // probes
	load        int                // long probes on the way that is tried, with answers as long
	begin       bool               // they are the first of another load
	why         string             // of the way; "" unless it changes
	cause       tunnel.Code        // of the change; "" where the way is the first
	next        time.Duration      // when to look again, at the latest
}

// A chooser decides how a session's datagrams go, by payload that arrived. It
// is pure: it is shown what is known and gives orders.
//
//	          short and long probes answered,
//	          and a load where it was strained
//	lanes ───────────────────────────────────► sealed ◄──┐
//	  ▲ ▲                                        │       │ answered, after 2 s, 4 s … 1 min
//	  │ │ nothing comes by it for 600 ms, or it  │       │
//	  │ │ loses all, and something comes by      ▼       │
//	  │ └────────────────────────────────────── quic-datagram
//	  └── the same; or UDP is overloaded, and nothing waits on lanes
//
// Lanes are left for UDP after 5 s, then each 15 s; after a minute or more
// where it was used again and left soon; and after up to five where it never worked.
//
// From 300 ms of silence on all ways are asked every 50 ms; from 600 ms on, and
// for 2 s after a change, what is small goes by both, unless delay rose first.
type chooser struct {
	way       wire.Way // in use; NoWay: none yet
	since     time.Time
	also      wire.Way
	both      time.Time     // until when also is used
	doubt     time.Time     // since when the way is silent or shut; zero: it is not
	answered  time.Time     // when another way first answered in this doubt; zero: none has
	congested bool          // delay had risen before the doubt: nothing is sent twice
	strain    time.Time     // since when the breaker is at work on it; zero: it is not
	apart     time.Duration // how long since then it was overloaded and lanes were not
	trip      time.Duration // the shortest round trip of lanes; 0: not known
	shared    time.Time     // when lanes were last seen to wait with it
	looked    time.Time     // the last step
	trial     trial
	asked     time.Time // when probes were last sent
	idled     time.Time // when an idle sidecar's were
	again     [wire.WaysEnd]again
}

// trial is of a way that is better than the one in use.
type trial struct {
	way   wire.Way // NoWay: none
	began time.Time
	load  time.Time     // since when it is asked to carry what the call sends; zero: it is not
	trip  time.Duration // then
	asked []asked       // of the load
}

// asked is how many probes of a load there had been at a time.
type asked struct {
	at time.Time
	n  int
}

// again says when a way that failed may be tried again.
type again struct {
	at     time.Time
	wait   time.Duration // after the last trial
	good   bool          // it has worked here
	back   bool          // it is used again after it had been left for lanes
	rest   time.Duration // after it was used again and left soon; 0: it was not
	narrow bool          // it carried less than the call sends
}

// order is from the best way to the last.
var order = [...]wire.Way{wire.WaySealed, wire.WayDatagram, wire.WayLanes}

func rank(w wire.Way) int {
	for i, o := range order {
		if o == w {
			return i
		}
	}
	return len(order)
}

// step looks and decides.
func (c *chooser) step(v view) orders {
	var o orders
	defer func() { c.looked = v.now }()
	if c.way == wire.NoWay || !v.ways[c.way].Present {
		c.fallBack(v, &o)
	}
	if c.way != wire.NoWay {
		c.watch(v, &o)
	}
	c.try(v, &o)
	if c.also != wire.NoWay && (!v.now.Before(c.both) || !v.ways[c.also].Present) {
		c.also = wire.NoWay
	}
	o.first, o.also = c.way, c.also
	switch rest := probeEvery - v.now.Sub(c.asked); {
	case c.doubt.IsZero() && c.trial.way == wire.NoWay:
	case rest > 0: // answers make us look more often than that
		o.short, o.long = [wire.WaysEnd]bool{}, [wire.WaysEnd]bool{}
		o.next = rest
	default:
		c.asked = v.now
		o.next = probeEvery
		c.ask(v, &o)
	}
	switch {
	case o.next > 0:
	case v.live:
		o.next = calmEvery
	default:
		o.next = idleEvery
		if c.way != wire.NoWay && v.now.Sub(c.idled) >= idleEvery {
			c.idled = v.now
			w := c.way
			if v.ways[wire.WayDatagram].Present { // the handshake has told its reset tokens
				w = wire.WayDatagram
			}
			o.short[w] = true
		}
	}
	return o
}

// fallBack uses what is there.
func (c *chooser) fallBack(v view, o *orders) {
	was := c.way
	c.way, c.doubt, c.strain, c.apart = wire.NoWay, time.Time{}, time.Time{}, 0
	for _, w := range [...]wire.Way{wire.WayDatagram, wire.WayLanes, wire.WaySealed} { // sealed packets have to be seen to arrive
		if v.ways[w].Present {
			why := wayAtHand[w]
			if w == wire.WayDatagram && !v.ways[wire.WaySealed].Present {
				why = noSealed
			}
			c.use(v, o, w, why, "")
			if was != wire.NoWay {
				o.cause = tunnel.PathLost
			}
			if v.flowing && v.now.Sub(v.ways[w].Heard) > deaf { // it has been silent for long: the next that answers is better
				c.doubt, c.answered, c.congested = v.now.Add(doubtful-deaf), time.Time{}, false
			}
			return
		}
	}
}

// wayAtHand says why a way is used before anything has been probed.
var wayAtHand = [wire.WaysEnd]string{
	wire.WayDatagram: "it is at hand; sealed packets are being tried",
	wire.WaySealed:   "it is at hand",
	wire.WayLanes:    "UDP does not pass",
}

// noSealed is why where there is nothing to try.
const noSealed = "it is at hand; the cloud proxy or this system offers no sealed packets"

func (c *chooser) use(v view, o *orders, w wire.Way, why string, cause tunnel.Code) {
	c.way, c.since, c.doubt, c.strain, c.apart, c.trial = w, v.now, time.Time{}, time.Time{}, 0, trial{}
	o.why, o.cause = why, cause
}

// leave goes over to another way and remembers when the old may be tried again.
func (c *chooser) leave(v view, o *orders, to wire.Way, why string, cause tunnel.Code, both bool) {
	from := c.way
	a := &c.again[from]
	soon := v.now.Sub(c.since) <= settled
	switch {
	case to == wire.WayLanes:
		a.good, a.wait, a.narrow = true, udpAgain, cause == tunnel.PathStrained
		if a.narrow {
			a.wait = narrowAgain
		}
		if a.back && soon {
			a.rest = restAgain(a.rest)
		} else {
			a.rest = 0
		}
	case soon && a.wait > 0:
		a.wait = min(2*a.wait, maxSealedAgain)
	default:
		a.wait = sealedAgain
	}
	a.at = v.now.Add(max(a.wait, a.rest))
	if from == wire.WaySealed && to == wire.WayLanes { // what has shut UDP has shut both
		c.again[wire.WayDatagram] = *a
	}
	c.use(v, o, to, why, cause)
	if both {
		c.also, c.both = from, v.now.Add(bothTime)
	}
}

// restAgain is how long UDP rests after it has failed the call once more.
func restAgain(last time.Duration) time.Duration {
	return min(max(2*last, udpRest), maxUDPAgain)
}

// suspect has the way in use asked at once, with all others: something has
// changed that it may not have outlived.
func (c *chooser) suspect(now time.Time) {
	if c.way != wire.NoWay && c.doubt.IsZero() {
		c.doubt, c.answered, c.congested = now, time.Time{}, false
	}
}

// watch looks after the way in use.
func (c *chooser) watch(v view, o *orders) {
	s := v.ways[c.way]
	fresh := v.now.Sub(s.Reported) < deaf
	quiet := v.now.Sub(later(s.Heard, c.since))
	silent := v.flowing && quiet > doubtful
	shut := s.Lost > gone && fresh && s.Delay <= risen // behind a full queue it is not shut but too slow
	// Where only our direction is shut the peer, which hears us by the other way,
	// is still heard: then only an answer ends the doubt.
	if !silent && !shut && (c.doubt.IsZero() || s.Small.After(c.doubt)) {
		c.doubt = time.Time{}
		c.strained(v, o)
		return
	}
	if c.doubt.IsZero() {
		c.doubt, c.answered, c.congested = v.now, time.Time{}, s.Delay > risen || s.Shaped
	}
	o.short[c.way] = true
	for _, w := range order {
		if w != c.way && v.ways[w].Present {
			o.short[w] = true
			if c.answered.IsZero() && v.ways[w].Small.After(c.doubt) {
				c.answered = v.now
			}
		}
	}
	least := deaf - doubtful
	switch short := s.Small.After(c.doubt); {
	case shut && !silent && short:
		least = narrowTime
	case shut && !short:
		least = shutTime
	}
	since := c.doubt
	if shut && !silent { // what was lost while nothing passed at all says nothing
		since = later(since, c.answered)
	}
	if v.now.Sub(since) < least || !c.answered.IsZero() && v.now.Sub(c.answered) < awake {
		return
	}
	for _, w := range order {
		if w == c.way || !v.ways[w].Present || !v.ways[w].Small.After(c.doubt) {
			continue
		}
		why := fmt.Sprintf("nothing came by %v for %v, %v passes", c.way, quiet.Round(time.Millisecond), w)
		if !silent {
			why = fmt.Sprintf("nothing was answered by %v for %v, %v passes", c.way, v.now.Sub(c.doubt).Round(time.Millisecond), w)
		}
		cause := tunnel.PathSilent
		if shut && !silent {
			why = fmt.Sprintf("%.0f %% of what we sent by %v was lost, %v passes", 100*s.Lost, c.way, w)
		}
		if rank(w) > rank(c.way) && w == wire.WayLanes {
			cause = tunnel.UDPBlocked
		}
		c.leave(v, o, w, why, cause, !c.congested)
		return
	}
	if c.also == wire.NoWay && c.both.Before(c.doubt) && !c.congested {
		for _, w := range [...]wire.Way{wire.WayLanes, wire.WaySealed, wire.WayDatagram} { // first the other family
			if w != c.way && v.ways[w].Present {
				c.also, c.both = w, v.now.Add(bothTime)
				return
			}
		}
	}
}

// strained looks whether UDP is throttled where TCP is not. Only while the way
// is overloaded does that show: on a link that is too slow for the call
// altogether what goes by lanes waits as well then, and not after the circuit
// breaker has emptied the queue.
func (c *chooser) strained(v view, o *orders) {
	s, lanes := v.ways[c.way], v.ways[wire.WayLanes]
	switch {
	case !lanes.Present:
		c.trip = 0
	case lanes.RTT > 0 && (c.trip == 0 || lanes.RTT < c.trip):
		c.trip = lanes.RTT
	}
	if c.way == wire.WayLanes || !s.Bad || !lanes.Present {
		c.strain, c.apart = time.Time{}, 0
		return
	}
	if c.strain.IsZero() {
		c.strain, c.apart = v.now, 0
	}
	took := min(v.now.Sub(c.looked), 2*calmEvery)
	switch asked := v.now.Sub(lanes.Reported) < deaf && lanes.Reported.After(c.strain); {
	case lanes.Delay > risen || lanes.RTT > c.trip+risen: // little is sent by them, reports if nothing else
		c.apart, c.shared = 0, v.now
	case asked && v.now.Sub(c.shared) > sharedFor && (s.Lost > full || s.Delay > max(risen, 2*lanes.Delay)):
		c.apart += took
	}
	if c.apart >= strained {
		c.leave(v, o, wire.WayLanes, fmt.Sprintf("%v carries less than the call sends, and nothing waits on TCP", c.way), tunnel.PathStrained, false)
	}
}

// try tries ways that are better than the one in use.
func (c *chooser) try(v view, o *orders) {
	if t := c.trial.way; t != wire.NoWay && (!v.ways[t].Present || rank(t) >= rank(c.way)) {
		c.trial = trial{}
	}
	if c.trial.way == wire.NoWay {
		for _, w := range order[:min(rank(c.way), len(order))] {
			if v.ways[w].Present && !v.now.Before(c.again[w].at) {
				c.trial = trial{way: w, began: v.now}
				break
			}
		}
	}
	t := c.trial.way
	if t == wire.NoWay {
		return
	}
	s := v.ways[t]
	small, large := s.Small.After(c.trial.began), s.Large.After(c.trial.began)
	took := v.now.Sub(c.trial.began)
	// Sealed packets make themselves smaller where only long ones vanish.
	passes := small && (large || took >= trialTime && t == wire.WaySealed)
	switch {
	case !c.trial.load.IsZero():
		c.judge(v, o)
	case passes && c.way == wire.WayLanes && c.again[t].narrow:
		c.trial.load, c.trial.trip = v.now, s.RTT
	case passes:
		c.turn(v, o, "probes of it were answered in "+inWords(took))
	case took >= trialTime:
		a := &c.again[t]
		first, most := udpAgain, maxUDPAgain
		switch {
		case c.way == wire.WayDatagram:
			first, most = sealedAgain, maxSealedAgain
		case a.good:
			most = goodUDPAgain
		}
		a.wait = min(max(2*a.wait, first), most)
		a.at = v.now.Add(a.wait)
		if c.way == wire.WayDatagram && a.wait == first {
			o.why = fmt.Sprintf("sealed packets were not answered in %v, QUIC DATAGRAM passes", trialTime)
		}
		c.trial = trial{}
	default:
		o.short[t] = o.short[t] || !small
		o.long[t] = !large
	}
}

// turn uses the way that was tried.
func (c *chooser) turn(v view, o *orders, why string) {
	from, to := c.way, c.trial.way
	cause := tunnel.PathProved
	if from == wire.WayLanes {
		cause = tunnel.UDPReturned
	}
	c.use(v, o, to, why, cause)
	c.again[to].back = from == wire.WayLanes
	if from == wire.WayLanes {
		c.also, c.both = from, v.now.Add(bothTime)
	}
}

// judge looks whether the way that is tried carries its load.
func (c *chooser) judge(v view, o *orders) {
	t := &c.trial
	due := 0 // probes that must have been answered by now
	for _, a := range t.asked {
		if v.now.Sub(a.at) >= t.trip+loadWait {
			due = a.n
		}
	}
	missing := due - v.ways[t.way].Carried
	switch lanes := v.ways[c.way]; {
	case missing > 2+int(loadLost*float64(due)), lanes.Delay > risen: // or it disturbs the call
		a := &c.again[t.way]
		a.rest = restAgain(a.rest)
		a.at = v.now.Add(a.rest)
		if t.way == wire.WaySealed { // the same packets would go by the other
			c.again[wire.WayDatagram].at = a.at
		}
		c.trial = trial{}
	case v.now.Sub(t.load) >= loadTime+t.trip+loadWait:
		c.again[t.way].narrow = false
		c.turn(v, o, "it carried as much as the call sends")
	}
}

// ask asks the way that is tried to carry as much as the call sends.
func (c *chooser) ask(v view, o *orders) {
	t := &c.trial
	if t.load.IsZero() || v.now.Sub(t.load) > loadTime {
		return
	}
	before := 0
	if len(t.asked) > 0 {
		before = t.asked[len(t.asked)-1].n
	}
	rate := max(loadOver*v.ways[c.way].Rate, loadLeast)
	bytes := rate / 8 * (v.now.Sub(t.load) + probeEvery).Seconds() // until the next step
	if more := int(bytes/session.LoadSize) - before; more > 0 {
		o.load, o.begin = min(more, loadMost), len(t.asked) == 0
		t.asked = append(t.asked, asked{v.now, before + o.load})
	}
}

// inWords is a duration as people are told it.
func inWords(d time.Duration) string {
	if d < time.Millisecond {
		return "less than 1ms"
	}
	return d.Round(time.Millisecond).String()
}

func later(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}
