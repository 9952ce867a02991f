package tunneltls

import (
	"bytes"
	"encoding/binary"
	"errors"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"culvert/tunnel"
)

// half makes a lane whose peer is the bare TLS connection, so that a test can
// write the bytes that it wants to.
func half(t *testing.T, change func(*Config)) (lane tunnel.Lane, peer tunnel.Candidate) {
	t.Helper()
	client, server := both(t)
	if change != nil {
		change(&server)
	}
	cc, sc := meet(t, dialer(t, client), listen(t, server))
	t.Cleanup(func() { cc.Close() })
	l, err := sc.Lane()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close(nil) })
	return l, cc
}

func ignore([]byte) {}
func nothing()      {}

func TestLaneDropsWhatIsTooOldOnArrival(t *testing.T) {
	l, peer := half(t, func(c *Config) { c.MaxAge = 20 * time.Second })
	got := make(chan string, 10)
	l.Start(func(p []byte) { got <- string(p) }, nothing)
	// All arrive together; what they say of their send time differs.
	var b []byte
	b = appendRecord(b, 40_000, []byte("base"))
	b = appendRecord(b, 10_000, []byte("30 s late"))
	b = appendRecord(b, 25_000, []byte("15 s late"))
	b = appendRecord(b, 41_000, []byte("new base"))
	b = appendRecord(b, 20_500, []byte("20.5 s late"))
	b = appendRecord(b, 41_000, []byte("end"))
	if _, err := peer.Write(b); err != nil {
		t.Fatal(err)
	}
	var all []string
	for len(all) == 0 || all[len(all)-1] != "end" {
		all = append(all, receive(t, "a datagram", got))
	}
	if want := []string{"base", "15 s late", "new base", "end"}; !slices.Equal(all, want) {
		t.Errorf("delivered %q; want %q", all, want)
	}
	if late := l.Lost()["late"]; late != 2 {
		t.Errorf("%d counted as late; want 2", late)
	}
}

func TestLaneReadsRecordsByteByByteAndLargerThanItsBuffer(t *testing.T) {
	l, peer := half(t, nil)
	got := make(chan []byte, 10)
	l.Start(func(p []byte) { got <- bytes.Clone(p) }, nothing)
	for _, b := range appendRecord(nil, 1, []byte("slow")) {
		if _, err := peer.Write([]byte{b}); err != nil {
			t.Fatal(err)
		}
	}
	if p := receive(t, "a datagram", got); string(p) != "slow" {
		t.Errorf("got %q", p)
	}
	large := bytes.Repeat([]byte("0123456789abcde"), maxDatagram/15)
	for range 3 {
		if _, err := peer.Write(appendRecord(nil, 2, large)); err != nil {
			t.Fatal(err)
		}
		if p := receive(t, "a large datagram", got); !bytes.Equal(p, large) {
			t.Fatalf("a datagram of %d bytes arrived changed, as %d bytes", len(large), len(p))
		}
	}
}

func TestMalformedRecordEndsALane(t *testing.T) {
	l, peer := half(t, nil)
	l.Start(ignore, nothing)
	peer.Write([]byte{0, 1, 0, 0})
	receive(t, "the lane's end", l.Done())
	if !errors.Is(l.Err(), errRecord) {
		t.Error(l.Err())
	}
	if err := l.Send([]byte("x")); !errors.Is(err, errRecord) {
		t.Error("Send on a lane that has ended:", err)
	}
}

// A peer that reads nothing: first ErrBlocked after a bounded number of bytes,
// then, after WriteTimeout, the end. Close does not wait for the peer either.
func TestStuckLaneBlocksThenEnds(t *testing.T) {
	l, _ := half(t, func(c *Config) { c.WriteTimeout = 300 * time.Millisecond })
	writable := make(chan struct{}, 1000)
	l.Start(ignore, func() { writable <- struct{}{} })
	p := make([]byte, 1000)
	for {
		err := l.Send(p)
		if err == nil {
			continue
		}
		if !errors.Is(err, tunnel.ErrBlocked) {
			break // it was given up while blocked
		}
		select {
		case <-writable:
		case <-l.Done():
		}
	}
	receive(t, "the lane's end", l.Done())
	if !errors.Is(l.Err(), tunnel.CloudUnreachable) {
		t.Error(l.Err())
	}
}

func TestWritableIsCalledOnceForEachBlock(t *testing.T) {
	client, server := both(t)
	cc, sc := meet(t, dialer(t, client), listen(t, server))
	near, err := cc.Lane()
	if err != nil {
		t.Fatal(err)
	}
	defer near.Close(nil)
	far, err := sc.Lane()
	if err != nil {
		t.Fatal(err)
	}
	defer far.Close(nil)
	var calls, blocks atomic.Int64
	called := make(chan struct{}, 1)
	near.Start(ignore, func() {
		calls.Add(1)
		select {
		case called <- struct{}{}:
		default:
		}
	})
	var last atomic.Uint64
	far.Start(func(p []byte) { last.Store(binary.BigEndian.Uint64(p)) }, nothing)
	p := make([]byte, 1200)
	const sent = 20_000
	for i := uint64(1); i <= sent; {
		binary.BigEndian.PutUint64(p, i)
		switch err := near.Send(p); {
		case err == nil:
			i++
		case errors.Is(err, tunnel.ErrBlocked):
			near.Send(p) // asking again does not make it called again
			blocks.Add(1)
			receive(t, "writable", called)
		default:
			t.Fatal(err)
		}
	}
	soon(t, "the last datagram arrived", func() bool { return last.Load() >= sent })
	if blocks.Load() == 0 {
		t.Skip("the lane never was full on this machine")
	}
	// The second Send may find room, and be a duplicate: then nothing is owed for it.
	if c, b := calls.Load(), blocks.Load(); c > b {
		t.Errorf("writable was called %d times for %d blocks", c, b)
	}
}

func TestSendDoesNotAllocate(t *testing.T) {
	client, server := both(t)
	cc, sc := meet(t, dialer(t, client), listen(t, server))
	near, err := cc.Lane()
	if err != nil {
		t.Fatal(err)
	}
	defer near.Close(nil)
	far, err := sc.Lane()
	if err != nil {
		t.Fatal(err)
	}
	defer far.Close(nil)
	near.Start(ignore, nothing)
	far.Start(ignore, nothing)
	p := make([]byte, 1000)
	if n := testing.AllocsPerRun(5000, func() { near.Send(p) }); n >= 1 {
		t.Errorf("%v allocations for a datagram, both ends together", n)
	}
}

func TestLaneClosedBeforeStartLeavesNothing(t *testing.T) {
	l, _ := half(t, nil)
	reason := errors.New("not needed")
	l.Close(reason)
	l.Start(ignore, nothing)
	if err := l.Send([]byte("x")); !errors.Is(err, reason) {
		t.Error(err)
	}
}

// What a lane has sent and the kernel does not confirm is offered to others,
// and a copy on another lane has the age of the original.
func TestAnOverdueDatagramKeepsItsSendTimeOnAnotherLane(t *testing.T) {
	stuck, _ := half(t, nil)
	w := stuck.(*lane)
	if !w.keeps {
		t.Skip("this kernel tells nothing")
	}
	w.kernel = func() (progress, bool) {
		return progress{flying: 1, sacked: int(time.Since(origin)), trip: time.Millisecond}, true // it lives
	}
	w.maxAge = time.Hour // however slow this machine is
	w.kept.spare = maxSpare
	stuck.Start(ignore, nothing)
	before := time.Now()
	if err := stuck.Send([]byte("held up")); err != nil {
		t.Fatal(err)
	}
	after := time.Now()
	other, peer := half(t, nil)
	other.Start(ignore, nothing)
	soon(t, "it is overdue", func() bool {
		sent := false
		w.Overdue(func(p []byte, since time.Time) bool {
			sent = true
			return other.(*lane).Resend(p, since) == nil
		})
		return sent
	})
	b := make([]byte, recordHeader+len("held up"))
	for have := 0; have < len(b); {
		n, err := peer.Read(b[have:])
		if err != nil {
			t.Fatal(err)
		}
		have += n
	}
	at, p, _, err := nextRecord(b)
	if err != nil || string(p) != "held up" {
		t.Fatalf("%q, %v", p, err)
	}
	first, last := uint16(before.Sub(origin).Milliseconds()), uint16(after.Sub(origin).Milliseconds())
	if at-first > last-first {
		t.Errorf("the copy says %d; it was sent between %d and %d", at, first, last)
	}
	if w.Overdue(func([]byte, time.Time) bool { t.Error("it is offered again"); return true }); len(other.(*lane).kept.recs) > 0 {
		t.Error("a copy is kept to be copied")
	}
}
