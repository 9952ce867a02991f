package check

import (
	"cmp"
	"slices"
	"time"
)

// A Grade says what a call would be like.
type Grade string

// The grades, best first.
const (
	GradeGood       Grade = "good"
	GradeAcceptable Grade = "acceptable" // most people notice nothing
	GradeDegraded   Grade = "degraded"   // people notice
	GradeUnusable   Grade = "unusable"
)

var grades = []Grade{GradeGood, GradeAcceptable, GradeDegraded, GradeUnusable}

// worse returns the worse of two grades.
func worse(a, b Grade) Grade {
	return grades[max(slices.Index(grades, a), slices.Index(grades, b))]
}

// Figures are what was measured of one kind of media, in one direction. Clocks
// are not compared: the shortest round trip is taken to have been half up and
// half down, and all else counts from there.
type Figures struct {
	Sent    int           `json:"sent"`
	Arrived int           `json:"arrived"`
	Loss    float64       `json:"loss"`     // of what was sent, 0 to 1
	Delay   time.Duration `json:"delay_ns"` // one-way: half of all took at most so long
	P99     time.Duration `json:"delay_p99_ns"`
	Jitter  time.Duration `json:"jitter_ns"` // RFC 3550 §6.4.1
	Gap     time.Duration `json:"gap_ns"`    // the longest time without an arrival
}

// A sample is one datagram that came back. Times of both ends have origins of
// their own.
type sample struct {
	sent, back time.Duration // here
	far        time.Duration // at the cloud proxy
	count      uint32        // of those that had come there
}

// figuresOf reckons both directions of what came back of so many.
func figuresOf(sent int, samples []sample) (up, down Figures) {
	up.Sent = sent
	if len(samples) == 0 {
		up.Loss = share(sent, 0)
		return up, down
	}
	var offset time.Duration // the far clock less ours
	shortest := time.Duration(-1)
	count := uint32(0)
	for _, s := range samples {
		if trip := s.back - s.sent; shortest < 0 || trip < shortest {
			shortest, offset = trip, s.far-(s.sent+s.back)/2
		}
		count = max(count, s.count)
	}
	up.Arrived = min(int(count), sent)
	down.Sent, down.Arrived = up.Arrived, min(len(samples), up.Arrived)
	up.Loss, down.Loss = share(up.Sent, up.Arrived), share(down.Sent, down.Arrived)
	way(&up, samples, func(s sample) (time.Duration, time.Duration) { return s.sent, s.far - offset })
	way(&down, samples, func(s sample) (time.Duration, time.Duration) { return s.far - offset, s.back })
	return up, down
}

func share(sent, arrived int) float64 {
	if sent == 0 {
		return 0
	}
	return 1 - float64(arrived)/float64(sent)
}

// way fills in what times tell.
func way(f *Figures, samples []sample, times func(sample) (from, to time.Duration)) {
	type hop struct{ left, came time.Duration }
	hops := make([]hop, len(samples))
	delays := make([]time.Duration, len(samples))
	for i, s := range samples {
		from, to := times(s)
		hops[i] = hop{from, to}
		delays[i] = max(to-from, 0)
	}
	slices.Sort(delays)
	f.Delay, f.P99 = delays[len(delays)/2], delays[len(delays)*99/100]
	slices.SortFunc(hops, func(a, b hop) int { return cmp.Compare(a.came, b.came) })
	var jitter float64
	for i, h := range hops[1:] {
		f.Gap = max(f.Gap, h.came-hops[i].came)
		d := (h.came - h.left) - (hops[i].came - hops[i].left)
		jitter += (float64(d.Abs()) - jitter) / 16
	}
	f.Jitter = time.Duration(jitter)
}

// limits of a grade: what is worse in one of them is of the next.
type limits struct {
	delay, jitter, gap time.Duration
	loss               float64
}

// ITU-T G.114: up to 150 ms one-way suits nearly everybody, above 400 ms nobody.
// Below 50 ms, 1 % and 30 ms a call is as good as it gets. What is lost of video
// shows in whole pictures, so it bears less.
var (
	audioLimits = [...]limits{
		{50 * time.Millisecond, 30 * time.Millisecond, 250 * time.Millisecond, 0.01},
		{150 * time.Millisecond, 60 * time.Millisecond, 500 * time.Millisecond, 0.03},
		{400 * time.Millisecond, 150 * time.Millisecond, 3 * time.Second, 0.15},
	}
	videoLimits = [...]limits{
		{50 * time.Millisecond, 30 * time.Millisecond, 250 * time.Millisecond, 0.01},
		{150 * time.Millisecond, 60 * time.Millisecond, 500 * time.Millisecond, 0.02},
		{400 * time.Millisecond, 150 * time.Millisecond, 3 * time.Second, 0.08},
	}
)

// grade judges one direction, and names what decided.
func grade(f Figures, by [3]limits) (g Grade, why string) {
	if f.Arrived == 0 {
		return GradeUnusable, "nothing arrives"
	}
	for i, l := range by {
		switch {
		case f.Loss >= l.loss:
			why = "loss"
		case f.Delay >= l.delay:
			why = "delay"
		case f.Jitter >= l.jitter:
			why = "jitter"
		case f.Gap >= l.gap:
			why = "a gap"
		default:
			return grades[i], why
		}
	}
	return GradeUnusable, why
}

// A Kind is one kind of media, both directions.
type Kind struct {
	Up    Figures `json:"up"`
	Down  Figures `json:"down"`
	Grade Grade   `json:"grade"`
	Why   string  `json:"why,omitempty"` // what keeps it from being better
}

func (k *Kind) judge(by [3]limits) {
	g1, w1 := grade(k.Up, by)
	g2, w2 := grade(k.Down, by)
	k.Grade, k.Why = worse(g1, g2), w1+" up"
	if w1 == "" || worse(g1, g2) != g1 {
		k.Why = w2 + " down"
	}
	if k.Grade == GradeGood {
		k.Why = ""
	}
}

// A Way is what media met on one way.
type Way struct {
	Carrier string `json:"carrier"` // "quic", "tls"
	Way     string `json:"way"`     // "sealed", "quic-datagram", "lanes"
	Audio   Kind   `json:"audio"`
	Video   Kind   `json:"video"`
	// Light is the loss of a tenth of that, before the call, in the worse direction.
	Light float64 `json:"light_loss"`
}

// over says in the words of a firewall what a way goes over.
func (w *Way) over() string {
	if w.Carrier == "tls" {
		return "over TCP"
	}
	return "over UDP"
}

// worst is the worse of its kinds of media.
func (w *Way) worst() Grade { return worse(w.Audio.Grade, w.Video.Grade) }
