package media

import (
	"testing"
	"time"
)

func TestBaseTellsTheQueueingAboveTheShortestWayOfLate(t *testing.T) {
	const clock = 1<<32 - 500_000 // the sender's, half a second before it wraps
	type packet struct{ at, way, want time.Duration }
	ms := time.Millisecond
	for name, packets := range map[string][]packet{
		"the first is the base":       {{0, 70 * ms, 0}},
		"later ones are above it":     {{0, 20 * ms, 0}, {100 * ms, 45 * ms, 25 * ms}, {200 * ms, 20 * ms, 0}},
		"a shorter one lowers it":     {{0, 50 * ms, 0}, {100 * ms, 20 * ms, 0}, {200 * ms, 50 * ms, 30 * ms}},
		"across the wrap":             {{0, 20 * ms, 0}, {900 * ms, 30 * ms, 10 * ms}, {1200 * ms, 21 * ms, 1 * ms}},
		"a longer path is the base":   {{0, 20 * ms, 0}, {10 * time.Second, 60 * ms, 40 * ms}, {38 * time.Second, 60 * ms, 0}},
		"after a silence of minutes":  {{0, 20 * ms, 0}, {5 * time.Minute, 70 * ms, 0}, {5*time.Minute + ms, 80 * ms, 10 * ms}},
		"a peer's clock may be ahead": {{0, -40 * ms, 0}, {ms, -30 * ms, 10 * ms}},
	} {
		t.Run(name, func(t *testing.T) {
			var b Base
			for i, p := range packets {
				if got := b.Above(p.at+p.way+time.Hour, uint32(clock+p.at.Microseconds())); got != p.want {
					t.Errorf("packet %d: %v above the base, want %v", i, got, p.want)
				}
			}
		})
	}
}
