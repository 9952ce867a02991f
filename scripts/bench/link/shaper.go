package main

import (
	"math/rand/v2"
	"time"
)

// fate says what becomes of a packet.
type fate int

const (
	passes  fate = iota
	blocked      // by udp, tcp or down
	lost         // by loss
	full         // the queue had no room
)

// shaper decides about the packets of one direction, in their order. It has no
// clock and no queue of its own: it says when a packet is due.
type shaper struct {
	random *rand.Rand
	losing bool          // in a run of lost packets
	free   time.Time     // when the line has sent all that it took
	last   time.Time     // when the last packet is due: none is due before it
	queued time.Duration // the longest that a packet took to leave: its wait and its own length
}

// Protocol numbers of IP.
const (
	protocolTCP = 6
	protocolUDP = 17
)

// decide says what becomes of an IP packet that comes now, and when it is due
// at the other end.
func (h *shaper) decide(s *settings, packet []byte, now time.Time) (fate, time.Time) {
	switch p := protocol(packet); {
	case s.down, s.noUDP && p == protocolUDP, s.noTCP && p == protocolTCP:
		return blocked, time.Time{}
	}
	if h.loses(s) {
		return lost, time.Time{}
	}
	leaves := now
	if s.rate > 0 {
		if h.free.After(now) {
			leaves = h.free
		}
		if leaves.Sub(now) > s.queue {
			return full, time.Time{}
		}
		leaves = leaves.Add(time.Duration(float64(len(packet)*8) / s.rate * float64(time.Second)))
		h.queued = max(h.queued, leaves.Sub(now))
		h.free = leaves
	}
	due := leaves.Add(s.delay)
	if s.jitter > 0 {
		due = due.Add(time.Duration(h.random.Int64N(int64(s.jitter) + 1)))
	}
	if due.Before(h.last) {
		due = h.last
	}
	h.last = due
	return passes, due
}

// loses is a two-state chain (Gilbert 1960). It leaves the losing state with
// 1/burst, and enters it so often that s.loss of all packets are lost; at a
// burst of 1 packets are lost independently.
func (h *shaper) loses(s *settings) bool {
	if s.loss == 0 {
		h.losing = false
		return false
	}
	if s.burst == 1 {
		return h.random.Float64() < s.loss
	}
	leave := 1 / s.burst
	enter := min(1, leave*s.loss/max(1-s.loss, 1e-9))
	if h.losing {
		h.losing = h.random.Float64() >= leave
	} else {
		h.losing = h.random.Float64() < enter
	}
	return h.losing
}

// protocol is the protocol number of an IP packet; 0 where it is none.
// Extension headers of IPv6 are not followed.
func protocol(p []byte) byte {
	switch {
	case len(p) >= 20 && p[0]>>4 == 4:
		return p[9]
	case len(p) >= 40 && p[0]>>4 == 6:
		return p[6]
	}
	return 0
}
