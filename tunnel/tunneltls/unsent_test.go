package tunneltls

import (
	"testing"
	"time"
)

func TestWhatTheKernelHoldsUnsentFollowsTheRate(t *testing.T) {
	const mbit = 1e6 / 8
	var b unsentSize
	now, size := time.Unix(1000, 0), carrierUnsent
	pass := func(d time.Duration, rate float64) {
		for end := now.Add(d); now.Before(end); now = now.Add(5 * time.Millisecond) {
			if n := b.wrote(int(rate*0.005), now); n > 0 {
				size = n
			}
		}
	}
	for _, c := range []struct {
		rate        float64
		least, most int
	}{
		{10 * mbit, carrierUnsent, carrierUnsent},
		{300 * mbit, 1200 << 10, 1900 << 10},
		{3000 * mbit, maxUnsent, maxUnsent},
		{1 * mbit, carrierUnsent, carrierUnsent},
	} {
		pass(time.Second, c.rate)
		if size < c.least || size > c.most {
			t.Errorf("at %.0f Mbit/s it is %d bytes, want %d to %d", c.rate/mbit, size, c.least, c.most)
		}
	}
}
