package media

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"culvert/tunnel"
)

// gate is a way that can be shut.
type gate struct {
	mu       sync.Mutex
	shut     bool
	stuck    bool
	max      int
	err      error
	sent     []string
	writable func()
}

func newGate() *gate { return &gate{max: 1 << 20} }

func (g *gate) Start(_ func([]byte), writable func()) { g.writable = writable }
func (g *gate) Max() int                              { return g.max }
func (g *gate) Name() string                          { return "gate" }
func (g *gate) Lost() map[string]uint64               { return nil }
func (g *gate) Stalled() bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.stuck
}

func (g *gate) Send(p []byte) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	switch {
	case g.err != nil:
		return g.err
	case len(p) > g.max:
		return tunnel.ErrTooLarge
	case g.shut:
		return tunnel.ErrBlocked
	}
	g.sent = append(g.sent, string(p))
	return nil
}

func (g *gate) set(f func()) {
	g.mu.Lock()
	defer g.mu.Unlock()
	f()
}

func (g *gate) close() { g.set(func() { g.shut = true }) }

func (g *gate) open() {
	g.set(func() { g.shut = false })
	g.writable()
}

// take returns what has been sent since the last take.
func (g *gate) take() []string {
	g.mu.Lock()
	defer g.mu.Unlock()
	s := g.sent
	g.sent = nil
	return s
}

// newTestRoom makes a room before one gate.
func newTestRoom(age time.Duration) (*Room, *gate, *Drops) {
	g, drops := newGate(), &Drops{}
	r := NewRoom(age, drops)
	r.Add(g, nil)
	return r, g, drops
}

// send sends s as an opaque datagram.
func send(t testing.TB, r *Room, l *Line, s string) {
	t.Helper()
	if err := r.Send(l, []byte(s), []byte(s)); err != nil {
		t.Fatal(err)
	}
}

// A source makes the RTP packets of one SSRC.
type source struct {
	ssrc, time uint32
	seq        uint16
}

// next makes a packet of n bytes; a new frame gets a new timestamp.
func (s *source) next(n int, newFrame bool) []byte {
	if newFrame {
		s.time += 3000
	}
	s.seq++
	p := make([]byte, n)
	p[0], p[1] = 0x80, 96
	binary.BigEndian.PutUint16(p[2:], s.seq)
	binary.BigEndian.PutUint32(p[4:], s.time)
	binary.BigEndian.PutUint32(p[8:], s.ssrc)
	return p
}

func TestWhatWaitsLeavesInOrderAndNeverLate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, g, drops := newTestRoom(100 * time.Millisecond)
		var l Line
		send(t, r, &l, "through")
		g.close()
		send(t, r, &l, "old")
		time.Sleep(60 * time.Millisecond)
		send(t, r, &l, "young 1")
		send(t, r, &l, "young 2")
		time.Sleep(60 * time.Millisecond)
		g.open()
		send(t, r, &l, "after")
		if got, want := g.take(), []string{"through", "young 1", "young 2", "after"}; !slices.Equal(got, want) {
			t.Errorf("sent %q, want %q", got, want)
		}
		if n := drops.Get(Aged); n != 1 {
			t.Errorf("%d counted as aged, want 1", n)
		}
		if got := l.Dropped()["queue_age"]; got != 1 {
			t.Errorf("%d counted at the association, want 1", got)
		}
	})
}

func TestTheOldestGoesFirstWhileTheWayStaysShut(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, g, drops := newTestRoom(50 * time.Millisecond)
		var l Line
		g.close()
		for i := range 500 {
			send(t, r, &l, fmt.Sprint(i))
			time.Sleep(time.Millisecond)
		}
		if n := r.Waiting(); n < 49 || n > 51 {
			t.Errorf("%d wait after 500 ms at one each ms and an age of 50 ms", n)
		}
		g.open()
		got := g.take()
		if len(got) == 0 || got[len(got)-1] != "499" || !slices.IsSortedFunc(got, func(a, b string) int { return len(a) - len(b) }) {
			t.Errorf("sent %q", got)
		}
		if n := int(drops.Get(Aged)) + len(got); n != 500 {
			t.Errorf("%d of 500 are accounted for", n)
		}
	})
}

func TestWhatWaitsAgesWithoutNewArrivals(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, g, drops := newTestRoom(0)
		g.close()
		send(t, r, &Line{}, "x")
		time.Sleep(2 * MaxAge)
		if r.Waiting() != 0 || drops.Get(Aged) != 1 {
			t.Errorf("%d wait, %d aged", r.Waiting(), drops.Get(Aged))
		}
	})
}

func TestARoomIsBoundedInBytes(t *testing.T) {
	r, g, drops := newTestRoom(time.Hour)
	g.close()
	var l Line
	for range 100 {
		send(t, r, &l, strings.Repeat("x", 1<<16))
	}
	if want := maxWaiting >> 16; r.Waiting() != want || drops.Get(Full) != uint64(100-want) {
		t.Errorf("%d wait, %d dropped", r.Waiting(), drops.Get(Full))
	}
}

func TestOneAssociationCanNotEvictOthers(t *testing.T) {
	r, g, _ := newTestRoom(time.Hour)
	g.close()
	var quiet, loud Line
	for range 20 {
		send(t, r, &quiet, "quiet")
	}
	for range 200 {
		send(t, r, &loud, strings.Repeat("x", 1<<16))
	}
	var latecomer Line
	send(t, r, &latecomer, "latecomer")
	if n := len(quiet.Dropped()) + len(latecomer.Dropped()); n != 0 {
		t.Errorf("quiet associations lost %v and %v", quiet.Dropped(), latecomer.Dropped())
	}
	if loud.Dropped()["queue_full"] == 0 {
		t.Error("the loud one lost nothing")
	}
	r.Discard()
	if r.Waiting() != 0 || r.bytes != 0 || r.seated != 0 || quiet.Dropped()["no_way"] != 20 {
		t.Errorf("after Discard %d wait, %d bytes, %d seats; %v", r.Waiting(), r.bytes, r.seated, quiet.Dropped())
	}
}

func TestTooLargeIsSaidWhetherTheWayIsOpenOrShut(t *testing.T) {
	r, g, drops := newTestRoom(0)
	g.max = 10
	var l Line
	for _, shut := range []bool{false, true} {
		g.set(func() { g.shut = shut })
		send(t, r, &l, "fits")
		if err := r.Send(&l, make([]byte, 11), make([]byte, 11)); err != tunnel.ErrTooLarge {
			t.Errorf("shut %v: %v", shut, err)
		}
	}
	if m := map[string]uint64{}; r.Max() != 10 || r.Waiting() != 1 {
		drops.AddTo(m)
		t.Errorf("max %d, %d wait, dropped %v", r.Max(), r.Waiting(), m)
	}
}

func TestWithoutAnOutletThereIsNoWay(t *testing.T) {
	drops := &Drops{}
	r := NewRoom(0, drops)
	var l Line
	send(t, r, &l, "x")
	if drops.Get(NoWay) != 1 || l.Dropped()["no_way"] != 1 || r.Max() != 0 || r.Outlets() != 0 {
		t.Errorf("%d dropped, max %d, %d outlets", drops.Get(NoWay), r.Max(), r.Outlets())
	}
	g := newGate()
	r.Add(g, nil)
	send(t, r, &l, "y")
	g.close()
	send(t, r, &l, "z")
	r.Remove(g)
	r.Remove(g)
	if got := g.take(); !slices.Equal(got, []string{"y"}) || drops.Get(NoWay) != 2 || r.Waiting() != 0 {
		t.Errorf("sent %q, %d dropped, %d wait", got, drops.Get(NoWay), r.Waiting())
	}
}

func TestAWayThatHasEndedIsCounted(t *testing.T) {
	r, g, drops := newTestRoom(0)
	g.err = errors.New("ended")
	send(t, r, &Line{}, "x")
	if drops.Get(WayFailed) != 1 {
		t.Errorf("%d counted", drops.Get(WayFailed))
	}
}

func TestHighGoesBeforeNormal(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, g, _ := newTestRoom(0)
		var call, bulk Line
		audio, video := &source{ssrc: 1}, &source{ssrc: 2}
		send := func(l *Line, p []byte) {
			if err := r.Send(l, p, p); err != nil {
				t.Fatal(err)
			}
		}
		for i := range 100 {
			send(&call, audio.next(125, true))
			send(&call, video.next(1100, i%4 == 0))
			send(&bulk, make([]byte, 1200))
			time.Sleep(20 * time.Millisecond)
		}
		g.close()
		g.take()
		for i := range 3 {
			send(&bulk, make([]byte, 1200))
			send(&call, video.next(1100, i == 0))
			send(&call, audio.next(125, true))
		}
		if err := r.Send(nil, []byte("notice"), nil); err != nil {
			t.Fatal(err)
		}
		g.open()
		var sizes []int
		for _, p := range g.take() {
			sizes = append(sizes, len(p))
		}
		slices.Sort(sizes[:4]) // the notice is its own association
		slices.Sort(sizes[4:])
		if want := []int{6, 125, 125, 125, 1100, 1100, 1100, 1200, 1200, 1200}; !slices.Equal(sizes, want) {
			t.Errorf("sent %v", sizes)
		}
	})
}

func TestNothingOfAnSSRCIsReordered(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, g, _ := newTestRoom(0)
		var l Line
		video := &source{ssrc: 7}
		// Sizes and rates that wander over both thresholds, as with probes.
		for i := range 3000 {
			if i%50 == 0 {
				if i/50%2 == 0 {
					g.close()
				} else {
					g.open()
				}
			}
			n := 100
			if i/200%2 == 0 || i%7 == 0 {
				n = 1000
			}
			p := video.next(n, true)
			if err := r.Send(&l, p, p); err != nil {
				t.Fatal(err)
			}
			time.Sleep(time.Duration(1+i/300%2*20) * time.Millisecond)
		}
		g.open()
		last := 0
		for _, p := range g.take() {
			n := int(binary.BigEndian.Uint16([]byte(p)[2:]))
			if n <= last {
				t.Fatalf("number %d after %d", n, last)
			}
			last = n
		}
	})
}

func TestAssociationsShare(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, g, _ := newTestRoom(0)
		var many, few Line
		g.close()
		for range 100 {
			send(t, r, &many, "m"+strings.Repeat("x", 1100))
		}
		for range 20 {
			send(t, r, &few, "f"+strings.Repeat("x", 600))
		}
		g.open()
		// Within the time of the few, the many get no more bytes than they.
		bytes := map[byte]int{}
		for _, p := range g.take() {
			if bytes[p[0]] += len(p); p[0] == 'f' && bytes['f'] == 20*601 {
				break
			}
		}
		if d := bytes['m'] - bytes['f']; d < -3000 || d > 3000 {
			t.Errorf("sent %v", bytes)
		}
	})
}

func TestTheRestOfAFrameIsShed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, g, _ := newTestRoom(100 * time.Millisecond)
		var l Line
		video := &source{ssrc: 3}
		frame := func(from, to int) {
			for i := from; i < to; i++ {
				p := video.next(1000, i == 0)
				if err := r.Send(&l, p, p); err != nil {
					t.Fatal(err)
				}
			}
		}
		for range 4 {
			frame(0, 8)
			time.Sleep(33 * time.Millisecond)
		}
		g.close()
		g.take()
		frame(0, 2) // these will be too old
		time.Sleep(50 * time.Millisecond)
		frame(2, 5) // these are young, but of the same frame
		time.Sleep(60 * time.Millisecond)
		frame(5, 8) // still to come
		frame(0, 2) // the next
		g.open()
		frame(2, 3)
		if got := len(g.take()); got != 3 {
			t.Errorf("%d were sent, want 3 of the second frame", got)
		}
		if d := l.Dropped(); d["queue_age"] != 1 || d["frame_shed"] != 7 {
			t.Errorf("dropped %v", d)
		}
	})
}

// lanes makes a room before n gates.
func lanes(n int) (*Room, []*gate) {
	r := NewRoom(0, &Drops{})
	var gs []*gate
	for range n {
		gs = append(gs, newGate())
		r.Add(gs[len(gs)-1], nil)
	}
	return r, gs
}

func TestAssociationsSpreadAndStayWithTheirOutlet(t *testing.T) {
	r, gs := lanes(4)
	lines := make([]Line, 8)
	for range 10 {
		for i := range lines {
			send(t, r, &lines[i], fmt.Sprint(i))
		}
	}
	for i, g := range gs {
		got := g.take()
		seen := map[string]int{}
		for _, p := range got {
			seen[p]++
		}
		if len(seen) != 2 || len(got) != 20 {
			t.Errorf("outlet %d carried %v", i, seen)
		}
	}
}

func TestAnAssociationIsAwayFromAnOutletThatIsBlockedFor20ms(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, gs := lanes(2)
		var l Line
		send(t, r, &l, "0")
		mine, other := gs[0], gs[1]
		if len(mine.take()) == 0 {
			mine, other = other, mine
			mine.take()
		}
		mine.close()
		send(t, r, &l, "1")
		time.Sleep(10 * time.Millisecond)
		send(t, r, &l, "2")
		synctest.Wait()
		if got := other.take(); len(got) != 0 {
			t.Errorf("left after 10 ms with %q", got)
		}
		time.Sleep(20 * time.Millisecond)
		synctest.Wait()
		if got := other.take(); !slices.Equal(got, []string{"1", "2"}) {
			t.Errorf("after 30 ms the other outlet has %q", got)
		}
		send(t, r, &l, "3")
		mine.open()
		send(t, r, &l, "4")
		if here, there := mine.take(), other.take(); !slices.Equal(there, []string{"3"}) || !slices.Equal(here, []string{"4"}) {
			t.Errorf("it does not return: the other has %q, its own %q", there, here)
		}
	})
}

func TestARemovedOutletHandsItsAssociationsOn(t *testing.T) {
	r, gs := lanes(3)
	lines := make([]Line, 6)
	for _, g := range gs {
		g.close()
	}
	for i := range lines {
		send(t, r, &lines[i], fmt.Sprint(i))
		send(t, r, &lines[i], fmt.Sprint(i))
	}
	gs[1].set(func() { gs[1].shut = false }) // it takes all again but has not said so
	gs[2].open()
	r.Remove(gs[0])
	if got := len(gs[0].take()); got != 0 {
		t.Errorf("%d were sent on what is removed", got)
	}
	r.Remove(gs[1])
	if got := len(gs[2].take()); got != 12 || r.Waiting() != 0 || r.Outlets() != 1 {
		t.Errorf("%d of 12 were handed on, %d wait", got, r.Waiting())
	}
}

func TestAStalledOutletIsPassedOverAndSmallPacketsGoTwice(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, gs := lanes(3)
		var l Line
		send(t, r, &l, "before")
		i := slices.IndexFunc(gs, func(g *gate) bool { return len(g.take()) > 0 })
		gs[i].set(func() { gs[i].stuck = true })
		all := func() map[string]int {
			m := map[string]int{}
			for _, g := range gs {
				for _, p := range g.take() {
					m[p[:5]]++
				}
			}
			return m
		}
		send(t, r, &l, "small")
		send(t, r, &l, "large"+strings.Repeat("x", 1000))
		if len(gs[i].sent) != 0 {
			t.Error("it stays with the stalled outlet")
		}
		if m := all(); m["small"] != 2 || m["large"] != 1 {
			t.Errorf("sent %v", m)
		}
		time.Sleep(300 * time.Millisecond)
		send(t, r, &l, "later")
		send(t, r, &l, "later")
		if m := all(); m["later"] != 2 {
			t.Errorf("long after the stall: sent %v", m)
		}
	})
}

// keeper is a gate that knows what is overdue in it.
type keeper struct {
	*gate
	overdue []string
	since   time.Time // of all in overdue
}

func (k *keeper) Overdue(again func(p []byte, since time.Time) bool) bool {
	late := len(k.overdue) > 0
	for len(k.overdue) > 0 && again([]byte(k.overdue[0]), k.since) {
		k.overdue = k.overdue[1:]
	}
	return late
}

func (k *keeper) Resend(p []byte, since time.Time) error {
	return k.Send(fmt.Appendf(nil, "%s of %v", p, since.UnixMilli()))
}

func TestWhatIsOverdueGoesOnceMoreOnAHealthyOutlet(t *testing.T) {
	for name, c := range map[string]struct {
		change func(r *Room, ks []*keeper)
		want   [4]int // copies by outlet; the first has three overdue, the last one
	}{
		"in turn, on those in which nothing is overdue": {func(*Room, []*keeper) {}, [4]int{0, 2, 2, 0}},
		"not on a stalled one":                          {func(_ *Room, ks []*keeper) { ks[1].stuck = true }, [4]int{0, 0, 4, 0}},
		"on others where there is no better":            {func(_ *Room, ks []*keeper) { ks[1].stuck, ks[2].stuck = true, true }, [4]int{1, 0, 0, 3}},
		"not when all others are stalled":               {func(_ *Room, ks []*keeper) { ks[1].stuck, ks[2].stuck, ks[3].stuck = true, true, true }, [4]int{1, 0, 0, 0}},
		"not while the room is shaped":                  {func(r *Room, _ []*keeper) { r.Shape(1e9) }, [4]int{}},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := NewRoom(0, &Drops{})
				ks := make([]*keeper, 4)
				for i := range ks {
					ks[i] = &keeper{gate: newGate(), since: time.UnixMilli(77)}
					r.Add(ks[i], nil)
				}
				ks[0].overdue, ks[3].overdue = []string{"a", "b", "c"}, []string{"d"}
				r.looked.Store(time.Now().UnixNano())
				var l Line
				send(t, r, &l, "too soon")
				if len(ks[0].overdue) != 3 {
					t.Error("it asked too soon")
				}
				// That they are late is known from the last look.
				r.outlets[0].late, r.outlets[3].late = true, true
				c.change(r, ks)
				time.Sleep(lookEvery)
				send(t, r, &l, "news")
				for i, k := range ks {
					copies := 0
					for _, p := range k.take() {
						if strings.HasSuffix(p, " of 77") {
							copies++
						}
					}
					if copies != c.want[i] {
						t.Errorf("outlet %d carried %d copies; want %d", i, copies, c.want[i])
					}
				}
			})
		})
	}
}

func TestAnOutletThatFailsLosesNothingOfTheOthers(t *testing.T) {
	r, gs := lanes(2)
	lines := make([]Line, 2)
	gs[0].err = errors.New("ended")
	for range 5 {
		for i := range lines {
			send(t, r, &lines[i], "x")
		}
	}
	if got := len(gs[1].take()); got != 10 {
		t.Errorf("%d of 10 arrived", got)
	}
}

func TestAShapedRoomKeepsToItsRate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, g, _ := newTestRoom(0)
		var call Line
		audio, video := &source{ssrc: 1}, &source{ssrc: 2}
		r.Shape(300_000)
		for i := range 3000 { // 30 s: 50 kbit/s of sound and 880 kbit/s of pictures
			if i%2 == 0 {
				p := audio.next(125, true)
				r.Send(&call, p, p)
			}
			p := video.next(1100, i%3 == 0)
			r.Send(&call, p, p)
			time.Sleep(10 * time.Millisecond)
		}
		var small, total int
		for _, p := range g.take() {
			total += len(p)
			if len(p) < 300 {
				small++
			}
		}
		if small < 1490 {
			t.Errorf("%d of 1,500 sound packets were sent", small)
		}
		if rate := float64(total) * 8 / 30; rate < 285_000 || rate > 302_000 {
			t.Errorf("sent %.0f bit/s", rate)
		}
		for range 10 {
			r.Send(nil, bytes.Repeat([]byte("n"), 100), nil)
		}
		if n := len(g.take()); n != 10 {
			t.Errorf("%d of 10 notices were sent at once", n)
		}
		r.Shape(0)
		g.take()
		for range 100 {
			p := video.next(1100, true)
			r.Send(&call, p, p)
		}
		if n := len(g.take()); n != 100 {
			t.Errorf("%d of 100 pass a room that is free again", n)
		}
	})
}

// At 100 kbit/s a picture's packet takes the rate of 95 ms: a voice that had to wait
// until that is paid for would be late each time.
func TestAVoiceDoesNotWaitBecauseAPictureHasOverdrawnTheRate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, g, _ := newTestRoom(0)
		var call Line
		audio, video := &source{ssrc: 1}, &source{ssrc: 2}
		r.Shape(100_000)
		late, total := 0, 0
		for i := range 1000 { // 20 s: 50 kbit/s of sound
			p := audio.next(125, true)
			r.Send(&call, p, p)
			passed := false
			for range 2 { // in 10 ms
				if i%5 == 0 {
					p := video.next(1200, true)
					r.Send(&call, p, p)
				}
				time.Sleep(5 * time.Millisecond)
				for _, q := range g.take() {
					total += len(q)
					passed = passed || len(q) == len(p) && len(p) < 300
				}
			}
			if !passed {
				late++
			}
			time.Sleep(10 * time.Millisecond)
		}
		if late > 10 {
			t.Errorf("%d of 1,000 sound packets had not left after 10 ms", late)
		}
		if rate := float64(total) * 8 / 20; rate < 90_000 || rate > 102_000 {
			t.Errorf("sent %.0f bit/s", rate)
		}
	})
}

func TestAssociationsOfAllOutletsShareAShapedRoom(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, first, _ := newTestRoom(0)
		second := newGate()
		r.Add(second, nil)
		var lines [3]Line // two have the first outlet, one the second
		for i := range lines {
			send(t, r, &lines[i], fmt.Sprint(i, strings.Repeat("x", 600)))
		}
		first.take()
		second.take()
		r.Shape(300_000)
		for range 2000 { // 20 s: 480 kbit/s of each
			for i := range lines {
				send(t, r, &lines[i], fmt.Sprint(i, strings.Repeat("x", 600)))
			}
			time.Sleep(10 * time.Millisecond)
		}
		sent := map[byte]int{}
		for _, p := range append(first.take(), second.take()...) {
			sent[p[0]] += 8 * len(p) / 20
		}
		for i := range lines {
			if rate := sent['0'+byte(i)]; rate < 90_000 || rate > 110_000 {
				t.Errorf("association %d sent %d bit/s of 300,000 for three", i, rate)
			}
		}
	})
}

func TestACopyInAnotherRoomIsNotMeasured(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, _, _ := newTestRoom(0)
		b, g, _ := newTestRoom(0)
		var l Line
		audio := &source{ssrc: 1}
		for range 500 { // 70 packets a second, each sent twice
			p := audio.next(125, true)
			a.Send(&l, p, p)
			b.Send(&l, p, p)
			time.Sleep(time.Second / 70)
		}
		p := audio.next(125, true)
		if m := l.look(a, p); !m.high || !m.rtp {
			t.Errorf("sound that is sent twice is %+v", m)
		}
		if n := len(g.take()); n != 500 {
			t.Errorf("%d copies", n)
		}
		for range 500 { // now in b alone, and fast
			p := audio.next(125, true)
			b.Send(&l, p, p)
			time.Sleep(time.Second / 300)
		}
		if m := l.look(b, p); m.high {
			t.Error("it is not measured where it has gone")
		}
	})
}

func TestManySendersWhileTheWayOpensAndShuts(t *testing.T) {
	r, gs := lanes(2)
	const each, senders = 2000, 8
	lines := make([]Line, senders)
	var wg sync.WaitGroup
	for i := range lines {
		wg.Go(func() {
			for n := range each {
				p := make([]byte, 8)
				binary.BigEndian.PutUint32(p, uint32(i))
				binary.BigEndian.PutUint32(p[4:], uint32(n))
				r.Send(&lines[i], p, p)
				if n%100 == 0 {
					r.Send(nil, []byte("x"), nil)
				}
			}
		})
	}
	stop := make(chan struct{})
	var flips sync.WaitGroup
	flips.Go(func() {
		for i := 0; ; i++ {
			select {
			case <-stop:
				return
			default:
			}
			gs[i%2].close()
			gs[i%2].open()
			if i%16 == 0 {
				r.Shape(1e9)
				r.Shape(0)
			}
		}
	})
	wg.Wait()
	close(stop)
	flips.Wait()
	for _, g := range gs {
		g.open()
	}
	sent := 0
	for _, g := range gs {
		for _, p := range g.take() {
			if len(p) == 8 {
				sent++
			}
		}
	}
	var dropped uint64
	for i := range lines {
		for _, n := range lines[i].Dropped() {
			dropped += n
		}
	}
	if r.Waiting() != 0 || r.bytes != 0 || r.seated != 0 || sent+int(dropped) != each*senders {
		t.Errorf("%d sent, %d dropped of %d; %d wait in %d bytes", sent, dropped, each*senders, r.Waiting(), r.bytes)
	}
}
