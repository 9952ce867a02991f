package tunnelquic

import (
	"encoding/binary"
	"errors"
	"io"
	"testing"
	"time"

	"culvert/tunnel"
)

func TestABlockedWayAnnouncesRoom(t *testing.T) {
	s, c, _ := configs(t)
	l := listen(t, Config{TLS: s})
	client, _ := carriers(t, l, dialer(t, c))
	w := client.Datagrams()
	writable := make(chan struct{}, 1)
	w.Start(func([]byte) {}, func() {
		select {
		case writable <- struct{}{}:
		default:
		}
	})
	p := make([]byte, 1000)
	for round := range 20 {
		blocked := false
		for range 1_000_000 { // faster than any congestion window
			if err := w.Send(p); errors.Is(err, tunnel.ErrBlocked) {
				blocked = true
				break
			} else if err != nil {
				t.Fatal(err)
			}
		}
		if !blocked {
			t.Fatal("a million datagrams were taken at once")
		}
		select {
		case <-writable:
		case <-time.After(testPatience):
			t.Fatalf("round %d: blocked, and never writable", round)
		}
	}
}

func TestMaxGrowsWithThePath(t *testing.T) {
	s, c, _ := configs(t)
	l := listen(t, Config{TLS: s})
	client, _ := carriers(t, l, dialer(t, c))
	w := client.Datagrams()
	if m := w.Max(); m < 1150 || m > 1452 {
		t.Fatalf("Max is %d at the start", m)
	}
	// Probes go out with traffic, one per 5 round trips (RFC 8899).
	w.Start(func([]byte) {}, func() {})
	soon(t, "Max reaches the discovered MTU", func() bool {
		w.Send(make([]byte, 100))
		return w.Max() > 1350
	})
	soon(t, "Max stays for a moment", func() bool {
		m := w.Max()
		fits, over := w.Send(make([]byte, m)), w.Send(make([]byte, m+1))
		if w.Max() != m { // the search went on
			return false
		}
		if fits != nil && !errors.Is(fits, tunnel.ErrBlocked) {
			t.Errorf("Send of Max: %v", fits)
		}
		if !errors.Is(over, tunnel.ErrTooLarge) {
			t.Errorf("Send of Max+1: %v", over)
		}
		return true
	})
}

func TestAnEndedWaySaysSo(t *testing.T) {
	s, c, _ := configs(t)
	l := listen(t, Config{TLS: s})
	client, _ := carriers(t, l, dialer(t, c))
	w := client.Datagrams()
	reason := errors.New("over")
	client.Close(reason)
	if err := w.Send([]byte("x")); !errors.Is(err, reason) {
		t.Errorf("Send after Close: %v", err)
	}
	w.Start(func([]byte) {}, func() {}) // must start nothing: the leak check would find it
}

func TestSendAllocatesNothing(t *testing.T) {
	s, c, _ := configs(t)
	l := listen(t, Config{TLS: s})
	client, _ := carriers(t, l, dialer(t, c))
	w := client.Datagrams().(*way) // not started: nobody takes what is sent
	w.Max()
	p := make([]byte, 1000)
	if n := testing.AllocsPerRun(100, func() {
		if err := w.Send(p); err == nil {
			w.free <- <-w.filled
		}
	}); n > 0 {
		t.Errorf("Send allocates %v times", n)
	}
}

// A peer's first datagram may follow the answer at once, before Carrier.
func TestDatagramsBetweenAnswerAndCarrierArrive(t *testing.T) {
	s, c, _ := configs(t)
	l := listen(t, Config{TLS: s})
	cc, sc := connect(t, l, dialer(t, c))
	defer cc.Close()
	defer sc.Close()
	step := func(from, to tunnel.Candidate) {
		t.Helper()
		if _, err := from.Write([]byte("x")); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(to, make([]byte, 1)); err != nil {
			t.Fatal(err)
		}
	}
	step(cc, sc)
	step(sc, cc)
	const sent = 20
	for i := range sent {
		p := binary.BigEndian.AppendUint16(nil, uint16(time.Since(origin).Milliseconds()))
		if err := cc.(*candidate).conn.SendDatagram(append(p, byte(i))); err != nil {
			t.Fatal(err)
		}
	}
	step(cc, sc) // travels behind them: they have arrived
	server, err := sc.Carrier()
	if err != nil {
		t.Fatal(err)
	}
	defer server.Close(nil)
	got := make(chan byte, sent)
	server.Datagrams().Start(func(p []byte) { got <- p[0] }, func() {})
	for i := range sent {
		select {
		case b := <-got:
			if int(b) != i {
				t.Fatalf("datagram %d came as number %d", b, i)
			}
		case <-time.After(testPatience):
			t.Fatalf("%d of %d arrived", i, sent)
		}
	}
}

func TestDatagramsThatQUICHeldForTooLongAreDropped(t *testing.T) {
	s, c, _ := configs(t)
	client, server := carriers(t, listen(t, Config{TLS: s, MaxAge: 10 * time.Second}), dialer(t, c))
	got := make(chan byte, 100)
	server.Datagrams().Start(func(p []byte) { got <- p[0] }, func() {})
	w := client.Datagrams().(*way)
	w.Start(func([]byte) {}, func() {})
	send := func(what byte, age time.Duration) {
		b := <-w.free
		b = binary.BigEndian.AppendUint16(b[:0], uint16((time.Since(origin) - age).Milliseconds()))
		w.filled <- append(b, what)
	}
	send(1, 0)
	if <-got != 1 {
		t.Fatal("the first is not the first")
	}
	send(2, 20*time.Second) // more than any machine stands still
	send(3, 0)
	if what := <-got; what != 3 {
		t.Errorf("datagram %d came, want 3 after what was too old", what)
	}
	if n := server.Datagrams().Lost()["late"]; n != 1 {
		t.Errorf("%d were counted as late, want 1", n)
	}
}

func TestWhatQUICCanNotSendOrReadIsCounted(t *testing.T) {
	s, c, _ := configs(t)
	l := listen(t, Config{TLS: s})
	client, server := carriers(t, l, dialer(t, c))
	server.Datagrams().Start(func([]byte) {}, func() {})
	w := client.Datagrams().(*way)
	w.Start(func([]byte) {}, func() {})
	if err := w.link.conn.SendDatagram(make([]byte, stamp-1)); err != nil {
		t.Fatal(err)
	}
	soon(t, "a datagram without a send time is counted", func() bool { return server.Datagrams().Lost()["malformed"] == 1 })
	// As if the path had become narrower since Send looked.
	w.filled <- append((<-w.free)[:0], make([]byte, maxPacket)...)
	soon(t, "a datagram that is too large is counted", func() bool { return w.Lost()["too_large"] == 1 })
	// Nothing is acknowledged any more: one waits within quic-go until the end.
	kill(l)
	blocked := 0 // looks in a row at which it took nothing
	soon(t, "quic-go takes no more", func() bool {
		err := w.Send(make([]byte, 1000))
		for ; err == nil; err = w.Send(make([]byte, 1000)) {
			blocked = 0
		}
		blocked++
		return errors.Is(err, tunnel.ErrBlocked) && blocked > 20
	})
	client.Close(nil)
	if n := w.Lost()["connection_ended"]; n == 0 {
		t.Error("what quic-go held when the connection ended is not counted")
	}
}
