package uplink

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"math/big"
	"net"
	"slices"
	"strings"
	"testing"
	"time"

	"culvert/tunnel"
)

const serverName = "proxy.example.net"

// authority signs certificates.
type authority struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func newAuthority(t *testing.T, name string) *authority {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	a := &authority{key: key}
	a.cert = a.sign(t, &x509.Certificate{
		Subject: pkix.Name{CommonName: name}, IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}, nil, key)
	return a
}

func (a *authority) sign(t *testing.T, c, parent *x509.Certificate, key *ecdsa.PrivateKey) *x509.Certificate {
	t.Helper()
	if parent == nil {
		parent = c
	}
	c.SerialNumber, c.NotBefore, c.NotAfter = big.NewInt(7), time.Now().Add(-time.Hour), time.Now().Add(time.Hour)
	der, err := x509.CreateCertificate(rand.Reader, c, parent, key.Public(), a.key)
	if err != nil {
		t.Fatal(err)
	}
	out, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// server returns a certificate for a name.
func (a *authority) server(t *testing.T, name string) tls.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	c := a.sign(t, &x509.Certificate{Subject: pkix.Name{CommonName: name}, DNSNames: []string{name}}, a.cert, key)
	return tls.Certificate{Certificate: [][]byte{c.Raw}, PrivateKey: key, Leaf: c}
}

// ownSigned returns a certificate as init makes it.
func ownSigned(t *testing.T, name string) tls.Certificate {
	t.Helper()
	a := newAuthority(t, "")
	c := a.sign(t, &x509.Certificate{Subject: pkix.Name{CommonName: name}, DNSNames: []string{name}}, nil, a.key)
	return tls.Certificate{Certificate: [][]byte{c.Raw}, PrivateKey: a.key, Leaf: c}
}

func (a *authority) pool() *x509.CertPool {
	p := x509.NewCertPool()
	p.AddCert(a.cert)
	return p
}

var sidecarKey = ed25519.NewKeyFromSeed(bytes.Repeat([]byte{7}, ed25519.SeedSize))

// handshake returns the client's error and what the server saw.
func handshake(t *testing.T, c, s *tls.Config) (tls.ConnectionState, error) {
	t.Helper()
	// Not net.Pipe: it holds nothing, and each side may speak while the other does.
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	near, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	far, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []net.Conn{near, far} {
		c.SetDeadline(time.Now().Add(time.Minute))
	}
	server := tls.Server(far, s)
	over := make(chan struct{})
	go func() {
		defer close(over)
		server.Handshake()
		server.Write([]byte{1}) // in TLS 1.3 the client learns of a refusal with the first bytes
		far.Close()
	}()
	client := tls.Client(near, c)
	err = client.Handshake()
	if err == nil {
		_, err = client.Read(make([]byte, 1))
	}
	near.Close()
	<-over
	return server.ConnectionState(), err
}

func serverTLS(cert tls.Certificate) *tls.Config {
	return &tls.Config{Certificates: []tls.Certificate{cert}, ClientAuth: tls.RequireAnyClientCert, NextProtos: []string{DefaultALPN, "other"}}
}

func TestClientTLSRefuses(t *testing.T) {
	for name, c := range map[string]TLSConfig{
		"no key":                        {ServerName: serverName},
		"half a key":                    {Key: sidecarKey[:32], ServerName: serverName},
		"no name":                       {Key: sidecarKey},
		"an IPv4 address for the name":  {Key: sidecarKey, ServerName: "192.0.2.1"},
		"an IPv6 address for the name":  {Key: sidecarKey, ServerName: "2001:db8::1"},
		"a pin that is none":            {Key: sidecarKey, ServerName: serverName, Pins: []string{"sha256/x"}},
		"one of two pins that is wrong": {Key: sidecarKey, ServerName: serverName, Pins: []string{"sha256/AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=", ""}},
	} {
		if conf, err := ClientTLS(c); conf != nil || tunnel.CodeOf(err) != tunnel.ConfigInvalid {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestWhomTheSidecarTrusts(t *testing.T) {
	ours, foreign := newAuthority(t, "Our CA"), newAuthority(t, "Inspecting Firewall")
	good := ours.server(t, serverName)
	pin := tunnel.Pin(good.Leaf)
	inspected := foreign.server(t, serverName)
	// An inspector's certificate for clients only is one that no chain allows.
	unfit := foreign.server(t, serverName)
	unfit.Leaf = foreign.sign(t, &x509.Certificate{DNSNames: []string{serverName}, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}, foreign.cert, unfit.PrivateKey.(*ecdsa.PrivateKey))
	unfit.Certificate = [][]byte{unfit.Leaf.Raw}
	other := "sha256/AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA="
	for name, c := range map[string]struct {
		conf    TLSConfig
		shown   tls.Certificate
		trusted bool
		words   []string // in the error; tls_intercepted where it mentions trust_interception
	}{
		"its pin, whoever signed it":             {TLSConfig{Pins: []string{pin}}, good, true, nil},
		"its pin, with roots that do not know":   {TLSConfig{Pins: []string{pin}, Roots: foreign.pool()}, good, true, nil},
		"one of two pins":                        {TLSConfig{Pins: []string{other, pin}}, good, true, nil},
		"its pin under another name":             {TLSConfig{Pins: []string{pin}, ServerName: "another.example.net"}, good, true, nil},
		"another pin":                            {TLSConfig{Pins: []string{other}}, good, false, []string{"Our CA", pin, "pinned", "trust_interception"}},
		"another key, by itself":                 {TLSConfig{Pins: []string{other}}, ownSigned(t, serverName), false, []string{"pinned", "new key"}},
		"a portal of another name":               {TLSConfig{Pins: []string{other}}, foreign.server(t, "portal.example.net"), false, []string{"Inspecting Firewall", "something else answers"}},
		"an inspector that is trusted":           {TLSConfig{Pins: []string{pin}, Roots: foreign.pool(), Inspectors: []string{"Inspecting Firewall"}}, inspected, false, []string{"trust_interception"}},
		"an inspected path, though roots say so": {TLSConfig{Pins: []string{pin}, Roots: foreign.pool()}, inspected, false, []string{"Inspecting Firewall", tunnel.Pin(inspected.Leaf), "opens TLS", "trust_interception"}},
		"an inspector whose authority is absent": {TLSConfig{Pins: []string{pin}, Roots: ours.pool(), Inspectors: []string{"Inspecting Firewall"}}, inspected, false, []string{"trust_interception", "ca_file"}},
		"a named inspector's, not for servers":   {TLSConfig{Pins: []string{pin}, Roots: foreign.pool(), Inspectors: []string{"Inspecting Firewall"}}, unfit, false, []string{"trust_interception", "names it", "incompatible key usage"}},
		"no pin, its own roots":                  {TLSConfig{Roots: ours.pool()}, good, true, nil},
		"no pin, other roots":                    {TLSConfig{Roots: foreign.pool()}, good, false, nil},
		"no pin, the system's roots":             {TLSConfig{}, good, false, nil},
		"no pin, another name":                   {TLSConfig{Roots: ours.pool(), ServerName: "another.example.net"}, good, false, []string{"another.example.net"}},
	} {
		t.Run(name, func(t *testing.T) {
			c.conf.Key = sidecarKey
			if c.conf.ServerName == "" {
				c.conf.ServerName = serverName
			}
			conf, err := ClientTLS(c.conf)
			if err != nil {
				t.Fatal(err)
			}
			_, err = handshake(t, conf, serverTLS(c.shown))
			if (err == nil) != c.trusted {
				t.Fatalf("handshake: %v, want trusted: %v", err, c.trusted)
			}
			want := tunnel.CertificateUntrusted
			if slices.Contains(c.words, "trust_interception") {
				want = tunnel.TLSIntercepted
			}
			if len(c.conf.Pins) > 0 && !c.trusted && !errors.Is(err, want) {
				t.Errorf("%v has not the code %s", err, want)
			}
			var by *Inspected
			if errors.As(err, &by) && by.Trusted != (name == "an inspector that is trusted") {
				t.Errorf("%v is trusted: %v", by, by.Trusted)
			}
			for _, w := range c.words {
				if !strings.Contains(err.Error(), w) {
					t.Errorf("%q does not mention %q", err, w)
				}
			}
		})
	}
}

func TestWhomTheOuterTLSTrusts(t *testing.T) {
	ours, foreign := newAuthority(t, "Our CA"), newAuthority(t, "Inspecting Firewall")
	own := ownSigned(t, serverName)
	conf := TLSConfig{Pins: []string{tunnel.Pin(own.Leaf)}, Roots: ours.pool()}
	for name, c := range map[string]struct {
		shown tls.Certificate
		want  tunnel.Code
	}{
		"the cloud proxy's own":           {own, ""},
		"a load balancer's, of our CA":    {ours.server(t, serverName), ""},
		"one of our CA, for another name": {ours.server(t, "other.example.net"), tunnel.CertificateUntrusted},
		"one of a CA that is not ours":    {foreign.server(t, serverName), tunnel.TLSIntercepted},
		"another that has signed itself":  {ownSigned(t, serverName), tunnel.CertificateUntrusted},
	} {
		outer := OuterTLS(conf)
		outer.ServerName = serverName
		server := serverTLS(c.shown)
		server.ClientAuth = tls.NoClientCert
		if _, err := handshake(t, outer, server); tunnel.CodeOf(err) != c.want {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestTheSidecarShowsItsKeyAndItsName(t *testing.T) {
	ours := newAuthority(t, "Our CA")
	good := ours.server(t, serverName)
	for alpn, want := range map[string]string{"": DefaultALPN, "other": "other"} {
		conf, err := ClientTLS(TLSConfig{Key: sidecarKey, Roots: ours.pool(), ServerName: serverName, ALPN: alpn})
		if err != nil {
			t.Fatal(err)
		}
		seen, err := handshake(t, conf, serverTLS(good))
		if err != nil {
			t.Fatal(err)
		}
		if seen.ServerName != serverName || seen.NegotiatedProtocol != want || seen.Version != tls.VersionTLS13 {
			t.Errorf("the server saw %q, %q, version %x", seen.ServerName, seen.NegotiatedProtocol, seen.Version)
		}
		if key, ok := seen.PeerCertificates[0].PublicKey.(ed25519.PublicKey); !ok || !key.Equal(sidecarKey.Public()) {
			t.Error("the server saw another key")
		}
	}
	old := serverTLS(good)
	old.MaxVersion = tls.VersionTLS12
	conf, err := ClientTLS(TLSConfig{Key: sidecarKey, Roots: ours.pool(), ServerName: serverName})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := handshake(t, conf, old); err == nil {
		t.Error("TLS 1.2 was accepted")
	}
}
