package egress

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"runtime"
	"slices"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"

	"culvert/tunnel"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

type got struct {
	p    []byte
	from netip.AddrPort
}

type problem struct {
	to  netip.AddrPort
	err error
}

type receiver struct {
	deliver     func(p []byte, from netip.AddrPort)
	got         chan got
	unreachable chan problem
	closed      chan error
}

func newReceiver() *receiver {
	return &receiver{got: make(chan got, 1024), unreachable: make(chan problem, 64), closed: make(chan error, 2)}
}

func (r *receiver) Deliver(p []byte, from netip.AddrPort) {
	if r.deliver != nil {
		r.deliver(p, from)
		return
	}
	r.got <- got{bytes.Clone(p), from}
}
func (r *receiver) Unreachable(to netip.AddrPort, err error) { r.unreachable <- problem{to, err} }
func (r *receiver) Closed(err error)                         { r.closed <- err }

// patience is how long the tests wait for what must come, on a slow machine too.
const patience = time.Minute

func take[T any](t testing.TB, c <-chan T, what string) (v T) {
	t.Helper()
	select {
	case v = <-c:
	case <-time.After(patience):
		t.Fatalf("no %s within %v", what, patience)
	}
	return v
}

func newEgress(t testing.TB, cfg Config) *Egress {
	t.Helper()
	e, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { e.Close() })
	return e
}

func associate(t testing.TB, o tunnel.Opener, by tunnel.Peer) (tunnel.Packets, *receiver) {
	t.Helper()
	r := newReceiver()
	p, err := o.OpenPackets(by, r)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.Close() })
	return p, r
}

func listen(t testing.TB, addr string) (*net.UDPConn, netip.AddrPort) {
	t.Helper()
	c, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(netip.MustParseAddrPort(addr)))
	if err != nil {
		t.Skipf("no %s here: %v", addr, err)
	}
	t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(patience))
	a := c.LocalAddr().(*net.UDPAddr).AddrPort()
	return c, netip.AddrPortFrom(a.Addr().Unmap(), a.Port())
}

func send(t testing.TB, p tunnel.Packets, b string, to netip.AddrPort) {
	t.Helper()
	if err := p.Send([]byte(b), tunnel.TargetOf(to)); err != nil {
		t.Fatal(err)
	}
}

func read(t testing.TB, c *net.UDPConn) (string, netip.AddrPort) {
	t.Helper()
	b := make([]byte, 1<<16)
	n, from, err := c.ReadFromUDPAddrPort(b)
	if err != nil {
		t.Fatal(err)
	}
	return string(b[:n]), netip.AddrPortFrom(from.Addr().Unmap(), from.Port())
}

func TestDatagramsGoAndComeBackFromOnePort(t *testing.T) {
	for _, local := range []string{"127.0.0.1:0", "[::1]:0"} {
		t.Run(local, func(t *testing.T) {
			e := newEgress(t, Config{})
			p, r := associate(t, e, tunnel.Peer{})
			one, to1 := listen(t, local)
			two, to2 := listen(t, local)
			large := string(bytes.Repeat([]byte("x"), 65507))
			send(t, p, "", to1)
			send(t, p, large, to2)
			_, from1 := read(t, one)
			b, from2 := read(t, two)
			if from1 != from2 || b != large {
				t.Errorf("the ports are %s and %s, %d bytes came", from1, from2, len(b))
			}
			one.WriteToUDPAddrPort([]byte("back"), from1)
			if g := take(t, r.got, "answer"); string(g.p) != "back" || g.from != to1 {
				t.Errorf("got %q from %s", g.p, g.from)
			}
			if err := p.Send(make([]byte, 65508), tunnel.TargetOf(to1)); !errors.Is(err, tunnel.ErrTooLarge) {
				t.Errorf("65,508 bytes: %v", err)
			}
		})
	}
}

func TestOnlyAddressesThatWereSentToGetThrough(t *testing.T) {
	e := newEgress(t, Config{})
	p, r := associate(t, e, tunnel.Peer{})
	friend, to := listen(t, "127.0.0.1:0")
	otherPort, _ := listen(t, "127.0.0.1:0")
	stranger, _ := listen(t, "127.0.0.2:0")
	send(t, p, "hello", to)
	_, from := read(t, friend)
	stranger.WriteToUDPAddrPort([]byte("no"), from)
	otherPort.WriteToUDPAddrPort([]byte("yes"), from) // address-dependent: the port does not matter
	if g := take(t, r.got, "answer"); string(g.p) != "yes" {
		t.Errorf("got %q from %s", g.p, g.from)
	}
	if n := e.Stats().Dropped[dropFiltered]; n != 1 {
		t.Errorf("%d filtered, want 1", n)
	}
}

func TestTheFilterForgets(t *testing.T) {
	a := &association{remotes: map[netip.Addr]int64{}}
	first := netip.MustParseAddr("192.0.2.1")
	a.remember(first, 0)
	if !a.known(first, remoteLife) || a.known(first, remoteLife+1) {
		t.Error("an address is not known for exactly five minutes")
	}
	at := netip.MustParseAddr("198.51.100.0")
	for i := range maxRemotes + 1 {
		a.remember(at, int64(i))
		at = at.Next()
	}
	if len(a.remotes) != maxRemotes || a.known(netip.MustParseAddr("198.51.100.0"), 300) || !a.known(netip.MustParseAddr("198.51.100.1"), 300) {
		t.Error("the address unused for longest did not make room")
	}
}

func TestAClosedPortIsReported(t *testing.T) {
	for _, local := range []string{"127.0.0.1:0", "[::1]:0"} {
		t.Run(local, func(t *testing.T) {
			e := newEgress(t, Config{})
			p, r := associate(t, e, tunnel.Peer{})
			gone, to := listen(t, local)
			gone.Close()
			send(t, p, "anyone?", to)
			u := take(t, r.unreachable, "report")
			if u.to != to || tunnel.CodeOf(u.err) != tunnel.ConnectionRefused {
				t.Errorf("%s: %v", u.to, u.err)
			}
			live, to := listen(t, local)
			send(t, p, "still here", to)
			if b, _ := read(t, live); b != "still here" {
				t.Errorf("got %q", b)
			}
		})
	}
}

func TestTwoAssociationsMeetInProcess(t *testing.T) {
	public := netip.MustParseAddr("192.0.2.7") // no interface has it: only a hairpin can deliver
	for name, c := range map[string]struct {
		cfg Config
		at  netip.Addr
	}{
		"public":   {Config{Public: []netip.Addr{public}}, public},
		"loopback": {Config{}, netip.MustParseAddr("127.0.0.1")},
		"bound":    {Config{Local4: netip.MustParseAddr("127.0.0.2")}, netip.MustParseAddr("127.0.0.2")},
	} {
		t.Run(name, func(t *testing.T) {
			e := newEgress(t, c.cfg)
			pa, ra := associate(t, e, tunnel.Peer{})
			pb, rb := associate(t, e, tunnel.Peer{})
			sa, err := pa.(*association).socket(0)
			if err != nil {
				t.Fatal(err)
			}
			sb, _ := pb.(*association).socket(0)
			a, b := netip.AddrPortFrom(c.at, sa.key.port), netip.AddrPortFrom(c.at, sb.key.port)
			send(t, pa, "filtered", b)
			send(t, pb, "two", a)
			send(t, pa, "three", b)
			if g := take(t, ra.got, "datagram"); string(g.p) != "two" || g.from != b {
				t.Errorf("got %q from %s", g.p, g.from)
			}
			if g := take(t, rb.got, "datagram"); string(g.p) != "three" || g.from != a {
				t.Errorf("got %q from %s", g.p, g.from)
			}
		})
	}
}

func TestWhatIsOnThisHostIsKnown(t *testing.T) {
	public, bound := netip.MustParseAddr("192.0.2.7"), netip.MustParseAddr("127.0.0.2")
	e := newEgress(t, Config{Local4: bound, Public: []netip.Addr{public}})
	p, _ := associate(t, e, tunnel.Peer{})
	s, err := p.(*association).socket(0)
	if err != nil {
		t.Fatal(err)
	}
	if a := netip.MustParseAddr("127.9.9.9"); runtime.GOOS == "linux" && !e.OnHost(a) {
		t.Errorf("%s, which no interface has and the kernel routes here, is elsewhere", a)
	}
	// The first is an interface's, whichever address traffic leaves from.
	for a, on := range map[netip.Addr]bool{netip.MustParseAddr("127.0.0.1"): true, bound: true, public: true, netip.MustParseAddr("192.0.2.8"): false, {}: false} {
		if e.OnHost(a) != on {
			t.Errorf("OnHost(%s) = %v", a, !on)
		}
	}
	for to, joins := range map[netip.AddrPort]bool{
		netip.AddrPortFrom(bound, s.key.port):                            true,
		netip.AddrPortFrom(public, s.key.port):                           true,
		netip.AddrPortFrom(public, s.key.port^1):                         false,
		netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), s.key.port): false, // another program may have that one
		{}: false,
	} {
		if e.Joins(to) != joins {
			t.Errorf("Joins(%s) = %v", to, !joins)
		}
	}
	p.Close()
	if to := netip.AddrPortFrom(bound, s.key.port); e.Joins(to) {
		t.Errorf("Joins(%s) after its association has ended", to)
	}
}

func TestTwoEchoesThatMeetComeToAnEnd(t *testing.T) {
	e := newEgress(t, Config{})
	var ps [2]tunnel.Packets
	var rs [2]*receiver
	for i := range ps {
		ps[i], rs[i] = associate(t, e, tunnel.Peer{})
		rs[i].deliver = func(p []byte, from netip.AddrPort) { ps[i].Send(p, tunnel.TargetOf(from)) }
	}
	ps[0].(*association).socket(0)
	s1, _ := ps[1].(*association).socket(0)
	lo := netip.MustParseAddr("127.0.0.1")
	ps[1].(*association).remember(lo, e.now())
	send(t, ps[0], "x", netip.AddrPortFrom(lo, s1.key.port))
	if e.Stats().Dropped[dropFull] != 1 {
		t.Errorf("%+v", e.Stats())
	}
}

func TestIdleAssociationsEndAndHeldOnesStay(t *testing.T) {
	e := newEgress(t, Config{Idle: 40 * time.Millisecond})
	_, r := associate(t, e, tunnel.Peer{})
	held, rh := associate(t, e, tunnel.Peer{Held: true})
	c, to := listen(t, "127.0.0.1:0")
	if err := take(t, r.closed, "end"); tunnel.CodeOf(err) != tunnel.TimedOut {
		t.Error(err)
	}
	send(t, held, "here", to)
	if b, _ := read(t, c); b != "here" || len(rh.closed) != 0 || e.Stats().Associations != 1 {
		t.Errorf("the held one has gone: %+v", e.Stats())
	}
}

func TestCloseInsideDeliver(t *testing.T) {
	e := newEgress(t, Config{})
	var p tunnel.Packets
	r, done := newReceiver(), make(chan struct{})
	r.deliver = func([]byte, netip.AddrPort) { p.Close(); close(done) }
	p, err := e.OpenPackets(tunnel.Peer{}, r)
	if err != nil {
		t.Fatal(err)
	}
	c, to := listen(t, "127.0.0.1:0")
	send(t, p, "x", to)
	_, from := read(t, c)
	c.WriteToUDPAddrPort([]byte("y"), from)
	take(t, done, "close")
	if err := p.Send(nil, tunnel.TargetOf(to)); !errors.Is(err, net.ErrClosed) {
		t.Error(err)
	}
	e.Close()
	if len(r.closed) != 0 {
		t.Error("Close was answered by Closed")
	}
}

func TestLimitsAndTheEnd(t *testing.T) {
	e := newEgress(t, Config{MaxAssociations: 1})
	_, r := associate(t, e, tunnel.Peer{})
	if _, err := e.OpenPackets(tunnel.Peer{}, newReceiver()); tunnel.CodeOf(err) != tunnel.LimitExceeded {
		t.Error(err)
	}
	e.Close()
	if err := take(t, r.closed, "end"); tunnel.CodeOf(err) != tunnel.ProxyStopped {
		t.Error(err)
	}
	if _, err := e.OpenPackets(tunnel.Peer{}, newReceiver()); tunnel.CodeOf(err) != tunnel.ProxyStopped {
		t.Error(err)
	}
}

func TestTargetsThatAreNeverSentTo(t *testing.T) {
	e := newEgress(t, Config{})
	p, _ := associate(t, e, tunnel.Peer{})
	for _, a := range []string{"0.0.0.0:9", "[::]:9", "127.0.0.1:0", "[fe80::1%lo]:9", "[::ffff:127.0.0.1]:9", "224.0.0.1:9", "[ff02::1]:9", "255.255.255.255:9"} {
		to := tunnel.TargetOf(netip.MustParseAddrPort(a))
		if err := p.Send(nil, to); tunnel.CodeOf(err) != tunnel.Unsupported {
			t.Errorf("datagram to %s: %v", a, err)
		}
		if _, err := e.OpenStream(context.Background(), tunnel.Peer{}, to); tunnel.CodeOf(err) != tunnel.Unsupported {
			t.Errorf("stream to %s: %v", a, err)
		}
	}
	if err := p.Send(nil, tunnel.Target{Host: "x", Port: 9}); tunnel.CodeOf(err) != tunnel.NameUnresolved {
		t.Error(err)
	}
}

// listener takes TCP connections until the test ends.
func listener(t *testing.T) net.Listener {
	t.Helper()
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

func dialPair(t *testing.T, e *Egress) (tunnel.Stream, *net.TCPConn) {
	t.Helper()
	l := listener(t)
	s, err := e.OpenStream(context.Background(), tunnel.Peer{}, tunnel.TargetOf(l.Addr().(*net.TCPAddr).AddrPort()))
	if err != nil {
		t.Fatal(err)
	}
	c, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close(); c.Close() })
	c.SetDeadline(time.Now().Add(patience))
	return s, c.(*net.TCPConn)
}

func TestStreamsOfAllSessionsAreBounded(t *testing.T) {
	e := newEgress(t, Config{MaxStreams: 1})
	s, c := dialPair(t, e)
	to := tunnel.TargetOf(c.LocalAddr().(*net.TCPAddr).AddrPort())
	if _, err := e.OpenStream(t.Context(), tunnel.Peer{}, to); tunnel.CodeOf(err) != tunnel.LimitExceeded {
		t.Errorf("one more: %v", err)
	}
	s.Close()
	dead, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := e.OpenStream(dead, tunnel.Peer{}, to); err == nil || tunnel.CodeOf(err) == tunnel.LimitExceeded {
		t.Errorf("where the app has left: %v", err)
	}
	dialPair(t, e) // what has ended or failed counts no longer
}

func TestAnAppWithManyAssociationsAndStreamsLeavesRoomForOthers(t *testing.T) {
	e := newEgress(t, Config{MaxAssociations: 18, MaxStreams: 18})
	l := listener(t)
	to := tunnel.TargetOf(tunnel.AddrPortOf(l.Addr()))
	for kind, open := range map[string]func(by tunnel.Peer) (end func(), _ error){
		"streams": func(by tunnel.Peer) (func(), error) {
			s, err := e.OpenStream(context.Background(), by, to)
			return func() { s.Close(); s.Abort(nil) }, err // both: it is counted once
		},
		"associations": func(by tunnel.Peer) (func(), error) {
			p, err := e.OpenPackets(by, newReceiver())
			return func() { p.Close(); p.Close() }, err
		},
	} {
		var ends []func()
		take := func(app string, want int) {
			t.Helper()
			n := 0
			for {
				end, err := open(tunnel.Peer{App: app})
				if err != nil {
					if tunnel.CodeOf(err) != tunnel.LimitExceeded {
						t.Error(err)
					}
					break
				}
				ends, n = append(ends, end), n+1
			}
			if n != want {
				t.Errorf("%s: %s got %d, want %d", kind, app, n, want)
			}
		}
		take("greedy", 16)
		take("other", 2)
		for _, end := range ends {
			end()
		}
		take("other", 16)
		for _, end := range ends {
			end()
		}
	}
	if st := e.Stats(); st.Streams != 0 || st.Associations != 0 || e.streamShares.Held() != 0 || e.assocShares.Held() != 0 {
		t.Errorf("%+v are left, and %d and %d are counted", st, e.streamShares.Held(), e.assocShares.Held())
	}
}

func TestStreams(t *testing.T) {
	e := newEgress(t, Config{})
	t.Run("half-close", func(t *testing.T) {
		s, c := dialPair(t, e)
		s.Write([]byte("ask"))
		s.CloseWrite()
		if b, err := io.ReadAll(c); string(b) != "ask" || err != nil {
			t.Fatal(string(b), err)
		}
		c.Write([]byte("answer"))
		c.Close()
		if b, err := io.ReadAll(s); string(b) != "answer" || err != nil {
			t.Error(string(b), err)
		}
	})
	t.Run("abort is RST", func(t *testing.T) {
		s, c := dialPair(t, e)
		s.Abort(nil)
		if _, err := c.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
			t.Error(err)
		}
	})
	t.Run("refused", func(t *testing.T) {
		l, _ := net.Listen("tcp4", "127.0.0.1:0")
		l.Close()
		_, err := e.OpenStream(context.Background(), tunnel.Peer{}, tunnel.TargetOf(l.Addr().(*net.TCPAddr).AddrPort()))
		if tunnel.CodeOf(err) != tunnel.ConnectionRefused {
			t.Error(err)
		}
	})
	t.Run("the end", func(t *testing.T) {
		_, c := dialPair(t, e)
		e.Close()
		if _, err := c.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
			t.Error(err)
		}
		if n := e.Stats().Streams; n != 0 {
			t.Errorf("%d streams are left", n)
		}
	})
}

func TestErrorsKeepTheirCode(t *testing.T) {
	for errno, code := range map[syscall.Errno]tunnel.Code{
		syscall.ECONNREFUSED: tunnel.ConnectionRefused, syscall.EHOSTUNREACH: tunnel.HostUnreachable, syscall.ENETUNREACH: tunnel.NetworkUnreachable,
		syscall.ETIMEDOUT: tunnel.TimedOut, syscall.EPERM: tunnel.NotPermitted, syscall.EAFNOSUPPORT: tunnel.NetworkUnreachable, syscall.EIO: tunnel.Internal,
	} {
		if err := explain("x", errno); tunnel.CodeOf(err) != code || !errors.Is(err, errno) {
			t.Errorf("%v: %v", errno, err)
		}
	}
}

// fakes for Resolve

type names struct {
	mu    sync.Mutex
	asked int
	wait  chan struct{} // nil: at once
	addrs map[string][]netip.Addr
	err   error
}

func (n *names) LookupNetIP(ctx context.Context, _, host string) ([]netip.Addr, error) {
	n.mu.Lock()
	n.asked++
	n.mu.Unlock()
	if n.wait != nil {
		select {
		case <-n.wait:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
	if a, ok := n.addrs[host]; ok {
		return slices.Clone(a), nil
	}
	if n.err != nil {
		return nil, n.err
	}
	return nil, &net.DNSError{Err: "no such host", Name: host, IsNotFound: true}
}

type nextStage struct {
	stream func(ctx context.Context, to tunnel.Target) (tunnel.Stream, error)
	send   func(p []byte, to tunnel.Target) error
}

func (n *nextStage) OpenStream(ctx context.Context, _ tunnel.Peer, to tunnel.Target) (tunnel.Stream, error) {
	return n.stream(ctx, to)
}
func (n *nextStage) OpenPackets(_ tunnel.Peer, r tunnel.Receiver) (tunnel.Packets, error) {
	return nextPackets{n}, nil
}

type nextPackets struct{ *nextStage }

func (n nextPackets) Send(p []byte, to tunnel.Target) error { return n.send(p, to) }
func (nextPackets) Flush()                                  {}
func (nextPackets) Close() error                            { return nil }
