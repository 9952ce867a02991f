package netio

import (
	"bytes"
	"errors"
	"io"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// took is a Reader that passes on what it takes. What it is told to do comes first.
type took struct {
	do      func(p []byte, from netip.AddrPort)
	got     chan string
	flushes atomic.Int32
	failed  chan struct{}
}

func newTook() *took { return &took{got: make(chan string, 4096), failed: make(chan struct{}, 16)} }

func (r *took) Take(p []byte, from netip.AddrPort) {
	if r.do != nil {
		r.do(p, from)
		return
	}
	r.got <- string(p)
}
func (r *took) Flush()  { r.flushes.Add(1) }
func (r *took) Failed() { r.failed <- struct{}{} }

func within[T any](t testing.TB, c <-chan T, what string) (v T) {
	t.Helper()
	select {
	case v = <-c:
	case <-time.After(30 * time.Second):
		t.Fatalf("no %s", what)
	}
	return v
}

func newPoller(t testing.TB) *Poller {
	p := new(Poller)
	t.Cleanup(p.Close)
	return p
}

// polled returns a socket that a poller reads, and where it is reached.
func polled(t testing.TB, p *Poller, r Reader) (*Socket, netip.AddrPort) {
	t.Helper()
	c := bind(t, "udp4", "127.0.0.1:0")
	to := at(c, "127.0.0.1")
	s, err := p.Packet(c, r)
	if err == nil {
		err = s.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s, to
}

func TestManySocketsAreRead(t *testing.T) {
	p := newPoller(t)
	from := bind(t, "udp4", "127.0.0.1:0")
	var readers []*took
	var addrs []netip.AddrPort
	for range 50 {
		r := newTook()
		_, to := polled(t, p, r)
		readers, addrs = append(readers, r), append(addrs, to)
	}
	for _, size := range []int{0, 1, 1200, 65507} {
		want := bytes.Repeat([]byte("x"), size)
		for i, r := range readers {
			from.WriteToUDPAddrPort(want, addrs[i])
			if got := within(t, r.got, "datagram"); got != string(want) {
				t.Errorf("%d bytes came of %d", len(got), size)
			}
		}
	}
}

func TestABatchIsInOrderAndFlushed(t *testing.T) {
	r, begun, on := newTook(), make(chan struct{}, 1), make(chan struct{})
	r.do = func(p []byte, _ netip.AddrPort) {
		if string(p) == "wait" {
			begun <- struct{}{}
			<-on
			return
		}
		r.got <- string(p)
	}
	_, to := polled(t, newPoller(t), r)
	from := bind(t, "udp4", "127.0.0.1:0")
	from.WriteToUDPAddrPort([]byte("wait"), to)
	within(t, begun, "first datagram")
	for i := range 50 { // more than one turn takes
		from.WriteToUDPAddrPort([]byte{byte(i)}, to)
	}
	close(on)
	for i := range 50 {
		if got := within(t, r.got, "datagram"); got != string([]byte{byte(i)}) {
			t.Fatalf("%x came as number %d", got, i)
		}
	}
	if r.flushes.Load() == 0 {
		t.Error("nothing was flushed")
	}
}

func TestAFloodDoesNotStarveTheOthers(t *testing.T) {
	p := newPoller(t)
	from := bind(t, "udp4", "127.0.0.1:0")
	var quiet []*took
	var addrs []netip.AddrPort
	for range 8 {
		r := newTook()
		_, to := polled(t, p, r)
		quiet, addrs = append(quiet, r), append(addrs, to)
	}
	// Each datagram that is taken sends two more: the socket is never empty.
	var s *Socket
	var to netip.AddrPort
	flooded, ready := newTook(), make(chan struct{})
	flooded.do = func(b []byte, _ netip.AddrPort) {
		<-ready
		s.Send(b, to)
		s.Send(b, to)
	}
	s, to = polled(t, p, flooded)
	close(ready)
	from.WriteToUDPAddrPort([]byte("flood"), to)
	for i, r := range quiet {
		from.WriteToUDPAddrPort([]byte("quiet"), addrs[i])
		within(t, r.got, "datagram beside the flood")
	}
}

func TestClosingInsideTake(t *testing.T) {
	r := newTook()
	p := newPoller(t)
	var s *Socket
	ready := make(chan struct{})
	r.do = func([]byte, netip.AddrPort) {
		<-ready
		s.Close()
		r.got <- "closed"
	}
	s, to := polled(t, p, r)
	close(ready)
	from := bind(t, "udp4", "127.0.0.1:0")
	for range 3 {
		from.WriteToUDPAddrPort([]byte("x"), to)
	}
	within(t, r.got, "close")
	if err := s.Send([]byte("x"), to); !errors.Is(err, net.ErrClosed) {
		t.Errorf("Send: %v", err)
	}
	if err := s.Close(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("second Close: %v", err)
	}
	p.Close()
	if n := len(r.got); n != 0 {
		t.Errorf("taken %d times after the close", n)
	}
}

// A descriptor is soon another socket's: nothing may be sent to it by mistake.
func TestClosingWhileOthersSend(t *testing.T) {
	p := newPoller(t)
	to := bind(t, "udp4", "127.0.0.1:0")
	for range 50 {
		s, _ := polled(t, p, newTook())
		var wg sync.WaitGroup
		for range 4 {
			wg.Go(func() {
				for !errors.Is(s.Send([]byte("x"), at(to, "127.0.0.1")), net.ErrClosed) {
				}
			})
		}
		s.Close()
		wg.Wait()
	}
}

func TestAPollerThatIsClosed(t *testing.T) {
	p := newPoller(t)
	open, to := polled(t, p, newTook())
	c := bind(t, "udp4", "127.0.0.1:0")
	late, err := p.Packet(c, newTook())
	if err != nil {
		t.Fatal(err)
	}
	p.Close()
	p.Close()
	if err := late.Start(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("Start: %v", err)
	}
	if err := late.Close(); err != nil {
		t.Error(err)
	}
	bind(t, "udp4", "127.0.0.1:0").WriteToUDPAddrPort([]byte("x"), to)
	open.Close()
	if n := len(open.r.(*took).got); n != 0 {
		t.Errorf("%d datagrams were taken after the end", n)
	}
}

// connect returns a stream that a poller reads, and its other end.
func connect(t *testing.T, p *Poller, r Reader) (*Socket, *net.TCPConn) {
	t.Helper()
	l, err := net.ListenTCP("tcp4", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	c, err := net.DialTCP("tcp4", nil, l.Addr().(*net.TCPAddr))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(30 * time.Second))
	far, err := l.AcceptTCP()
	if err != nil {
		t.Fatal(err)
	}
	s, err := p.Stream(far, r)
	if err == nil {
		err = s.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s, c
}

func TestTheEndOfAStreamIsToldOnce(t *testing.T) {
	for name, leave := range map[string]func(*net.TCPConn){
		"close":      func(c *net.TCPConn) { c.Close() },
		"half-close": func(c *net.TCPConn) { c.CloseWrite() },
		"reset":      func(c *net.TCPConn) { c.SetLinger(0); c.Close() },
	} {
		t.Run(name, func(t *testing.T) {
			p, r := newPoller(t), newTook()
			_, c := connect(t, p, r)
			c.Write([]byte("hello"))
			if got := within(t, r.got, "bytes"); got != "hello" {
				t.Errorf("got %q", got)
			}
			leave(c)
			within(t, r.failed, "end")
			_, to := polled(t, p, r) // the loop has gone on
			bind(t, "udp4", "127.0.0.1:0").WriteToUDPAddrPort([]byte("x"), to)
			within(t, r.got, "datagram")
			p.Close()
			if len(r.failed) != 0 {
				t.Error("told again")
			}
		})
	}
}

func TestAStreamEndsAsItsOwnerSays(t *testing.T) {
	for name, want := range map[string]bool{"Close": true, "Reset": false} {
		s, c := connect(t, newPoller(t), newTook())
		if want {
			s.Close()
		} else {
			s.Reset()
		}
		if _, err := c.Read(make([]byte, 1)); (err == io.EOF) != want {
			t.Errorf("%s: the other end reads %v", name, err)
		}
	}
}

func TestPolledDatagramsDoNotAllocate(t *testing.T) {
	if raceEnabled {
		t.Skip("the race detector makes sync.Pool drop at random")
	}
	p, back := newPoller(t), make(chan struct{}, 1)
	p.MaxAge = time.Hour // the kernel's time is looked at, too
	r := newTook()
	r.do = func([]byte, netip.AddrPort) { back <- struct{}{} }
	s, to := polled(t, p, r)
	b := make([]byte, 1200)
	trip := func() {
		s.Send(b, to)
		<-back
	}
	for range 100 {
		trip()
	}
	if n := testing.AllocsPerRun(2000, trip); n != 0 {
		t.Errorf("%v allocations for one datagram", n)
	}
}

func BenchmarkPolledDatagram(b *testing.B) {
	p, back := newPoller(b), make(chan struct{}, 1)
	r := newTook()
	r.do = func([]byte, netip.AddrPort) { back <- struct{}{} }
	s, to := polled(b, p, r)
	data := make([]byte, 1200)
	b.ReportAllocs()
	for b.Loop() {
		s.Send(data, to)
		<-back
	}
}
