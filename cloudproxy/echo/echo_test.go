package echo

import (
	"bytes"
	"context"
	"errors"
	"net"
	"net/netip"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"

	"culvert/tunnel"
	"culvert/tunnel/wire"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// next is the stage behind; it notes what comes to it.
type next struct {
	sent []tunnel.Target
	recv tunnel.Receiver
}

func (n *next) OpenStream(context.Context, tunnel.Peer, tunnel.Target) (tunnel.Stream, error) {
	return nil, tunnel.ConnectionRefused
}

func (n *next) OpenPackets(_ tunnel.Peer, r tunnel.Receiver) (tunnel.Packets, error) {
	n.recv = r
	return n, nil
}

func (n *next) Send(_ []byte, to tunnel.Target) error { n.sent = append(n.sent, to); return nil }
func (n *next) Flush()                                {}
func (n *next) Close() error                          { return nil }

// near is the sidecar's side.
type near struct {
	got     [][]byte
	from    []netip.AddrPort
	refused []error
	ended   bool
	deliver func()
}

func (n *near) Deliver(p []byte, from netip.AddrPort) {
	n.got, n.from = append(n.got, bytes.Clone(p)), append(n.from, from)
	if n.deliver != nil {
		n.deliver()
	}
}
func (n *near) Unreachable(_ netip.AddrPort, err error) { n.refused = append(n.refused, err) }
func (n *near) Closed(error)                            { n.ended = true }

func open(t *testing.T, on func() error) (tunnel.Packets, *near, *next) {
	t.Helper()
	to, from := &next{}, &near{}
	p, err := New(to, on).OpenPackets(tunnel.Peer{}, from)
	if err != nil {
		t.Fatal(err)
	}
	return p, from, to
}

func yes() error { return nil }

func TestAnAnswerIsAsLongAsItsQuestionAndStamped(t *testing.T) {
	p, from, to := open(t, yes)
	question := bytes.Repeat([]byte{0xab}, 100)
	for range 3 {
		if err := p.Send(question, wire.Echo); err != nil {
			t.Fatal(err)
		}
	}
	if len(from.got) != 3 || len(to.sent) != 0 || !bytes.Equal(question, bytes.Repeat([]byte{0xab}, 100)) {
		t.Fatalf("%d answers, %v passed on", len(from.got), to.sent)
	}
	for i, a := range from.got {
		if len(a) != len(question) || from.from[i] != wire.EchoFrom || wire.ReadEchoStamp(a).Count != uint32(i+1) {
			t.Errorf("answer %d: %d bytes from %v, %+v", i, len(a), from.from[i], wire.ReadEchoStamp(a))
		}
		if !bytes.Equal(a[:wire.EchoStampAt], question[:wire.EchoStampAt]) || !bytes.Equal(a[wire.EchoMin:], question[wire.EchoMin:]) {
			t.Error("more than the stamp was changed")
		}
	}
	if err := p.Send(question[:wire.EchoMin-1], wire.Echo); err != nil || len(from.got) != 3 {
		t.Errorf("one that is too short: %v, %d answers", err, len(from.got))
	}
}

func TestWhatIsNotForTheEchoGoesOn(t *testing.T) {
	p, from, to := open(t, yes)
	for _, at := range []tunnel.Target{
		{Host: "example.com", Port: 7}, tunnel.TargetOf(wire.EchoFrom), {Host: wire.Echo.Host, Port: 8}, {Host: "x." + wire.Echo.Host, Port: 7},
	} {
		p.Send(make([]byte, 100), at)
	}
	if len(to.sent) != 4 || len(from.got) != 0 {
		t.Errorf("passed on %v, echoed %d", to.sent, len(from.got))
	}
}

func TestAnEchoThatIsForbiddenIsRefusedOnceASecond(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p, from, _ := open(t, func() error { return tunnel.PolicyDenied })
		for range 30 {
			if err := p.Send(make([]byte, 100), wire.Echo); !errors.Is(err, tunnel.PolicyDenied) {
				t.Fatal(err)
			}
			time.Sleep(100 * time.Millisecond)
		}
		if len(from.got) != 0 || len(from.refused) != 3 {
			t.Errorf("%d answers, %d refusals in 3 s", len(from.got), len(from.refused))
		}
	})
}

func TestASessionHasAnAllowance(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p, from, _ := open(t, yes)
		question := make([]byte, 1000)
		send := func(n int, every time.Duration) int {
			before := len(from.got)
			for range n {
				p.Send(question, wire.Echo)
				time.Sleep(every)
			}
			return len(from.got) - before
		}
		if n := send(1500, 8*time.Millisecond); n != 1500 {
			t.Errorf("of a test call's 1,500 datagrams %d were echoed", n)
		}
		if n := send(10_000, time.Millisecond); n > 5200 || n < 4800 {
			t.Errorf("of 10 s of 8 Mbit/s %d datagrams were echoed, want 4 Mbit/s", n)
		}
		send(30_000, 2*time.Millisecond)
		if n := send(10_000, 2*time.Millisecond); n > 1100 {
			t.Errorf("after the allowance 20 s had %d echoed, want 400 kbit/s", n)
		}
	})
}

func TestNothingComesAfterTheEnd(t *testing.T) {
	p, from, _ := open(t, yes)
	from.deliver = func() { p.Close() } // legal inside Deliver
	p.Send(make([]byte, 100), wire.Echo)
	if err := p.Send(make([]byte, 100), wire.Echo); !errors.Is(err, net.ErrClosed) || len(from.got) != 1 {
		t.Errorf("after Close: %v, %d answers", err, len(from.got))
	}
	p, from, to := open(t, yes)
	to.recv.Closed(nil)
	if err := p.Send(make([]byte, 100), wire.Echo); !errors.Is(err, net.ErrClosed) || len(from.got) != 0 || !from.ended {
		t.Errorf("after Closed: %v, %d answers", err, len(from.got))
	}
}
