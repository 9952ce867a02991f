package egress

import (
	"errors"
	"net"
	"net/netip"
	"syscall"
	"testing"
	"time"

	"culvert/tunnel"
)

// echo answers each datagram until the connection is closed.
func echo(c *net.UDPConn) {
	b := make([]byte, 2048)
	for {
		n, from, err := c.ReadFromUDPAddrPort(b)
		if err != nil {
			return
		}
		c.WriteToUDPAddrPort(b[:n], from)
	}
}

// pingPong returns a function that sends one datagram and waits for its echo.
func pingPong(t testing.TB) func() {
	e := newEgress(t, Config{})
	c, to := listen(t, "127.0.0.1:0")
	c.SetDeadline(time.Time{})
	go echo(c)
	r, back := newReceiver(), make(chan struct{}, 1)
	r.deliver = func([]byte, netip.AddrPort) { back <- struct{}{} }
	p, err := NewResolve(e, ResolveConfig{}).OpenPackets(tunnel.Peer{}, r)
	if err != nil {
		t.Fatal(err)
	}
	data, target := make([]byte, 1200), tunnel.TargetOf(to)
	return func() {
		if err := p.Send(data, target); err != nil {
			t.Fatal(err)
		}
		<-back
	}
}

func TestADatagramAllocatesNothing(t *testing.T) {
	if raceEnabled {
		t.Skip("the race detector makes sync.Pool drop at random")
	}
	trip := pingPong(t)
	for range 100 {
		trip()
	}
	if n := testing.AllocsPerRun(2000, trip); n != 0 {
		t.Errorf("%v allocations for one datagram there and back", n)
	}
}

// Loopback frees the send buffer at once, so what a full one answers is given here.
func TestWhatTheKernelSaysToADatagram(t *testing.T) {
	to := netip.MustParseAddrPort("192.0.2.1:9")
	for errno, want := range map[error]struct {
		err     error // of Send
		dropped string
		told    tunnel.Code // by Unreachable
	}{
		tunnel.ErrBlocked:   {nil, dropFull, ""},
		syscall.ENOBUFS:     {nil, dropFull, ""},
		syscall.ENOMEM:      {nil, dropFull, ""},
		tunnel.ErrTooLarge:  {tunnel.ErrTooLarge, "", ""},
		syscall.ENETUNREACH: {tunnel.NetworkUnreachable, dropError, ""},
		syscall.EPERM:       {nil, dropError, tunnel.NotPermitted},
	} {
		e := newEgress(t, Config{})
		p, r := associate(t, e, tunnel.Peer{})
		if err := p.(*association).outcome(to, errno); !errors.Is(err, want.err) {
			t.Errorf("%v: Send returns %v, want %v", errno, err, want.err)
		}
		dropped := e.Stats().Dropped
		if want.dropped != "" && (len(dropped) != 1 || dropped[want.dropped] != 1) || want.dropped == "" && len(dropped) != 0 {
			t.Errorf("%v: dropped %v, want %q", errno, dropped, want.dropped)
		}
		told := tunnel.Code("")
		if len(r.unreachable) > 0 {
			told = tunnel.CodeOf((<-r.unreachable).err)
		}
		if told != want.told {
			t.Errorf("%v: told %q, want %q", errno, told, want.told)
		}
	}
}

func BenchmarkUDPRoundTrip(b *testing.B) {
	trip := pingPong(b)
	b.ReportAllocs()
	for b.Loop() {
		trip()
	}
}

func BenchmarkUDPSend(b *testing.B) {
	e := newEgress(b, Config{})
	p, _ := associate(b, e, tunnel.Peer{})
	_, to := listen(b, "127.0.0.1:0")
	data, target := make([]byte, 1200), tunnel.TargetOf(to)
	b.ReportAllocs()
	for b.Loop() {
		p.Send(data, target)
	}
}
