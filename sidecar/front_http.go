package sidecar

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strconv"
	"strings"
	"time"
	"unicode"

	"culvert/tunnel"
)

// serveHTTP serves one request: CONNECT, or the PAC file.
func (f *Front) serveHTTP(ctx context.Context, c *frontConn) {
	r, err := readHead(c)
	if err != nil {
		switch {
		case errors.Is(err, errHeadTooLarge):
			err := tunnel.Errorf(tunnel.LimitExceeded, "the request's head is larger than %d bytes", frontHeadLimit)
			f.failed(c, "", err)
			f.answer(c, http.StatusRequestHeaderFieldsTooLarge, "", err)
		case tunnel.CodeOf(err) == tunnel.TimedOut:
			err := tunnel.Errorf(tunnel.TimedOut, "the request did not arrive within %s", f.request)
			f.failed(c, "", err)
			f.answer(c, http.StatusRequestTimeout, "", err)
		case !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF):
			err := tunnel.Errorf(tunnel.Unsupported, "this is not an HTTP request")
			f.failed(c, "", err)
			f.answer(c, http.StatusBadRequest, "", err)
		}
		return
	}
	c.headRead()
	switch {
	case r.Method == http.MethodConnect:
		f.serveConnect(ctx, c, r)
	case r.URL.Path == "/proxy.pac" && r.URL.Host == "" && (r.Method == http.MethodGet || r.Method == http.MethodHead):
		f.servePAC(c, r)
	default:
		err := tunnel.Errorf(tunnel.Unsupported,
			"only CONNECT is supported here; send the request through a CONNECT tunnel, or use this port as a SOCKS5 proxy")
		f.failed(c, r.Host, err)
		f.answer(c, http.StatusMethodNotAllowed, "Allow: CONNECT\r\n", err)
	}
}

var errHeadTooLarge = errors.New("head too large")

// readHead reads a request up to the empty line. What follows stays in c.
func readHead(c *frontConn) (*http.Request, error) {
	r, err := http.ReadRequest(c.in)
	if err != nil && c.head.N <= 0 {
		return nil, errHeadTooLarge
	}
	return r, err
}

// connectTarget reads the authority form of RFC 9112 section 3.2.3.
func connectTarget(r *http.Request) (tunnel.Target, error) {
	to, err := tunnel.ParseTarget(r.RequestURI)
	switch {
	case err != nil:
		return to, err
	case to.Host != "" && !validHost(to.Host), strings.ContainsAny(to.Host, "/@[]"), to.Addr.Zone() != "":
		return to, tunnel.Errorf(tunnel.ConfigInvalid, "%q is not HOST:PORT", r.RequestURI)
	}
	return to, nil
}

func (f *Front) serveConnect(ctx context.Context, c *frontConn, r *http.Request) {
	user, password, given := proxyBasicAuth(r)
	if f.auth != nil && !f.auth(user, password) {
		if given {
			f.wrongPassword(c, user)
		} else {
			f.noPassword(c)
		}
		f.answer(c, http.StatusProxyAuthRequired, "Proxy-Authenticate: Basic realm=\"culvert\"\r\n",
			tunnel.Errorf(tunnel.NotPermitted, "this proxy asks for a user and password"))
		return
	}
	if f.auth == nil {
		user = "" // unproven
	}
	to, err := connectTarget(r)
	if err != nil {
		f.failed(c, r.RequestURI, err)
		f.answer(c, http.StatusBadRequest, "", err)
		return
	}
	stream, err := f.open(ctx, c, user, to)
	if err != nil {
		_, status := frontReply(err)
		f.answer(c, status, "", err)
		return
	}
	if _, err := io.WriteString(c, "HTTP/1.1 200 Connection established\r\n\r\n"); err != nil {
		stream.Abort(err)
		return
	}
	f.splice(c, to, stream)
}

// proxyBasicAuth reads Proxy-Authorization, which has the form of Authorization.
func proxyBasicAuth(r *http.Request) (user, password string, ok bool) {
	return (&http.Request{Header: http.Header{"Authorization": r.Header["Proxy-Authorization"]}}).BasicAuth()
}

// answer sends an error and closes. The body is one line, "code: sentence".
func (f *Front) answer(c *frontConn, status int, headers string, err error) {
	line := strings.Map(func(r rune) rune {
		if unicode.IsControl(r) {
			return ' '
		}
		return r
	}, string(tunnel.CodeOf(err))+": "+tunnel.Sentence(err)) + "\n"
	f.respond(c, status, "text/plain; charset=utf-8", headers, line, true)
}

func (f *Front) respond(c *frontConn, status int, contentType, headers, body string, withBody bool) {
	head := fmt.Sprintf("HTTP/1.1 %d %s\r\nContent-Type: %s\r\nContent-Length: %d\r\nX-Content-Type-Options: nosniff\r\nConnection: close\r\n%s\r\n",
		status, http.StatusText(status), contentType, len(body), headers)
	if !withBody {
		body = ""
	}
	c.SetDeadline(time.Now().Add(f.linger))
	io.WriteString(c, head+body)
	c.finish(f.linger)
}

// pacFile sends everything but this machine through the proxy, and nothing past
// it when it is down.
const pacFile = `function FindProxyForURL(url, host) {
  if (isPlainHostName(host) || dnsDomainIs(host, ".localhost") ||
      shExpMatch(host, "127.*") || host == "::1" || host == "[::1]") {
    return "DIRECT";
  }
  return "%s";
}
`

func (f *Front) servePAC(c *frontConn, r *http.Request) {
	proxy, ok := ownHost(r.Host, tunnel.AddrPortOf(c.LocalAddr()))
	if !ok {
		// A web page that has pointed its own name at this address (DNS
		// rebinding) learns nothing.
		err := tunnel.Errorf(tunnel.NotPermitted,
			"the Host header names neither this machine nor the address that was connected to; fetch the file by address")
		f.failed(c, r.Host, err)
		f.answer(c, http.StatusForbidden, "", err)
		return
	}
	ways := "PROXY " + proxy
	if f.auth == nil {
		// Browsers can not give a user name to a SOCKS proxy.
		ways = "SOCKS5 " + proxy + "; " + ways
	}
	f.respond(c, http.StatusOK, "application/x-ns-proxy-autoconfig", "", fmt.Sprintf(pacFile, ways), r.Method == http.MethodGet)
}

// ownHost returns the Host header as HOST:PORT if it is localhost, a loopback
// address or the address at which the client reached us.
func ownHost(host string, local netip.AddrPort) (string, bool) {
	name, port, err := net.SplitHostPort(host)
	if err != nil {
		name, port = strings.TrimSuffix(strings.TrimPrefix(host, "["), "]"), "80"
	}
	if n, err := strconv.ParseUint(port, 10, 16); err != nil || n == 0 {
		return "", false
	}
	if !strings.EqualFold(name, "localhost") {
		a, err := netip.ParseAddr(name)
		if err != nil || a.Zone() != "" || !(a.IsLoopback() || a == local.Addr()) {
			return "", false
		}
		name = a.String()
	}
	return net.JoinHostPort(strings.ToLower(name), port), true
}
