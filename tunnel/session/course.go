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

	vain atomic.Uint64 // datagrams sent by ways that have ended, and from which nothing was heard since
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
	Lost uint64        // datagrams of the apps that were dropped here, or sent by ways that ended without being heard from
}

// wayOut are the reasons for which a datagram is dropped on its way out.
var wayOut = [...]media.Reason{media.Aged, media.Full, media.NoWay, media.WayFailed, media.FrameShed}

// Missing returns how many datagrams have not come since an earlier Course.
func (c Course) Missing(since Course) uint64 {
	due, came := c.Due-since.Due, c.Came-since.Came
	return due - min(due, came)
}

// Course returns what has come so far. It is for one caller, since Gap begins anew.
func (n *Near) Course() Course {
	o := n.course
	c := Course{Due: o.due.Load(), Came: o.came.Load(), Gap: time.Duration(o.gap.Swap(0)), Lost: o.vain.Load()}
	for _, r := range wayOut {
		c.Lost += n.drops.Get(r)
	}
	if last := o.last.Load(); last != 0 {
		c.Last = o.origin.Add(time.Duration(last))
	}
	return c
}

// passage counts the datagrams that went by a way alone, so that those which
// were sent in vain are known when it is left.
type passage struct {
	sent   atomic.Int64 // datagrams given to the transport, but those that were cut
	twice  atomic.Int64 // of them by another way too
	heard  atomic.Int64 // alone, when a record last came by the way
	proved atomic.Int64 // alone, when the peer last showed that they arrive
}

func (p *passage) alone() int64 { return p.sent.Load() - p.twice.Load() }

// tell says that what went in vain until now has been told of.
func (p *passage) tell() {
	n := p.alone()
	p.heard.Store(n)
	p.proved.Store(n)
}

// since returns how many went by the way alone since then.
func (p *passage) since(then *atomic.Int64) uint64 { return uint64(max(p.alone()-then.Load(), 0)) }
