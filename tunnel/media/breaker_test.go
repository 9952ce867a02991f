package media

import (
	"encoding/binary"
	"fmt"
	"math"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"culvert/tunnel/wire"
)

// A bottleneck is a way that takes everything and loses what its drop-tail
// queue can not hold: what a sealed way sees of the network.
type bottleneck struct {
	queue time.Duration
	delay time.Duration // of the empty link

	mu    sync.Mutex // guards the fields below: the room's clock sends as well
	rate  float64    // bits/s
	free  time.Time  // when the link has sent all
	sent  uint32
	bytes int
	out   []parcel
}

// counts returns the records and bytes that were sent.
func (b *bottleneck) counts() (records uint32, bytes int) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.sent, b.bytes
}

// arrived returns what has come to the other end by now.
func (b *bottleneck) arrived(now time.Time) []parcel {
	b.mu.Lock()
	defer b.mu.Unlock()
	n := 0
	for n < len(b.out) && !b.out[n].arrives.After(now) {
		n++
	}
	done := b.out[:n]
	b.out = b.out[n:]
	return done
}

func (b *bottleneck) setRate(rate float64) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.rate = rate
}

type parcel struct {
	p       []byte
	arrives time.Time
	queued  time.Duration
	left    time.Time // when it was sent
}

// overhead is what seal, UDP and IP add to a record, in bytes.
const overhead = 28 + 28

func (b *bottleneck) Start(func([]byte), func()) {}
func (b *bottleneck) Max() int                   { return 1400 }
func (b *bottleneck) Name() string               { return "bottleneck" }
func (b *bottleneck) Lost() map[string]uint64    { return nil }

func (b *bottleneck) Send(p []byte) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	now := time.Now()
	b.sent++
	b.bytes += len(p)
	if b.free.Before(now) {
		b.free = now
	}
	wait := b.free.Sub(now)
	takes := time.Duration(float64(8*(len(p)+overhead)) / b.rate * float64(time.Second))
	if wait+takes > b.queue {
		return nil
	}
	b.free = b.free.Add(takes)
	b.out = append(b.out, parcel{append([]byte(nil), p...), b.free.Add(b.delay), wait, now})
	return nil
}

// A run is what a simulated call has come to.
type run struct {
	audio, late   int // from 2 s after the fall on
	allAudio, off int // from the fall on
	waited        time.Duration
	shaped        time.Duration // when it was first, after the fall
	freed         time.Duration // when it was again, after the rise
	video         int           // bytes that arrived in the last second
	begun, whole  int           // frames of which something arrived while the rate was low, and all
}

// simulate sends 2 Mbit/s of pictures and 50 kbit/s of sound for 5 s (and
// later) over 10 Mbit/s, then for 15 s over low, then 15 s over 10 Mbit/s again. Our own
// reports, which the peer's figures come from, are in the same queue.
func simulate(t *testing.T, low float64, later time.Duration) run {
	const (
		every = 250 * time.Millisecond
		back  = 20 * time.Millisecond
	)
	fall, rise, end := 5*time.Second+later, 20*time.Second+later, 35*time.Second+later
	var res run
	synctest.Test(t, func(t *testing.T) {
		link := &bottleneck{rate: 10e6, queue: 200 * time.Millisecond, delay: 20 * time.Millisecond}
		r := NewRoom(0, &Drops{})
		r.Add(link, nil)
		b := NewBreaker()
		var l Line
		audio, video := &source{ssrc: 1}, &source{ssrc: 2}
		sentAt := map[uint16]time.Time{} // sound, by its number
		onTime := map[uint16]bool{}
		entered := map[uint32]time.Time{} // pictures' and sound's first bytes
		begin := time.Now()
		key := func(p []byte) uint32 { return uint32(p[11])<<16 | uint32(p[2])<<8 | uint32(p[3]) }

		// The peer's counts, and those at the last of our reports that arrived.
		var peerBytes, peerRecords, markBytes int
		var markRecords int
		var markSent uint32
		var markTime time.Time
		var figures Seen
		type answer struct {
			at time.Time
			Seen
		}
		var answers []answer
		var ourBytes int
		reportNumbers := map[int]uint32{}
		reports := 0
		frames := map[uint32]int{} // packets, by RTP timestamp
		missing := map[uint32]int{}
		var lastTick time.Time

		for now := begin; now.Sub(begin) < end; now = time.Now() {
			at := now.Sub(begin)
			switch at {
			case fall:
				link.setRate(low)
			case rise:
				link.setRate(10e6)
			}
			if at%(20*time.Millisecond) == 0 {
				p := audio.next(125, true)
				sentAt[audio.seq] = now
				entered[key(p)] = now
				r.Send(&l, p, p)
			}
			if at%(33*time.Millisecond) == 0 {
				for i := range 7 + int(at/(33*time.Millisecond))%2 {
					p := video.next(1100, i == 0)
					frames[video.time]++
					entered[key(p)] = now
					r.Send(&l, p, p)
				}
			}
			if at%every == 0 {
				p := (&wire.Report{}).Append(nil)
				p = append(p, byte(reports>>8), byte(reports))
				records, _ := link.counts()
				reportNumbers[reports] = records + 1
				reports++
				r.Send(nil, p, nil)
			}
			for _, c := range link.arrived(now) {
				peerRecords++
				peerBytes += len(c.p)
				if len(c.p) == 125 || len(c.p) == 1100 {
					in := entered[key(c.p)]
					res.waited = max(res.waited, c.left.Sub(in))
					if len(c.p) == 125 && c.arrives.Sub(in) <= 100*time.Millisecond+link.delay {
						onTime[uint16(c.p[2])<<8|uint16(c.p[3])] = true
					}
					if len(c.p) == 1100 && at > fall+2*time.Second && at < rise {
						f := binary.BigEndian.Uint32(c.p[4:])
						if missing[f] == 0 {
							res.begun++
							missing[f] = frames[f]
						}
						if missing[f]--; missing[f] == 0 {
							res.whole++
							missing[f] = -1
						}
					}
					if len(c.p) == 1100 && at >= end-time.Second {
						res.video += len(c.p)
					}
					continue
				}
				// One of our reports: the peer reckons anew.
				n := reportNumbers[int(c.p[len(c.p)-2])<<8|int(c.p[len(c.p)-1])]
				figures.Delay = c.queued
				if took := now.Sub(markTime); !markTime.IsZero() && took >= 200*time.Millisecond {
					sent := int(n - markSent)
					figures.Lost = max(0, 1-float64(peerRecords-markRecords)/float64(sent))
					figures.Received = float64(8*(peerBytes-markBytes)) / took.Seconds()
				}
				markTime, markSent, markRecords, markBytes = now, n, peerRecords, peerBytes
			}
			if at%every == 125*time.Millisecond {
				answers = append(answers, answer{now.Add(back), figures})
			}
			for len(answers) > 0 && !answers[0].at.After(now) {
				s := answers[0].Seen
				answers = answers[1:]
				_, bytes := link.counts()
				if !lastTick.IsZero() {
					s.Sent = float64(8*(bytes-ourBytes)) / now.Sub(lastTick).Seconds()
				}
				lastTick, ourBytes = now, bytes
				_, rate := b.Report(now, s)
				r.Shape(rate)
				if rate > 0 && at > fall && res.shaped == 0 {
					res.shaped = at - fall
				}
				if rate == 0 && at > rise && res.freed == 0 {
					res.freed = at - rise
				}
			}
			time.Sleep(time.Millisecond)
			synctest.Wait()
		}
		for n, at := range sentAt {
			switch since := at.Sub(begin) - fall; {
			case since < 0 || at.Sub(begin) > rise-time.Second/5:
				continue
			case since >= 2*time.Second:
				if res.audio++; !onTime[n] {
					res.late++
				}
				fallthrough
			default:
				if res.allAudio++; !onTime[n] {
					res.off++
				}
			}
		}
	})
	return res
}

func TestSoundIsOnTimeWhenTheRateFalls(t *testing.T) {
	for _, c := range []struct {
		low   float64
		later time.Duration // where in a report interval it falls
	}{{300e3, 0}, {300e3, 60 * time.Millisecond}, {300e3, 120 * time.Millisecond}, {300e3, 190 * time.Millisecond}, {600e3, 0}, {1e6, 0}} {
		t.Run(fmt.Sprintf("to %.0f kbit/s, %v later", c.low/1000, c.later), func(t *testing.T) {
			res := simulate(t, c.low, c.later)
			after := 100 * (1 - float64(res.late)/float64(res.audio))
			with := 100 * (1 - float64(res.off)/float64(res.allAudio))
			t.Logf("on time from 2 s after the fall on: %.1f %%; from the fall on: %.1f %%; shaped after %v, free %v after the rise; %v waited at most; %d kbit/s of pictures at the end; %d of %d frames that were begun came whole",
				after, with, res.shaped, res.freed, res.waited, res.video*8/1000, res.whole, res.begun)
			if after < 98 {
				t.Errorf("%.1f %% of the sound is on time from 2 s after the fall on", after)
			}
			if with < 90 {
				t.Errorf("%.1f %% of the sound is on time from the fall on", with)
			}
			if res.waited > MaxAge {
				t.Errorf("something waited %v in the room", res.waited)
			}
			// At 300 kbit/s no frame of 8.8 kB can be sent in 150 ms, at 600 it is a close run.
			if c.low >= 1e6 && (res.whole < 100 || res.whole < res.begun*8/10) {
				t.Errorf("%d of %d frames came whole", res.whole, res.begun)
			}
			if res.freed == 0 || res.video*8 < 1_800_000 {
				t.Errorf("free %v after the rise, %d kbit/s of pictures", res.freed, res.video*8/1000)
			}
		})
	}
}

// feed gives the same report n times, every 250 ms.
func feed(b *Breaker, now *time.Time, n int, s Seen) (bad bool, shape float64) {
	for range n {
		*now = now.Add(250 * time.Millisecond)
		bad, shape = b.Report(*now, s)
	}
	return bad, shape
}

var wellSeen = Seen{Sent: 2e6, Received: 2e6, Delay: 5 * time.Millisecond}

func TestWhatTripsABreaker(t *testing.T) {
	for name, c := range map[string]struct {
		reports int
		seen    Seen
		bad     bool
		shaped  bool
	}{
		"nothing is wrong":             {40, wellSeen, false, false},
		"10 % with a queue for 0.75 s": {3, Seen{2e6, 1.79e6, 0.105, 60 * time.Millisecond, false}, true, false},
		"10 % with a queue for 1 s":    {4, Seen{2e6, 1.79e6, 0.105, 60 * time.Millisecond, false}, true, true},
		"40 % with a queue, once":      {1, Seen{2e6, 1.2e6, 0.4, 60 * time.Millisecond, false}, true, false},
		"40 % with a queue, twice":     {2, Seen{2e6, 1.2e6, 0.4, 60 * time.Millisecond, false}, true, true},
		"losses that are not known":    {3, Seen{2e6, 0.5e6, 0, 60 * time.Millisecond, false}, true, true},
		"the same, without a queue":    {40, Seen{2e6, 0.5e6, 0, 0, false}, true, false},
		"9 % with a queue":             {40, Seen{2e6, 1.82e6, 0.09, 60 * time.Millisecond, false}, false, false},
		"40 % without a queue":         {40, Seen{2e6, 1.2e6, 0.4, 0, false}, true, false},
		"a queue without loss":         {40, Seen{2e6, 2e6, 0, 300 * time.Millisecond, false}, false, false},
	} {
		t.Run(name, func(t *testing.T) {
			now := time.Unix(1e9, 0)
			b := NewBreaker()
			feed(b, &now, 10, wellSeen)
			bad, shape := feed(b, &now, c.reports, c.seen)
			if bad != c.bad || shape > 0 != c.shaped {
				t.Errorf("bad %v, shaped to %.0f", bad, shape)
			}
			if bad, shape = feed(b, &now, 60, wellSeen); bad || shape != 0 {
				t.Errorf("after 15 good seconds: bad %v, shaped to %.0f", bad, shape)
			}
		})
	}
}

func TestARateThatGrowsIsNotFlat(t *testing.T) {
	now := time.Unix(1e9, 0)
	b := NewBreaker()
	s := Seen{Sent: 1e6, Received: 0.85e6, Lost: 0.15, Delay: 50 * time.Millisecond}
	for range 20 {
		s.Sent, s.Received = s.Sent*1.2, s.Received*1.2
		if _, shape := feed(b, &now, 1, s); shape != 0 {
			t.Fatalf("shaped to %.0f", shape)
		}
	}
}

func TestALyingReportIsBounded(t *testing.T) {
	now := time.Unix(1e9, 0)
	b := NewBreaker()
	feed(b, &now, 10, wellSeen)
	for _, s := range []Seen{
		{2e6, 0, 1, time.Hour, false},
		{2e6, 0, 40, time.Hour, false},
		{2e6, -5, -7, -time.Hour, false},
		{0, 1e18, 0, 0, false},
		{2e6, math.MaxUint32 * 1000, 1, 10 * time.Second, false},
	} {
		for range 200 {
			now = now.Add(250 * time.Millisecond)
			if _, shape := b.Report(now, s); shape != 0 && shape < MinShape || math.IsNaN(shape) || math.IsInf(shape, 0) {
				t.Fatalf("%+v shapes to %v", s, shape)
			}
		}
	}
	if bad, shape := feed(b, &now, 100, wellSeen); bad || shape != 0 {
		t.Errorf("it does not recover: bad %v, shaped to %.0f", bad, shape)
	}
}

func TestSilenceCountsNeitherWay(t *testing.T) {
	now := time.Unix(1e9, 0)
	b := NewBreaker()
	feed(b, &now, 10, wellSeen)
	feed(b, &now, 1, Seen{2e6, 1.6e6, 0.2, 60 * time.Millisecond, false})
	now = now.Add(time.Minute)
	b.Silence(now)
	if _, shape := feed(b, &now, 1, Seen{2e6, 1.9e6, 0.11, 60 * time.Millisecond, false}); shape != 0 {
		t.Errorf("shaped to %.0f by a minute of nothing", shape)
	}
	_, before := feed(b, &now, 4, Seen{2e6, 1.2e6, 0.4, 60 * time.Millisecond, false})
	now = now.Add(time.Minute)
	b.Silence(now)
	if _, after := feed(b, &now, 1, Seen{before, before, 0.05, 30 * time.Millisecond, false}); after != before {
		t.Errorf("shaped to %.0f before, %.0f after", before, after)
	}
}

// Bulk that gives way answers for the congestion: a call is not held back
// beside it, and is let go at once where it was.
func TestMediaIsNotShapedWhileBulkYields(t *testing.T) {
	full := Seen{Sent: 2.5e6, Received: 1.2e6, Lost: 0.5, Delay: 200 * time.Millisecond}
	yields := full
	yields.Yields = true
	now := time.Unix(1e9, 0)
	b := NewBreaker()
	feed(b, &now, 10, wellSeen)
	if bad, shape := feed(b, &now, 8, yields); bad || shape != 0 {
		t.Errorf("beside bulk that yields: bad %v, shaped to %.0f", bad, shape)
	}
	if bad, shape := feed(b, &now, 4, full); !bad || shape == 0 {
		t.Errorf("when bulk has nothing more to give: bad %v, shaped to %.0f", bad, shape)
	}
	if bad, shape := feed(b, &now, 1, yields); bad || shape != 0 {
		t.Errorf("when bulk yields again: bad %v, shaped to %.0f", bad, shape)
	}
	yields.Delay = 0
	if bad, shape := feed(b, &now, 8, yields); !bad || shape != 0 {
		t.Errorf("a way that loses without a queue: bad %v, shaped to %.0f", bad, shape)
	}
}

// Reports every 50 ms that wait 300 ms in a full queue tell of the time before
// the media began.
func TestMediaThatHasJustBegunIsNotLost(t *testing.T) {
	now := time.Unix(1e9, 0)
	b := NewBreaker()
	quiet := Seen{Sent: 5e3, Received: 5e3}
	for i := range 40 {
		s := quiet
		if i >= 20 {
			s.Sent, s.Delay = 2.5e6, 60*time.Millisecond
		}
		if i >= 30 {
			s.Received = 2.5e6
		}
		now = now.Add(50 * time.Millisecond)
		if bad, shape := b.Report(now, s); bad || shape != 0 {
			t.Fatalf("report %d: bad %v, shaped to %.0f", i, bad, shape)
		}
	}
}
