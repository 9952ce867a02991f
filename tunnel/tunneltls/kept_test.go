package tunneltls

import (
	"bytes"
	"fmt"
	"slices"
	"testing"
	"time"
)

// offered runs overdue and returns what it offers; the first n are accepted.
func offered(k *kept, due, limit time.Time, n int) (all []string, late bool) {
	late = k.overdue(due, limit, func(p []byte, _ time.Time) bool {
		all = append(all, string(p))
		return len(all) <= n
	})
	return all, late
}

func TestWhatIsKeptIsOfferedUntilItIsAcceptedOrAcknowledged(t *testing.T) {
	start := time.Now()
	at := func(ms int) time.Time { return start.Add(time.Duration(ms) * time.Millisecond) }
	k := &kept{spare: maxSpare}
	for i := range 5 {
		k.push(fmt.Appendf(nil, "datagram %d", i), at(10*i))
	}
	expect := func(what string, due, limit, accept int, late bool, want ...string) {
		t.Helper()
		if got, isLate := offered(k, at(due), at(limit), accept); !slices.Equal(got, want) || isLate != late {
			t.Errorf("%s: offered %q, late %v; want %q, %v", what, got, isLate, want, late)
		}
	}
	expect("not written yet", 100, -1, 9, false)
	k.wrote(4, 400)
	expect("all too young", -1, -1, 9, false)
	expect("one is due, none takes it", 5, -1, 0, true, "datagram 0")
	expect("once more", 5, -1, 1, true, "datagram 0")
	expect("accepted already", 5, -1, 9, true)
	expect("some are too old to be of use", 100, 15, 9, true, "datagram 2", "datagram 3")
	k.acked(399)
	expect("the written ones came together", 100, -1, 9, true, "datagram 1")
	k.acked(400)
	expect("all that was written has arrived", 100, -1, 9, false)
	k.wrote(5, 500)
	expect("the last", 100, -1, 9, true, "datagram 4")
	k.acked(1000)
	expect("nothing is left", 100, -1, 9, false)
}

func TestAQuarterOfTheBytesMayGoAgain(t *testing.T) {
	k, now := &kept{}, time.Now()
	p := make([]byte, 1000)
	again := 0
	for i := range 1000 {
		k.push(p, now)
		k.wrote(uint64(i+1), uint64(i+1)*1000)
		all, _ := offered(k, now, now, 9)
		again += len(all)
	}
	if again != 250 {
		t.Errorf("%d of 1000 went again", again)
	}
	k.acked(1000 * 1000)
	for range 1000 {
		k.push(p, now)
	}
	k.wrote(2000, 2000*1000)
	if all, _ := offered(k, now, now, 1000); len(all) != maxSpare/len(p) {
		t.Errorf("%d went at once; want %d", len(all), maxSpare/len(p))
	}
}

func TestWhatIsKeptIsBounded(t *testing.T) {
	k, now := &kept{}, time.Now()
	k.push(make([]byte, maxKept+1), now) // is not kept
	for i := range 3000 {
		k.push(bytes.Repeat([]byte{byte(i)}, 1+i), now)
		if live := len(k.buf) - k.recs[k.head].at; live > maxKept || cap(k.buf) > 4*maxKept {
			t.Fatalf("%d bytes are kept in %d", live, cap(k.buf))
		}
	}
	k.wrote(k.last, 1)
	all, _ := offered(k, now, now, 1000)
	if len(all) < maxKept/3000 {
		t.Errorf("%d datagrams are kept", len(all))
	}
	for _, p := range all {
		if p[0] != byte(len(p)-1) || p[0] != p[len(p)-1] {
			t.Fatalf("a datagram of %d bytes has changed", len(p))
		}
	}
	k.free()
	if cap(k.buf) != 0 || k.last != 3001 {
		t.Errorf("after free: %d bytes, last %d", cap(k.buf), k.last)
	}
}
