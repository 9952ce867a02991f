package main

import (
	"bytes"
	"encoding/json"
	"math"
	"math/rand/v2"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

// udp and tcp are IPv4 packets of 1000 bytes.
func ipv4(protocol byte) []byte {
	p := make([]byte, 1000)
	p[0], p[9] = 0x45, protocol
	return p
}

var udp, tcp = ipv4(protocolUDP), ipv4(protocolTCP)

func newShaper() *shaper { return &shaper{random: rand.New(rand.NewPCG(1, 2))} }

func TestSettings(t *testing.T) {
	tests := map[string]struct {
		words string
		want  settings
		bad   bool
	}{
		"nothing":      {words: "", want: defaults},
		"all":          {words: "delay=20ms jitter=5ms loss=1 burst=4 rate=10 queue=50ms udp=off tcp=off down=on", want: settings{20 * time.Millisecond, 5 * time.Millisecond, .01, 4, 1e7, 50 * time.Millisecond, true, true, true}},
		"and back":     {words: "udp=off udp=on down=on down=off", want: defaults},
		"no value":     {words: "delay", bad: true},
		"not a number": {words: "loss=much", bad: true},
		"not a time":   {words: "delay=20", bad: true},
		"too much":     {words: "loss=101", bad: true},
		"NaN":          {words: "loss=NaN", bad: true},
		"below zero":   {words: "delay=-1s", bad: true},
		"neither":      {words: "udp=maybe", bad: true},
		"unknown":      {words: "colour=red", bad: true},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			got, err := defaults.change(test.words)
			if (err != nil) != test.bad {
				t.Fatalf("error: %v", err)
			}
			if err == nil && got != test.want {
				t.Errorf("got %+v, want %+v", got, test.want)
			}
			if err != nil && got != defaults {
				t.Errorf("an error changed something: %+v", got)
			}
		})
	}
}

func TestBadLinesAreAnsweredAndChangeNothing(t *testing.T) {
	var now atomic.Pointer[settings]
	now.Store(&defaults)
	var out bytes.Buffer
	d := newDirection(nil, nil, &now)
	if err := obey(strings.NewReader("delay=5ms\n\nloss=x\n"), &out, &now, d, d); err != nil {
		t.Fatal(err)
	}
	answers := json.NewDecoder(&out)
	for i, bad := range []bool{false, false, true} {
		var a answer
		if err := answers.Decode(&a); err != nil || (a.Error != "") != bad {
			t.Errorf("answer %d: %+v, %v", i, a, err)
		}
	}
	if got := now.Load().delay; got != 5*time.Millisecond {
		t.Errorf("the delay is %v", got)
	}
}

func TestBlockedProtocols(t *testing.T) {
	start := time.Unix(1, 0)
	for name, test := range map[string]struct {
		words    string
		udp, tcp fate
	}{
		"none": {"", passes, passes},
		"UDP":  {"udp=off", blocked, passes},
		"TCP":  {"tcp=off", passes, blocked},
		"all":  {"down=on", blocked, blocked},
	} {
		t.Run(name, func(t *testing.T) {
			s, err := defaults.change(test.words)
			if err != nil {
				t.Fatal(err)
			}
			h := newShaper()
			if got, _ := h.decide(&s, udp, start); got != test.udp {
				t.Errorf("UDP: %v", got)
			}
			if got, _ := h.decide(&s, tcp, start); got != test.tcp {
				t.Errorf("TCP: %v", got)
			}
		})
	}
	v6 := make([]byte, 40)
	v6[0], v6[6] = 0x60, protocolUDP
	if protocol(v6) != protocolUDP || protocol(nil) != 0 {
		t.Error("protocol numbers are read wrong")
	}
}

func TestRateMakesAQueueThatDropsItsTail(t *testing.T) {
	// 1000 bytes at 8 Mbit/s take 1 ms; a queue of 5 ms takes those that would wait up to 5 ms.
	s, _ := defaults.change("rate=8 queue=5ms delay=20ms")
	h := newShaper()
	start := time.Unix(1, 0)
	for i := range 6 {
		got, due := h.decide(&s, udp, start)
		if want := time.Duration(21+i) * time.Millisecond; got != passes || due.Sub(start) != want {
			t.Errorf("packet %d: %v, due after %v, want %v", i, got, due.Sub(start), want)
		}
	}
	if got, _ := h.decide(&s, udp, start); got != full {
		t.Errorf("a packet beyond the queue: %v", got)
	}
	if h.queued != 6*time.Millisecond {
		t.Errorf("the longest wait is %v", h.queued)
	}
	if got, due := h.decide(&s, udp, start.Add(time.Second)); got != passes || due.Sub(start) != 1021*time.Millisecond {
		t.Errorf("once the queue is empty: %v, %v", got, due.Sub(start))
	}
}

func TestJitterKeepsTheOrder(t *testing.T) {
	s, _ := defaults.change("delay=20ms jitter=30ms")
	h := newShaper()
	now, last := time.Unix(1, 0), time.Time{}
	for i := range 1000 {
		_, due := h.decide(&s, udp, now)
		if d := due.Sub(now); due.Before(last) || d < 20*time.Millisecond || d > 50*time.Millisecond {
			t.Fatalf("packet %d: due after %v, %v after the last", i, d, due.Sub(last))
		}
		now, last = now.Add(time.Millisecond), due
	}
}

func TestLossIsAsMuchAsAskedAndAsBursty(t *testing.T) {
	for name, test := range map[string]struct {
		words string
		run   float64 // mean length of a run of lost packets
	}{
		"random": {"loss=5", 1 / .95},
		"bursts": {"loss=5 burst=4", 4},
	} {
		t.Run(name, func(t *testing.T) {
			s, err := defaults.change(test.words)
			if err != nil {
				t.Fatal(err)
			}
			h := newShaper() // with a fixed seed: it always says the same
			gone, runs, before := 0, 0, false
			const n = 200_000
			for range n {
				got, _ := h.decide(&s, udp, time.Unix(1, 0))
				is := got == lost
				if is {
					gone++
					if !before {
						runs++
					}
				}
				before = is
			}
			if got := float64(gone) / n; math.Abs(got-.05) > .004 {
				t.Errorf("lost %.4f of all, want 0.05", got)
			}
			if got := float64(gone) / float64(runs); math.Abs(got-test.run) > .1*test.run {
				t.Errorf("runs of %.2f, want %.2f", got, test.run)
			}
		})
	}
}
