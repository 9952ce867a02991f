package assemble_test

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"culvert/cloudproxy/egress"
	"culvert/cloudproxy/identity"
	"culvert/cmd/internal/assemble"
	"culvert/cmd/internal/cmdtest"
	"culvert/cmd/internal/config"
	"culvert/policy"
	"culvert/sidecar"
	"culvert/tunnel"
	"culvert/tunnel/session"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// patience bounds every wait for something that must happen. It is far more
// than that takes on a busy machine.
const patience = time.Minute

// here is where cloud proxies listen. No other program binds this address, so
// a port of it stays free while a cloud proxy is away.
const here = "127.0.0.3:0"

// outside is the address that the cloud proxy's traffic leaves from: whoever
// sees it knows that the tunnel was not passed by.
const outside = "127.0.0.2"

// farName is resolved by the cloud proxy alone: no other program here asks
// the DNS server that knows it.
const farName = "far.culvert.test"

// site is what a cloud proxy keeps over a restart.
type site struct {
	listen string
	cert   tls.Certificate
	signer ed25519.PrivateKey
	reset  []byte
	limits session.Limits
	places int // that tokens name; 0: 1
	web    config.WebSocket
	rules  assemble.Rules // beside its keys and its policy
	log    *cmdtest.Text
}

func newSite(t *testing.T) *site {
	t.Helper()
	certPEM, keyPEM, err := assemble.CertificateFor("127.0.0.1")
	if err != nil {
		t.Fatal(err)
	}
	s := &site{listen: here, reset: bytes.Repeat([]byte{7}, 32), log: &cmdtest.Text{}}
	if s.cert, err = tls.X509KeyPair(certPEM, keyPEM); err != nil {
		t.Fatal(err)
	}
	if s.signer, err = identity.GenerateKey(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("the log:\n%s", s.log)
		}
	})
	return s
}

// cloud runs the site's cloud proxy until the test ends or stop is called.
func (s *site) cloud(t *testing.T) (c *assemble.CloudProxy, stop func()) {
	t.Helper()
	var allowed policy.Config
	allowed.AllowCIDR(netip.MustParsePrefix("127.0.0.0/8"))
	pol, err := policy.New(allowed)
	if err != nil {
		t.Fatal(err)
	}
	again := s.listen != here
	for deadline := time.Now().Add(patience); ; time.Sleep(10 * time.Millisecond) {
		c, err = assemble.NewCloudProxy(assemble.CloudProxyParts{
			Listen: s.listen, Certificate: s.cert, ResetKey: s.reset,
			Rules:     assemble.Rules{Keys: identity.NewKeys(s.signer.Public().(ed25519.PublicKey)), Policy: pol, Revoked: s.rules.Revoked, Apps: s.rules.Apps},
			WebSocket: s.web,
			Egress:    egress.Config{Local4: netip.MustParseAddr(outside)},
			Limits:    s.limits,
			Drain:     time.Millisecond, Log: slog.New(slog.NewTextHandler(s.log, nil)).With("end", "cloudproxy"),
		})
		// Another program may have borrowed the port of all addresses meanwhile.
		if err == nil || !again || time.Now().After(deadline) {
			break
		}
	}
	if err != nil {
		t.Fatal(err)
	}
	s.listen = c.Addr.String()
	return c, background(t, c.Run)
}

// sidecar runs and starts a sidecar of the site until the test ends.
func (s *site) sidecar(t *testing.T, mode tunnel.Mode) *assemble.Sidecar {
	t.Helper()
	sc := s.stopped(t, mode)
	start(t, sc)
	return sc
}

// start starts a sidecar, again where the handshakes took too long.
func start(t *testing.T, sc *assemble.Sidecar) {
	t.Helper()
	for end := time.Now().Add(patience); ; {
		_, err := sc.Switch.Start(t.Context(), sidecar.StartOptions{})
		switch tunnel.CodeOf(err) {
		case "":
			return
		case tunnel.CloudUnreachable, tunnel.UDPBlocked, tunnel.TimedOut:
			if time.Now().Before(end) {
				continue
			}
		}
		t.Fatal(err)
	}
}

// stopped runs a sidecar of the site that is not started.
func (s *site) stopped(t *testing.T, mode tunnel.Mode) *assemble.Sidecar {
	t.Helper()
	pin, err := assemble.PinOf(s.cert)
	if err != nil {
		t.Fatal(err)
	}
	now := time.Now()
	token, err := identity.Issue(s.signer, identity.Claims{App: "test", Concurrency: max(s.places, 1), Issued: now, Expires: now.Add(time.Hour)})
	if err != nil {
		t.Fatal(err)
	}
	conf := &config.Sidecar{
		CloudProxy: config.CloudProxyRef{Address: config.List{s.listen}, Pin: config.List{pin}, ServerName: assemble.DefaultServerName},
		Identity:   config.Identity{App: "test", Token: token},
		Front:      config.Front{Listen: "127.0.0.1:0"},
		Mode:       string(mode),
	}
	if err := conf.Check(); err != nil {
		t.Fatal(err)
	}
	sc, err := assemble.NewSidecar(conf, slog.New(slog.NewTextHandler(s.log, nil)).With("end", "sidecar"))
	if err != nil {
		t.Fatal(err)
	}
	background(t, sc.Run)
	return sc
}

// newPath is a whole path: a sidecar that runs, and its cloud proxy.
func newPath(t *testing.T, mode tunnel.Mode) *assemble.Sidecar {
	t.Helper()
	s := newSite(t)
	s.cloud(t)
	return s.sidecar(t, mode)
}

// background runs something until stop is called, at the latest by the test's
// end; stop waits for it.
func background(t *testing.T, run func(context.Context) error) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- run(ctx) }()
	stop = sync.OnceFunc(func() {
		cancel()
		select {
		case err := <-done:
			if err != nil {
				t.Errorf("Run: %v", err)
			}
		case <-time.After(patience):
			t.Error("Run does not end")
		}
	})
	t.Cleanup(stop)
	return stop
}

// resolveFar lets cloud proxies that are made after it resolve farName. Names
// are looked up with the process's own resolver, which is theirs alone here.
func resolveFar(t *testing.T) {
	t.Helper()
	server, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		b := make([]byte, 1500)
		for {
			n, from, err := server.ReadFrom(b)
			if err != nil {
				return
			}
			if answer := dnsAnswer(b[:n]); answer != nil {
				server.WriteTo(answer, from)
			}
		}
	})
	before := net.DefaultResolver
	net.DefaultResolver = &net.Resolver{PreferGo: true, Dial: func(ctx context.Context, _, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "udp", server.LocalAddr().String())
	}}
	t.Cleanup(func() {
		net.DefaultResolver = before
		server.Close()
		wg.Wait()
	})
}

// dnsAnswer answers a query with one question (RFC 1035 §4.1) for farName with
// 127.0.0.1; it has no other address, and there is no other name.
func dnsAnswer(query []byte) []byte {
	const header = 12
	if len(query) < header {
		return nil
	}
	length := bytes.IndexByte(query[header:], 0) + 1
	end := header + length + 4 // with QTYPE and QCLASS
	if length == 0 || len(query) < end {
		return nil
	}
	a := bytes.Clone(query[:end])
	a[2] |= 0x80                 // QR
	copy(a[6:], make([]byte, 6)) // no records yet
	switch {
	case !bytes.EqualFold(query[header:header+length], []byte("\x03far\x07culvert\x04test\x00")):
		a[3] = a[3]&0xf0 | 3 // NXDOMAIN
	case binary.BigEndian.Uint16(query[end-4:]) == 1: // A
		a[7] = 1 // ANCOUNT
		// A pointer to the name, A, IN, TTL 0.
		a = append(a, 0xc0, header, 0, 1, 0, 1, 0, 0, 0, 0, 0, 4, 127, 0, 0, 1)
	}
	return a
}

// web is an HTTP server at the far end that remembers where requests come from.
type web struct {
	port string
	mu   sync.Mutex
	from map[string]int // by host
}

func newWeb(t *testing.T, h http.HandlerFunc) *web {
	t.Helper()
	w := &web{from: map[string]int{}}
	s := httptest.NewServer(http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		host, _, _ := net.SplitHostPort(r.RemoteAddr)
		w.mu.Lock()
		w.from[host]++
		w.mu.Unlock()
		h(rw, r)
	}))
	t.Cleanup(s.Close)
	_, w.port, _ = net.SplitHostPort(strings.TrimPrefix(s.URL, "http://"))
	return w
}

// onlyFromOutside checks that all requests came out of the cloud proxy.
func (w *web) onlyFromOutside(t *testing.T) {
	t.Helper()
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.from) != 1 || w.from[outside] == 0 {
		t.Errorf("requests came from %v, want all of them from the cloud proxy's %s", w.from, outside)
	}
}

// echo is a UDP echo at the far end that remembers where datagrams come from.
type echo struct {
	addr netip.AddrPort
	mu   sync.Mutex
	from map[netip.AddrPort]int
}

func newEcho(t *testing.T) *echo {
	t.Helper()
	c, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	e := &echo{addr: c.LocalAddr().(*net.UDPAddr).AddrPort(), from: map[netip.AddrPort]int{}}
	var wg sync.WaitGroup
	wg.Go(func() {
		b := make([]byte, 65536)
		for {
			n, from, err := c.ReadFromUDPAddrPort(b)
			if err != nil {
				return
			}
			e.mu.Lock()
			e.from[from]++
			e.mu.Unlock()
			c.WriteToUDPAddrPort(b[:n], from)
		}
	})
	t.Cleanup(func() { c.Close(); wg.Wait() })
	return e
}

// sources returns where datagrams have come from.
func (e *echo) sources() []netip.AddrPort {
	e.mu.Lock()
	defer e.mu.Unlock()
	var all []netip.AddrPort
	for a := range e.from {
		all = append(all, a)
	}
	return all
}

// want returns a program's path. Where it is missing the test is skipped, but
// not in CI.
func want(t *testing.T, name string) string {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatalf("%s is missing", name)
		}
		t.Skipf("%s is missing", name)
	}
	return path
}

// command is a program with nothing of the environment of whoever runs the
// tests: no proxy variables, no .curlrc.
func command(t *testing.T, name string, args ...string) *exec.Cmd {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 4*patience)
	t.Cleanup(cancel)
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.WaitDelay = patience // for what the program leaves running
	cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "HOME=" + scratch(t)}
	return cmd
}

// scratch is a folder that goes with the test, as far as what the program
// leaves running lets it.
func scratch(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "culvert")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		for end := time.Now().Add(patience); os.RemoveAll(dir) != nil && time.Now().Before(end); {
			time.Sleep(10 * time.Millisecond)
		}
	})
	return dir
}

// eventually waits for a condition.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(patience); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("in vain: %s", what)
		}
	}
}

// connect opens a stream through a proxy with SOCKS5 (RFC 1928 §4).
func connect(t *testing.T, proxy net.Addr, to netip.AddrPort) net.Conn {
	t.Helper()
	c, reply := request(t, proxy, 1, to)
	if reply[1] != 0 {
		t.Fatalf("CONNECT to %s: reply %d", to, reply[1])
	}
	return c
}

// request sends one SOCKS5 request for an IPv4 target and returns the reply.
func request(t *testing.T, proxy net.Addr, command byte, to netip.AddrPort) (net.Conn, [10]byte) {
	t.Helper()
	c, reply, err := ask(proxy, command, to)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c, reply
}

// ask is request for who closes the connection itself.
func ask(proxy net.Addr, command byte, to netip.AddrPort) (c net.Conn, reply [10]byte, err error) {
	if c, err = net.Dial("tcp", proxy.String()); err != nil {
		return nil, reply, err
	}
	c.SetDeadline(time.Now().Add(patience))
	b := append([]byte{5, 1, 0, 5, command, 0, 1}, to.Addr().AsSlice()...)
	c.Write(binary.BigEndian.AppendUint16(b, to.Port()))
	var answer [12]byte // the method and the reply
	if _, err := io.ReadFull(c, answer[:]); err != nil {
		c.Close()
		return nil, reply, err
	}
	c.SetDeadline(time.Time{})
	return c, [10]byte(answer[2:]), nil
}

// association is an app's SOCKS5 UDP ASSOCIATE.
type association struct {
	control net.Conn
	udp     *net.UDPConn
}

func associate(t *testing.T, proxy net.Addr) *association {
	t.Helper()
	a, err := newAssociation(proxy)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(a.close)
	return a
}

func newAssociation(proxy net.Addr) (*association, error) {
	c, r, err := ask(proxy, 3, netip.AddrPortFrom(netip.IPv4Unspecified(), 0))
	if err != nil {
		return nil, err
	}
	if r[1] != 0 {
		c.Close()
		return nil, fmt.Errorf("UDP ASSOCIATE: reply %d", r[1])
	}
	relay := netip.AddrPortFrom(netip.AddrFrom4([4]byte(r[4:8])), binary.BigEndian.Uint16(r[8:]))
	u, err := net.DialUDP("udp4", nil, net.UDPAddrFromAddrPort(relay))
	if err != nil {
		c.Close()
		return nil, err
	}
	return &association{c, u}, nil
}

func (a *association) close() {
	a.control.Close()
	a.udp.Close()
}

// send sends a datagram to a target, in the header of RFC 1928 §7.
func (a *association) send(p []byte, to netip.AddrPort) error {
	b := append([]byte{0, 0, 0, 1}, to.Addr().AsSlice()...)
	b = append(binary.BigEndian.AppendUint16(b, to.Port()), p...)
	_, err := a.udp.Write(b)
	return err
}

// receive returns the next datagram's payload.
func (a *association) receive(within time.Duration) ([]byte, error) {
	a.udp.SetReadDeadline(time.Now().Add(within))
	b := make([]byte, 65536)
	n, err := a.udp.Read(b)
	if err != nil {
		return nil, err
	}
	if n < 10 {
		return nil, errors.New("a datagram without a header")
	}
	return b[10:n], nil
}

// echoes says whether a datagram that is sent now comes back within a second.
func (a *association) echoes(t *testing.T, text string, to netip.AddrPort) bool {
	t.Helper()
	if err := a.send([]byte(text), to); err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(time.Second); ; {
		got, err := a.receive(time.Until(deadline))
		if err != nil {
			return false
		}
		if string(got) == text {
			return true
		}
	}
}

// returns checks that what is written to a stream comes back.
func returns(t *testing.T, c net.Conn, text string) {
	t.Helper()
	c.SetDeadline(time.Now().Add(patience))
	if _, err := io.WriteString(c, text); err != nil {
		t.Fatalf("a stream: %v", err)
	}
	got := make([]byte, len(text))
	if _, err := io.ReadFull(c, got); err != nil || string(got) != text {
		t.Fatalf("a stream gave back %q, %v", got, err)
	}
}
