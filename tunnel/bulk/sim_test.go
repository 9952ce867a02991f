package bulk

import (
	"fmt"
	"math/rand/v2"
	"net"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"

	"culvert/tunnel"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const (
	ms = time.Millisecond

	segment = 1400
	unsent  = 128 << 10 // what TCP takes beyond what is in flight
)

// A segmentSent is a packet on the path. from is nil for media.
type segmentSent struct {
	from *tcp
	size int
	at   time.Duration // when it came to the queue
}

// An ack tells a sender that a segment has arrived, or has not.
type ack struct {
	to   *tcp
	size int
	lost bool
	at   time.Duration
}

// tcp is a sender below the pacer: a send buffer, and a window that grows by
// a few segments each round trip until the queue overflows.
type tcp struct {
	tunnel.Stream // nil: the rest is not used
	l             *link
	room          sync.Cond
	unsent        int
	inFlight      int
	window        float64
	cutAt         time.Duration
	written       int // accepted from the pacer
	arrived       int
	closed        bool
}

func (c *tcp) Write(p []byte) (int, error) {
	c.l.mu.Lock()
	defer c.l.mu.Unlock()
	for n := 0; n < len(p); {
		for c.unsent >= unsent && !c.closed {
			c.room.Wait()
		}
		if c.closed {
			return n, net.ErrClosed
		}
		m := min(len(p)-n, unsent-c.unsent)
		n, c.unsent, c.written = n+m, c.unsent+m, c.written+m
	}
	return len(p), nil
}

func (c *tcp) Abort(error) {
	c.l.mu.Lock()
	defer c.l.mu.Unlock()
	c.closed = true
	c.room.Broadcast()
}

// A link is a bottleneck with a drop-tail queue of 200 ms, carrying media and
// TCP, stepped each millisecond.
type link struct {
	mu     sync.Mutex
	rate   float64       // bits per second
	media  float64       // bits per second
	mute   bool          // reports are lost
	held   bool          // media is held back
	noise  time.Duration // reports are wrong by up to this
	oneWay time.Duration
	p      *Pacer
	now    time.Duration
	queue  []segmentSent
	queued int     // bytes
	budget float64 // bytes that may leave
	owed   float64 // bytes of media that are due
	acks   []ack
	rng    *rand.Rand
	tcps   []*tcp

	least   time.Duration   // queueing of media since the last report
	base    time.Duration   // the least that was ever reported: all that an end knows of an empty queue
	report  time.Duration   // when the next is made
	reports []time.Duration // queueing reported, and when it arrives
	arrive  []time.Duration
	delays  []time.Duration // queueing of each media packet
	arrived int             // bytes of TCP
}

func newLink(mbits, media float64) *link {
	return &link{rate: mbits * 1e6, media: media * 1e6, p: New(), rng: rand.New(rand.NewPCG(1, 2)), least: time.Hour, base: time.Hour, oneWay: 20 * ms}
}

func (l *link) dial() *tcp {
	c := &tcp{l: l, window: 10 * segment}
	c.room.L = &l.mu
	l.mu.Lock()
	l.tcps = append(l.tcps, c)
	l.mu.Unlock()
	return c
}

// run lets d pass.
func (l *link) run(d time.Duration) {
	for range d / ms {
		time.Sleep(ms)
		l.step()
	}
}

func (l *link) put(s segmentSent) bool {
	if float64(l.queued+s.size)*8 > l.rate*0.2 {
		return false
	}
	s.at = l.now
	l.queue = append(l.queue, s)
	l.queued += s.size
	return true
}

func (l *link) step() {
	l.mu.Lock()
	l.now += ms
	for len(l.acks) > 0 && l.acks[0].at <= l.now {
		a := l.acks[0]
		l.acks = l.acks[1:]
		c := a.to
		c.inFlight -= a.size
		switch {
		case !a.lost:
			c.window += 4 * segment * float64(a.size) / c.window
		default:
			c.unsent += a.size
			if l.now-c.cutAt > 2*l.oneWay+200*ms {
				c.window, c.cutAt = max(c.window*0.7, 4*segment), l.now
			}
		}
	}
	for _, c := range l.tcps {
		for c.unsent > 0 && float64(c.inFlight+segment) <= c.window {
			size := min(c.unsent, segment)
			c.unsent -= size
			c.inFlight += size
			if !l.put(segmentSent{from: c, size: size}) {
				l.acks = append(l.acks, ack{c, size, true, l.now + 2*l.oneWay + 200*ms})
			}
		}
		c.room.Broadcast()
	}
	for l.owed += l.media / 8 / 1000; l.owed >= 1000; l.owed -= 1000 {
		if !l.put(segmentSent{size: 1000}) {
			l.delays = append(l.delays, time.Hour)
		}
	}
	l.budget = min(l.budget, 0) + l.rate/8/1000 // an idle link saves nothing
	for len(l.queue) > 0 && l.budget > 0 {
		s := l.queue[0]
		l.queue = l.queue[1:]
		l.queued -= s.size
		l.budget -= float64(s.size)
		waited := l.now - s.at
		switch {
		case s.from == nil:
			l.delays = append(l.delays, waited)
			l.least = min(l.least, waited)
		case l.rng.IntN(1000) < 5: // loss that is no congestion: sent again
			l.acks = append(l.acks, ack{s.from, s.size, false, l.now + 2*l.oneWay})
			s.from.unsent += s.size
		default:
			s.from.arrived += s.size
			l.arrived += s.size
			l.acks = append(l.acks, ack{s.from, s.size, false, l.now + 2*l.oneWay})
		}
	}
	slices.SortStableFunc(l.acks, func(a, b ack) int { return int(a.at - b.at) })
	made := l.now >= l.report
	if made {
		if l.least < time.Hour && !l.mute {
			wrong := time.Duration(l.rng.Int64N(int64(l.noise) + 1))
			l.base = min(l.base, l.least)
			l.reports, l.arrive = append(l.reports, l.least-l.base+wrong), append(l.arrive, l.now+2*l.oneWay)
		}
		l.least = time.Hour
	}
	var news []time.Duration
	for len(l.arrive) > 0 && l.arrive[0] <= l.now {
		news = append(news, l.reports[0])
		l.reports, l.arrive = l.reports[1:], l.arrive[1:]
	}
	l.mu.Unlock()
	for _, q := range news {
		l.p.Delay(time.Now(), q, l.held)
	}
	if made {
		l.report = l.now + 250*ms
		if l.p.Active() {
			l.report = l.now + 50*ms
		}
	}
}

// download writes without pause until it is stopped.
func (l *link) download(wg *sync.WaitGroup) (c *tcp, stop func()) {
	c = l.dial()
	s := l.p.Wrap(c)
	wg.Go(func() {
		b := make([]byte, 64<<10)
		for {
			if _, err := s.Write(b); err != nil {
				return
			}
		}
	})
	return c, func() { s.Abort(nil) }
}

// forget begins to measure anew.
func (l *link) forget() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.delays, l.arrived = nil, 0
	for _, c := range l.tcps {
		c.arrived = 0
	}
}

func (l *link) quantile(q float64) time.Duration {
	l.mu.Lock()
	defer l.mu.Unlock()
	all := slices.Sorted(slices.Values(l.delays))
	return all[min(int(q*float64(len(all))), len(all)-1)]
}

// downloads starts n and returns what ends them all.
func (l *link) downloads(n int) (end func()) {
	var wg sync.WaitGroup
	var stops []func()
	for range n {
		_, stop := l.download(&wg)
		stops = append(stops, stop)
	}
	return func() {
		for _, stop := range stops {
			stop()
		}
		wg.Wait()
	}
}

// mbits is what TCP has had since forget, d ago.
func (l *link) mbits(d time.Duration) float64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	return float64(l.arrived) * 8 / 1e6 / d.Seconds()
}

func TestBulkLeavesRoomForACallAndFillsTheRest(t *testing.T) {
	for _, c := range []struct {
		link, media float64 // Mbit/s
		streams     int
		before      bool // the downloads run when the call begins
		noise       time.Duration
		oneWay      time.Duration
		bulk        float64 // Mbit/s at least
	}{
		{20, 3.2, 2, true, 0, 20 * ms, 12},
		{20, 3.2, 2, true, 0, 5 * ms, 12},
		{20, 3.2, 2, true, 0, 60 * ms, 12},
		{20, 3.2, 2, true, 0, 100 * ms, 12}, // reports are 0.3 s late
		{20, 3.2, 2, false, 0, 20 * ms, 12},
		{20, 3.2, 1, true, 0, 20 * ms, 12},
		{20, 3.2, 2, true, 6 * ms, 20 * ms, 12},
		{2, 0.4, 2, true, 0, 20 * ms, 1},
		{100, 3.2, 2, true, 0, 20 * ms, 60},
		{100, 3.2, 8, false, 0, 20 * ms, 60},
	} {
		name := fmt.Sprintf("%v Mbit/s, %d streams, running before %v, noise %v, %v away", c.link, c.streams, c.before, c.noise, c.oneWay)
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				l := newLink(c.link, c.media)
				l.noise, l.oneWay = c.noise, c.oneWay
				var end func()
				if c.before {
					end = l.downloads(c.streams)
					l.run(4 * time.Second)
					l.p.Live(true)
				} else {
					l.p.Live(true)
					l.run(time.Second)
					end = l.downloads(c.streams)
				}
				l.forget()
				l.run(3 * time.Second)
				t.Logf("first 3 s: bulk %.1f Mbit/s; queueing p50 %v, p99 %v", l.mbits(3*time.Second), l.quantile(.5), l.quantile(.99))
				l.forget()
				l.run(20 * time.Second)
				bulk, p50, p99 := l.mbits(20*time.Second), l.quantile(.5), l.quantile(.99)
				t.Logf("then: bulk %.1f Mbit/s; queueing p50 %v, p99 %v", bulk, p50, p99)
				if most := 60*ms + c.oneWay/4; bulk < c.bulk || p50 > 25*ms || p99 > most {
					t.Errorf("bulk has %.1f Mbit/s, want %v; queueing: median %v, want 25ms, 99th percentile %v, want %v", bulk, c.bulk, p50, p99, most)
				}
				if got := l.p.Stats().Streams; got != c.streams {
					t.Errorf("%d streams count as bulk, want %d", got, c.streams)
				}
				end()
				if got := l.p.Stats().Streams; got != 0 {
					t.Errorf("%d streams count as bulk after their end", got)
				}
			})
		})
	}
}

// Without a pacer the same path is full: the test above measures something.
func TestWithoutACallBulkRunsFree(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newLink(20, 3.2)
		end := l.downloads(2)
		l.run(4 * time.Second)
		l.forget()
		l.run(10 * time.Second)
		if bulk, p50 := l.mbits(10*time.Second), l.quantile(.5); bulk < 16 || p50 < 100*ms {
			t.Errorf("bulk has %.1f Mbit/s at %v of queueing", bulk, p50)
		}
		if l.p.Active() || l.p.Stats().Rate != 0 {
			t.Error("it paces without a call")
		}

		l.p.Live(true)
		if !l.p.Active() {
			t.Error("it does not pace when a call begins")
		}
		l.run(5 * time.Second)
		l.p.Live(false)
		if l.p.Active() || len(l.p.waiting) > 0 {
			t.Error("something is held after the call")
		}
		l.run(4 * time.Second)
		l.forget()
		l.run(4 * time.Second)
		if bulk, p50 := l.mbits(4*time.Second), l.quantile(.5); bulk < 16 || p50 < 100*ms {
			t.Errorf("after the call: bulk has %.1f Mbit/s at %v of queueing", bulk, p50)
		}
		end()
	})
}

func TestBulkIsSharedEvenly(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newLink(20, 3.2)
		l.p.Live(true)
		end := l.downloads(2)
		l.run(5 * time.Second)
		more := l.downloads(3)
		l.run(6 * time.Second)
		l.forget()
		l.run(20 * time.Second)
		mean := l.arrived / len(l.tcps)
		for i, c := range l.tcps {
			if c.arrived < mean*8/10 || c.arrived > mean*12/10 {
				t.Errorf("download %d had %d bytes, the mean is %d", i, c.arrived, mean)
			}
		}
		end()
		more()
	})
}

func TestASilentReportPathSlowsBulkToItsFloor(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newLink(20, 3.2)
		l.p.Live(true)
		end := l.downloads(2)
		l.run(8 * time.Second)
		l.mute = true
		l.run(10 * time.Second)
		if rate := l.p.Stats().Rate; rate != floor {
			t.Errorf("after 10 s of silence the rate is %v, want %v", rate, floor)
		}
		l.forget()
		l.run(10 * time.Second)
		if bulk := l.mbits(10 * time.Second); bulk < 0.2 || bulk > 0.3 {
			t.Errorf("bulk has %.3f Mbit/s in silence, want 0.256", bulk)
		}
		l.mute = false
		l.run(12 * time.Second)
		l.forget()
		l.run(5 * time.Second)
		if bulk, p99 := l.mbits(5*time.Second), l.quantile(.99); bulk < 12 || p99 > 60*ms {
			t.Errorf("12 s after the silence bulk has %.1f Mbit/s at %v (99th percentile)", bulk, p99)
		}
		end()
	})
}

// Somebody else fills the path: bulk gives way as far as its floor, and comes
// back.
func TestBulkGivesWayToOthers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newLink(20, 3.2)
		l.p.Live(true)
		end := l.downloads(2)
		l.run(8 * time.Second)
		l.mu.Lock()
		l.media = 25e6
		l.mu.Unlock()
		l.run(15 * time.Second)
		if rate := l.p.Stats().Rate; rate != floor {
			t.Errorf("the rate is %v beside an overload, want %v", rate, floor)
		}
		l.mu.Lock()
		l.media = 3.2e6
		l.mu.Unlock()
		l.run(12 * time.Second)
		l.forget()
		l.run(5 * time.Second)
		if bulk, p99 := l.mbits(5*time.Second), l.quantile(.99); bulk < 12 || p99 > 60*ms {
			t.Errorf("12 s after the overload bulk has %.1f Mbit/s at %v (99th percentile)", bulk, p99)
		}
		end()
	})
}

// What media that is held back leaves free is its own: bulk stays at its floor,
// and comes back when the media does.
func TestBulkDoesNotTakeTheRoomOfMediaThatIsHeldBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newLink(20, 3.2)
		l.p.Live(true)
		end := l.downloads(2)
		l.run(8 * time.Second)
		if !l.p.Gives() {
			t.Error("bulk at its share does not give way")
		}
		l.mu.Lock()
		l.media = 25e6
		l.mu.Unlock()
		l.run(10 * time.Second)
		if l.p.Gives() {
			t.Error("bulk has more to give at its floor")
		}
		l.mu.Lock()
		l.media, l.held = 1e6, true
		l.mu.Unlock()
		l.run(5 * time.Second)
		if rate := l.p.Stats().Rate; rate != floor {
			t.Errorf("the rate is %v beside media that is held back, want %v", rate, floor)
		}
		l.mu.Lock()
		l.media, l.held = 3.2e6, false
		l.mu.Unlock()
		l.run(12 * time.Second)
		if rate := l.p.Stats().Rate; rate < 12e6 {
			t.Errorf("the rate is %v when media is free again", rate)
		}
		end()
	})
}

// A path that falls to a twelfth under bulk has room for the call as soon as
// what TCP had in it has left.
func TestACallComesFirstSoonAfterThePathFalls(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newLink(250, 3.2)
		end := l.downloads(2)
		l.run(20 * time.Second)
		l.p.Live(true)
		l.run(8 * time.Second)
		if rate := l.p.Stats().Rate; rate < 100e6 {
			t.Fatalf("the rate is %v before the fall", rate)
		}
		l.mu.Lock()
		l.rate = 20e6
		l.mu.Unlock()
		l.run(2 * time.Second)
		l.forget()
		l.run(8 * time.Second)
		t.Logf("bulk %.1f Mbit/s; queueing p50 %v, p90 %v, p99 %v", l.mbits(8*time.Second), l.quantile(.5), l.quantile(.9), l.quantile(.99))
		if p90 := l.quantile(.9); p90 > 80*ms {
			t.Errorf("queueing from 2 s after the fall on: 90th percentile %v", p90)
		}
		end()
	})
}
