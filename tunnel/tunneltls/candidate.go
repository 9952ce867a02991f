package tunneltls

import (
	"crypto/ed25519"
	"crypto/tls"
	"net"
	"net/netip"
	"sync/atomic"
	"time"

	"culvert/tunnel"
)

const kind = "tls"

// link is one TLS connection whose handshake is done.
type link struct {
	*tls.Conn
	raw    net.Conn    // the TCP connection
	gather *gather     // the same, with what TLS writes
	rekeys *rekeyMeter // nil: a server's records are not metered
	client bool
}

func (l *link) Read(p []byte) (int, error) {
	n, err := l.Conn.Read(p)
	if l.rekeys != nil {
		l.rekeys.gave(n)
	}
	return n, err
}

// Flow is nil: what TCP carries is the connection's alone.
func (l *link) Flow() tunnel.Flow { return nil }

func (l *link) ExportKey(label string, context []byte, n int) ([]byte, error) {
	state := l.ConnectionState()
	return state.ExportKeyingMaterial(label, context, n)
}

// shut says farewell (close_notify) and closes; it returns within closeTimeout
// even when TCP is stalled.
func (l *link) shut() error {
	// tls.Conn.Close would try for 5 s.
	kill := time.AfterFunc(closeTimeout, func() { l.raw.Close() })
	defer kill.Stop()
	return l.Conn.Close()
}

// candidate implements tunnel.Candidate. Reading it takes from the TLS record
// that has been decrypted and no more than is asked for, so nothing has to be
// carried over into the carrier or lane.
type candidate struct {
	link *link
	cfg  *Config
	over atomic.Bool // has become something else, or is closed
}

func (c *candidate) Read(p []byte) (int, error) {
	n, err := c.link.Read(p)
	return n, refused(err)
}

func (c *candidate) Write(p []byte) (int, error) {
	n, err := c.link.Write(p)
	return n, refused(err)
}

func (c *candidate) SetDeadline(t time.Time) error { return c.link.SetDeadline(t) }

func (c *candidate) Flow() tunnel.Flow { return c.link.Flow() }

func (c *candidate) ExportKey(label string, context []byte, n int) ([]byte, error) {
	return c.link.ExportKey(label, context, n)
}

func (c *candidate) take() error {
	if c.over.Swap(true) {
		return tunnel.Errorf(tunnel.Internal, "this connection is closed or in use already")
	}
	return c.link.SetDeadline(time.Time{})
}

func (c *candidate) Carrier() (tunnel.Carrier, error) {
	if err := c.take(); err != nil {
		return nil, err
	}
	return newCarrier(c.link, c.cfg)
}

func (c *candidate) Lane() (tunnel.Lane, error) {
	if err := c.take(); err != nil {
		return nil, err
	}
	return newLane(c.link, c.cfg), nil
}

func (c *candidate) PeerKey() ed25519.PublicKey {
	certs := c.link.ConnectionState().PeerCertificates
	if len(certs) == 0 {
		return nil
	}
	key, _ := certs[0].PublicKey.(ed25519.PublicKey)
	return key
}

func (c *candidate) RemoteAddr() netip.AddrPort { return tunnel.AddrPortOf(c.link.RemoteAddr()) }

func (c *candidate) Kind() string { return kind }

// Via says what the connection goes through, for people; "": nothing.
func (c *candidate) Via() string {
	if through, ok := c.link.gather.Conn.(interface{ Via() string }); ok {
		return through.Via()
	}
	return ""
}

func (c *candidate) Close() error {
	if c.over.Swap(true) {
		return nil
	}
	c.link.shut() // an unread byte or a peer that has gone is no failure to close
	return nil
}
