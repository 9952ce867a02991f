package tunnelquic

import (
	"context"
	"net"
	"net/netip"
	"strconv"
	"time"

	"github.com/quic-go/quic-go"

	"culvert/tunnel"
)

// nextAddress is how much later each further address is tried (RFC 8305 §5).
const nextAddress = 250 * time.Millisecond

// A Dialer makes connections, each on a UDP socket of its own.
type Dialer struct {
	cfg Config
}

// NewDialer returns a dialer; the error's code is ConfigInvalid.
func NewDialer(c Config) (*Dialer, error) {
	c, err := c.check()
	if err != nil {
		return nil, err
	}
	return &Dialer{c}, nil
}

// Kind returns "quic".
func (d *Dialer) Kind() string { return "quic" }

// Dial connects to HOST:PORT. It takes at most 5 seconds after the name has
// been resolved. Where the name has addresses of both families, both are tried.
func (d *Dialer) Dial(ctx context.Context, address string) (tunnel.Candidate, error) {
	host, service, err := net.SplitHostPort(address)
	if err != nil {
		return nil, tunnel.Errorf(tunnel.ConfigInvalid, "%q is not HOST:PORT", address)
	}
	port, err := strconv.ParseUint(service, 10, 16)
	if err != nil || port == 0 {
		return nil, tunnel.Errorf(tunnel.ConfigInvalid, "%q is not a port between 1 and 65535 (in %q)", service, address)
	}
	addrs, err := tunnel.Addresses(ctx, d.cfg.Resolver, host)
	if err != nil {
		return nil, dialError(err, address)
	}
	ctx, cancel := context.WithTimeoutCause(ctx, handshakeTimeout, errNoAnswer)
	defer cancel()

	type result struct {
		c   *candidate
		err error
	}
	results := make(chan result)
	started := 0
	var failed error
	start := func() {
		to := netip.AddrPortFrom(addrs[started], uint16(port))
		started++
		go func() {
			c, err := d.dial(ctx, host, to)
			results <- result{c, err}
		}()
	}
	start()
	var won *candidate
	next := time.NewTicker(nextAddress)
	defer next.Stop()
	for done := 0; done < started; {
		select {
		case <-next.C:
			if started < len(addrs) && won == nil {
				start()
			}
		case r := <-results:
			done++
			switch {
			case r.err != nil:
				if failed == nil || weight(r.err) > weight(failed) {
					failed = r.err
				}
				if started < len(addrs) && won == nil {
					start()
				}
			case won != nil:
				r.c.Close()
			default:
				won = r.c
				cancel() // the other attempts
			}
		}
	}
	if won != nil {
		return won, nil
	}
	return nil, dialError(failed, address)
}

// weight says how much the failure of one address tells of all: a missing route
// may be that of a family that the host does not have.
func weight(err error) int {
	switch {
	case forbidden(err):
		return 1
	case noWay(err):
		return 0
	}
	return 2
}

// dial connects to one address.
func (d *Dialer) dial(ctx context.Context, host string, to netip.AddrPort) (*candidate, error) {
	network := "udp4"
	if to.Addr().Is6() {
		network = "udp6"
	}
	made, err := (&net.ListenConfig{Control: d.cfg.Control}).ListenPacket(ctx, network, ":0")
	if err != nil {
		return nil, err
	}
	udp := made.(*net.UDPConn)
	sock, err := newSocket(udp, d.cfg, false)
	if err != nil {
		udp.Close()
		return nil, err
	}
	sock.strict.Store(true)
	transport := &quic.Transport{Conn: sock, ConnectionIDLength: connIDLen}
	drop := func() {
		transport.Close()
		udp.Close()
	}
	tls := d.cfg.TLS
	if tls.ServerName == "" {
		tls = tls.Clone()
		tls.ServerName = host
	}
	conn, err := transport.Dial(ctx, net.UDPAddrFromAddrPort(to), tls, d.cfg.quic(false))
	if err != nil {
		drop()
		if no := sock.noWay.Load(); no != nil && ctx.Err() == nil {
			err = *no
		}
		return nil, err
	}
	sock.strict.Store(false)
	sock.bound()
	l := newLink(conn, sock, false, d.cfg.MaxAge, func(*link) {
		if n := sock.failed.Load(); n > 0 {
			d.cfg.Log.Info("the kernel refused packets of a QUIC connection", "remote", to, "packets", n)
		}
		drop()
	})
	c, err := newClientCandidate(l)
	if err != nil {
		l.close(codeDone, nil)
		return nil, err
	}
	return c, nil
}
