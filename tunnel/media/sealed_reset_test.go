package media

import (
	"testing"
	"testing/synctest"
	"time"

	"culvert/tunnel/wire"
)

// resetPair returns a pair and the number of times that near was told of a reset.
func resetPair(t *testing.T, limit uint64) (*pair, *int) {
	told := new(int)
	w := &pair{from: nearPath, far: newEnd(t, false, wire.AES128GCM, limit, nil)}
	w.near = newEnd(t, true, wire.AES128GCM, limit, func() { *told++ })
	return w, told
}

// watched returns which of the far end's epochs near waits for resets of.
func (w *pair) watched(t *testing.T) (epochs []uint32) {
	t.Helper()
	for _, e := range []*openEpoch{w.far.in.old, w.far.in.cur, w.far.in.next} {
		if e != nil && w.near.flow.watches[e.token] != nil {
			epochs = append(epochs, e.number)
		}
	}
	if len(epochs) != len(w.near.flow.watches) {
		t.Errorf("%d watches, only %v of the far end's", len(w.near.flow.watches), epochs)
	}
	return epochs
}

func TestAResetIsHeededOnceAndNotAfterClose(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w, told := resetPair(t, epochPackets)
		w.run(t, time.Second, false)
		if got := w.watched(t); len(got) != 2 || got[0] != 0 || got[1] != 1 {
			t.Fatalf("watched: %v", got)
		}
		seen := w.near.flow.watches[w.far.in.cur.token]
		if *told != 0 {
			t.Error("told of a reset before there was one")
		}
		seen()
		seen()
		w.near.flow.watches[w.far.in.next.token]()
		if *told != 1 {
			t.Errorf("told %d times", *told)
		}

		w, told = resetPair(t, epochPackets)
		w.run(t, time.Second, false)
		seen = w.near.flow.watches[w.far.in.cur.token]
		w.near.Close()
		seen() // the flow had looked it up before
		if *told != 0 || len(w.near.flow.watches) != 0 {
			t.Errorf("after Close: told %d times, %d watches", *told, len(w.near.flow.watches))
		}
		w.near.watch(wire.Reset{Token: [16]byte{1}})
		if len(w.near.flow.watches) != 0 {
			t.Error("a token is watched after Close")
		}
	})
}

func TestLostTokensAreToldAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w, _ := resetPair(t, epochPackets)
		w.lose = func(_ sealedParcel, up bool) bool { return !up }
		w.run(t, 10*time.Second, false)
		if got := w.watched(t); len(got) != 0 {
			t.Fatalf("watched: %v", got)
		}
		w.lose = nil
		w.run(t, 10*time.Second, false)
		if got := w.watched(t); len(got) != 2 {
			t.Errorf("watched: %v", got)
		}
	})
}

func TestTokensFollowTheEpochs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w, told := resetPair(t, 400)
		for range 20 {
			w.run(t, 5*time.Second, false)
			sending := w.near.out.epoch.Load().number
			got := w.watched(t)
			if len(got) != 2 || got[0] != sending || got[1] != sending+1 {
				t.Errorf("in epoch %d resets of %v are heeded", sending, got)
			}
		}
		if w.near.out.epoch.Load().number < 4 || *told != 0 {
			t.Errorf("epoch %d, told %d times", w.near.out.epoch.Load().number, *told)
		}
	})
}

func TestOnlyTokensOfEpochsInUseAreWatched(t *testing.T) {
	w, _ := resetPair(t, epochPackets)
	for _, epoch := range []uint32{2, 3, 1 << 31, 1<<32 - 1} {
		r := wire.Reset{Epoch: epoch, Token: [16]byte{byte(epoch), 7}}
		if err := w.far.Send(r.Append(nil)); err != nil {
			t.Fatal(err)
		}
	}
	w.carry()
	if n := len(w.near.flow.watches); n != 0 {
		t.Errorf("%d tokens are watched", n)
	}
	// What is told last holds, and only that: watches do not pile up.
	for n := range byte(100) {
		r := wire.Reset{Epoch: uint32(n % 2), Token: [16]byte{n, 9}}
		if err := w.far.Send(r.Append(nil)); err != nil {
			t.Fatal(err)
		}
	}
	w.carry()
	if n := len(w.near.flow.watches); n != 2 || w.near.flow.watches[[16]byte{98, 9}] == nil || w.near.flow.watches[[16]byte{99, 9}] == nil {
		t.Errorf("%d tokens are watched", n)
	}
	if len(w.near.rest) != 0 {
		t.Errorf("the plane gets %d of the tokens", len(w.near.rest))
	}
}

func TestTheFarEndHeedsNoTokens(t *testing.T) {
	w, _ := resetPair(t, epochPackets)
	if err := w.near.Send((&wire.Reset{Token: [16]byte{1}}).Append(nil)); err != nil {
		t.Fatal(err)
	}
	w.carry()
	if len(w.far.flow.watches) != 0 || len(w.far.rest) != 1 {
		t.Errorf("%d watches, the plane gets %d notices", len(w.far.flow.watches), len(w.far.rest))
	}
}

func TestWithoutAResetKeyNothingIsTold(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w, _ := resetPair(t, epochPackets)
		w.far.in.cur.keep, w.far.in.next.keep = false, false
		w.run(t, 10*time.Second, false)
		if n := len(w.near.flow.watches); n != 0 {
			t.Errorf("%d tokens are watched", n)
		}
	})
}

func TestTokensAreToldAgainOnANewPath(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w, _ := resetPair(t, epochPackets)
		w.run(t, 2*time.Minute, false) // the gap has grown to a minute
		for name, move := range map[string]func(){
			"roamed":      func() { w.from = newPath; w.near.say(t, "moved"); w.carry() },
			"the carrier": func() { w.from = thirdPath; w.far.flow.path = thirdPath },
		} {
			move()
			clear(w.near.flow.watches)
			w.near.tokens = [2]watched{}
			w.run(t, time.Second, false)
			if got := w.watched(t); len(got) != 2 || w.far.Stats().Path != w.from {
				t.Errorf("%s: watched %v, the far end sends to %v", name, got, w.far.Stats().Path)
			}
		}
	})
}
