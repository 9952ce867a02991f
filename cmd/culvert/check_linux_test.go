package main

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log"
	"math/big"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.yaml.in/yaml/v3"

	"culvert/cloudproxy/identity"
	"culvert/cmd/internal/assemble"
	"culvert/cmd/internal/cmdtest"
	"culvert/cmd/internal/config"
	"culvert/cmd/internal/netpair"
	"culvert/policy"
	"culvert/sidecar/check"
	"culvert/sidecar/control"
	"culvert/tunnel"
)

// checkCase is one cause, in a pair of its own: all run at the same time, since
// most of what they do is to wait.
type checkCase struct {
	prepare func(*checkBed)
	exit    int
	code    tunnel.Code
	says    string // in the one sentence
	next    string // in the next step
	also    func(*testing.T, *check.Report)
}

// checkBed is a pair, a configuration, and what the check is run with.
type checkBed struct {
	t     *testing.T
	bin   string
	pair  *netpair.Pair
	dir   string
	host  string
	init  []string // further arguments
	near  config.Sidecar
	rules string // for nft, in the input chain at the far end
	cloud func() // starts what stands there; nil: nothing does
	args  []string
	env   []string
	after func()
	cmd   *exec.Cmd
	out   bytes.Buffer
	bad   cmdtest.Text
	page  string
}

const checkName = "cloud.culvert.test"

// checkMake makes a configuration for both ends, before a case changes it.
func (b *checkBed) make() {
	b.t.Helper()
	args := append([]string{"init", "--host", b.host, "--dir", b.dir, "--allow", "127.0.0.1/32"}, b.init...)
	if out, err := exec.Command(filepath.Join(b.bin, "culvert-cloudproxy"), args...).CombinedOutput(); err != nil {
		b.t.Fatalf("init: %v\n%s", err, out)
	}
	text, err := os.ReadFile(filepath.Join(b.dir, "culvert.yaml"))
	if err == nil {
		err = yaml.Unmarshal(text, &b.near)
	}
	if err != nil {
		b.t.Fatal(err)
	}
}

// start starts a program of ours at one end.
func (b *checkBed) start(at *netpair.Space, args ...string) {
	log := &cmdtest.Text{}
	cmd := exec.Command(filepath.Join(b.bin, args[0]), args[1:]...)
	cmd.Stdout, cmd.Stderr = log, log
	b.t.Cleanup(func() {
		if b.t.Failed() {
			b.t.Logf("%s:\n%s", args[0], log)
		}
	})
	at.Start(b.t, cmd)
}

// runCloud runs the cloud proxy until it listens.
func (b *checkBed) runCloud() {
	b.start(b.pair.Far, "culvert-cloudproxy", "run", "-c", filepath.Join(b.dir, "cloudproxy.yaml"))
	runEventually(b.t, "the cloud proxy listens", func() bool {
		return b.pair.Far.Do(func() error {
			c, err := net.Dial("tcp4", "127.0.0.1:443")
			if err == nil {
				c.Close()
			}
			return err
		}) == nil
	})
}

// listen listens at the far end.
func (b *checkBed) listen(port string) (l net.Listener) {
	if err := b.pair.Far.Do(func() (err error) { l, err = net.Listen("tcp4", ":"+port); return err }); err != nil {
		b.t.Fatal(err)
	}
	return l
}

// web serves pages at the far end, which send to a portal.
func (b *checkBed) web(l net.Listener) {
	s := &http.Server{Handler: http.RedirectHandler("http://portal.hotel.example/login?session=s3cret", http.StatusFound), ErrorLog: log.New(io.Discard, "", 0)}
	done := make(chan struct{})
	go func() { defer close(done); s.Serve(l) }()
	b.t.Cleanup(func() { s.Close(); <-done })
}

// tlsWeb serves pages with a certificate of its own.
func (b *checkBed) tlsWeb(cert tls.Certificate) {
	b.web(tls.NewListener(b.listen("443"), &tls.Config{Certificates: []tls.Certificate{cert}, NextProtos: []string{"h2", "http/1.1"}}))
}

// behindProxy lets nothing but an HTTP proxy reach the cloud proxy, which asks for
// ward's password by these schemes.
func (b *checkBed) behindProxy(schemes ...string) {
	b.near.Proxy.URL = "http://198.18.80.2:3128"
	b.rules = "tcp dport 443 drop\nudp dport 443 drop"
	cloud := b.cloud
	b.cloud = func() {
		cloud()
		passwordProxy(b.t, b.pair, b.listen("3128"), "ward", "w0rd", schemes...)
	}
}

// passwordProxy is an HTTP proxy that leads to the cloud proxy at the far end, whatever
// it is asked for, and asks for a user's password by these schemes.
func passwordProxy(t *testing.T, pair *netpair.Pair, l net.Listener, user, password string, schemes ...string) {
	s := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		name, word, _ := (&http.Request{Header: http.Header{"Authorization": r.Header["Proxy-Authorization"]}}).BasicAuth()
		if name != user || word != password {
			w.Header()["Proxy-Authenticate"] = schemes
			w.WriteHeader(http.StatusProxyAuthRequired)
			return
		}
		var far net.Conn
		if err := pair.Far.Do(func() (err error) { far, err = net.Dial("tcp4", "127.0.0.1:443"); return err }); err != nil {
			w.WriteHeader(http.StatusBadGateway)
			return
		}
		defer far.Close()
		near, _, err := http.NewResponseController(w).Hijack()
		if err != nil {
			return
		}
		defer near.Close()
		io.WriteString(near, "HTTP/1.1 200 OK\r\n\r\n")
		done := make(chan struct{})
		go func() { defer close(done); io.Copy(far, near); far.Close() }()
		io.Copy(near, far)
		near.Close()
		<-done
	}), ErrorLog: log.New(io.Discard, "", 0)}
	done := make(chan struct{})
	go func() { defer close(done); s.Serve(l) }()
	t.Cleanup(func() { s.Close(); <-done })
}

// write writes the sidecar's configuration, as the case has changed it.
func (b *checkBed) write() string {
	b.t.Helper()
	text, err := yaml.Marshal(b.near)
	file := filepath.Join(b.dir, "check.yaml")
	if err == nil {
		err = os.WriteFile(file, text, 0o600)
	}
	if err != nil {
		b.t.Fatal(err)
	}
	return file
}

// token puts another token into the configuration.
func (b *checkBed) token(c identity.Claims) {
	b.t.Helper()
	key, err := identity.LoadKey(filepath.Join(b.dir, "token.key"))
	if err == nil {
		c.App = b.near.Identity.App
		b.near.Identity.Token, err = identity.Issue(key, c)
	}
	if err != nil {
		b.t.Fatal(err)
	}
}

// begin starts the check.
func (b *checkBed) begin() {
	b.t.Helper()
	if b.cloud != nil {
		b.cloud()
	}
	if b.rules != "" {
		cmd := exec.Command("nft", "-f", "-")
		cmd.Stdin = strings.NewReader("table inet check { chain in { type filter hook input priority 0\niif lo accept\n" + b.rules + "\n}\n}")
		var out []byte
		if err := b.pair.Far.Do(func() (err error) { out, err = cmd.CombinedOutput(); return err }); err != nil {
			b.t.Fatalf("nft: %v\n%s", err, out)
		}
	}
	b.page = filepath.Join(b.dir, "report.html")
	args := append([]string{"check", "-c", b.write(), "--json", "--media", "600ms", "--report", b.page}, b.args...)
	b.cmd = exec.Command(os.Args[0], args...)
	b.cmd.Env = append(append(os.Environ(), runAsCulvert+"=1", "CULVERT_CONTROL="+filepath.Join(b.dir, "none.sock")), b.env...)
	b.cmd.Stdout, b.cmd.Stderr = &b.out, &b.bad
	b.pair.Near.Start(b.t, b.cmd)
}

// result waits for the check and reads what it has found.
func (b *checkBed) result(t *testing.T) (*check.Report, int) {
	t.Helper()
	err := b.cmd.Wait()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	var r check.Report
	if err := json.Unmarshal(b.out.Bytes(), &r); err != nil {
		t.Fatalf("%v\n%s%s", err, &b.out, &b.bad)
	}
	return &r, b.cmd.ProcessState.ExitCode()
}

// checkCertificate makes a certificate for a name, signed by a CA of another.
func checkCertificate(t *testing.T, name, ca string, expires time.Time) (cert tls.Certificate, chainPEM, keyPEM, caPEM []byte) {
	t.Helper()
	must := func(err error) {
		if err != nil {
			t.Fatal(err)
		}
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(err)
	authority := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: ca}, NotBefore: expires.AddDate(-1, 0, 0), NotAfter: expires.AddDate(2, 0, 0),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	caDER, err := x509.CreateCertificate(rand.Reader, authority, authority, key.Public(), key)
	must(err)
	leaf := &x509.Certificate{
		SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: name}, DNSNames: []string{name}, NotBefore: expires.AddDate(0, 0, -60), NotAfter: expires,
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, leaf, authority, key.Public(), key)
	must(err)
	pkcs8, err := x509.MarshalPKCS8PrivateKey(key)
	must(err)
	chainPEM = pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	keyPEM = pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: pkcs8})
	cert, err = tls.X509KeyPair(chainPEM, keyPEM)
	must(err)
	return cert, chainPEM, keyPEM, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: caDER})
}

// withCA has the cloud proxy show a certificate of a CA that the sidecar trusts,
// without a pin.
func (b *checkBed) withCA(expires time.Time) {
	_, chain, key, ca := checkCertificate(b.t, assemble.DefaultServerName, "Culvert Test CA", expires)
	for name, text := range map[string][]byte{"ca.pem": ca, "cert.pem": chain, "key.pem": key} {
		if err := os.WriteFile(filepath.Join(b.dir, name), text, 0o600); err != nil {
			b.t.Fatal(err)
		}
	}
	b.near.CloudProxy.Pin, b.near.CloudProxy.CAFile = nil, filepath.Join(b.dir, "ca.pem")
}

var checkCases = map[string]checkCase{
	"nothing": {
		prepare: func(b *checkBed) {
			b.near.Policy = policy.Config{} // and no destinations
		},
		code: "", says: "calls can be made", next: "nothing",
		also: func(t *testing.T, r *check.Report) {
			if len(r.Ways) != 2 || r.Ways[0].Carrier != "quic" || r.Ways[1].Way != "lanes" {
				t.Fatalf("media went %+v", r.Ways)
			}
			for _, w := range r.Ways {
				for _, row := range w.Rows() {
					if row.Sent < 10 || row.Arrived == 0 || row.Delay > time.Second {
						t.Errorf("%s, %s: %+v", w.Way, row.What, row.Figures)
					}
				}
			}
		},
	},
	"no DNS": {
		prepare: func(b *checkBed) { b.near.CloudProxy.Address, b.cloud = config.List{checkName + ":443"}, nil },
		exit:    1, code: tunnel.NameUnresolved, says: checkName, next: "DNS",
	},
	"TCP 443 refused": {
		prepare: func(b *checkBed) { b.rules = "tcp dport 443 reject with tcp reset" },
		exit:    5, code: tunnel.CloudUnreachable, says: "TCP to 198.18.80.2:443 is refused", next: "open TCP 443",
	},
	"TCP 443 dropped": {
		prepare: func(b *checkBed) { b.rules = "tcp dport 443 drop" },
		exit:    5, code: tunnel.CloudUnreachable, says: "TCP to 198.18.80.2:443 is dropped silently", next: "open TCP 443",
	},
	"UDP 443 dropped": {
		prepare: func(b *checkBed) { b.rules = "udp dport 443 drop" },
		exit:    5, code: tunnel.UDPBlocked, says: "UDP to 198.18.80.2:443 is dropped silently", next: "open UDP 443",
		also: func(t *testing.T, r *check.Report) {
			if len(r.Open) != 2 || r.Open[0].Status != check.Failed || r.Open[1].Status != check.Good {
				t.Errorf("to open: %+v", r.Open)
			}
		},
	},
	"UDP 443 rejected": {
		prepare: func(b *checkBed) { b.rules = "udp dport 443 reject" },
		exit:    5, code: tunnel.UDPBlocked, says: "UDP to 198.18.80.2:443 is refused", next: "open UDP 443",
	},
	"UDP 443 prohibited": {
		prepare: func(b *checkBed) { b.rules = "udp dport 443 reject with icmp type admin-prohibited" },
		exit:    5, code: tunnel.UDPBlocked, says: "UDP to 198.18.80.2:443 is rejected on the way", next: "open UDP 443",
	},
	"UDP 443 unreachable": { // an error of which the kernel does not tell unless it is asked to
		prepare: func(b *checkBed) { b.rules = "udp dport 443 reject with icmp type net-unreachable" },
		exit:    5, code: tunnel.UDPBlocked, says: "UDP to 198.18.80.2:443 is rejected on the way", next: "open UDP 443",
	},
	"QUIC filtered": {
		prepare: func(b *checkBed) { b.rules = "udp dport 443 @th,64,8 & 0x80 == 0x80 drop" }, // long headers (RFC 8999 §5.1)
		exit:    5, code: tunnel.UDPBlocked, says: "UDP packets pass to 198.18.80.2:443, but QUIC does not", next: "allow QUIC",
	},
	"UDP with the smallest MTU of IPv6 on the way": {
		prepare: func(b *checkBed) { b.rules = "udp dport 443 meta length > 1280 drop" },
		exit:    0, code: "", says: "calls can be made",
		also: func(t *testing.T, r *check.Report) { checkStepSays(t, r, check.StepUDP, "QUIC answers") },
	},
	"only small UDP": {
		prepare: func(b *checkBed) { b.rules = "udp dport 443 meta length > 1000 drop" },
		exit:    5, code: tunnel.UDPBlocked, says: "only small UDP packets pass to 198.18.80.2:443: of the sizes tried 600", next: "1,500 bytes",
	},
	"nothing passes": {
		prepare: func(b *checkBed) { b.rules = "meta l4proto { tcp, udp } drop" },
		exit:    1, code: tunnel.CloudUnreachable, says: "neither over TCP nor over UDP", next: "open TCP 443",
	},
	"captive portal, HTTP 302": {
		prepare: func(b *checkBed) {
			b.cloud = func() { b.web(b.listen("80")) }
			b.rules = "tcp dport 443 reject with tcp reset\nudp dport 443 drop"
		},
		exit: 1, code: tunnel.CaptivePortal, says: `"http://portal.hotel.example" (HTTP 302)`, next: "browser",
	},
	"captive portal, TLS": {
		prepare: func(b *checkBed) {
			cert, _, _, _ := checkCertificate(b.t, "portal.hotel.example", "Hotel CA", time.Now().AddDate(0, 0, 30))
			b.cloud = func() { b.tlsWeb(cert) }
			b.rules = "udp dport 443 drop"
		},
		exit: 1, code: tunnel.CaptivePortal, says: "another server", next: "browser",
		also: func(t *testing.T, r *check.Report) { checkStepSays(t, r, check.StepTLS, `"portal.hotel.example"`) },
	},
	"captive portal, HTTP on 443": {
		prepare: func(b *checkBed) {
			b.cloud = func() { b.web(b.listen("443")) }
			b.rules = "udp dport 443 drop"
		},
		exit: 1, code: tunnel.CaptivePortal, says: "web page where TLS is spoken", next: "browser",
	},
	"intercepting proxy with a foreign CA": {
		prepare: func(b *checkBed) {
			cert, _, _, _ := checkCertificate(b.t, assemble.DefaultServerName, "Hospital Inspection CA", time.Now().AddDate(0, 0, 30))
			b.cloud = func() { b.tlsWeb(cert) }
			b.rules = "udp dport 443 drop"
		},
		exit: 1, code: tunnel.TLSIntercepted, says: `"Hospital Inspection CA"`, next: "exempt 198.18.80.2:443 from TLS inspection",
	},
	"inspection that is allowed": {
		prepare: func(b *checkBed) {
			cert, _, _, ca := checkCertificate(b.t, assemble.DefaultServerName, "Hospital Inspection CA", time.Now().AddDate(0, 0, 30))
			if err := os.WriteFile(filepath.Join(b.dir, "ca.pem"), ca, 0o600); err != nil {
				b.t.Fatal(err)
			}
			b.near.CloudProxy.CAFile, b.near.CloudProxy.TrustInterception = filepath.Join(b.dir, "ca.pem"), config.List{"Hospital Inspection CA"}
			b.cloud = func() { b.tlsWeb(cert) }
			b.rules = "udp dport 443 drop"
		},
		exit: 1, code: tunnel.CloudUnreachable, says: "", next: "", // it does not pass WebSockets on
		also: func(t *testing.T, r *check.Report) {
			checkStepSays(t, r, check.StepTLS, "which cloud_proxy.trust_interception allows")
		},
	},
	"nothing, by WebSocket": {
		prepare: func(b *checkBed) {
			f, err := os.OpenFile(filepath.Join(b.dir, "cloudproxy.yaml"), os.O_APPEND|os.O_WRONLY, 0)
			if err == nil {
				_, err = io.WriteString(f, "websocket:\n  path: /culvert\n")
				err = errors.Join(err, f.Close())
			}
			if err != nil {
				b.t.Fatal(err)
			}
			b.near.CloudProxy.Address = config.List{"wss://198.18.80.2/culvert"}
		},
		exit: 0, code: "", says: "calls can be made",
		also: func(t *testing.T, r *check.Report) {
			if len(r.Ways) != 2 {
				t.Errorf("media went %+v", r.Ways)
			}
		},
	},
	"407 Basic": {
		prepare: func(b *checkBed) { b.behindProxy(`Basic realm="clinic"`) },
		exit:    1, code: tunnel.ProxyAuthRequired, says: "it offers Basic", next: "proxy.user",
	},
	"407 NTLM": {
		prepare: func(b *checkBed) { b.behindProxy("NTLM", "Negotiate") },
		exit:    1, code: tunnel.ProxyAuthRequired, says: "it offers NTLM, Negotiate", next: "proxy.user",
	},
	"407 that is answered": {
		prepare: func(b *checkBed) {
			b.behindProxy(`Basic realm="clinic"`)
			file := filepath.Join(b.dir, "password")
			if err := os.WriteFile(file, []byte("w0rd"), 0o600); err != nil {
				b.t.Fatal(err)
			}
			b.near.Proxy.User, b.near.Proxy.PasswordFile = "ward", file
		},
		exit: 5, code: tunnel.UDPBlocked, says: "calls go over TCP only", next: "open UDP 443",
		also: func(t *testing.T, r *check.Report) {
			checkStepSays(t, r, check.StepProxy, "the proxy http://198.18.80.2:3128 connects to the cloud proxy")
			if len(r.Open) != 2 || r.Open[1].Protocol != "HTTP CONNECT, by the proxy" || r.Open[1].Status != check.Good {
				t.Errorf("to open: %+v", r.Open)
			}
		},
	},
	"a proxy that is not there": {
		prepare: func(b *checkBed) {
			b.near.Proxy.URL = "http://198.18.80.2:3129"
			b.rules = "th dport 443 drop"
		},
		exit: 1, code: tunnel.CloudUnreachable, says: "the proxy http://198.18.80.2:3129 can not be reached", next: "proxy.url",
	},
	"wrong pin": {
		prepare: func(b *checkBed) {
			b.near.CloudProxy.Pin = config.List{"sha256/AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA="}
		},
		exit: 1, code: tunnel.CertificateUntrusted, says: "expected was the pinned key sha256/AAAA", next: "cloud_proxy.pin",
	},
	"expired certificate": {
		prepare: func(b *checkBed) { b.withCA(time.Now().AddDate(0, 0, -3)) },
		exit:    1, code: tunnel.CertificateUntrusted, says: "certificate expired on", next: "renew",
	},
	"certificate that a wrong clock takes for expired": {
		prepare: func(b *checkBed) {
			b.withCA(time.Now().AddDate(0, 0, 1))
			b.env = []string{checkTestClock + "=48h"}
			b.rules = "udp dport 443 drop"
		},
		exit: 1, code: tunnel.ClockWrong, says: "48h0m0s ahead", next: "NTP",
	},
	"expired token": {
		prepare: func(b *checkBed) {
			b.token(identity.Claims{Concurrency: 10, Issued: time.Now().Add(-2 * time.Hour), Expires: time.Now().Add(-time.Hour)})
		},
		exit: 1, code: tunnel.TokenExpired, says: "token expired on", next: "new token",
	},
	"revoked token": {
		prepare: func(b *checkBed) {
			cmd := exec.Command(filepath.Join(b.bin, "culvert-cloudproxy"), "token", "revoke", "--dir", b.dir, "-")
			cmd.Stdin = strings.NewReader(b.near.Identity.Token)
			if out, err := cmd.CombinedOutput(); err != nil {
				b.t.Fatalf("token revoke: %v\n%s", err, out)
			}
		},
		exit: 1, code: tunnel.TokenRejected, says: "revoked", next: "new token",
	},
	"quota full": {
		prepare: func(b *checkBed) { b.full("elsewhere.sock") },
		exit:    1, code: tunnel.QuotaExceeded, says: "", next: "--concurrency",
	},
	"quota that the sidecar beside has": {
		prepare: func(b *checkBed) { b.args = []string{"--control", b.full("beside.sock")} },
		exit:    0, code: "", says: "calls can be made",
		also: func(t *testing.T, r *check.Report) {
			if len(r.Ways) != 1 || r.Ways[0].Video.Up.Arrived == 0 {
				t.Errorf("the sidecar has measured %+v", r.Ways)
			}
		},
	},
	"token bound to the key of the sidecar beside": {
		prepare: func(b *checkBed) {
			b.bind()
			socket := b.beside("bound.sock")
			b.args = []string{"--control", socket}
			b.after = func() {
				if st, err := control.NewClient(socket).Status(b.t.Context()); err != nil || st.Tunnel.Connects != 1 || st.Link.Phase != tunnel.LinkUp {
					b.t.Errorf("the sidecar was disturbed: %d sessions, %+v, %v", st.Tunnel.Connects, st.Link, err)
				}
			}
		},
		exit: 0, code: "", says: "calls can be made",
		also: func(t *testing.T, r *check.Report) {
			checkStepSays(t, r, check.StepToken, "bound to the key of the sidecar that runs here")
			if len(r.Ways) != 1 {
				t.Errorf("the sidecar has measured %+v", r.Ways)
			}
		},
	},
	"token bound to the key of a sidecar that does not run": {
		prepare: func(b *checkBed) { b.bind() },
		exit:    0, code: "", says: "calls can be made",
		also: func(t *testing.T, r *check.Report) { checkStepSays(t, r, check.StepToken, "accepts") },
	},
	"UDP 443 throttled": {
		prepare: func(b *checkBed) {
			b.rules = "udp dport 443 limit rate over 60 kbytes/second burst 6 kbytes drop"
			b.args = []string{"--media", "2s"}
		},
		exit: 5, code: tunnel.PathStrained, says: "UDP 443 is throttled", next: "traffic shaping",
	},
	"clock an hour off": {
		prepare: func(b *checkBed) { b.env = []string{checkTestClock + "=-1h"} },
		exit:    5, code: tunnel.ClockWrong, says: "1h0m0s behind", next: "NTP",
	},
	"clock four minutes off": {
		prepare: func(b *checkBed) { b.env = []string{checkTestClock + "=4m"} },
		exit:    0, code: "", says: "calls can be made",
		also: func(t *testing.T, r *check.Report) { checkStepSays(t, r, check.StepClock, "4m0s, which is accepted") },
	},
	"destination denied": {
		prepare: func(b *checkBed) {
			b.near.Policy = checkPolicy(b.t, "profiles: [agora-overseas-test]")
		},
		exit: 1, code: tunnel.PolicyDenied, says: "denies 8 of 8 destinations", next: "cloudproxy.yaml",
		also: func(t *testing.T, r *check.Report) { checkStepSays(t, r, check.StepPolicy, "tcp 23.236.115.138:443") },
	},
	"one destination denied": {
		prepare: func(b *checkBed) {
			b.near.Policy = checkPolicy(b.t, "special: [127.0.0.0/8]\nrules: [{allow: udp, to: [127.0.0.1, 23.236.115.138], ports: 3478}]")
		},
		exit: 5, code: tunnel.PolicyDenied, says: "denies 1 of 2 destinations: udp 23.236.115.138:3478", next: "cloudproxy.yaml",
	},
	"test calls forbidden": {
		prepare: func(b *checkBed) {
			file := filepath.Join(b.dir, "cloudproxy.yaml")
			text, err := os.ReadFile(file)
			if err == nil {
				err = os.WriteFile(file, bytes.Replace(text, []byte("  rules:\n"), []byte("  rules:\n    - deny: udp\n      to: [echo.culvert.invalid]\n"), 1), 0o600)
			}
			if err != nil {
				b.t.Fatal(err)
			}
		},
		exit: 0, code: "", says: "as far as it can be told without a test call",
		also: func(t *testing.T, r *check.Report) { checkStepSays(t, r, check.StepQUIC, "does not allow test calls") },
	},
}

// full has another sidecar take the only place, and returns its socket.
func (b *checkBed) full(name string) string {
	b.token(identity.Claims{Concurrency: 1, Issued: time.Now(), Expires: time.Now().Add(time.Hour)})
	return b.beside(name)
}

// bind binds the token to the sidecar's key.
func (b *checkBed) bind() {
	b.t.Helper()
	key, err := identity.GenerateKey()
	file := filepath.Join(b.dir, "sidecar.key")
	if err == nil {
		err = identity.SaveKey(file, key)
	}
	if err != nil {
		b.t.Fatal(err)
	}
	b.near.Identity.KeyFile = file
	b.token(identity.Claims{Concurrency: 5, Issued: time.Now(), Expires: time.Now().Add(time.Hour), Key: identity.Thumbprint(key.Public().(ed25519.PublicKey))})
}

// beside has a sidecar run beside the check, and returns its socket.
func (b *checkBed) beside(name string) string {
	socket := filepath.Join(filepath.Dir(runSocket(b.t)), name)
	cloud := b.cloud
	b.cloud = func() {
		cloud()
		b.start(b.pair.Near, "culvert", "run", "-c", b.write(), "--listen", "127.0.0.1:0", "--control", socket)
		runEventually(b.t, "the other sidecar has its session", func() bool {
			st, err := control.NewClient(socket).Status(b.t.Context())
			return err == nil && st.Link.Phase == tunnel.LinkUp
		})
	}
	return socket
}

func checkPolicy(t *testing.T, text string) (c policy.Config) {
	t.Helper()
	if err := yaml.Unmarshal([]byte(text), &c); err != nil {
		t.Fatal(err)
	}
	return c
}

func checkStepSays(t *testing.T, r *check.Report, step, want string) {
	t.Helper()
	for _, s := range r.Steps {
		if s.Name == step && strings.Contains(s.Says, want) {
			return
		}
	}
	t.Errorf("the step %s does not say %q", step, want)
}

func TestCheckNamesTheCause(t *testing.T) {
	if testing.Short() {
		t.Skip("it drives other programs only, for some 15 s")
	}
	needNFT(t)
	bin := buildBoth(t)
	beds := map[string]*checkBed{}
	for name, c := range checkCases {
		b := &checkBed{t: t, bin: bin, pair: netpair.New(t), dir: t.TempDir(), host: netpair.FarAddr.String()}
		b.cloud = b.runCloud
		b.make()
		c.prepare(b)
		b.begin()
		beds[name] = b
	}
	for name, c := range checkCases {
		t.Run(name, func(t *testing.T) {
			b := beds[name]
			r, exit := b.result(t)
			if c.exit == 0 && exit == 5 && r.Code == tunnel.PathStrained {
				t.Logf("this machine is too busy for a test call: %s", r.Sentence)
			} else if exit != c.exit || r.Code != c.code || !strings.Contains(r.Sentence, c.says) || !strings.Contains(r.Next, c.next) {
				t.Errorf("exit %d (%s): %s; next: %s\nwant exit %d (%s): %q; next: %q", exit, r.Code, r.Sentence, r.Next, c.exit, c.code, c.says, c.next)
			}
			if b.after != nil {
				b.after()
			}
			if c.also != nil {
				c.also(t, r)
			}
			page, err := os.ReadFile(b.page)
			if err != nil || !bytes.Contains(page, []byte("</html>")) {
				t.Errorf("the page: %d bytes, %v", len(page), err)
			}
			for what, secret := range map[string]string{"token": b.near.Identity.Token, "part of a token": b.near.Identity.Token[len(b.near.Identity.Token)-40:], "portal's session": "s3cret", "proxy's password": "w0rd"} {
				if bytes.Contains(page, []byte(secret)) || strings.Contains(b.out.String(), secret) {
					t.Errorf("the %s is in the report", what)
				}
			}
			if t.Failed() {
				for _, s := range r.Steps {
					t.Logf("%-12s %-8s %v %s (%s)", s.Name, s.Status, s.Took, s.Says, s.Code)
				}
				t.Log(fmt.Sprint(&b.bad))
			}
		})
	}
}
