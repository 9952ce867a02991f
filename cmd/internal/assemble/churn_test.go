package assemble_test

import (
	"net/netip"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"culvert/cmd/internal/assemble"
)

// held is what this process, with both ends in it, has in use.
type held struct {
	goroutines, files, objects int
}

func holds(t *testing.T) (h held) {
	t.Helper()
	if all, err := os.ReadDir("/proc/self/fd"); err == nil {
		h.files = len(all)
	}
	runtime.GC()
	runtime.GC() // what finalizers have let go
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	h.goroutines, h.objects = runtime.NumGoroutine(), int(m.HeapObjects)
	return h
}

// churn opens associations at a rate, exchanges a datagram on each and closes it.
// It returns how many there were and how many got no answer.
func churn(t *testing.T, sc *assemble.Sidecar, far netip.AddrPort, perSecond int, over time.Duration) (all, silent int) {
	var wg sync.WaitGroup
	var unanswered atomic.Int64
	under := make(chan struct{}, 1000) // where the machine is slower than the rate, the rate gives way
	began := time.Now()
	for ; time.Since(began) < over; all++ {
		time.Sleep(time.Until(began.Add(time.Duration(all) * time.Second / time.Duration(perSecond))))
		under <- struct{}{}
		wg.Go(func() {
			defer func() { <-under }()
			a, err := newAssociation(sc.Front.Addr())
			if err != nil {
				t.Error(err)
				return
			}
			defer a.close()
			for range 3 {
				if a.echoes(t, "once", far) {
					return
				}
			}
			unanswered.Add(1)
		})
	}
	wg.Wait()
	return all, int(unanswered.Load())
}

// What comes and goes leaves nothing behind. CULVERT_CHURN says for how long, where
// a figure is wanted.
func TestAssociationsThatComeAndGoLeaveNothing(t *testing.T) {
	over := time.Second
	if testing.Short() {
		over /= 2
	}
	if text := os.Getenv("CULVERT_CHURN"); text != "" {
		var err error
		if over, err = time.ParseDuration(text); err != nil {
			t.Fatal(err)
		}
	}
	const perSecond = 500
	far := newEcho(t)
	for _, mode := range bothCarriers {
		t.Run(string(mode), func(t *testing.T) {
			s := newSite(t)
			s.cloud(t)
			sc := s.sidecar(t, mode)
			churn(t, sc, far.addr, perSecond, 500*time.Millisecond) // pools and buffers are made
			far.forget()
			time.Sleep(time.Second)
			before := holds(t)
			all, silent := churn(t, sc, far.addr, perSecond, over)
			far.forget()
			var after held
			eventually(t, "all is as before", func() bool {
				after = holds(t)
				return after.goroutines <= before.goroutines+5 && after.files <= before.files+5 && after.objects < before.objects+all
			})
			t.Logf("%d associations in %v, %d without an answer; goroutines %d, then %d; descriptors %d, then %d; objects on the heap %d, then %d", all, over, silent,
				before.goroutines, after.goroutines, before.files, after.files, before.objects, after.objects)
		})
	}
}

// forget makes an echo's memory no part of what is counted.
func (e *echo) forget() {
	e.mu.Lock()
	defer e.mu.Unlock()
	clear(e.from)
	e.from = map[netip.AddrPort]int{}
}
