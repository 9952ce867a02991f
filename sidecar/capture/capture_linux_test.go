//go:build linux && (amd64 || arm64 || arm || riscv64)

package capture

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"culvert/sidecar/capture/rules"
	"culvert/tunnel"
)

const patience = 20 * time.Second

// place is a network namespace with a Capture and rules in it. Whatever opens a
// socket or starts a program in it goes through do.
type place struct {
	t    *testing.T
	work chan func()
	next *far
	c    *Capture
}

// newPlace makes one with the addresses 198.18.0.1 and fd00:18::1 and default
// routes; change may alter the configuration and the rules.
func newPlace(t *testing.T, change func(*Config, *rules.Rules)) *place {
	t.Helper()
	p := &place{t: t, work: make(chan func()), next: &far{}}
	ready := make(chan error)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread ends with the goroutine
		err := unix.Unshare(unix.CLONE_NEWNET)
		ready <- err
		if err == nil {
			for f := range p.work {
				f()
			}
		}
	}()
	if err := <-ready; err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatalf("CI=true says that nothing may be left out: %v", err)
		}
		t.Skipf("needs root and network namespaces: %v", err)
	}
	t.Cleanup(func() { close(p.work) })
	for _, c := range []string{
		"ip link set lo up", "ip link add v0 type veth peer name v1", "ip link set v0 up", "ip link set v1 up",
		"ip addr add 198.18.0.1/24 dev v0", "ip -6 addr add fd00:18::1/64 dev v0 nodad",
		"ip route add default via 198.18.0.254", "ip -6 route add default dev v0",
	} {
		p.sh(c)
	}
	r := rules.Rules{All: true}
	cfg := Config{Next: p.next}
	p.do(func() {
		var err error
		if cfg.Sockets, err = Listen(DefaultPort, rules.OwnMark); err != nil {
			t.Error(err)
			return
		}
		r.Port = cfg.Sockets.Port()
		if change != nil {
			change(&cfg, &r)
		}
		if err := rules.On(r); err != nil {
			t.Error(err)
		}
	})
	if t.Failed() {
		t.FailNow()
	}
	var err error
	if p.c, err = New(cfg); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	ran := make(chan error, 1)
	go func() { ran <- p.c.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-ran; err != nil {
			t.Errorf("Run: %v", err)
		}
		if open := p.next.open(); open != 0 {
			t.Errorf("%d associations are left open", open)
		}
	})
	return p
}

func (p *place) do(f func()) {
	done := make(chan struct{})
	p.work <- func() { defer close(done); f() }
	<-done
}

func (p *place) sh(command string) {
	p.t.Helper()
	p.do(func() {
		if out, err := exec.Command("sh", "-c", command).CombinedOutput(); err != nil {
			p.t.Errorf("%s: %v\n%s", command, err, out)
		}
	})
}

// udp is an app's socket; remote may be empty.
func (p *place) udp(local, remote string) *net.UDPConn {
	p.t.Helper()
	var c *net.UDPConn
	p.do(func() {
		var err error
		if remote != "" {
			c, err = net.DialUDP("udp", udpAddr(local), udpAddr(remote))
		} else {
			c, err = net.ListenUDP("udp", udpAddr(local))
		}
		if err != nil {
			p.t.Error(err)
		}
	})
	if c == nil {
		p.t.FailNow()
	}
	p.t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(patience))
	return c
}

func udpAddr(s string) *net.UDPAddr {
	if s == "" {
		return nil
	}
	return net.UDPAddrFromAddrPort(netip.MustParseAddrPort(s))
}

func (p *place) tcp(remote string) (*net.TCPConn, error) {
	var c net.Conn
	var err error
	p.do(func() { c, err = net.DialTimeout("tcp", remote, patience) })
	if err != nil {
		return nil, err
	}
	p.t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(patience))
	return c.(*net.TCPConn), nil
}

// far is where captured traffic goes: it echoes.
type far struct {
	mu      sync.Mutex
	refuse  error
	mute    bool       // what is opened from now on answers nothing
	denied  netip.Addr // Send refuses it
	reports bool       // and reports it, as policy's guard does
	assocs  []*assoc
	opened  int
	closed  int
	last    tunnel.Target // of a stream
}

func (f *far) open() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.opened - f.closed
}

// all are the associations that were opened.
func (f *far) all() []*assoc {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.assocs)
}

func (f *far) set(change func(*far)) {
	f.mu.Lock()
	defer f.mu.Unlock()
	change(f)
}

func (f *far) OpenPackets(by tunnel.Peer, r tunnel.Receiver) (tunnel.Packets, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.refuse != nil {
		return nil, f.refuse
	}
	a := &assoc{f: f, by: by, r: r, quiet: f.mute}
	f.opened++
	f.assocs = append(f.assocs, a)
	return a, nil
}

func (f *far) OpenStream(_ context.Context, by tunnel.Peer, to tunnel.Target) (tunnel.Stream, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.refuse != nil {
		return nil, f.refuse
	}
	f.last = to
	near, other := pipe()
	go func() {
		io.Copy(other, other)
		other.CloseWrite()
		other.Close()
	}()
	return near, nil
}

type assoc struct {
	f     *far
	by    tunnel.Peer
	r     tunnel.Receiver
	mu    sync.Mutex
	to    []tunnel.Target
	quiet bool
}

func (a *assoc) Send(p []byte, to tunnel.Target) error {
	a.f.mu.Lock()
	denied, reports := a.f.denied, a.f.reports
	a.f.mu.Unlock()
	if to.Addr == denied {
		err := tunnel.Errorf(tunnel.PolicyDenied, "%v is not allowed", to)
		if reports {
			a.r.Unreachable(to.AddrPort(), err)
		}
		return err
	}
	a.mu.Lock()
	if !slices.Contains(a.to, to) {
		a.to = append(a.to, to)
	}
	quiet := a.quiet
	a.mu.Unlock()
	if !quiet {
		a.r.Deliver(p, to.AddrPort())
	}
	return nil
}

func (a *assoc) Flush() {}

func (a *assoc) Close() error {
	a.f.mu.Lock()
	defer a.f.mu.Unlock()
	a.f.closed++
	return nil
}

func (a *assoc) targets() []tunnel.Target {
	a.mu.Lock()
	defer a.mu.Unlock()
	return slices.Clone(a.to)
}

// pipe is a TCP connection over loopback, as two streams.
func pipe() (a, b *stream) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		panic(err)
	}
	defer l.Close()
	c, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		panic(err)
	}
	d, err := l.Accept()
	if err != nil {
		panic(err)
	}
	return &stream{TCPConn: c.(*net.TCPConn)}, &stream{TCPConn: d.(*net.TCPConn)}
}

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(patience); !ok(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("not so after %v: %s", patience, what)
		}
	}
}

func TestASocketIsOneAssociationWhateverItSendsTo(t *testing.T) {
	for name, c := range map[string]struct{ local, one, two, third string }{
		"IPv4": {"198.18.0.1:0", "203.0.113.9:3478", "192.0.2.44:50000", "198.51.100.3:9"},
		"IPv6": {"[fd00:18::1]:0", "[2001:db8::9]:3478", "[2001:db8:4::4]:50000", "[2001:db8::3]:9"},
	} {
		t.Run(name, func(t *testing.T) {
			p := newPlace(t, nil)
			app := p.udp(c.local, "")
			b := make([]byte, 2000)
			for i, to := range []string{c.one, c.two, c.one} {
				msg := fmt.Appendf(nil, "datagram %d", i)
				if _, err := app.WriteTo(msg, udpAddr(to)); err != nil {
					t.Fatal(err)
				}
				n, from, err := app.ReadFromUDPAddrPort(b)
				if err != nil || !bytes.Equal(b[:n], msg) || from.String() != to {
					t.Fatalf("%q from %v, %v; sent %q to %v; %+v", b[:n], from, err, msg, to, p.c.Stats())
				}
			}
			if len(p.next.all()) != 1 {
				t.Fatalf("%d associations", len(p.next.all()))
			}
			a := p.next.all()[0]
			if a.by.Addr.String() != app.LocalAddr().String() {
				t.Errorf("it is for %v, the app's socket is %v", a.by.Addr, app.LocalAddr())
			}
			if got := a.targets(); len(got) != 2 || got[0].AddrPort().String() != c.one {
				t.Errorf("sent to %v", got)
			}
			// From whom the app has never heard, as ICE's peers send.
			a.r.Deliver([]byte("hello"), netip.MustParseAddrPort(c.third))
			if n, from, err := app.ReadFromUDPAddrPort(b); err != nil || string(b[:n]) != "hello" || from.String() != c.third {
				t.Errorf("%q from %v, %v", b[:n], from, err)
			}
			// The app's answer goes the same way: nothing came from outside.
			if _, err := app.WriteTo([]byte("hello too"), udpAddr(c.third)); err != nil {
				t.Fatal(err)
			}
			eventually(t, "the answer is captured", func() bool { return len(a.targets()) == 3 })
			if server, network, ok := p.c.Server(a.by.Addr); !ok || network != "udp" || server.String() != c.one {
				t.Errorf("its server is %v %v %v", server, network, ok)
			}
		})
	}
}

func TestDatagramsOfEverySizePass(t *testing.T) {
	p := newPlace(t, nil)
	app := p.udp("198.18.0.1:0", "203.0.113.9:3478")
	b := make([]byte, 1<<16)
	for _, size := range []int{0, 1, 1200, 1473, 9000, 65507} {
		msg := bytes.Repeat([]byte{byte(size)}, size)
		if _, err := app.Write(msg); err != nil {
			t.Fatal(err)
		}
		if n, err := app.Read(b); err != nil || !bytes.Equal(b[:n], msg) {
			t.Fatalf("%d bytes came back as %d, %v; %+v", size, n, err, p.c.Stats())
		}
	}
}

func TestAConnectionGoesWhereTheAppWanted(t *testing.T) {
	p := newPlace(t, nil)
	for _, to := range []string{"203.0.113.9:443", "[2001:db8::9]:8443"} {
		c, err := p.tcp(to)
		if err != nil {
			t.Fatal(err)
		}
		sent := bytes.Repeat([]byte("0123456789abcdef"), 1<<14)
		go func() {
			c.Write(sent)
			c.CloseWrite()
		}()
		if got, err := io.ReadAll(c); err != nil || !bytes.Equal(got, sent) {
			t.Errorf("%d bytes came back, %v", len(got), err)
		}
		p.next.set(func(f *far) {
			if f.last.AddrPort().String() != to {
				t.Errorf("it went to %v, want %v", f.last, to)
			}
		})
	}
	eventually(t, "no connection is left", func() bool { return p.c.Stats().Open == 0 })
	p.do(func() { // and what the apps got counts as ours
		s, err := rules.Read()
		for _, l := range s.Lines {
			if outside := l.Text == "answers to what came from outside"; err != nil || outside && l.Packets > 0 || l.Text == "the sidecar's own packets" && l.Packets == 0 {
				t.Errorf("%d packets: %s; %v", l.Packets, l.Text, err)
			}
		}
	})
}

func TestAPortThatNeedsAnotherCapabilityIsSaid(t *testing.T) {
	at := netip.MustParseAddrPort("127.0.0.1:80")
	if err := explain(at, os.NewSyscallError("bind", unix.EACCES)); tunnel.CodeOf(err) != tunnel.NotPermitted || !strings.Contains(err.Error(), "CAP_NET_BIND_SERVICE") {
		t.Errorf("%v", err)
	}
	if err := explain(at, os.NewSyscallError("setsockopt", unix.EPERM)); tunnel.CodeOf(err) != tunnel.NotPermitted || !strings.Contains(err.Error(), "CAP_NET_RAW") || !strings.Contains(err.Error(), "5.17") {
		t.Errorf("%v", err)
	}
}

func TestWhatIsRefusedIsRefusedAtOnce(t *testing.T) {
	for name, c := range map[string]struct {
		err   error
		errno syscall.Errno
	}{
		"stopped":   {tunnel.ProxyStopped, syscall.ECONNREFUSED},
		"denied":    {tunnel.Errorf(tunnel.PolicyDenied, "no"), syscall.EHOSTUNREACH},
		"no tunnel": {tunnel.Errorf(tunnel.CloudUnreachable, "no"), syscall.ECONNREFUSED},
	} {
		t.Run(name, func(t *testing.T) {
			p := newPlace(t, nil)
			p.next.set(func(f *far) { f.refuse = c.err })
			app := p.udp("", "203.0.113.9:3478")
			began := time.Now()
			app.Write([]byte("x"))
			if _, err := app.Read(make([]byte, 10)); !errors.Is(err, c.errno) {
				t.Errorf("UDP: %v, want %v", err, c.errno)
			}
			conn, err := p.tcp("203.0.113.9:443")
			if err == nil {
				_, err = conn.Read(make([]byte, 1))
			}
			if !errors.Is(err, syscall.ECONNRESET) {
				t.Errorf("TCP: %v", err)
			}
			if d := time.Since(began); d > patience/4 {
				t.Errorf("it took %v", d)
			}
			// The app may know before it is counted.
			eventually(t, "both are counted, and nothing is left", func() bool {
				s := p.c.Stats()
				return s.Refused[string(tunnel.CodeOf(c.err))] == 2 && s.Relays == 0 && s.Unreachable == 1
			})
			// And passes as soon as it may.
			p.next.set(func(f *far) { f.refuse = nil })
			app.Write([]byte("y"))
			if _, err := app.Read(make([]byte, 10)); err != nil {
				t.Errorf("afterwards: %v", err)
			}
		})
	}
}

func TestADeniedAddressDoesNotEndTheAssociation(t *testing.T) {
	p := newPlace(t, nil)
	p.next.set(func(f *far) { f.denied = netip.MustParseAddr("203.0.113.66") })
	app := p.udp("198.18.0.1:0", "")
	denied := p.udp("198.18.0.1:0", "203.0.113.66:1")
	denied.Write([]byte("x"))
	if _, err := denied.Read(make([]byte, 9)); !errors.Is(err, syscall.EHOSTUNREACH) {
		t.Errorf("%v", err)
	}
	app.WriteTo([]byte("x"), udpAddr("203.0.113.66:1"))
	app.WriteTo([]byte("y"), udpAddr("203.0.113.9:1"))
	b := make([]byte, 9)
	if n, _, err := app.ReadFromUDPAddrPort(b); err != nil || string(b[:n]) != "y" {
		t.Errorf("%q, %v", b[:n], err)
	}
	if s := p.c.Stats(); s.Dropped["policy_denied"] != 2 || s.Associations != 2 {
		t.Errorf("%+v", s)
	}
}

// Who refuses may report it as well; an app that hears twice of one datagram takes
// the second for an answer to its next, which goes elsewhere.
func TestOfOneDatagramAnAppHearsOnce(t *testing.T) {
	for _, reports := range []bool{false, true} {
		p := newPlace(t, func(c *Config, _ *rules.Rules) { c.DNS = netip.MustParseAddrPort("192.0.2.53:53") })
		p.next.set(func(f *far) { f.denied, f.reports = netip.MustParseAddr("192.0.2.53"), reports })
		app := p.udp("198.18.0.1:0", "203.0.113.1:53")
		for i := range uint64(3) {
			app.Write([]byte("query"))
			if _, err := app.Read(make([]byte, 9)); !errors.Is(err, syscall.EHOSTUNREACH) {
				t.Errorf("reported %v: %v", reports, err)
			}
			eventually(t, "it is counted", func() bool {
				s := p.c.Stats()
				return s.Dropped["policy_denied"] == i+1 && s.Unreachable > i
			})
			if s := p.c.Stats(); s.Unreachable != i+1 {
				t.Errorf("reported %v: an app heard %d times of %d datagrams", reports, s.Unreachable, i+1)
			}
		}
	}
}

func TestAnAnswerComesFromTheServerThatWasAsked(t *testing.T) {
	one, two, chosen := netip.MustParseAddrPort("198.51.100.1:53"), netip.MustParseAddrPort("198.51.100.2:53"), netip.MustParseAddrPort("192.0.2.53:53")
	query := func(i int) []byte { return []byte{byte(i >> 8), byte(i), 1, 0} }
	var d dnsAsked
	if got := d.server(query(1), chosen); got != chosen {
		t.Errorf("nobody was asked, and %v answers", got)
	}
	// One query to two servers at once, as musl's resolver has it.
	d.note(query(7), one)
	d.note(query(7), two)
	a, b, again := d.server(query(7), chosen), d.server(query(7), chosen), d.server(query(7), chosen)
	if a == b || a != one && a != two || b != one && b != two || again != one && again != two {
		t.Errorf("%v and %v and %v have answered", a, b, again)
	}
	// More at once than are remembered.
	for i := range 100 {
		d.note(query(1000+i), one)
	}
	for i := range 100 {
		if got := d.server(query(1000+i), chosen); got != one {
			t.Fatalf("%v answers query %d", got, i)
		}
	}
}

func TestDNSGoesToTheChosenServerAndComesBackFromTheAskedOne(t *testing.T) {
	server := netip.MustParseAddrPort("192.0.2.53:53")
	p := newPlace(t, func(c *Config, r *rules.Rules) {
		c.DNS, r.DNS = server, true
		r.Except = []netip.Prefix{netip.MustParsePrefix("198.18.0.0/15")}
	})
	for _, asked := range []string{"127.0.0.53:53", "198.18.0.254:53", "203.0.113.1:53", "[::1]:53"} {
		app := p.udp("", asked) // connected: it takes answers from nobody else
		app.Write([]byte("\x12\x34query"))
		b := make([]byte, 20)
		if n, err := app.Read(b); err != nil || string(b[:n]) != "\x12\x34query" {
			t.Errorf("asked %s: %q, %v", asked, b[:n], err)
		}
		c, err := p.tcp(asked)
		if err != nil {
			t.Errorf("asked %s: %v", asked, err)
			continue
		}
		c.Write([]byte("query"))
		if _, err := io.ReadFull(c, b[:5]); err != nil || string(b[:5]) != "query" {
			t.Errorf("asked %s by TCP: %q, %v", asked, b[:5], err)
		}
		p.next.set(func(f *far) {
			if f.last.AddrPort() != server {
				t.Errorf("it went to %v", f.last)
			}
		})
	}
	for _, a := range p.next.all() {
		if got := a.targets(); len(got) != 1 || got[0].AddrPort() != server {
			t.Errorf("asked %v", got)
		}
	}
}

func TestTrafficToThePortItselfIsRefused(t *testing.T) {
	p := newPlace(t, nil)
	for _, host := range []string{"127.0.0.1", "::1"} {
		at := net.JoinHostPort(host, fmt.Sprint(DefaultPort))
		app := p.udp("", at)
		app.Write([]byte("x"))
		if _, err := app.Read(make([]byte, 10)); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("UDP to %s: %v", at, err)
		}
		c, err := p.tcp(at)
		if err == nil {
			_, err = c.Read(make([]byte, 1))
		}
		if !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("TCP to %s: %v", at, err)
		}
	}
	if s := p.c.Stats(); s.Dropped["not_captured"] != 2 || s.Refused["not_permitted"] != 2 || s.Associations != 0 {
		t.Errorf("%+v", s)
	}
}

func TestASecondSidecarIsTold(t *testing.T) {
	p := newPlace(t, nil)
	p.do(func() {
		s, err := Listen(DefaultPort, rules.OwnMark)
		if tunnel.CodeOf(err) != tunnel.ConfigInvalid || !strings.Contains(err.Error(), "127.0.0.1:1443") {
			t.Errorf("%v", err)
		}
		if err == nil {
			s.Close()
		}
	})
}

// The ways on which nothing must be captured. The namespace's other end does not
// exist, so what leaves it is seen by its counters alone: the rule's.
func TestOwnPacketsAndAnswersAreLeftAlone(t *testing.T) {
	p := newPlace(t, nil)
	count := func(line string) (n uint64) {
		p.do(func() {
			s, err := rules.Read()
			if err != nil {
				t.Error(err)
			}
			for _, l := range s.Lines {
				if l.Text == line {
					n = l.Packets
				}
			}
		})
		return n
	}
	p.do(func() { // the sidecar's own
		c, err := (&net.ListenConfig{Control: Protect(rules.OwnMark)}).ListenPacket(t.Context(), "udp", "198.18.0.1:0")
		if err != nil {
			t.Error(err)
			return
		}
		defer c.Close()
		c.WriteTo([]byte("x"), udpAddr("203.0.113.9:443"))
	})
	if n := count("the sidecar's own packets"); n != 1 {
		t.Errorf("%d marked packets were left alone, want 1", n)
	}
	for _, c := range []struct{ line, to string }{
		{"to this machine itself", "198.18.0.1:9"},
		{"to broadcast", "198.18.0.255:9"},
		{"to multicast", "224.0.0.251:5353"},
		{"to the own link, 169.254.0.0/16", "169.254.1.1:9"},
		{"to the own link, fe80::/10", "[fe80::1%v0]:9"},
		{"answers to what came from outside", ""}, // the last: it takes the network away
	} {
		line, to := c.line, c.to
		before := count(line)
		if to == "" {
			// Somebody outside talks to a server here: its answer is not captured.
			server := p.udp("198.18.0.1:7777", "")
			p.sh(`ip netns del culvert-capture-out 2>/dev/null; ip netns add culvert-capture-out && ip link set v1 netns culvert-capture-out &&
				ip -n culvert-capture-out addr add 198.18.0.2/24 dev v1 && ip -n culvert-capture-out link set v1 up && ip -n culvert-capture-out link set lo up`)
			p.sh(`ip netns exec culvert-capture-out sh -c 'printf hello | nc -u -w1 198.18.0.1 7777 >/dev/null' & true`)
			b := make([]byte, 10)
			n, from, err := server.ReadFromUDPAddrPort(b)
			if err != nil || string(b[:n]) != "hello" {
				t.Fatalf("%q, %v", b[:n], err)
			}
			server.WriteToUDPAddrPort([]byte("hi"), from)
			p.sh("ip netns del culvert-capture-out")
		} else {
			app := p.udp(map[bool]string{true: "[::]:0", false: "198.18.0.1:0"}[strings.Contains(to, "fe80")], "")
			raw, _ := app.SyscallConn()
			raw.Control(func(fd uintptr) { unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_BROADCAST, 1) })
			var addr *net.UDPAddr
			p.do(func() { addr, _ = net.ResolveUDPAddr("udp", to) })
			if _, err := app.WriteTo([]byte("x"), addr); err != nil {
				t.Errorf("to %s: %v", to, err)
			}
		}
		if after := count(line); after <= before {
			t.Errorf("%s: nothing was counted", line)
		}
	}
	if s := p.c.Stats(); s.Associations != 0 {
		t.Errorf("captured: %+v", s)
	}
}

// What can not be brought to the sidecar does not leave beside it.
func TestWhatIsMarkedLeavesNowhereElse(t *testing.T) {
	p := newPlace(t, nil)
	for _, c := range []struct{ name, local, to string }{
		{"IPv4", "198.18.0.1:0", "203.0.113.9:3478"},
		{"IPv6", "[fd00:18::1]:0", "[2001:db8::9]:3478"},
	} {
		bound := p.udp(c.local, "")
		raw, _ := bound.SyscallConn()
		raw.Control(func(fd uintptr) {
			if err := unix.BindToDevice(int(fd), "v0"); err != nil {
				t.Error(err)
			}
		})
		if _, err := bound.WriteTo([]byte("x"), udpAddr(c.to)); !errors.Is(err, unix.EPERM) {
			t.Errorf("%s, from a socket that is bound to a device: %v", c.name, err)
		}
	}
	p.sh(fmt.Sprintf("ip -4 rule del priority %d; ip -6 rule del priority %[1]d", rules.RouteTable))
	for _, c := range []struct{ name, local, to string }{
		{"IPv4", "198.18.0.1:0", "203.0.113.9:3478"},
		{"IPv6", "[fd00:18::1]:0", "[2001:db8::9]:3478"},
	} {
		if _, err := p.udp(c.local, "").WriteTo([]byte("x"), udpAddr(c.to)); !errors.Is(err, unix.EPERM) {
			t.Errorf("%s, without the routing rule: %v", c.name, err)
		}
	}
	if s := p.c.Stats(); s.Associations != 0 {
		t.Errorf("%+v", s)
	}
}

// The kernel answers what comes for a socket that is gone, and quotes it. The
// answer must not leave: it is in clear.
func TestWhatComesForAnAppThatHasGoneIsNotAnswered(t *testing.T) {
	p := newPlace(t, nil)
	p.sh(`nft add table inet seen; nft 'add chain inet seen out { type filter hook postrouting priority 0; }'
		nft 'add rule inet seen out icmp type destination-unreachable counter'
		nft 'add rule inet seen out icmpv6 type destination-unreachable counter'`)
	b := make([]byte, 100)
	for _, c := range []struct{ local, to string }{
		{"198.18.0.1:0", "203.0.113.9:3478"}, {"[fd00:18::1]:0", "[2001:db8::9]:3478"},
	} {
		app := p.udp(c.local, "")
		if _, err := app.WriteTo([]byte("x"), udpAddr(c.to)); err != nil {
			t.Fatal(err)
		}
		if _, err := app.Read(b); err != nil {
			t.Fatal(err)
		}
		all := p.next.all()
		app.Close()
		all[len(all)-1].r.Deliver([]byte("a secret"), netip.MustParseAddrPort(c.to))
	}
	p.do(func() {
		out, err := exec.Command("nft", "list", "table", "inet", "seen").CombinedOutput()
		if err != nil || strings.Count(string(out), "destination-unreachable counter packets 0 bytes 0") != 2 {
			t.Errorf("%v: it was told outside:\n%s", err, out)
		}
	})
}

func TestAConnectionThatWasOpenBeforeStays(t *testing.T) {
	p := newPlace(t, nil)
	p.do(func() { rules.Off() })
	p.sh(`ip netns del culvert-capture-old 2>/dev/null; ip netns add culvert-capture-old && ip link set v1 netns culvert-capture-old &&
		ip -n culvert-capture-old addr add 198.18.0.2/24 dev v1 && ip -n culvert-capture-old link set v1 up && ip -n culvert-capture-old link set lo up`)
	t.Cleanup(func() { exec.Command("ip", "netns", "del", "culvert-capture-old").Run() })
	cat := exec.Command("ip", "netns", "exec", "culvert-capture-old", "sh", "-c", "mkfifo \"$1\" && exec 3<>\"$1\" && exec nc -l 7778 <&3 >&3", "sh", filepath.Join(t.TempDir(), "echo"))
	if err := cat.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cat.Process.Kill(); cat.Wait() })
	var c *net.TCPConn
	eventually(t, "a server outside is there", func() (ok bool) {
		var err error
		c, err = p.tcp("198.18.0.2:7778")
		return err == nil
	})
	p.do(func() {
		if err := rules.On(rules.Rules{Port: DefaultPort, All: true}); err != nil {
			t.Error(err)
		}
	})
	b := make([]byte, 5)
	c.Write([]byte("hello"))
	if _, err := io.ReadFull(c, b); err != nil || string(b) != "hello" {
		t.Errorf("%q, %v", b, err)
	}
	if s := p.c.Stats(); s.Streams != 0 {
		t.Errorf("captured: %+v", s)
	}
	c.Close()
}

func TestAFloodOfSourcesEndsThoseThatNeverHadAnAnswer(t *testing.T) {
	const most = 64
	p := newPlace(t, func(c *Config, _ *rules.Rules) { c.MaxSources = most })
	call := p.udp("198.18.0.1:0", "203.0.113.9:3478")
	call.Write([]byte("x"))
	if _, err := call.Read(make([]byte, 9)); err != nil {
		t.Fatal(err)
	}
	p.next.set(func(f *far) { f.mute = true })
	for i := range 5 * most {
		app := p.udp("198.18.0.1:0", "203.0.113.9:9")
		app.Write([]byte("flood"))
		eventually(t, "it is passed on", func() bool { return p.c.Stats().Up == uint64(i+2) })
		app.Close()
	}
	s := p.c.Stats()
	if s.Relays > most || s.Evicted < 2*most {
		t.Errorf("%+v", s)
	}
	call.Write([]byte("y"))
	if _, err := call.Read(make([]byte, 9)); err != nil {
		t.Fatal(err)
	}
	if got := p.c.Stats().Associations; got != s.Associations {
		t.Error("the call had to open a new association")
	}
	eventually(t, "what was evicted is closed", func() bool { return p.next.open() == p.c.Stats().Relays })
}

func TestAFloodOfSourcesLeavesRoomForOthers(t *testing.T) {
	p := newPlace(t, nil)
	p.next.set(func(f *far) { f.mute = true })
	r := &reader{c: p.c}
	to := netip.MustParseAddrPort("203.0.113.9:9")
	began := time.Now()
	const sent = 6 * newSources
	for i := range sent {
		r.TakeFor([]byte("flood"), netip.AddrPortFrom(netip.MustParseAddr("198.18.0.1"), uint16(1000+i)), to)
	}
	r.Flush()
	s, most := p.c.Stats(), 2*newSources+int(time.Since(began).Seconds()*newSources)+1
	if int(s.Associations) > most || int(s.Associations+s.Refused["limit_exceeded"]) != sent {
		t.Errorf("%d of %d were taken, at most %d may be: %+v", s.Associations, sent, most, s)
	}
}

func TestAnIdleSocketsAssociationEnds(t *testing.T) {
	p := newPlace(t, nil)
	idle, busy := p.udp("198.18.0.1:0", "203.0.113.9:3478"), p.udp("198.18.0.1:0", "203.0.113.9:3478")
	b := make([]byte, 9)
	for _, app := range []*net.UDPConn{idle, busy} {
		app.Write([]byte("x"))
		if _, err := app.Read(b); err != nil {
			t.Fatal(err)
		}
	}
	p.c.tick.Store(100)
	busy.Write([]byte("x"))
	busy.Read(b)
	p.c.sweep(100)
	if n := p.c.Stats().Relays; n != 2 {
		t.Errorf("%d associations after 100 s", n)
	}
	p.c.sweep(121)
	eventually(t, "the idle one has ended", func() bool { return p.next.open() == 1 && p.c.Stats().Relays == 1 })
	idle.Write([]byte("z"))
	if n, err := idle.Read(b); err != nil || string(b[:n]) != "z" {
		t.Errorf("it can not be used again: %q, %v", b[:n], err)
	}
}

func TestAnAssociationEndsWithItsSocket(t *testing.T) {
	var mu sync.Mutex // guards sockets
	sockets := map[netip.AddrPort]uint32{}
	p := newPlace(t, func(c *Config, _ *rules.Rules) {
		c.Socket = func(app, server netip.AddrPort) (uint32, bool) {
			if server.String() != "203.0.113.9:3478" {
				t.Errorf("asked for one that has sent to %v", server)
			}
			mu.Lock()
			defer mu.Unlock()
			n, ok := sockets[app]
			return n, ok
		}
	})
	const stays, closed, another, unnamed, talks = 0, 1, 2, 3, 4
	var apps []*net.UDPConn
	b := make([]byte, 9)
	for i := range 5 {
		app := p.udp("198.18.0.1:0", "203.0.113.9:3478")
		apps = append(apps, app)
		app.Write([]byte("x"))
		if _, err := app.Read(b); err != nil {
			t.Fatal(err)
		}
		sockets[addrOf(app)] = uint32(100 + i)
	}
	p.c.tick.Store(100)
	for _, app := range apps {
		app.Write([]byte("x"))
		if _, err := app.Read(b); err != nil {
			t.Fatal(err)
		}
	}
	p.c.sweep(104)
	if n := p.c.Stats().Relays; n != 5 {
		t.Fatalf("%d associations while all are open", n)
	}
	mu.Lock()
	delete(sockets, addrOf(apps[closed]))
	sockets[addrOf(apps[another])] = 999
	sockets[addrOf(apps[unnamed])] = 0
	delete(sockets, addrOf(apps[talks]))
	mu.Unlock()
	p.c.tick.Store(107)
	apps[talks].Write([]byte("x"))
	if _, err := apps[talks].Read(b); err != nil {
		t.Fatal(err)
	}
	// What comes for a socket does not keep it.
	p.next.all()[closed].r.Deliver([]byte("y"), netip.MustParseAddrPort("203.0.113.9:3478"))
	p.c.sweep(108)
	eventually(t, "two have ended", func() bool { return p.next.open() == 3 && p.c.Stats().Relays == 3 })
	for i, app := range apps {
		if _, _, open := p.c.Server(addrOf(app)); open != (i == stays || i == unnamed || i == talks) {
			t.Errorf("association %d: %v", i, open)
		}
	}
}

func TestAnAssociationThatEndsByItselfIsOpenedAgain(t *testing.T) {
	p := newPlace(t, nil)
	app := p.udp("198.18.0.1:0", "203.0.113.9:3478")
	b := make([]byte, 9)
	for i := range 3 {
		app.Write([]byte("x"))
		if _, err := app.Read(b); err != nil {
			t.Fatal(err)
		}
		p.next.all()[i].r.Closed(tunnel.ProxyStopped)
	}
	if s := p.c.Stats(); s.Associations != 3 || s.Relays != 0 {
		t.Errorf("%+v", s)
	}
	p.next.set(func(f *far) { f.assocs = nil })
	app.Write([]byte("x"))
	app.Read(b)
	p.next.all()[0].r.Unreachable(netip.MustParseAddrPort("203.0.113.9:3478"), tunnel.Errorf(tunnel.ConnectionRefused, "ICMP"))
	if _, err := app.Read(b); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("an ICMP error came as %v", err)
	}
}

func TestADatagramCostsNoAllocation(t *testing.T) {
	if raceEnabled {
		t.Skip("the race detector makes sync.Pool drop at random")
	}
	p := newPlace(t, nil)
	app := p.udp("198.18.0.1:0", "203.0.113.9:3478")
	app.Write([]byte("x"))
	if _, err := app.Read(make([]byte, 9)); err != nil {
		t.Fatal(err)
	}
	p.next.set(func(f *far) { f.assocs[0].mute() })
	r := &reader{c: p.c}
	from, to, msg := addrOf(app), netip.MustParseAddrPort("203.0.113.9:3478"), make([]byte, 800)
	if n := testing.AllocsPerRun(1000, func() {
		r.TakeFor(msg, from, to)
		r.Flush()
	}); n != 0 {
		t.Errorf("%v allocations for one from the app", n)
	}
	back := p.next.all()[0].r
	if n := testing.AllocsPerRun(1000, func() { back.Deliver(msg, to) }); n != 0 {
		t.Errorf("%v allocations for one to the app", n)
	}
}

func (a *assoc) mute() {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.quiet = true
}

func addrOf(c *net.UDPConn) netip.AddrPort { return c.LocalAddr().(*net.UDPAddr).AddrPort() }

func TestBadConfigurationsAreNamed(t *testing.T) {
	for want, c := range map[string]Config{
		"Sockets": {Next: &far{}},
		"Next":    {Sockets: &Sockets{}},
		"Idle":    {Sockets: &Sockets{}, Next: &far{}, Idle: -1},
	} {
		if _, err := New(c); tunnel.CodeOf(err) != tunnel.ConfigInvalid || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", want, err)
		}
	}
}
