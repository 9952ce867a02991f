package uplink

import (
	"context"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"culvert/tunnel"
	"culvert/tunnel/session"
	"culvert/tunnel/tunneltest"
	"culvert/tunnel/wire"
)

// changes returns what has been told so far.
func (r *running) changes() (all []tunnel.Change) {
	for _, s := range r.all() {
		if s.Change != nil {
			all = append(all, *s.Change)
		}
	}
	return all
}

// told waits for a change.
func (r *running) told(what string, cause tunnel.Code) tunnel.Change {
	r.t.Helper()
	for range 100_000 {
		for _, c := range r.changes() {
			if c.What == what && c.Cause == cause {
				return c
			}
		}
		time.Sleep(time.Millisecond)
	}
	r.t.Fatalf("no change of %s because of %s was told in 100 s: %v", what, cause, r.changes())
	return tunnel.Change{}
}

// toldTo waits for a change from one thing to another; "*" stands for any.
func (r *running) toldTo(what, from, to string, cause tunnel.Code) tunnel.Change {
	r.t.Helper()
	for range 3_000 {
		for _, c := range slices.Backward(r.changes()) {
			if c.What == what && (c.From == from || from == "*" && c.From != "") && (c.To == to || to == "*" && c.To != "") && c.Cause == cause {
				return c
			}
		}
		time.Sleep(100 * time.Millisecond)
	}
	r.t.Fatalf("no change of %s from %q to %q because of %s was told in 300 s: %v", what, from, to, cause, r.changes())
	return tunnel.Change{}
}

func TestAChangeOfTheWayIsToldOnceWithItsCauseTimeAndCost(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var off atomic.Bool
		f := newFarOn(t, tunneltest.Config{Flow: true, Packet: func(up bool, _ []byte) tunneltest.Fate {
			return tunneltest.Fate{Delay: 20 * time.Millisecond, Drop: off.Load() && !up}
		}}, first)
		defer f.end()
		f.real(0)
		r := f.run(tunnel.ModeUDP, nil)
		r.up()
		r.by(wire.WaySealed)
		ctx, cancel := context.WithCancel(context.Background())
		ended := r.call(ctx)
		time.Sleep(3 * time.Second)
		if all := r.changes(); len(all) != 1 || all[0].Cause != tunnel.PathProved || all[0].To != "sealed" || all[0].Cost() != "" {
			t.Errorf("before anything has happened there are told %v, want that sealed packets pass", all)
		}
		off.Store(true)
		shut := time.Now()
		c := r.told(tunnel.ChangedDatagrams, tunnel.PathSilent)
		if c.From != "sealed" || c.To != "quic-datagram" || !strings.Contains(c.Why, "nothing came by sealed") {
			t.Errorf("told: %v", c)
		}
		if at := c.At.Sub(shut); at < deaf || at > deaf+400*time.Millisecond {
			t.Errorf("it is said to have been %v after the way was shut", at)
		}
		if c.Gap < deaf || c.Gap > deaf+500*time.Millisecond {
			t.Errorf("%v without a datagram", c.Gap)
		}
		// Of 50 a second that the far end sent.
		if least := uint64((c.Gap - 200*time.Millisecond) / (20 * time.Millisecond)); c.Lost < least/2 || c.Lost > 60 {
			t.Errorf("%d lost in %v", c.Lost, c.Gap)
		}
		time.Sleep(500 * time.Millisecond)
		if n := len(r.changes()); n != 2 {
			t.Errorf("%d changes are told, want 2: %v", n, r.changes())
		}
		cancel()
		<-ended
		r.stop()
	})
}

func TestAConnectionThatIsLostAndThereAgainIsTold(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFar(t, first)
		defer f.end()
		f.real(0)
		r := f.run(tunnel.ModeTCP, nil)
		r.up()
		ctx, cancel := context.WithCancel(context.Background())
		ended := r.call(ctx)
		time.Sleep(time.Second)
		f.mu.Lock()
		lost := f.last
		f.mu.Unlock()
		lost.Close(tunnel.TimedOut)
		if c := r.told(tunnel.ChangedCarrier, tunnel.CloudUnreachable); c.From != "tls" || c.To != "" || c.Why == "" {
			t.Errorf("told: %v", c)
		}
		if c := r.told(tunnel.ChangedCarrier, tunnel.PathJoined); c.To != "tls" {
			t.Errorf("told: %v", c)
		}
		cancel()
		<-ended
		r.stop()
	})
}

func TestWhatAChangeCostsIsCountedUntilDatagramsComeAgain(t *testing.T) {
	var c session.Course
	var gap time.Duration
	at := time.Unix(1000, 0)
	n := &narrator{course: func() session.Course {
		now := c
		now.Gap, gap = gap, 0
		return now
	}}
	come := func(after time.Duration, missing uint64) {
		at = at.Add(after)
		c.Due, c.Came = c.Due+1+missing, c.Came+1
		if !c.Last.IsZero() {
			gap = max(gap, at.Sub(c.Last))
		}
		c.Last = at
	}
	step := func(change *tunnel.Change, doubt bool) []tunnel.Change {
		told, _ := n.step(at, change, doubt, true)
		return told
	}
	for range 10 {
		come(20*time.Millisecond, 0)
		step(nil, false)
	}
	at = at.Add(700 * time.Millisecond)
	step(nil, true)
	if told := step(&tunnel.Change{At: at, What: tunnel.ChangedDatagrams}, false); len(told) != 0 {
		t.Fatalf("told at once: %v", told)
	}
	at = at.Add(2 * time.Second) // nothing comes by the new way either
	if told := step(nil, true); len(told) != 0 {
		t.Fatalf("told before datagrams come: %v", told)
	}
	come(300*time.Millisecond, 40)
	come(20*time.Millisecond, 0)
	told := step(nil, false)
	if len(told) != 1 || told[0].Gap != 3*time.Second || told[0].Lost != 40 {
		t.Fatalf("told: %v", told)
	}
	if told := step(nil, false); len(told) != 0 {
		t.Errorf("told again: %v", told)
	}

	// Another change ends the counting; what never comes is told as well.
	step(&tunnel.Change{At: at, From: "a"}, false)
	if told := step(&tunnel.Change{At: at, From: "b"}, false); len(told) != 1 || told[0].From != "a" || told[0].Gap != 0 {
		t.Errorf("told: %v", told)
	}
	at = at.Add(6 * time.Second)
	if told := step(nil, true); len(told) != 1 || told[0].Gap != 6*time.Second {
		t.Errorf("told: %v", told)
	}
	// Without a call nothing is counted.
	if told, _ := n.step(at, &tunnel.Change{From: "c"}, false, false); len(told) != 1 || told[0].Gap != 0 {
		t.Errorf("told: %v", told)
	}
}
