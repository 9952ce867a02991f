package tunneltls

import (
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"math/big"
	"net"
	"testing"
	"time"

	"go.uber.org/goleak"

	"culvert/tunnel"
	"culvert/tunnel/tunneltest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// certificate makes a self-signed one for an Ed25519 key.
func certificate(t testing.TB, name string) tls.Certificate {
	t.Helper()
	public, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1),
		Subject:      pkix.Name{CommonName: name},
		DNSNames:     []string{name},
		NotBefore:    time.Now().Add(-time.Hour),
		NotAfter:     time.Now().Add(time.Hour),
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, public, private)
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: private, Leaf: leaf}
}

// patience is how long the tests wait for what must come, on a slow machine too.
const patience = time.Minute

// both makes the configurations of a client and of a server that trust each
// other, and give each other time for handshakes.
func both(t testing.TB) (client, server Config) {
	t.Helper()
	cc, sc := certificate(t, "sidecar"), certificate(t, "cloud.test")
	roots := x509.NewCertPool()
	roots.AddCert(sc.Leaf)
	client.TLS = &tls.Config{Certificates: []tls.Certificate{cc}, RootCAs: roots, ServerName: "cloud.test", NextProtos: []string{"culvert"}}
	server.TLS = &tls.Config{Certificates: []tls.Certificate{sc}, ClientAuth: tls.RequireAnyClientCert, NextProtos: []string{"culvert"}}
	client.HandshakeTimeout, server.HandshakeTimeout = patience, patience
	return client, server
}

func listen(t testing.TB, cfg Config) tunnel.Listener {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	l, err := Listen(ln, cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

func dialer(t testing.TB, cfg Config) *Dialer {
	t.Helper()
	d, err := NewDialer(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// meet makes one connection.
func meet(t testing.TB, d *Dialer, l tunnel.Listener) (client, server tunnel.Candidate) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	type result struct {
		c   tunnel.Candidate
		err error
	}
	accepted := make(chan result, 1)
	go func() {
		c, err := l.Accept(ctx)
		accepted <- result{c, err}
	}()
	client, err := d.Dial(ctx, l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	r := <-accepted
	if r.err != nil {
		t.Fatal(r.err)
	}
	return client, r.c
}

func TestTLSPassesTheExam(t *testing.T) {
	tunneltest.Exam(t, func(t *testing.T) tunneltest.Setup {
		client, server := both(t)
		l, d := listen(t, server), dialer(t, client)
		return tunneltest.Setup{
			Pair:  func(t *testing.T) (tunnel.Candidate, tunnel.Candidate) { return meet(t, d, l) },
			Key:   client.TLS.Certificates[0].Leaf.PublicKey.(ed25519.PublicKey),
			Lanes: true,
		}
	})
}
