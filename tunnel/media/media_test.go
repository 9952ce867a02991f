package media

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"

	"culvert/tunnel"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// gate is a way that can be shut.
type gate struct {
	shut     bool
	max      int
	sent     []string
	writable func()
}

func (g *gate) Start(_ func([]byte), writable func()) { g.writable = writable }
func (g *gate) Max() int                              { return g.max }
func (g *gate) Name() string                          { return "gate" }
func (g *gate) Lost() map[string]uint64               { return nil }
func (g *gate) Send(p []byte) error {
	switch {
	case len(p) > g.max:
		return tunnel.ErrTooLarge
	case g.shut:
		return tunnel.ErrBlocked
	}
	g.sent = append(g.sent, string(p))
	return nil
}

func (g *gate) open() {
	g.shut = false
	g.writable()
}

func TestWhatWaitsLeavesInOrderAndNeverLate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g, drops := &gate{max: 100}, &Drops{}
		r := NewRoom(g, 100*time.Millisecond, drops, nil)
		send := func(s string) {
			if err := r.Send([]byte(s)); err != nil {
				t.Fatal(err)
			}
		}
		send("through")
		g.shut = true
		send("old")
		time.Sleep(60 * time.Millisecond)
		send("young 1")
		send("young 2")
		time.Sleep(60 * time.Millisecond)
		g.open()
		send("after")
		if want := []string{"through", "young 1", "young 2", "after"}; !slices.Equal(g.sent, want) {
			t.Errorf("sent %q, want %q", g.sent, want)
		}
		if n := drops.Get(Aged); n != 1 {
			t.Errorf("%d counted as aged, want 1", n)
		}
	})
}

func TestTheOldestGoesFirstWhileTheWayStaysShut(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g, drops := &gate{max: 100, shut: true}, &Drops{}
		r := NewRoom(g, 50*time.Millisecond, drops, nil)
		for i := range 500 {
			r.Send([]byte(fmt.Sprint(i)))
			time.Sleep(time.Millisecond)
		}
		if n := r.Waiting(); n < 49 || n > 51 {
			t.Errorf("%d wait after 500 ms at one each ms and an age of 50 ms", n)
		}
		g.open()
		if len(g.sent) == 0 || g.sent[len(g.sent)-1] != "499" || !slices.IsSortedFunc(g.sent, func(a, b string) int { return len(a) - len(b) }) {
			t.Errorf("sent %q", g.sent)
		}
		if n := int(drops.Get(Aged)) + len(g.sent); n != 500 {
			t.Errorf("%d of 500 are accounted for", n)
		}
	})
}

func TestARoomIsBoundedInBytes(t *testing.T) {
	g, drops := &gate{max: 1 << 20, shut: true}, &Drops{}
	r := NewRoom(g, time.Hour, drops, nil)
	for range 10 {
		r.Send(make([]byte, 1<<20))
	}
	if r.Waiting() != maxWaiting>>20 || drops.Get(Full) != 10-maxWaiting>>20 {
		t.Errorf("%d wait, %d dropped", r.Waiting(), drops.Get(Full))
	}
}

func TestTooLargeIsSaidAndCounted(t *testing.T) {
	g, drops := &gate{max: 10}, &Drops{}
	r := NewRoom(g, 0, drops, nil)
	if err := r.Send(make([]byte, 11)); err != tunnel.ErrTooLarge || drops.Get(TooLarge) != 1 {
		t.Errorf("%v, counted %d", err, drops.Get(TooLarge))
	}
	if err := r.Send(make([]byte, 10)); err != nil || len(g.sent) != 1 {
		t.Errorf("what fits does not pass afterwards: %v", err)
	}
}

func TestAWindowTakesEachNumberOnce(t *testing.T) {
	for name, c := range map[string]struct {
		in   []uint16
		want []bool
	}{
		"in order":               {[]uint16{7, 8, 9}, []bool{true, true, true}},
		"repeated":               {[]uint16{7, 7, 8, 7, 8}, []bool{true, false, true, false, false}},
		"reordered":              {[]uint16{7, 10, 9, 8, 9}, []bool{true, true, true, true, false}},
		"across the wrap":        {[]uint16{65534, 1, 65535, 0, 65535}, []bool{true, true, true, true, false}},
		"a jump and what is old": {[]uint16{0, 5000, 3990, 3977, 3976}, []bool{true, true, true, true, false}},
		"zero first":             {[]uint16{0, 0}, []bool{true, false}},
	} {
		t.Run(name, func(t *testing.T) {
			var w Window
			for i, n := range c.in {
				if got := w.Fresh(n); got != c.want[i] {
					t.Errorf("number %d (%d.) is fresh: %v", n, i, got)
				}
			}
		})
	}
}

func TestAWindowAgreesWithASet(t *testing.T) {
	var w Window
	seen := map[int]bool{}
	at := 60000
	for range 200_000 {
		at += rand.IntN(3)
		n := at - rand.IntN(windowBits/2)
		if got := w.Fresh(uint16(n)); got == seen[n] {
			t.Fatalf("%d: fresh %v, seen before %v", n, got, seen[n])
		}
		seen[n] = true
	}
}
