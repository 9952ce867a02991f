package sidecar

import (
	"bytes"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"sync"
	"syscall"
	"testing"
	"time"

	"culvert/tunnel"
)

// frontAssociate asks for an association that named the given address as its
// own, and returns its TCP connection and its relay address.
func frontAssociate(t testing.TB, f *Front, own netip.AddrPort) (*net.TCPConn, netip.AddrPort) {
	t.Helper()
	c := frontDial(t, f)
	c.Write(append(bytes.Clone(frontGreet), appendSOCKSAddr([]byte{5, 3, 0}, own)...))
	got := frontRead(t, c, 12)
	if !bytes.Equal(got[:6], []byte{5, 0, 5, 0, 0, 1}) {
		t.Fatalf("reply %x", got)
	}
	relay := netip.AddrPortFrom(netip.AddrFrom4([4]byte(got[6:])), uint16(got[10])<<8|uint16(got[11]))
	if relay.Addr() != tunnel.AddrPortOf(c.RemoteAddr()).Addr() || relay.Port() == 0 {
		t.Fatalf("the relay is %s", relay)
	}
	return c, relay
}

// frontApp is a UDP socket that talks only to the relay, so that a reply from
// elsewhere would not arrive.
func frontApp(t testing.TB, relay netip.AddrPort) *net.UDPConn {
	t.Helper()
	c, err := net.DialUDP("udp", nil, net.UDPAddrFromAddrPort(relay))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(frontPatience))
	return c
}

func frontUDPEcho(t testing.TB) netip.AddrPort {
	t.Helper()
	c, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(netip.MustParseAddrPort("127.0.0.1:0")))
	if err != nil {
		t.Fatal(err)
	}
	c.SetReadBuffer(udpSocketBuffer)
	var wg sync.WaitGroup
	wg.Go(func() {
		buf := make([]byte, 1<<16)
		for {
			n, from, err := c.ReadFromUDPAddrPort(buf)
			if err != nil {
				return
			}
			c.WriteToUDPAddrPort(buf[:n], from)
		}
	})
	t.Cleanup(func() { c.Close(); wg.Wait() })
	return tunnel.AddrPortOf(c.LocalAddr())
}

// frontDatagram wraps a payload.
func frontDatagram(to tunnel.Target, payload string) []byte {
	b := frontRequestBytes(0, to)
	b[0] = 0
	return append(b, payload...)
}

func frontExpect(t testing.TB, app *net.UDPConn, from netip.AddrPort, payload string) {
	t.Helper()
	buf := make([]byte, 1<<16)
	n, err := app.Read(buf)
	if err != nil {
		t.Fatal(err)
	}
	want := append(appendSOCKSAddr([]byte{0, 0, 0}, from), payload...)
	if !bytes.Equal(buf[:n], want) {
		t.Fatalf("got %.60x (%d bytes), want %.60x (%d bytes)", buf[:n], n, want, len(want))
	}
}

var frontUnnamed = netip.AddrPortFrom(netip.IPv4Unspecified(), 0)

func TestDatagramsComeBackWrapped(t *testing.T) {
	echo := frontUDPEcho(t)
	next := &frontDirect{hosts: map[string]netip.Addr{"echo.example": echo.Addr()}}
	f := frontStart(t, next, nil)
	_, relay := frontAssociate(t, f, frontUnnamed)
	app := frontApp(t, relay)
	payloads := []string{"", "hello", string(make([]byte, 1200)), string(bytes.Repeat([]byte{7}, udpPayload-10))}
	for i := range 256 {
		payloads = append(payloads, string([]byte{byte(i), 1, 2, 3}))
	}
	for _, payload := range payloads {
		app.Write(frontDatagram(tunnel.TargetOf(echo), payload))
		frontExpect(t, app, echo, payload)
	}
	for host, want := range map[string]tunnel.Target{
		"echo.example": {Host: "echo.example", Port: echo.Port()},
		"127.0.0.1":    tunnel.TargetOf(echo),
	} {
		app.Write(frontDatagram(tunnel.Target{Host: host, Port: echo.Port()}, "by name"))
		frontExpect(t, app, echo, "by name")
		if got := *next.relay().last.Load(); got != want {
			t.Errorf("target %+v, want %+v", got, want)
		}
	}
	if by := next.relay().by; !by.Held || !by.Addr.IsValid() {
		t.Errorf("peer %+v", by)
	}
	if next.relay().flushes.Load() == 0 {
		t.Error("no batch was flushed")
	}
	frontEventually(t, "all are counted and none as dropped", func() bool {
		s := f.Stats()
		return len(s.Dropped) == 0 && s.Up == uint64(len(payloads)+2) && s.Down == s.Up
	})
}

func TestIPv6Association(t *testing.T) {
	l, err := net.Listen("tcp", "[::1]:0")
	if err != nil {
		t.Skip("no IPv6 here: ", err)
	}
	echo := frontUDPEcho(t)
	f := frontStart(t, &frontDirect{}, func(c *FrontConfig) { c.Listener.Close(); c.Listener = l })
	c := frontDial(t, f)
	c.Write(append(bytes.Clone(frontGreet), frontRequestBytes(3, tunnel.Target{Addr: netip.IPv6Unspecified()})...))
	got := frontRead(t, c, 2+4+16+2)
	if got[3] != 0 || got[5] != atypIPv6 {
		t.Fatalf("reply %x", got)
	}
	app := frontApp(t, netip.AddrPortFrom(netip.AddrFrom16([16]byte(got[6:])), uint16(got[22])<<8|uint16(got[23])))
	app.Write(frontDatagram(tunnel.TargetOf(echo), "six"))
	frontExpect(t, app, echo, "six")
}

func TestBadDatagramsAreDroppedAndCounted(t *testing.T) {
	echo := frontUDPEcho(t)
	good := frontDatagram(tunnel.TargetOf(echo), "x")
	fragment := bytes.Clone(good)
	fragment[2] = 1
	for name, tc := range map[string]struct {
		sent []byte
		want string
	}{
		"empty":             {nil, "malformed"},
		"short":             {good[:9], "malformed"},
		"no address":        {good[:4], "malformed"},
		"address type":      {[]byte{0, 0, 0, 2, 1, 2, 3, 4, 0, 80, 1}, "malformed"},
		"name over the end": {[]byte{0, 0, 0, 3, 200, 'a', 0, 80}, "malformed"},
		"empty name":        {[]byte{0, 0, 0, 3, 0, 0, 80}, "malformed"},
		"port 0":            {frontDatagram(tunnel.Target{Host: "a"}, ""), "malformed"},
		"fragment":          {fragment, "fragment"},
	} {
		t.Run(name, func(t *testing.T) {
			next := &frontDirect{}
			f := frontStart(t, next, nil)
			_, relay := frontAssociate(t, f, frontUnnamed)
			// From a socket of its own: what is not a SOCKS datagram does not lock.
			frontApp(t, relay).Write(tc.sent)
			frontEventually(t, "the drop is counted", func() bool { return f.Stats().Dropped[tc.want] == 1 })
			app := frontApp(t, relay)
			app.Write(good)
			frontExpect(t, app, echo, "x")
			if n := next.relay().sent.Load(); n != 1 {
				t.Errorf("%d datagrams were passed on", n)
			}
		})
	}
}

func TestFirstSenderLocksTheAssociation(t *testing.T) {
	echo := frontUDPEcho(t)
	f := frontStart(t, &frontDirect{}, nil)
	_, relay := frontAssociate(t, f, frontUnnamed)
	app, other := frontApp(t, relay), frontApp(t, relay)
	app.Write(frontDatagram(tunnel.TargetOf(echo), "first"))
	frontExpect(t, app, echo, "first")
	other.Write(frontDatagram(tunnel.TargetOf(echo), "second"))
	frontEventually(t, "the drop is counted", func() bool { return f.Stats().Dropped["wrong_source"] == 1 })
	app.Write(frontDatagram(tunnel.TargetOf(echo), "third"))
	frontExpect(t, app, echo, "third")
}

func TestNamedPortLocksTheAssociation(t *testing.T) {
	echo := frontUDPEcho(t)
	app, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	defer app.Close()
	app.SetDeadline(time.Now().Add(frontPatience))
	f := frontStart(t, &frontDirect{}, nil)
	_, relay := frontAssociate(t, f, netip.AddrPortFrom(netip.IPv4Unspecified(), tunnel.AddrPortOf(app.LocalAddr()).Port()))
	frontApp(t, relay).Write(frontDatagram(tunnel.TargetOf(echo), "x"))
	frontEventually(t, "the drop is counted", func() bool { return f.Stats().Dropped["wrong_source"] == 1 })
	app.WriteToUDPAddrPort(frontDatagram(tunnel.TargetOf(echo), "y"), relay)
	frontExpect(t, app, echo, "y")
}

func TestOtherSourceAddressIsDropped(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("only Linux has all of 127.0.0.0/8")
	}
	f := frontStart(t, &frontDirect{}, nil)
	_, relay := frontAssociate(t, f, frontUnnamed)
	c, err := net.DialUDP("udp", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 2)}, net.UDPAddrFromAddrPort(relay))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	c.Write(frontDatagram(tunnel.Target{Host: "a", Port: 1}, "x"))
	frontEventually(t, "the drop is counted", func() bool { return f.Stats().Dropped["wrong_source"] == 1 })
}

func TestReplyBeforeAnySenderIsDropped(t *testing.T) {
	next := &frontDirect{}
	f := frontStart(t, next, nil)
	frontAssociate(t, f, frontUnnamed)
	next.relay().r.Deliver([]byte("early"), netip.MustParseAddrPort("192.0.2.1:1"))
	if n := f.Stats().Dropped["no_sender"]; n != 1 {
		t.Fatalf("%d drops", n)
	}
}

func TestFailuresOfThePathAreCounted(t *testing.T) {
	echo := frontUDPEcho(t)
	next := &frontDirect{}
	f := frontStart(t, next, nil)
	_, relay := frontAssociate(t, f, frontUnnamed)
	app := frontApp(t, relay)
	for code, want := range map[tunnel.Code]string{tunnel.PolicyDenied: "policy_denied", tunnel.Internal: "refused"} {
		next.relay().fail.Store(tunnel.Errorf(code, "no"))
		app.Write(frontDatagram(tunnel.TargetOf(echo), "x"))
		frontEventually(t, want, func() bool { return f.Stats().Dropped[want] == 1 })
	}
	next.relay().fail.Store(tunnel.Errorf(tunnel.Internal, "%w", tunnel.ErrTooLarge))
	app.Write(frontDatagram(tunnel.TargetOf(echo), "x"))
	frontEventually(t, "too_large", func() bool { return f.Stats().Dropped["too_large"] == 1 })
	next.relay().r.Deliver(make([]byte, udpPayload-9), echo)
	if n := f.Stats().Dropped["too_large"]; n != 2 {
		t.Errorf("%d drops of what is too large for the app", n)
	}
	next.relay().r.Unreachable(echo, tunnel.ConnectionRefused)
	if n := f.Stats().Unreachable; n != 1 {
		t.Errorf("%d unreachable", n)
	}
	// None of it ended the association.
	next.relay().fail.Store(nil)
	app.Write(frontDatagram(tunnel.TargetOf(echo), "alive"))
	frontExpect(t, app, echo, "alive")
}

func TestWhatTheAppsSocketDoesNotTakeIsCounted(t *testing.T) {
	var d frontDrops
	for _, err := range []error{nil, tunnel.ErrBlocked, syscall.ENOBUFS, syscall.EPERM} {
		d.handed(err)
	}
	if got := d.byReason(); d.down.Load() != 1 || len(got) != 2 || got["app_socket_full"] != 2 || got["app_socket_failed"] != 1 {
		t.Errorf("counted %v", got)
	}
	// What comes back when the app has gone.
	echo := frontUDPEcho(t)
	next := &frontDirect{}
	f := frontStart(t, next, nil)
	c, relay := frontAssociate(t, f, frontUnnamed)
	app := frontApp(t, relay)
	app.Write(frontDatagram(tunnel.TargetOf(echo), "x"))
	frontExpect(t, app, echo, "x")
	r := next.relay().r
	c.Close()
	<-next.relay().closed
	frontEventually(t, "the socket is closed", func() bool { return f.Stats().Relays == 0 })
	r.Deliver([]byte("late"), echo)
	if n := f.Stats().Dropped["app_socket_failed"]; n != 1 {
		t.Errorf("%d counted", n)
	}
}

func TestAssociationEndsWithItsConnection(t *testing.T) {
	for name, leave := range map[string]func(*net.TCPConn){
		"close":      func(c *net.TCPConn) { c.Close() },
		"half-close": func(c *net.TCPConn) { c.CloseWrite() },
		"reset":      func(c *net.TCPConn) { c.SetLinger(0); c.Close() },
		"talks too much": func(c *net.TCPConn) {
			c.Write(make([]byte, 2*controlBytes))
		},
	} {
		t.Run(name, func(t *testing.T) {
			next := &frontDirect{}
			f := frontStart(t, next, nil)
			c, _ := frontAssociate(t, f, frontUnnamed)
			c.Write([]byte("ignored"))
			left := time.Now()
			leave(c)
			select {
			case <-next.relay().closed:
			case <-time.After(frontPatience):
				t.Fatal("still open")
			}
			if took := time.Since(left); took > 100*time.Millisecond {
				t.Logf("took %s; 100 ms are allowed on a machine that is not busy", took)
			}
			frontEventually(t, "nothing is left", func() bool { s := f.Stats(); return s.Open == 0 && s.Relays == 0 })
		})
	}
}

func TestConnectionEndsWithItsAssociation(t *testing.T) {
	next := &frontDirect{}
	f := frontStart(t, next, nil)
	c, _ := frontAssociate(t, f, frontUnnamed)
	next.relay().r.Closed(tunnel.SessionExpired)
	if _, err := c.Read(make([]byte, 1)); err != io.EOF {
		t.Fatalf("read: %v, want EOF", err)
	}
	frontEventually(t, "nothing is left", func() bool { s := f.Stats(); return s.Open == 0 && s.Relays == 0 })
	select {
	case <-next.relay().closed:
	default:
		t.Error("the association was not closed")
	}
}

func TestNoSocketIsAnAnswer(t *testing.T) {
	f := frontStart(t, &frontDirect{}, func(c *FrontConfig) {
		c.ListenUDP = func(netip.Addr) (*net.UDPConn, error) { return nil, errors.New("no more files") }
	})
	c := frontDial(t, f)
	c.Write(append(bytes.Clone(frontGreet), appendSOCKSAddr([]byte{5, 3, 0}, frontUnnamed)...))
	if got := frontRead(t, c, 12); got[3] != socksFailure {
		t.Fatalf("reply %x", got)
	}
}

func TestManyAssociationsAtOnce(t *testing.T) {
	echo := frontUDPEcho(t)
	f := frontStart(t, &frontDirect{}, nil)
	var wg sync.WaitGroup
	for range 20 {
		_, relay := frontAssociate(t, f, frontUnnamed)
		app := frontApp(t, relay)
		wg.Go(func() {
			buf := make([]byte, 2048)
			for range 100 {
				app.Write(frontDatagram(tunnel.TargetOf(echo), "payload"))
				if _, err := app.Read(buf); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
	frontEventually(t, "all are counted", func() bool {
		s := f.Stats()
		return s.Up == 2000 && s.Down == 2000 && s.Relays == 20
	})
}

// frontQuiet takes datagrams and does nothing, to count allocations.
type frontQuiet struct{ frontDirect }

func (*frontQuiet) Send([]byte, tunnel.Target) error { return nil }
func (*frontQuiet) Flush()                           {}
func (*frontQuiet) Close() error                     { return nil }

func (q *frontQuiet) OpenPackets(tunnel.Peer, tunnel.Receiver) (tunnel.Packets, error) { return q, nil }

func frontBareAssociation(t testing.TB) (a *association, app netip.AddrPort) {
	t.Helper()
	f, err := NewFront(FrontConfig{Listener: frontListen(t), Next: &frontQuiet{}})
	if err != nil {
		t.Fatal(err)
	}
	client, err := net.Dial("tcp", f.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	server, err := f.listener.Accept()
	if err != nil {
		t.Fatal(err)
	}
	a, err = f.newAssociation(newFrontConn(server.(*net.TCPConn)), "", 0)
	if err != nil {
		t.Fatal(err)
	}
	sink, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { a.end(nil); f.poller.Close(); f.listener.Close(); client.Close(); sink.Close() })
	return a, tunnel.AddrPortOf(sink.LocalAddr())
}

func TestPacketsDoNotAllocate(t *testing.T) {
	a, app := frontBareAssociation(t)
	remote := netip.MustParseAddrPort("192.0.2.1:3478")
	byAddr := frontDatagram(tunnel.TargetOf(remote), string(make([]byte, 1200)))
	byName := frontDatagram(tunnel.Target{Host: "media.example", Port: 3478}, string(make([]byte, 1200)))
	a.fromApp(byAddr, app)
	for name, do := range map[string]func(){
		"from the app, by address": func() { a.fromApp(byAddr, app) },
		"from the app, by name":    func() { a.fromApp(byName, app) },
		"to the app":               func() { a.Deliver(byAddr, remote) },
	} {
		// The race detector makes pools forget on purpose.
		if n := testing.AllocsPerRun(1000, do); n >= 1 && !frontRace {
			t.Errorf("%s: %v allocations a packet", name, n)
		}
	}
	if s := a.front.Stats(); s.Down == 0 || s.Up < 2000 || len(s.Dropped) > 1 {
		t.Errorf("counters %+v", s)
	}
}

func BenchmarkDeliver(b *testing.B) {
	a, app := frontBareAssociation(b)
	a.sender.Store(&app)
	p := make([]byte, 1200)
	b.SetBytes(1200)
	b.ReportAllocs()
	for b.Loop() {
		a.Deliver(p, netip.MustParseAddrPort("192.0.2.1:3478"))
	}
}

func BenchmarkFromApp(b *testing.B) {
	a, app := frontBareAssociation(b)
	p := frontDatagram(tunnel.Target{Addr: netip.MustParseAddr("192.0.2.1"), Port: 3478}, string(make([]byte, 1200)))
	b.SetBytes(1200)
	b.ReportAllocs()
	for b.Loop() {
		a.fromApp(p, app)
	}
}

func BenchmarkStream(b *testing.B) {
	far := frontFarEnd(b, func(c *net.TCPConn) {
		buf := make([]byte, 64<<10)
		for {
			if _, err := c.Write(buf); err != nil {
				return
			}
		}
	})
	c := frontConnect(b, frontStart(b, &frontDirect{}, nil), tunnel.TargetOf(far))
	c.SetDeadline(time.Time{})
	buf := make([]byte, 64<<10)
	b.SetBytes(int64(len(buf)))
	for b.Loop() {
		frontRead64(b, c, buf)
	}
	c.SetLinger(0)
	c.Close()
}

func frontRead64(b *testing.B, c io.Reader, buf []byte) {
	if _, err := io.ReadFull(c, buf); err != nil {
		b.Fatal(err)
	}
}

func TestIdleAssociationsAreSmall(t *testing.T) {
	if frontRace {
		t.Skip("the race detector's own memory would be measured")
	}
	f := frontStart(t, &frontQuiet{}, nil)
	const count = 500
	for range 10 {
		frontAssociate(t, f, frontUnnamed) // warm up pools
	}
	used := func() uint64 {
		for range 5 { // a stack is halved once in each
			runtime.GC()
		}
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return m.HeapInuse + m.StackInuse
	}
	before := used()
	for range count {
		frontAssociate(t, f, frontUnnamed)
	}
	// The client's end in this process is part of it.
	if each := int64(used()-before) / count; each > 8<<10 { // it can be negative: what was warmed up may have gone
		t.Errorf("%d bytes for each idle association", each)
	} else {
		t.Logf("%d bytes for each idle association and its client", each)
	}
}

func FuzzSOCKSUDPHeader(f *testing.F) {
	f.Add(frontDatagram(tunnel.Target{Addr: netip.MustParseAddr("192.0.2.1"), Port: 3478}, "payload"))
	f.Add(frontDatagram(tunnel.Target{Addr: netip.MustParseAddr("2001:db8::1"), Port: 3478}, ""))
	f.Add(frontDatagram(tunnel.Target{Host: "media.example", Port: 3478}, "\x00"))
	f.Add([]byte{0, 0, 1, 1, 1, 2, 3, 4, 0, 1})
	f.Add([]byte{0, 0, 0, 3, 255, 'a', 0, 1})
	f.Fuzz(func(t *testing.T, p []byte) {
		h, payload, why, ok := parseUDPHeader(p)
		if !ok {
			if why != dropMalformed && why != dropFragment {
				t.Fatalf("dropped as %s", dropNames[why])
			}
			return
		}
		to := tunnel.Target{Host: string(h.host), Addr: h.addr, Port: h.port}
		again := frontDatagram(to, string(payload))
		if h.addr.Is4In6() {
			return // written as IPv4
		}
		if !bytes.Equal(again[2:], p[2:]) {
			t.Fatalf("%x became %x", p, again)
		}
	})
}

// frontUserHelper is the environment variable by which the test binary becomes
// another local user's program: it sends what it is told to and ends.
const frontUserHelper = "CULVERT_TEST_SEND_UDP_TO"

// frontUserPort is the address that it sends from; empty: any.
const frontUserPort = "CULVERT_TEST_SEND_UDP_FROM"

func TestMainOfOtherUser(t *testing.T) {
	to := os.Getenv(frontUserHelper)
	if to == "" {
		t.Skip("only run by asOtherUser")
	}
	from, _ := net.ResolveUDPAddr("udp", os.Getenv(frontUserPort))
	relay, err := netip.ParseAddrPort(to)
	if err != nil {
		t.Fatal(err)
	}
	c, err := net.DialUDP("udp", from, net.UDPAddrFromAddrPort(relay))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	c.Write(frontDatagram(tunnel.Target{Host: "stolen.example", Port: 1}, "x"))
	// Stays until its parent has looked it up.
	io.Copy(io.Discard, os.Stdin)
}

func frontWant(t *testing.T, program string) string {
	t.Helper()
	path, err := exec.LookPath(program)
	if err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatalf("%s is missing; CI must have it", program)
		}
		t.Skipf("%s is not installed", program)
	}
	return path
}
