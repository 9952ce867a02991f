package main

import (
	"bufio"
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"culvert/cmd/internal/assemble"
	"culvert/cmd/internal/netpair"
	"culvert/sidecar/control"
	"culvert/tunnel"
)

// authority signs certificates, as a clinic's own does.
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
	a := &authority{key: key, cert: &x509.Certificate{
		Subject: pkix.Name{CommonName: name}, IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
		SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
	}}
	der, err := x509.CreateCertificate(rand.Reader, a.cert, a.cert, key.Public(), key)
	if err == nil {
		a.cert, err = x509.ParseCertificate(der)
	}
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// certificate makes one for a name.
func (a *authority) certificate(t *testing.T, name string) tls.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
		Subject: pkix.Name{CommonName: name}, DNSNames: []string{name},
		SerialNumber: big.NewInt(2), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
	}, a.cert, key.Public(), a.key)
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

func (a *authority) write(t *testing.T, file string) {
	t.Helper()
	if err := os.WriteFile(file, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: a.cert.Raw}), 0o644); err != nil {
		t.Fatal(err)
	}
}

// behind changes the configurations so that the cloud proxy listens on loopback
// alone, with a WebSocket, and the sidecar knows the authority ca.pem.
func behind(t *testing.T, dir string, ca *authority, sidecar func(text string) string) {
	t.Helper()
	ca.write(t, filepath.Join(dir, "ca.pem"))
	rewrite(t, dir, sidecar, func(text string) string {
		return regexp.MustCompile(`(?m)^listen: .*$`).ReplaceAllString(text, "listen: 127.0.0.1:443") +
			"websocket:\n  path: /culvert\n  listen: 127.0.0.1:8080\n"
	})
}

// under adds lines to the section cloud_proxy.
func under(text string, lines ...string) string {
	return strings.Replace(text, "cloud_proxy:\n", "cloud_proxy:\n  "+strings.Join(lines, "\n  ")+"\n", 1)
}

// A load balancer ends TLS, and passes what is a WebSocket at one path, and
// nothing else.
func throughNginx(t *testing.T, bin string) {
	pair := netpair.New(t)
	throughNginxAt(t, bin, pair, "", 443, "through a WebSocket at ")
}

// The same from a clinic whose proxy asks for a password.
func throughSquidAndNginx(t *testing.T, bin string) {
	pair := netpair.New(t)
	at := squid(t, pair)
	more := fmt.Sprintf("mode: tcp\nproxy:\n  url: http://%s\n  user: alice\n  password_file: password\n", at)
	throughNginxAt(t, bin, pair, more, at.Port(), "through the proxy http://"+at.String()+", and a WebSocket at ")
}

// throughNginxAt adds more to the sidecar's configuration. All that passes is to go
// to one port, and the link's state to say by what.
func throughNginxAt(t *testing.T, bin string, pair *netpair.Pair, more string, port uint16, says string) {
	program, dir := needed(t, "nginx"), t.TempDir()
	ca := newAuthority(t, "Clinic CA")
	cert := ca.certificate(t, assemble.DefaultServerName)
	key, err := x509.MarshalPKCS8PrivateKey(cert.PrivateKey)
	if err != nil {
		t.Fatal(err)
	}
	conf := strings.NewReplacer("DIR", dir, "AT", netip.AddrPortFrom(netpair.FarAddr, 443).String()).Replace(`user root;
daemon off;
master_process off;
pid DIR/pid;
error_log DIR/log;
events {}
http {
	access_log off;
	client_body_temp_path DIR/1; proxy_temp_path DIR/2; fastcgi_temp_path DIR/3; uwsgi_temp_path DIR/4; scgi_temp_path DIR/5;
	server {
		listen AT ssl;
		ssl_certificate DIR/cert.pem;
		ssl_certificate_key DIR/key.pem;
		location = /calls {
			if ($http_upgrade != "websocket") { return 403; }
			proxy_pass http://127.0.0.1:8080/culvert;
			proxy_http_version 1.1;
			proxy_set_header Upgrade $http_upgrade;
			proxy_set_header Connection upgrade;
			proxy_read_timeout 1h;
		}
		location / { return 403; }
	}
}
`)
	for name, text := range map[string][]byte{
		"nginx.conf": []byte(conf), "cert.pem": pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert.Certificate[0]}),
		"key.pem": pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: key}),
	} {
		if err := os.WriteFile(filepath.Join(dir, name), text, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	t.Cleanup(func() {
		if log, err := os.ReadFile(filepath.Join(dir, "log")); t.Failed() && err == nil {
			t.Logf("nginx:\n%s", log)
		}
	})
	o := newOnly443On(t, bin, pair, func(dir string) {
		os.WriteFile(filepath.Join(dir, "password"), []byte("sesame"), 0o600)
		behind(t, dir, ca, func(text string) string {
			return more + under(strings.Replace(text, netpair.FarAddr.String()+":443", "wss://"+netpair.FarAddr.String()+"/calls", 1), "ca_file: ca.pem")
		})
	})
	pair.Far.Start(t, exec.Command(program, "-e", filepath.Join(dir, "log"), "-c", filepath.Join(dir, "nginx.conf")))
	farAnswers(t, pair, netip.AddrPortFrom(netpair.FarAddr, 443))
	w := pair.Watch(t, port)
	o.start(pair.Near, o.culvert, "run", "-c", filepath.Join(o.dir, "culvert.yaml"), "--listen", "127.0.0.1:0", "--control", o.socket)
	runReady(t, o.socket)
	st := o.status()
	if st.Link.Carrier != "tls" || st.Link.Way != "lanes" || !strings.Contains(st.Link.Why, says+"wss://"+netpair.FarAddr.String()+"/calls") {
		t.Errorf("the link is %+v", st.Link)
	}
	o.media(st.Listen)
	o.stream(st.Listen, "127.0.0.1")
	o.call(st.Listen)
	if s := w.Stop(); s.TCP < 100 || len(s.Stray) > 0 {
		t.Errorf("seen %+v, want TCP %d alone, and what tries UDP 443", s, port)
	}
}

// inspector opens TLS as a firewall does that reads along: it shows a certificate
// of its own authority, and passes on what is HTTP. It keeps what it reads.
type inspector struct {
	mu   sync.Mutex
	read bytes.Buffer
	up   int // WebSockets that were passed on
}

func (i *inspector) Write(p []byte) (int, error) {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.read.Write(p)
}

func newInspector(t *testing.T, pair *netpair.Pair, ca *authority) *inspector {
	t.Helper()
	i := &inspector{}
	cert := ca.certificate(t, assemble.DefaultServerName)
	var ln net.Listener
	if err := pair.Far.Do(func() (err error) {
		ln, err = net.Listen("tcp4", netip.AddrPortFrom(netpair.FarAddr, 443).String())
		return err
	}); err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	serve := func(raw net.Conn) {
		defer raw.Close()
		raw.SetDeadline(time.Now().Add(runPatience))
		near := tls.Server(raw, &tls.Config{Certificates: []tls.Certificate{cert}, NextProtos: []string{"http/1.1"}, MaxVersion: tls.VersionTLS12})
		br := bufio.NewReader(io.TeeReader(near, i))
		req, err := http.ReadRequest(br)
		if err != nil {
			return
		}
		var below net.Conn
		if pair.Far.Do(func() (err error) { below, err = net.Dial("tcp4", "127.0.0.1:443"); return err }) != nil {
			return
		}
		defer below.Close()
		far := tls.Client(below, &tls.Config{InsecureSkipVerify: true, MaxVersion: tls.VersionTLS12})
		if req.Write(far) != nil {
			return
		}
		i.mu.Lock()
		i.up++
		i.mu.Unlock()
		wg.Go(func() { io.Copy(far, br); below.Close() })
		io.Copy(near, io.TeeReader(far, i))
	}
	wg.Go(func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			wg.Go(func() { serve(c) })
		}
	})
	t.Cleanup(func() { ln.Close(); wg.Wait() })
	return i
}

// A clinic's firewall reads along. The tunnel does not go through it unless the
// operator names its authority, and then it reads nothing of the calls.
func throughInspection(t *testing.T, bin string) {
	pair := netpair.New(t)
	ca := newAuthority(t, "Clinic Inspection CA")
	i := newInspector(t, pair, ca)
	o := newOnly443On(t, bin, pair, func(dir string) {
		behind(t, dir, ca, func(text string) string { return under(text, "ca_file: ca.pem") })
	})
	run := func() *exec.Cmd {
		return o.start(pair.Near, o.culvert, "run", "-c", filepath.Join(o.dir, "culvert.yaml"), "--listen", "127.0.0.1:0", "--control", o.socket, "--mode", "tcp")
	}
	first := run()
	runEventually(t, "the sidecar says who opens TLS", func() bool {
		st, err := control.NewClient(o.socket).Status(t.Context())
		return err == nil && st.Link.Code == tunnel.TLSIntercepted && strings.Contains(st.Link.Why, "Clinic Inspection CA")
	})
	first.Process.Kill()
	first.Wait()
	rewrite(t, o.dir, func(text string) string { return under(text, `trust_interception: "Clinic Inspection CA"`) }, nil)
	run()
	runReady(t, o.socket)
	st := o.status()
	if !strings.Contains(st.Link.Why, fmt.Sprintf("a WebSocket at wss://%s:443/culvert (TLS by a certificate of \"Clinic Inspection CA\")", netpair.FarAddr)) {
		t.Errorf("the link is %+v", st.Link)
	}
	o.media(st.Listen)
	o.stream(st.Listen, "127.0.0.1")
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.up < 2 || i.read.Len() < 256<<10 {
		t.Errorf("the inspector passed %d WebSockets on, and read %d bytes", i.up, i.read.Len())
	}
	for _, secret := range []string{`"token"`, "0123456789abcdef", string(make([]byte, 400))} {
		if bytes.Contains(i.read.Bytes(), []byte(secret)) {
			t.Errorf("the inspector could read %.20q", secret)
		}
	}
}
