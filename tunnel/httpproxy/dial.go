package httpproxy

import (
	"context"
	"crypto/tls"
	"errors"
	"net"
	"net/url"
	"slices"
	"sync"
	"time"

	"culvert/tunnel"
)

const (
	// badFor is how long a proxy that could not be reached is tried last.
	badFor = time.Minute
	// rejectedFor is how long a password that a proxy has rejected is not sent again.
	rejectedFor = 10 * time.Minute
	// provenFor is how long a password that was accepted is taken to be good: then
	// several connections may send it at once, else one after the other.
	provenFor = time.Minute
)

// A Chooser names the ways to an address (HOST:PORT), best first. A nil URL is
// the direct way, without a proxy.
type Chooser func(ctx context.Context, address string) ([]*url.URL, error)

// Config is what a Dialer needs.
type Config struct {
	// Choose is required.
	Choose Chooser
	// Credentials are asked for whenever a proxy wants some and its URL holds
	// none, so that a changed file counts at once. An empty user: there are
	// none. nil: the same.
	Credentials func() (user, password string, err error)
	// Ticket makes Negotiate's answer without a password; Ticket, or nil: there is none.
	Ticket func(ctx context.Context, host string) ([]byte, error)
	// TLS is how proxies with an https URL are verified; nil: by the system's
	// authorities. It is cloned.
	TLS *tls.Config
	// Dial makes the TCP connections; nil: a net.Dialer.
	Dial tunnel.DialFunc
}

// Dialer connects, through a proxy where one is chosen. It has no goroutines and
// needs no closing.
type Dialer struct {
	cfg Config

	mu    sync.Mutex
	known map[string]*known // by the proxy's HOST:PORT
}

// known is what was learnt about a proxy.
type known struct {
	bad      time.Time // could not be reached then
	method   *method   // what it accepted last; nil: not known, or it asks for nothing
	proven   time.Time // when
	turn     chan struct{}
	rejected rejection
}

// New checks the configuration.
func New(cfg Config) (*Dialer, error) {
	if cfg.Choose == nil {
		return nil, tunnel.Errorf(tunnel.ConfigInvalid, "httpproxy: Choose is missing")
	}
	if cfg.Dial == nil {
		cfg.Dial = new(net.Dialer).DialContext
	}
	if cfg.TLS == nil {
		cfg.TLS = &tls.Config{}
	}
	cfg.TLS = cfg.TLS.Clone()
	cfg.TLS.NextProtos = []string{"http/1.1"}
	return &Dialer{cfg: cfg, known: map[string]*known{}}, nil
}

// Dial connects to HOST:PORT by the first way that works. HOST is resolved by the
// proxy where there is one.
func (d *Dialer) Dial(ctx context.Context, network, address string) (net.Conn, error) {
	ways, err := d.cfg.Choose(ctx, address)
	if err != nil {
		return nil, err
	}
	if len(ways) == 0 {
		ways = []*url.URL{nil}
	}
	ways = d.order(ways)
	for i, way := range ways {
		var conn net.Conn
		conn, err = d.try(ctx, network, address, way, len(ways)-i)
		if err == nil || ctx.Err() != nil {
			return conn, err
		}
		// Another proxy may know the user, or reach further.
	}
	return nil, err
}

// order puts those that could not be reached of late last.
func (d *Dialer) order(ways []*url.URL) []*url.URL {
	d.mu.Lock()
	defer d.mu.Unlock()
	bad := func(u *url.URL) int {
		if u != nil {
			if k := d.known[u.Host]; k != nil && time.Since(k.bad) < badFor {
				return 1
			}
		}
		return 0
	}
	ways = slices.Clone(ways)
	slices.SortStableFunc(ways, func(a, b *url.URL) int { return bad(a) - bad(b) })
	return ways
}

// try goes one way, of so many that are left to try: each has its share of the time.
func (d *Dialer) try(ctx context.Context, network, address string, way *url.URL, left int) (net.Conn, error) {
	if by, ok := ctx.Deadline(); ok && left > 1 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, time.Until(by)/time.Duration(left))
		defer cancel()
	}
	if way == nil {
		return d.cfg.Dial(ctx, network, address)
	}
	return d.through(ctx, network, address, way)
}

// reach connects to a proxy itself.
func (d *Dialer) reach(ctx context.Context, network string, proxy *url.URL) (*Conn, error) {
	raw, err := d.cfg.Dial(ctx, network, proxy.Host)
	d.learn(proxy, func(k *known) {
		k.bad = time.Time{}
		if err != nil {
			k.bad = time.Now()
		}
	})
	if err != nil {
		return nil, unreachable(proxy, err)
	}
	below := tunnel.CountTCP(raw)
	c := &Conn{Conn: below, below: below, via: name(proxy)}
	if proxy.Scheme != "https" {
		return c, nil
	}
	conf := d.cfg.TLS.Clone()
	conf.ServerName = proxy.Hostname()
	secured := tls.Client(below, conf)
	if err := secured.HandshakeContext(ctx); err != nil {
		raw.Close()
		var verify *tls.CertificateVerificationError
		if errors.As(err, &verify) {
			return nil, tunnel.Errorf(tunnel.CertificateUntrusted, "the certificate of %s is not trusted; add its authority to proxy.ca_file: %w", name(proxy), err)
		}
		return nil, unreachable(proxy, err)
	}
	c.Conn = secured
	return c, nil
}

func unreachable(proxy *url.URL, err error) error {
	var dns *net.DNSError
	switch {
	case errors.As(err, &dns):
		return tunnel.Errorf(tunnel.CloudUnreachable, "the name of %s could not be resolved; check proxy.url, or HTTPS_PROXY, and the DNS server: %w", name(proxy), err)
	case tunnel.CodeOf(err) == tunnel.TimedOut:
		return tunnel.Errorf(tunnel.CloudUnreachable, "%s did not answer in time; check its address and port: %w", name(proxy), err)
	}
	return tunnel.Errorf(tunnel.CloudUnreachable, "%s can not be reached; check its address and port: %w", name(proxy), err)
}

// name is how a proxy is spoken of: without what its URL may hold of a password.
func name(proxy *url.URL) string { return "the proxy " + proxy.Scheme + "://" + proxy.Host }

func (d *Dialer) learn(proxy *url.URL, f func(*known)) {
	d.mu.Lock()
	defer d.mu.Unlock()
	k := d.known[proxy.Host]
	if k == nil {
		k = &known{turn: make(chan struct{}, 1)}
		d.known[proxy.Host] = k
	}
	f(k)
}
