package tunneltls

import (
	"errors"
	"syscall"
	"testing"
	"time"

	"culvert/tunnel"
)

func TestSilenceIsToldFromIdlenessAndSlowness(t *testing.T) {
	const never = -1
	type steps func(i int, is *progress) // what has become of it at look i
	for name, c := range map[string]struct {
		every time.Duration
		trip  time.Duration
		is    steps
		dead  time.Duration // counted from the first look; never within 20 s
	}{
		"idle":                          {watched, 0, func(int, *progress) {}, never},
		"nothing arrives":               {watched, 40 * time.Millisecond, func(_ int, is *progress) { is.flying = 3 }, silence},
		"nothing arrives, looked often": {sampled, 40 * time.Millisecond, func(_ int, is *progress) { is.flying = 3 }, silence},
		"a long way":                    {watched, 500 * time.Millisecond, func(_ int, is *progress) { is.flying = 3 }, 2 * time.Second},
		"it all arrives":                {watched, 0, func(i int, is *progress) { is.flying, is.acked = 5, uint64(i) }, never},
		"behind a hole":                 {watched, 0, func(i int, is *progress) { is.flying, is.sacked = 100, i%90 }, never},
		"acknowledged late":             {watched, 0, func(i int, is *progress) { is.flying, is.acked = 5, uint64(i/5) }, never},
		"nothing on its way, but the peer's window is shut": {watched, 0, func(_ int, is *progress) { is.unsent = 9000 }, never},
		"this host can not send":                            {watched, 0, func(_ int, is *progress) { is.unsent, is.open = 9000, true }, silence},
		"once in a while":                                   {watched, 0, func(i int, is *progress) { is.flying = i % 2 }, never},
		"silence after a long time":                         {watched, 0, func(i int, is *progress) { is.flying, is.acked = 5, uint64(min(i, 50)) }, 50*watched + silence},
		"this process was held up meanwhile":                {10 * time.Second, 0, func(_ int, is *progress) { is.flying = 1 }, 30 * time.Second},
		"an answer after this process was held":             {10 * time.Second, 0, func(i int, is *progress) { is.flying, is.acked = 1, uint64(i) }, never},
	} {
		t.Run(name, func(t *testing.T) {
			var p pulse
			start := time.Now()
			for i := range 4000 {
				is := progress{trip: c.trip}
				c.is(i, &is)
				at := time.Duration(i) * c.every
				if p.look(start.Add(at), is) {
					if at != c.dead {
						t.Fatalf("dead after %v; want %v", at, c.dead)
					}
					return
				}
				if c.dead == never && at > 20*time.Second {
					return
				}
			}
			if c.dead != never {
				t.Fatalf("it is never found dead; want after %v", c.dead)
			}
		})
	}
}

func TestALaneIsStalledWhileItsWindowHoldsBackWhatIsSent(t *testing.T) {
	for name, c := range map[string]struct {
		is   progress
		want bool
	}{
		"idle":                         {progress{}, false},
		"all is on its way":            {progress{flying: 4, full: true}, false},
		"paced":                        {progress{flying: 4, unsent: 900}, false},
		"held back by the window":      {progress{flying: 4, full: true, unsent: 900}, true},
		"the retransmission ran out":   {progress{flying: 4, expiry: true}, true},
		"a hole, which is soon mended": {progress{flying: 4, sacked: 3}, false},
	} {
		t.Run(name, func(t *testing.T) {
			var p pulse
			p.look(time.Now(), c.is)
			if p.stalled() != c.want {
				t.Errorf("stalled: %v", !c.want)
			}
		})
	}
}

// A network that swallows everything, as the kernel would tell it. Nothing is
// sent after the one datagram: the lane must notice by itself.
func TestASilentLaneIsAbortedWithoutFurtherTraffic(t *testing.T) {
	l, peer := half(t, nil)
	l.(*lane).kernel = func() (progress, bool) { return progress{flying: 1}, true }
	l.Start(ignore, nothing)
	if err := l.Send([]byte("x")); err != nil {
		t.Fatal(err)
	}
	receive(t, "the lane's end", l.Done())
	if !errors.Is(l.Err(), errSilent) || !errors.Is(l.Err(), tunnel.CloudUnreachable) {
		t.Error(l.Err())
	}
	if err := l.Send([]byte("x")); !errors.Is(err, errSilent) {
		t.Error("Send on an aborted lane:", err)
	}
	// It is aborted, with no farewell: the peer reads the datagram and a reset.
	var err error
	for p := make([]byte, 100); err == nil; {
		_, err = peer.Read(p)
	}
	if !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("the peer sees %v", err)
	}
}

func TestTheWatchEndsWhenAllHasArrived(t *testing.T) {
	l, _ := half(t, nil)
	w := l.(*lane)
	looks := make(chan struct{}, 100)
	w.kernel = func() (progress, bool) { looks <- struct{}{}; return progress{}, true }
	l.Start(ignore, nothing)
	for range 2 { // it begins again with the next datagram
		l.Send([]byte("x"))
		receive(t, "a look", looks)
		receive(t, "a second look", looks)
		soon(t, "the watch is over", func() bool {
			w.mu.Lock()
			defer w.mu.Unlock()
			return !w.watching
		})
	}
	if len(looks) > 0 {
		t.Errorf("%d more looks than needed", len(looks))
	}
}

func TestTheKernelTellsWhatALaneHasSent(t *testing.T) {
	l, _ := half(t, nil)
	w := l.(*lane)
	if _, ok := w.kernel(); !ok {
		t.Skip("this kernel tells nothing")
	}
	before, _ := w.kernel()
	l.Start(ignore, nothing)
	l.Send(make([]byte, 1000))
	soon(t, "1000 bytes are acknowledged", func() bool {
		now, _ := w.kernel()
		return now.acked >= before.acked+1000 && now.flying == 0
	})
	if l.(interface{ Stalled() bool }).Stalled() {
		t.Error("an idle lane is stalled")
	}
}

func TestLanesAreFourOrEight(t *testing.T) {
	if n := Lanes(); n != 4 && n != 8 || (n == 4) != bbr() {
		t.Errorf("%d lanes, BBR %v", n, bbr())
	}
}
