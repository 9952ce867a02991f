package tunneltls

import "time"

// ages tells how long records were on their way beyond the shortest way seen
// lately, from the sender's 16-bit millisecond clock and ours, whose origins
// and rates differ.
//
//	offset = arrival - send time      (the way, plus what the clocks differ by)
//	age    = offset - smallest offset of the last 30 s
//
// The window lets it follow clocks that drift, and a path that has become
// longer for good. What it can not know: how long the shortest way itself
// takes; that a queue has been standing on the path since the first record,
// or for more than the window; a delay of more than 32 s, which looks like one
// that is 65.536 s shorter (the send time's range). After a silence longer than
// the window the last smallest offset is used on, raised by what a clock may
// have drifted, so that what was held up for the whole silence is still late.
//
// It measures to the millisecond. It is for one goroutine.
type ages struct {
	least [agesParts]offset // a ring, by time
	part  int64             // the number of the newest part since the start
	known bool
}

type offset struct {
	ms  int64
	set bool
}

const (
	agesParts = 6
	agesPart  = 5 * time.Second
	// drift is how much faster one of two clocks may be; quartz stays within
	// 100 parts in a million.
	drift = 200e-6
)

// age takes the arrival, as time since any fixed origin that never goes back,
// and the send time of one record.
func (a *ages) age(arrival time.Duration, sent uint16) time.Duration {
	ms := arrival.Milliseconds()
	if !a.known {
		a.known = true
		a.part = int64(arrival / agesPart)
		a.least[a.part%agesParts] = offset{int64(uint16(ms) - sent), true}
		return 0
	}
	a.turn(int64(arrival / agesPart))
	base := a.smallest()
	// The offset is what lies within 32 s of the base and equals arrival -
	// send time modulo 65,536.
	now := base + int64(int16(uint16(ms)-sent-uint16(base)))
	if slot := &a.least[a.part%agesParts]; !slot.set || now < slot.ms {
		*slot = offset{now, true}
	}
	return time.Duration(max(now-base, 0)) * time.Millisecond
}

// turn moves the window on.
func (a *ages) turn(part int64) {
	gap := part - a.part
	if gap <= 0 {
		return
	}
	last := a.smallest()
	for i := range min(gap, agesParts) {
		a.least[(part-i)%agesParts] = offset{}
	}
	a.part = part
	if gap >= agesParts {
		raised := time.Duration(float64(gap) * drift * float64(agesPart)).Milliseconds()
		a.least[part%agesParts] = offset{last + raised, true}
	}
}

func (a *ages) smallest() int64 {
	least := offset{}
	for _, o := range a.least {
		if o.set && (!least.set || o.ms < least.ms) {
			least = o
		}
	}
	return least.ms
}
