package tunnel

import (
	"context"
	"crypto/ed25519"
	"errors"
	"io"
	"net"
	"net/netip"
	"time"
)

// A Carrier is one connection that serves a session for a while.
type Carrier interface {
	// OpenStream starts a stream. Nothing need reach the peer before the first
	// Write. It fails with ctx's error, or Err's once the carrier is done.
	OpenStream(context.Context) (Stream, error)
	// AcceptStream returns the next stream that the peer has opened.
	AcceptStream(context.Context) (Stream, error)
	// Datagrams returns the carrier's own way for datagrams; nil: it has none.
	Datagrams() Way
	// Flow is the UDP flow under the carrier, for packets that are not the
	// carrier's own; nil: it has none.
	Flow() Flow
	// ExportKey derives n bytes from the TLS connection (RFC 8446 §7.5).
	ExportKey(label string, context []byte, n int) ([]byte, error)
	// Done is closed when the carrier has ended; Err then says why.
	Done() <-chan struct{}
	Err() error
	// Close ends the carrier and everything on it, tells the peer where that is
	// possible without waiting, and returns when its goroutines have ended.
	Close(error) error
	// Stats returns what is known about the path.
	Stats() CarrierStats
}

// CarrierStats describes a carrier's path.
type CarrierStats struct {
	Kind   string         // "quic" or "tls"
	Local  netip.AddrPort // our end
	Remote netip.AddrPort // the peer's end
	RTT    time.Duration  // smoothed round trip; 0: not known
}

// A Way is one way for datagrams. It never queues beyond what its transport
// needs to be kept busy: waiting is the business of tunnel/media, which can
// drop what has become too old.
type Way interface {
	// Start begins reception. recv is called on one goroutine; p is borrowed
	// until it returns and recv must not block. writable is called, on any
	// goroutine, after a Send that returned ErrBlocked could now succeed.
	// Start is called once, before the first Send.
	Start(recv func(p []byte), writable func())
	// Send borrows p until it returns and never blocks. It returns nil,
	// ErrBlocked, ErrTooLarge, or another error when the way has ended.
	Send(p []byte) error
	// Max is the largest datagram that Send takes at the moment, in bytes.
	Max() int
	// Name is the word for this way in status and metrics: "quic-datagram", "lane".
	Name() string
	// Lost returns the datagrams that the way itself had to drop after taking
	// them, by reason. Cheap enough to be called each second.
	Lost() map[string]uint64
}

// A Flow is the UDP flow of a carrier: one socket and a peer. Packets of another
// kind can share it with the carrier's as long as they look like QUIC packets
// with a short header (RFC 8999 §5.2). It ends with its carrier: Send then fails.
type Flow interface {
	// Claim directs to recv the packets whose first byte is 01xxxxxx and whose
	// next eight bytes are id. recv runs on the socket's reading goroutine,
	// borrows p until it returns and must not block. It returns false for a
	// packet that is not its own after all, which the carrier then gets. Of a
	// packet that is longer than the socket's buffers recv is given those nine
	// bytes, and the carrier never gets it. An id that is claimed already is an
	// error.
	Claim(id [8]byte, recv func(p []byte, from Path) bool) error
	// Late is how many packets of its claims were dropped since they had waited
	// for too long in the socket, as when this process stood still.
	Late() uint64
	// Release ends a claim. It does not wait for a recv that runs.
	Release(id [8]byte)
	// Send sends one packet. It borrows p until it returns and never waits: a
	// full socket is ErrBlocked, a packet larger than the local link can carry
	// is ErrTooLarge. It may be called concurrently.
	Send(p []byte, to Path) error
	// Path is where the carrier itself sends at the moment.
	Path() Path
	// ResetToken is how this end's stateless resets end (RFC 9000 §10.3) that
	// answer packets with this id when nobody claims it any more, so also after
	// a restart. False: it sends none.
	ResetToken(id [8]byte) (token [16]byte, ok bool)
	// WatchReset calls f, at most once and on any goroutine, when a packet has
	// come that ends with the token; nil ends the watch.
	WatchReset(token [16]byte, f func())
}

// A Path is one pair of addresses. Local is invalid where the socket itself is
// bound to one address.
type Path struct {
	Remote netip.AddrPort
	Local  netip.Addr
}

// A Lane is a way with a connection of its own.
type Lane interface {
	Way
	Done() <-chan struct{}
	Err() error
	Close(error) error
}

var (
	// ErrBlocked says that a way can take no datagram now.
	ErrBlocked = errors.New("the way is blocked")
	// ErrTooLarge says that a datagram can not fit.
	ErrTooLarge = errors.New("the datagram is too large for the way")
)

// A Candidate is a connection whose handshake is done and on which nothing has
// been said yet. Reading and writing it carries the opening exchange of
// tunnel/wire; then it becomes a carrier or a lane, exactly once. What the peer
// sends early waits in the transport, within small bounds.
type Candidate interface {
	io.ReadWriter
	SetDeadline(time.Time) error
	// Carrier turns the candidate into a carrier.
	Carrier() (Carrier, error)
	// Lane turns the candidate into a lane. Only byte-stream transports have
	// lanes; the others return an error.
	Lane() (Lane, error)
	// Flow and ExportKey are those of the carrier that the candidate can become,
	// for what has to be ready before the peer is answered.
	Flow() Flow
	ExportKey(label string, context []byte, n int) ([]byte, error)
	// PeerKey is the Ed25519 key that the peer proved in its TLS certificate;
	// nil where its certificate holds another kind of key.
	PeerKey() ed25519.PublicKey
	RemoteAddr() netip.AddrPort
	// Kind is "quic" or "tls".
	Kind() string
	// Close drops the candidate. After Carrier or Lane it does nothing.
	Close() error
}

// A Dialer makes candidates of one kind. address is HOST:PORT.
type Dialer interface {
	Dial(ctx context.Context, address string) (Candidate, error)
	Kind() string
}

// A Listener accepts candidates of one kind. Handshakes run beside each other
// and are bounded in number and time; a failed one is never returned.
type Listener interface {
	// Accept waits for the next candidate; it returns net.ErrClosed after Close.
	Accept(context.Context) (Candidate, error)
	Addr() net.Addr
	// Close stops accepting. Carriers and lanes already made live on.
	Close() error
}

// Open is what a sidecar says of itself when it asks for a session.
type Open struct {
	App      string            // App ID
	Token    string            // signed token; a secret: never logged
	Region   string            // wished region; may be empty
	Operator string            // network operator, as the seed's provisioning has it; may be empty
	Key      ed25519.PublicKey // the key proved by TLS
	From     netip.AddrPort    // where the sidecar seems to be
}
