package tunnelquic

import (
	"cmp"
	"context"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"math/big"
	"net"
	"net/netip"
	"testing"
	"time"

	"go.uber.org/goleak"

	"culvert/tunnel"
	"culvert/tunnel/tunneltest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const alpn = "culvert-test"

// certificate makes a self-signed one for key.
func certificate(t testing.TB, public, private any) tls.Certificate {
	t.Helper()
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1),
		NotBefore:    time.Now().Add(-time.Hour),
		NotAfter:     time.Now().Add(time.Hour),
		DNSNames:     []string{"proxy.test"},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, public, private)
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: private}
}

// configs returns TLS for a server and for a client that trusts it, and the
// client's key.
func configs(t testing.TB) (server, client *tls.Config, key ed25519.PublicKey) {
	t.Helper()
	ec, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	cert := certificate(t, &ec.PublicKey, ec)
	leaf, err := x509.ParseCertificate(cert.Certificate[0])
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AddCert(leaf)
	key, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	server = &tls.Config{NextProtos: []string{alpn}, Certificates: []tls.Certificate{cert}, ClientAuth: tls.RequireAnyClientCert}
	client = &tls.Config{NextProtos: []string{alpn}, Certificates: []tls.Certificate{certificate(t, key, private)},
		RootCAs: roots, ServerName: "proxy.test"}
	return server, client, key
}

func udp(t testing.TB) *net.UDPConn {
	t.Helper()
	conn, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	return conn
}

// standing is how old a datagram may be in tests: longer than a machine stands
// still.
const standing = 20 * time.Second

// listen starts a listener that is shut down when the test is over.
func listen(t testing.TB, c Config) *Listener {
	t.Helper()
	c.MaxAge = cmp.Or(c.MaxAge, standing)
	l, err := Listen(udp(t), c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		now, cancel := context.WithCancel(context.Background())
		cancel()
		l.Shutdown(now)
	})
	return l
}

// listenAt is listen on an address; the test is skipped where the host lacks it.
func listenAt(t testing.TB, network, address string, c Config) *Listener {
	t.Helper()
	conn, err := net.ListenUDP(network, net.UDPAddrFromAddrPort(netip.MustParseAddrPort(address)))
	if err != nil {
		t.Skip(err)
	}
	c.MaxAge = cmp.Or(c.MaxAge, standing)
	l, err := Listen(conn, c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { kill(l) })
	return l
}

// kill ends a listener as if its process had been killed: nobody says goodbye.
func kill(l *Listener) {
	l.transport.Close()
	l.sock.Close()
	l.Close() // ends what is left in this process
}

func dialer(t testing.TB, c *tls.Config) *Dialer {
	t.Helper()
	d, err := NewDialer(Config{TLS: c, MaxAge: standing})
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// connect makes one connection through l.
func connect(t testing.TB, l *Listener, d *Dialer) (client, server tunnel.Candidate) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), testPatience)
	defer cancel()
	client, err := d.Dial(ctx, l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	server, err = l.Accept(ctx)
	if err != nil {
		t.Fatal(err)
	}
	return client, server
}

func TestQUICPassesTheExam(t *testing.T) {
	tunneltest.Exam(t, func(t *testing.T) tunneltest.Setup {
		s, c, key := configs(t)
		l, d := listen(t, Config{TLS: s}), dialer(t, c)
		return tunneltest.Setup{
			Pair:      func(t *testing.T) (client, server tunnel.Candidate) { return connect(t, l, d) },
			Key:       key,
			Datagrams: true,
		}
	})
}
