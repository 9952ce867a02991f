package sidecar

import (
	"bufio"
	"bytes"
	"encoding/base64"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"testing"

	"culvert/tunnel"
)

func frontAnswer(t testing.TB, c *net.TCPConn, head string) (*http.Response, string) {
	t.Helper()
	method, _, _ := strings.Cut(head, " ")
	r, err := http.ReadResponse(bufio.NewReader(c), &http.Request{Method: method})
	if err != nil {
		t.Fatal(err)
	}
	body, err := io.ReadAll(r.Body)
	if err != nil {
		t.Fatal(err)
	}
	return r, string(body)
}

func TestHTTPConnectReachesItsTarget(t *testing.T) {
	echo := frontFarEnd(t, frontEcho)
	for name, tc := range map[string]struct {
		authority string
		want      tunnel.Target
	}{
		"IPv4": {echo.String(), tunnel.TargetOf(echo)},
		"name": {fmt.Sprintf("echo.example:%d", echo.Port()), tunnel.Target{Host: "echo.example", Port: echo.Port()}},
	} {
		for cut, send := range frontCuts {
			t.Run(name+", "+cut, func(t *testing.T) {
				next := &frontDirect{hosts: map[string]netip.Addr{"echo.example": echo.Addr()}}
				c := frontDial(t, frontStart(t, next, nil))
				send(c, []byte("CONNECT "+tc.authority+" HTTP/1.1\r\nHost: "+tc.authority+"\r\n\r\n"), []byte("payload"))
				const want = "HTTP/1.1 200 Connection established\r\n\r\npayload"
				if got := frontRead(t, c, len(want)); string(got) != want {
					t.Fatalf("answer %q", got)
				}
				if got := next.lastTarget(); got != tc.want {
					t.Fatalf("target %+v, want %+v", got, tc.want)
				}
			})
		}
	}
}

func TestHTTPAnswers(t *testing.T) {
	long := strings.Repeat("x", frontHeadLimit)
	for name, tc := range map[string]struct {
		head   string
		status int
		header string // must be present
		body   string // begins with
	}{
		"GET of a URL":     {"GET http://a.example/ HTTP/1.1\r\nHost: a.example\r\n\r\n", 405, "Allow", "unsupported: only CONNECT"},
		"POST":             {"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\nabc", 405, "Allow", "unsupported: "},
		"HTTP/2":           {"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 405, "Allow", "unsupported: "},
		"not HTTP":         {"HELO mail\r\n\r\n", 400, "", "unsupported: "},
		"CONNECT, no port": {"CONNECT a.example HTTP/1.1\r\n\r\n", 400, "", "config_invalid: "},
		"CONNECT, port 0":  {"CONNECT a.example:0 HTTP/1.1\r\n\r\n", 400, "", "config_invalid: "},
		"CONNECT, a path":  {"CONNECT /a:1 HTTP/1.1\r\n\r\n", 400, "", "config_invalid: "},
		"CONNECT, a zone":  {"CONNECT [fe80::1%25eth0]:1 HTTP/1.1\r\n\r\n", 400, "", ""},
		"CONNECT, a user":  {"CONNECT u@a:1 HTTP/1.1\r\n\r\n", 400, "", "config_invalid: "},
		"head too large":   {"CONNECT a:1 HTTP/1.1\r\nX: " + long + "\r\n\r\n", 431, "", "limit_exceeded: "},
	} {
		t.Run(name, func(t *testing.T) {
			r, body := frontHTTP(t, frontStart(t, &frontDirect{}, nil), tc.head)
			if r.StatusCode != tc.status || !strings.HasPrefix(body, tc.body) {
				t.Fatalf("got %s with %q", r.Status, body)
			}
			if tc.header != "" && r.Header.Get(tc.header) == "" {
				t.Fatalf("no %s header", tc.header)
			}
		})
	}
}

func TestAuthOfHTTP(t *testing.T) {
	echo := frontFarEnd(t, frontEcho)
	basic := func(s string) string {
		return "Proxy-Authorization: Basic " + base64.StdEncoding.EncodeToString([]byte(s)) + "\r\n"
	}
	for name, tc := range map[string]struct {
		header string
		status int
	}{
		"right":         {basic("user:secret"), 200},
		"wrong":         {basic("user:secret2"), 407},
		"none":          {"", 407},
		"bearer":        {"Proxy-Authorization: Bearer x\r\n", 407},
		"no base64":     {"Proxy-Authorization: Basic %%%\r\n", 407},
		"of the server": {strings.TrimPrefix(basic("user:secret"), "Proxy-"), 407},
	} {
		t.Run(name, func(t *testing.T) {
			next := &frontDirect{}
			f := frontStart(t, next, func(c *FrontConfig) { c.Auth = StaticAuth("user", "secret") })
			c := frontDial(t, f)
			fmt.Fprintf(c, "CONNECT %s HTTP/1.1\r\n%s\r\n", echo, tc.header)
			r, err := http.ReadResponse(bufio.NewReader(c), &http.Request{Method: "CONNECT"})
			if err != nil {
				t.Fatal(err)
			}
			if r.StatusCode != tc.status {
				t.Fatalf("got %s", r.Status)
			}
			if asks := r.Header.Get("Proxy-Authenticate"); tc.status == 407 && !strings.HasPrefix(asks, "Basic ") {
				t.Fatalf("asks for %q", asks)
			}
			if tc.status == 200 && next.peers[0].User != "user" {
				t.Fatalf("peer %+v", next.peers[0])
			}
		})
	}
}

func TestUnprovenHTTPUserIsNotPassedOn(t *testing.T) {
	echo := frontFarEnd(t, frontEcho)
	next := &frontDirect{}
	c := frontDial(t, frontStart(t, next, nil))
	fmt.Fprintf(c, "CONNECT %s HTTP/1.1\r\nProxy-Authorization: Basic dXNlcjpzZWNyZXQ=\r\n\r\n", echo)
	frontRead(t, c, len("HTTP/1.1 200"))
	if u := next.peers[0].User; u != "" {
		t.Fatalf("user %q", u)
	}
}

func TestPACFile(t *testing.T) {
	for name, tc := range map[string]struct {
		head   string
		auth   bool
		status int
		want   string // in the body
	}{
		"by address":    {"GET /proxy.pac HTTP/1.1\r\nHost: 127.0.0.1:1080\r\n\r\n", false, 200, `return "SOCKS5 127.0.0.1:1080; PROXY 127.0.0.1:1080";`},
		"by localhost":  {"GET /proxy.pac HTTP/1.1\r\nHost: LOCALHOST:81\r\n\r\n", false, 200, `"SOCKS5 localhost:81; PROXY localhost:81"`},
		"by IPv6":       {"GET /proxy.pac HTTP/1.1\r\nHost: [::1]:1080\r\n\r\n", false, 200, `"SOCKS5 [::1]:1080; PROXY [::1]:1080"`},
		"without port":  {"GET /proxy.pac HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n", false, 200, `"SOCKS5 127.0.0.1:80; PROXY 127.0.0.1:80"`},
		"with auth":     {"GET /proxy.pac HTTP/1.1\r\nHost: 127.0.0.1:1080\r\n\r\n", true, 200, `return "PROXY 127.0.0.1:1080";`},
		"HEAD":          {"HEAD /proxy.pac HTTP/1.1\r\nHost: 127.0.0.1:1080\r\n\r\n", false, 200, ""},
		"rebound name":  {"GET /proxy.pac HTTP/1.1\r\nHost: evil.example:1080\r\n\r\n", false, 403, "not_permitted: "},
		"other address": {"GET /proxy.pac HTTP/1.1\r\nHost: 192.0.2.1:1080\r\n\r\n", false, 403, "not_permitted: "},
		"no host":       {"GET /proxy.pac HTTP/1.0\r\n\r\n", false, 403, "not_permitted: "},
		"script port":   {"GET /proxy.pac HTTP/1.1\r\nHost: 127.0.0.1:1\";x\r\n\r\n", false, 400, ""},
		"absolute form": {"GET http://127.0.0.1/proxy.pac HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n", false, 405, ""},
		"POST":          {"POST /proxy.pac HTTP/1.1\r\nHost: 127.0.0.1:1080\r\nContent-Length: 0\r\n\r\n", false, 405, ""},
	} {
		t.Run(name, func(t *testing.T) {
			f := frontStart(t, &frontDirect{}, func(c *FrontConfig) {
				if tc.auth {
					c.Auth = StaticAuth("u", "p")
				}
			})
			r, body := frontHTTP(t, f, tc.head)
			if r.StatusCode != tc.status && !(name == "script port" && r.StatusCode == 403) {
				t.Fatalf("got %s with %q", r.Status, body)
			}
			if !strings.Contains(body, tc.want) {
				t.Fatalf("body %q, want %q in it", body, tc.want)
			}
			if r.StatusCode == 200 && r.Header.Get("Content-Type") != "application/x-ns-proxy-autoconfig" {
				t.Fatalf("type %q", r.Header.Get("Content-Type"))
			}
		})
	}
}

func FuzzConnectHead(f *testing.F) {
	f.Add([]byte("CONNECT a.example:443 HTTP/1.1\r\nHost: a.example:443\r\n\r\nrest"))
	f.Add([]byte("CONNECT [2001:db8::1]:443 HTTP/1.1\r\nProxy-Authorization: Basic dTpw\r\n\r\n"))
	f.Add([]byte("GET /proxy.pac HTTP/1.1\r\nHost: 127.0.0.1:1080\r\n\r\n"))
	f.Add([]byte("CONNECT a:1 HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n"))
	f.Fuzz(func(t *testing.T, sent []byte) {
		source := bytes.NewReader(sent)
		c := &frontConn{}
		c.head = io.LimitedReader{R: source, N: frontHeadLimit}
		c.in = bufio.NewReader(&c.head)
		r, err := readHead(c)
		if read := len(sent) - source.Len(); read > frontHeadLimit {
			t.Fatalf("%d bytes were read", read)
		}
		if err != nil {
			return
		}
		proxyBasicAuth(r)
		if host, ok := ownHost(r.Host, netip.MustParseAddrPort("192.0.2.7:1080")); ok && strings.ContainsAny(host, "\"\\;\n ") {
			t.Fatalf("%q would be written into a script", host)
		}
		to, err := connectTarget(r)
		if err != nil {
			return
		}
		if again, err := tunnel.ParseTarget(to.String()); err != nil || again != to {
			t.Fatalf("%+v became %+v, %v", to, again, err)
		}
		rest, _ := io.ReadAll(io.MultiReader(c.in, source))
		if r.Body == http.NoBody && !bytes.HasSuffix(sent, rest) {
			t.Fatalf("what follows the head is %q", rest)
		}
	})
}
