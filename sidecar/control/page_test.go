package control

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// pageCall is a request as it is sent, before a page's marks are put on it.
type pageCall struct {
	method, target, version, host string
	headers                       []string
	kind, body                    string // Content-Type, and what is under it
}

func (c pageCall) String() string {
	lines := []string{c.method + " " + c.target + " " + c.version}
	if c.host != "" {
		lines = append(lines, "Host: "+c.host)
	}
	lines = append(append(lines, c.headers...), "Connection: close")
	if c.kind != "" {
		lines = append(lines, "Content-Type: "+c.kind)
	}
	if c.body != "" {
		lines = append(lines, fmt.Sprint("Content-Length: ", len(c.body)))
	}
	return strings.Join(append(lines, "", c.body), "\r\n")
}

// pageMarks are what tells a page's request, or one that a page's name was made to
// point here for (DNS rebinding), from one of Culvert's client or curl.
func pageMarks() map[string]func(*pageCall) {
	marks := map[string]func(*pageCall){}
	for _, h := range []string{
		"Origin: http://evil.example", "Origin: null", "Origin: http://HOST", "Origin: http://localhost", "Origin: chrome-extension://abcdef", "origin: https://evil.example", "Origin:",
		"Referer: http://evil.example/x", "Referer: http://HOST/", "referer: about:blank",
		"Sec-Fetch-Site: cross-site", "Sec-Fetch-Site: same-site", "Sec-Fetch-Site: same-origin", "Sec-Fetch-Site: none",
		"Sec-Fetch-Mode: no-cors", "Sec-Fetch-Mode: navigate", "Sec-Fetch-Mode: websocket", "Sec-Fetch-Dest: iframe", "Sec-Fetch-User: ?1", "sec-fetch-storage-access: active",
		"Access-Control-Request-Method: POST", "Access-Control-Request-Headers: authorization", "Access-Control-Request-Private-Network: true",
		"Origin: http://evil.example\r\nUpgrade: websocket\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13",
	} {
		marks[h] = func(c *pageCall) { c.headers = append(c.headers, strings.ReplaceAll(h, "HOST", c.host)) }
	}
	for _, host := range []string{"evil.example", "evil.example:PORT", "127.0.0.1.evil.example:PORT", "localhost.evil.example", "127.0.0.1", "[::1]:PORT", "0.0.0.0:PORT", "0:PORT", "2130706433:PORT", "culvert.evil.example", "culvert@evil.example", "evil.example@culvert", "culvertx", "xn--culvert", ""} {
		marks["Host: "+host] = func(c *pageCall) {
			_, port, _ := net.SplitHostPort(c.host)
			c.host = strings.ReplaceAll(host, "PORT", port)
		}
	}
	marks["two hosts"] = func(c *pageCall) { c.headers = append(c.headers, "Host: evil.example") }
	marks["an absolute target"] = func(c *pageCall) { c.target = "http://evil.example" + c.target }
	marks["no version that has a host"] = func(c *pageCall) { c.version, c.host = "HTTP/1.0", "" }
	for _, kind := range []string{"application/x-www-form-urlencoded", "text/plain", "text/plain; charset=application/json", "multipart/form-data; boundary=x", "application/json, text/plain", "application/jsonp", "text/json", ""} {
		marks["a body of "+kind] = func(c *pageCall) { c.method, c.kind, c.body = http.MethodPost, kind, `{"force":true}` }
		if kind != "" {
			marks["no body, of "+kind] = func(c *pageCall) { c.method, c.kind, c.body = http.MethodPost, kind, "" }
		}
	}
	marks["pieces of text"] = func(c *pageCall) {
		c.method, c.kind, c.body = http.MethodPost, "", "2\r\n{}\r\n0\r\n\r\n"
		c.headers = append(c.headers, "Transfer-Encoding: chunked", "Content-Type: text/plain")
	}
	for _, method := range []string{"HEAD", "OPTIONS", "PUT", "DELETE", "PATCH", "TRACE", "CONNECT", "post", "QUERY"} {
		marks["method "+method] = func(c *pageCall) { c.method = method }
	}
	return marks
}

// pageListeners are the server's two, and the Host that is right at each.
func pageListeners(t *testing.T, f *fake, token string) map[string]struct{ network, address, host string } {
	t.Helper()
	path := filepath.Join(t.TempDir(), "run", "control.sock")
	socket, err := Listen(path, "")
	if err != nil {
		t.Fatal(err)
	}
	tcp, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := newServer(t, f)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 2)
	go func() { done <- s.Serve(ctx, socket) }()
	go func() { done <- s.ServeTCP(ctx, tcp, func() (string, error) { return token, nil }) }()
	t.Cleanup(func() {
		cancel()
		for range 2 {
			if err := <-done; err != nil {
				t.Error(err)
			}
		}
	})
	return map[string]struct{ network, address, host string }{
		"socket": {"unix", path, Host}, "TCP": {"tcp", tcp.Addr().String(), tcp.Addr().String()},
	}
}

// Whatever a page's request looks like, at the socket or by TCP, with the token or
// without, nothing is done and nothing is told.
func TestNothingThatAWebPageSendsIsAccepted(t *testing.T) {
	const token = "0123456789abcdef"
	f := &fake{}
	calls := map[string]string{
		"/v1/status": "GET", "/v1/channels": "GET", "/v1/events": "GET",
		"/v1/start": "POST", "/v1/stop": "POST", "/v1/channels/x/join": "POST", "/v1/channels/x/leave": "POST", "/v1/media": "POST",
	}
	cases := 0
	for where, at := range pageListeners(t, f, token) {
		ask := func(c pageCall) (status int, header http.Header, body string) {
			t.Helper()
			conn, err := net.Dial(at.network, at.address)
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			conn.SetDeadline(time.Now().Add(time.Minute))
			io.WriteString(conn, c.String())
			res, err := http.ReadResponse(bufio.NewReader(conn), &http.Request{Method: c.method})
			if err != nil {
				t.Fatalf("%q: %v", c, err)
			}
			defer res.Body.Close()
			b, _ := io.ReadAll(res.Body)
			return res.StatusCode, res.Header, string(b)
		}
		plain := func(target, method string) pageCall {
			c := pageCall{method: method, target: target, version: "HTTP/1.1", host: at.host}
			if where == "TCP" {
				c.headers = []string{"Authorization: Bearer " + token}
			}
			if method == http.MethodPost {
				c.kind, c.body = contentJSON, "{}"
			}
			return c
		}
		// Without a mark they are heard; else the rest would prove nothing.
		for target, method := range map[string]string{"/v1/status": "GET", "/v1/start": "POST", "/v1/channels/x/leave": "POST"} {
			if status, _, body := ask(plain(target, method)); status != http.StatusOK {
				t.Errorf("%s: %s as its client asks: %d %s", where, target, status, body)
			}
		}
		f.calls = nil
		refused := func(name string, c pageCall) {
			t.Helper()
			cases++
			status, header, body := ask(c)
			f.mu.Lock()
			done := f.calls
			f.calls = nil
			f.mu.Unlock()
			if status < 400 || len(done) > 0 || strings.Contains(body, "running") || strings.Contains(body, token) {
				t.Errorf("%s, %s: %d, did %v, told %.100q", where, name, status, done, body)
			}
			for h := range header {
				if strings.HasPrefix(h, "Access-Control-") {
					t.Errorf("%s, %s: a page may read the answer: %v", where, name, header)
				}
			}
		}
		for target, method := range calls {
			for name, mark := range pageMarks() {
				c := plain(target, method)
				mark(&c)
				refused(target+", "+name, c)
				if where == "TCP" { // what a page can do that does not know the token
					c.headers = c.headers[1:]
					refused(target+", "+name+", no token", c)
				}
			}
			if method == http.MethodPost { // a GET that would change something
				for _, target := range []string{target, target + "?force=true&_method=POST", target + "/", "/" + target} {
					c := plain(target, http.MethodGet)
					c.headers = append(c.headers, "X-HTTP-Method-Override: POST")
					refused("GET "+target, c)
				}
			}
			if where == "TCP" {
				c := plain(target, method)
				c.headers = nil
				refused(target+", no token", c)
			}
		}
	}
	t.Logf("%d requests", cases)
}
