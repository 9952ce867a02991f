//go:build linux && (amd64 || arm64 || arm || riscv64)

package egress

import (
	"encoding/binary"
	"net/netip"
	"syscall"

	"golang.org/x/sys/unix"

	"culvert/tunnel"
)

// wantErrors makes the kernel keep ICMP errors for Failed: ip(7), IP_RECVERR.
func (s *socket) wantErrors() error {
	var failed error
	err := s.conn.Control(func(fd uintptr) {
		if s.key.v6 {
			failed = unix.SetsockoptInt(int(fd), unix.IPPROTO_IPV6, unix.IPV6_RECVERR, 1)
		} else {
			failed = unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_RECVERR, 1)
		}
	})
	if err == nil {
		err = failed
	}
	return err
}

// Failed empties the error queue.
func (s *socket) Failed() { s.conn.Control(s.errors) }

func (s *socket) errors(fd uintptr) {
	var oob [512]byte
	for {
		_, n, _, name, err := unix.Recvmsg(int(fd), nil, oob[:], unix.MSG_ERRQUEUE|unix.MSG_DONTWAIT)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return
		}
		var to netip.AddrPort // where the datagram was going
		switch a := name.(type) {
		case *unix.SockaddrInet4:
			to = netip.AddrPortFrom(netip.AddrFrom4(a.Addr), uint16(a.Port))
		case *unix.SockaddrInet6:
			to = netip.AddrPortFrom(netip.AddrFrom16(a.Addr), uint16(a.Port))
		}
		messages, err := unix.ParseSocketControlMessage(oob[:n])
		if err != nil {
			continue
		}
		for _, m := range messages {
			if errno, ok := icmpError(m); ok && to.IsValid() {
				s.a.unreachable(to, icmpSentence(to, errno))
			}
		}
	}
}

// icmpError reads a sock_extended_err: errno in the first four bytes, then its
// origin, in the host's byte order.
func icmpError(m unix.SocketControlMessage) (syscall.Errno, bool) {
	v4 := m.Header.Level == unix.IPPROTO_IP && m.Header.Type == unix.IP_RECVERR
	v6 := m.Header.Level == unix.IPPROTO_IPV6 && m.Header.Type == unix.IPV6_RECVERR
	if !v4 && !v6 || len(m.Data) < 16 {
		return 0, false
	}
	return syscall.Errno(binary.NativeEndian.Uint32(m.Data)), true
}

func icmpSentence(to netip.AddrPort, errno syscall.Errno) error {
	if errno == unix.EMSGSIZE {
		return tunnel.Errorf(tunnel.Internal, "a datagram to %s did not fit into a packet on the way: %w", to, tunnel.ErrTooLarge)
	}
	return explain(to.String(), errno)
}
