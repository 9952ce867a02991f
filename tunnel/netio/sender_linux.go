//go:build linux && (amd64 || arm64 || arm || riscv64)

package netio

import (
	"encoding/binary"
	"net"
	"net/netip"
	"strconv"
	"sync"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"

	"culvert/tunnel"
)

// A Sender sends on a UDP socket, or on a raw one, that others may read and write
// at the same time.
type Sender struct {
	raw controller
	v6  bool // an IPv6 socket: it reaches IPv4 by mapped addresses
}

// controller is what a Sender needs of a syscall.RawConn; it has what a Socket lends.
type controller interface {
	Control(func(fd uintptr)) error
}

// NewSender returns a sender for a socket that is not connected. It ends with
// the socket: Send then returns net.ErrClosed, wrapped.
func NewSender(conn *net.UDPConn) (*Sender, error) { return newSender(conn) }

// NewRawSender is NewSender for a raw socket of protocol 255: what is sent are
// whole IP packets, and of the address only the host counts.
func NewRawSender(conn *net.IPConn) (*Sender, error) { return newSender(conn) }

func newSender(conn syscall.Conn) (*Sender, error) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return nil, err
	}
	s := &Sender{raw: raw}
	var failed error
	err = raw.Control(func(fd uintptr) {
		var domain int
		domain, failed = unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_DOMAIN)
		s.v6 = domain == unix.AF_INET6
	})
	if err == nil {
		err = failed
	}
	return s, err
}

// most is how many datagrams go into one system call.
const most = 32

// sending is the arguments of one sendmmsg. It lives in a pool, since a closure
// given to RawConn would be allocated for each call.
type sending struct {
	messages []unix.Mmsghdr
	iovs     []unix.Iovec
	names    []unix.RawSockaddrInet6 // the larger of the two families
	controls [][5]uint64             // one packet info; words, as the kernel aligns its headers
	n, sent  int
	err      error
	run      func(fd uintptr)
}

func newSending(n int) *sending {
	o := &sending{
		messages: make([]unix.Mmsghdr, n),
		iovs:     make([]unix.Iovec, n),
		names:    make([]unix.RawSockaddrInet6, n),
		controls: make([][5]uint64, n),
	}
	o.run = o.send
	for i := range n {
		h := &o.messages[i].Hdr
		h.Name = (*byte)(unsafe.Pointer(&o.names[i]))
		h.Iov = &o.iovs[i]
		h.SetIovlen(1)
	}
	return o
}

var (
	singles = sync.Pool{New: func() any { return newSending(1) }}
	batches = sync.Pool{New: func() any { return newSending(most) }}
)

// Send sends one datagram and borrows p until it returns. A full socket is
// tunnel.ErrBlocked, a datagram that the local link cannot carry is
// tunnel.ErrTooLarge, what else the kernel says is a syscall.Errno. An IPv4
// address is reached through an IPv6 socket too, unless that is IPv6 only. A
// zone is best a number: a name is looked up each time. It may be called
// concurrently.
func (s *Sender) Send(p []byte, to netip.AddrPort) error {
	return s.SendFrom(p, to, netip.Addr{})
}

// SendFrom is Send from one of this host's addresses, for sockets bound to
// none; an invalid one leaves the choice to the system.
func (s *Sender) SendFrom(p []byte, to netip.AddrPort, from netip.Addr) error {
	o := singles.Get().(*sending)
	err := o.put(0, p, to, from, s.v6)
	if err == nil {
		o.n = 1
		_, err = o.do(s.raw)
	}
	o.iovs[0].Base = nil
	singles.Put(o)
	return err
}

// SendBatch sends datagrams in order, up to 32 by one system call. It returns
// how many were sent; when not all were, the error is that of the next one, as
// Send has them: a caller that wants to go on skips it.
func (s *Sender) SendBatch(ms []Message) (int, error) {
	o := batches.Get().(*sending)
	sent, err := 0, error(nil)
	for sent < len(ms) && err == nil {
		o.n = 0
		var unfit error // of the message after those that were put
		for _, m := range ms[sent:min(len(ms), sent+most)] {
			if unfit = o.put(o.n, m.P, m.To, m.From, s.v6); unfit != nil {
				break
			}
			o.n++
		}
		var n int
		if n, err = o.do(s.raw); err == nil {
			err = unfit
		}
		sent += n
	}
	for i := range o.iovs {
		o.iovs[i].Base = nil
	}
	batches.Put(o)
	return sent, err
}

// put prepares message i.
func (o *sending) put(i int, p []byte, to netip.AddrPort, from netip.Addr, v6 bool) error {
	h := &o.messages[i].Hdr
	size, err := sockaddr(&o.names[i], to, v6)
	if err != nil {
		return err
	}
	h.Namelen = size
	o.iovs[i].Base = unsafe.SliceData(p)
	o.iovs[i].SetLen(len(p))
	h.Control = nil
	h.SetControllen(0)
	if !from.IsValid() {
		return nil
	}
	c := (*unix.Cmsghdr)(unsafe.Pointer(&o.controls[i]))
	data := unsafe.Add(unsafe.Pointer(c), unix.CmsgLen(0))
	var n int
	// An IPv6 socket takes IPv4 packet info for a mapped destination (ip(7)).
	if a := from.Unmap(); a.Is4() {
		c.Level, c.Type = unix.IPPROTO_IP, unix.IP_PKTINFO
		*(*unix.Inet4Pktinfo)(data) = unix.Inet4Pktinfo{Spec_dst: a.As4()}
		n = unix.SizeofInet4Pktinfo
	} else {
		c.Level, c.Type = unix.IPPROTO_IPV6, unix.IPV6_PKTINFO
		*(*unix.Inet6Pktinfo)(data) = unix.Inet6Pktinfo{Addr: a.As16()}
		n = unix.SizeofInet6Pktinfo
	}
	c.SetLen(unix.CmsgLen(n))
	h.Control = (*byte)(unsafe.Pointer(c))
	h.SetControllen(unix.CmsgSpace(n))
	return nil
}

// do sends the n messages that were put and returns how many went.
func (o *sending) do(raw controller) (int, error) {
	o.sent, o.err = 0, nil
	// Not RawConn.Write: it would wait for a Write on the same socket that
	// itself waits for room.
	if err := raw.Control(o.run); err != nil {
		return 0, err
	}
	return o.sent, o.err
}

func (o *sending) send(fd uintptr) {
	for o.sent < o.n {
		n, _, errno := unix.Syscall6(unix.SYS_SENDMMSG, fd, uintptr(unsafe.Pointer(&o.messages[o.sent])), uintptr(o.n-o.sent),
			unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL, 0, 0)
		switch errno {
		case 0: // fewer than asked: the next call brings the error
			o.sent += int(n)
		case unix.EINTR:
		default:
			o.err = explain(errno)
			return
		}
	}
}

func explain(errno syscall.Errno) error {
	switch errno {
	case unix.EAGAIN:
		return tunnel.ErrBlocked
	case unix.EMSGSIZE:
		return tunnel.ErrTooLarge
	}
	return errno // small errnos are not allocated
}

// sockaddr writes an address as a socket of its family wants it.
func sockaddr(name *unix.RawSockaddrInet6, to netip.AddrPort, v6 bool) (size uint32, err error) {
	var port [2]byte // in network order, whatever the host's
	binary.BigEndian.PutUint16(port[:], to.Port())
	a := to.Addr()
	switch {
	case !a.IsValid() || !v6 && !a.Unmap().Is4():
		return 0, unix.EAFNOSUPPORT
	case !v6:
		*(*unix.RawSockaddrInet4)(unsafe.Pointer(name)) = unix.RawSockaddrInet4{
			Family: unix.AF_INET, Port: binary.NativeEndian.Uint16(port[:]), Addr: a.Unmap().As4()}
		return unix.SizeofSockaddrInet4, nil
	}
	*name = unix.RawSockaddrInet6{Family: unix.AF_INET6, Port: binary.NativeEndian.Uint16(port[:]), Addr: a.As16(), Scope_id: scope(a.Zone())}
	return unix.SizeofSockaddrInet6, nil
}

// scope returns a zone's number; 0: there is no such interface.
func scope(zone string) uint32 {
	if zone == "" {
		return 0
	}
	if n, err := strconv.ParseUint(zone, 10, 32); err == nil {
		return uint32(n)
	}
	i, err := net.InterfaceByName(zone)
	if err != nil {
		return 0
	}
	return uint32(i.Index)
}
