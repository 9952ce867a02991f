//go:build unix

package sidecar

import (
	"net/netip"
	"syscall"

	"golang.org/x/sys/unix"
)

// udpBuffer holds one datagram, and what writing it takes without allocating.
type udpBuffer struct {
	data [1 << 16]byte

	n    int
	v6   bool
	to4  unix.SockaddrInet4
	to6  unix.SockaddrInet6
	err  error
	emit func(fd uintptr) // writes data[:n] to to4 or to6; bound once
}

func newUDPBuffer() *udpBuffer {
	b := new(udpBuffer)
	b.emit = func(fd uintptr) {
		var to unix.Sockaddr = &b.to4
		if b.v6 {
			to = &b.to6
		}
		b.err = unix.Sendto(int(fd), b.data[:b.n], unix.MSG_DONTWAIT, to)
	}
	return b
}

// send writes the first n bytes and never waits. It goes around the runtime's
// poller, whose Write would wait for room.
func (b *udpBuffer) send(a *association, n int, to netip.AddrPort) error {
	b.n, b.v6 = n, a.v6
	if b.v6 {
		b.to6.Port, b.to6.Addr = int(to.Port()), to.Addr().As16()
	} else {
		b.to4.Port, b.to4.Addr = int(to.Port()), to.Addr().Unmap().As4()
	}
	if err := a.raw.Control(b.emit); err != nil {
		return err
	}
	return b.err
}

func isSocketFull(err error) bool {
	return err == unix.EAGAIN || err == unix.ENOBUFS
}

// readiness waits for a socket without holding a buffer.
type readiness struct {
	raw  syscall.RawConn
	fds  [1]unix.PollFd
	wait func(fd uintptr) bool
	look func(fd uintptr)
}

func newReadiness(raw syscall.RawConn) *readiness {
	r := &readiness{raw: raw}
	r.look = func(fd uintptr) {
		r.fds[0] = unix.PollFd{Fd: int32(fd), Events: unix.POLLIN}
		for {
			_, err := unix.Poll(r.fds[:], 0)
			if err != unix.EINTR {
				return
			}
		}
	}
	r.wait = func(fd uintptr) bool {
		r.look(fd)
		return r.fds[0].Revents != 0
	}
	return r
}

// readable returns when there is something to read, or with an error when the
// socket has been closed.
func (r *readiness) readable() error { return r.raw.Read(r.wait) }

// more reports whether there is something to read now.
func (r *readiness) more() bool {
	return r.raw.Control(r.look) == nil && r.fds[0].Revents != 0
}
