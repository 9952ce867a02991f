package sidecar

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"culvert/tunnel"
)

// frontPatience bounds every wait for something that must happen. It is far
// more than that takes on a busy machine.
const frontPatience = time.Minute

// frontDirect is an Opener that uses the network of this machine. Names are
// looked up in hosts.
type frontDirect struct {
	alias netip.Addr // stands for 127.0.0.1, both ways, where it is valid
	hosts map[string]netip.Addr
	fail  error                                                       // of every stream
	open  func(context.Context, tunnel.Target) (tunnel.Stream, error) // instead of dialling

	mu      sync.Mutex
	targets []tunnel.Target
	peers   []tunnel.Peer
	relays  []*frontRelay
}

func (o *frontDirect) resolve(to tunnel.Target) (netip.AddrPort, error) {
	if to.Host == "" && to.Addr == o.alias {
		return netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), to.Port), nil
	}
	if to.Host == "" {
		return to.AddrPort(), nil
	}
	if a, ok := o.hosts[to.Host]; ok {
		return netip.AddrPortFrom(a, to.Port), nil
	}
	return netip.AddrPort{}, tunnel.Errorf(tunnel.NameUnresolved, "there is no %q", to.Host)
}

func (o *frontDirect) OpenStream(ctx context.Context, by tunnel.Peer, to tunnel.Target) (tunnel.Stream, error) {
	o.mu.Lock()
	o.targets, o.peers = append(o.targets, to), append(o.peers, by)
	o.mu.Unlock()
	switch {
	case o.fail != nil:
		return nil, o.fail
	case o.open != nil:
		return o.open(ctx, to)
	}
	addr, err := o.resolve(to)
	if err != nil {
		return nil, err
	}
	c, err := new(net.Dialer).DialContext(ctx, "tcp", addr.String())
	if err != nil {
		return nil, err
	}
	return &frontStream{TCPConn: c.(*net.TCPConn)}, nil
}

func (o *frontDirect) lastTarget() tunnel.Target {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.targets[len(o.targets)-1]
}

func (o *frontDirect) relay() *frontRelay {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.relays[len(o.relays)-1]
}

func (o *frontDirect) OpenPackets(by tunnel.Peer, r tunnel.Receiver) (tunnel.Packets, error) {
	if o.fail != nil {
		return nil, o.fail
	}
	c, err := net.ListenUDP("udp", nil)
	if err != nil {
		return nil, err
	}
	p := &frontRelay{o: o, by: by, r: r, c: c, closed: make(chan struct{})}
	o.mu.Lock()
	o.relays, o.peers = append(o.relays, p), append(o.peers, by)
	o.mu.Unlock()
	go func() {
		buf := make([]byte, 1<<16)
		for {
			n, from, err := c.ReadFromUDPAddrPort(buf)
			if err != nil {
				return
			}
			addr := from.Addr().Unmap()
			if o.alias.IsValid() {
				addr = o.alias
			}
			r.Deliver(buf[:n], netip.AddrPortFrom(addr, from.Port()))
		}
	}()
	return p, nil
}

// frontRelay is one association of frontDirect.
type frontRelay struct {
	o       *frontDirect
	by      tunnel.Peer
	r       tunnel.Receiver
	c       *net.UDPConn
	once    sync.Once
	closed  chan struct{}
	flushes atomic.Int64
	sent    atomic.Int64
	last    atomic.Pointer[tunnel.Target]
	fail    atomic.Pointer[tunnel.Error]
}

func (p *frontRelay) Send(b []byte, to tunnel.Target) error {
	p.sent.Add(1)
	p.last.Store(&to)
	if err := p.fail.Load(); err != nil {
		return err
	}
	addr, err := p.o.resolve(to)
	if err != nil {
		return err
	}
	p.c.WriteToUDPAddrPort(b, addr)
	return nil
}

func (p *frontRelay) Flush() { p.flushes.Add(1) }

func (p *frontRelay) Close() error {
	p.once.Do(func() { close(p.closed); p.c.Close() })
	return nil
}

type frontStream struct {
	*net.TCPConn
	aborted atomic.Bool
}

func (s *frontStream) Abort(error) {
	s.aborted.Store(true)
	s.SetLinger(0)
	s.Close()
}

// frontStart runs a front until the test ends.
func frontStart(t testing.TB, next tunnel.Opener, change func(*FrontConfig)) *Front {
	t.Helper()
	return frontStartWith(t, next, change, func(*Front) {})
}

func frontStartWith(t testing.TB, next tunnel.Opener, change func(*FrontConfig), adjust func(*Front)) *Front {
	t.Helper()
	c := FrontConfig{Listener: frontListen(t), Next: next}
	if change != nil {
		change(&c)
	}
	f, err := NewFront(c)
	if err != nil {
		t.Fatal(err)
	}
	adjust(f)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- f.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		select {
		case err := <-done:
			if err != nil {
				t.Errorf("Run: %v", err)
			}
		case <-time.After(frontPatience):
			t.Error("Run did not return")
		}
	})
	return f
}

func frontListen(t testing.TB) net.Listener {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// frontFarEnd accepts TCP and gives each connection to serve.
func frontFarEnd(t testing.TB, serve func(*net.TCPConn)) netip.AddrPort {
	t.Helper()
	l := frontListen(t)
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer c.Close()
				serve(c.(*net.TCPConn))
			})
		}
	})
	t.Cleanup(func() { l.Close(); wg.Wait() })
	return tunnel.AddrPortOf(l.Addr())
}

func frontEcho(c *net.TCPConn) {
	io.Copy(c, c)
	c.CloseWrite()
}

func frontDial(t testing.TB, f *Front) *net.TCPConn {
	t.Helper()
	c, err := net.Dial("tcp", f.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(frontPatience))
	return c.(*net.TCPConn)
}

func frontRead(t testing.TB, c io.Reader, n int) []byte {
	t.Helper()
	b := make([]byte, n)
	if _, err := io.ReadFull(c, b); err != nil {
		t.Fatalf("read %d bytes: %v", n, err)
	}
	return b
}

// frontEventually waits for a condition that another goroutine brings about.
func frontEventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(frontPatience); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("did not happen: %s", what)
		}
	}
}

// frontRequestBytes is a SOCKS request without its greeting.
func frontRequestBytes(command byte, to tunnel.Target) []byte {
	b := []byte{5, command, 0}
	if to.Host != "" {
		b = append(append(b, 3, byte(len(to.Host))), to.Host...)
		return append(b, byte(to.Port>>8), byte(to.Port))
	}
	return appendSOCKSAddr(b, to.AddrPort())
}

var frontGreet = []byte{5, 1, 0}

// frontConnect makes a CONNECT and returns the connection after its reply.
func frontConnect(t testing.TB, f *Front, to tunnel.Target) *net.TCPConn {
	t.Helper()
	c := frontDial(t, f)
	c.Write(append(bytes.Clone(frontGreet), frontRequestBytes(1, to)...))
	if got := frontRead(t, c, 2+10); got[1] != 0 || got[3] != 0 {
		t.Fatalf("reply %x", got)
	}
	return c
}

func TestConfigIsChecked(t *testing.T) {
	loopback := frontListen(t)
	defer loopback.Close()
	anywhere, err := net.Listen("tcp", "0.0.0.0:0")
	if err != nil {
		t.Fatal(err)
	}
	defer anywhere.Close()
	next := &frontDirect{}
	for name, tc := range map[string]struct {
		c    FrontConfig
		want string // in the error; empty: none
	}{
		"no listener":               {FrontConfig{Next: next}, "Listener"},
		"no next":                   {FrontConfig{Listener: loopback}, "Next"},
		"negative bound":            {FrontConfig{Listener: loopback, Next: next, MaxConns: -1}, "MaxConns"},
		"open to others":            {FrontConfig{Listener: anywhere, Next: next}, "loopback"},
		"open to others, with auth": {FrontConfig{Listener: anywhere, Next: next, Auth: StaticAuth("u", "p")}, ""},
		"loopback":                  {FrontConfig{Listener: loopback, Next: next}, ""},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := NewFront(tc.c)
			if tc.want == "" {
				if err != nil {
					t.Fatal(err)
				}
				return
			}
			if !errors.Is(err, tunnel.ConfigInvalid) || !strings.Contains(err.Error(), tc.want) {
				t.Fatalf("got %v, want config_invalid naming %s", err, tc.want)
			}
		})
	}
}

func TestStaticAuth(t *testing.T) {
	auth := StaticAuth("user", "secret")
	for _, tc := range []struct {
		user, password string
		want           bool
	}{
		{"user", "secret", true}, {"user", "secre", false}, {"use", "secret", false},
		{"", "", false}, {"secret", "user", false}, {"user", "", false},
	} {
		if got := auth(tc.user, tc.password); got != tc.want {
			t.Errorf("%q %q: %v", tc.user, tc.password, got)
		}
	}
}

// Each way in which a request may be cut into segments.
var frontCuts = map[string]func(c *net.TCPConn, parts ...[]byte){
	"pipelined": func(c *net.TCPConn, parts ...[]byte) { c.Write(bytes.Join(parts, nil)) },
	"byte by byte": func(c *net.TCPConn, parts ...[]byte) {
		for _, b := range bytes.Join(parts, nil) {
			c.Write([]byte{b})
		}
	},
	"half-closed": func(c *net.TCPConn, parts ...[]byte) {
		c.Write(bytes.Join(parts, nil))
		c.CloseWrite()
	},
}

func TestSOCKSConnectReachesItsTarget(t *testing.T) {
	echo := frontFarEnd(t, frontEcho)
	echo6 := netip.AddrPortFrom(netip.MustParseAddr("::1"), echo.Port())
	for name, tc := range map[string]struct {
		asked, want tunnel.Target
	}{
		"IPv4":           {tunnel.TargetOf(echo), tunnel.TargetOf(echo)},
		"IPv6":           {tunnel.TargetOf(echo6), tunnel.TargetOf(echo6)},
		"name":           {tunnel.Target{Host: "echo.example", Port: echo.Port()}, tunnel.Target{Host: "echo.example", Port: echo.Port()}},
		"IPv4 as a name": {tunnel.Target{Host: "127.0.0.1", Port: echo.Port()}, tunnel.TargetOf(echo)},
		"IPv6 as a name": {tunnel.Target{Host: "::1", Port: echo.Port()}, tunnel.TargetOf(echo6)},
	} {
		for cut, send := range frontCuts {
			t.Run(name+", "+cut, func(t *testing.T) {
				next := &frontDirect{open: func(ctx context.Context, _ tunnel.Target) (tunnel.Stream, error) {
					c, err := new(net.Dialer).DialContext(ctx, "tcp", echo.String())
					if err != nil {
						return nil, err
					}
					return &frontStream{TCPConn: c.(*net.TCPConn)}, nil
				}}
				f := frontStart(t, next, nil)
				c := frontDial(t, f)
				send(c, frontGreet, frontRequestBytes(1, tc.asked), []byte("payload"))
				want := append([]byte{5, 0, 5, 0, 0, 1}, 127, 0, 0, 1)
				if got := frontRead(t, c, 12); !bytes.Equal(got[:10], want) {
					t.Fatalf("reply %x, want %x and a port", got, want)
				}
				if got := frontRead(t, c, 7); string(got) != "payload" {
					t.Fatalf("echo %q", got)
				}
				if got := next.lastTarget(); got != tc.want {
					t.Fatalf("target %+v, want %+v", got, tc.want)
				}
				c.CloseWrite()
				if rest, err := io.ReadAll(c); err != nil || len(rest) != 0 {
					t.Fatalf("end: %q, %v", rest, err)
				}
			})
		}
	}
}

func TestFailureIsAnsweredAndClosed(t *testing.T) {
	target := frontRequestBytes(1, tunnel.Target{Host: "a.example", Port: 443})
	with := func(parts ...[]byte) []byte { return bytes.Join(parts, nil) }
	reply := func(code byte) []byte { return []byte{5, code, 0, 1, 0, 0, 0, 0, 0, 0} }
	greeted := func(code byte) []byte { return with([]byte{5, 0}, reply(code)) }
	for name, tc := range map[string]struct {
		send, want []byte
	}{
		"SOCKS4":                    {[]byte{4, 1, 0, 80, 127, 0, 0, 1, 0}, []byte{0, 0x5b, 0, 0, 0, 0, 0, 0}},
		"lower case":                {[]byte("get / HTTP/1.1\r\n\r\n"), nil},
		"TLS":                       {[]byte{0x16, 3, 1, 0, 5}, nil},
		"zero":                      {[]byte{0}, nil},
		"no methods":                {[]byte{5, 0}, []byte{5, 0xff}},
		"only GSSAPI":               {[]byte{5, 1, 1}, []byte{5, 0xff}},
		"wrong version in request":  {with(frontGreet, []byte{4, 1, 0, 1, 1, 2, 3, 4, 0, 80}), []byte{5, 0}},
		"BIND":                      {with(frontGreet, frontRequestBytes(2, tunnel.Target{Host: "a", Port: 1})), greeted(7)},
		"unknown command":           {with(frontGreet, frontRequestBytes(9, tunnel.Target{Host: "a", Port: 1})), greeted(7)},
		"unknown address type":      {with(frontGreet, []byte{5, 1, 0, 2, 1, 2, 3, 4, 0, 80}), greeted(8)},
		"empty name":                {with(frontGreet, []byte{5, 1, 0, 3, 0, 0, 80}), greeted(1)},
		"name with a line break":    {with(frontGreet, frontRequestBytes(1, tunnel.Target{Host: "a\r\nb", Port: 1})), greeted(1)},
		"port 0":                    {with(frontGreet, frontRequestBytes(1, tunnel.Target{Host: "a", Port: 0})), greeted(1)},
		"refused with data waiting": {with(frontGreet, target, make([]byte, 3000)), greeted(2)},
		"association refused":       {with(frontGreet, frontRequestBytes(3, tunnel.Target{Addr: netip.IPv4Unspecified()})), greeted(2)},
	} {
		t.Run(name, func(t *testing.T) {
			f := frontStart(t, &frontDirect{fail: tunnel.PolicyDenied}, nil)
			c := frontDial(t, f)
			c.Write(tc.send)
			got, err := io.ReadAll(c)
			if errors.Is(err, os.ErrDeadlineExceeded) {
				t.Fatal("still open")
			}
			if !bytes.Equal(got, tc.want) {
				t.Fatalf("got %x, want %x", got, tc.want)
			}
		})
	}
}

func TestReplySaysTheTruth(t *testing.T) {
	for code, want := range map[error]struct {
		socks byte
		http  int
	}{
		tunnel.PolicyDenied:       {2, 403},
		tunnel.NotPermitted:       {2, 403},
		tunnel.ProxyStopped:       {2, 503},
		tunnel.NetworkUnreachable: {3, 502},
		tunnel.CloudUnreachable:   {3, 502},
		tunnel.HostUnreachable:    {4, 502},
		tunnel.NameUnresolved:     {4, 502},
		tunnel.ConnectionRefused:  {5, 502},
		tunnel.TimedOut:           {4, 504},
		tunnel.LimitExceeded:      {1, 503},
		tunnel.QuotaExceeded:      {1, 503},
		tunnel.Unsupported:        {7, 501},
		tunnel.Internal:           {1, 500},
		tunnel.Code("new_word"):   {1, 500},
		syscall.ECONNREFUSED:      {5, 502},
	} {
		t.Run(code.Error(), func(t *testing.T) {
			f := frontStart(t, &frontDirect{fail: fmt.Errorf("a sentence\r\nX-Evil: 1: %w", code)}, nil)
			c := frontDial(t, f)
			c.Write(append(bytes.Clone(frontGreet), frontRequestBytes(1, tunnel.Target{Host: "a.example", Port: 1})...))
			if got := frontRead(t, c, 12); got[3] != want.socks {
				t.Errorf("SOCKS reply %d, want %d", got[3], want.socks)
			}
			r, body := frontHTTP(t, f, "CONNECT a.example:1 HTTP/1.1\r\nHost: a.example:1\r\n\r\n")
			if r.StatusCode != want.http {
				t.Errorf("HTTP status %d, want %d", r.StatusCode, want.http)
			}
			if prefix := string(tunnel.CodeOf(code)) + ": a sentence"; !strings.HasPrefix(body, prefix) || strings.Count(body, "\n") != 1 {
				t.Errorf("body %q is not one line that begins with %q", body, prefix)
			}
		})
	}
}

func TestDownloadAfterHalfClose(t *testing.T) {
	body := bytes.Repeat([]byte("0123456789abcdef"), 1<<16) // 1 MiB
	for name, connect := range frontBothProtocols {
		t.Run(name, func(t *testing.T) {
			far := frontFarEnd(t, func(c *net.TCPConn) {
				if asked, err := io.ReadAll(c); err == nil && string(asked) == "please" {
					c.Write(body)
				}
			})
			c := connect(t, frontStart(t, &frontDirect{}, nil), tunnel.TargetOf(far))
			c.Write([]byte("please"))
			c.CloseWrite()
			got, err := io.ReadAll(c)
			if err != nil || !bytes.Equal(got, body) {
				t.Fatalf("%d bytes, %v", len(got), err)
			}
		})
	}
}

func TestUploadAfterTargetsHalfClose(t *testing.T) {
	for name, connect := range frontBothProtocols {
		t.Run(name, func(t *testing.T) {
			uploaded := make(chan int, 1)
			far := frontFarEnd(t, func(c *net.TCPConn) {
				c.CloseWrite()
				n, _ := io.Copy(io.Discard, c)
				uploaded <- int(n)
			})
			c := connect(t, frontStart(t, &frontDirect{}, nil), tunnel.TargetOf(far))
			if _, err := c.Read(make([]byte, 1)); err != io.EOF {
				t.Fatalf("read: %v, want EOF", err)
			}
			c.Write(make([]byte, 1<<20))
			c.CloseWrite()
			if n := <-uploaded; n != 1<<20 {
				t.Fatalf("%d bytes arrived", n)
			}
		})
	}
}

var frontBothProtocols = map[string]func(testing.TB, *Front, tunnel.Target) *net.TCPConn{
	"SOCKS": frontConnect,
	"HTTP": func(t testing.TB, f *Front, to tunnel.Target) *net.TCPConn {
		c := frontDial(t, f)
		fmt.Fprintf(c, "CONNECT %s HTTP/1.1\r\nHost: %[1]s\r\n\r\n", to)
		const established = "HTTP/1.1 200 Connection established\r\n\r\n"
		if got := frontRead(t, c, len(established)); string(got) != established {
			t.Fatalf("answer %q", got)
		}
		return c
	},
}

func TestResetPassesBothWays(t *testing.T) {
	for name, connect := range frontBothProtocols {
		t.Run(name+", target resets", func(t *testing.T) {
			far := frontFarEnd(t, func(c *net.TCPConn) {
				c.Read(make([]byte, 1))
				c.SetLinger(0)
			})
			c := connect(t, frontStart(t, &frontDirect{}, nil), tunnel.TargetOf(far))
			c.Write([]byte{1})
			if _, err := c.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
				t.Fatalf("the app saw %v, want a reset", err)
			}
		})
		t.Run(name+", app resets", func(t *testing.T) {
			saw := make(chan error, 1)
			far := frontFarEnd(t, func(c *net.TCPConn) {
				_, err := io.Copy(io.Discard, c)
				saw <- err
			})
			c := connect(t, frontStart(t, &frontDirect{}, nil), tunnel.TargetOf(far))
			c.SetLinger(0)
			c.Close()
			if err := <-saw; !errors.Is(err, syscall.ECONNRESET) {
				t.Fatalf("the target saw %v, want a reset", err)
			}
		})
	}
}

func TestSilentConnectionsAreClosed(t *testing.T) {
	if frontGreeting >= 5*time.Second || frontRequest > 10*time.Second {
		t.Fatalf("the limits are %s and %s", frontGreeting, frontRequest)
	}
	echo := frontFarEnd(t, frontEcho)
	f := frontStartWith(t, &frontDirect{}, nil, func(f *Front) { f.greeting, f.request = time.Second, 1500*time.Millisecond })
	var silent []*net.TCPConn
	for range 1000 {
		silent = append(silent, frontDial(t, f))
	}
	// Others are served meanwhile, if they are as quick as the limits want it.
	frontEventually(t, "another is served", func() bool {
		c := frontDial(t, f)
		c.Write(append(bytes.Clone(frontGreet), frontRequestBytes(1, tunnel.TargetOf(echo))...))
		c.Write([]byte("x"))
		_, err := io.ReadFull(c, make([]byte, 2+10+1))
		return err == nil
	})
	for _, s := range silent {
		if _, err := s.Read(make([]byte, 1)); err != io.EOF {
			t.Fatalf("read: %v, want EOF", err)
		}
	}
	frontEventually(t, "only the live one is left", func() bool { return f.Stats().Open == 1 })
}

func TestSlowRequestsAreClosed(t *testing.T) {
	for name, sent := range map[string]string{
		"first byte of SOCKS":    "\x05",
		"greeting of SOCKS":      "\x05\x01\x00",
		"half a request":         "\x05\x01\x00\x05\x01\x00\x03\x09abc",
		"half a head":            "CONNECT a.example:443 HTTP/1.1\r\nHost:",
		"user without password":  "\x05\x01\x02\x01\x04user",
		"nothing but one letter": "G",
	} {
		t.Run(name, func(t *testing.T) {
			f := frontStartWith(t, &frontDirect{}, nil, func(f *Front) {
				f.greeting, f.request, f.linger = 50*time.Millisecond, 100*time.Millisecond, 10*time.Millisecond
			})
			c := frontDial(t, f)
			io.WriteString(c, sent)
			if _, err := io.ReadAll(c); errors.Is(err, os.ErrDeadlineExceeded) {
				t.Fatal("still open")
			}
			frontEventually(t, "the connection is gone", func() bool { return f.Stats().Open == 0 })
		})
	}
}

func TestOpenConnectionsAreBounded(t *testing.T) {
	echo := frontFarEnd(t, frontEcho)
	var log frontLog
	f := frontStart(t, &frontDirect{}, func(c *FrontConfig) {
		c.MaxConns = 2
		c.Log = log.logger()
	})
	first := frontConnect(t, f, tunnel.TargetOf(echo))
	frontConnect(t, f, tunnel.TargetOf(echo))
	began := time.Now()
	for range 50 {
		c := frontDial(t, f)
		if _, err := c.Read(make([]byte, 1)); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
			t.Fatalf("a connection beyond the bound: %v", err)
		}
	}
	first.Close()
	frontEventually(t, "a place is free again", func() bool { return f.Stats().Open == 1 })
	frontConnect(t, f, tunnel.TargetOf(echo))
	if n := f.Stats().Refused["limit_exceeded"]; n != 50 {
		t.Errorf("%d refusals were counted", n)
	}
	const each = 10 // lines a second; a slow machine has more seconds
	if n, most := strings.Count(log.text(), "\n"), each*(2+int(time.Since(began)/time.Second)); n < 1 || n > most {
		t.Errorf("%d lines were logged for 50 refusals, want 1 to %d", n, most)
	}
}

// frontLog keeps what is logged.
type frontLog struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (l *frontLog) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.Write(p)
}

func (l *frontLog) logger() *slog.Logger {
	return slog.New(slog.NewTextHandler(l, &slog.HandlerOptions{Level: slog.LevelDebug}))
}

func (l *frontLog) text() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.String()
}

func TestRefusalsAreLoggedInShortLinesWithoutSecrets(t *testing.T) {
	var log frontLog
	f := frontStart(t, &frontDirect{fail: tunnel.Errorf(tunnel.ProxyStopped, "the proxy is stopped; run culvert start")}, func(c *FrontConfig) {
		c.Auth, c.Log = StaticAuth("user", "hunter2"), log.logger()
	})
	frontHTTP(t, f, "CONNECT a.example:443 HTTP/1.1\r\nProxy-Authorization: Basic dXNlcjpodW50ZXIy\r\n\r\n")
	c := frontDial(t, f)
	c.Write(append([]byte("\x05\x01\x02\x01\x04user\x07hunter2"), frontRequestBytes(1, tunnel.Target{Host: strings.Repeat("\xff", 255), Port: 443})...))
	io.ReadAll(c)
	text := log.text()
	lines := strings.Split(strings.TrimSuffix(text, "\n"), "\n")
	if len(lines) != 2 {
		t.Fatalf("%d lines: %s", len(lines), text)
	}
	for _, line := range lines {
		if !strings.Contains(line, "code=proxy_stopped") || len(line) > 1024 {
			t.Errorf("%d bytes: %s", len(line), line)
		}
	}
	if strings.Contains(text, "hunter2") || strings.Contains(text, "dXNlcjpodW50ZXIy") {
		t.Errorf("a password was logged: %s", text)
	}
}

// frontShortOfFiles fails to accept a few times, as when descriptors run out.
type frontShortOfFiles struct {
	net.Listener
	left atomic.Int32
}

func (l *frontShortOfFiles) Accept() (net.Conn, error) {
	if l.left.Add(-1) >= 0 {
		return nil, syscall.EMFILE
	}
	return l.Listener.Accept()
}

func TestAcceptFailuresPass(t *testing.T) {
	echo := frontFarEnd(t, frontEcho)
	l := &frontShortOfFiles{Listener: frontListen(t)}
	l.left.Store(3)
	f := frontStart(t, &frontDirect{}, func(c *FrontConfig) { c.Listener.Close(); c.Listener = l })
	c := frontConnect(t, f, tunnel.TargetOf(echo))
	c.Write([]byte("x"))
	frontRead(t, c, 1)
}

func TestAuthOfSOCKS(t *testing.T) {
	login := func(user, password string) []byte {
		b := append([]byte{5, 2, 0, 2, 1, byte(len(user))}, user...)
		return append(append(b, byte(len(password))), password...)
	}
	echo := frontFarEnd(t, frontEcho)
	request := frontRequestBytes(1, tunnel.TargetOf(echo))
	for name, tc := range map[string]struct {
		send, want []byte
	}{
		"right":          {append(login("user", "secret"), request...), []byte{5, 2, 1, 0, 5, 0}},
		"wrong password": {append(login("user", "secreT"), request...), []byte{5, 2, 1, 1}},
		"empty":          {append(login("", ""), request...), []byte{5, 2, 1, 1}},
		"none offered":   {append([]byte{5, 1, 0}, request...), []byte{5, 0xff}},
		"wrong version":  {[]byte{5, 1, 2, 5, 4, 'u', 's', 'e', 'r', 0}, []byte{5, 2}},
	} {
		t.Run(name, func(t *testing.T) {
			next := &frontDirect{}
			f := frontStart(t, next, func(c *FrontConfig) { c.Auth = StaticAuth("user", "secret") })
			c := frontDial(t, f)
			c.Write(tc.send)
			got := frontRead(t, c, len(tc.want))
			if !bytes.Equal(got, tc.want) {
				t.Fatalf("got %x, want %x", got, tc.want)
			}
			if name == "right" {
				next.mu.Lock()
				defer next.mu.Unlock()
				if p := next.peers[0]; p.User != "user" || p.Addr != tunnel.AddrPortOf(c.LocalAddr()) || p.App != "" {
					t.Fatalf("peer %+v", p)
				}
				return
			}
			if rest, _ := io.ReadAll(c); len(rest) != 0 {
				t.Fatalf("went on with %x", rest)
			}
		})
	}
}

func TestRunEndsEverything(t *testing.T) {
	next := &frontDirect{open: func(ctx context.Context, to tunnel.Target) (tunnel.Stream, error) {
		if to.Host == "hangs" {
			<-ctx.Done()
			return nil, ctx.Err()
		}
		c, err := net.Dial("tcp", to.String())
		if err != nil {
			return nil, err
		}
		return &frontStream{TCPConn: c.(*net.TCPConn)}, nil
	}}
	echo := frontFarEnd(t, frontEcho)
	f, err := NewFront(FrontConfig{Listener: frontListen(t), Next: next})
	if err != nil {
		t.Fatal(err)
	}
	f.greeting = frontPatience // the silent one stays until the end
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- f.Run(ctx) }()
	streaming := frontConnect(t, f, tunnel.TargetOf(echo))
	frontDial(t, f) // silent
	hanging := frontDial(t, f)
	hanging.Write(append(bytes.Clone(frontGreet), frontRequestBytes(1, tunnel.Target{Host: "hangs", Port: 1})...))
	held, _ := frontAssociate(t, f, netip.AddrPort{})
	frontEventually(t, "all are open", func() bool { return f.Stats().Open == 4 && f.Stats().Relays == 1 })
	cancel()
	select {
	case err := <-done:
		if err != nil {
			t.Fatal(err)
		}
	case <-time.After(frontPatience):
		t.Fatal("Run did not return")
	}
	if _, err := streaming.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("a stream saw %v, want a reset", err)
	}
	if _, err := held.Read(make([]byte, 1)); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("an association saw %v", err)
	}
	if s := f.Stats(); s.Open != 0 || s.Relays != 0 {
		t.Errorf("left: %+v", s)
	}
	select {
	case <-next.relay().closed:
	default:
		t.Error("the association is still open behind the front")
	}
}

func TestListenerFailureEndsRun(t *testing.T) {
	l := frontListen(t)
	f, err := NewFront(FrontConfig{Listener: l, Next: &frontDirect{}})
	if err != nil {
		t.Fatal(err)
	}
	l.Close()
	if err := f.Run(context.Background()); !errors.Is(err, net.ErrClosed) {
		t.Fatalf("Run: %v", err)
	}
}

// FuzzSOCKSRequest sends whatever to a front and expects it to end.
func FuzzSOCKSRequest(f *testing.F) {
	front := frontStartWith(f, &frontDirect{fail: tunnel.PolicyDenied}, nil, func(f *Front) { f.linger = 10 * time.Millisecond })
	f.Add([]byte("\x05\x01\x00\x05\x01\x00\x01\x01\x02\x03\x04\x01\xbb"))
	f.Add([]byte("\x05\x02\x00\x02\x05\x03\x00\x03\x09localhost\x00\x50extra"))
	f.Add([]byte("\x04\x01\x00\x50\x7f\x00\x00\x01\x00"))
	f.Add([]byte("CONNECT a.example:443 HTTP/1.1\r\n\r\nx"))
	f.Fuzz(func(t *testing.T, sent []byte) {
		c, err := net.Dial("tcp", front.Addr().String())
		if err != nil {
			t.Skip(err)
		}
		defer c.Close()
		c.SetDeadline(time.Now().Add(frontPatience))
		c.Write(sent)
		c.(*net.TCPConn).CloseWrite()
		got, err := io.ReadAll(c)
		if errors.Is(err, os.ErrDeadlineExceeded) {
			t.Fatalf("still open after %x", got)
		}
		if len(got) > 4096 {
			t.Fatalf("%d bytes were answered", len(got))
		}
	})
}

// frontHTTP sends a head and reads the answer.
func frontHTTP(t testing.TB, f *Front, head string) (*http.Response, string) {
	t.Helper()
	c := frontDial(t, f)
	if _, err := io.WriteString(c, head); err != nil {
		t.Fatal(err)
	}
	return frontAnswer(t, c, head)
}

func TestWhatTheFrontRefusesIsLogged(t *testing.T) {
	socks := func(command, atyp byte) string {
		return string([]byte{5, 1, 0, 5, command, 0, atyp, 1, 2, 3, 4, 0, 80})
	}
	for name, tc := range map[string]struct {
		auth bool
		send string
		want []string
	}{
		"SOCKS, wrong password": {true, "\x05\x01\x02\x01\x05us\ner\x07hunter3", []string{"code=not_permitted", "user=us?er", "password is wrong"}},
		"SOCKS, no password":    {true, "\x05\x01\x00", []string{"code=not_permitted", "no user name"}},
		"SOCKS, only a login":   {false, "\x05\x01\x02", []string{"code=unsupported", "login"}},
		"HTTP, wrong password":  {true, "CONNECT a.example:443 HTTP/1.1\r\nProxy-Authorization: Basic dXNlcjpodW50ZXIz\r\n\r\n", []string{"code=not_permitted", "user=user", "password is wrong"}},
		"HTTP, no password":     {true, "CONNECT a.example:443 HTTP/1.1\r\n\r\n", []string{"code=not_permitted", "no user name"}},
		"HTTP, another method":  {false, "GET http://a.example/?q HTTP/1.1\r\nHost: a.example\r\n\r\n", []string{"code=unsupported", "to=a.example", "CONNECT"}},
		"BIND":                  {false, socks(2, 1), []string{"code=unsupported", "to=1.2.3.4:80", "BIND"}},
		"unknown command":       {false, socks(9, 1), []string{"code=unsupported", "other SOCKS commands"}},
		"unknown address type":  {false, socks(1, 9), []string{"code=unsupported", "address type"}},
		"bad name":              {false, "\x05\x01\x00\x05\x01\x00\x03\x03a b\x00\x50", []string{"code=config_invalid", "to=\"a b:80\""}},
		"SOCKS4":                {false, "\x04\x01\x00\x50\x01\x02\x03\x04\x00", []string{"code=unsupported", "SOCKS4"}},
		"TLS":                   {false, "\x16\x03\x01\x00\x05", []string{"code=unsupported", "https://"}},
		"rubbish":               {false, "\x00", []string{"code=unsupported", "neither SOCKS5 nor HTTP"}},
	} {
		t.Run(name, func(t *testing.T) {
			var log frontLog
			f := frontStart(t, &frontDirect{}, func(c *FrontConfig) {
				c.Log = log.logger()
				if tc.auth {
					c.Auth = StaticAuth("user", "hunter2")
				}
			})
			c := frontDial(t, f)
			c.Write([]byte(tc.send))
			io.ReadAll(c)
			text := log.text()
			for _, want := range append(tc.want, "level=INFO", "from="+c.LocalAddr().String()) {
				if !strings.Contains(text, want) {
					t.Errorf("no %s in %s", want, text)
				}
			}
			if strings.Count(text, "\n") != 1 || strings.Contains(text, "hunter") || strings.Contains(text, "aHVudGVy") || strings.Contains(text, "dXNlcj") {
				t.Errorf("logged: %s", text)
			}
		})
	}
}

func TestLoggedTextIsCutBetweenWords(t *testing.T) {
	for _, tc := range []struct{ text, want string }{
		{"short", "short"},
		{"connection refused by it", "connection..."},
		{"a\x00b\n\xff\u2028", "a?b???"},
		{strings.Repeat("é", 20), strings.Repeat("é", 8) + "..."},
		{strings.Repeat("\"", 20), strings.Repeat("\"", 8) + "..."},
	} {
		if got := tunnel.LogText(tc.text, 16); got != tc.want {
			t.Errorf("%q became %q, want %q", tc.text, got, tc.want)
		}
	}
}

func TestABrokenStreamIsLoggedWithItsTarget(t *testing.T) {
	var log frontLog
	far := frontFarEnd(t, func(c *net.TCPConn) {
		c.Read(make([]byte, 1))
		c.SetLinger(0)
		c.Close()
	})
	next := &frontDirect{hosts: map[string]netip.Addr{"blob.example": far.Addr()}}
	f := frontStart(t, next, func(c *FrontConfig) { c.Log = log.logger() })
	c := frontConnect(t, f, tunnel.Target{Host: "blob.example", Port: far.Port()})
	c.Write([]byte("x"))
	io.ReadAll(c)
	frontEventually(t, "it is logged", func() bool { return strings.Contains(log.text(), "stream broke") })
	if want := fmt.Sprintf("to=blob.example:%d", far.Port()); !strings.Contains(log.text(), want) {
		t.Errorf("no %s in %s", want, log.text())
	}
}
