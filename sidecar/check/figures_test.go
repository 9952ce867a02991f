package check

import (
	"testing"
	"time"
)

const ms = time.Millisecond

// path is a made-up one: what is sent every 20 ms takes up and then down.
func path(n int, up, down func(i int) (time.Duration, bool)) (sent int, samples []sample) {
	const ahead = 3 * time.Hour // the far clock
	count := uint32(0)
	for i := range n {
		at := time.Duration(i) * 20 * ms
		u, ok := up(i)
		if !ok {
			continue
		}
		count++
		if d, ok := down(i); ok {
			samples = append(samples, sample{sent: at, far: at + u + ahead, back: at + u + d, count: count})
		}
	}
	return n, samples
}

func always(d time.Duration) func(int) (time.Duration, bool) {
	return func(int) (time.Duration, bool) { return d, true }
}

func TestFiguresTellTheDirectionsApart(t *testing.T) {
	every := func(n int, d time.Duration) func(int) (time.Duration, bool) {
		return func(i int) (time.Duration, bool) { return d, i%n != n/2 }
	}
	late := func(i int) (time.Duration, bool) { // a queue builds up: only from there on
		return 30*ms + time.Duration(min(max(i-100, 0), 100))*ms, true
	}
	silent := func(i int) (time.Duration, bool) { return 30 * ms, i < 100 || i >= 150 }
	for name, c := range map[string]struct {
		up, down                func(int) (time.Duration, bool)
		lossUp, lossDown        float64
		delayUp, delayDown      time.Duration
		p99Up, gapDown          time.Duration
		jitterUpMax, jitterDMax time.Duration
	}{
		"a clean path":      {always(30 * ms), always(30 * ms), 0, 0, 30 * ms, 30 * ms, 30 * ms, 20 * ms, 0, 0},
		"loss up":           {every(10, 30*ms), always(30 * ms), 0.1, 0, 30 * ms, 30 * ms, 30 * ms, 40 * ms, 0, 0},
		"loss down":         {always(30 * ms), every(20, 30*ms), 0, 0.05, 30 * ms, 30 * ms, 30 * ms, 40 * ms, 0, 0},
		"a queue up":        {late, always(30 * ms), 0, 0, 130 * ms, 30 * ms, 130 * ms, 21 * ms, 2 * ms, 0},
		"a silent time":     {always(30 * ms), silent, 0, 0.1, 30 * ms, 30 * ms, 30 * ms, 1020 * ms, 0, 0},
		"an uneven path":    {always(10 * ms), always(50 * ms), 0, 0, 30 * ms, 30 * ms, 30 * ms, 20 * ms, 0, 0}, // no clock tells it
		"nothing up":        {func(int) (time.Duration, bool) { return 0, false }, always(0), 1, 0, 0, 0, 0, 0, 0, 0},
		"nothing down":      {always(0), func(int) (time.Duration, bool) { return 0, false }, 1, 0, 0, 0, 0, 0, 0, 0}, // nor this
		"half of each lost": {every(2, 5*ms), every(4, 5*ms), 0.5, 0.5, 5 * ms, 5 * ms, 5 * ms, 80 * ms, 0, 0},
	} {
		up, down := figuresOf(path(500, c.up, c.down))
		near := func(a, b float64) bool { return a-b < 0.011 && b-a < 0.011 }
		if !near(up.Loss, c.lossUp) || !near(down.Loss, c.lossDown) || up.Delay != c.delayUp || down.Delay != c.delayDown || up.P99 != c.p99Up || down.Gap != c.gapDown {
			t.Errorf("%s:\nup   %+v\ndown %+v", name, up, down)
		}
		if up.Jitter > c.jitterUpMax || down.Jitter > c.jitterDMax {
			t.Errorf("%s: jitter %v up, %v down", name, up.Jitter, down.Jitter)
		}
	}
}

func TestJitterIsThatOfRFC3550(t *testing.T) {
	up, _ := figuresOf(path(500, func(i int) (time.Duration, bool) { return 30*ms + time.Duration(i%2)*10*ms, true }, always(30*ms)))
	if up.Jitter < 9*ms || up.Jitter > 10*ms {
		t.Errorf("a path that alternates by 10 ms has a jitter of %v", up.Jitter)
	}
}

func TestGradesFollowTheThresholds(t *testing.T) {
	good := Figures{Sent: 100, Arrived: 100, Delay: 20 * ms, Jitter: 5 * ms, Gap: 50 * ms}
	with := func(change func(*Figures)) Figures {
		f := good
		change(&f)
		return f
	}
	for name, c := range map[string]struct {
		f            Figures
		audio, video Grade
		why          string
	}{
		"good":               {good, GradeGood, GradeGood, ""},
		"just below 50 ms":   {with(func(f *Figures) { f.Delay = 50*ms - 1 }), GradeGood, GradeGood, ""},
		"50 ms":              {with(func(f *Figures) { f.Delay = 50 * ms }), GradeAcceptable, GradeAcceptable, "delay"},
		"150 ms of G.114":    {with(func(f *Figures) { f.Delay = 150 * ms }), GradeDegraded, GradeDegraded, "delay"},
		"400 ms of G.114":    {with(func(f *Figures) { f.Delay = 400 * ms }), GradeUnusable, GradeUnusable, "delay"},
		"1 % of loss":        {with(func(f *Figures) { f.Loss = 0.01 }), GradeAcceptable, GradeAcceptable, "loss"},
		"2.5 % of loss":      {with(func(f *Figures) { f.Loss = 0.025 }), GradeAcceptable, GradeDegraded, "loss"},
		"10 % of loss":       {with(func(f *Figures) { f.Loss = 0.1 }), GradeDegraded, GradeUnusable, "loss"},
		"20 % of loss":       {with(func(f *Figures) { f.Loss = 0.2 }), GradeUnusable, GradeUnusable, "loss"},
		"30 ms of jitter":    {with(func(f *Figures) { f.Jitter = 30 * ms }), GradeAcceptable, GradeAcceptable, "jitter"},
		"a second's silence": {with(func(f *Figures) { f.Gap = time.Second }), GradeDegraded, GradeDegraded, "a gap"},
		"nothing":            {Figures{Sent: 100, Loss: 1}, GradeUnusable, GradeUnusable, "nothing arrives"},
	} {
		a, why := grade(c.f, audioLimits)
		v, _ := grade(c.f, videoLimits)
		if a != c.audio || v != c.video || why != c.why && a != GradeGood {
			t.Errorf("%s: audio %s (%s), video %s", name, a, why, v)
		}
	}
	k := Kind{Up: good, Down: with(func(f *Figures) { f.Loss = 0.05 })}
	k.judge(audioLimits)
	if k.Grade != GradeDegraded || k.Why != "loss down" {
		t.Errorf("the worse direction decides: %+v", k)
	}
}
