package main

import (
	"bufio"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
	"unicode/utf8"

	"culvert/cloudproxy/identity"
	"culvert/cmd/internal/cmdtest"
	"culvert/cmd/internal/config"
	"culvert/cmd/internal/netpair"
	"culvert/sidecar/control"
	"culvert/tunnel"
	"culvert/tunnel/tunnelquic"
	"culvert/tunnel/tunneltls"
	"culvert/tunnel/uplink"
	"culvert/tunnel/wire"
)

// hostile are texts that somebody may call himself. Each holds the word mark, so
// that it is known to have come as far as a log.
var hostile = map[string]string{
	"line breaks":   "mark\r\ntime=2026-01-01T00:00:00Z level=ERROR msg=forged\r\n",
	"escape codes":  "mark\x1b[2J\x1b]0;owned\x07\u009b31m\x00",
	"ten KB":        strings.Repeat("mark ", 2000),
	"right to left": "mark" + strings.Repeat("\u202e\u2028", 1500),
	"no UTF-8":      "mark" + strings.Repeat("\xff\xfe\x80", 500),
	"quotes":        `mark" level=ERROR msg="forged` + strings.Repeat(`"\`, 2000),
	"JSON":          `mark"},{"level":"ERROR","msg":"forged"}` + "\n" + `{"level":"ERROR","msg":"forged`,
}

// first cuts a text to as many bytes as a protocol has room for.
func first(text string, n int) string { return text[:min(len(text), n)] }

// unprintable are control characters, and what changes the direction or the lines
// of a text without being seen.
func unprintable(r rune) bool {
	return r < ' ' || r >= 0x7f && r < 0xa0 || r >= 0x200b && r <= 0x200f || r >= 0x2028 && r <= 0x202e
}

// soundLines checks each line that a program has written.
func soundLines(t *testing.T, what, text string, asJSON bool) (lines, marked int) {
	t.Helper()
	if !utf8.ValidString(text) {
		t.Errorf("%s: it is no UTF-8", what)
	}
	for line := range strings.Lines(text) {
		lines++
		if strings.Contains(line, "mark") {
			marked++
		}
		body, whole := strings.CutSuffix(line, "\n")
		switch {
		case len(line) > 1024:
			t.Errorf("%s: a line of %d bytes: %.300q", what, len(line), line)
		case !whole, strings.ContainsFunc(body, func(r rune) bool {
			return r < ' ' || r >= 0x7f && r < 0xa0 || r >= 0x200b && r <= 0x200f || r >= 0x2028 && r <= 0x202e
		}):
			t.Errorf("%s: a line with what is not printable: %.300q", what, line)
		case asJSON && !json.Valid([]byte(body)), !asJSON && !strings.HasPrefix(body, "time="):
			t.Errorf("%s: no line of a log: %.300q", what, line)
		case strings.HasPrefix(body, "time=2026-01-01T00:00:00Z"):
			t.Errorf("%s: a forged line: %.300q", what, line)
		}
	}
	return lines, marked
}

// Whatever is sent to the two programs, or stands in their configuration, each line
// that they log is one, printable, short, and not one of very many.
func TestHostileTextsAreShortLinesOfTheLog(t *testing.T) {
	if testing.Short() {
		t.Skip("builds the programs and runs them between namespaces")
	}
	bin := buildBoth(t)
	h := &hostileBed{only443: newOnly443On(t, bin, netpair.New(t), func(dir string) {
		os.WriteFile(filepath.Join(dir, "front.password"), []byte("secret"), 0o600)
		os.WriteFile(filepath.Join(dir, "control.token"), []byte("0123456789abcdef"), 0o600)
		rewrite(t, dir, func(text string) string {
			return text + "front: {user: user, password_file: front.password}\ncontrol: {listen: \"127.0.0.1:1081\", token_file: control.token}\nlog: {level: debug, audit_file: near.audit}\n"
		}, func(text string) string {
			return text + "websocket: {path: /culvert}\nlog: {level: debug, format: json, audit_file: far.audit}\n"
		})
	})}
	cloudLog := h.logs[len(h.logs)-1]
	h.start(h.pair.Near, h.culvert, "run", "-c", filepath.Join(h.dir, "culvert.yaml"), "--listen", "127.0.0.1:1080", "--control", h.socket)
	nearLog := h.logs[len(h.logs)-1]
	runReady(t, h.socket)

	t.Run("apps", func(t *testing.T) { h.apps(t) })
	t.Run("control", func(t *testing.T) { h.controls(t) })
	t.Run("strangers at 443", func(t *testing.T) { h.strangers(t) })
	t.Run("sidecars", func(t *testing.T) { h.sidecars(t) })
	t.Run("proxies and authorities", func(t *testing.T) { h.ways(t, bin) })
	t.Run("configurations", func(t *testing.T) { h.configurations(t) })
	t.Run("floods", func(t *testing.T) { h.floods(t, nearLog, cloudLog) })

	if exec.Command(h.culvert, "stop", "--force", "--control", h.socket).Run() != nil {
		t.Error("stop fails")
	}
	logs := map[string]string{"the sidecar's log": nearLog.String(), "the cloud proxy's log": cloudLog.String()}
	for _, name := range []string{"near.audit", "far.audit"} {
		text, err := os.ReadFile(filepath.Join(h.dir, name))
		if err != nil {
			t.Error(err)
		}
		logs[name] = string(text)
	}
	for what, text := range logs {
		lines, marked := soundLines(t, what, text, what != "the sidecar's log")
		if marked == 0 {
			t.Errorf("%s: nothing hostile came as far as this", what)
		}
		t.Logf("%s: %d lines, %d with hostile texts", what, lines, marked)
	}
	t.Logf("%d hostile things were sent", h.cases)
}

// hostileBed is the pair, and counts what is done to it.
type hostileBed struct {
	*only443
	cases int
}

// say sends bytes, by TCP or to a socket, and waits until the other end has had
// enough of them.
func (h *hostileBed) say(at *netpair.Space, network, to, text string) string {
	h.t.Helper()
	h.cases++
	var c net.Conn
	if err := at.Do(func() (err error) { c, err = net.Dial(network, to); return err }); err != nil {
		h.t.Fatal(err)
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(runPatience))
	io.WriteString(c, text)
	if end, ok := c.(interface{ CloseWrite() error }); ok {
		end.CloseWrite()
	}
	answer, err := io.ReadAll(io.LimitReader(c, 64<<10))
	if errors.Is(err, os.ErrDeadlineExceeded) {
		h.t.Errorf("it is still open after %.60q", text)
	}
	return string(answer)
}

// apps speak SOCKS and HTTP.
func (h *hostileBed) apps(t *testing.T) {
	login := func(user, password string) string {
		return "\x05\x01\x02\x01" + string([]byte{byte(len(user))}) + user + string([]byte{byte(len(password))}) + password
	}
	for what, text := range hostile {
		name := first(text, 255)
		front := func(request string) {
			h.say(h.pair.Near, "tcp4", "127.0.0.1:1080", request)
		}
		front(login(name, first(text, 200)))
		for _, command := range []byte{1, 2, 9} {
			front(login("user", "secret") + string(append(append([]byte{5, command, 0, 3, byte(len(name))}, name...), 0, 80)))
		}
		basic := "Proxy-Authorization: Basic " + base64.StdEncoding.EncodeToString([]byte("user:secret")) + "\r\n"
		for _, head := range []string{
			"CONNECT " + text + ":443 HTTP/1.1\r\n" + basic, "CONNECT " + url.PathEscape(text) + ":443 HTTP/1.1\r\n" + basic,
			"GET http://" + url.PathEscape(first(text, 3000)) + "/ HTTP/1.1\r\n" + basic, first(text, 100) + " / HTTP/1.1\r\n", "MARK / HTTP/1.1\r\nHost: " + text + "\r\n" + basic,
			"CONNECT a.example:443 HTTP/1.1\r\nUser-Agent: " + text + "\r\nHost: " + text + "\r\n" + basic,
			"CONNECT a.example:443 HTTP/1.1\r\nProxy-Authorization: Basic " + base64.StdEncoding.EncodeToString([]byte(text+":"+text)) + "\r\n",
			"GET /proxy.pac HTTP/1.1\r\nHost: " + text + "\r\n",
		} {
			front(head + "\r\n")
		}
		// A name by UDP.
		c := h.dial("tcp4", "127.0.0.1:1080")
		io.WriteString(c, login("user", "secret")+"\x05\x03\x00\x01\x00\x00\x00\x00\x00\x00")
		var answer [14]byte
		if _, err := io.ReadFull(c, answer[:]); err != nil || answer[5] != 0 {
			t.Fatalf("%s: UDP ASSOCIATE: %x, %v", what, answer, err)
		}
		u := h.dial("udp4", netip.AddrPortFrom(netip.AddrFrom4([4]byte(answer[8:12])), binary.BigEndian.Uint16(answer[12:])).String())
		u.Write(append(append([]byte{0, 0, 0, 3, byte(len(name))}, name...), 0, 80, 'x'))
		c.Close()
		h.cases++
	}
}

// controls speak with the control API, as somebody who may and who may not.
func (h *hostileBed) controls(t *testing.T) {
	for _, text := range hostile {
		quoted, _ := json.Marshal(text)
		for _, q := range []struct{ target, headers, body string }{
			{"/v1/channels/" + url.PathEscape(first(text, 2000)) + "/join", "", `{"pid":1}`},
			{"/v1/channels/" + url.PathEscape(first(text, 60)) + "/leave", "", `{}`},
			{"/v1/start", "", `{"mode":` + string(quoted) + `}`},
			{"/v1/stop", "", `{"wait":` + string(quoted) + `}`},
			{"/v1/start", "", `{` + string(quoted) + `:1}`},
			{"/v1/start", "Origin: " + text + "\r\n", `{}`},
			{"/v1/start", "Sec-Fetch-" + first(text, 300) + ": x\r\n", `{}`},
			{"/" + url.PathEscape(first(text, 2000)), "User-Agent: " + text + "\r\n", `{}`},
		} {
			for network, at := range map[string][2]string{"unix": {h.socket, control.Host}, "tcp4": {"127.0.0.1:1081", "127.0.0.1:1081\r\nAuthorization: Bearer 0123456789abcdef"}} {
				for _, host := range []string{at[1], text} {
					h.say(h.pair.Near, network, at[0], fmt.Sprintf("POST %s HTTP/1.1\r\nHost: %s\r\nContent-Type: application/json\r\nContent-Length: %d\r\nConnection: close\r\n%s\r\n%s", q.target, host, len(q.body), q.headers, q.body))
				}
			}
		}
		h.say(h.pair.Near, "unix", h.socket, text)
	}
	runReadyAgain(t, h.socket)
}

// runReadyAgain waits until a sidecar runs that may have been told to start.
func runReadyAgain(t *testing.T, socket string) {
	t.Helper()
	runEventually(t, "the sidecar runs", func() bool {
		st, err := control.NewClient(socket).Status(t.Context())
		return err == nil && st.State == "running"
	})
}

// strangers send what is neither a tunnel nor TLS, or TLS of another kind.
func (h *hostileBed) strangers(*testing.T) {
	at := netip.AddrPortFrom(netpair.FarAddr, 443).String()
	for _, text := range hostile {
		h.say(h.pair.Near, "tcp4", at, text)
		h.say(h.pair.Near, "tcp4", at, "GET /"+text+" HTTP/1.1\r\nHost: "+text+"\r\nUser-Agent: "+text+"\r\n\r\n")
		for _, protocols := range [][]string{{first(text, 200)}, {"http/1.1"}, {uplink.DefaultALPN}} {
			conn := tls.Client(h.dial("tcp4", at), &tls.Config{InsecureSkipVerify: true, ServerName: first(text, 200), NextProtos: protocols})
			if conn.Handshake() == nil {
				io.WriteString(conn, "GET /culvert"+text+" HTTP/1.1\r\nHost: "+text+"\r\nUser-Agent: "+text+"\r\nUpgrade: websocket\r\n\r\n")
				io.ReadAll(io.LimitReader(conn, 64<<10))
			}
			conn.Close()
			h.cases++
		}
		h.dial("udp4", at).Write([]byte(first(text, 1200)))
		h.cases++
	}
}

// sidecarTLS is that of another sidecar, which has a key of its own.
func sidecarTLS(t *testing.T, conf *config.Sidecar) *tls.Config {
	t.Helper()
	_, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	client, err := uplink.ClientTLS(uplink.TLSConfig{Key: key, Pins: conf.CloudProxy.Pin, ServerName: conf.CloudProxy.ServerName})
	if err != nil {
		t.Fatal(err)
	}
	return client
}

// sidecars have a key, and some a token that is good, for an App ID of that name.
func (h *hostileBed) sidecars(t *testing.T) {
	conf, err := config.ReadSidecar(filepath.Join(h.dir, "culvert.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	signer, err := identity.LoadKey(filepath.Join(h.dir, "token.key"))
	if err != nil {
		t.Fatal(err)
	}
	for what, text := range hostile {
		client := sidecarTLS(t, conf)
		now := time.Now()
		token := func(app string) string {
			token, err := identity.Issue(signer, identity.Claims{App: app, Region: first(text, 300), Operator: first(text, 300), Concurrency: 3, Issued: now, Expires: now.Add(time.Hour), ID: first(text, 100)})
			if err != nil {
				return text // such a token can not be
			}
			return token
		}
		for _, o := range []wire.Open{
			{Version: wire.Current, App: first(text, 8000), Token: text, Region: first(text, 200), Operator: first(text, 200)},
			{Version: wire.Current, App: first(text, 100), Token: token(first(text, 100)), Region: first(text, 300), Operator: first(text, 300)},
			{Version: wire.Current, App: "other", Token: token(first(text, 100))},
			{Version: wire.Current, App: conf.Identity.App, Token: conf.Identity.Token, Instance: first(text, 30)},
		} {
			for _, by := range []string{"quic", "tls"} {
				h.sidecar(t, what, by, client, o, text)
			}
		}
	}
}

// sidecar opens a session, if it is let, and leaves with a text.
func (h *hostileBed) sidecar(t *testing.T, what, by string, client *tls.Config, o wire.Open, text string) {
	h.cases++
	var dialer tunnel.Dialer
	var err error
	if by == "quic" {
		dialer, err = tunnelquic.NewDialer(tunnelquic.Config{TLS: client})
	} else {
		dialer, err = tunneltls.NewDialer(tunneltls.Config{TLS: client})
	}
	if err != nil {
		t.Fatal(err)
	}
	// Both dial from goroutines of their own, in the test's namespace.
	at, end := h.relay(map[string]string{"quic": "udp4", "tls": "tcp4"}[by])
	defer end()
	c, err := dialer.Dial(t.Context(), at)
	if err != nil {
		t.Errorf("%s, %s: %v", what, by, err)
		return
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(runPatience))
	if err := wire.Write(c, wire.Message{Open: &o}); err != nil {
		return // it does not fit
	}
	m, err := wire.Read(c, wire.Current)
	if err != nil || m.Welcome == nil {
		return
	}
	if carrier, err := c.Carrier(); err == nil {
		carrier.Close(tunnel.Errorf(tunnel.Code(first(text, 50)), "%s", text))
	}
}

// relay makes a port of the test's namespace lead to the cloud proxy's, for one
// connection.
func (h *hostileBed) relay(network string) (at string, end func()) {
	h.t.Helper()
	var relays sync.WaitGroup
	far := h.dial(network, netip.AddrPortFrom(netpair.FarAddr, 443).String())
	if network == "tcp4" {
		l, err := net.Listen(network, "127.0.0.1:0")
		if err != nil {
			h.t.Fatal(err)
		}
		relays.Go(func() {
			c, err := l.Accept()
			if err != nil {
				return
			}
			relays.Go(func() { io.Copy(c, far); c.Close() })
			io.Copy(far, c)
			far.Close()
		})
		return l.Addr().String(), func() { l.Close(); far.Close(); relays.Wait() }
	}
	near, err := net.ListenPacket(network, "127.0.0.1:0")
	if err != nil {
		h.t.Fatal(err)
	}
	from := make(chan net.Addr, 1)
	relays.Go(func() {
		b, told := make([]byte, 1500), false
		for {
			n, who, err := near.ReadFrom(b)
			if err != nil {
				close(from)
				return
			}
			if !told {
				from <- who
				told = true
			}
			far.Write(b[:n])
		}
	})
	relays.Go(func() {
		b := make([]byte, 1500)
		for to := <-from; to != nil; {
			n, err := far.Read(b)
			if err != nil {
				return
			}
			near.WriteTo(b[:n], to)
		}
	})
	return near.LocalAddr().String(), func() { near.Close(); far.Close(); relays.Wait() }
}

// ways are proxies, PAC files and authorities on the way to the cloud proxy.
func (h *hostileBed) ways(t *testing.T, bin string) {
	answers := map[string]string{}
	for what, text := range hostile {
		answers[what+" as a reason"] = "HTTP/1.1 403 " + text + "\r\n\r\n"
		answers[what+" as a realm"] = "HTTP/1.1 407 x\r\nProxy-Authenticate: Basic realm=\"" + first(text, 4000) + "\"\r\nProxy-Authenticate: " + first(text, 4000) + "\r\n\r\n"
		answers[what+" as a place"] = "HTTP/1.1 302 x\r\nLocation: http://" + text + "/\r\n\r\n" + text
		answers[what+" alone"] = text
	}
	for what, answer := range answers {
		h.way(t, what, func(at string) string { return "proxy: {url: \"http://" + at + "\"}\n" }, func(c net.Conn) {
			http.ReadRequest(bufio.NewReader(c))
			io.WriteString(c, answer)
		})
	}
	for what, text := range hostile {
		quoted, _ := json.Marshal(text)
		for how, script := range map[string]string{
			"thrown": `function FindProxyForURL(url, host) { throw ` + string(quoted) + `; }`, "as a proxy": `function FindProxyForURL(url, host) { return "PROXY " + ` + string(quoted) + `; }`,
			"as a word": `function FindProxyForURL(url, host) { return ` + string(quoted) + `; }`, "as a script": text,
		} {
			file := filepath.Join(t.TempDir(), "hostile.pac")
			if err := os.WriteFile(file, []byte(script), 0o600); err != nil {
				t.Fatal(err)
			}
			h.way(t, what+" "+how+" by a PAC file", func(string) string { return "proxy: {pac: " + file + "}\n" }, nil)
		}
		cert := hostileCertificate(t, text)
		h.way(t, what+" as an authority", nil, func(c net.Conn) { tls.Server(c, &tls.Config{Certificates: []tls.Certificate{cert}}).Handshake() })
	}
}

func hostileCertificate(t *testing.T, text string) tls.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	name := pkix.Name{CommonName: strings.ToValidUTF8(text, "?"), Organization: []string{strings.ToValidUTF8(text, "?")}}
	der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{Subject: name, SerialNumber: big.NewInt(3), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour)}, &x509.Certificate{Subject: name}, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

// way runs a sidecar whose way to the cloud proxy is answered by serve, until it has
// said twice that there is no connection, or not to run at all.
func (h *hostileBed) way(t *testing.T, what string, more func(at string) string, serve func(net.Conn)) {
	t.Helper()
	h.cases++
	text, err := os.ReadFile(filepath.Join(h.dir, "culvert.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	conf := strings.NewReplacer("control: {listen: \"127.0.0.1:1081\", token_file: control.token}\n", "", "audit_file: near.audit", "format: json").Replace(string(text))
	var l net.Listener
	if err := h.pair.Near.Do(func() (err error) { l, err = net.Listen("tcp4", "127.0.0.1:0"); return err }); err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	served := make(chan struct{})
	go func() {
		defer close(served)
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			if serve != nil {
				c.SetDeadline(time.Now().Add(5 * time.Second))
				serve(c)
			}
			c.Close()
		}
	}()
	if more != nil {
		conf += more(l.Addr().String())
	} else {
		conf = strings.Replace(conf, netpair.FarAddr.String()+":443", l.Addr().String(), 1)
	}
	file := filepath.Join(h.dir, "hostile.yaml")
	if err := os.WriteFile(file, []byte(conf), 0o600); err != nil {
		t.Fatal(err)
	}
	log := &cmdtest.Text{}
	socket := runSocket(t)
	cmd := exec.Command(h.culvert, "run", "-c", file, "--listen", "127.0.0.1:0", "--control", socket, "--mode", "tcp")
	cmd.Stderr = log
	if err := h.pair.Near.Do(cmd.Start); err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() { cmd.Wait(); close(ended) }()
	runEventually(t, what+" is logged", func() bool {
		select {
		case <-ended:
			return true
		default:
			return strings.Contains(log.String(), "no connection to the cloud proxy")
		}
	})
	// The same on a screen, which obeys what it is told.
	screen, err := exec.Command(h.culvert, "status", "--control", socket).CombinedOutput()
	if err != nil || !utf8.Valid(screen) || strings.ContainsFunc(string(screen), func(r rune) bool { return unprintable(r) && r != '\n' }) {
		t.Errorf("%s: status shows, %v: %q", what, err, screen)
	}
	cmd.Process.Kill()
	<-ended
	l.Close()
	<-served
	all := log.String()
	if !strings.Contains(all, "no connection") {
		t.Errorf("%s: it does not run: %.300q", what, all)
	}
	soundLines(t, what, all, true)
}

// configurations are refused with one line that says so.
func (h *hostileBed) configurations(t *testing.T) {
	for what, text := range hostile {
		quoted, _ := json.Marshal(strings.ToValidUTF8(text, "?"))
		q := string(quoted)
		for key, c := range map[string]string{
			"an address": "cloud_proxy: {address: " + q + "}\nidentity: {app: a, token: t}\n", "a pin": strings.Replace(runGood, "identity:", "  pin: "+q+"\nidentity:", 1),
			"a mode": runGood + "mode: " + q + "\n", "a start": strings.Replace(runGood, "start: manual", "start: "+q, 1), "a key": runGood + q + ": 1\n", "a wait": runGood + "stop_wait: " + q + "\n",
			"a level": runGood + "log: {level: " + q + "}\n", "a profile": runGood + "policy: {profiles: [" + q + "]}\n", "a rule": runGood + "policy: {rules: [{allow: udp, to: " + q + "}]}\n",
			"special": runGood + "policy: {special: [" + q + "]}\n", "a proxy": runGood + "proxy: {url: " + q + "}\n", "a PAC file": runGood + "proxy: {pac: " + q + "}\n", "a user of the proxy": runGood + "proxy: {user: " + q + ", password_file: nowhere}\n",
			"a front": strings.Replace(runGood, `"%s"`, q, 1), "users": strings.Replace(runGood, `front: {`, "front: {users: ["+q+"], ", 1), "a token file": strings.Replace(runGood, "token: none", "token_file: "+q, 1),
			"an audit file": runGood + "log: {audit_file: " + q + "/x}\n", "a group": runGood + "control: {group: " + q + "}\n", "a listener": runGood + "control: {listen: " + q + ", token_file: nowhere}\n",
			"a number": runGood + "front: {max_connections: " + q + "}\n", "the whole": text,
		} {
			h.cases++
			file := runFile(t, strings.Replace(c, "%s", "127.0.0.1:0", 1))
			code, out, bad := runCLI(t, "run", "-c", file, "--control", h.socket)
			if code == 0 || out != "" {
				t.Errorf("%s as %s: exit %d: %.300q", what, key, code, out)
			}
			for line := range strings.Lines(bad) {
				if strings.HasPrefix(line, "time=") { // it was begun
					soundLines(t, what+" as "+key, line, false)
					continue
				}
				if len(line) > 1024 || !strings.HasPrefix(line, "culvert: ") || !utf8.ValidString(line) || strings.ContainsFunc(strings.TrimSuffix(line, "\n"), unprintable) {
					t.Errorf("%s as %s: %d bytes: %.300q", what, key, len(line), line)
				}
			}
		}
	}
}

// floods send the same many times over.
func (h *hostileBed) floods(t *testing.T, logs ...*cmdtest.Text) {
	const many = 500
	for what, f := range map[string]func(){
		"names": func() { h.say(h.pair.Near, "tcp4", "127.0.0.1:1080", "CONNECT mark:0 HTTP/1.1\r\n\r\n") },
		"controls": func() {
			h.say(h.pair.Near, "unix", h.socket, "POST /v1/start HTTP/1.1\r\nHost: mark\r\nConnection: close\r\n\r\n")
		},
		"strangers": func() { h.say(h.pair.Near, "tcp4", netip.AddrPortFrom(netpair.FarAddr, 443).String(), "mark") },
		"passwords": func() { h.say(h.pair.Near, "tcp4", "127.0.0.1:1080", "\x05\x01\x02\x01\x04mark\x04mark") },
		"bad tokens": func() {
			h.say(h.pair.Near, "tcp4", "127.0.0.1:1081", "POST /v1/start HTTP/1.1\r\nHost: 127.0.0.1:1081\r\nConnection: close\r\n\r\n")
		},
	} {
		before, began := 0, time.Now()
		for _, l := range logs {
			before += strings.Count(l.String(), "\n")
		}
		for range many {
			f()
		}
		after := 0
		for _, l := range logs {
			after += strings.Count(l.String(), "\n")
		}
		// Ten a second, and fifty at once; the rest is what runs beside it.
		if most := 150 + 2*10*int(time.Since(began)/time.Second+1); after-before > most {
			t.Errorf("%d %s are %d lines, in %s", many, what, after-before, time.Since(began))
		}
		t.Logf("%d %s: %d lines in %s", many, what, after-before, time.Since(began).Round(time.Millisecond))
	}
}
