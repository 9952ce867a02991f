package tunnelquic

import (
	"errors"
	"net"
	"sync/atomic"
	"syscall"

	"github.com/quic-go/quic-go"
)

var _ quic.OOBCapablePacketConn = (*socket)(nil)

// sendBuffer is how much a socket may hold that the local link has not taken,
// in bytes as the kernel counts them; see (*socket).bound.
const sendBuffer = 512 << 10

// A socket keeps errors of single sendmsg calls from quic-go, which ends a
// connection on any of them, and what others have claimed (flows). It embeds
// *net.UDPConn so that quic-go still finds what it needs for ECN and GSO.
type socket struct {
	*net.UDPConn
	flows
	unproved unproved
	// strict passes on errors that say that there is no way to the peer: while
	// dialling they are the answer. noWay keeps the last, since quic-go keeps
	// only its text.
	strict atomic.Bool
	noWay  atomic.Pointer[error]
	failed atomic.Uint64 // packets that the kernel refused
}

// newSocket prepares conn for a transport; what it fails with is the system's.
func newSocket(conn *net.UDPConn, c Config, server bool) (*socket, error) {
	s := &socket{UDPConn: conn}
	return s, s.start(c, server)
}

// WriteMsgUDP sends as net.UDPConn does. A packet that the kernel refuses for
// a reason that may pass counts as sent: QUIC sees it as lost.
func (s *socket) WriteMsgUDP(b, oob []byte, to *net.UDPAddr) (n, oobn int, err error) {
	if s.secret(b) || to != nil && !s.unproved.may(b, to.AddrPort()) {
		return len(b), len(oob), nil
	}
	n, oobn, err = s.UDPConn.WriteMsgUDP(b, oob, to)
	if err == nil || !passes(err) {
		return n, oobn, err
	}
	if s.strict.Load() && noWay(err) {
		s.noWay.Store(&err)
		return n, oobn, err
	}
	s.failed.Add(1)
	return len(b), len(oob), nil
}

// bound undoes what quic-go has made of the send buffer.
func (s *socket) bound() { s.SetWriteBuffer(sendBuffer / 2) } // the kernel doubles it: socket(7)

// passes reports whether an error may be gone at the next packet: a full queue,
// a firewall that is being reloaded, a route that changes. EMSGSIZE is not one
// of them (quic-go needs it to find the path MTU), nor EIO (it turns GSO off).
func passes(err error) bool {
	return noWay(err) || errors.Is(err, syscall.ENOBUFS) || errors.Is(err, syscall.ENOMEM) || errors.Is(err, syscall.EAGAIN)
}

func noWay(err error) bool {
	for _, no := range []syscall.Errno{
		syscall.ENETUNREACH, syscall.EHOSTUNREACH, syscall.ENETDOWN, syscall.EHOSTDOWN,
		syscall.EPERM, syscall.EACCES, syscall.EADDRNOTAVAIL, syscall.ECONNREFUSED,
	} {
		if errors.Is(err, no) {
			return true
		}
	}
	return false
}

// forbidden reports whether this host itself does not let packets out.
func forbidden(err error) bool {
	return errors.Is(err, syscall.EPERM) || errors.Is(err, syscall.EACCES)
}
