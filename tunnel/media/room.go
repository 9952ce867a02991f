package media

import (
	"errors"
	"sync"
	"time"

	"culvert/tunnel"
)

// MaxAge is how long a datagram may wait by default. A later one is as bad as
// lost to a call.
const MaxAge = 150 * time.Millisecond

// maxWaiting bounds a room's memory, in bytes. At 150 ms it is reached above
// 200 Mbit/s of media on a way that can not take it.
const maxWaiting = 4 << 20

// A Room is the waiting room in front of one way. While the way takes
// datagrams they pass straight through; what it can not take waits here,
// in order, no longer than the age limit.
type Room struct {
	way   tunnel.Way
	age   time.Duration
	drops *Drops

	mu    sync.Mutex // held over way.Send, which never blocks, so that order holds
	queue []waiting  // oldest first, from head on
	head  int
	bytes int
}

type waiting struct {
	p     []byte
	since time.Time
}

// NewRoom makes the room and starts the way with recv. age 0 means MaxAge.
func NewRoom(way tunnel.Way, age time.Duration, drops *Drops, recv func([]byte)) *Room {
	if age <= 0 {
		age = MaxAge
	}
	r := &Room{way: way, age: age, drops: drops}
	way.Start(recv, r.writable)
	return r
}

// Way returns the way behind the room.
func (r *Room) Way() tunnel.Way { return r.way }

// Send sends p now, lets it wait, or drops and counts it. It borrows p. The
// only error is tunnel.ErrTooLarge, which is counted too.
func (r *Room) Send(p []byte) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.queue) > r.head {
		// The way has been blocked since an earlier datagram; writable comes.
		r.expire(time.Now())
		r.wait(p)
		return nil
	}
	switch err := r.way.Send(p); {
	case err == nil:
	case errors.Is(err, tunnel.ErrBlocked):
		r.wait(p)
	case errors.Is(err, tunnel.ErrTooLarge):
		r.drops.Add(TooLarge)
		return err
	default:
		r.drops.Add(WayFailed)
	}
	return nil
}

func (r *Room) wait(p []byte) {
	for r.bytes+len(p) > maxWaiting && len(r.queue) > r.head {
		r.pop()
		r.drops.Add(Full)
	}
	r.queue = append(r.queue, waiting{append(make([]byte, 0, len(p)), p...), time.Now()})
	r.bytes += len(p)
}

// pop removes the oldest.
func (r *Room) pop() {
	r.bytes -= len(r.queue[r.head].p)
	r.queue[r.head] = waiting{}
	r.head++
	switch {
	case r.head == len(r.queue):
		r.queue, r.head = r.queue[:0], 0
	case r.head >= 64 && r.head*2 >= len(r.queue):
		n := copy(r.queue, r.queue[r.head:])
		clear(r.queue[n:])
		r.queue, r.head = r.queue[:n], 0
	}
}

func (r *Room) expire(now time.Time) {
	for len(r.queue) > r.head && now.Sub(r.queue[r.head].since) > r.age {
		r.pop()
		r.drops.Add(Aged)
	}
}

// writable sends what waits and is still young enough.
func (r *Room) writable() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.expire(time.Now())
	for len(r.queue) > r.head {
		switch err := r.way.Send(r.queue[r.head].p); {
		case err == nil:
		case errors.Is(err, tunnel.ErrBlocked):
			return
		case errors.Is(err, tunnel.ErrTooLarge):
			r.drops.Add(TooLarge)
		default:
			r.drops.Add(WayFailed)
		}
		r.pop()
	}
}

// Discard drops and counts what waits, when the way is no longer used.
func (r *Room) Discard() {
	r.mu.Lock()
	defer r.mu.Unlock()
	for len(r.queue) > r.head {
		r.pop()
		r.drops.Add(NoWay)
	}
}

// Waiting returns the datagrams that wait.
func (r *Room) Waiting() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.queue) - r.head
}
