package uplink

import (
	"context"
	"os"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"culvert/tunnel/media"
	"culvert/tunnel/session"
	"culvert/tunnel/wire"
)

// twoWays is a session whose ways are as the test says. Probes of a way that is
// open are answered after 20 ms.
type twoWays struct {
	mu       sync.Mutex // guards the fields below
	sealed   bool       // sealed packets come to us
	datagram bool       // DATAGRAM passes
	lost     bool       // all that we seal is lost, and the peer says so
	delay    time.Duration
	heard    time.Time // by sealed packets
	mute     bool      // nothing that we seal arrives; the peer is heard while it hears us
	answered time.Time // by DATAGRAM
	small    time.Time // by sealed packets
	uses     []use
	probes   int
}

type use struct {
	wire.Use
	at time.Time
}

func (w *twoWays) Way(k wire.Way) session.WayState {
	w.mu.Lock()
	defer w.mu.Unlock()
	if k == wire.WayDatagram {
		return session.WayState{Present: true, Small: w.answered}
	}
	if w.sealed && (!w.mute || len(w.uses) > 0 && w.uses[len(w.uses)-1].Also == wire.WayDatagram) {
		w.heard = time.Now()
	}
	s := session.WayState{Present: true, Heard: w.heard, Delay: w.delay, Small: w.small}
	if w.lost {
		s.Lost, s.Reported = 1, time.Now()
	}
	return s
}

func (w *twoWays) Use(first, also wire.Way) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.uses = append(w.uses, use{wire.Use{Way: first, Also: also}, time.Now()})
}

func (w *twoWays) Probe(k wire.Way, _ bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.probes++
	answer := func(at *time.Time) {
		time.AfterFunc(20*time.Millisecond, func() {
			w.mu.Lock()
			defer w.mu.Unlock()
			*at = time.Now()
		})
	}
	switch {
	case k == wire.WayDatagram && w.datagram:
		answer(&w.answered)
	case k == wire.WaySealed && w.sealed && !w.lost && !w.mute:
		answer(&w.small)
	}
}

func (w *twoWays) News() <-chan struct{} { return nil }
func (w *twoWays) Reporting() bool       { return true }

// now changes how things stand.
func (w *twoWays) now(f func()) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.sealed {
		w.heard = time.Now()
	}
	f()
}

func TestInDoubtDatagramsGoBothWays(t *testing.T) {
	both := wire.Use{Way: wire.WaySealed, Also: wire.WayDatagram}
	one := wire.Use{Way: wire.WaySealed}
	for name, c := range map[string]struct {
		shut  func(*twoWays)
		back  time.Duration // after which all is well again; 0: never
		after time.Duration // from which on both ways are used, about
		want  []wire.Use
		last  time.Duration // how long both were used at most
		why   string        // why sealed packets were left; "": they were not
	}{
		"nothing comes":                  {func(w *twoWays) { w.sealed = false }, 0, 600 * time.Millisecond, []wire.Use{both}, 150 * time.Millisecond, "nothing came by sealed packets for"},
		"nothing of ours arrives":        {func(w *twoWays) { w.lost = true }, 0, 0, []wire.Use{both}, 150 * time.Millisecond, "100 % of our sealed packets were lost"},
		"the peer hears nothing of ours": {func(w *twoWays) { w.mute = true }, 0, 600 * time.Millisecond, []wire.Use{both}, 150 * time.Millisecond, "no sealed packet was answered for"},
		"nothing comes by either":        {func(w *twoWays) { w.sealed, w.datagram = false, false }, 0, 600 * time.Millisecond, []wire.Use{both, one}, maxBoth + 100*time.Millisecond, ""},
		"both are back":                  {func(w *twoWays) { w.sealed, w.datagram = false, false }, time.Second, 600 * time.Millisecond, []wire.Use{both, one}, 500 * time.Millisecond, ""},
		"a short silence":                {func(w *twoWays) { w.sealed = false }, 500 * time.Millisecond, 0, nil, 0, ""},
		"delay had risen":                {func(w *twoWays) { w.sealed, w.delay = false, 200*time.Millisecond }, 0, 0, nil, 0, "nothing came by sealed packets for"},
		"delay had risen, ours is lost":  {func(w *twoWays) { w.lost, w.delay = true, 200*time.Millisecond }, 0, 0, nil, 0, "100 % of our sealed packets were lost"},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := &twoWays{sealed: true, datagram: true}
				ctx, cancel := context.WithCancel(t.Context())
				defer cancel()
				why := make(chan string, 1)
				go func() { why <- listen(ctx, w) }()
				time.Sleep(5 * time.Second)
				if len(w.uses) > 0 || w.probes > 0 {
					t.Errorf("with nothing wrong: %+v and %d probes", w.uses, w.probes)
				}
				w.now(func() { c.shut(w) })
				began := time.Now()
				if c.back > 0 {
					time.Sleep(c.back)
					w.now(func() { w.sealed, w.datagram, w.lost = true, true, false })
				}
				time.Sleep(10 * time.Second)
				cancel()
				left := time.Now()
				got := <-why
				if (got == "") != (c.why == "") || !strings.Contains(got, c.why) {
					t.Errorf("left because %q, want %q", got, c.why)
				}
				if w.probes == 0 {
					t.Error("no probe was sent")
				}
				var said []wire.Use
				for i, u := range w.uses {
					said = append(said, u.Use)
					if u.Also == wire.NoWay {
						continue
					}
					if d := u.at.Sub(began) - c.after; d < 0 || d > lookEvery {
						t.Errorf("both ways after %v, want %v", u.at.Sub(began), c.after)
					}
					end := left
					if i+1 < len(w.uses) {
						end = w.uses[i+1].at
					} else if got != "" {
						end = w.answered.Add(probeEvery) // it returned by then
					}
					if d := end.Sub(u.at); d > c.last {
						t.Errorf("both ways for %v, want %v at most", d, c.last)
					}
				}
				if len(said) != len(c.want) {
					t.Fatalf("said %v, want %v", said, c.want)
				}
				for i := range said {
					if said[i] != c.want[i] {
						t.Errorf("said %v, want %v", said, c.want)
					}
				}
			})
		})
	}
}

// What status says stands in docs/media.md, word for word.
func TestTheDocumentExplainsWhatIsSaid(t *testing.T) {
	text, err := os.ReadFile("../../docs/media.md")
	if err != nil {
		t.Fatal(err)
	}
	words := []string{noSealed, wayAtHand[wire.WayDatagram], wayAtHand[wire.WayLanes]}
	for _, w := range []wire.Way{wire.WaySealed, wire.WayDatagram, wire.WayLanes} {
		words = append(words, "| `"+w.String()+"` |")
	}
	for r := media.Aged; r <= media.FrameShed; r++ {
		words = append(words, "`"+r.String()+"`")
	}
	for _, w := range words {
		if !strings.Contains(string(text), w) {
			t.Errorf("docs/media.md does not mention %q", w)
		}
	}
}
