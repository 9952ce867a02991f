package media

import (
	"testing"
	"testing/synctest"
	"time"

	"culvert/tunnel/wire"
)

func TestEachEndKnowsWhatItMissedAndWhenItLeft(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newPair(t, wire.AES128GCM, 50) // so that epochs change meanwhile
		began := time.Now()
		var left []time.Duration
		for i := range 120 {
			time.Sleep(time.Millisecond)
			left = append(left, time.Since(began))
			w.near.say(t, "x")
			for _, p := range w.near.flow.take() {
				if i%3 == 1 { // a third is lost, and all at the end
					continue
				}
				w.far.flow.arrive(p.p, nearPath)
			}
			if i%40 == 39 {
				time.Sleep(2 * epochGap)
			}
		}
		a := w.far.Arrivals()
		if a.Sent != 120 || a.Came != 80 {
			t.Errorf("%d of %d are said to have come, want 80 of 120", a.Came, a.Sent)
		}
		us, ok := w.near.Departed(a.Seen)
		if !ok {
			t.Fatalf("when %d left is not known", a.Seen)
		}
		want := left[a.Seen-w.near.out.first]
		if got := time.Duration(us) * time.Microsecond; got != want || a.SeenAt.Sub(began) != want {
			t.Errorf("it left after %v and came after %v, want %v", got, a.SeenAt.Sub(began), want)
		}
		if _, ok := w.near.Departed(a.Seen + stampEvery); ok {
			t.Error("a packet that has not left is known")
		}
		if _, ok := w.near.Departed(a.Seen - stamps*stampEvery); ok {
			t.Error("a packet of long ago is known, or one that never was")
		}
	})
}

func TestForgedAndRepeatedPacketsAreNotCounted(t *testing.T) {
	w := newPair(t, wire.AES128GCM, epochPackets)
	w.near.say(t, "a", "b", "c")
	sent := w.near.flow.take()
	for _, p := range sent {
		forged := append([]byte(nil), p.p...)
		forged[11] += 100 // a counter far ahead
		w.far.flow.arrive(forged, nearPath)
		w.far.flow.arrive(p.p, nearPath)
		w.far.flow.arrive(p.p, nearPath)
	}
	if a := w.far.Arrivals(); a.Sent != 3 || a.Came != 3 {
		t.Errorf("%d of %d", a.Came, a.Sent)
	}
}
