package media

import (
	"sync"
	"time"
)

// An item is one datagram that waits. Items are pooled with their buffers.
type item struct {
	next  *item
	mark  mark
	since time.Time
	p     []byte
}

// Buffers come in these sizes; a longer datagram gets one of its own. Memory is
// counted by them.
const (
	smallItem = 256
	largeItem = 1536
)

var (
	smallItems = sync.Pool{New: func() any { return &item{p: make([]byte, 0, smallItem)} }}
	largeItems = sync.Pool{New: func() any { return &item{p: make([]byte, 0, largeItem)} }}
)

// itemSize is the buffer that n bytes take.
func itemSize(n int) int {
	switch {
	case n <= smallItem:
		return smallItem
	case n <= largeItem:
		return largeItem
	}
	return n
}

// newItem copies p.
func newItem(p []byte) *item {
	var it *item
	switch itemSize(len(p)) {
	case smallItem:
		it = smallItems.Get().(*item)
	case largeItem:
		it = largeItems.Get().(*item)
	default:
		it = &item{p: make([]byte, 0, len(p))}
	}
	it.p = append(it.p[:0], p...)
	return it
}

// free gives an item back.
func (it *item) free() {
	it.next, it.mark = nil, mark{}
	switch cap(it.p) {
	case smallItem:
		smallItems.Put(it)
	case largeItem:
		largeItems.Put(it)
	}
}

// A queue is the datagrams of one class of one seat, oldest first.
type queue struct {
	head, tail *item
	deficit    int // bytes that it may still send in this turn

	ring       *ring // where the seat has its turn in this class; nil: nowhere
	prev, next *seat // there
}

// after returns the item behind it; nil stands before the first.
func (q *queue) after(it *item) *item {
	if it == nil {
		return q.head
	}
	return it.next
}

// insert puts an item behind prev; nil: before the first.
func (q *queue) insert(prev, it *item) {
	if prev == nil {
		it.next, q.head = q.head, it
	} else {
		it.next, prev.next = prev.next, it
	}
	if q.tail == prev {
		q.tail = it
	}
}

// cut removes the item after prev; nil: the first.
func (q *queue) cut(prev *item) *item {
	var it *item
	if prev == nil {
		it = q.head
		q.head = it.next
	} else {
		it = prev.next
		prev.next = it.next
	}
	if q.tail == it {
		q.tail = prev
	}
	it.next = nil
	return it
}

// A ring is the seats that have something to send through one outlet in one
// class. The head is next.
type ring struct {
	class      int
	seats      int // in it
	head, tail *seat
}

func (g *ring) push(s *seat) {
	q := &s.queues[g.class]
	q.ring, q.prev, q.next = g, g.tail, nil
	if g.tail == nil {
		g.head = s
	} else {
		g.tail.queues[g.class].next = s
	}
	g.tail = s
	g.seats++
}

func (g *ring) remove(s *seat) {
	q := &s.queues[g.class]
	if q.prev == nil {
		g.head = q.next
	} else {
		q.prev.queues[g.class].next = q.next
	}
	if q.next == nil {
		g.tail = q.prev
	} else {
		q.next.queues[g.class].prev = q.prev
	}
	q.ring, q.prev, q.next = nil, nil, nil
	g.seats--
}
