package tunneltls

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"net"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"culvert/tunnel"
)

// soon polls until it is so.
func soon(t *testing.T, what string, so func() bool) {
	t.Helper()
	for end := time.Now().Add(patience); !so(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("it never came to: " + what)
		}
	}
}

// receive waits for a value that must come soon.
func receive[T any](t *testing.T, what string, from <-chan T) T {
	t.Helper()
	select {
	case v := <-from:
		return v
	case <-time.After(patience):
		t.Fatal("it never came to: " + what)
		panic("unreachable")
	}
}

func TestConfigErrorsNameTheField(t *testing.T) {
	for field, change := range map[string]func(*Config){
		"TLS":              func(c *Config) { c.TLS = nil },
		"TLS 1.3":          func(c *Config) { c.TLS.MaxVersion = tls.VersionTLS12 },
		"HandshakeTimeout": func(c *Config) { c.HandshakeTimeout = -1 },
		"Handshakes":       func(c *Config) { c.Handshakes = -1 },
		"Unauthenticated":  func(c *Config) { c.Unauthenticated = -1 },
		"MaxStreams":       func(c *Config) { c.MaxStreams = -1 },
		"Window":           func(c *Config) { c.Window = 1000 },
		"WriteTimeout":     func(c *Config) { c.WriteTimeout = -1 },
		"KeepAlive":        func(c *Config) { c.KeepAlive = -1 },
		"MaxAge":           func(c *Config) { c.MaxAge = time.Minute },
	} {
		cfg, _ := both(t)
		change(&cfg)
		_, err := NewDialer(cfg)
		if !errors.Is(err, tunnel.ConfigInvalid) || !strings.Contains(err.Error(), field) {
			t.Errorf("%s: %v", field, err)
		}
	}
}

func TestDialFailuresHaveACodeAndASentence(t *testing.T) {
	client, server := both(t)
	good := listen(t, server).Addr().String()

	closed, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	closed.Close()
	// speak listens and says something to everybody, or nothing.
	speak := func(what string) string {
		ln, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { ln.Close() })
		go func() {
			for {
				c, err := ln.Accept()
				if err != nil {
					return
				}
				t.Cleanup(func() { c.Close() })
				io.WriteString(c, what)
			}
		}()
		return ln.Addr().String()
	}
	pinned := tunnel.Errorf(tunnel.CertificateUntrusted, "the pin in culvert.yaml does not match; ask the operator for a new one")
	for _, q := range []struct {
		name, address string
		tls           func(*tls.Config)
		code          tunnel.Code
		says          string
	}{
		{"refused", closed.Addr().String(), nil, tunnel.CloudUnreachable, "nothing listens"},
		{"silence", speak(""), nil, tunnel.CloudUnreachable, "in time"},
		{"no TLS", speak("HTTP/1.1 400 Bad Request\r\n\r\n"), nil, tunnel.CloudUnreachable, "does not speak TLS"},
		{"no name", "nowhere.invalid:443", nil, tunnel.CloudUnreachable, "could not be resolved"},
		{"no port", "127.0.0.1", nil, tunnel.ConfigInvalid, "HOST:PORT"},
		{"another authority", good, func(c *tls.Config) { c.RootCAs = x509.NewCertPool() }, tunnel.CertificateUntrusted, "not trusted"},
		{"another name", good, func(c *tls.Config) { c.ServerName = "other.test" }, tunnel.CertificateUntrusted, "not trusted"},
		{"another protocol", good, func(c *tls.Config) { c.NextProtos = []string{"h9"} }, tunnel.CloudUnreachable, "not a Culvert cloud proxy"},
		{"another server's alert", speak("\x15\x03\x03\x00\x02\x02\x28"), nil, tunnel.CloudUnreachable, "not a Culvert cloud proxy"}, // handshake_failure (RFC 8446 §6.2)
		{"own verification", good, func(c *tls.Config) {
			c.VerifyConnection = func(tls.ConnectionState) error { return pinned }
		}, tunnel.CertificateUntrusted, pinned.Text},
	} {
		t.Run(q.name, func(t *testing.T) {
			cfg := client
			cfg.TLS = client.TLS.Clone()
			if q.name == "silence" {
				cfg.HandshakeTimeout = 300 * time.Millisecond
			}
			if q.name == "no name" {
				cfg.Dial = func(context.Context, string, string) (net.Conn, error) {
					return nil, &net.OpError{Op: "dial", Err: &net.DNSError{Err: "no such host", Name: "nowhere.invalid", IsNotFound: true}}
				}
			}
			if q.tls != nil {
				q.tls(cfg.TLS)
			}
			c, err := dialer(t, cfg).Dial(t.Context(), q.address)
			if err == nil {
				c.Close()
				t.Fatal("Dial succeeded")
			}
			if !errors.Is(err, q.code) || !strings.Contains(tunnel.Sentence(err), q.says) {
				t.Errorf("%v; want the code %s and %q", err, q.code, q.says)
			}
		})
	}
}

func TestCancelledDialSaysSo(t *testing.T) {
	client, _ := both(t)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := dialer(t, client).Dial(ctx, "127.0.0.1:1"); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}

// With TLS 1.3 the client learns only after its handshake what the server
// thinks of its certificate.
func TestRefusedClientCertificateIsNamedOnRead(t *testing.T) {
	client, server := both(t)
	server.TLS.VerifyConnection = func(tls.ConnectionState) error { return errors.New("no") }
	l := listen(t, server)
	c, err := dialer(t, client).Dial(t.Context(), l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(patience))
	if _, err := c.Read(make([]byte, 1)); !errors.Is(err, tunnel.CertificateUntrusted) {
		t.Error(err)
	}
}

func TestSilentConnectionsAreClosedAndKeepNobodyOut(t *testing.T) {
	client, server := both(t)
	server.Handshakes = 1
	server.HandshakeTimeout = 500 * time.Millisecond
	l := listen(t, server)
	var silent []net.Conn
	for i := range 40 {
		c, err := net.Dial("tcp", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		if i%2 == 0 { // half of a ClientHello
			c.Write([]byte{22, 3, 1, 2, 0, 1, 0, 1})
		}
		silent = append(silent, c)
	}
	// Another gets in, if it is as quick as the limit wants it: on a slow machine
	// not at once.
	accepted := make(chan tunnel.Candidate, 1)
	go func() {
		if s, err := l.Accept(context.Background()); err == nil {
			accepted <- s
		}
	}()
	soon(t, "another is accepted", func() bool {
		c, err := dialer(t, client).Dial(t.Context(), l.Addr().String())
		if err != nil {
			return false
		}
		defer c.Close()
		select {
		case s := <-accepted:
			s.Close()
			return true
		case <-time.After(time.Second):
			return false
		}
	})
	for _, c := range silent {
		c.SetReadDeadline(time.Now().Add(patience))
		if _, err := c.Read(make([]byte, 1)); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
			t.Fatal("a silent connection was kept or answered:", err)
		}
	}
}

// Who has said its ClientHello and then nothing more has not begun to prove
// anything, and must not take up what others need for that.
func TestHandshakesThatStopHalfwayKeepNobodyOut(t *testing.T) {
	client, server := both(t)
	server.Handshakes, server.HandshakeTimeout = 1, patience
	l := listen(t, server)
	near, far := net.Pipe()
	defer far.Close()
	go tls.Client(near, client.TLS).Handshake()
	hello := make([]byte, 1<<14)
	n, err := far.Read(hello)
	if err != nil {
		t.Fatal(err)
	}
	for range 3 {
		c, err := net.Dial("tcp", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		c.SetDeadline(time.Now().Add(patience))
		c.Write(hello[:n])
		if _, err := c.Read(make([]byte, 1)); err != nil { // it has had its turn
			t.Fatal(err)
		}
	}
	meet(t, dialer(t, client), l)
}

func TestGarbageIsClosedAtOnce(t *testing.T) {
	_, server := both(t)
	l := listen(t, server)
	for _, garbage := range []string{"GET / HTTP/1.1\r\n\r\n", "\x16\x03\x01\xff\xff.....", "\x16\x03\x01\x00\x05.....", strings.Repeat("\x00", 100)} {
		c, err := net.Dial("tcp", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		c.SetDeadline(time.Now().Add(patience))
		io.WriteString(c, garbage)
		if _, err := io.Copy(io.Discard, c); errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("%q: still open", garbage)
		}
		c.Close()
	}
}

// What a peer may send before it is known is bounded: crypto/tls would take
// certificates of 256 KiB.
func TestALongHandshakeIsCut(t *testing.T) {
	cc, sc := both(t)
	l := listen(t, sc)
	many := cc.TLS.Certificates[0]
	for len(many.Certificate) < 400 {
		many.Certificate = append(many.Certificate, many.Certificate[0])
	}
	size := len(many.Certificate) * len(many.Certificate[0])
	conf := cc.TLS.Clone()
	conf.Certificates = []tls.Certificate{many}
	tcp, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer tcp.Close()
	tcp.SetDeadline(time.Now().Add(patience))
	conn := tls.Client(tcp, conf)
	if err := conn.Handshake(); err == nil { // the certificates may be on their way still
		_, err = conn.Read(make([]byte, 1))
		if err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("certificates of %d bytes were taken: %v", size, err)
		}
	}
	if size <= maxOpening {
		t.Fatalf("certificates of %d bytes are too short for this test", size)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if c, err := l.Accept(ctx); err == nil {
		c.Close()
		t.Error("the connection was accepted")
	}
	meet(t, dialer(t, cc), l) // another is
}

func TestTooManyUnauthenticatedAreClosed(t *testing.T) {
	_, server := both(t)
	server.Unauthenticated = 2
	l := listen(t, server)
	var open []net.Conn
	for range 3 {
		c, err := net.Dial("tcp", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		open = append(open, c)
	}
	open[2].SetDeadline(time.Now().Add(patience))
	if _, err := open[2].Read(make([]byte, 1)); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Error("the third connection is still open:", err)
	}
}

// tired fails a few times, as a process without descriptors does.
type tired struct {
	net.Listener
	left int
}

func (l *tired) Accept() (net.Conn, error) {
	if l.left--; l.left >= 0 {
		return nil, &net.OpError{Op: "accept", Err: syscall.EMFILE}
	}
	return l.Listener.Accept()
}

func TestAcceptGoesOnAfterErrors(t *testing.T) {
	client, server := both(t)
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	l, err := Listen(&tired{ln, 3}, server)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	c, s := meet(t, dialer(t, client), l)
	c.Close()
	s.Close()
}

func TestListenerCloseEndsEverythingThatWaits(t *testing.T) {
	client, server := both(t)
	l := listen(t, server)
	half, err := net.Dial("tcp", l.Addr().String()) // a handshake that does not go on
	if err != nil {
		t.Fatal(err)
	}
	defer half.Close()
	unaccepted, err := dialer(t, client).Dial(t.Context(), l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer unaccepted.Close()
	if err := l.Close(); err != nil {
		t.Error(err)
	}
	l.Close()
	if _, err := l.Accept(t.Context()); err != net.ErrClosed {
		t.Error("Accept after Close:", err)
	}
	unaccepted.SetDeadline(time.Now().Add(patience))
	if _, err := unaccepted.Read(make([]byte, 1)); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Error("a connection that nobody accepted is still open:", err)
	}
}

func TestCarriersOutliveTheirListener(t *testing.T) {
	client, server := both(t)
	l := listen(t, server)
	cc, sc := meet(t, dialer(t, client), l)
	c, s := carry(t, cc), carry(t, sc)
	l.Close()
	a, b := join(t, c, s)
	b.Close()
	if _, err := io.Copy(io.Discard, a); err != nil {
		t.Error(err)
	}
}

func carry(t testing.TB, c tunnel.Candidate) *carrier {
	t.Helper()
	made, err := c.Carrier()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { made.Close(nil) })
	return made.(*carrier)
}

func join(t testing.TB, from, to tunnel.Carrier) (a, b tunnel.Stream) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	a, err := from.OpenStream(ctx)
	if err != nil {
		t.Fatal(err)
	}
	b, err = to.AcceptStream(ctx)
	if err != nil {
		t.Fatal(err)
	}
	return a, b
}
