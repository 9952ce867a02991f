package media

import (
	"fmt"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"culvert/tunnel"
	"culvert/tunnel/wire"
)

var thirdPath = pathOf("203.0.113.9:5004")

// roaming returns a pair that has settled at nearPath.
func roaming(t *testing.T) *pair {
	w := newPair(t, wire.AES128GCM, epochPackets)
	w.near.say(t, "here")
	w.carry()
	w.far.heard()
	return w
}

// sealOne seals a record at near and returns the packet, undelivered.
func (w *pair) sealOne(t *testing.T, r string) []byte {
	t.Helper()
	w.near.say(t, r)
	sent := w.near.flow.take()
	return sent[len(sent)-1].p
}

// bytesTo returns how many bytes go to a path, and how many packets.
func bytesTo(sent []sealedParcel, to tunnel.Path) (bytes, packets int) {
	for _, p := range sent {
		if p.to == to {
			bytes += len(p.p)
			packets++
		}
	}
	return bytes, packets
}

func TestTheFarEndFollowsAnAddressThatAnswers(t *testing.T) {
	w := roaming(t)
	w.from = newPath
	w.near.say(t, "moved")
	w.carry()
	if s := w.far.Stats(); s.Path != newPath || s.Moves != 1 || s.Size != mtuFloor {
		t.Errorf("the far end: %+v", s)
	}
	w.far.say(t, "down")
	sent := w.far.flow.take()
	if _, n := bytesTo(sent, newPath); n != 1 || len(sent) != 1 {
		t.Errorf("%d of %d packets go to the new path", n, len(sent))
	}
	if s := w.near.Stats(); s.Path != farPath || s.Moves != 0 {
		t.Errorf("the near end: %+v", s)
	}
}

func TestTheNearEndStaysWithItsCarrier(t *testing.T) {
	w := roaming(t)
	w.far.say(t, "from elsewhere")
	w.near.flow.arrive(w.far.flow.take()[0].p, thirdPath)
	w.near.say(t, "up")
	if s := w.near.Stats(); s.Path != farPath || !slices.Equal(w.near.heard(), []string{"from elsewhere"}) {
		t.Errorf("%+v", s)
	}
	if _, n := bytesTo(w.near.flow.take(), farPath); n != 1 {
		t.Error("nothing goes to the carrier's path")
	}
	w.near.flow.path = thirdPath
	w.near.Tick(time.Now())
	if s := w.near.Stats(); s.Path != thirdPath || s.Moves != 1 {
		t.Errorf("the carrier has moved: %+v", s)
	}
}

func TestBadPacketsAreCountedAndMoveNothing(t *testing.T) {
	const limit = 8 // of an epoch
	for name, c := range map[string]struct {
		// make returns a packet from elsewhere; old has come already, late and
		// fresh have not: one was sealed before what has come, one after.
		make func(w *pair, old, late, fresh []byte) []byte
		lost string // the reason; "": it is opened, or nobody has its ID
		got  bool
	}{
		"a tag changed":     {func(_ *pair, _, _, p []byte) []byte { p[len(p)-1] ^= 1; return p }, "not_authentic", false},
		"a counter raised":  {func(_ *pair, _, _, p []byte) []byte { p[11]++; return p }, "not_authentic", false},
		"a free bit":        {func(_ *pair, _, _, p []byte) []byte { p[0] ^= 1; return p }, "not_authentic", false},
		"an endless count":  {func(_ *pair, _, _, p []byte) []byte { p[9] = 0xff; return p }, "not_authentic", false},
		"cut in the record": {func(_ *pair, _, _, p []byte) []byte { return p[:len(p)-1] }, "not_authentic", false},
		"cut in the header": {func(_ *pair, _, _, p []byte) []byte { return p[:SealedOverhead-1] }, "truncated", false},
		"replayed":          {func(_ *pair, p, _, _ []byte) []byte { return p }, "replayed", false},
		"another's ID":      {func(_ *pair, _, _, p []byte) []byte { p[1] ^= 1; return p }, "", false},
		"an ID of the next epoch": {func(w *pair, _, _, p []byte) []byte {
			copy(p[1:], w.far.in.next.id[:])
			return p
		}, "not_authentic", false},
		"late":              {func(_ *pair, _, p, _ []byte) []byte { return p }, "", true},
		"late by an epoch":  {func(w *pair, _, p, _ []byte) []byte { w.startEpoch(t); return p }, "", true},
		"too late, old key": {func(w *pair, _, p, _ []byte) []byte { w.startEpoch(t); time.Sleep(oldEpochLife + 1); return p }, "old_epoch", false},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newPair(t, wire.ChaCha20Poly1305, limit)
				w.near.say(t, "late", "old", "fresh")
				sent := w.near.flow.take()
				w.far.flow.arrive(sent[1].p, nearPath)
				p := c.make(w, slices.Clone(sent[1].p), slices.Clone(sent[0].p), slices.Clone(sent[2].p))
				w.far.heard()
				before := fmt.Sprint(w.far.Lost())
				w.far.flow.take()
				w.far.flow.arrive(p, newPath)
				if got := w.far.heard(); (len(got) == 1) != c.got {
					t.Errorf("got %q", got)
				}
				lost := w.far.Lost()
				if c.lost != "" && (lost[c.lost] != 1 || len(lost) != 1) || c.lost == "" && fmt.Sprint(lost) != before {
					t.Errorf("lost %v", lost)
				}
				// Copies are for candidates only, so what is said next tells of one.
				w.far.say(t, "down")
				if _, n := bytesTo(w.far.flow.take(), newPath); n != 0 || w.far.Stats().Moves != 0 {
					t.Errorf("%d packets go elsewhere, %+v", n, w.far.Stats())
				}
			})
		})
	}
}

// startEpoch makes near begin its next epoch, and far learn of it.
func (w *pair) startEpoch(t *testing.T) {
	t.Helper()
	w.near.out.epoch.Load().next.Store(w.near.out.limit)
	w.far.flow.arrive(w.sealOne(t, "next"), nearPath)
}

func TestANewPathGetsThreeTimesWhatCameFromIt(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := roaming(t)
		p := w.sealOne(t, "copied by somebody, and sent on from elsewhere")
		w.far.flow.arrive(p, newPath)
		for range 100 {
			w.far.say(t, "something that goes down")
			w.far.Tick(time.Now())
			time.Sleep(10 * time.Millisecond)
		}
		sent := w.far.flow.take()
		bytes, packets := bytesTo(sent, newPath)
		if bytes > candidateGain*len(p) || packets < 2 {
			t.Errorf("%d bytes in %d packets for %d", bytes, packets, len(p))
		}
		if _, n := bytesTo(sent, nearPath); n < 100 {
			t.Errorf("the path in use gets %d packets only", n)
		}
		if w.far.Stats().Moves != 0 {
			t.Error("it has moved without an answer")
		}
	})
}

func TestAPathThatDoesNotAnswerIsForgotten(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := roaming(t)
		w.far.flow.arrive(w.sealOne(t, "x"), newPath)
		w.far.flow.take()
		time.Sleep(candidateLife + time.Millisecond)
		w.far.Tick(time.Now())
		w.far.say(t, "down")
		sent := w.far.flow.take()
		if _, n := bytesTo(sent, newPath); n != 0 {
			t.Errorf("%d packets still go there", n)
		}
		if s := w.far.Stats(); s.Path != nearPath || s.Moves != 0 {
			t.Errorf("%+v", s)
		}
		// It can be tried again, and can succeed.
		w.from = newPath
		w.near.say(t, "y")
		w.carry()
		if s := w.far.Stats(); s.Path != newPath || s.Moves != 1 {
			t.Errorf("after an answer: %+v", s)
		}
	})
}

func TestAnAnswerFromElsewhereProvesNothing(t *testing.T) {
	w := roaming(t)
	w.far.flow.arrive(w.sealOne(t, "x"), newPath)
	for _, p := range w.far.flow.take() {
		if p.to == newPath {
			w.near.flow.arrive(p.p, farPath)
		}
	}
	for _, p := range w.near.flow.take() { // the answer, by the path in use
		w.far.flow.arrive(p.p, nearPath)
	}
	if s := w.far.Stats(); s.Path != nearPath || s.Moves != 0 {
		t.Errorf("%+v", s)
	}
}

func TestASilentCandidateGivesWayToAThirdPath(t *testing.T) {
	for name, c := range map[string]struct {
		silent time.Duration
		want   tunnel.Path
	}{
		"silent":       {candidateStale, thirdPath},
		"just heard":   {candidateStale - 1, nearPath},
		"long forgone": {candidateLife + 1, thirdPath},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := roaming(t)
				w.far.flow.arrive(w.sealOne(t, "a copy, ahead of the original"), newPath)
				w.far.flow.take()
				time.Sleep(c.silent)
				w.from = thirdPath
				w.near.say(t, "the sidecar's own")
				w.carry()
				if s := w.far.Stats(); s.Path != c.want {
					t.Errorf("%+v, want %v", s, c.want)
				}
			})
		})
	}
}

func TestTakingTurnsAsCandidateEarnsNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := roaming(t)
		came := map[tunnel.Path]int{}
		for n := range 40 {
			from := []tunnel.Path{newPath, thirdPath}[n%2]
			p := w.sealOne(t, "x")
			came[from] += len(p)
			w.far.flow.arrive(p, from)
			for range 20 {
				w.far.say(t, "down")
			}
			w.far.Tick(time.Now())
			time.Sleep(candidateStale)
		}
		sent := w.far.flow.take()
		for path, n := range came {
			if got, _ := bytesTo(sent, path); got > candidateGain*n || got == 0 {
				t.Errorf("%v gets %d bytes for %d", path, got, n)
			}
		}
		if w.far.Stats().Moves != 0 {
			t.Error("it has moved")
		}
	})
}

func TestAnOlderPacketTakesNoCandidatesPlace(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := roaming(t)
		late := w.sealOne(t, "late")
		w.far.flow.arrive(w.sealOne(t, "x"), newPath)
		w.far.flow.take()
		time.Sleep(candidateStale)
		w.far.flow.arrive(late, thirdPath)
		w.far.say(t, "down")
		if _, n := bytesTo(w.far.flow.take(), thirdPath); n != 0 {
			t.Errorf("%d packets go to where an old packet came from", n)
		}
	})
}

func TestTheFarEndFollowsTheCarriersOwnMove(t *testing.T) {
	w := roaming(t)
	w.far.Tick(time.Now())
	if s := w.far.Stats(); s.Moves != 0 {
		t.Fatalf("moved to where it is: %+v", s)
	}
	// Nothing comes up by which to roam.
	w.far.flow.path = newPath
	w.far.Tick(time.Now())
	if s := w.far.Stats(); s.Path != newPath || s.Moves != 1 {
		t.Errorf("the carrier has moved: %+v", s)
	}
	// A sidecar that has gone on since then is not called back by a carrier that stays.
	w.from = thirdPath
	w.near.say(t, "further")
	w.carry()
	w.far.Tick(time.Now())
	if s := w.far.Stats(); s.Path != thirdPath || s.Moves != 2 {
		t.Errorf("roamed on: %+v", s)
	}
	// The carrier comes after it: nothing is to be done.
	w.far.flow.path = thirdPath
	w.far.Tick(time.Now())
	if s := w.far.Stats(); s.Path != thirdPath || s.Moves != 2 {
		t.Errorf("the carrier has come after: %+v", s)
	}
}

func TestEpochsDoNotFollowEachOtherWithinASecond(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newPair(t, wire.AES128GCM, 1)
		w.far.in.gap = epochGap
		w.near.say(t, "0", "1", "2")
		sent := w.near.flow.take()
		for _, p := range sent {
			w.far.flow.arrive(p.p, nearPath)
		}
		if got := w.far.heard(); !slices.Equal(got, []string{"0", "1"}) || w.far.Lost()["early_epoch"] != 1 {
			t.Errorf("got %q, lost %v", got, w.far.Lost())
		}
		time.Sleep(epochGap)
		w.far.flow.arrive(sent[2].p, nearPath)
		if got := w.far.heard(); !slices.Equal(got, []string{"2"}) {
			t.Errorf("a second later got %q, lost %v", got, w.far.Lost())
		}
	})
}

func TestPacketsFromACandidateCostNoAllocation(t *testing.T) {
	if sealedRace {
		t.Skip("the race detector makes pools forget")
	}
	w := roaming(t)
	w.far.Start(func([]byte) {}, nil)
	const runs = 500
	var sent [][]byte
	for range runs + 2 { // one makes the candidate, one is AllocsPerRun's first
		sent = append(sent, w.sealOne(t, "x"))
	}
	// The challenges are due only once in 100 ms and are paid for by time, not by packets.
	w.far.flow.fails = func(int) error { return tunnel.ErrBlocked }
	recv := w.far.flow.claims[w.far.in.cur.id]
	recv(sent[0], newPath)
	c := w.far.route.Load().candidate
	c.probed = time.Now().Add(time.Hour)
	n := 0
	if got := testing.AllocsPerRun(runs, func() { n++; recv(sent[n], newPath) }); got != 0 {
		t.Errorf("%v allocations", got)
	}
}
