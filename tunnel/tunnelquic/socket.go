package tunnelquic

import (
	"errors"
	"net"
	"sync/atomic"
	"syscall"

	"github.com/quic-go/quic-go"
)

var _ quic.OOBCapablePacketConn = (*socket)(nil)

// A socket keeps errors of single sendmsg calls from quic-go, which ends a
// connection on any of them. It embeds *net.UDPConn so that quic-go still finds
// what it needs for ECN, GSO and reading in batches.
type socket struct {
	*net.UDPConn
	// strict passes on errors that say that there is no way to the peer: while
	// dialling they are the answer. noWay keeps the last, since quic-go keeps
	// only its text.
	strict atomic.Bool
	noWay  atomic.Pointer[error]
	failed atomic.Uint64 // packets that the kernel refused
}

// WriteMsgUDP sends as net.UDPConn does. A packet that the kernel refuses for
// a reason that may pass counts as sent: QUIC sees it as lost.
func (s *socket) WriteMsgUDP(b, oob []byte, to *net.UDPAddr) (n, oobn int, err error) {
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
