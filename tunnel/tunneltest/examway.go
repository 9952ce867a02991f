package tunneltest

import (
	"bytes"
	"errors"
	"fmt"
	"testing"
	"time"

	"go.uber.org/goleak"

	"culvert/tunnel"
)

// receiver collects what arrives on a way. p is copied, since it is borrowed.
type receiver struct {
	got      chan []byte
	writable chan struct{}
}

func start(w tunnel.Way) *receiver {
	r := &receiver{got: make(chan []byte, 1<<16), writable: make(chan struct{}, 1)}
	w.Start(func(p []byte) {
		got := bytes.Clone(p)
		clear(p) // p is ours until we return: nobody may need it afterwards
		select {
		case r.got <- got:
		default: // recv must not block
		}
	}, func() {
		select {
		case r.writable <- struct{}{}:
		default:
		}
	})
	return r
}

// send offers p until the way takes it, waiting for writable when it is blocked.
func (r *receiver) send(t *testing.T, w tunnel.Way, p []byte) {
	t.Helper()
	end := time.Now().Add(patience)
	for {
		err := w.Send(p)
		if err == nil {
			return
		}
		if !errors.Is(err, tunnel.ErrBlocked) {
			t.Fatalf("Send of %d bytes: %v", len(p), err)
		}
		select {
		case <-r.writable:
		case <-time.After(time.Until(end)):
			t.Fatalf("blocked, and writable was not called within %v", patience)
		}
	}
}

func examWay(t *testing.T, what string, make2 func(t *testing.T) (a, b tunnel.Way)) {
	for _, q := range []struct {
		name string
		ask  func(t *testing.T, a, b tunnel.Way)
	}{
		{"datagrams of every size pass both ways", examSizes},
		{"datagrams larger than Max are refused or counted", examTooLarge},
		{"send borrows its buffer", examSendBorrows},
		{"send never blocks and writable follows", examNeverBlocks},
	} {
		t.Run(what+": "+q.name, func(t *testing.T) {
			a, b := make2(t)
			if a.Name() == "" || a.Name() != b.Name() {
				t.Errorf("names are %q and %q", a.Name(), b.Name())
			}
			q.ask(t, a, b)
		})
	}
}

// arrives sends p until a datagram equal to it has come: a way may lose some.
func arrives(t *testing.T, from *receiver, w tunnel.Way, to *receiver, p []byte) {
	t.Helper()
	end := time.After(patience)
	for {
		from.send(t, w, p)
		again := time.After(200 * time.Millisecond)
		for waiting := true; waiting; {
			select {
			case got := <-to.got:
				if bytes.Equal(got, p) {
					return
				}
				if len(got) == len(p) {
					t.Fatalf("a datagram of %d bytes arrived changed", len(p))
				}
			case <-again:
				waiting = false
			case <-end:
				t.Fatalf("a datagram of %d bytes did not arrive; lost: %v", len(p), w.Lost())
			}
		}
	}
}

func examSizes(t *testing.T, a, b tunnel.Way) {
	ra, rb := start(a), start(b)
	for _, dir := range []struct {
		w        tunnel.Way
		from, to *receiver
	}{{a, ra, rb}, {b, rb, ra}} {
		if dir.w.Max() < 1000 {
			t.Fatalf("Max is %d", dir.w.Max())
		}
		for _, n := range []int{1, 0, 2, 100, 999, dir.w.Max()} {
			arrives(t, dir.from, dir.w, dir.to, noise(uint64(2000+n), n))
		}
	}
	// What has been learnt of the path since must not have made Max a lie. What
	// arrives late of the first round has the same bytes at the same size.
	for len(rb.got) > 0 {
		<-rb.got
	}
	n := a.Max()
	arrives(t, ra, a, rb, noise(uint64(2000+n), n))
}

func examTooLarge(t *testing.T, a, b tunnel.Way) {
	ra, rb := start(a), start(b)
	arrives(t, ra, a, rb, []byte("warm"))
	for _, n := range []int{1 << 16, 1 << 17} {
		if err := a.Send(make([]byte, n)); !errors.Is(err, tunnel.ErrTooLarge) {
			t.Errorf("Send of %d bytes: %v; want ErrTooLarge", n, err)
		}
	}
	// Max may grow at any moment, so that Max+1 may also be taken and arrive;
	// then it is whole, or counted.
	n := a.Max() + 1
	before := total(a.Lost())
	switch err := a.Send(noise(3000, n)); {
	case errors.Is(err, tunnel.ErrTooLarge):
	case err != nil:
		t.Errorf("Send of Max+1 bytes: %v", err)
	default:
		end := time.Now().Add(patience)
		for total(a.Lost()) == before {
			select {
			case got := <-rb.got:
				if bytes.Equal(got, noise(3000, n)) {
					before--
				}
			case <-time.After(20 * time.Millisecond):
			}
			if time.Now().After(end) {
				t.Fatal("a datagram of Max+1 bytes neither arrived nor was counted as lost")
			}
		}
	}
	arrives(t, ra, a, rb, []byte("the way lives on"))
}

func total(lost map[string]uint64) (n uint64) {
	for _, m := range lost {
		n += m
	}
	return n
}

func examSendBorrows(t *testing.T, a, b tunnel.Way) {
	ra, rb := start(a), start(b)
	p := make([]byte, 700)
	const sent = 40
	for i := range sent {
		for k := range p {
			p[k] = byte(i)
		}
		ra.send(t, a, p)
		clear(p)
	}
	end := time.After(patience)
	for {
		ra.send(t, a, []byte("end"))
		select {
		case got := <-rb.got:
			if string(got) == "end" {
				return
			}
			if len(got) != len(p) || !bytes.Equal(got, bytes.Repeat(got[:1], len(p))) {
				t.Fatal("a datagram's buffer was kept after Send had returned")
			}
		case <-time.After(200 * time.Millisecond):
		case <-end:
			t.Fatal("nothing arrived")
		}
	}
}

func examNeverBlocks(t *testing.T, a, b tunnel.Way) {
	// The peer has not started, so nobody receives.
	ra := start(a)
	p := noise(4000, 1000)
	wasBlocked := false
	flood := begin(func() error {
		for range 20_000 {
			err := a.Send(p)
			if errors.Is(err, tunnel.ErrBlocked) {
				wasBlocked = true
				return nil
			}
			if err != nil {
				return fmt.Errorf("Send: %w", err)
			}
		}
		return nil
	})
	if err := wait(t, "20,000 Sends to a peer that does not receive", flood); err != nil {
		t.Fatal(err)
	}
	rb := start(b)
	if wasBlocked {
		select {
		case <-ra.writable:
		case <-time.After(patience):
			t.Fatal("a Send was refused with ErrBlocked; writable was never called")
		}
	}
	arrives(t, ra, a, rb, []byte("flowing again"))
}

func examLaneClose(t *testing.T, s Setup) {
	before := goleak.IgnoreCurrent()
	near, far := lanes(t, s)
	rn, rf := start(near), start(far)
	arrives(t, rn, near, rf, []byte("x"))
	reason := errors.New("the exam is over")
	if err := wait(t, "Close", begin(func() error { return near.Close(reason) })); err != nil {
		t.Error("Close:", err)
	}
	for name, end := range map[string]tunnel.Lane{"closed": near, "other": far} {
		select {
		case <-end.Done():
		case <-time.After(patience):
			t.Fatalf("the %s end's Done stays open", name)
		}
		if end.Err() == nil {
			t.Errorf("the %s end's Err is nil", name)
		}
		if err := end.Send([]byte("x")); err == nil || errors.Is(err, tunnel.ErrBlocked) || errors.Is(err, tunnel.ErrTooLarge) {
			t.Errorf("Send at the %s end: %v; want an error that says that the lane has ended", name, err)
		}
	}
	if !errors.Is(near.Err(), reason) {
		t.Errorf("Err is %v; want the reason that Close was given", near.Err())
	}
	far.Close(nil)
	near.Close(nil)
	nothingRuns(t, before)
}
