package tunnelquic

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"net"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/quic-go/quic-go"

	"culvert/tunnel"
)

// testPatience is how long the tests wait for what must come, on a slow machine too.
const testPatience = time.Minute

// soon polls until ok, since some things happen when the other end has noticed.
func soon(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(testPatience); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("never: ", what)
		}
	}
}

func carriers(t testing.TB, l *Listener, d *Dialer) (client, server tunnel.Carrier) {
	t.Helper()
	cc, sc := connect(t, l, d)
	client, err := cc.Carrier()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { client.Close(nil) })
	server, err = sc.Carrier()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { server.Close(nil) })
	return client, server
}

// works moves a byte over a new stream.
func works(from, to tunnel.Carrier) error {
	ctx, cancel := context.WithTimeout(context.Background(), testPatience)
	defer cancel()
	a, err := from.OpenStream(ctx)
	if err != nil {
		return err
	}
	defer a.Close()
	if _, err := a.Write([]byte("x")); err != nil {
		return err
	}
	b, err := to.AcceptStream(ctx)
	if err != nil {
		return err
	}
	defer b.Close()
	b.SetReadDeadline(time.Now().Add(testPatience))
	_, err = io.ReadFull(b, make([]byte, 1))
	return err
}

func TestConfigNamesTheBadField(t *testing.T) {
	s, _, _ := configs(t)
	for field, c := range map[string]Config{
		"Config.TLS":               {},
		"NextProtos":               {TLS: &tls.Config{}},
		"Config.Limits.Retry":      {TLS: s, Limits: Limits{Retry: -1}},
		"Config.Limits.Streams":    {TLS: s, Limits: Limits{Streams: -1}},
		"Config.Limits.Unanswered": {TLS: s, Limits: Limits{Unanswered: -5}},
	} {
		_, err := NewDialer(c)
		if !errors.Is(err, tunnel.ConfigInvalid) || !strings.Contains(err.Error(), field) {
			t.Errorf("%s: %v", field, err)
		}
	}
	if _, err := Listen(nil, Config{TLS: s}); !errors.Is(err, tunnel.ConfigInvalid) {
		t.Errorf("no socket: %v", err)
	}
}

func TestCloseOfTheListenerLeavesCarriersAlive(t *testing.T) {
	s, c, _ := configs(t)
	l := listen(t, Config{TLS: s})
	d := dialer(t, c)
	client, server := carriers(t, l, d)
	waiting := make(chan error, 1)
	go func() {
		_, err := l.Accept(context.Background())
		waiting <- err
	}()
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	if err := <-waiting; err != net.ErrClosed {
		t.Errorf("Accept during Close: %v", err)
	}
	if _, err := l.Accept(t.Context()); err != net.ErrClosed {
		t.Errorf("Accept after Close: %v", err)
	}
	if err := works(client, server); err != nil {
		t.Errorf("client to server after Close: %v", err)
	}
	if err := works(server, client); err != nil {
		t.Errorf("server to client after Close: %v", err)
	}
	short, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond) // it need not answer
	defer cancel()
	if _, err := d.Dial(short, l.Addr().String()); err == nil {
		t.Error("a closed listener was dialled")
	}
	select {
	case <-l.gone:
		t.Fatal("the socket was closed under a carrier")
	default:
	}
	server.Close(nil)
	ctx, cancel := context.WithTimeout(t.Context(), testPatience)
	defer cancel()
	if err := l.Shutdown(ctx); err != nil {
		t.Errorf("Shutdown after the last carrier: %v", err)
	}
	if _, err := l.sock.WriteTo([]byte("x"), l.Addr()); !errors.Is(err, net.ErrClosed) {
		t.Errorf("the socket is open after Shutdown: %v", err)
	}
}

func TestShutdownEndsWhatIsLeft(t *testing.T) {
	s, c, _ := configs(t)
	l := listen(t, Config{TLS: s})
	client, server := carriers(t, l, dialer(t, c))
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if err := l.Shutdown(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Shutdown: %v", err)
	}
	for name, done := range map[string]<-chan struct{}{"client": client.Done(), "server": server.Done()} {
		select {
		case <-done:
		case <-time.After(testPatience):
			t.Errorf("the %s's carrier lives on", name)
		}
	}
	if !errors.Is(server.Err(), tunnel.ProxyStopped) || !strings.Contains(client.Err().Error(), "shut down") {
		t.Errorf("server: %v; client: %v", server.Err(), client.Err())
	}
}

// A reconnect storm finds quic-go's queue of 32 emptied.
func TestAHundredDialAtOnce(t *testing.T) {
	s, c, _ := configs(t)
	l := listen(t, Config{TLS: s})
	d := dialer(t, c)
	const n = 100
	var all sync.WaitGroup
	errs := make(chan error, n)
	for range n {
		all.Go(func() {
			cc, err := d.Dial(context.Background(), l.Addr().String())
			for end := time.Now().Add(testPatience); errors.Is(err, tunnel.UDPBlocked) && time.Now().Before(end); {
				cc, err = d.Dial(context.Background(), l.Addr().String()) // a slow machine needs more than Dial's time for all
			}
			if err == nil {
				defer cc.Close()
				_, err = cc.Write([]byte("x"))
			}
			errs <- err
		})
	}
	all.Wait()
	for range n {
		if err := <-errs; err != nil {
			t.Fatal(err)
		}
	}
}

// stall starts a handshake that stays open at the server: the client never
// finishes its part. It returns once the server has counted it.
func stall(t *testing.T, l *Listener, c *tls.Config) {
	t.Helper()
	before := l.handshakes.Load()
	release := make(chan struct{})
	stalled := c.Clone()
	stalled.VerifyConnection = func(tls.ConnectionState) error {
		<-release
		return errors.New("given up")
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		dialer(t, stalled).Dial(context.Background(), l.Addr().String())
	}()
	t.Cleanup(func() { close(release); <-ended })
	soon(t, "the handshake is counted", func() bool { return l.handshakes.Load() > before })
}

func TestOpenHandshakesAreCountedAndBounded(t *testing.T) {
	s, c, _ := configs(t)
	l := listen(t, Config{TLS: s, Limits: Limits{Retry: 1, Handshakes: 2}})
	stall(t, l, c)
	if n := l.Stats().Proved; n != 0 {
		t.Errorf("%d peers had to prove their address before the limit", n)
	}
	// A Retry proves the address of the second one; it is served.
	client, server := carriers(t, l, dialer(t, c))
	if err := works(client, server); err != nil {
		t.Error("while a handshake is open:", err)
	}
	soon(t, "the finished handshake is no longer counted", func() bool { return l.handshakes.Load() == 1 })
	if n := l.Stats().Proved; n != 1 {
		t.Errorf("%d peers had to prove their address; want 1", n)
	}
	stall(t, l, c)
	_, err := dialer(t, c).Dial(t.Context(), l.Addr().String())
	if !errors.Is(err, tunnel.CloudUnreachable) || !strings.Contains(err.Error(), "refuses") {
		t.Errorf("with too many handshakes open: %v", err)
	}
	if s := l.Stats(); s.Handshakes != 2 || s.Connections != 1 || s.Refused == 0 {
		t.Errorf("Stats: %+v", s)
	}
}

func TestUnansweredConnectionsAreBounded(t *testing.T) {
	s, c, _ := configs(t)
	l := listen(t, Config{TLS: s, Limits: Limits{Unanswered: 1}})
	d := dialer(t, c)
	cc, sc := connect(t, l, d)
	defer cc.Close()
	refused, err := d.Dial(t.Context(), l.Addr().String())
	if err == nil {
		_, err = refused.Read(make([]byte, 1))
		refused.Close()
	}
	if !errors.Is(err, tunnel.LimitExceeded) {
		t.Errorf("one too many: %v", err)
	}
	// An answer makes room.
	if _, err := cc.Write([]byte("hello")); err != nil {
		t.Fatal(err)
	}
	if _, err := sc.Write([]byte("welcome")); err != nil {
		t.Fatal(err)
	}
	client, server := carriers(t, l, d)
	if err := works(client, server); err != nil {
		t.Error(err)
	}
	sc.Close()
}

func TestAClientThatRunsAheadIsCut(t *testing.T) {
	s, c, _ := configs(t)
	l := listen(t, Config{TLS: s})
	cc, sc := connect(t, l, dialer(t, c))
	defer sc.Close()
	if _, err := cc.Write([]byte("hello")); err != nil {
		t.Fatal(err)
	}
	client, err := cc.Carrier()
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close(nil)
	st, err := client.OpenStream(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	st.Write([]byte("not waiting for an answer"))
	select {
	case <-client.Done():
	case <-time.After(testPatience):
		t.Fatal("the client was allowed a second stream before the answer")
	}
}

// What a peer can make the server hold before it has been answered.
func TestAnUnansweredPeerHoldsLittle(t *testing.T) {
	s, c, _ := configs(t)
	l := listen(t, Config{TLS: s})
	cc, sc := connect(t, l, dialer(t, c))
	defer cc.Close()
	defer sc.Close()
	cc.SetDeadline(time.Now().Add(300 * time.Millisecond))
	n, err := cc.Write(make([]byte, 4<<20))
	// The rest may sit in our own packet that could not be sent any more.
	if err == nil || n > serverStreamWindow+2000 {
		t.Errorf("%d bytes were taken (%v); the bound is %d", n, err, serverStreamWindow)
	}
}

func TestARestartedListenerResetsOldConnections(t *testing.T) {
	s, c, _ := configs(t)
	key := [32]byte{1, 2, 3}
	first := listen(t, Config{TLS: s, StatelessResetKey: &key})
	at := first.Addr().(*net.UDPAddr)
	client, _ := carriers(t, first, dialer(t, c))
	// As if the process had been killed: nobody says goodbye.
	first.transport.Close()
	first.sock.Close()
	again, err := net.ListenUDP("udp4", at)
	if err != nil {
		t.Skip("another process has taken the port meanwhile:", err)
	}
	second, err := Listen(again, Config{TLS: s, StatelessResetKey: &key})
	if err != nil {
		t.Fatal(err)
	}
	defer second.Shutdown(t.Context())
	st, err := client.OpenStream(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	st.Write(make([]byte, 100))
	select {
	case <-client.Done():
		if !errors.Is(client.Err(), tunnel.CloudUnreachable) || !strings.Contains(client.Err().Error(), "restarted") {
			t.Errorf("Err: %v", client.Err())
		}
	case <-time.After(testPatience):
		t.Error("the client did not notice the restart")
	}
}

func TestGarbageDisturbsNobody(t *testing.T) {
	s, c, _ := configs(t)
	l := listen(t, Config{TLS: s})
	client, server := carriers(t, l, dialer(t, c))
	noise, err := net.Dial("udp4", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer noise.Close()
	for first := range 256 {
		p := make([]byte, 1+first*5)
		for i := range p {
			p[i] = byte(first + i*i)
		}
		noise.Write(p)
	}
	if err := works(client, server); err != nil {
		t.Error(err)
	}
	carriers(t, l, dialer(t, c))
}

func TestFailedDialsSayWhy(t *testing.T) {
	s, c, _ := configs(t)
	l := listen(t, Config{TLS: s})
	silent := udp(t)
	defer silent.Close()
	stranger := c.Clone()
	stranger.RootCAs = x509.NewCertPool()
	misnamed := c.Clone()
	misnamed.ServerName = "other.test"
	pinned := c.Clone()
	pinned.InsecureSkipVerify = true // the pin below is the verification
	pinned.VerifyConnection = func(tls.ConnectionState) error {
		return tunnel.Errorf(tunnel.CertificateUntrusted, "the certificate is not the pinned one")
	}
	foreign := c.Clone()
	foreign.NextProtos = []string{"h3"}
	for name, test := range map[string]struct {
		tls     *tls.Config
		address string
		want    tunnel.Code
	}{
		"nobody answers":     {c, silent.LocalAddr().String(), tunnel.UDPBlocked},
		"unknown authority":  {stranger, l.Addr().String(), tunnel.CertificateUntrusted},
		"other name":         {misnamed, l.Addr().String(), tunnel.CertificateUntrusted},
		"not the pinned one": {pinned, l.Addr().String(), tunnel.CertificateUntrusted},
		"another protocol":   {foreign, l.Addr().String(), tunnel.CloudUnreachable},
		"no such name":       {c, "no..name:443", tunnel.NameUnresolved}, // no DNS server is asked
		"no port":            {c, "127.0.0.1", tunnel.ConfigInvalid},
		"port zero":          {c, "127.0.0.1:0", tunnel.ConfigInvalid},
	} {
		t.Run(name, func(t *testing.T) {
			ctx := t.Context()
			if test.want == tunnel.UDPBlocked {
				var cancel context.CancelFunc
				ctx, cancel = context.WithTimeout(ctx, 200*time.Millisecond)
				defer cancel()
			}
			cc, err := dialer(t, test.tls).Dial(ctx, test.address)
			if err == nil {
				cc.Close()
			}
			if !errors.Is(err, test.want) {
				t.Errorf("%v; want %s", err, test.want)
			}
		})
	}
	t.Run("cancelled", func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		time.AfterFunc(30*time.Millisecond, cancel)
		if _, err := dialer(t, c).Dial(ctx, silent.LocalAddr().String()); !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
	})
}

// In TLS 1.3 the client's handshake ends before the server has judged its certificate.
func TestAClientWithoutCertificateIsNotAccepted(t *testing.T) {
	s, c, _ := configs(t)
	l := listen(t, Config{TLS: s})
	bare := c.Clone()
	bare.Certificates = nil
	cc, err := dialer(t, bare).Dial(t.Context(), l.Addr().String())
	if err == nil {
		cc.SetDeadline(time.Now().Add(testPatience))
		_, err = cc.Read(make([]byte, 1))
		cc.Close()
	}
	if !errors.Is(err, tunnel.NotPermitted) {
		t.Errorf("%v; want %s", err, tunnel.NotPermitted)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if sc, err := l.Accept(ctx); err == nil {
		sc.Close()
		t.Error("Accept returned it")
	}
}

func TestAKeyThatIsNotEd25519IsNil(t *testing.T) {
	s, c, _ := configs(t)
	l := listen(t, Config{TLS: s})
	other := c.Clone()
	other.Certificates = s.Certificates // ECDSA
	cc, sc := connect(t, l, dialer(t, other))
	defer cc.Close()
	defer sc.Close()
	if key := sc.PeerKey(); key != nil {
		t.Errorf("PeerKey is %x", key)
	}
}

func TestADialWithoutRouteFailsAtOnce(t *testing.T) {
	const address = "[2001:db8::1]:443" // RFC 3849: routed nowhere
	probe, err := net.Dial("udp6", address)
	if err == nil {
		probe.Close()
		t.Skip("this machine has an IPv6 route")
	}
	_, c, _ := configs(t)
	_, err = dialer(t, c).Dial(t.Context(), address)
	if code := tunnel.CodeOf(err); code != tunnel.CloudUnreachable && code != tunnel.UDPBlocked { // the latter where a firewall refuses it
		t.Errorf("Dial: %v", err)
	}
	if errors.Is(err, errNoAnswer) || errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("an answer was waited for: %v", err)
	}
}

func TestTheSocketKeepsErrorsThatPass(t *testing.T) {
	closed := udp(t)
	to := closed.LocalAddr().(*net.UDPAddr)
	closed.Close()
	// On a connected socket the ICMP error of one packet is the next one's errno.
	conn, err := net.DialUDP("udp4", nil, to)
	if err != nil {
		t.Fatal(err)
	}
	s := &socket{UDPConn: conn}
	defer s.Close()
	p := []byte("x")
	soon(t, "an errno is counted", func() bool {
		n, _, err := s.WriteMsgUDP(p, nil, nil)
		if n != len(p) || err != nil {
			t.Fatalf("%d, %v; want the packet to count as sent", n, err)
		}
		return s.failed.Load() > 0
	})
	s.strict.Store(true)
	soon(t, "while dialling, an errno is passed on", func() bool {
		_, _, err := s.WriteMsgUDP(p, nil, nil)
		return errors.Is(err, syscall.ECONNREFUSED)
	})
	s.strict.Store(false)
	for err, want := range map[error]bool{
		syscall.ENETUNREACH: true, syscall.EPERM: true, syscall.ENOBUFS: true, syscall.EHOSTUNREACH: true,
		// quic-go acts on these: path MTU, GSO, a closed socket.
		syscall.EMSGSIZE: false, syscall.EIO: false, net.ErrClosed: false,
	} {
		if passes(&net.OpError{Op: "write", Err: err}) != want {
			t.Errorf("%v: passes is %v", err, !want)
		}
	}
}

func TestTheWrappedSocketKeepsOffload(t *testing.T) {
	s, c, _ := configs(t)
	bare, err := quic.Listen(udp(t), s, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer bare.Close()
	conn, err := quic.DialAddr(t.Context(), bare.Addr().String(), c, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.CloseWithError(0, "")
	l := listen(t, Config{TLS: s})
	client, _ := carriers(t, l, dialer(t, c))
	if got, want := client.(*carrier).conn.ConnectionState().GSO, conn.ConnectionState().GSO; got != want {
		t.Errorf("GSO is %v; quic-go's own is %v", got, want)
	}
}

// deaf hears nothing: quic-go repeats what it has said, again and again.
type deaf struct {
	net.PacketConn
	heard chan struct{} // closed with the first packet
	once  sync.Once
}

func (d *deaf) ReadFrom(p []byte) (int, net.Addr, error) {
	for {
		if _, _, err := d.PacketConn.ReadFrom(p); err != nil {
			return 0, nil, err
		}
		d.once.Do(func() { close(d.heard) })
	}
}

func TestAHandshakeThatGoesOnAndOnEnds(t *testing.T) {
	if testing.Short() {
		t.Skip("five seconds")
	}
	s, c, _ := configs(t)
	l := listen(t, Config{TLS: s})
	d := &deaf{PacketConn: udp(t), heard: make(chan struct{})}
	transport := &quic.Transport{Conn: d}
	defer d.PacketConn.Close()
	defer transport.Close()
	ctx, cancel := context.WithCancel(t.Context())
	dialled := make(chan struct{})
	go func() {
		defer close(dialled)
		transport.Dial(ctx, l.Addr(), c, &quic.Config{HandshakeIdleTimeout: 2 * testPatience})
	}()
	<-d.heard
	began := time.Now()
	for l.Stats().Handshakes > 0 {
		time.Sleep(10 * time.Millisecond)
	}
	// quic-go's own limit would be twice as much, and packets come for longer than that.
	if took := time.Since(began); took > 2*handshakeTimeout-time.Second {
		t.Errorf("the handshake lasted %v", took)
	}
	cancel()
	<-dialled
}
