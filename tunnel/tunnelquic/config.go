package tunnelquic

import (
	"crypto/tls"
	"log/slog"
	"net"
	"syscall"
	"time"

	"github.com/quic-go/quic-go"

	"culvert/tunnel"
	"culvert/tunnel/age"
)

const (
	handshakeTimeout = 5 * time.Second
	// A call's app gives up after 15 to 30 s without media: a peer that has gone
	// must be noticed well before, though nothing was sent that could fail.
	idleTimeout = 10 * time.Second
	keepAlive   = 3 * time.Second // three tries in that time; it also keeps NAT bindings (30 s and more for UDP)
)

// connIDLen is the length of our connection IDs in bytes, and of the IDs of
// sealed packets: stateless reset tokens are made of the whole of both, so that
// nobody can ask for those of all IDs beforehand.
const connIDLen = 8

// Flow-control windows in bytes. They begin small and grow only as they are
// read: quic-go doubles a window that is consumed within two round trips.
const (
	// A server's initial stream window bounds what a peer holds before it has
	// been answered, together with the rule that it may have one stream till then.
	serverStreamWindow = 64 << 10
	// The connection's window must be well above the stream's: streams that
	// nobody reads would otherwise stall all others.
	serverConnWindow = 1 << 20
	// A client knows who its server is, which has no more under way than its memory
	// for a session (resume.DefaultShare, and 72 KiB for each stream): the window is
	// above that, as for TLS (tunneltls.Config.Unread), and does not grow.
	clientStreamWindow = 512 << 10
	clientConnWindow   = 256 << 20

	maxStreamWindow = 16 << 20
	maxConnWindow   = 32 << 20 // of a server
)

// Config says how connections are made. TLS must be set.
type Config struct {
	// TLS holds ALPN names, certificates and their verification. TLS 1.3 is
	// used whatever it says. A dialer without ServerName uses the host it dials.
	TLS *tls.Config
	// StatelessResetKey lets peers notice at once that a listener has been
	// restarted (RFC 9000 §10.3); keep it over restarts, and give it to no other
	// listener that runs. nil: they do not.
	StatelessResetKey *[32]byte
	// TokenGeneratorKey seals address validation tokens (RFC 9000 §8.1.3);
	// give it to all listeners behind one address. nil: a random key.
	TokenGeneratorKey *[32]byte
	// MaxAge is how old a datagram may be when it arrives in a DATAGRAM frame,
	// beyond the shortest way seen lately: older ones are dropped. 0: 150 ms.
	MaxAge time.Duration
	// Control is called on each UDP socket that a Dialer makes, as in
	// net.ListenConfig; nil: nothing is.
	Control func(network, address string, c syscall.RawConn) error
	// Resolver looks up names for a Dialer; nil: the system's.
	Resolver *net.Resolver
	// Limits of a listener; zero fields have the defaults named there.
	Limits Limits
	// Log takes what is worth an operator's attention; nil discards it.
	Log *slog.Logger
}

// Limits bound what peers can ask of a listener.
type Limits struct {
	// Streams is how many streams the peer may have open at once on a
	// connection (also a dialer's); 0: 8,192.
	Streams int
	// Retry is the number of open handshakes from which on a peer must first
	// prove its address (RFC 9000 §8.1.2); 0: 64.
	Retry int
	// Handshakes is how many handshakes may be open at once; further ones are
	// refused. 0: 1,024.
	Handshakes int
	// Unanswered is how many connections may wait for the answer to their
	// opening. A further one is refused, or the oldest of the source that has the
	// most where that is another. 0: 1,000.
	Unanswered int
}

func (c Config) check() (Config, error) {
	switch {
	case c.TLS == nil:
		return c, tunnel.Errorf(tunnel.ConfigInvalid, "the QUIC carrier needs Config.TLS")
	case len(c.TLS.NextProtos) == 0:
		return c, tunnel.Errorf(tunnel.ConfigInvalid, "the QUIC carrier needs an ALPN name in Config.TLS.NextProtos (RFC 9001 §8.1)")
	}
	switch {
	case c.MaxAge == 0:
		c.MaxAge = 150 * time.Millisecond
	case c.MaxAge < 0 || c.MaxAge >= age.Range:
		return c, tunnel.Errorf(tunnel.ConfigInvalid, "Config.MaxAge is %v; use less than %v, the most that a send time can tell", c.MaxAge, age.Range)
	}
	for _, l := range []struct {
		name  string
		value *int
		unset int
	}{
		{"Streams", &c.Limits.Streams, 8192},
		{"Retry", &c.Limits.Retry, 64},
		{"Handshakes", &c.Limits.Handshakes, 1024},
		{"Unanswered", &c.Limits.Unanswered, 1000},
	} {
		if *l.value < 0 {
			return c, tunnel.Errorf(tunnel.ConfigInvalid, "Config.Limits.%s is %d; use a positive number, or 0 for %d", l.name, *l.value, l.unset)
		}
		if *l.value == 0 {
			*l.value = l.unset
		}
	}
	c.TLS = c.TLS.Clone()
	c.TLS.MinVersion = tls.VersionTLS13
	c.TLS.SessionTicketsDisabled = true
	c.TLS.ClientSessionCache = nil
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	return c, nil
}

func (c Config) quic(server bool) *quic.Config {
	q := &quic.Config{
		HandshakeIdleTimeout: handshakeTimeout,
		// All that a path must carry (RFC 9000 §14). quic-go would begin with 1,280
		// bytes, which a tunnel on the way with an MTU of 1,280 drops.
		InitialPacketSize:              1200,
		MaxIdleTimeout:                 idleTimeout,
		KeepAlivePeriod:                keepAlive,
		InitialStreamReceiveWindow:     clientStreamWindow,
		InitialConnectionReceiveWindow: clientConnWindow,
		MaxStreamReceiveWindow:         maxStreamWindow,
		MaxConnectionReceiveWindow:     clientConnWindow,
		MaxIncomingStreams:             int64(c.Limits.Streams),
		MaxIncomingUniStreams:          -1,
		EnableDatagrams:                true,
	}
	if server {
		q.HandshakeIdleTimeout = handshakeTimeout / 2 // quic-go ends a handshake after twice as long, whatever comes
		q.InitialStreamReceiveWindow = serverStreamWindow
		q.InitialConnectionReceiveWindow, q.MaxConnectionReceiveWindow = serverConnWindow, maxConnWindow
	}
	return q
}
