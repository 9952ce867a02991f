package websocket

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"

	"github.com/coder/websocket"

	"culvert/tunnel"
)

// DefaultPath is where cloud proxies are asked whose address names no path.
const DefaultPath = "/culvert"

// DialConfig is what a Dialer needs.
type DialConfig struct {
	// TLS is the outer TLS, required; it is cloned. A *tunnel.Error that its
	// VerifyConnection returns reaches Dial's caller with its own sentence.
	// Without ServerName the URL's host is verified.
	TLS *tls.Config
	// Name is verified, and sent as SNI, where the URL's host is a number.
	Name string
	// Dial makes the TCP connection; nil: a net.Dialer.
	Dial tunnel.DialFunc
}

// Dialer opens WebSockets. It has no state and needs no closing.
type Dialer struct {
	cfg DialConfig
}

// NewDialer checks the configuration.
func NewDialer(cfg DialConfig) (*Dialer, error) {
	if cfg.TLS == nil {
		return nil, tunnel.Errorf(tunnel.ConfigInvalid, "websocket: TLS is missing")
	}
	cfg.TLS = cfg.TLS.Clone()
	cfg.TLS.NextProtos = []string{"http/1.1"} // HTTP/2 has WebSockets too (RFC 8441), which few load balancers know
	if cfg.Dial == nil {
		cfg.Dial = new(net.Dialer).DialContext
	}
	return &Dialer{cfg}, nil
}

// Dial opens a WebSocket at wss://HOST[:PORT]/PATH.
func (d *Dialer) Dial(ctx context.Context, network, address string) (net.Conn, error) {
	to, u, err := tunnel.ParseAddress(address)
	if err != nil {
		return nil, err
	}
	if u == nil {
		return nil, tunnel.Errorf(tunnel.ConfigInvalid, "%q is no address of a WebSocket", address)
	}
	var below tunnel.Layered
	var issuer string
	secured := func(ctx context.Context, network, _ string) (net.Conn, error) {
		conn, err := d.cfg.Dial(ctx, network, to.String())
		if err != nil {
			return nil, err
		}
		below = tunnel.CountTCP(conn)
		conf := d.cfg.TLS
		if conf.ServerName == "" {
			conf = conf.Clone()
			if conf.ServerName = u.Hostname(); to.Addr.IsValid() && d.cfg.Name != "" {
				conf.ServerName = d.cfg.Name
			}
		}
		outer := tls.Client(below, conf)
		if err := outer.HandshakeContext(ctx); err != nil {
			conn.Close()
			return nil, err
		}
		issuer = outer.ConnectionState().PeerCertificates[0].Issuer.CommonName
		return outer, nil
	}
	transport := &http.Transport{DialTLSContext: secured, MaxResponseHeaderBytes: maxHead, DisableKeepAlives: true}
	ws, res, err := websocket.Dial(ctx, u.String(), &websocket.DialOptions{
		HTTPClient: &http.Client{
			Transport:     transport,
			CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		},
		HTTPHeader: http.Header{"User-Agent": {"culvert"}},
	})
	if err != nil {
		return nil, dialError(u, res, err)
	}
	return newConn(ws, below, through(below, u, issuer)), nil
}

// through says what the connection goes through: also by whose certificate the
// outer TLS ends, which need not be where one thinks.
func through(below tunnel.Layered, u *url.URL, issuer string) string {
	via := fmt.Sprintf("a WebSocket at %s (TLS by a certificate of %.80q)", u, issuer)
	if p, ok := below.(interface{ Via() string }); ok && p.Via() != "" {
		via = p.Via() + ", and " + via
	}
	return via
}

// dialError names why there is no WebSocket. What TCP and TLS say is left to whom
// is above, who says the same of connections without a WebSocket.
func dialError(u *url.URL, res *http.Response, err error) error {
	var made *tunnel.Error
	var wrapped *url.Error
	switch {
	case errors.As(err, &made):
		return made
	case res == nil && errors.As(err, &wrapped):
		return wrapped.Err
	case res == nil:
		return err
	}
	status := fmt.Sprintf("%d %s", res.StatusCode, http.StatusText(res.StatusCode))
	switch code := res.StatusCode; {
	case code == http.StatusUnauthorized, code == http.StatusForbidden:
		return tunnel.Errorf(tunnel.NotPermitted, "what answers at %s does not let a WebSocket through (%s); ask who runs it to allow it at this path", u, status)
	case code == http.StatusSwitchingProtocols:
		return tunnel.Errorf(tunnel.CloudUnreachable, "what answers at %s does not speak WebSocket as it should: %w", u, err)
	case code/100 == 3:
		return tunnel.Errorf(tunnel.CloudUnreachable, "%s sends elsewhere (%s); correct the address, or log in to the network with a browser", u, status)
	case code >= 500:
		return tunnel.Errorf(tunnel.CloudUnreachable, "what answers at %s does not reach the cloud proxy behind it (%s); tell who runs it", u, status)
	}
	return tunnel.Errorf(tunnel.CloudUnreachable, "there is no WebSocket of a cloud proxy at %s (%s); check the path, and websocket.path at the cloud proxy", u, status)
}
