package websocket

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"culvert/tunnel"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const patience = 20 * time.Second

func listener(t *testing.T, cfg ListenConfig) *Listener {
	t.Helper()
	l, err := NewListener(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

// front ends TLS before a handler.
func front(t *testing.T, h http.Handler) (*httptest.Server, *Dialer) {
	t.Helper()
	s := httptest.NewTLSServer(h)
	t.Cleanup(s.Close)
	roots := x509.NewCertPool()
	roots.AddCert(s.Certificate())
	d, err := NewDialer(DialConfig{TLS: &tls.Config{RootCAs: roots}})
	if err != nil {
		t.Fatal(err)
	}
	return s, d
}

// secured gives a listener connections whose TLS has ended, and returns where.
func secured(t *testing.T, l *Listener) (address string, d *Dialer) {
	t.Helper()
	s, d := front(t, nil)
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	l.Serve(tlsListener{ln, &tls.Config{Certificates: s.TLS.Certificates}})
	return ln.Addr().String(), d
}

// tlsListener returns connections that are not *tls.Conn, of which an HTTP server
// would ask the protocol.
type tlsListener struct {
	net.Listener
	conf *tls.Config
}

func (l tlsListener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return struct{ net.Conn }{tls.Server(c, l.conf)}, nil
}

func pair(t *testing.T) (near, far net.Conn) {
	t.Helper()
	l := listener(t, ListenConfig{})
	address, d := secured(t, l)
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	near, err := d.Dial(ctx, "tcp", "wss://"+address+DefaultPath)
	if err == nil {
		far, err = l.Accept()
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { near.Close(); far.Close() })
	for _, c := range []net.Conn{near, far} {
		c.SetDeadline(time.Now().Add(patience))
	}
	return near, far
}

func TestBytesPassBothWaysWhateverTheirSize(t *testing.T) {
	near, far := pair(t)
	sent := make([]byte, 3<<20)
	rand.Read(sent)
	for _, way := range [][2]net.Conn{{near, far}, {far, near}} {
		go func() {
			for p, n := sent, 1; len(p) > 0; n = 3*n + 1 {
				n = min(n, len(p))
				if _, err := way[0].Write(p[:n]); err != nil {
					t.Error(err)
					return
				}
				p = p[n:]
			}
		}()
		got := make([]byte, len(sent))
		if _, err := io.ReadFull(way[1], got); err != nil || !bytes.Equal(got, sent) {
			t.Fatalf("what came is not what was sent (%v)", err)
		}
	}
}

func TestAConnectionKnowsTheTCPBelow(t *testing.T) {
	near, far := pair(t)
	for name, c := range map[string]net.Conn{"near": near, "far": far} {
		l := c.(tunnel.Layered)
		before := l.Sent()
		if _, err := c.Write(make([]byte, 1000)); err != nil {
			t.Fatal(err)
		}
		if _, ok := c.RemoteAddr().(*net.TCPAddr); !ok || l.TCP() == nil || l.Sent() < before+1000 {
			t.Errorf("%s: %v, %v, %d bytes before and %d after 1000 more", name, c.RemoteAddr(), l.TCP(), before, l.Sent())
		}
	}
}

func TestCloseEndsBothEndsAtOnceAndADeadlineABlockedRead(t *testing.T) {
	near, far := pair(t)
	began := time.Now()
	near.Close()
	if _, err := far.Read(make([]byte, 1)); err == nil {
		t.Error("the other end reads on")
	}
	far.Close()
	near, far = pair(t)
	far.SetReadDeadline(time.Now().Add(20 * time.Millisecond))
	if _, err := far.Read(make([]byte, 1)); err == nil {
		t.Error("a read outlives its deadline")
	}
	if took := time.Since(began); took > 5*time.Second { // of the closing handshake
		t.Errorf("it took %v", took)
	}
	near.Close()
}

func TestWhatIsNoWebSocketBecomesASentence(t *testing.T) {
	for name, c := range map[string]struct {
		status int
		head   string
		code   tunnel.Code
		says   string
	}{
		"a web page":      {200, "", tunnel.CloudUnreachable, "websocket.path"},
		"nothing there":   {404, "", tunnel.CloudUnreachable, "websocket.path"},
		"forbidden":       {403, "", tunnel.NotPermitted, "403 Forbidden"},
		"gone behind":     {502, "", tunnel.CloudUnreachable, "502 Bad Gateway"},
		"a portal":        {302, "https://portal.example/", tunnel.CloudUnreachable, "browser"},
		"half an upgrade": {101, "", tunnel.CloudUnreachable, "WebSocket"},
	} {
		t.Run(name, func(t *testing.T) {
			s, d := front(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				if c.head != "" {
					w.Header().Set("Location", c.head)
				}
				if c.status == 101 {
					conn, _, _ := w.(http.Hijacker).Hijack()
					fmt.Fprint(conn, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: other\r\n\r\n")
					conn.Close()
					return
				}
				w.WriteHeader(c.status)
			}))
			_, err := d.Dial(t.Context(), "tcp", "wss"+strings.TrimPrefix(s.URL, "https")+"/culvert")
			if tunnel.CodeOf(err) != c.code || !strings.Contains(err.Error(), c.says) {
				t.Errorf("got %v", err)
			}
		})
	}
}

func TestWhatVerificationSaysReachesTheCaller(t *testing.T) {
	s, _ := front(t, nil)
	want := tunnel.Errorf(tunnel.TLSIntercepted, "somebody reads along")
	d, err := NewDialer(DialConfig{TLS: &tls.Config{InsecureSkipVerify: true, VerifyConnection: func(tls.ConnectionState) error { return want }}})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := d.Dial(t.Context(), "tcp", "wss"+strings.TrimPrefix(s.URL, "https")); !errors.Is(err, want) {
		t.Errorf("got %v", err)
	}
}

// Silent peers, and those that ask for something else, hold nothing for long.
func TestWhatDoesNotBecomeAWebSocketIsBounded(t *testing.T) {
	l := listener(t, ListenConfig{Timeout: 300 * time.Millisecond, Waiting: 2})
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	l.Serve(ln)
	dial := func(say string) net.Conn {
		c, err := net.Dial("tcp", ln.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		c.SetDeadline(time.Now().Add(patience))
		io.WriteString(c, say)
		return c
	}
	began := time.Now()
	first, second := dial(""), dial("GET /culvert HTTP/1.1\r\nHost: x\r\nX: ")
	for range 8 { // whichever the server sees first, no more than two are let wait
		dial("")
	}
	for _, c := range []net.Conn{first, second} {
		if _, err := io.ReadAll(c); errors.Is(err, context.DeadlineExceeded) || time.Since(began) > patience/2 {
			t.Errorf("it is still there: %v", err)
		}
	}
	for say, want := range map[string]string{
		"GET / HTTP/1.1\r\nHost: x\r\n\r\n":                                       "HTTP/1.1 404",
		"GET /culvert HTTP/1.1\r\nHost: x\r\n\r\n":                                "HTTP/1.1 426",
		"GET /culvert HTTP/1.1\r\nX: " + strings.Repeat("x", 64<<10) + "\r\n\r\n": "HTTP/1.1 431",
		"GET /culvert HTTP/1.1\r\nHost: x\r\nOrigin: https://evil.example\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n": "HTTP/1.1 403",
	} {
		var got []byte
		for end := time.Now().Add(patience); len(got) == 0 && time.Now().Before(end); { // until those before are gone
			got, _ = io.ReadAll(dial(say))
		}
		if !bytes.HasPrefix(got, []byte(want)) {
			t.Errorf("%.50q is answered by %.100q, want %s", say, got, want)
		}
	}
}

// Nobody keeps a place by asking again and again, nor by being there first.
func TestThoseThatDoNotBecomeAWebSocketKeepNobodyOut(t *testing.T) {
	l := listener(t, ListenConfig{Timeout: time.Hour, Waiting: 3})
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	l.Serve(ln)
	dial := func(from string) net.Conn {
		c, err := (&net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(from)}}).Dial("tcp", ln.Addr().String())
		if err != nil {
			t.Skipf("no %s here: %v", from, err)
		}
		t.Cleanup(func() { c.Close() })
		c.SetDeadline(time.Now().Add(patience))
		return c
	}
	for _, ask := range []string{"GET / HTTP/1.1\r\nHost: x\r\n\r\n", "GET /culvert HTTP/1.1\r\nHost: x\r\n\r\n", "OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n"} {
		c := dial("127.0.0.1")
		io.WriteString(c, ask)
		if got, err := io.ReadAll(c); err != nil || len(got) == 0 { // to its end
			t.Errorf("%.10q: %q, %v", ask, got, err)
		}
	}
	var silent []net.Conn
	for range 3 {
		silent = append(silent, dial("127.0.0.1"))
	}
	for end := time.Now().Add(patience); l.waiting.Len() < 3; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("they do not wait")
		}
	}
	other := dial("127.0.0.2")
	io.WriteString(other, "GET / HTTP/1.1\r\nHost: x\r\n\r\n")
	if got, err := io.ReadAll(other); !bytes.HasPrefix(got, []byte("HTTP/1.1 404")) {
		t.Errorf("another address is answered by %q, %v", got, err)
	}
	ended := make(chan error, len(silent)) // any of them: they come in by different goroutines
	for _, c := range silent {
		go func() {
			_, err := c.Read(make([]byte, 1))
			ended <- err
		}()
	}
	if err := <-ended; err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("one of the address that has most: %v", err)
	}
	for _, c := range silent {
		c.Close()
	}
	for range len(silent) - 1 {
		<-ended
	}
}

// What is upgraded and not accepted is dropped in time.
func TestAWebSocketThatNobodyAcceptsIsDropped(t *testing.T) {
	l := listener(t, ListenConfig{Timeout: 100 * time.Millisecond})
	address, d := secured(t, l)
	c, err := d.Dial(t.Context(), "tcp", "wss://"+address+DefaultPath)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(patience))
	if _, err := c.Read(make([]byte, 1)); err == nil {
		t.Error("it says something")
	}
}
