package httpproxy

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"

	"culvert/tunnel"
)

func TestMain(m *testing.M) {
	if len(os.Args) == 2 && os.Args[1] == ntlmHelper {
		helpSquid()
		return
	}
	goleak.VerifyTestMain(m)
}

func to(ways ...*url.URL) Chooser {
	return func(context.Context, string) ([]*url.URL, error) { return ways, nil }
}

func knownAs(user, password string) func() (string, string, error) {
	return func() (string, string, error) { return user, password, nil }
}

func dialer(t *testing.T, cfg Config) *Dialer {
	t.Helper()
	d, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// dial connects, and checks that the connection carries bytes both ways.
func dial(t *testing.T, d *Dialer) error {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	c, err := d.Dial(ctx, "tcp", target)
	if err != nil {
		return err
	}
	defer c.Close()
	want := "hello from " + target + "and back"
	c.SetDeadline(time.Now().Add(10 * time.Second))
	io.WriteString(c, "and back")
	got := make([]byte, len(want))
	if _, err := io.ReadFull(c, got); err != nil || string(got) != want {
		t.Fatalf("through the proxy came %q, %v", got, err)
	}
	return nil
}

// begins lists the schemes that were said.
func begins(said []string) []string {
	all := make([]string, len(said))
	for i, s := range said {
		all[i], _, _ = strings.Cut(s, " ")
	}
	return all
}

func TestEachSchemeIsAnsweredAndRememberedForTheNextConnection(t *testing.T) {
	for name, c := range map[string]struct {
		login       func(*session, *http.Request) []string
		close       bool
		first, next []string // what is said for the first and for a later connection
	}{
		"nothing is asked":             {open, false, []string{""}, []string{""}},
		"Basic":                        {basic, false, []string{"", "Basic"}, []string{"Basic"}},
		"Basic, each 407 closes":       {basic, true, []string{"", "Basic"}, []string{"Basic"}},
		"Digest before Basic":          {digested("SHA-256", 9), false, []string{"", "Digest"}, []string{"Digest"}},
		"Digest with MD5":              {digested("MD5", 9), false, []string{"", "Digest"}, []string{"Digest"}},
		"Digest, each nonce good once": {digested("MD5", 1), false, []string{"", "Digest"}, []string{"Digest", "Digest"}},
		"NTLM before Basic":            {ntlm("NTLM", `Basic realm="r"`), false, []string{"", "NTLM", "NTLM"}, []string{"NTLM", "NTLM"}},
		"NTLM as Negotiate":            {ntlm("Negotiate"), false, []string{"", "Negotiate", "Negotiate"}, []string{"Negotiate", "Negotiate"}},
		"Negotiate without NTLM, then Basic": {func(s *session, r *http.Request) []string {
			if left := basic(s, r); left != nil {
				return append([]string{"Negotiate"}, left...)
			}
			return nil
		}, false, []string{"", "Negotiate", "Basic"}, []string{"Basic"}},
		"the scheme's name in small letters": {ntlm("ntlm"), false, []string{"", "ntlm", "ntlm"}, []string{"ntlm", "ntlm"}},
	} {
		t.Run(name, func(t *testing.T) {
			p := newProxy(t, c.login)
			p.close = c.close
			d := dialer(t, Config{Choose: to(p.url), Credentials: knownAs(goodUser, goodPassword)})
			for i, want := range [][]string{c.first, c.next, c.next} {
				if err := dial(t, d); err != nil {
					t.Fatalf("connection %d: %v", i, err)
				}
				said, conns := p.heard()
				if got := begins(said); !slices.Equal(got, want) {
					t.Errorf("connection %d: the proxy heard %q, want %q", i, got, want)
				}
				if conns != 1 && !c.close {
					t.Errorf("connection %d took %d TCP connections", i, conns)
				}
			}
		})
	}
}

func TestANTLMProxyThatClosesAfterItsFirst407IsDialledAgain(t *testing.T) {
	login := ntlm("NTLM")
	p := newProxy(t, nil)
	p.login = func(s *session, r *http.Request) []string {
		p.close = r.Header.Get("Proxy-Authorization") == ""
		return login(s, r)
	}
	if err := dial(t, dialer(t, Config{Choose: to(p.url), Credentials: knownAs(goodUser, goodPassword)})); err != nil {
		t.Fatal(err)
	}
}

func TestAProxyThatClosesBehindIts407WithoutSayingSoIsDialledAgain(t *testing.T) {
	for scheme, login := range map[string]func(*session, *http.Request) []string{"Basic": basic, "Digest": digested("SHA-256", 10), "NTLM": ntlm("NTLM")} {
		p := newProxy(t, login)
		p.shut = true
		if err := dial(t, dialer(t, Config{Choose: to(p.url), Credentials: knownAs(goodUser, goodPassword)})); err != nil {
			t.Errorf("%s: %v", scheme, err)
		}
	}
}

func TestWithoutAPasswordTheErrorNamesWhatTheProxyOffers(t *testing.T) {
	for name, c := range map[string]struct {
		offers []string
		want   []string
		user   string
	}{
		"three fields":        {[]string{"Negotiate", "NTLM", `Basic realm="x"`}, []string{"Negotiate", "NTLM", "Basic"}, ""},
		"one field":           {[]string{`NTLM, Basic realm="a, b", Digest realm="x", nonce="n", qop="auth,auth-int"`}, []string{"NTLM", "Basic", "Digest"}, ""},
		"none":                {[]string{""}, nil, ""},
		"none that we know":   {[]string{"Bearer x=y", "Digest realm=\"r\", nonce=\"n\", algorithm=ROT13"}, []string{"Bearer", "Digest"}, goodUser},
		"a word that is none": {[]string{"Evil\"<b>", "Basic"}, []string{"Basic"}, ""},
	} {
		t.Run(name, func(t *testing.T) {
			p := newProxy(t, func(*session, *http.Request) []string { return c.offers })
			err := dial(t, dialer(t, Config{Choose: to(p.url), Credentials: knownAs(c.user, goodPassword)}))
			var auth *AuthError
			if tunnel.CodeOf(err) != tunnel.ProxyAuthRequired || !errors.As(err, &auth) {
				t.Fatalf("got %v", err)
			}
			if !slices.Equal(auth.Schemes, c.want) || auth.Proxy != p.url.Host || auth.Tried != "" {
				t.Errorf("got %+v, want the schemes %q", auth, c.want)
			}
			if text := tunnel.Sentence(err); strings.ContainsAny(text, "\x1b\r\n") || !strings.Contains(text, strings.Join(c.want, ", ")) {
				t.Errorf("the sentence is %q", text)
			}
		})
	}
}

func TestARejectedPasswordIsNotSentAgainUntilItChanges(t *testing.T) {
	for name, login := range map[string]func(*session, *http.Request) []string{
		"Basic": basic, "Digest": digested("SHA-256", 9), "NTLM": ntlm("NTLM"),
	} {
		t.Run(name, func(t *testing.T) {
			p := newProxy(t, login)
			password := "wrong"
			d := dialer(t, Config{Choose: to(p.url), Credentials: func() (string, string, error) { return goodUser, password, nil }})
			err := dial(t, d)
			var auth *AuthError
			if tunnel.CodeOf(err) != tunnel.ProxyAuthRequired || !errors.As(err, &auth) || auth.Tried != name {
				t.Fatalf("got %v", err)
			}
			if strings.Contains(err.Error(), password+" ") || strings.Contains(err.Error(), base64.StdEncoding.EncodeToString([]byte(goodUser+":"+password))) {
				t.Errorf("the error holds the password: %v", err)
			}
			p.heard()
			if again := dial(t, d); again == nil || again.Error() != err.Error() {
				t.Errorf("the second time it is %v", again)
			}
			if said, _ := p.heard(); len(said) > 0 {
				t.Errorf("a password that was rejected is sent again: %q", begins(said))
			}
			password = goodPassword
			if err := dial(t, d); err != nil {
				t.Errorf("with the right password: %v", err)
			}
		})
	}
}

// Many failures at once would lock the account.
func TestConnectionsAtOnceSendAWrongPasswordOnce(t *testing.T) {
	p := newProxy(t, basic)
	d := dialer(t, Config{Choose: to(p.url), Credentials: knownAs(goodUser, "wrong")})
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			if _, err := d.Dial(t.Context(), "tcp", target); tunnel.CodeOf(err) != tunnel.ProxyAuthRequired {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if said, _ := p.heard(); !slices.Equal(begins(said), []string{"", "Basic"}) {
		t.Errorf("the proxy heard %q", begins(said))
	}
}

func TestAPasswordThatIsNotAcceptedAnyMoreIsSentOnceMoreAtMost(t *testing.T) {
	for name, login := range map[string]func(*session, *http.Request) []string{
		"Basic": basic, "Digest": digested("SHA-256", 99), "NTLM": ntlm("NTLM"),
	} {
		t.Run(name, func(t *testing.T) {
			changed := false
			p := newProxy(t, func(s *session, r *http.Request) []string {
				if ask := login(s, r); ask != nil || !changed {
					return ask
				}
				return login(s, &http.Request{Header: http.Header{}})
			})
			d := dialer(t, Config{Choose: to(p.url), Credentials: knownAs(goodUser, goodPassword)})
			if err := dial(t, d); err != nil {
				t.Fatal(err)
			}
			p.heard()
			changed = true
			if err := dial(t, d); tunnel.CodeOf(err) != tunnel.ProxyAuthRequired {
				t.Fatalf("got %v", err)
			}
			if said, _ := p.heard(); len(said) > 2 {
				t.Errorf("the proxy heard %q", begins(said))
			}
		})
	}
}

func TestThePasswordOfAURLIsUsedAndShownNowhere(t *testing.T) {
	p := newProxy(t, basic)
	u := *p.url
	u.User = url.UserPassword(goodUser, goodPassword)
	t.Setenv("HTTPS_PROXY", u.String())
	if err := dial(t, dialer(t, Config{Choose: Environment()})); err != nil {
		t.Error(err)
	}
	u.User = url.UserPassword(goodUser, "mistake")
	t.Setenv("HTTPS_PROXY", u.String())
	err := dial(t, dialer(t, Config{Choose: Environment()}))
	if tunnel.CodeOf(err) != tunnel.ProxyAuthRequired || strings.Contains(err.Error(), "mistake") {
		t.Error(err)
	}
	t.Setenv("NO_PROXY", "example.net")
	ways, err := Environment()(t.Context(), target)
	if len(ways) > 0 || err != nil {
		t.Errorf("in spite of NO_PROXY: %v, %v", ways, err)
	}
}

// A password that was not encoded makes another URL of it, or none.
func TestAURLThatNamesNoProxyIsRepeatedNowhere(t *testing.T) {
	for _, u := range []string{
		"http://alice:secret/secret@proxy:3128", "http://alice:secret#secret@proxy:3128", "http://alice:secret?secret@proxy:3128", "http://alice:secret%zz@proxy:3128",
		"http://alice:12#secret@proxy:3128", "http://CLINIC\\alice:secret@proxy:3128", "http://alice:secret@proxy:3128/secret", "http://alice:secret@[::1",
		"alice:secret/secret@proxy:3128", "alice:secret%zz@proxy:3128",
	} {
		t.Setenv("HTTPS_PROXY", u)
		t.Setenv("NO_PROXY", "inside.example")
		choose := Environment()
		ways, err := choose(t.Context(), target)
		if tunnel.CodeOf(err) != tunnel.ConfigInvalid || !strings.Contains(err.Error(), "HTTPS_PROXY") || !strings.Contains(err.Error(), "%23 for #") || strings.Contains(err.Error(), "secret") || strings.Contains(err.Error(), "alice") {
			t.Errorf("%s: %v, %v", u, ways, err)
		}
		if ways, err := choose(t.Context(), "a.inside.example:443"); len(ways) > 0 || err != nil {
			t.Errorf("%s, in spite of NO_PROXY: %v, %v", u, ways, err)
		}
		if _, err := ParseURL(u); err == nil || strings.Contains(err.Error(), "secret") {
			t.Errorf("%s in the configuration: %v", u, err)
		}
	}
}

// Several proxies behind one address, each with nonces of its own, take a password
// that is right in the end, and in bounds.
func TestAStaleNonceIsNoWrongPassword(t *testing.T) {
	for _, times := range []int{1, 3, 99} {
		good, asked := digested("SHA-256", 9), 0
		p := newProxy(t, func(s *session, r *http.Request) []string {
			if asked++; asked <= 1+times {
				return []string{fmt.Sprintf(`Digest realm="r", nonce="of another %d", qop="auth", stale=%t`, asked, asked > 1)}
			}
			return good(s, r)
		})
		d := dialer(t, Config{Choose: to(p.url), Credentials: knownAs(goodUser, goodPassword)})
		err := dial(t, d)
		var auth *AuthError
		if (err == nil) != (times < 99) || errors.As(err, &auth) {
			t.Errorf("stale %d times: %v", times, err)
		}
		if said, _ := p.heard(); len(said) > maxRequests {
			t.Errorf("stale %d times, %d requests", times, len(said))
		}
		p.login = basic
		if err := dial(t, d); err != nil {
			t.Errorf("after stale nonces the password counts as wrong: %v", err)
		}
	}
}

// answering is a proxy that says the same to all.
func answering(t *testing.T, answer string) *url.URL {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			io.WriteString(c, answer)
			io.Copy(io.Discard, c)
			c.Close()
		}
	}()
	t.Cleanup(func() { ln.Close(); <-done })
	return &url.URL{Scheme: "http", Host: ln.Addr().String()}
}

func TestWhatAProxyAnswersBecomesASentence(t *testing.T) {
	endless := "HTTP/1.1 200 OK\r\n" + strings.Repeat("X-More: "+strings.Repeat("x", 1000)+"\r\n", 100)
	for name, c := range map[string]struct {
		answer string
		code   tunnel.Code
		says   string
	}{
		"forbidden":          {"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n", tunnel.NotPermitted, "403 Forbidden"},
		"no CONNECT":         {"HTTP/1.1 405 What\r\nContent-Length: 0\r\n\r\n", tunnel.NotPermitted, "405 Method Not Allowed"},
		"cannot reach":       {"HTTP/1.1 503 \x1b[31mred\r\nContent-Length: 0\r\n\r\n", tunnel.CloudUnreachable, "503 Service Unavailable"},
		"captive portal":     {"HTTP/1.1 302 Found\r\nLocation: http://portal/\r\n\r\n", tunnel.CloudUnreachable, "log in"},
		"portal of RFC 6585": {"HTTP/1.1 511 Network Authentication Required\r\nContent-Length: 0\r\n\r\n", tunnel.CloudUnreachable, "log in"},
		"too many requests":  {"HTTP/1.1 429 Too Many Requests\r\nContent-Length: 0\r\n\r\n", tunnel.CloudUnreachable, "too much to do"},
		"a code of its own":  {"HTTP/1.1 999 What\r\nContent-Length: 0\r\n\r\n", tunnel.CloudUnreachable, "(999)"},
		"not HTTP":           {"SSH-2.0-OpenSSH_9.2\r\n", tunnel.CloudUnreachable, "no answer that HTTP knows"},
		"a line of 50 KB":    {"SSH-2.0-" + strings.Repeat("x", 50000) + "\r\n", tunnel.CloudUnreachable, "no answer that HTTP knows"},
		"a head of 100 KiB":  {endless, tunnel.CloudUnreachable, "no answer that HTTP knows"},
		"a malformed line":   {"HTTP/1.1 302 Found\r\nLocation: http://portal/\x1b?session=secret\r\n\r\n", tunnel.CloudUnreachable, "malformed line"},
		"another protocol":   {"HTTP/1.1 101 Switching Protocols\r\n\r\n", tunnel.NotPermitted, "101 Switching Protocols"},
		"interim for ever":   {strings.Repeat("HTTP/1.1 103 Early Hints\r\n\r\n", 50), tunnel.CloudUnreachable, "no answer that HTTP knows"},
	} {
		t.Run(name, func(t *testing.T) {
			d := dialer(t, Config{Choose: to(answering(t, c.answer))})
			_, err := d.Dial(t.Context(), "tcp", target)
			if tunnel.CodeOf(err) != c.code || !strings.Contains(err.Error(), c.says) || strings.ContainsAny(err.Error(), "\x1b\n") || strings.Contains(err.Error(), "secret") || len(err.Error()) > 500 {
				t.Errorf("got %.600v (%d bytes)", err, len(err.Error()))
			}
			if errors.Is(err, tunnel.CaptivePortal) != (c.says == "log in") {
				t.Errorf("somebody has to sign in: %v", c.says != "log in")
			}
		})
	}
}

func TestInterimAnswersArePassedOver(t *testing.T) {
	u := answering(t, "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 7\r\n\r\nhello from "+target+"and back")
	if err := dial(t, dialer(t, Config{Choose: to(u)})); err != nil {
		t.Error(err)
	}
}

// A proxy that accepts and says nothing holds nobody longer than the context.
func TestASilentProxyEndsWithTheContext(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		near, far := net.Pipe()
		defer far.Close()
		go io.Copy(io.Discard, far)
		d := dialer(t, Config{
			Choose: to(&url.URL{Scheme: "http", Host: "proxy.example:3128"}),
			Dial:   func(context.Context, string, string) (net.Conn, error) { return near, nil },
		})
		ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
		defer cancel()
		began := time.Now()
		_, err := d.Dial(ctx, "tcp", target)
		if took := time.Since(began); took != 3*time.Second || tunnel.CodeOf(err) != tunnel.CloudUnreachable || !strings.Contains(err.Error(), "in time") || strings.Contains(err.Error(), "\n") {
			t.Errorf("after %v: %v", took, err)
		}
	})
}

// The first of two does not answer at all: the second has its share of the time,
// and is the first to be asked the next time.
func TestTheNextProxyIsTriedInTimeAndThenFirst(t *testing.T) {
	p := newProxy(t, open)
	dead := &url.URL{Scheme: "http", Host: "dead.example:3128"}
	var asked []string
	d := dialer(t, Config{Choose: to(dead, p.url), Dial: func(ctx context.Context, network, address string) (net.Conn, error) {
		asked = append(asked, address)
		if address == dead.Host {
			<-ctx.Done()
			return nil, ctx.Err()
		}
		return new(net.Dialer).DialContext(ctx, network, address)
	}})
	for range 2 {
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		c, err := d.Dial(ctx, "tcp", target)
		cancel()
		if err != nil {
			t.Fatal(err)
		}
		c.Close()
	}
	if want := []string{dead.Host, p.url.Host, p.url.Host}; !slices.Equal(asked, want) {
		t.Errorf("asked %q, want %q", asked, want)
	}
}

func TestTheWayToAProxyCanBeEncrypted(t *testing.T) {
	p := newProxy(t, basic)
	front := httptest.NewUnstartedServer(nil) // for its certificate
	front.StartTLS()
	cert := front.TLS.Certificates[0]
	roots := x509.NewCertPool()
	roots.AddCert(front.Certificate())
	front.Close()
	inner, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	secure := tls.NewListener(inner, &tls.Config{Certificates: []tls.Certificate{cert}})
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			c, err := secure.Accept()
			if err != nil {
				return
			}
			p.wg.Go(func() { p.serve(c) })
		}
	}()
	t.Cleanup(func() { secure.Close(); <-done })
	u := &url.URL{Scheme: "https", Host: inner.Addr().String()}
	d := dialer(t, Config{Choose: to(u), TLS: &tls.Config{RootCAs: roots}, Credentials: knownAs(goodUser, goodPassword)})
	if err := dial(t, d); err != nil {
		t.Error(err)
	}
	err = dial(t, dialer(t, Config{Choose: to(u), TLS: &tls.Config{RootCAs: x509.NewCertPool()}}))
	if tunnel.CodeOf(err) != tunnel.CertificateUntrusted || !strings.Contains(err.Error(), "proxy.ca_file") {
		t.Errorf("with another authority: %v", err)
	}
}

func TestSentCountsAllThatTCPWasGiven(t *testing.T) {
	p := newProxy(t, open)
	c, err := dialer(t, Config{Choose: to(p.url)}).Dial(t.Context(), "tcp", target)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	before := c.(*Conn).Sent()
	io.WriteString(c, "12345")
	if before == 0 || c.(*Conn).Sent() != before+5 {
		t.Errorf("%d before, %d after 5 more", before, c.(*Conn).Sent())
	}
	if _, ok := c.(*Conn).TCP().(*net.TCPConn); !ok || c.(*Conn).Via() != "the proxy "+p.url.String() {
		t.Errorf("%T, %q", c.(*Conn).TCP(), c.(*Conn).Via())
	}
}

func TestURLsOfProxies(t *testing.T) {
	for text, want := range map[string]string{
		"http://proxy":                "http://proxy:80",
		"http://proxy:3128/":          "http://proxy:3128",
		"https://proxy":               "https://proxy:443",
		"http://[2001:db8::1]:3128":   "http://[2001:db8::1]:3128",
		"socks5://proxy:1080":         "",
		"proxy:3128":                  "",
		"http://":                     "",
		"http://proxy/path":           "",
		"http://u:secret@proxy:1":     "",
		"http://u:secret@proxy:wrong": "",
	} {
		u, err := ParseURL(text)
		switch {
		case err != nil && (want != "" || tunnel.CodeOf(err) != tunnel.ConfigInvalid || strings.Contains(err.Error(), "secret")):
			t.Errorf("%s: %v", text, err)
		case err == nil && u.String() != want:
			t.Errorf("%s is %s, want %q", text, u, want)
		}
	}
}

func TestNoProxyIsHeeded(t *testing.T) {
	proxy, _ := ParseURL("http://proxy:3128")
	fixed := Fixed(proxy, []string{".inside.example", "10.0.0.0/8", "192.0.2.7"})
	except := Except([]string{".inside.example", "10.0.0.0/8", "192.0.2.7"}, to(proxy))
	for address, through := range map[string]bool{
		"cloud.example.net:443": true, "a.inside.example:443": false, "10.1.2.3:443": false, "192.0.2.7:443": false, "192.0.2.8:443": true, "[2001:db8::1]:443": true,
	} {
		for name, choose := range map[string]Chooser{"Fixed": fixed, "Except": except} {
			ways, err := choose(t.Context(), address)
			if err != nil || len(ways) > 0 != through {
				t.Errorf("%s: %s goes by %v, %v", name, address, ways, err)
			}
		}
	}
}

func TestAPACFilesSecretsAreRepeatedNowhere(t *testing.T) {
	for answer, want := range map[string]string{
		"PROXY alice:secret@proxy:3128":       `"PROXY …@proxy:3128"`,
		"SOCKS5 alice:se@secret@proxy:1 more": `"SOCKS5 …@proxy:1 more"`,
	} {
		if _, err := parsePAC(answer); err == nil || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "secret") {
			t.Errorf("%s: %v", answer, err)
		}
	}
	for source, want := range map[string]string{
		"http://alice:secret@pac.example/p.pac?token=secret": "http://alice:xxxxx@pac.example/p.pac?…",
		"http://pac.example/p.pac":                           "http://pac.example/p.pac",
		"/etc/culvert/p?.pac":                                "/etc/culvert/p?.pac",
	} {
		if got := (&PAC{Source: source}).name(); got != want {
			t.Errorf("%s is spoken of as %s", source, got)
		}
	}
}

func FuzzChallenges(f *testing.F) {
	for _, s := range []string{
		`Basic realm="a, b"`, `NTLM TlRMTVNTUAACAAAA==`, `Negotiate, NTLM, Digest realm="x", nonce = "n", qop="auth,auth-int", Basic`,
		`Digest realm="\"", , nonce=x`, `=,"`, "a\x00b c",
	} {
		f.Add(s, s)
	}
	f.Fuzz(func(t *testing.T, a, b string) {
		all := challenges([]string{a, b})
		if len(all) > maxChallenges {
			t.Errorf("%d challenges", len(all))
		}
		for _, s := range schemes(all) {
			if !isToken(s) {
				t.Errorf("%q is no scheme", s)
			}
		}
		if m := choose(all, nil); m != nil {
			l := login{proxy: &url.URL{Scheme: "http", Host: "p:1"}, address: target, cred: credentials{goodUser, goodPassword}, method: m, count: 1}
			if field, err := l.field(); err == nil && strings.ContainsAny(field, "\r\n") {
				t.Errorf("a field of two lines: %q", field)
			}
			l.next(all)
		}
	})
}

func FuzzPAC(f *testing.F) {
	for _, s := range []string{"PROXY a:3128; DIRECT", "HTTPS [2001:db8::1]:1;;SOCKS5 x:1", "PROXY u:p@h", "PROXY a:1 b:2", "proxy\t\x1b:1; ; "} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, text string) {
		ways, err := parsePAC(text)
		if len(ways) > maxWays || err != nil && len(ways) > 0 {
			t.Errorf("%d ways, %v", len(ways), err)
		}
		if err != nil && strings.ContainsAny(err.Error(), "\r\n\x1b") {
			t.Errorf("the error is %q", err)
		}
		for _, u := range ways {
			if u != nil && (u.User != nil || u.Port() == "" || u.Hostname() == "" || strings.ContainsAny(u.Host, "\r\n \x1b")) {
				t.Errorf("a way is %q", u)
			}
		}
	})
}
