package tunneltls

import (
	"context"
	"crypto/tls"

	"culvert/tunnel"
)

// Dialer makes TLS connections. It has no state and needs no closing.
type Dialer struct {
	cfg Config
}

// NewDialer checks the configuration.
func NewDialer(cfg Config) (*Dialer, error) {
	cfg, err := cfg.validated()
	if err != nil {
		return nil, err
	}
	return &Dialer{cfg}, nil
}

// Kind returns "tls".
func (d *Dialer) Kind() string { return kind }

// Dial connects to HOST:PORT, or to a URL where Config.Dial knows how, within
// Config.HandshakeTimeout. Where Config.TLS names no server, HOST is the name to
// verify and to send as SNI.
func (d *Dialer) Dial(ctx context.Context, address string) (tunnel.Candidate, error) {
	to, _, err := tunnel.ParseAddress(address)
	if err != nil {
		return nil, err
	}
	conf := d.cfg.TLS
	if conf.ServerName == "" {
		conf = conf.Clone()
		if conf.ServerName = to.Host; to.Host == "" {
			conf.ServerName = to.Addr.String()
		}
	}
	ctx, cancel := context.WithTimeout(ctx, d.cfg.HandshakeTimeout)
	defer cancel()
	below, err := d.cfg.Dial(ctx, "tcp", address)
	if err != nil {
		return nil, dialError(address, err)
	}
	raw, g := newGather(below, d.cfg.WriteTimeout)
	tune(raw)
	conn := tls.Client(g, conf)
	if err := conn.HandshakeContext(ctx); err != nil {
		below.Close()
		return nil, dialError(address, err)
	}
	return &candidate{link: &link{Conn: conn, raw: raw, client: true, gather: g}, cfg: &d.cfg}, nil
}

var _ tunnel.Dialer = (*Dialer)(nil)
