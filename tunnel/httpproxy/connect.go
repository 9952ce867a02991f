package httpproxy

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/textproto"
	"net/url"
	"strings"
	"syscall"
	"time"

	"culvert/tunnel"
)

const (
	// maxHead bounds the head of a proxy's answer, in bytes.
	maxHead = 64 << 10
	// maxBody is how much of an error page is read to keep the connection; one
	// with more is closed and made anew.
	maxBody = 64 << 10
	// maxRequests bounds the way to an answer that is not 407.
	maxRequests = 6
	// maxReason bounds what a sentence repeats of an answer, in characters.
	maxReason = 160
	// maxInterim bounds answers of 1xx before the real one.
	maxInterim = 4
)

// through asks a proxy for a connection to address.
//
//	what it accepted last time, or nothing
//	  ├─ 2xx ──► the connection
//	  ├─ 407 ──► the best that it offers ──► 2xx
//	  │            ├─ NTLM: a challenge, and the answer, on this connection
//	  │            └─ 407 again: rejected, and not sent again for a while
//	  └─ else ─► an error that says what
func (d *Dialer) through(ctx context.Context, network, address string, proxy *url.URL) (net.Conn, error) {
	cred, err := d.credentialsFor(proxy)
	if err != nil {
		return nil, err
	}
	done, err := d.await(ctx, proxy, cred)
	if err != nil {
		return nil, err
	}
	defer done()
	l := login{proxy: proxy, address: address, cred: cred}
	if d.cfg.Ticket != nil {
		l.ticket = func() ([]byte, error) { return d.cfg.Ticket(ctx, proxy.Hostname()) }
	}
	l.method, l.count = d.remembered(proxy)
	var t *talk
	for range maxRequests {
		field, err := l.field()
		if err != nil {
			t.close()
			return nil, misunderstood(proxy, err)
		}
		if t == nil {
			c, err := d.reach(ctx, network, proxy)
			if err != nil {
				return nil, err
			}
			t = newTalk(ctx, c)
		}
		res, err := t.ask(address, field)
		if t.asked > 1 && cut(err) && ctx.Err() == nil && (l.answer == "" || !l.method.handshake()) {
			// It has closed the connection behind its 407 without saying so (RFC 9112 §9.3).
			t.close()
			t = nil
			l.count++ // of a nonce, in case that it has read this one
			continue
		}
		if err == nil && res.StatusCode/100 == 2 {
			d.accepted(proxy, l.method)
			return t.over()
		}
		switch {
		case err != nil:
			err = unanswered(proxy, address, err)
		case res.StatusCode != http.StatusProxyAuthRequired:
			err = refused(proxy, address, res)
		default:
			err = l.next(challenges(res.Header.Values("Proxy-Authenticate")))
		}
		if err != nil {
			t.close()
			if l.rejected {
				d.learn(proxy, func(k *known) { k.method, k.rejected = nil, rejection{cred.hash(), time.Now(), err} })
			}
			return nil, err
		}
		if !t.keep(res) {
			t.close()
			t = nil
			if l.answer != "" && l.method.handshake() {
				return nil, misunderstood(proxy, errors.New("it closes the connection on which it has sent a challenge"))
			}
		}
	}
	t.close()
	return nil, misunderstood(proxy, errors.New("it asks again and again"))
}

// talk is what is said on one connection before it is the other end's.
type talk struct {
	ctx    context.Context
	conn   *Conn
	limit  io.LimitedReader
	br     *bufio.Reader
	unhook func() bool
	asked  int // requests
}

func newTalk(ctx context.Context, c *Conn) *talk {
	t := &talk{ctx: ctx, conn: c}
	t.limit.R = c.Conn
	t.br = bufio.NewReader(&t.limit)
	t.unhook = context.AfterFunc(ctx, func() { c.SetDeadline(time.Unix(1, 0)) })
	return t
}

func (t *talk) close() {
	if t != nil {
		t.unhook()
		t.conn.Close()
	}
}

// over hands the connection on.
func (t *talk) over() (net.Conn, error) {
	if !t.unhook() {
		t.conn.Close()
		return nil, t.ctx.Err()
	}
	t.conn.first, _ = t.br.Peek(t.br.Buffered()) // RFC 9110 §9.3.6: what follows the head is the other end's
	return t.conn, nil
}

// ask sends one request and reads the head of the answer.
func (t *talk) ask(address, authorization string) (*http.Response, error) {
	req := &http.Request{
		Method: http.MethodConnect, URL: &url.URL{Opaque: address}, Host: address,
		// Proxy-Connection: what still speaks HTTP/1.0 keeps the connection only then.
		Header: http.Header{"User-Agent": {"culvert"}, "Proxy-Connection": {"keep-alive"}},
	}
	if authorization != "" {
		req.Header.Set("Proxy-Authorization", authorization)
	}
	t.asked++
	t.limit.N = maxHead
	err := req.Write(t.conn.Conn)
	var res *http.Response
	for i := 0; err == nil && i < maxInterim; i++ {
		if res, err = http.ReadResponse(t.br, req); err == nil && (res.StatusCode/100 != 1 || res.StatusCode == http.StatusSwitchingProtocols) { // a 101 is final
			return res, nil
		}
	}
	switch {
	case t.ctx.Err() != nil:
		return nil, t.ctx.Err()
	case err == nil:
		return nil, errors.New("it sends interim answers only")
	case t.limit.N <= 0:
		return nil, fmt.Errorf("the head of its answer is longer than %d bytes", maxHead)
	case errors.As(err, new(textproto.ProtocolError)): // it repeats the line, such as a Location with somebody's session
		return nil, errors.New("the head of its answer has a malformed line")
	case len(err.Error()) > maxReason: // what could not be read is repeated in it
		return nil, fmt.Errorf("%.*s…", maxReason, err.Error())
	}
	return nil, err
}

// cut says whether a connection was closed in the place of an answer.
func cut(err error) bool {
	return errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE)
}

// keep reads an answer to its end, and reports whether the connection can be
// used again.
func (t *talk) keep(res *http.Response) bool {
	lasts := !res.Close || strings.EqualFold(res.Header.Get("Proxy-Connection"), "keep-alive")
	ends := res.ContentLength >= 0 || len(res.TransferEncoding) > 0
	if !lasts || !ends {
		return false
	}
	t.limit.N = maxBody
	_, err := io.Copy(io.Discard, res.Body)
	return err == nil && t.limit.N > 0 && t.br.Buffered() == 0
}

// remembered returns what a proxy accepted last, and the count of the next answer.
func (d *Dialer) remembered(proxy *url.URL) (m *method, count int) {
	d.learn(proxy, func(k *known) {
		if m = k.method; m != nil {
			m.count++
			count = m.count
		}
	})
	return m, count
}

// await waits until a password may be sent, and returns what to call when the
// proxy has judged it. Many connections at once with one that is wrong now would
// be as many failures of the account.
func (d *Dialer) await(ctx context.Context, proxy *url.URL, c credentials) (done func(), err error) {
	var turn chan struct{}
	proven := false
	d.learn(proxy, func(k *known) { turn, proven = k.turn, time.Since(k.proven) < provenFor })
	done = func() {}
	if c.user != "" && !proven {
		select {
		case turn <- struct{}{}:
			done = func() { <-turn }
		case <-ctx.Done():
			return nil, unanswered(proxy, "the cloud proxy", ctx.Err())
		}
	}
	if err := d.rejectedBefore(proxy, c); err != nil {
		done()
		return nil, err
	}
	return done, nil
}

// accepted remembers what a proxy accepted; nil: it asked for nothing.
func (d *Dialer) accepted(proxy *url.URL, m *method) {
	d.learn(proxy, func(k *known) {
		k.rejected, k.proven = rejection{}, time.Now()
		if m == nil {
			return
		}
		if k.method == nil || k.method.digest != m.digest || k.method.scheme != m.scheme || k.method.ticket != m.ticket {
			m.count = 1
			k.method = m
		}
	})
}

// rejectedBefore returns why these credentials are not sent now; nil: they may be.
func (d *Dialer) rejectedBefore(proxy *url.URL, c credentials) (err error) {
	d.learn(proxy, func(k *known) {
		if k.rejected.err != nil && k.rejected.of == c.hash() && time.Since(k.rejected.at) < rejectedFor {
			err = k.rejected.err
		}
	})
	return err
}

func unanswered(proxy *url.URL, address string, err error) error {
	if tunnel.CodeOf(err) == tunnel.TimedOut {
		return tunnel.Errorf(tunnel.CloudUnreachable, "%s did not connect to %s in time; ask IT to let CONNECT to it through: %w", name(proxy), address, err)
	}
	return tunnel.Errorf(tunnel.CloudUnreachable, "%s gave no answer that HTTP knows when it was asked for %s; check that this is the proxy and its port: %w", name(proxy), address, err)
}

func misunderstood(proxy *url.URL, err error) error {
	return tunnel.Errorf(tunnel.ProxyAuthRequired, "the authentication at %s did not come to an end; tell IT: %w", name(proxy), err)
}

// refused names an answer that is neither 2xx nor 407. Where somebody has to sign
// in first, the cause is tunnel.CaptivePortal.
func refused(proxy *url.URL, address string, res *http.Response) error {
	status := strings.TrimSpace(fmt.Sprintf("%d %s", res.StatusCode, http.StatusText(res.StatusCode)))
	switch {
	case res.StatusCode/100 == 3, res.StatusCode == http.StatusNetworkAuthenticationRequired: // RFC 6585 §6
		text := fmt.Sprintf("%s sends elsewhere (%s) instead of connecting to %s; somebody may have to log in to the network with a browser first", name(proxy), status, address)
		return &tunnel.Error{Code: tunnel.CloudUnreachable, Text: text, Err: tunnel.CaptivePortal}
	case res.StatusCode == http.StatusTooManyRequests:
		return tunnel.Errorf(tunnel.CloudUnreachable, "%s has too much to do to connect to %s (%s); tell IT if it lasts", name(proxy), address, status)
	case res.StatusCode >= 500 && res.StatusCode != http.StatusNotImplemented:
		return tunnel.Errorf(tunnel.CloudUnreachable, "%s could not connect to %s (%s); check the address, or ask IT what the proxy lets out", name(proxy), address, status)
	}
	return tunnel.Errorf(tunnel.NotPermitted, "%s does not connect to %s (%s); ask IT to allow CONNECT to it", name(proxy), address, status)
}
