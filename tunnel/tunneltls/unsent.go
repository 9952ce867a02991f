package tunneltls

import "time"

const (
	// carrierUnsent is the least of a carrier's TCP_NOTSENT_LOWAT: what a control
	// message or a keep-alive waits behind, against the wake-ups of a bulk
	// transfer. 128 KiB are 100 ms at 10 Mbit/s.
	carrierUnsent = 128 << 10
	maxUnsent     = 2 << 20
	// unsentTime is how long what is unsent may take to leave, where it is more.
	// With 128 KiB alone one stream reached 0.85 of what bare TCP did at 20 ms each
	// way and 1 % loss, with this 0.96.
	unsentTime = 40 * time.Millisecond
	// unsentEvery is how often the rate is taken.
	unsentEvery = 200 * time.Millisecond
)

// unsentSize says how many bytes the kernel should hold that it has not sent, by
// the rate at which it takes them. The zero value is ready.
type unsentSize struct {
	since time.Time
	bytes int
	size  int // what was said last
}

// wrote counts n bytes, and returns the size to be set; 0: it stays.
func (b *unsentSize) wrote(n int, now time.Time) (size int) {
	b.bytes += n
	took := now.Sub(b.since)
	if took < unsentEvery {
		return 0
	}
	rate := float64(b.bytes) / took.Seconds()
	started := !b.since.IsZero()
	b.since, b.bytes = now, 0
	if !started {
		b.size = carrierUnsent
		return 0
	}
	want := min(max(int(rate*unsentTime.Seconds()), carrierUnsent), maxUnsent)
	if want*4 < b.size*5 && want*5 > b.size*4 {
		return 0
	}
	b.size = want
	return want
}
