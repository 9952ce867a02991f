package tunnel

import (
	"context"
	"net"
	"net/netip"
	"strconv"
)

// An Opener starts traffic on behalf of a peer. Every stage of a path is one
// and wraps the next. Implementations must be safe for concurrent use.
type Opener interface {
	// OpenStream connects to the target. It returns once the target has
	// answered or the attempt has failed; the error carries a Code that says
	// why. Cancelling ctx abandons the attempt and has no effect afterwards.
	OpenStream(ctx context.Context, by Peer, to Target) (Stream, error)

	// OpenPackets starts one UDP association. It never waits for the network:
	// a failure known at once is returned, a later one arrives as r.Closed.
	// After an error r is never called.
	OpenPackets(by Peer, r Receiver) (Packets, error)
}

// Peer says who asks.
type Peer struct {
	App  string         // App ID; set at the cloud proxy, from the token
	User string         // SOCKS or HTTP user name; empty without authentication
	Addr netip.AddrPort // where the request came from: the app's socket, or the sidecar's address

	// Held says that something else ends this association (a SOCKS control
	// connection, a lease), so it must not end because it is idle.
	Held bool
}

// Target says where to. Host is a name or empty; Addr is the numeric address,
// invalid until the name has been resolved. A Target is comparable.
type Target struct {
	Host string
	Addr netip.Addr
	Port uint16
}

// TargetOf returns the target for a numeric address.
func TargetOf(a netip.AddrPort) Target {
	return Target{Addr: a.Addr(), Port: a.Port()}
}

// ParseTarget reads "host:port", where host is a name, an IPv4 address or a
// bracketed IPv6 address. The error's code is ConfigInvalid.
func ParseTarget(s string) (Target, error) {
	host, port, err := net.SplitHostPort(s)
	if err != nil {
		return Target{}, Errorf(ConfigInvalid, "%q is not HOST:PORT", s)
	}
	n, err := strconv.ParseUint(port, 10, 16)
	if err != nil || n == 0 {
		return Target{}, Errorf(ConfigInvalid, "%q is not a port between 1 and 65535 (in %q)", port, s)
	}
	if a, err := netip.ParseAddr(host); err == nil {
		return Target{Addr: a, Port: uint16(n)}, nil
	}
	if host == "" || len(host) > 255 {
		return Target{}, Errorf(ConfigInvalid, "%q has no host name of 1 to 255 bytes", s)
	}
	return Target{Host: host, Port: uint16(n)}, nil
}

// AddrPort returns the numeric address; it is invalid until Addr is known.
func (t Target) AddrPort() netip.AddrPort { return netip.AddrPortFrom(t.Addr, t.Port) }

// String returns "host:port", with the name where there is one.
func (t Target) String() string {
	host := t.Host
	if host == "" {
		host = t.Addr.String()
	}
	return net.JoinHostPort(host, strconv.Itoa(int(t.Port)))
}

// A Stream is one TCP connection's worth of bytes, both ways.
type Stream interface {
	// Close ends both directions. Bytes already written are still delivered;
	// it ends a blocked Read or Write.
	net.Conn
	// CloseWrite ends our direction (FIN). Reading goes on.
	CloseWrite() error
	// Abort ends both directions at once (RST): the other end's next Read or
	// Write fails, undelivered bytes are lost. err says why, for the log.
	Abort(err error)
}

// Packets is one UDP association, seen from the side that sends into it.
type Packets interface {
	// Send hands over one datagram. It borrows p until it returns, never waits
	// for the network, and may be called concurrently. A datagram that finds a
	// full socket or a full queue is dropped and counted, which is not an
	// error. An error means that this datagram can never go there (ErrTooLarge,
	// a policy denial) or that the association has ended (net.ErrClosed).
	Send(p []byte, to Target) error
	// Flush marks the end of a batch of Sends.
	Flush()
	// Close ends the association. It never waits and is legal inside Deliver.
	// Close is not answered by Receiver.Closed.
	Close() error
}

// A Receiver takes what comes back on an association. Its methods are called
// on the reading goroutine of whatever serves many associations, concurrently:
// they must not block.
type Receiver interface {
	// Deliver hands over one datagram; p is borrowed until it returns.
	Deliver(p []byte, from netip.AddrPort)
	// Unreachable reports ICMP errors and refusals for one address (invalid
	// where only a name was known). It never ends the association.
	Unreachable(to netip.AddrPort, err error)
	// Closed is called at most once, when the association ends by itself; it
	// is the last call.
	Closed(err error)
}
