package media

import (
	"bytes"
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"time"

	"culvert/tunnel"
	"culvert/tunnel/wire"
)

// datagram is a record of n bytes whose content differs by seed.
func datagram(n int, seed uint16) []byte {
	p := make([]byte, n)
	for i := range p {
		p[i] = byte(i*7 + i>>8 + int(seed))
	}
	h := wire.Header{Context: 1 + seed%100, Number: seed}
	copy(p, h.Append(nil))
	return p
}

// pieces cuts a record and reads what came out.
func pieces(t testing.TB, c *Cutter, record []byte, max int) (all []wire.Fragment) {
	t.Helper()
	err := c.Cut(record, max, func(p []byte) error {
		_, _, n, isNotice, err := wire.ParseRecord(p)
		if err != nil || !isNotice || n.Fragment.Count == 0 || len(p) > max {
			t.Fatalf("a piece of %d bytes for a way of %d is no fragment: %v", len(p), max, err)
		}
		n.Fragment.Piece = bytes.Clone(n.Fragment.Piece)
		all = append(all, n.Fragment)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return all
}

func TestWhatIsCutIsJoinedInAnyOrder(t *testing.T) {
	at := time.Now()
	for name, order := range map[string]func([]wire.Fragment){
		"in order":   func([]wire.Fragment) {},
		"reversed":   slices.Reverse[[]wire.Fragment],
		"shuffled":   func(f []wire.Fragment) { rand.Shuffle(len(f), func(i, k int) { f[i], f[k] = f[k], f[i] }) },
		"last first": func(f []wire.Fragment) { f[0], f[len(f)-1] = f[len(f)-1], f[0] },
	} {
		t.Run(name, func(t *testing.T) {
			drops := &Drops{}
			c, j := &Cutter{}, &Joiner{Drops: drops}
			for i, size := range []int{1232, 1233, 2448, 2449, 9000, 65511, maxRecord} {
				want := datagram(size, uint16(i))
				if size <= 1232 {
					var got []byte
					c.Cut(want, 1232, func(p []byte) error { got = p; return nil })
					if !bytes.Equal(got, want) {
						t.Errorf("a record that fits is changed")
					}
					continue
				}
				f := pieces(t, c, want, 1232)
				order(f)
				for k, f := range f[:len(f)-1] {
					if r := j.Take(f, at); r != nil {
						t.Fatalf("a record of %d bytes is complete after %d pieces", size, k+1)
					}
				}
				if got := j.Take(f[len(f)-1], at); !bytes.Equal(got, want) {
					t.Fatalf("a record of %d bytes came out changed, with %d bytes", size, len(got))
				}
			}
			counts := map[string]uint64{}
			if drops.AddTo(counts); len(counts) > 0 || j.held() > 0 {
				t.Errorf("dropped %v, %d bytes held", counts, j.held())
			}
		})
	}
}

func TestACutterRefusesWhatNeedsTooManyPieces(t *testing.T) {
	for name, c := range map[string]struct {
		size, max int
		want      error
	}{
		"255 pieces":                   {255 * 10, wire.FragmentHeader + 10, nil},
		"256 pieces":                   {255*10 + 1, wire.FragmentHeader + 10, tunnel.ErrTooLarge},
		"no room in a piece":           {100, wire.FragmentHeader, tunnel.ErrTooLarge},
		"a way that takes nothing":     {100, 0, tunnel.ErrTooLarge},
		"the longest record":           {maxRecord, 1232, nil},
		"longer than any record":       {maxRecord + 1, 1232, tunnel.ErrTooLarge},
		"longer, on a way that has it": {maxRecord + 1, 1 << 20, nil},
	} {
		t.Run(name, func(t *testing.T) {
			n := 0
			err := new(Cutter).Cut(datagram(c.size, 1), c.max, func([]byte) error { n++; return nil })
			if err != c.want || (n > 0) != (err == nil) {
				t.Errorf("%v after %d pieces; want %v", err, n, c.want)
			}
		})
	}
}

func TestASendThatFailsEndsTheCut(t *testing.T) {
	shut, n := errors.New("shut"), 0
	err := new(Cutter).Cut(datagram(5000, 1), 1000, func([]byte) error {
		if n++; n == 2 {
			return shut
		}
		return nil
	})
	if err != shut || n != 2 {
		t.Errorf("%v after %d pieces", err, n)
	}
}

func TestCuttingDoesNotAllocate(t *testing.T) {
	var c Cutter
	record, n := datagram(60000, 1), 0
	send := func(p []byte) error { n += len(p); return nil }
	c.Cut(record, 1232, send)
	// A collection in between may take the spare buffer: that is no piece's cost.
	if a := testing.AllocsPerRun(1000, func() { c.Cut(record, 1232, send) }); a >= 1 {
		t.Errorf("%v allocations for a record of 50 pieces", a)
	}
}

func piece(id uint16, index, count, size int) wire.Fragment {
	return wire.Fragment{ID: id, Index: uint8(index), Count: uint8(count), Piece: bytes.Repeat([]byte{1 + byte(index)}, size)}
}

func TestBadPiecesAreDroppedAndCounted(t *testing.T) {
	good := []wire.Fragment{piece(1, 0, 3, 10), piece(1, 1, 3, 10), piece(1, 2, 3, 4)}
	for name, c := range map[string]struct {
		in    []wire.Fragment
		drops map[string]uint64
		whole int // records that come out
	}{
		"none":                     {good, nil, 1},
		"a piece twice":            {[]wire.Fragment{good[0], good[0], good[1], good[2]}, map[string]uint64{"duplicate": 1}, 1},
		"the last twice":           {[]wire.Fragment{good[2], good[2], good[1], good[0]}, map[string]uint64{"duplicate": 1}, 1},
		"a straggler":              {append(slices.Clone(good), good...), map[string]uint64{"duplicate": 3}, 1},
		"another count":            {[]wire.Fragment{good[0], piece(1, 1, 4, 10), good[1], good[2]}, map[string]uint64{"fragment_malformed": 1}, 1},
		"a shorter piece":          {[]wire.Fragment{good[0], piece(1, 1, 3, 9), good[1], good[2]}, map[string]uint64{"fragment_malformed": 1}, 1},
		"a longer piece":           {[]wire.Fragment{good[0], piece(1, 1, 3, 11), good[1], good[2]}, map[string]uint64{"fragment_malformed": 1}, 1},
		"a longer last":            {[]wire.Fragment{good[0], piece(1, 2, 3, 11), good[1], good[2]}, map[string]uint64{"fragment_malformed": 1}, 1},
		"shorter than the last":    {[]wire.Fragment{good[2], piece(1, 0, 3, 3), good[0], good[1]}, map[string]uint64{"fragment_malformed": 1}, 1},
		"index out of count":       {[]wire.Fragment{piece(1, 3, 3, 10), piece(2, 200, 3, 10)}, map[string]uint64{"fragment_malformed": 2}, 0},
		"a count of one":           {[]wire.Fragment{piece(1, 0, 1, 10), piece(1, 0, 0, 10)}, map[string]uint64{"fragment_malformed": 2}, 0},
		"an empty piece":           {[]wire.Fragment{piece(1, 0, 2, 0), piece(1, 1, 2, 0)}, map[string]uint64{"fragment_malformed": 2}, 0},
		"more than a record":       {[]wire.Fragment{piece(1, 0, 255, 1200), piece(2, 254, 255, 1200), piece(3, 0, 2, maxRecord)}, map[string]uint64{"fragment_malformed": 3}, 0},
		"a last that is too much":  {[]wire.Fragment{piece(1, 0, 2, maxRecord-10), piece(1, 1, 2, 11)}, map[string]uint64{"fragment_malformed": 1}, 0},
		"more than a last leaves":  {[]wire.Fragment{piece(1, 1, 2, 30000), piece(1, 0, 2, maxRecord-29999)}, map[string]uint64{"fragment_malformed": 1}, 0},
		"a notice, cut":            {[]wire.Fragment{{ID: 1, Index: 0, Count: 2, Piece: []byte{0, 0, 0}}, {ID: 1, Index: 1, Count: 2, Piece: []byte{6, 1}}}, map[string]uint64{"fragment_malformed": 1}, 0},
		"bad ones open no record":  {[]wire.Fragment{piece(1, 0, 255, 1200), good[0], good[1], good[2]}, map[string]uint64{"fragment_malformed": 1}, 1},
		"two records, interleaved": {[]wire.Fragment{good[0], piece(2, 1, 2, 5), good[1], piece(2, 0, 2, 5), good[2]}, nil, 2},
	} {
		t.Run(name, func(t *testing.T) {
			drops := &Drops{}
			j, at, whole := &Joiner{Drops: drops}, time.Now(), 0
			for _, f := range c.in {
				if j.Take(f, at) != nil {
					whole++
				}
			}
			counts := map[string]uint64{}
			drops.AddTo(counts)
			if whole != c.whole || len(counts) != len(c.drops) {
				t.Fatalf("%d records, dropped %v; want %d, %v", whole, counts, c.whole, c.drops)
			}
			for r, n := range c.drops {
				if counts[r] != n {
					t.Errorf("dropped %v; want %v", counts, c.drops)
				}
			}
		})
	}
}

func TestARecordThatDoesNotCompleteIsGivenUpInTime(t *testing.T) {
	drops := &Drops{}
	j, start := &Joiner{Drops: drops}, time.Now()
	j.Take(piece(1, 0, 3, 1000), start)
	j.Take(piece(1, 1, 3, 1000), start.Add(joinLife-1))
	j.Expire(start.Add(joinLife))
	if j.held() == 0 || drops.Get(FragmentLost) != 0 {
		t.Fatal("given up too early")
	}
	j.Expire(start.Add(joinLife + 1))
	if j.held() != 0 || drops.Get(FragmentLost) != 1 {
		t.Fatalf("%d bytes are held, %d counted", j.held(), drops.Get(FragmentLost))
	}
	// What straggles in opens nothing and is not counted again.
	if j.Take(piece(1, 2, 3, 1000), start.Add(joinLife+2)) != nil || j.held() != 0 || drops.Get(FragmentLost) != 1 {
		t.Error("a straggler opened its record again")
	}
	// IDs come round; by then the old record is forgotten.
	later := start.Add(3 * joinLife)
	j.Take(piece(1, 0, 2, 1000), later)
	if j.Take(piece(1, 1, 2, 1000), later) == nil {
		t.Error("the ID can not be used again")
	}
}

func TestClaimsTakeNoMemoryBeyondWhatHasCome(t *testing.T) {
	j := &Joiner{}
	at := time.Now()
	for id := range uint16(1000) {
		j.Take(piece(id, int(id%254), 255, 250), at) // 64 KiB, it says
		if n := j.held(); n > maxJoining*256 {
			t.Fatalf("%d bytes are held for %d pieces of 250", n, id+1)
		}
	}
	if len(j.open) != maxJoining {
		t.Errorf("%d records are open", len(j.open))
	}
}

func TestRecordsInProgressAreBounded(t *testing.T) {
	drops := &Drops{}
	j, at := &Joiner{Drops: drops}, time.Now()
	most := 0
	for id := range uint16(100) { // 64 KiB each, but for the last piece
		for i := range 64 {
			j.Take(piece(id, i, 65, 1000), at)
			most = max(most, j.held())
		}
	}
	if len(j.open) > maxJoining || most > maxJoiningBytes+2*maxRecord {
		t.Errorf("%d records, at most %d bytes", len(j.open), most)
	}
	if n := int(drops.Get(FragmentLost)) + len(j.open); n != 100 {
		t.Errorf("%d of 100 records are accounted for", n)
	}
	if j.Take(piece(99, 64, 65, 1), at) == nil {
		t.Error("the youngest record did not live")
	}
}

func TestLossCostsOnlyTheRecordThatLostAPiece(t *testing.T) {
	drops := &Drops{}
	c, j, at := &Cutter{}, &Joiner{Drops: drops}, time.Now()
	want, got := 0, 0
	for i := range 1000 {
		lost := i%10 == 3
		record := datagram(4000, uint16(i))
		for k, f := range pieces(t, c, record, 1000) {
			if lost && k == i%4 {
				continue
			}
			if r := j.Take(f, at); r != nil {
				got++
				if !bytes.Equal(r, record) {
					t.Fatal("a record came out changed")
				}
			}
		}
		if !lost {
			want++
		}
		at = at.Add(10 * time.Millisecond)
	}
	j.Expire(at.Add(time.Minute))
	if got != want || int(drops.Get(FragmentLost)) != 1000-want {
		t.Errorf("%d of %d came, %d counted", got, want, drops.Get(FragmentLost))
	}
}

func TestCutterAndJoinerServeManyAtOnce(t *testing.T) {
	c, j, at := &Cutter{}, &Joiner{}, time.Now()
	var wg sync.WaitGroup
	var mu sync.Mutex
	got := map[uint16]int{}
	for worker := range uint16(8) { // no more at a time than a Joiner has open
		wg.Go(func() {
			for i := range uint16(100) {
				n := worker<<8 | i
				c.Cut(datagram(5000, n), 1000, func(p []byte) error {
					_, _, f, _, _ := wire.ParseRecord(p)
					if r := j.Take(f.Fragment, at); r != nil {
						mu.Lock()
						defer mu.Unlock()
						if !bytes.Equal(r, datagram(5000, binary.BigEndian.Uint16(r[2:]))) {
							t.Error("a record came out changed")
						}
						got[binary.BigEndian.Uint16(r[2:])]++
					}
					return nil
				})
			}
		})
	}
	wg.Wait()
	if len(got) != 800 {
		t.Errorf("%d of 800 records came", len(got))
	}
}

// FuzzJoiner reads its input as pieces with small IDs, between which time goes
// on. The bounds must hold, and what comes out must be what went in.
func FuzzJoiner(f *testing.F) {
	f.Add([]byte{0, 0, 2, 0, 9, 0, 1, 2, 0, 9})                // one record
	f.Add([]byte{0, 0, 3, 0, 9, 0, 2, 3, 0, 9, 0, 1, 3, 0, 8}) // one piece too short
	f.Add([]byte{1, 0, 255, 4, 0, 1, 254, 255, 255, 255})      // claims of 64 KiB
	f.Add([]byte{0, 0, 2, 0, 9, 240, 1, 2, 0, 9})              // too late
	f.Fuzz(func(t *testing.T, b []byte) {
		drops := &Drops{}
		j, at := &Joiner{Drops: drops}, time.Unix(0, 0)
		for ; len(b) >= 5; b = b[5:] {
			at = at.Add(time.Duration(b[0]>>5) * 100 * time.Millisecond)
			in := wire.Fragment{ID: uint16(b[0] & 31), Index: b[1], Count: b[2], Piece: bytes.Repeat(b[1:2], int(binary.BigEndian.Uint16(b[3:])))}
			record := j.Take(in, at)
			if len(record) > maxRecord || len(j.open) > maxJoining || j.held() > maxJoiningBytes+2*maxRecord+1<<16 {
				t.Fatalf("%d bytes came out, %d records and %d bytes are held", len(record), len(j.open), j.held())
			}
			// Each piece is made of its own index: so the record never goes back.
			if record != nil && (!slices.IsSorted(record) || record[len(record)-1] != in.Count-1) {
				t.Fatal("pieces came out in another order than that of their indices")
			}
		}
		j.Expire(at.Add(time.Minute))
		if len(j.open) > 0 {
			t.Fatal("records outlive their time")
		}
	})
}

// FuzzCut cuts any record for any way and joins it in a shuffled order.
func FuzzCut(f *testing.F) {
	f.Add(uint16(5000), uint16(1232), uint64(1))
	f.Add(uint16(65535), uint16(266), uint64(2))
	f.Add(uint16(10), uint16(9), uint64(3))
	f.Fuzz(func(t *testing.T, size, max uint16, seed uint64) {
		record := datagram(int(size)+wire.ShortHeader, uint16(seed))
		var all []wire.Fragment
		err := new(Cutter).Cut(record, int(max), func(p []byte) error {
			if len(p) > int(max) {
				t.Fatal("a piece is too long")
			}
			if _, _, n, isNotice, _ := wire.ParseRecord(p); isNotice {
				n.Fragment.Piece = bytes.Clone(n.Fragment.Piece)
				all = append(all, n.Fragment)
			}
			return nil
		})
		if err != nil || all == nil {
			return
		}
		r := rand.New(rand.NewPCG(seed, seed))
		r.Shuffle(len(all), func(i, k int) { all[i], all[k] = all[k], all[i] })
		var j Joiner
		var got []byte
		for _, f := range all {
			if p := j.Take(f, time.Unix(0, 0)); p != nil {
				got = p
			}
		}
		if !bytes.Equal(got, record) {
			t.Fatalf("%d bytes became %d", len(record), len(got))
		}
	})
}

func BenchmarkCutAndJoin(b *testing.B) {
	var c Cutter
	var j Joiner
	record, at := datagram(60000, 1), time.Now()
	b.SetBytes(int64(len(record)))
	b.ReportAllocs()
	for range b.N {
		c.Cut(record, 1232, func(p []byte) error {
			_, _, n, _, _ := wire.ParseRecord(p)
			j.Take(n.Fragment, at)
			return nil
		})
	}
}
