package control

import (
	"bufio"
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"
)

// Whatever a page or another program may send without the token, nothing is done.
func TestTCPAnswersOnlyWhoShowsTheTokenAndIsNoWebPage(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	f := &fake{}
	s, err := NewServer(Config{Backend: f})
	if err != nil {
		t.Fatal(err)
	}
	const secret = "0123456789abcdef"
	token, tokenErr := secret, error(nil)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.ServeTCP(ctx, l, func() (string, error) { return token, tokenErr }) }()
	defer func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}()
	host := l.Addr().String()
	_, port, _ := net.SplitHostPort(host)
	ask := func(request string) int {
		t.Helper()
		c, err := net.Dial("tcp", host)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		c.SetDeadline(time.Now().Add(time.Minute))
		io.WriteString(c, request)
		res, err := http.ReadResponse(bufio.NewReader(c), nil)
		if err != nil {
			t.Fatalf("%q: %v", request, err)
		}
		defer res.Body.Close()
		body, _ := io.ReadAll(res.Body)
		if strings.Contains(string(body), secret) {
			t.Errorf("%q: the answer holds the token", request)
		}
		if res.Header.Get("Access-Control-Allow-Origin") != "" {
			t.Errorf("%q: a page may read the answer", request)
		}
		return res.StatusCode
	}
	head := func(lines ...string) string {
		return strings.Join(append(lines, "Connection: close", "", ""), "\r\n")
	}
	bearer := "Authorization: Bearer " + secret
	for name, c := range map[string]struct {
		request string
		status  int
	}{
		"its client":                {head("POST /v1/start HTTP/1.1", "Host: "+host, bearer), 200},
		"no token":                  {head("POST /v1/start HTTP/1.1", "Host: "+host), 401},
		"an empty token":            {head("POST /v1/start HTTP/1.1", "Host: "+host, "Authorization: Bearer "), 401},
		"another token":             {head("POST /v1/start HTTP/1.1", "Host: "+host, bearer+"x"), 401},
		"a part of the token":       {head("POST /v1/start HTTP/1.1", "Host: "+host, bearer[:len(bearer)-1]), 401},
		"the token as a password":   {head("POST /v1/start HTTP/1.1", "Host: "+host, "Authorization: Basic "+secret), 401},
		"the token in the address":  {head("POST /v1/start?token="+secret+" HTTP/1.1", "Host: "+host), 401},
		"a page's origin":           {head("POST /v1/start HTTP/1.1", "Host: "+host, bearer, "Origin: http://evil.example"), 403},
		"an opaque origin":          {head("POST /v1/start HTTP/1.1", "Host: "+host, bearer, "Origin: null"), 403},
		"its own origin":            {head("POST /v1/start HTTP/1.1", "Host: "+host, bearer, "Origin: http://"+host), 403},
		"a referer":                 {head("POST /v1/start HTTP/1.1", "Host: "+host, bearer, "Referer: http://evil.example/x"), 403},
		"cross-site":                {head("POST /v1/start HTTP/1.1", "Host: "+host, bearer, "Sec-Fetch-Site: cross-site"), 403},
		"same-site":                 {head("GET /v1/status HTTP/1.1", "Host: "+host, bearer, "Sec-Fetch-Site: same-site"), 403},
		"a name made to point here": {head("POST /v1/start HTTP/1.1", "Host: evil.example:"+port, bearer), 403},
		"localhost":                 {head("POST /v1/start HTTP/1.1", "Host: localhost:"+port, bearer), 403},
		"without the port":          {head("POST /v1/start HTTP/1.1", "Host: 127.0.0.1", bearer), 403},
		"no host":                   {head("POST /v1/start HTTP/1.1", "Host:", bearer), 403},
		"the socket's host":         {head("POST /v1/start HTTP/1.1", "Host: culvert", bearer), 403},
		"a preflight":               {head("OPTIONS /v1/start HTTP/1.1", "Host: "+host, "Origin: http://evil.example", "Access-Control-Request-Method: POST"), 403},
		"a form":                    {head("POST /v1/start HTTP/1.1", "Host: "+host, bearer, "Content-Type: application/x-www-form-urlencoded", "Content-Length: 0"), 403},
		"plain text":                {head("POST /v1/start HTTP/1.1", "Host: "+host, bearer, "Content-Type: text/plain", "Content-Length: 0"), 403},
		"GET that would change":     {head("GET /v1/start HTTP/1.1", "Host: "+host, bearer), 404},
		"DELETE":                    {head("DELETE /v1/start HTTP/1.1", "Host: "+host, bearer), 405},
	} {
		f.calls = nil
		if got := ask(c.request); got != c.status {
			t.Errorf("%s: status %d, want %d", name, got, c.status)
		}
		if n := len(f.calls); (n > 0) != (c.status == 200) {
			t.Errorf("%s: %d calls", name, n)
		}
	}
	start := head("POST /v1/start HTTP/1.1", "Host: "+host, bearer)
	if token, tokenErr = "", nil; ask(start) != 401 {
		t.Error("an empty token of the configuration was accepted")
	}
	if token, tokenErr = secret, errors.New("gone"); ask(start) != 401 {
		t.Error("a token that can not be read was accepted")
	}
	if token, tokenErr = "another-token-of-16", nil; ask(start) != 401 {
		t.Error("the token before the present one was accepted")
	}
}
