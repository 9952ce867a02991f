package bulk

import (
	"math/bits"
	"time"
)

// The rules of DESIGN: what is bulk, what is media. Amounts are in bytes.
const (
	loudBytes    = 256_000 / 8   // in a second: more than a stream may have that is not bulk
	loudNeed     = 2             // such seconds running make a stream bulk
	quietNeed    = 10            // seconds running without end that
	rhythmCalls  = 5             // in a second, each way
	rhythmBytes  = 5_000_000 / 8 // in a second, both ways together
	rhythmOf     = 12            // seconds
	rhythmNeed   = 10            // of them
	rhythmMask   = 1<<rhythmOf - 1
	mostlyWaited = time.Second / 2
	// A buffer below takes the first of a stream faster than the path does.
	leastElapsed = time.Second / 2
)

// A meter judges one stream by what it does second by second. Times are since
// the pacer's beginning. Guarded by the stream's mu.
type meter struct {
	toOut, toIn deframer

	begin       time.Duration // of the second under way
	out, in     int           // bytes in it
	writes      int           // in it
	reads       int
	waited      time.Duration // in it
	waitingFrom time.Duration // what waited has not counted yet; valid while waiting
	waiting     bool

	last   int    // bytes written in the second before
	rhythm uint16 // a bit for each of the last seconds
	loud   uint8  // loud seconds running, to loudNeed
	quiet  uint8  // quiet seconds running, to quietNeed
	bulk   bool
}

// wrote counts a write.
func (m *meter) wrote(p []byte, now time.Duration) {
	m.roll(now)
	m.toOut.feed(p)
	m.out += len(p)
	m.writes++
	if m.out >= rhythmBytes {
		// Whatever the rest of this second brings, it is bulk's.
		m.loud, m.quiet = loudNeed, 0
	}
	m.judge()
}

// got counts a read.
func (m *meter) got(p []byte, now time.Duration) {
	m.roll(now)
	m.toIn.feed(p)
	m.in += len(p)
	m.reads++
	m.judge()
}

// wait and goOn bracket the time in which a write waits for its share.
func (m *meter) wait(now time.Duration) { m.waiting, m.waitingFrom = true, now }

func (m *meter) goOn(now time.Duration) {
	m.roll(now)
	m.waited += now - m.waitingFrom
	m.waiting = false
}

// roll closes the seconds that have passed.
func (m *meter) roll(now time.Duration) {
	if now-m.begin >= (rhythmOf+2)*time.Second && !m.waiting {
		// So long a silence leaves no trace but the judgement of the last second.
		m.closeSecond()
		m.rhythm, m.last, m.loud = 0, 0, 0
		m.bulk = false
		m.begin = now
		return
	}
	for now-m.begin >= time.Second {
		end := m.begin + time.Second
		if m.waiting && m.waitingFrom < end {
			m.waited += end - m.waitingFrom
			m.waitingFrom = end
		}
		m.closeSecond()
		m.begin = end
	}
}

// closeSecond judges the second under way and begins the next.
func (m *meter) closeSecond() {
	held := m.waited >= mostlyWaited
	regular := m.writes >= rhythmCalls && m.reads >= rhythmCalls && m.out+m.in < rhythmBytes
	m.rhythm = m.rhythm << 1 & rhythmMask
	if regular && !held {
		m.rhythm |= 1
	}
	if held || m.out >= loudBytes && !regular {
		m.loud, m.quiet = min(m.loud+1, loudNeed), 0
	} else {
		m.loud, m.quiet = 0, min(m.quiet+1, quietNeed)
	}
	m.last = m.out
	m.out, m.in, m.writes, m.reads, m.waited = 0, 0, 0, 0, 0
	m.judge()
}

func (m *meter) judge() {
	switch {
	case framed(&m.toOut, &m.toIn), bits.OnesCount16(m.rhythm) >= rhythmNeed, m.quiet >= quietNeed:
		m.bulk = false
	case m.loud >= loudNeed:
		m.bulk = true
	}
}

// rate is what the stream has written lately, in bits per second.
func (m *meter) rate(now time.Duration) float64 {
	m.roll(now)
	elapsed := max(now-m.begin, leastElapsed)
	return 8 * max(float64(m.last), float64(m.out)/elapsed.Seconds())
}
