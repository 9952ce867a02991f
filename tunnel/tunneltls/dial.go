package tunneltls

import (
	"context"
	"crypto/tls"
	"net"

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

// Dial connects to HOST:PORT within Config.HandshakeTimeout. Where Config.TLS
// names no server, HOST is the name to verify and to send as SNI.
func (d *Dialer) Dial(ctx context.Context, address string) (tunnel.Candidate, error) {
	host, _, err := net.SplitHostPort(address)
	if err != nil {
		return nil, tunnel.Errorf(tunnel.ConfigInvalid, "%q is not HOST:PORT", address)
	}
	ctx, cancel := context.WithTimeout(ctx, d.cfg.HandshakeTimeout)
	defer cancel()
	below, err := d.cfg.Dial(ctx, "tcp", address)
	if err != nil {
		return nil, dialError(address, err)
	}
	raw, g := newGather(below, d.cfg.WriteTimeout)
	tune(raw)
	conf := d.cfg.TLS
	if conf.ServerName == "" {
		conf = conf.Clone()
		conf.ServerName = host
	}
	conn := tls.Client(g, conf)
	if err := conn.HandshakeContext(ctx); err != nil {
		below.Close()
		return nil, dialError(address, err)
	}
	return &candidate{link: &link{Conn: conn, raw: raw, client: true, gather: g}, cfg: &d.cfg}, nil
}

var _ tunnel.Dialer = (*Dialer)(nil)
