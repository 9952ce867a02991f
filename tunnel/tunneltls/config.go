package tunneltls

import (
	"crypto/tls"
	"log/slog"
	"net"
	"sync/atomic"
	"time"

	"culvert/tunnel"
)

// Config is what a Dialer or a Listener needs. The zero value of every field
// but TLS means its default.
type Config struct {
	// TLS is required; it is cloned. The minimum version becomes TLS 1.3. A
	// *tunnel.Error that its VerifyConnection returns reaches Dial's caller
	// with its own sentence.
	TLS *tls.Config
	// Log takes what happens below; nil discards it.
	Log *slog.Logger
	// Dial makes the connection below a Dialer's TLS; nil: a net.Dialer's. It may
	// be a tunnel.Layered one.
	Dial tunnel.DialFunc

	// Other takes connections of a Listener whose TLS handshake is done and has
	// chosen none of TLS.NextProtos, where TLS.GetConfigForClient lets such in.
	// They are tunnel.Layered, and Other's to close. nil: they are candidates like others.
	Other func(net.Conn)

	// HandshakeTimeout bounds the way to a Candidate: TCP and TLS when
	// dialling; TLS, and waiting for Accept, when listening. Default 5 s.
	HandshakeTimeout time.Duration
	// Handshakes is how many ClientHellos a Listener answers at once (default 64).
	// Connections that have not sent one, or have their answer, do not count.
	Handshakes int
	// Unauthenticated is how many connections a Listener holds before they are
	// accepted (default 1000). A further one is closed at once, or the oldest of
	// the source that has the most where that is another.
	Unauthenticated int

	// MaxStreams is how many streams a carrier has at most, both directions
	// together. Default 1024.
	MaxStreams int
	// Window is how many bytes of one stream a carrier takes before they are
	// read: 256 KiB to 1 GiB, default 8 MiB. It bounds a stream's rate to
	// Window/2 in each round trip at worst.
	Window int
	// Unread is how many bytes of all its streams a carrier takes before they
	// are read: then it takes nothing more, not even a stream's opening. Default
	// 256 MiB, which is what a sidecar keeps of all its streams until it is
	// acknowledged; at least 1 MiB. AllUnread is the same of all carriers of a
	// Listener or Dialer; each has 1 MiB in any case. Default 512 MiB. Buffers
	// may be twice as large.
	Unread, AllUnread int
	// WriteTimeout is how long TCP may take nothing while something is to be
	// sent: then a carrier or lane is given up. Default 5 s.
	WriteTimeout time.Duration
	// KeepAlive is how often an idle carrier asks whether its peer is there.
	// Default 10 s; it is given up after 2 × WriteTimeout without an answer.
	KeepAlive time.Duration

	// MaxAge is how old a datagram may be when it arrives on a lane: older
	// ones are dropped and counted as "late". Default 150 ms.
	MaxAge time.Duration

	unread *atomic.Int64 // what has come on all carriers and was not read
}

// closeTimeout bounds the farewell on a stalled connection.
const closeTimeout = 500 * time.Millisecond

func (c Config) validated() (Config, error) {
	bad := func(field, why string) (Config, error) {
		return c, tunnel.Errorf(tunnel.ConfigInvalid, "tunneltls: %s %s", field, why)
	}
	switch {
	case c.TLS == nil:
		return bad("TLS", "is missing")
	case c.TLS.MaxVersion != 0 && c.TLS.MaxVersion < tls.VersionTLS13:
		return bad("TLS", "does not allow TLS 1.3")
	case c.HandshakeTimeout < 0:
		return bad("HandshakeTimeout", "is negative")
	case c.Handshakes < 0:
		return bad("Handshakes", "is negative")
	case c.Unauthenticated < 0:
		return bad("Unauthenticated", "is negative")
	case c.MaxStreams < 0:
		return bad("MaxStreams", "is negative")
	case c.Window != 0 && (c.Window < 256<<10 || c.Window > 1<<30):
		return bad("Window", "is not between 256 KiB and 1 GiB")
	case c.Unread != 0 && c.Unread < leastUnread || c.AllUnread < 0:
		return bad("Unread", "is less than 1 MiB, or AllUnread negative")
	case c.WriteTimeout < 0:
		return bad("WriteTimeout", "is negative")
	case c.KeepAlive < 0:
		return bad("KeepAlive", "is negative")
	case c.MaxAge < 0:
		return bad("MaxAge", "is negative")
	case c.MaxAge >= wrap/2*time.Millisecond:
		return bad("MaxAge", "is more than the 16-bit send time can tell (32 s)")
	}
	c.TLS = c.TLS.Clone()
	c.TLS.MinVersion = max(c.TLS.MinVersion, tls.VersionTLS13)
	// One write is one record: the writers here choose sizes that fit.
	c.TLS.DynamicRecordSizingDisabled = true
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	if c.Dial == nil {
		c.Dial = new(net.Dialer).DialContext
	}
	or(&c.HandshakeTimeout, 5*time.Second)
	or(&c.Handshakes, 64)
	or(&c.Unauthenticated, 1000)
	or(&c.MaxStreams, 1024)
	or(&c.Window, 8<<20)
	or(&c.Unread, 256<<20)
	or(&c.AllUnread, 512<<20)
	c.unread = &atomic.Int64{}
	or(&c.WriteTimeout, 5*time.Second)
	or(&c.KeepAlive, 10*time.Second)
	or(&c.MaxAge, 150*time.Millisecond)
	return c, nil
}

func or[T comparable](field *T, value T) {
	var zero T
	if *field == zero {
		*field = value
	}
}
