//go:build linux && (amd64 || arm64 || arm || riscv64)

package netio

import (
	"encoding/binary"
	"net/netip"
	"os"
	"strconv"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"culvert/tunnel"
)

// sizeOOB is the room for one datagram's control messages in bytes: traffic
// class, packet info and a timestamp fit.
const sizeOOB = 128

// A Batch holds the datagrams of one recvmmsg. It is for one reader at a time
// and for any socket.
type Batch struct {
	messages []unix.Mmsghdr
	iovs     []unix.Iovec
	names    []unix.RawSockaddrInet6 // the larger of the two families
	data     []byte
	oob      []byte
	size     int
	n        int // datagrams held
	err      error
	wait     func(fd uintptr) bool
}

// NewBatch returns a batch for up to n datagrams of up to size bytes. It keeps
// n × (size + 252) bytes.
func NewBatch(n, size int) *Batch {
	b := &Batch{
		messages: make([]unix.Mmsghdr, n),
		iovs:     make([]unix.Iovec, n),
		names:    make([]unix.RawSockaddrInet6, n),
		data:     make([]byte, n*size),
		oob:      make([]byte, n*sizeOOB),
		size:     size,
	}
	b.wait = func(fd uintptr) bool {
		_, b.err = b.TryRead(fd)
		return b.err != tunnel.ErrBlocked
	}
	for i := range n {
		b.iovs[i].Base = &b.data[i*size]
		b.iovs[i].SetLen(size)
		h := &b.messages[i].Hdr
		h.Name = (*byte)(unsafe.Pointer(&b.names[i]))
		h.Iov = &b.iovs[i]
		h.SetIovlen(1)
		h.Control = &b.oob[i*sizeOOB]
	}
	b.n = n // so that the first TryRead prepares all
	b.ready()
	return b
}

// ready forgets what is held. The kernel has written the lengths over.
func (b *Batch) ready() {
	for i := range b.n {
		h := &b.messages[i].Hdr
		h.Namelen = uint32(unsafe.Sizeof(b.names[i]))
		h.SetControllen(sizeOOB)
		h.Flags = 0
	}
	b.n = 0
}

// Read waits until the socket has datagrams and takes what fits, at least one.
// It forgets what the batch held. It returns a syscall.Errno for an error that
// was pending on the socket, which reading has cleared, and what RawConn
// returns at a deadline and when the socket is closed.
func (b *Batch) Read(raw syscall.RawConn) (int, error) {
	b.ready()
	if err := raw.Read(b.wait); err != nil {
		return 0, err
	}
	return b.n, b.err
}

// TryRead takes what is there and never waits; nothing is tunnel.ErrBlocked.
// It forgets what the batch held. Fewer datagrams than the batch has room for
// mean that the socket was found empty, or that an error is pending (only on
// connected sockets and on those with IP_RECVERR or IPV6_RECVERR).
func (b *Batch) TryRead(fd uintptr) (int, error) {
	b.ready()
	for {
		n, _, errno := unix.Syscall6(unix.SYS_RECVMMSG, fd, uintptr(unsafe.Pointer(&b.messages[0])), uintptr(len(b.messages)),
			unix.MSG_DONTWAIT, 0, 0)
		switch errno {
		case 0:
			b.n = int(n)
			return b.n, nil
		case unix.EINTR:
		case unix.EAGAIN:
			return 0, tunnel.ErrBlocked
		default:
			return 0, errno
		}
	}
}

// Cap returns how many datagrams the batch has room for.
func (b *Batch) Cap() int { return len(b.messages) }

// A Datagram is one that was received. Its bytes stay until the next read.
type Datagram struct {
	P         []byte
	From      netip.AddrPort // an IPv4 address is never mapped; a zone is a number
	OOB       []byte         // the control messages
	Truncated bool           // P is the beginning of a longer datagram
}

// At returns datagram i of those that the last read has returned.
func (b *Batch) At(i int) Datagram {
	m := &b.messages[:b.n][i]
	at, oob := i*b.size, i*sizeOOB
	return Datagram{
		P:         b.data[at : at+int(m.Len) : at+b.size],
		From:      addrPort(&b.names[i]),
		OOB:       b.oob[oob : oob+int(m.Hdr.Controllen) : oob+sizeOOB],
		Truncated: m.Hdr.Flags&unix.MSG_TRUNC != 0,
	}
}

func addrPort(name *unix.RawSockaddrInet6) netip.AddrPort {
	var port [2]byte
	binary.NativeEndian.PutUint16(port[:], name.Port) // at the same place in both families
	p := binary.BigEndian.Uint16(port[:])
	if name.Family == unix.AF_INET {
		return netip.AddrPortFrom(netip.AddrFrom4((*unix.RawSockaddrInet4)(unsafe.Pointer(name)).Addr), p)
	}
	a := netip.AddrFrom16(name.Addr).Unmap()
	if name.Scope_id != 0 && a.IsLinkLocalUnicast() {
		a = a.WithZone(strconv.FormatUint(uint64(name.Scope_id), 10))
	}
	return netip.AddrPortFrom(a, p)
}

// Local returns the address that a datagram was sent to, out of its control
// messages (IP_PKTINFO, IPV6_PKTINFO); invalid: they do not say.
func Local(oob []byte) netip.Addr {
	if data := control(oob, unix.IPPROTO_IP, unix.IP_PKTINFO); len(data) >= unix.SizeofInet4Pktinfo {
		return netip.AddrFrom4((*unix.Inet4Pktinfo)(unsafe.Pointer(&data[0])).Addr)
	}
	if data := control(oob, unix.IPPROTO_IPV6, unix.IPV6_PKTINFO); len(data) >= unix.SizeofInet6Pktinfo {
		return netip.AddrFrom16((*unix.Inet6Pktinfo)(unsafe.Pointer(&data[0])).Addr).Unmap()
	}
	return netip.Addr{}
}

// Transparent lets a socket take what TPROXY hands to it, and makes the kernel
// say where each datagram was sent to, for SentTo. It needs CAP_NET_RAW or
// CAP_NET_ADMIN.
func Transparent(fd uintptr, v6 bool) error {
	level, transparent, original := unix.IPPROTO_IP, unix.IP_TRANSPARENT, unix.IP_RECVORIGDSTADDR
	if v6 {
		level, transparent, original = unix.IPPROTO_IPV6, unix.IPV6_TRANSPARENT, unix.IPV6_RECVORIGDSTADDR
	}
	if err := unix.SetsockoptInt(int(fd), level, transparent, 1); err != nil {
		return os.NewSyscallError("setsockopt", err)
	}
	if kind, err := unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_TYPE); err != nil || kind != unix.SOCK_DGRAM {
		return os.NewSyscallError("getsockopt", err)
	}
	return os.NewSyscallError("setsockopt", unix.SetsockoptInt(int(fd), level, original, 1))
}

// SentTo returns where a datagram was sent to, out of its control messages;
// invalid: they do not say.
func SentTo(oob []byte) netip.AddrPort {
	data := control(oob, unix.IPPROTO_IP, unix.IP_ORIGDSTADDR)
	if len(data) < unix.SizeofSockaddrInet4 {
		data = control(oob, unix.IPPROTO_IPV6, unix.IPV6_ORIGDSTADDR)
	}
	if len(data) < unix.SizeofSockaddrInet4 {
		return netip.AddrPort{}
	}
	var name unix.RawSockaddrInet6
	copy(unsafe.Slice((*byte)(unsafe.Pointer(&name)), unsafe.Sizeof(name)), data)
	return addrPort(&name)
}

// Stamp makes the kernel note when it receives each datagram of a socket, for
// Received.
func Stamp(fd uintptr) error {
	return os.NewSyscallError("setsockopt", unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_TIMESTAMPNS, 1))
}

// Received returns when the kernel received a datagram, in ns since 1970, out
// of its control messages; 0: they do not say.
func Received(oob []byte) int64 {
	data := control(oob, unix.SOL_SOCKET, unix.SO_TIMESTAMPNS)
	if len(data) < int(unsafe.Sizeof(unix.Timespec{})) {
		return 0
	}
	return (*unix.Timespec)(unsafe.Pointer(&data[0])).Nano()
}

// Before reports whether the kernel received a datagram before a time, in ns
// since 1970. What does not say when it came did not.
func Before(oob []byte, since int64) bool {
	at := Received(oob)
	return at != 0 && at < since
}

// Oldest is the time before which what is age old now was received, in ns since
// 1970, for Before.
func Oldest(age time.Duration) int64 { return time.Now().UnixNano() - int64(age) }

// control finds a control message.
func control(oob []byte, level, kind int32) []byte {
	for len(oob) >= unix.SizeofCmsghdr {
		h := (*unix.Cmsghdr)(unsafe.Pointer(&oob[0]))
		head, end := unix.CmsgLen(0), int(h.Len)
		if end < head || end > len(oob) {
			break
		}
		data := oob[head:end]
		if h.Level == level && h.Type == kind {
			return data
		}
		oob = oob[min(unix.CmsgSpace(len(data)), len(oob)):]
	}
	return nil
}
