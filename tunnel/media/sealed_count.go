package media

import (
	"encoding/binary"
	"sync/atomic"
	"time"
)

// All packets of one direction of a sealed way are numbered without a gap:
//
//	number = first 4 bytes of the connection ID of epoch 0 + epoch x 2²² + counter   (modulo 2³²)
//
// So the receiver knows what it has missed without being told, and the sender,
// told of one number that has come, when that packet left. Numbers of two
// sealed ways hardly ever meet.

const (
	// stampEvery is of how many packets one has its departure remembered. At
	// 50 packets a second that is one in 80 ms.
	stampEvery = 4
	// stamps bounds those remembered: 4,096 packets are 0.8 s of 40 Mbit/s.
	stamps = 1024
)

// firstNumber is the number of the first packet of all.
func firstNumber(id [idSize]byte) uint32 { return binary.BigEndian.Uint32(id[:4]) }

// departures remembers when packets left. It is safe for concurrent use.
type departures struct {
	origin time.Time
	ring   [stamps]atomic.Uint64 // number, and µs since origin modulo 2³²
}

// note remembers a packet that leaves now.
func (d *departures) note(number uint32) {
	if number%stampEvery == 0 {
		us := uint32(time.Since(d.origin).Microseconds())
		d.ring[number/stampEvery%stamps].Store(uint64(number)<<32 | uint64(us))
	}
}

// of returns when a packet left, in µs since an origin of its own, modulo 2³².
// False: it is not known.
func (d *departures) of(number uint32) (us uint32, ok bool) {
	v := d.ring[number/stampEvery%stamps].Load()
	return uint32(v), v != 0 && uint32(v>>32) == number
}

// arrivals counts what has come. It is guarded by the opener's mu.
type arrivals struct {
	first   uint32 // firstNumber
	highest uint32 // number, plus 1
	count   uint32
	seen    uint32 // the last whose departure the peer remembers
	seenAt  time.Time
}

// add counts a packet that has been opened; newest says that it is the highest so far.
func (a *arrivals) add(number uint32, newest bool) {
	a.count++
	if !newest {
		return
	}
	a.highest = number + 1
	if number%stampEvery == 0 {
		a.seen, a.seenAt = number, time.Now()
	}
}

// Arrivals is what has come by a sealed way so far. Differences tell; the
// counts go round at 2³².
type Arrivals struct {
	Sent   uint32    // packets that the peer had sent by the time of the newest one that has come
	Came   uint32    // packets that came
	Seen   uint32    // the number of one of the last of them
	SeenAt time.Time // when that came; zero: there is none
}

// Arrivals returns what has come so far.
func (s *Sealed) Arrivals() Arrivals {
	s.in.mu.Lock()
	defer s.in.mu.Unlock()
	a := &s.in.arrivals
	return Arrivals{Sent: a.highest - a.first, Came: a.count, Seen: a.seen, SeenAt: a.seenAt}
}

// Departed returns when the packet with a number that the peer has Seen left
// here, by a clock in microseconds modulo 2³² with an origin of its own. False:
// it is not known any more, or never left.
func (s *Sealed) Departed(number uint32) (us uint32, ok bool) { return s.out.departures.of(number) }
