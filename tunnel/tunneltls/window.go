package tunneltls

import "time"

const (
	// roundBeside is what a round lasts beside the shortest round trip.
	roundBeside = 20 * time.Millisecond
	// firstWindow is what may be on its way before anything is known, in bytes,
	// and always while no queue shows.
	firstWindow = 8 << 10
	// queued is how much the round trip grows before it counts as a queue, and
	// standing how much of one a lane lets stand then.
	queued   = 60 * time.Millisecond
	standing = 40 * time.Millisecond
	// peakLeft is what a round leaves of the peak: it halves in five rounds.
	peakLeft = 7. / 8
	// rounds is over how many rounds the rate is taken.
	rounds = 4
)

// A window bounds what a lane has on its way, bytes that wait in the kernel
// included. TCP's own window does not: that of an application which sends less
// than it may is far larger than what the path holds, and when the path becomes
// slow all of it is filled with what is stale before it is through.
//
//	in time:  twice what arrived in the best round of late (as RFC 7661 lets a window grow)
//	slow:     what arrives in the shortest round trip and 40 ms
//
// It is slow when the round trip has grown by 60 ms, or when less than half of
// what was on its way has arrived in a round. It is pure; the zero value is ready.
type window struct {
	began   time.Time // of this round
	arrived uint64    // bytes, by then
	flight  int       // on their way, then
	past    [rounds]round
	peak    float64       // bytes in the best round of late
	slow    int           // rounds in a row
	idle    int           // rounds in a row in which nothing was on its way
	trip    time.Duration // smoothed
	least   time.Duration // the shortest
	segment int
}

// A round is what arrived in some time, in bytes.
type round struct {
	bytes float64
	took  time.Duration
}

// look takes what the kernel says, and how many bytes are on their way.
func (w *window) look(now time.Time, is progress, flight int) {
	took := now.Sub(w.began)
	w.trip, w.least, w.segment = is.trip, is.least, is.segment
	switch {
	case w.began.IsZero():
	case took < is.least+roundBeside:
		return
	default:
		copy(w.past[1:], w.past[:])
		r := round{float64(is.arrived() - min(w.arrived, is.arrived())), took}
		w.past[0] = r
		w.peak = max(r.bytes, w.peak*peakLeft)
		if r.bytes == 0 && w.flight == 0 {
			w.idle++ // and the round trip is that of long ago
			break
		}
		w.idle = 0
		if w.queue() > queued || is.segment > 0 && w.flight > 4*is.segment && r.bytes < float64(w.flight)/2 {
			w.slow++
		} else {
			w.slow = 0
		}
	}
	w.began, w.arrived, w.flight = now, is.arrived(), flight
}

// queue is how much longer than the shortest round trip the last ones were.
// Repetitions of what was lost do not count, as in the kernel's figure.
func (w *window) queue() time.Duration {
	if w.least == 0 {
		return 0
	}
	return max(0, w.trip-w.least)
}

// tells reports whether the queue is one of late.
func (w *window) tells() bool { return w.least > 0 && w.idle < rounds }

// rate is how many bytes a second have arrived of late.
func (w *window) rate() float64 {
	var all round
	for _, r := range w.past {
		all.bytes += r.bytes
		all.took += r.took
	}
	if all.took == 0 {
		return 0
	}
	return all.bytes / all.took.Seconds()
}

// size is how many bytes may be on their way.
func (w *window) size() int {
	if w.slow > 0 {
		return max(2*w.segment, int(w.rate()*(w.least+standing).Seconds()))
	}
	return max(firstWindow, int(2*w.peak))
}
