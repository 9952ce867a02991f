package session

import (
	"sync/atomic"
	"time"

	"culvert/tunnel/media"
)

// course follows what comes of all associations.
type course struct {
	origin    time.Time
	due, came atomic.Uint64
	last      atomic.Int64 // when the last came, ns since origin; 0: none has
	gap       atomic.Int64 // the longest time without one since it was last asked, ns
}

// fresh passes a number to its association's window, and counts.
func (c *course) fresh(w *media.Window, number uint16) bool {
	before := w.Due()
	if !w.Fresh(number) {
		return false
	}
	c.due.Add(w.Due() - before)
	c.came.Add(1)
	now := int64(time.Since(c.origin))
	if last := c.last.Swap(now); last != 0 {
		for gap := now - last; ; {
			longest := c.gap.Load()
			if gap <= longest || c.gap.CompareAndSwap(longest, gap) {
				break
			}
		}
	}
	return true
}

// Course is what has come to the sidecar of all associations, in all sessions.
type Course struct {
	Due  uint64        // datagrams that should have come, by their numbers
	Came uint64        // datagrams that came
	Last time.Time     // when the last did; zero: none has
	Gap  time.Duration // the longest time between two of them since Course was last asked for
}

// Missing returns how many datagrams have not come since an earlier Course.
func (c Course) Missing(since Course) uint64 {
	due, came := c.Due-since.Due, c.Came-since.Came
	return due - min(due, came)
}

// Course returns what has come so far. It is for one caller, since Gap begins anew.
func (n *Near) Course() Course {
	o := n.course
	c := Course{Due: o.due.Load(), Came: o.came.Load(), Gap: time.Duration(o.gap.Swap(0))}
	if last := o.last.Load(); last != 0 {
		c.Last = o.origin.Add(time.Duration(last))
	}
	return c
}
