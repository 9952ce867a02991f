package assemble

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"log/slog"
	"net"
	"sync"
	"syscall"
	"time"

	"culvert/cmd/internal/config"
	"culvert/tunnel"
	"culvert/tunnel/httpproxy"
	"culvert/tunnel/tunneltls"
	"culvert/tunnel/uplink"
	"culvert/tunnel/websocket"
)

// throughProxy makes what dials TCP for the tunnel: through an HTTP proxy, where
// the configuration or the environment names one.
func throughProxy(c *config.HTTPProxy, own protection) (*httpproxy.Dialer, error) {
	roots, err := rootsFrom("proxy.ca_file", c.CAFile)
	if err != nil {
		return nil, err
	}
	if _, _, err := c.Credentials(); err != nil {
		return nil, err
	}
	conf := &tls.Config{RootCAs: roots}
	choose, err := chooseProxy(c, conf, own)
	if err != nil {
		return nil, err
	}
	d := own.dialer()
	return httpproxy.New(httpproxy.Config{Choose: choose, Credentials: c.Credentials, Ticket: httpproxy.Ticket, TLS: conf, Dial: tunnel.DialAgain(d.DialContext, d.Resolver)})
}

// chooseProxy says which proxy leads to an address, if any.
func chooseProxy(c *config.HTTPProxy, conf *tls.Config, own protection) (httpproxy.Chooser, error) {
	switch {
	case c.PAC != "":
		pac := &httpproxy.PAC{Source: c.PAC, TLS: conf, Dial: own.dialer().DialContext, Mark: own.mark}
		return httpproxy.Except(c.NoProxy, pac.Choose), nil
	case c.URL == "":
		return httpproxy.Except(c.NoProxy, httpproxy.Environment()), nil
	case c.URL == config.NoProxy:
		return httpproxy.Direct, nil
	}
	u, err := httpproxy.ParseURL(c.URL)
	if err != nil {
		return nil, err
	}
	return httpproxy.Fixed(u, c.NoProxy), nil
}

// hostAlone dials the host of an address that is a URL: UDP knows no WebSockets,
// but a cloud proxy that serves some may answer it as well.
type hostAlone struct{ tunnel.Dialer }

func (h hostAlone) Dial(ctx context.Context, address string) (tunnel.Candidate, error) {
	to, _, err := tunnel.ParseAddress(address)
	if err != nil {
		return nil, err
	}
	return h.Dialer.Dial(ctx, to.String())
}

// openedFor is how long an address is reached by WebSocket at once where TLS was
// found to be opened by whom the operator trusts.
const openedFor = 10 * time.Minute

// lookTime bounds a look at what answers.
const lookTime = 3 * time.Second

// overTCP makes the TLS carrier and its lanes:
//
//	HOST:PORT ───► TCP ──► TLS, pinned
//	                        └─ opened by a trusted inspector: as wss://HOST:PORT/culvert
//	wss://… ─────► TCP ──► TLS ──► WebSocket ──► TLS, pinned
//
// TCP goes through a proxy, where there is one.
type overTCP struct {
	direct, inside *tunneltls.Dialer
	dial           tunnel.DialFunc
	look           *tls.Config // to see what answers instead of a cloud proxy
	log            *slog.Logger

	mu     sync.Mutex
	opened map[string]time.Time // by address
}

func newOverTCP(dial tunnel.DialFunc, known uplink.TLSConfig, conf tunneltls.Config) (*overTCP, error) {
	conf.Dial = dial
	direct, err := tunneltls.NewDialer(conf)
	if err != nil {
		return nil, err
	}
	web, err := websocket.NewDialer(websocket.DialConfig{TLS: uplink.OuterTLS(known), Name: known.ServerName, Dial: dial})
	if err != nil {
		return nil, err
	}
	conf.Dial = web.Dial
	inside, err := tunneltls.NewDialer(conf)
	// An inspector may know neither TLS 1.3 nor the tunnel's protocol, and end a
	// handshake with them before it has shown who it is.
	look := conf.TLS.Clone()
	look.MinVersion, look.NextProtos, look.Certificates = tls.VersionTLS12, []string{"http/1.1"}, nil
	return &overTCP{direct: direct, inside: inside, dial: dial, look: look, log: conf.Log, opened: map[string]time.Time{}}, err
}

// Kind implements tunnel.Dialer.
func (o *overTCP) Kind() string { return o.direct.Kind() }

// Dial implements tunnel.Dialer.
func (o *overTCP) Dial(ctx context.Context, address string) (tunnel.Candidate, error) {
	_, u, err := tunnel.ParseAddress(address)
	switch {
	case err != nil:
		return nil, err
	case u != nil:
		return o.inside.Dial(ctx, address)
	}
	web := "wss://" + address + websocket.DefaultPath
	if o.isOpened(address) {
		return o.inside.Dial(ctx, web)
	}
	c, err := o.direct.Dial(ctx, address)
	if err != nil && cutShort(err) {
		err = o.whoAnswers(ctx, address, err)
	}
	var by *uplink.Inspected
	if !errors.As(err, &by) || !by.Trusted {
		return c, err
	}
	o.log.Warn("TLS is opened by whom the configuration trusts; the tunnel's own runs inside, in a WebSocket", "issuer", by.Issuer, "address", web)
	o.mu.Lock()
	o.opened[address] = time.Now()
	o.mu.Unlock()
	return o.inside.Dial(ctx, web)
}

// cutShort says whether the other end has ended a handshake that it had begun.
func cutShort(err error) bool {
	var op *net.OpError
	alert := errors.As(err, &op) && op.Op == "remote error" // how crypto/tls names one
	return alert || errors.Is(err, io.EOF) || errors.Is(err, syscall.ECONNRESET)
}

// whoAnswers returns what the certificate says of what has refused the tunnel's
// handshake, where that says more than err.
func (o *overTCP) whoAnswers(ctx context.Context, address string, err error) error {
	ctx, cancel := context.WithTimeout(ctx, lookTime)
	defer cancel()
	conn, dialled := o.dial(ctx, "tcp", address)
	if dialled != nil {
		return err
	}
	defer conn.Close()
	var named *tunnel.Error
	if errors.As(tls.Client(conn, o.look).HandshakeContext(ctx), &named) {
		return named
	}
	return err
}

func (o *overTCP) isOpened(address string) bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	return time.Since(o.opened[address]) < openedFor
}
