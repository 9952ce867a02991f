package media

import "time"

// Base tells how much longer than the shortest way of late a packet was under
// way, from the sender's clock in microseconds modulo 2³² and ours, whose
// origins and rates differ:
//
//	offset = arrival - send time      (the way, plus what the clocks differ by)
//	queueing = offset - smallest offset of the last 30 s
//
// It can not know how long the shortest way itself takes, nor of a queue that
// has been standing for the whole window. The zero value is ready; it is for
// one goroutine.
type Base struct {
	least   [baseParts]int64 // µs, by time; a ring
	set     [baseParts]bool
	part    int64 // the number of the newest part
	started bool
}

const (
	baseParts = 6
	basePart  = 5 * time.Second
)

// Above takes the arrival, as time since any fixed origin that never goes
// back, and the send time.
func (b *Base) Above(arrival time.Duration, sent uint32) time.Duration {
	return b.Over(arrival, uint32(arrival.Microseconds())-sent)
}

// Over is Above for an offset that has been reckoned elsewhere, in microseconds
// modulo 2³²; now only tells how old it is.
func (b *Base) Over(now time.Duration, offset32 uint32) time.Duration {
	part := int64(now / basePart)
	if !b.started {
		b.started, b.part = true, part
		b.put(int64(int32(offset32)))
		return 0
	}
	base, _ := b.smallest()
	// The offset is what lies within 2³¹ µs (36 minutes) of the base.
	offset := base + int64(int32(offset32-uint32(base)))
	if gap := part - b.part; gap > 0 {
		for i := range min(gap, baseParts) {
			b.set[(part-i)%baseParts] = false
		}
		b.part = part
	}
	b.put(offset)
	base, _ = b.smallest()
	return time.Duration(offset-base) * time.Microsecond
}

func (b *Base) put(offset int64) {
	i := b.part % baseParts
	if !b.set[i] || offset < b.least[i] {
		b.set[i], b.least[i] = true, offset
	}
}

func (b *Base) smallest() (least int64, any bool) {
	for i, set := range b.set {
		if set && (!any || b.least[i] < least) {
			least, any = b.least[i], true
		}
	}
	return least, any
}
