package tunneltls

import (
	"net"
	"time"

	"culvert/tunnel"
)

const (
	// sampled is how long Stalled goes by one look at the kernel's state.
	sampled = 5 * time.Millisecond
	// silence is how long nothing of what a lane has on its way may arrive:
	// then it is aborted. Where a round trip is long, four of them.
	silence = 600 * time.Millisecond
	// watched is how often a lane is looked at while it has data on its way.
	watched = 100 * time.Millisecond
)

var errSilent = tunnel.Errorf(tunnel.CloudUnreachable, "nothing that was sent on this lane arrived any more, so it was given up")

// progress is what the kernel says of a connection's sending side.
type progress struct {
	flying int    // segments that are sent and not acknowledged in order
	sacked int    // of those: the peer has them, behind a hole
	acked  uint64 // bytes acknowledged in order, so far
	unsent int    // bytes that the kernel has not sent once
	open   bool   // the peer takes a full segment
	full   bool   // the congestion window takes no more
	expiry bool   // the retransmission timer has run out
	trip   time.Duration
	least  time.Duration // the shortest trip of late
	// segment is how long one is on average, in bytes; 0: not known.
	segment int
}

// arrived is how many bytes the peer has, those behind a hole included, which are
// reckoned from segments. The others are not: a lane that has carried sound has
// short ones on average, also when pictures go by it.
func (p progress) arrived() uint64 { return p.acked + uint64(p.sacked*p.segment) }

// owes says whether something may be expected to arrive. Where this host has
// lost its address the kernel can not even send, while a peer that does not
// read lets nothing be sent.
func (p progress) owes() bool { return p.flying > 0 || p.unsent > 0 && p.open }

// pulse follows the progress of one lane.
type pulse struct {
	at    time.Time // of the last look
	last  progress
	quiet time.Duration // how long something has been to arrive and nothing did
}

// look takes what the kernel says, and returns whether the lane is dead. Time
// counts as silence as far as it was watched: a process that was held up has
// heard nothing either.
func (p *pulse) look(now time.Time, is progress) (dead bool) {
	if !is.owes() || !p.last.owes() || is.acked != p.last.acked || is.sacked != p.last.sacked {
		p.quiet = 0
	} else {
		p.quiet += min(now.Sub(p.at), 2*watched)
	}
	p.at, p.last = now, is
	return p.quiet >= max(silence, 4*is.trip)
}

// stalled reports whether what is sent now would wait in this end's kernel.
//
// A hole at the peer is no reason to leave a lane: the packets behind it show
// the sender what is missing, so a lane that is left with a hole learns late
// that the repetition was lost too. Other lanes help with what is in it: Overdue.
func (p *pulse) stalled() bool {
	return p.last.expiry || p.last.full && p.last.unsent > 0
}

// Stalled reports whether a datagram that is sent now would wait behind others
// in this end's kernel, because the congestion window is full or the
// retransmission timer has run out. It is not ErrBlocked: the lane still takes
// datagrams. It costs a system call at most every 5 ms. Where the kernel tells
// nothing it is false.
func (w *lane) Stalled() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.freshLocked(time.Now())
	return w.pulse.stalled()
}

// Overdue offers again, oldest first, the datagrams that the lane has taken and
// whose arrival is not known although a round trip and 15 ms have passed: they,
// or what goes before them, may be lost. Each is offered until it is accepted,
// in all at most a quarter of the bytes that the lane takes. It returns whether
// there are any. again must not call this lane. It costs a system call at
// most every 5 ms. Where the kernel tells nothing there are none.
func (w *lane) Overdue(again func(p []byte, since time.Time) bool) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	now := time.Now()
	w.freshLocked(now)
	if w.err != nil || w.pulse.last.trip == 0 {
		return false
	}
	return w.kept.overdue(now.Add(-w.pulse.last.trip-grace), now.Add(-w.maxAge), again)
}

// freshLocked looks unless it has a moment ago.
func (w *lane) freshLocked(now time.Time) {
	if w.err == nil && now.Sub(w.pulse.at) >= sampled {
		w.lookLocked(now)
	}
}

// flightLocked is how many bytes are on their way, those included that this end
// still holds.
func (w *lane) flightLocked() int {
	given := w.written + uint64(w.writing+len(w.pending))
	is := &w.pulse.last
	return int(given - min(given, is.arrived()))
}

// Load returns how many bits a second have arrived of late of what the lane was
// given, and how much longer than the shortest the last round trips took: what
// queues on the path. False: it is not known.
func (w *lane) Load() (rate float64, queue time.Duration, ok bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if !w.keeps {
		return 0, 0, false
	}
	w.freshLocked(time.Now())
	return 8 * w.window.rate(), w.window.queue(), w.window.tells()
}

// fullRecord is a datagram of a usual packet, with its header, in bytes.
const fullRecord = 1300

// fullLocked reports whether the window has no room for n bytes. What is larger
// than the window passes alone.
func (w *lane) fullLocked(n int) bool {
	if !w.keeps {
		return false
	}
	flight := w.flightLocked()
	return flight > 0 && flight+n > w.window.size()
}

// lookLocked asks the kernel, and ends the lane when it is dead. It returns
// whether there is any use in asking again.
func (w *lane) lookLocked(now time.Time) bool {
	is, ok := w.kernel()
	if !ok {
		return false
	}
	if w.pulse.look(now, is) {
		w.abort = true
		w.stopLocked(errSilent)
		return false
	}
	w.kept.acked(is.acked)
	w.window.look(now, is, w.flightLocked())
	return true
}

// watchLocked sees to it that silence is noticed without further traffic. The
// timer runs from a Send until all has arrived.
func (w *lane) watchLocked() {
	w.fresh = true
	if w.watching {
		return
	}
	w.watching = true
	if w.watch == nil {
		w.watch = time.AfterFunc(watched, w.watchOnce)
		return
	}
	w.watch.Reset(watched)
}

func (w *lane) watchOnce() {
	if due := w.watchAgain(); due != nil {
		due()
	}
}

// watchAgain returns what is to be called, if anything.
func (w *lane) watchAgain() (due func()) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.err != nil || !w.lookLocked(time.Now()) {
		return nil
	}
	if w.full {
		if w.fullLocked(fullRecord) {
			w.watch.Reset(sampled)
			return nil
		}
		w.full, w.blocked, due = false, false, w.writable
	}
	// What the writer holds is neither pending nor in the kernel yet: so only
	// a second look in a row that finds nothing ends the watch.
	is := w.pulse.last
	if !w.fresh && is.flying == 0 && is.unsent == 0 && len(w.pending) == 0 {
		w.watching = false
		w.kept.free()
		return due
	}
	w.fresh = false
	w.watch.Reset(watched)
	return due
}

// Lanes is how many lanes a session should have as far as this end is
// concerned: 4 where its TCP can use BBR, 8 where it can not. With 4 × 100
// datagrams a second of 800 bytes, 20 ms each way and 3 % loss per direction,
// about 99.8 % then come back with at most 100 ms each way, with BBR on four and
// with CUBIC on eight alike; without what Overdue offers 98.1 %.
func Lanes() int {
	if bbr() {
		return 4
	}
	return 8
}

// reset closes the connection with a RST: what it holds is of no use any more.
func (l *link) reset() error {
	if c, ok := l.raw.(*net.TCPConn); ok {
		c.SetLinger(0)
	}
	err := l.raw.Close()
	l.gather.Conn.Close() // where it is more than that
	return err
}
