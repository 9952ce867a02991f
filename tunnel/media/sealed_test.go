package media

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"culvert/tunnel"
	"culvert/tunnel/wire"
)

var bothAEADs = []string{wire.AES128GCM, wire.ChaCha20Poly1305}

func TestRecordsPassBothWaysUnchanged(t *testing.T) {
	for _, aead := range bothAEADs {
		t.Run(aead, func(t *testing.T) {
			w := newPair(t, aead, epochPackets)
			w.near.say(t, "up 1", "up 2", "")
			w.far.say(t, "down 1")
			up, down := w.carry()
			if got := w.far.heard(); !slices.Equal(got, []string{"up 1", "up 2", ""}) {
				t.Errorf("far got %q", got)
			}
			if got := w.near.heard(); !slices.Equal(got, []string{"down 1"}) {
				t.Errorf("near got %q", got)
			}
			if len(w.near.Lost()) != 0 || len(w.far.Lost()) != 0 {
				t.Errorf("lost %v and %v", w.near.Lost(), w.far.Lost())
			}
			for _, p := range append(up, down...) {
				if p.p[0]>>6 != 1 {
					t.Errorf("a packet begins with %#x", p.p[0])
				}
			}
		})
	}
}

func TestWhatIsNotAuthenticIsDropped(t *testing.T) {
	for _, aead := range bothAEADs {
		w := newPair(t, aead, epochPackets)
		w.near.say(t, "the only one")
		p := w.near.flow.take()[0].p
		claimed := 0
		for i := range p {
			for bit := range 8 {
				forged := slices.Clone(p)
				forged[i] ^= 1 << bit
				if ok, taken := w.far.flow.arrive(forged, nearPath); ok {
					claimed++
					if !taken {
						t.Errorf("%s: the carrier gets byte %d bit %d forged, and would answer it with a reset", aead, i, bit)
					}
				}
			}
		}
		if n := w.far.Lost()["not_authentic"]; n != uint64(claimed) || claimed != 8*(len(p)-8) {
			t.Errorf("%s: %d counted of %d forged packets with the ID", aead, n, claimed)
		}
		// No forged counter has moved the window.
		w.far.flow.arrive(p, nearPath)
		if got := w.far.heard(); !slices.Equal(got, []string{"the only one"}) {
			t.Errorf("%s: got %q", aead, got)
		}
	}
}

func TestTheCarrierGetsWhatIsNotAuthenticWhereItSendsNoResets(t *testing.T) {
	w := newPair(t, wire.AES128GCM, epochPackets)
	w.far.say(t, "x")
	p := w.far.flow.take()[0].p
	p[20] ^= 1
	if claimed, taken := w.near.flow.arrive(p, farPath); !claimed || taken || w.near.Lost()["not_authentic"] != 1 {
		t.Errorf("claimed %v, taken %v, lost %v", claimed, taken, w.near.Lost())
	}
}

func TestACutPacketIsDroppedAtEveryLength(t *testing.T) {
	for _, aead := range bothAEADs {
		w := newPair(t, aead, epochPackets)
		w.near.say(t, "something long enough")
		p := w.near.flow.take()[0].p
		for n := 9; n < len(p); n++ {
			if _, taken := w.far.flow.arrive(p[:n], nearPath); !taken {
				t.Errorf("%s: the carrier gets a packet cut to %d bytes", aead, n)
			}
		}
		w.far.flow.arrive(append(slices.Clone(p), 0), nearPath)
		lost := w.far.Lost()
		if got := w.far.heard(); len(got) > 0 || lost["truncated"] != SealedOverhead-9 || lost["not_authentic"] != uint64(len(p)-SealedOverhead+1) {
			t.Errorf("%s: got %q, lost %v", aead, got, lost)
		}
	}
}

func TestAnotherSessionsPacketsAreNotOpened(t *testing.T) {
	w := newPair(t, wire.AES128GCM, epochPackets)
	other, err := NewSealed(SealedConfig{Flow: newFlow(farPath), Root: make([]byte, rootSize), AEAD: wire.AES128GCM, Near: true})
	if err != nil {
		t.Fatal(err)
	}
	if err := other.Send(record("theirs")); err != nil {
		t.Fatal(err)
	}
	p := other.flow.(*memFlow).take()[0].p
	if claimed, _ := w.far.flow.arrive(p, nearPath); claimed {
		t.Error("two roots have the same ID")
	}
	// With our ID before what another session has sealed.
	copy(p[1:], w.near.out.epoch.Load().id[:])
	w.far.flow.arrive(p, nearPath)
	// And what this session's other direction has sealed.
	w.far.say(t, "down")
	p = w.far.flow.take()[0].p
	copy(p[1:], w.near.out.epoch.Load().id[:])
	w.far.flow.arrive(p, nearPath)
	if got := w.far.heard(); len(got) > 0 || w.far.Lost()["not_authentic"] != 2 {
		t.Errorf("got %q, lost %v", got, w.far.Lost())
	}
}

// sealedAt makes near's packets for counters.
func sealedAt(t *testing.T, w *pair, counters ...int) (all [][]byte) {
	t.Helper()
	for _, n := range counters {
		w.near.out.epoch.Load().next.Store(uint64(n))
		w.near.say(t, fmt.Sprint(n))
		all = append(all, w.near.flow.take()[0].p)
	}
	return all
}

func TestEachPacketIsOpenedOnce(t *testing.T) {
	const back = replayBits - 1 // how far behind the highest a counter may lie
	for name, c := range map[string]struct{ counters, want []int }{
		"in order":                      {[]int{0, 1, 2}, []int{0, 1, 2}},
		"repeated":                      {[]int{0, 0, 1, 0, 1}, []int{0, 1}},
		"reordered":                     {[]int{3, 1, 2, 0, 3, 2, 1, 0}, []int{3, 1, 2, 0}},
		"the window's last":             {[]int{5000, 5000 - back, 5000 - back}, []int{5000, 5000 - back}},
		"just behind the window":        {[]int{5000, 5000 - back - 1}, []int{5000}},
		"behind a window that moved on": {[]int{10, 10 + back + 1, 10, 11}, []int{10, 10 + back + 1, 11}},
		"a jump over everything":        {[]int{7, epochPackets - 1, 7, epochPackets - 2, 8}, []int{7, epochPackets - 1, epochPackets - 2}},
		"a jump of a window":            {[]int{0, replayBits, 1, 0}, []int{0, replayBits, 1}},
	} {
		t.Run(name, func(t *testing.T) {
			w := newPair(t, wire.AES128GCM, 2*epochPackets)
			w.far.in.limit = epochPackets
			for _, p := range sealedAt(t, w, c.counters...) {
				w.far.flow.arrive(p, nearPath)
			}
			var want []string
			for _, n := range c.want {
				want = append(want, fmt.Sprint(n))
			}
			if got := w.far.heard(); !slices.Equal(got, want) {
				t.Errorf("got %q, want %q", got, want)
			}
			if n := w.far.Lost()["replayed"]; n != uint64(len(c.counters)-len(c.want)) {
				t.Errorf("%d counted as replayed", n)
			}
		})
	}
}

func TestACounterBeyondTheEpochIsNotOpened(t *testing.T) {
	w := newPair(t, wire.AES128GCM, 2*epochPackets)
	w.far.in.limit = epochPackets
	for _, p := range sealedAt(t, w, epochPackets) {
		w.far.flow.arrive(p, nearPath)
	}
	if got := w.far.heard(); len(got) > 0 || w.far.Lost()["not_authentic"] != 1 {
		t.Errorf("got %q, lost %v", got, w.far.Lost())
	}
}

func TestAReplayWindowAgreesWithASet(t *testing.T) {
	var r replay
	seen, highest := map[uint32]bool{}, uint32(0)
	for range 300_000 {
		n := highest + uint32(rand.IntN(4))
		switch rand.IntN(100) {
		case 0:
			n = highest + uint32(rand.IntN(3*replayBits))
		default:
			n -= min(n, uint32(rand.IntN(replayBits+100)))
		}
		fresh := !seen[n] && (n > highest || highest-n < replayBits)
		if got := r.fresh(n); got != fresh {
			t.Fatalf("%d after %d: fresh %v, want %v", n, highest, got, fresh)
		}
		if fresh {
			r.commit(n)
			seen[n], highest = true, max(highest, n)
		}
	}
}

func TestAnEpochFollowsAnother(t *testing.T) {
	const limit = 4
	for name, c := range map[string]struct {
		order []int // near's packets by their place, as they arrive; epochs are 0–3, 4–7, 8–11
		want  []int
		lost  map[string]uint64
	}{
		"in order":                         {[]int{0, 1, 2, 3, 4, 5, 6, 7, 8, 9}, []int{0, 1, 2, 3, 4, 5, 6, 7, 8, 9}, nil},
		"the last of an epoch is lost":     {[]int{0, 1, 2, 4, 5}, []int{0, 1, 2, 4, 5}, nil},
		"the first of an epoch is lost":    {[]int{0, 3, 6, 5}, []int{0, 3, 6, 5}, nil},
		"all of the first epoch is lost":   {[]int{5, 8}, []int{5, 8}, nil},
		"reordered over the boundary":      {[]int{0, 4, 1, 5, 3, 2}, []int{0, 4, 1, 5, 3, 2}, nil},
		"replayed over the boundary":       {[]int{0, 1, 4, 1, 0, 4}, []int{0, 1, 4}, map[string]uint64{"replayed": 3}},
		"two epochs late, its ID is free":  {[]int{0, 4, 8, 1, 5}, []int{0, 4, 8, 5}, nil},
		"an epoch ahead of what is ready":  {[]int{0, 8, 1}, []int{0, 1}, nil},
		"a lost epoch can not be jumped":   {[]int{8, 9}, nil, nil},
		"back in the old epoch, new after": {[]int{4, 3, 7, 8, 6}, []int{4, 3, 7, 8, 6}, nil},
	} {
		t.Run(name, func(t *testing.T) {
			w := newPair(t, wire.ChaCha20Poly1305, limit)
			for i := range 12 {
				w.near.say(t, fmt.Sprint(i))
			}
			sent := w.near.flow.take()
			for _, i := range c.order {
				w.far.flow.arrive(sent[i].p, nearPath)
			}
			var want []string
			for _, i := range c.want {
				want = append(want, fmt.Sprint(i))
			}
			if got := w.far.heard(); !slices.Equal(got, want) {
				t.Errorf("got %q, want %q", got, want)
			}
			if lost := w.far.Lost(); len(lost) != len(c.lost) || lost["replayed"] != c.lost["replayed"] {
				t.Errorf("lost %v, want %v", lost, c.lost)
			}
			if n := len(w.far.flow.claims); n > 3 {
				t.Errorf("%d IDs are claimed", n)
			}
		})
	}
}

func TestAnOldEpochIsOpenedForTwoSeconds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newPair(t, wire.AES128GCM, 3)
		w.near.say(t, "a", "b", "c", "d")
		p := w.near.flow.take()
		w.far.flow.arrive(p[0].p, nearPath)
		w.far.flow.arrive(p[3].p, nearPath)
		time.Sleep(oldEpochLife)
		w.far.flow.arrive(p[1].p, nearPath)
		time.Sleep(time.Millisecond)
		w.far.flow.arrive(p[2].p, nearPath)
		if got := w.far.heard(); !slices.Equal(got, []string{"a", "d", "b"}) || w.far.Lost()["old_epoch"] != 1 {
			t.Errorf("got %q, lost %v", got, w.far.Lost())
		}
		w.far.Tick(time.Now())
		if claimed, _ := w.far.flow.arrive(p[2].p, nearPath); claimed || len(w.far.flow.claims) != 2 {
			t.Errorf("an old epoch's ID is still claimed, one of %d", len(w.far.flow.claims))
		}
	})
}

func TestNoNonceIsUsedTwice(t *testing.T) {
	const limit, senders, each = 100, 8, 2000
	w := newPair(t, wire.AES128GCM, limit)
	var running sync.WaitGroup
	for i := range senders {
		running.Go(func() {
			for n := range each {
				if err := w.near.Send(record(fmt.Sprint(i, n))); err != nil {
					t.Error(err)
				}
			}
		})
	}
	running.Wait()
	// A key is known by its ID, and a nonce by its counter.
	seen, ids := map[string]bool{}, map[string]int{}
	sent := w.near.flow.take()
	for _, p := range sent {
		if seen[string(p.p[1:12])] {
			t.Fatalf("%x is sealed twice", p.p[1:12])
		}
		seen[string(p.p[1:12])] = true
		ids[string(p.p[1:9])]++
	}
	for id, n := range ids {
		if n != limit {
			t.Errorf("epoch %x has sealed %d of %d packets", id, n, limit)
		}
	}
	if len(sent) != senders*each || len(ids) != senders*each/limit {
		t.Errorf("%d packets in %d epochs", len(sent), len(ids))
	}
	// The order of senders at a boundary is no order, but all can be opened.
	slices.SortStableFunc(sent, func(a, b sealedParcel) int {
		return w.epochOf(t, a) - w.epochOf(t, b)
	})
	for _, p := range sent {
		w.far.flow.arrive(p.p, nearPath)
	}
	if got := w.far.heard(); len(got) != len(sent) {
		t.Errorf("%d of %d are opened: %v", len(got), len(sent), w.far.Lost())
	}
}

// epochOf finds the epoch that near has sealed a packet in.
func (w *pair) epochOf(t *testing.T, p sealedParcel) int {
	t.Helper()
	if w.epochs == nil {
		w.epochs = map[[8]byte]int{}
		for n := range w.near.out.epoch.Load().number + 1 {
			k, err := w.near.out.derive(n)
			if err != nil {
				t.Fatal(err)
			}
			w.epochs[k.id] = int(n)
		}
	}
	return w.epochs[[8]byte(p.p[1:9])]
}

func TestTwoReadersMayOpen(t *testing.T) {
	const n = 2000
	w := newPair(t, wire.AES128GCM, 500)
	var mu sync.Mutex
	seen := map[string]int{}
	w.far.Start(func(p []byte) {
		mu.Lock()
		defer mu.Unlock()
		seen[string(p[4:])]++
	}, nil)
	for i := range n {
		w.near.say(t, fmt.Sprint(i))
	}
	sent := w.near.flow.take()
	for at := 0; at < n; at += 500 { // an epoch at a time, so that none is missed
		var running sync.WaitGroup
		for range 2 {
			running.Go(func() {
				for _, p := range sent[at : at+500] {
					w.far.flow.arrive(p.p, nearPath)
				}
			})
		}
		running.Wait()
	}
	for r, times := range seen {
		if times != 1 {
			t.Errorf("%s came %d times", r, times)
		}
	}
	if len(seen) != n {
		t.Errorf("%d of %d came", len(seen), n)
	}
}

func TestSendSaysWhatItCouldNotDo(t *testing.T) {
	w := newPair(t, wire.AES128GCM, epochPackets)
	fail := func(err error) { w.near.flow.fails = func(int) error { return err } }
	if err := w.near.Send(make([]byte, w.near.Max()+1)); err != tunnel.ErrTooLarge {
		t.Errorf("above Max: %v", err)
	}
	fail(tunnel.ErrBlocked)
	if err := w.near.Send(record("x")); err != nil || w.near.Lost()["socket_full"] != 1 {
		t.Errorf("a full socket: %v, %v", err, w.near.Lost())
	}
	ended := errors.New("the flow has ended")
	fail(ended)
	if err := w.near.Send(record("x")); err != ended {
		t.Errorf("an ended flow: %v", err)
	}
	w.near.flow.fails = nil
	w.near.Close()
	if err := w.near.Send(record("x")); err != net.ErrClosed {
		t.Errorf("after Close: %v", err)
	}
}

func TestNothingIsDeliveredBeforeStartAndAfterClose(t *testing.T) {
	w := newPair(t, wire.AES128GCM, epochPackets)
	far := newFlow(nearPath)
	s, err := NewSealed(SealedConfig{Flow: far, Root: testRoot, AEAD: wire.AES128GCM})
	if err != nil {
		t.Fatal(err)
	}
	w.near.say(t, "early", "in time", "late")
	p := w.near.flow.take()
	if _, taken := far.arrive(p[0].p, nearPath); !taken || s.Lost()["not_started"] != 1 {
		t.Errorf("before Start: taken %v, lost %v", taken, s.Lost())
	}
	var got []string
	s.Start(func(p []byte) {
		got = append(got, string(p[4:]))
		s.Close() // legal inside recv
	}, nil)
	recv := far.claims[s.in.cur.id]
	far.arrive(p[1].p, nearPath)
	recv(p[2].p, nearPath) // the flow had looked up the claim before it was released
	s.Tick(time.Now())
	s.Close()
	if !slices.Equal(got, []string{"in time"}) || len(far.claims) != 0 {
		t.Errorf("got %q, %d claims left", got, len(far.claims))
	}
}

func TestSealingAndOpeningCostNoAllocation(t *testing.T) {
	if sealedRace {
		t.Skip("the race detector makes pools forget")
	}
	for _, aead := range bothAEADs {
		near, far := benchPair(t, aead)
		r := record(string(make([]byte, 796)))
		if n := testing.AllocsPerRun(2000, func() {
			if near.Send(r) != nil {
				t.Fatal("not sent")
			}
		}); n != 0 {
			t.Errorf("%s: %v allocations", aead, n)
		}
		if *far < 2000 {
			t.Errorf("%s: only %d packets came", aead, *far)
		}
	}
}

// direct is a flow that hands each packet to its peer at once.
type direct struct {
	*memFlow
	peer func(p []byte)
}

func (d *direct) Send(p []byte, _ tunnel.Path) error { d.peer(p); return nil }

// benchPair returns a near end and the number of records that came to its far end.
func benchPair(t testing.TB, aead string) (*Sealed, *int) {
	n := new(int)
	far := newEnd(t, false, aead, epochPackets, nil)
	far.Start(func([]byte) { *n++ }, nil)
	var recv func([]byte, tunnel.Path) bool
	up := &direct{memFlow: newFlow(farPath)}
	id := [8]byte{}
	up.peer = func(p []byte) {
		if [8]byte(p[1:9]) != id { // another epoch
			id = [8]byte(p[1:9])
			recv = far.flow.claims[id]
		}
		recv(p, nearPath)
	}
	near, err := NewSealed(SealedConfig{Flow: up, Root: testRoot, AEAD: aead, Near: true})
	if err != nil {
		t.Fatal(err)
	}
	return near, n
}

func BenchmarkSealAndOpen800(b *testing.B) {
	for _, aead := range bothAEADs {
		b.Run(aead, func(b *testing.B) {
			near, _ := benchPair(b, aead)
			r := record(string(make([]byte, 796)))
			b.SetBytes(800)
			b.ReportAllocs()
			for b.Loop() {
				near.Send(r)
			}
		})
	}
}
