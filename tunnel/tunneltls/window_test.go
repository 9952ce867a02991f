package tunneltls

import (
	"cmp"
	"testing"
	"time"
)

// pipe is a path as a lane's kernel tells it, looked at every 5 ms: so many bytes
// a second pass, after a round trip of 40 ms.
type pipe struct {
	w        window
	now      time.Time
	rate     float64
	sent     []parcel // on their way
	flight   int
	free     time.Time
	arrived  uint64
	average  int // of its segments since it began; 0: segment
	smoothed time.Duration
}

type parcel struct {
	since, due time.Time
}

const (
	trip    = 40 * time.Millisecond
	segment = 1200
)

// pass lets time go by in which an app offers so many segments each 5 ms, of which
// the window lets through what it does. It returns the most that was on its way.
func (p *pipe) pass(d time.Duration, offers float64) (most int) {
	owed := 0.0
	for end := p.now.Add(d); p.now.Before(end); p.now = p.now.Add(sampled) {
		for len(p.sent) > 0 && !p.sent[0].due.After(p.now) {
			// As RFC 6298 smooths it.
			p.smoothed += (p.now.Sub(p.sent[0].since) - p.smoothed) / 8
			p.sent = p.sent[1:]
			p.flight -= segment
			p.arrived += segment
		}
		p.w.look(p.now, progress{trip: p.smoothed, least: trip, segment: cmp.Or(p.average, segment), acked: p.arrived}, p.flight)
		for owed = min(owed+offers, 20); owed >= 1 && p.flight+segment <= p.w.size(); owed-- {
			if p.free.Before(p.now) {
				p.free = p.now
			}
			p.free = p.free.Add(time.Duration(segment / p.rate * float64(time.Second)))
			p.sent = append(p.sent, parcel{p.now, p.free.Add(trip)})
			p.flight += segment
		}
		most = max(most, p.flight)
	}
	return most
}

func TestAWindowFollowsWhatArrives(t *testing.T) {
	const mbit = 1e6 / 8
	p := &pipe{smoothed: trip, now: time.Unix(1000, 0), rate: 10 * mbit}
	p.pass(time.Second, 1) // 1.9 Mbit/s
	// All that is offered passes: a window that is twice the flight leaves room.
	if got := p.flight; got < 8*segment || got > 10*segment {
		t.Errorf("%d bytes are on their way, want what is offered in 40 ms", got)
	}
	if rate := 8 * p.w.rate(); rate < 1.7e6 || rate > 2.1e6 {
		t.Errorf("the rate is %.0f bit/s, want 1.9 Mbit/s", rate)
	}
	if p.w.queue() > sampled || p.w.slow != 0 {
		t.Errorf("a queue of %v, slow %d", p.w.queue(), p.w.slow)
	}

	p.rate = 0.3 * mbit
	if most := p.pass(200*time.Millisecond, 1); most > 30<<10 {
		t.Errorf("when the path becomes slow, %d bytes are given to it", most)
	}
	p.pass(2*time.Second, 1)
	if got := p.flight; got > 8*segment {
		t.Errorf("%d bytes stay on their way on a slow path, want what passes in 80 ms", got)
	}
	if rate := 8 * p.w.rate(); rate < 0.25e6 || rate > 0.35e6 {
		t.Errorf("the rate is %.0f bit/s, want 300 kbit/s", rate)
	}

	p.rate = 10 * mbit
	p.pass(2*time.Second, 1)
	if rate := 8 * p.w.rate(); rate < 1.7e6 || p.w.slow != 0 {
		t.Errorf("when the path is free again the rate is %.0f bit/s, slow %d", rate, p.w.slow)
	}
}

func TestAWindowGrowsWithWhatIsOffered(t *testing.T) {
	p := &pipe{smoothed: trip, now: time.Unix(1000, 0), rate: 1e9}
	p.pass(100*time.Millisecond, 0.5)
	p.pass(time.Second, 16) // 31 Mbit/s
	if rate := 8 * p.w.rate(); rate < 28e6 {
		t.Errorf("after a second %.0f bit/s of 31 Mbit/s pass", rate)
	}
}

func TestAWindowCountsBytesWhateverTheSegmentsWereBefore(t *testing.T) {
	p := &pipe{smoothed: trip, now: time.Unix(1000, 0), rate: 10e6 / 8, average: 200}
	p.pass(time.Second, 1) // 1.9 Mbit/s
	if rate := 8 * p.w.rate(); rate < 1.7e6 || rate > 2.1e6 || p.w.slow != 0 {
		t.Errorf("of 1.9 Mbit/s in long segments, after many short ones, %.0f bit/s are seen to arrive, slow %d", rate, p.w.slow)
	}
}

// A kernel's round trip stays what it was when something was last sent.
func TestALaneByWhichNothingGoesTellsNoQueue(t *testing.T) {
	const mbit = 1e6 / 8
	p := &pipe{smoothed: trip, now: time.Unix(1000, 0), rate: .3 * mbit}
	p.pass(3*time.Second, .3)
	if !p.w.tells() || p.w.queue() == 0 {
		t.Fatalf("a full lane tells nothing: %v", p.w.queue())
	}
	slow := p.w.slow
	p.pass(time.Second, 0)
	p.now = p.now.Add(time.Second)
	p.pass(time.Second, 0)
	if p.w.tells() {
		t.Errorf("a second after the last packet it tells %v", p.w.queue())
	}
	if p.w.slow > slow+20 {
		t.Errorf("it was slow in %d rounds in which nothing was sent", p.w.slow-slow)
	}
	p.pass(300*time.Millisecond, .1)
	if !p.w.tells() {
		t.Error("it tells nothing though it is used again")
	}
}
