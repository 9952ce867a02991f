package media

import (
	"testing"
	"testing/synctest"
	"time"

	"culvert/tunnel"
	"culvert/tunnel/wire"
)

// run lets media flow both ways for d: a short record each 50 ms and, with
// long, one as long as the way takes. Both ends tick each 250 ms.
func (w *pair) run(t *testing.T, d time.Duration, long bool) {
	t.Helper()
	for n, until := 0, time.Now().Add(d); time.Now().Before(until); n++ {
		for _, e := range []*end{w.near, w.far} {
			e.say(t, "media")
			if long {
				if err := e.Send(record(string(make([]byte, e.Max()-4)))); err != nil {
					t.Fatal(err)
				}
			}
			if n%5 == 0 {
				e.Tick(time.Now())
			}
		}
		w.carry()
		w.near.got, w.far.got, w.near.rest, w.far.rest = nil, nil, nil, nil
		time.Sleep(50 * time.Millisecond)
	}
}

func (w *pair) sizes() [2]int { return [2]int{w.near.Stats().Size, w.far.Stats().Size} }

func both(n int) [2]int { return [2]int{n, n} }

func TestTheSizeBecomesTheLargestStepThatPasses(t *testing.T) {
	for _, c := range []struct{ mtu, want int }{
		{0, mtuTop4}, {1472, 1472}, {1471, 1452}, {1451, 1432}, {1400, 1352}, {1300, 1280}, {1279, mtuFloor}, {1232, mtuFloor},
	} {
		synctest.Test(t, func(t *testing.T) {
			w := newPair(t, wire.AES128GCM, epochPackets)
			w.mtu = c.mtu
			if w.sizes() != both(mtuFloor) {
				t.Errorf("a path begins with %v", w.sizes())
			}
			w.run(t, 10*time.Second, true)
			if w.sizes() != both(c.want) {
				t.Errorf("a path of %d: %v, want %d", c.mtu, w.sizes(), c.want)
			}
			if n := w.near.Stats().BlackHoles + w.far.Stats().BlackHoles; n != 0 {
				t.Errorf("a path of %d: %d black holes", c.mtu, n)
			}
		})
	}
}

func TestIPv6IsNotTriedAboveItsEthernet(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var m mtu
		m.start(pathOf("[2001:db8::1]:443").Remote.Addr())
		for range 20 {
			for _, p := range m.tick(time.Now(), 0) {
				m.answer(p.nonce, time.Now())
			}
			time.Sleep(time.Second)
		}
		if m.size != mtuTop6 {
			t.Errorf("%d", m.size)
		}
	})
}

func TestAPathThatNarrowsLowersTheSizeAndRecovers(t *testing.T) {
	for _, c := range []struct{ mtu, want int }{{1300, 1280}, {1232, mtuFloor}, {1210, 1200}, {1100, 1052}, {600, 576}} {
		synctest.Test(t, func(t *testing.T) {
			w := newPair(t, wire.AES128GCM, epochPackets)
			w.run(t, 5*time.Second, true)
			if w.sizes() != both(mtuTop4) {
				t.Fatalf("it begins with %v", w.sizes())
			}
			w.mtu = c.mtu
			w.run(t, 30*time.Second, true)
			if w.sizes() != both(c.want) {
				t.Errorf("a path of %d: %v, want %d", c.mtu, w.sizes(), c.want)
			}
			if w.near.Stats().BlackHoles == 0 || w.far.Stats().BlackHoles == 0 {
				t.Errorf("no black hole is counted")
			}
			w.mtu = 0
			w.run(t, mtuRaise+10*time.Second, false)
			if w.sizes() != both(mtuTop4) {
				t.Errorf("wide again after %d: %v", c.mtu, w.sizes())
			}
		})
	}
}

func TestLossesFindANarrowPathWithinASecond(t *testing.T) {
	for _, c := range []struct{ mtu, want int }{{0, mtuTop4}, {1300, 1280}, {1240, mtuFloor}, {1210, 1200}, {1100, 1052}, {1000, 576}, {600, 576}} {
		synctest.Test(t, func(t *testing.T) {
			w := newPair(t, wire.AES128GCM, epochPackets)
			w.run(t, 5*time.Second, true)
			w.run(t, time.Second, false)
			w.mtu = c.mtu
			for _, e := range []*end{w.near, w.far} { // shorter than the floor: nothing else would ask
				if err := e.Send(make([]byte, 700)); err != nil {
					t.Fatal(err)
				}
				e.Doubt(time.Now())
			}
			w.carry()
			w.run(t, time.Second, false)
			if w.sizes() != both(c.want) {
				t.Errorf("a path of %d: %v, want %d", c.mtu, w.sizes(), c.want)
			}
			if n := w.near.Stats().BlackHoles; (n > 0) != (c.mtu > 0) {
				t.Errorf("a path of %d: %d black holes", c.mtu, n)
			}
		})
	}
}

func TestSizeStaysWhereNotOnlyLongPacketsVanish(t *testing.T) {
	for name, lose := range map[string]func(p sealedParcel, up bool) bool{
		"all that goes up":  func(_ sealedParcel, up bool) bool { return up },
		"everything":        func(sealedParcel, bool) bool { return true },
		"all that is short": func(p sealedParcel, _ bool) bool { return len(p.p) < 100 },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newPair(t, wire.AES128GCM, epochPackets)
				w.run(t, 5*time.Second, true)
				w.lose = lose
				for range 60 {
					w.near.Doubt(time.Now())
					w.far.Doubt(time.Now())
					w.run(t, time.Second, true)
				}
				if w.sizes() != both(mtuTop4) {
					t.Errorf("%v", w.sizes())
				}
			})
		})
	}
}

func TestShortMediaNeverLowersTheSizeBelowTheFloor(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newPair(t, wire.AES128GCM, epochPackets)
		w.mtu = 700 // nobody sends what this path does not carry
		w.run(t, time.Minute, false)
		if w.sizes() != both(mtuFloor) {
			t.Errorf("%v", w.sizes())
		}
	})
}

func TestAMoveBeginsWithTheFloorAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newPair(t, wire.AES128GCM, epochPackets)
		w.run(t, 5*time.Second, true)
		w.from, w.mtu = newPath, 1300
		w.near.say(t, "moved")
		w.carry()
		if s := w.far.Stats(); s.Path != newPath || s.Size != mtuFloor || s.BlackHoles != 0 {
			t.Errorf("%+v", s)
		}
		w.run(t, 30*time.Second, true)
		if w.sizes() != both(1280) {
			t.Errorf("%v", w.sizes())
		}
	})
}

func TestALinkThatRefusesALengthLowersTheSize(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newPair(t, wire.AES128GCM, epochPackets)
		w.run(t, 5*time.Second, true)
		w.near.flow.fails = func(n int) error {
			if n > 1400 {
				return tunnel.ErrTooLarge
			}
			return nil
		}
		for _, want := range []struct { // step by step: the link does not say how much it takes
			err  error
			size int
		}{{tunnel.ErrTooLarge, 1452}, {tunnel.ErrTooLarge, 1432}, {tunnel.ErrTooLarge, 1404}, {tunnel.ErrTooLarge, 1352}, {nil, 1352}} {
			if err := w.near.Send(make([]byte, w.near.Max())); err != want.err || w.near.Stats().Size != want.size {
				t.Errorf("%v, size %d, want %v", err, w.near.Stats().Size, want)
			}
		}
	})
}

func TestIdleEndsSendNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newPair(t, wire.AES128GCM, epochPackets)
		w.run(t, 5*time.Second, true)
		time.Sleep(idleAfter)
		for range 2 {
			w.near.Tick(time.Now())
			w.far.Tick(time.Now())
			w.carry()
			time.Sleep(idleAfter + time.Second)
		}
		w.near.Tick(time.Now())
		w.far.Tick(time.Now())
		if up, down := w.carry(); len(up)+len(down) != 0 {
			t.Errorf("%d and %d packets", len(up), len(down))
		}
	})
}
