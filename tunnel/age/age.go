package age

import "time"

// Ages tells how long records were on their way beyond the shortest way seen
// lately, from the sender's 16-bit millisecond clock and ours, whose origins
// and rates differ.
//
//	offset = arrival - send time      (the way, plus what the clocks differ by)
//	age    = offset - smallest offset of the last 30 s
//
// The window lets it follow clocks that drift, and a path that has become
// longer for good. What it can not know: how long the shortest way itself
// takes; that a queue has been standing on the path since the first record,
// or for more than the window; a delay of more than 49 s (Range), which looks like
// one that is 65.536 s shorter (the send time's range). That is more than half, as
// a process can stand still for long, and a way never becomes so much shorter. After a silence longer than
// the window the last smallest offset is used on, raised by what a clock may
// have drifted, so that what was held up for the whole silence is still late.
//
// It measures to the millisecond. It is for one goroutine.
type Ages struct {
	least [parts]offset // a ring, by time
	part  int64         // the number of the newest part since the start
	known bool
}

// Range is what the age of a record can be told up to: three quarters of the send
// time's.
const Range = 3 << 14 * time.Millisecond

type offset struct {
	ms  int64
	set bool
}

const (
	parts = 6
	span  = 5 * time.Second
	// drift is how much faster one of two clocks may be; quartz stays within
	// 100 parts in a million.
	drift = 200e-6
)

// Of takes the arrival, as time since any fixed origin that never goes back,
// and the send time of one record.
func (a *Ages) Of(arrival time.Duration, sent uint16) time.Duration {
	ms := arrival.Milliseconds()
	if !a.known {
		a.known = true
		a.part = int64(arrival / span)
		a.least[a.part%parts] = offset{int64(uint16(ms) - sent), true}
		return 0
	}
	a.turn(int64(arrival / span))
	base := a.smallest()
	// The offset is what lies between 16 s below the base and 49 s above it, and
	// equals arrival - send time modulo 65,536.
	above := int64(uint16(ms) - sent - uint16(base))
	if above >= Range.Milliseconds() {
		above -= 1 << 16
	}
	now := base + above
	if slot := &a.least[a.part%parts]; !slot.set || now < slot.ms {
		*slot = offset{now, true}
	}
	return time.Duration(max(now-base, 0)) * time.Millisecond
}

// turn moves the window on.
func (a *Ages) turn(part int64) {
	gap := part - a.part
	if gap <= 0 {
		return
	}
	last := a.smallest()
	for i := range min(gap, parts) {
		a.least[(part-i)%parts] = offset{}
	}
	a.part = part
	if gap >= parts {
		raised := time.Duration(float64(gap) * drift * float64(span)).Milliseconds()
		a.least[part%parts] = offset{last + raised, true}
	}
}

func (a *Ages) smallest() int64 {
	least := offset{}
	for _, o := range a.least {
		if o.set && (!least.set || o.ms < least.ms) {
			least = o
		}
	}
	return least.ms
}
