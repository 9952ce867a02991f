package age

import (
	"testing"
	"time"
)

func TestAgeIsTheDelayBeyondTheShortestLately(t *testing.T) {
	type record struct{ sent, delay, age time.Duration } // sent by the receiver's clock
	const ms, s = time.Millisecond, time.Second
	for _, q := range []struct {
		name   string
		origin time.Duration // how far the sender's clock is ahead
		rate   float64       // how much faster it runs
		of     []record
	}{
		{"the first record defines the base", 0, 0, []record{{0, 70 * ms, 0}}},
		{"a steady way has no age", 0, 0, []record{{0, 70 * ms, 0}, {20 * ms, 70 * ms, 0}, {40 * ms, 70 * ms, 0}}},
		{"a queue is age", 0, 0, []record{{0, 70 * ms, 0}, {20 * ms, 170 * ms, 100 * ms}, {40 * ms, 400 * ms, 330 * ms}}},
		{"a shorter way is the new base", 0, 0, []record{{0, 270 * ms, 0}, {300 * ms, 70 * ms, 0}, {400 * ms, 270 * ms, 200 * ms}}},
		{"the sender's clock wraps", 65_500 * ms, 0, []record{{0, 70 * ms, 0}, {50 * ms, 270 * ms, 200 * ms}, {90 * ms, 70 * ms, 0}}},
		{"our clock wraps", -30 * s, 0, []record{{65_530 * ms, 0, 0}, {65_540 * ms, 90 * ms, 90 * ms}}},
		{"a delay of 31 s is seen, less what the clocks may have drifted", 0, 0, []record{{0, 70 * ms, 0}, {20 * ms, 31070 * ms, 30994 * ms}}},
		{"what was held up while a process stood still for 45 s is late", 0, 0, []record{{0, 70 * ms, 0}, {20 * ms, 45070 * ms, 44991 * ms}}},
		{"a way that was 15 s longer at first is the base no more", 0, 0, []record{{0, 15070 * ms, 0}, {15100 * ms, 70 * ms, 0}, {15200 * ms, 270 * ms, 200 * ms}}},
		{"a longer way is late for the window, then the base", 0, 0, []record{
			{0, 70 * ms, 0}, {1 * s, 270 * ms, 200 * ms}, {24 * s, 270 * ms, 200 * ms}, {31 * s, 270 * ms, 0}}},
		{"held up for a silence longer than the window is late", 0, 0, []record{
			{0, 70 * ms, 0}, {29 * s, 70 * ms, 0}, {60 * s, 20070 * ms, 19989 * ms}}},
		{"drift during a long silence is not age", 0, -100e-6, []record{{0, 70 * ms, 0}, {3600 * s, 70 * ms, 0}}},
		{"drift during a call is not age", 0, -100e-6, []record{
			{0, 70 * ms, 0}, {10 * s, 70 * ms, 1 * ms}, {20 * s, 70 * ms, 2 * ms}, {30 * s, 70 * ms, 2 * ms}, {40 * s, 70 * ms, 2 * ms}}},
	} {
		t.Run(q.name, func(t *testing.T) {
			var a Ages
			for i, r := range q.of {
				clock := r.sent + time.Duration(float64(r.sent)*q.rate) + q.origin
				got := a.Of(r.sent+r.delay, uint16(clock.Milliseconds()))
				if d := got - r.age; d < -2*ms || d > 2*ms {
					t.Errorf("record %d, sent at %v, %v on its way: age %v; want %v", i, r.sent, r.delay, got, r.age)
				}
			}
		})
	}
}

// Four days at 100 parts in a million are more than half the send time's range.
func TestAgeFollowsDriftForDays(t *testing.T) {
	var a Ages
	for now := time.Duration(0); now < 10*24*time.Hour; now += 5 * time.Second {
		clock := now - time.Duration(float64(now)*100e-6)
		if age := a.Of(now, uint16(clock.Milliseconds())); age > 5*time.Millisecond {
			t.Fatalf("age %v after %v on a way without delay", age, now)
		}
	}
}
