//go:build !linux || !(amd64 || arm64 || arm || riscv64)

package netio

import (
	"errors"
	"net"
	"net/netip"
	"os"
	"syscall"
	"time"

	"culvert/tunnel"
)

// A Sender sends on a UDP socket that others may read and write at the same time.
type Sender struct {
	conn *net.UDPConn
	v6   bool
}

// NewSender returns a sender for a socket that is not connected. It ends with
// the socket: Send then returns net.ErrClosed, wrapped.
func NewSender(conn *net.UDPConn) (*Sender, error) {
	at, _ := conn.LocalAddr().(*net.UDPAddr)
	return &Sender{conn: conn, v6: at != nil && at.IP.To4() == nil}, nil
}

// Send sends one datagram and borrows p until it returns. A socket that stays
// full for a millisecond is tunnel.ErrBlocked, a datagram that the local link
// cannot carry is tunnel.ErrTooLarge. It may be called concurrently.
func (s *Sender) Send(p []byte, to netip.AddrPort) error {
	if a := to.Addr().Unmap(); a.Is4() && !s.v6 {
		to = netip.AddrPortFrom(a, to.Port())
	} else if a.Is4() {
		to = netip.AddrPortFrom(netip.AddrFrom16(a.As16()), to.Port())
	}
	s.conn.SetWriteDeadline(time.Now().Add(time.Millisecond))
	_, err := s.conn.WriteToUDPAddrPort(p, to)
	switch {
	case errors.Is(err, os.ErrDeadlineExceeded):
		return tunnel.ErrBlocked
	case errors.Is(err, syscall.EMSGSIZE):
		return tunnel.ErrTooLarge
	}
	return err
}

// SendFrom is Send; the local address is not used here.
func (s *Sender) SendFrom(p []byte, to netip.AddrPort, _ netip.Addr) error { return s.Send(p, to) }

// SendBatch sends datagrams in order. It returns how many were sent; when not
// all were, the error is that of the next one: a caller that wants to go on
// skips it.
func (s *Sender) SendBatch(ms []Message) (int, error) {
	for i, m := range ms {
		if err := s.Send(m.P, m.To); err != nil {
			return i, err
		}
	}
	return len(ms), nil
}
