package uplink

import (
	"sync"
	"time"

	"culvert/tunnel"
	"culvert/tunnel/session"
)

const (
	// A change is told when its cost is known: toldAfter, when datagrams come
	// again by then, and after toldLatest at the latest.
	toldAfter  = time.Second
	toldLatest = 5 * time.Second
	// recently is how long ago a datagram may have come for a call to be there.
	recently = 3 * time.Second
	// usual is a gap between two datagrams that needs no explanation.
	usual = 50 * time.Millisecond
)

// A narrator tells each change once, with what it has cost.
//
//	calm ──change──► counting ──datagrams come, 1 s; or 5 s; or the next change──► told
type narrator struct {
	course func() session.Course // what has come; its Gap begins anew
	calm   session.Course        // before the change, or now
	open   *tunnel.Change        // its cost is being counted; nil: none is

	mu    sync.Mutex
	heard []tunnel.Change // of other goroutines, which cost nothing by themselves
}

// hear takes a change that costs nothing by itself. It may be called on any
// goroutine.
func (n *narrator) hear(c tunnel.Change) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.heard = append(n.heard, c)
}

// step takes a change of the way, if there is one, and returns what can be
// told by now, and when there may be more; 0: not known. doubt says that
// something may be wrong already, flowing that datagrams flow.
func (n *narrator) step(now time.Time, change *tunnel.Change, doubt, flowing bool) (told []tunnel.Change, next time.Duration) {
	n.mu.Lock()
	told, n.heard = n.heard, nil
	n.mu.Unlock()
	if change != nil {
		told = append(told, n.begin(now, change, flowing || now.Sub(n.calm.Last) <= recently)...)
	}
	switch {
	case n.open == nil && doubt:
	case n.open == nil:
		n.calm = n.course()
	default:
		since := now.Sub(n.open.At)
		c := n.peek()
		if since >= toldAfter && c.Last.After(n.open.At) || since >= toldLatest {
			return append(told, n.finish(now)...), 0
		}
		next = toldAfter / 4
	}
	return told, next
}

// begin begins to count what a change costs, where a call is there, and returns
// what can be told.
func (n *narrator) begin(now time.Time, change *tunnel.Change, call bool) []tunnel.Change {
	told := n.finish(now)
	if !call {
		return append(told, *change)
	}
	n.open = change
	return told
}

// peek looks at the course without losing the longest gap.
func (n *narrator) peek() session.Course {
	c := n.course()
	n.calm.Gap = max(n.calm.Gap, c.Gap)
	return c
}

// finish tells the change whose cost is being counted.
func (n *narrator) finish(now time.Time) []tunnel.Change {
	if n.open == nil {
		return nil
	}
	c := n.peek()
	change := *n.open
	change.Gap = n.calm.Gap
	if !c.Last.After(change.At) { // nothing has come yet
		change.Gap = max(change.Gap, now.Sub(c.Last))
	}
	if change.Gap <= usual {
		change.Gap = 0
	}
	change.Lost = c.Missing(n.calm)
	change.LostUp += c.Lost - n.calm.Lost
	n.open, n.calm = nil, c
	return []tunnel.Change{change}
}
