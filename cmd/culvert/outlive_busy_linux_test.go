package main

import (
	"fmt"
	"os"
	"sync"
	"testing"
	"time"
)

const (
	// outliveBusy is the share of the time in which some process waits for a CPU
	// from which on a machine is too busy for its figures to say much; two
	// commands and a call alone make less than half of that. Bounds are
	// outliveWide times as wide then: what is broken is slower still.
	outliveBusy = 0.4
	outliveWide = 5
)

// outlivePressure returns a function that tells the share of a time in which
// some process waited for a CPU (the kernel's pressure stall information), 0
// where the kernel does not tell.
func outlivePressure(t *testing.T) func(from, to time.Time) float64 {
	type sample struct {
		at     time.Time
		waited time.Duration // since the machine began
	}
	var mu sync.Mutex // guards seen
	var seen []sample
	look := func() {
		var avg [3]float64
		var total int64 // µs
		text, err := os.ReadFile("/proc/pressure/cpu")
		if err != nil {
			return
		}
		if _, err := fmt.Sscanf(string(text), "some avg10=%f avg60=%f avg300=%f total=%d", &avg[0], &avg[1], &avg[2], &total); err != nil {
			return
		}
		mu.Lock()
		defer mu.Unlock()
		seen = append(seen, sample{time.Now(), time.Duration(total) * time.Microsecond})
	}
	end := make(chan struct{})
	var wg sync.WaitGroup
	t.Cleanup(func() { close(end); wg.Wait() })
	wg.Go(func() {
		tick := time.NewTicker(250 * time.Millisecond)
		defer tick.Stop()
		for {
			look()
			select {
			case <-end:
				return
			case <-tick.C:
			}
		}
	})
	return func(from, to time.Time) float64 {
		look()
		mu.Lock()
		defer mu.Unlock()
		var first, last sample
		for _, s := range seen {
			if first.at.IsZero() || !s.at.After(from) {
				first = s
			}
			last = s
			if !s.at.Before(to) {
				break
			}
		}
		if took := last.at.Sub(first.at); took > 0 {
			return (last.waited - first.waited).Seconds() / took.Seconds()
		}
		return 0
	}
}
