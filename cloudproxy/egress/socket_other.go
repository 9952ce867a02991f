//go:build !linux || !(amd64 || arm64 || arm || riscv64)

package egress

import (
	"errors"
	"net"
	"net/netip"
	"os"
	"time"
)

// socket is one UDP socket where the system gives us no error queue. Its reader
// holds a buffer all the time.
type socket struct{ socketBase }

type buffer struct{ data [1 << 16]byte }

func newSocket(a *association, conn *net.UDPConn, v6 bool) (*socket, error) {
	s := &socket{}
	s.init(a, conn, v6)
	return s, nil
}

func (s *socket) send(p []byte, to netip.AddrPort) error {
	s.conn.SetWriteDeadline(time.Now().Add(time.Millisecond))
	_, err := s.conn.WriteToUDPAddrPort(p, to)
	if errors.Is(err, os.ErrDeadlineExceeded) {
		s.a.e.full.Add(1)
		return nil
	}
	return err
}

func (s *socket) read() {
	b := buffers.Get().(*buffer)
	defer buffers.Put(b)
	for s.a.state.Load() == stateOpen {
		n, from, err := s.conn.ReadFromUDPAddrPort(b.data[:])
		switch {
		case errors.Is(err, os.ErrDeadlineExceeded), errors.Is(err, net.ErrClosed):
			return
		case err == nil:
			s.a.deliver(b.data[:n], netip.AddrPortFrom(from.Addr().Unmap(), from.Port()), s.a.e.now())
		}
	}
}
