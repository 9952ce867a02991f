//go:build linux && (amd64 || arm64 || arm || riscv64)

package egress

import (
	"encoding/binary"
	"net"
	"net/netip"
	"sync"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"

	"culvert/tunnel"
)

// socket is one unconnected UDP socket. It goes around package net's blocking
// calls: a full send buffer must be a drop, and a buffer may only be held
// while there is something to read.
type socket struct {
	socketBase
	raw syscall.RawConn
}

// buffer is what one reader borrows.
type buffer struct {
	data [1 << 16]byte
	name unix.RawSockaddrInet6 // the larger of the two families
	size uint32
}

// sending is one sendto. It lives in a pool, since a closure given to RawConn
// would be allocated for each datagram.
type sending struct {
	p    []byte
	to   netip.AddrPort
	name unix.RawSockaddrInet6
	err  error
	run  func(fd uintptr) bool
}

var sendings = sync.Pool{New: func() any {
	s := new(sending)
	s.run = s.sendto
	return s
}}

func newSocket(a *association, conn *net.UDPConn, v6 bool) (*socket, error) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return nil, err
	}
	s := &socket{raw: raw}
	s.init(a, conn, v6)
	var failed error
	err = raw.Control(func(fd uintptr) {
		if v6 {
			failed = unix.SetsockoptInt(int(fd), unix.IPPROTO_IPV6, unix.IPV6_RECVERR, 1)
		} else {
			failed = unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_RECVERR, 1)
		}
	})
	if err == nil {
		err = failed
	}
	return s, err
}

func (s *socket) send(p []byte, to netip.AddrPort) error {
	o := sendings.Get().(*sending)
	o.p, o.to = p, to
	err := s.raw.Write(o.run)
	if err == nil {
		err = o.err
	}
	o.p, o.err = nil, nil
	sendings.Put(o)
	return err
}

// sendto never waits: it returns true, whatever happened.
func (s *sending) sendto(fd uintptr) bool {
	var port [2]byte
	binary.BigEndian.PutUint16(port[:], s.to.Port())
	size := uintptr(unix.SizeofSockaddrInet6)
	if a := s.to.Addr(); a.Is4() {
		n := (*unix.RawSockaddrInet4)(unsafe.Pointer(&s.name))
		*n = unix.RawSockaddrInet4{Family: unix.AF_INET, Port: *(*uint16)(unsafe.Pointer(&port)), Addr: a.As4()}
		size = unix.SizeofSockaddrInet4
	} else {
		s.name = unix.RawSockaddrInet6{Family: unix.AF_INET6, Port: *(*uint16)(unsafe.Pointer(&port)), Addr: a.As16()}
	}
	var p unsafe.Pointer
	if len(s.p) > 0 {
		p = unsafe.Pointer(&s.p[0])
	}
	for {
		_, _, errno := unix.Syscall6(unix.SYS_SENDTO, fd, uintptr(p), uintptr(len(s.p)),
			unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL, uintptr(unsafe.Pointer(&s.name)), size)
		if errno == unix.EINTR {
			continue
		}
		s.err = nil
		if errno != 0 {
			s.err = errno // small errnos are not allocated
		}
		return true
	}
}

// read serves the socket until the association ends.
func (s *socket) read() {
	for s.a.state.Load() == stateOpen {
		if s.raw.Read(s.drain) != nil {
			return // the deadline that drop has set
		}
	}
}

// drain reads until there is nothing more and then asks to be called again.
func (s *socket) drain(fd uintptr) bool {
	b := buffers.Get().(*buffer)
	defer buffers.Put(b)
	for got, failures := false, 0; s.a.state.Load() == stateOpen; {
		b.size = uint32(unsafe.Sizeof(b.name))
		n, _, errno := unix.Syscall6(unix.SYS_RECVFROM, fd, uintptr(unsafe.Pointer(&b.data[0])), uintptr(len(b.data)),
			unix.MSG_DONTWAIT, uintptr(unsafe.Pointer(&b.name)), uintptr(unsafe.Pointer(&b.size)))
		switch errno {
		case 0:
			got = true
			s.a.deliver(b.data[:n], b.from(), s.a.e.now())
		case unix.EINTR:
		case unix.EAGAIN:
			// A wake-up without a datagram was an ICMP error.
			if s.noticed.Swap(false) || !got {
				s.errors(fd)
			}
			return false
		default: // the pending ICMP error; reading has cleared it
			s.errors(fd)
			if failures++; failures > 100 {
				return false // not what reading clears; wait for the next wake-up
			}
		}
	}
	return true
}

func (b *buffer) from() netip.AddrPort {
	port := binary.BigEndian.Uint16((*[2]byte)(unsafe.Pointer(&b.name.Port))[:])
	if b.name.Family == unix.AF_INET {
		return netip.AddrPortFrom(netip.AddrFrom4((*unix.RawSockaddrInet4)(unsafe.Pointer(&b.name)).Addr), port)
	}
	return netip.AddrPortFrom(netip.AddrFrom16(b.name.Addr), port)
}

// errors empties the error queue: ip(7), IP_RECVERR.
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
