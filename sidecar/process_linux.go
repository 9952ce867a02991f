package sidecar

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"os"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"culvert/tunnel"
)

// ProcessOf finds the process whose socket is bound to client and talks to
// server; network is "tcp" or "udp". Both addresses must be of this machine and
// network namespace. Without the privilege to look into the process the result
// has only its user. The error's code is Unsupported where sock_diag is not
// available and Internal where no such socket is found.
//
// It reads the descriptors of every process, some milliseconds on a busy
// machine: call it once per connection, not per packet.
func ProcessOf(client, server netip.AddrPort, network string) (Process, error) {
	var s diagSocket
	var err error
	switch network {
	case "tcp":
		s, err = diagTCP(client, server)
	case "udp":
		s, err = diagUDP(client, server)
	default:
		return Process{}, tunnel.Errorf(tunnel.ConfigInvalid, "%q is not a network; use tcp or udp", network)
	}
	switch {
	case err == syscall.ENOENT:
		return Process{}, tunnel.Errorf(tunnel.Internal, "no socket of this machine is %s %s to %s: %w", network, client, server, err)
	case err != nil:
		return Process{}, tunnel.Errorf(tunnel.Unsupported, "the kernel does not say who holds %s: %w", client, err)
	}
	p := Process{UID: int(s.uid), User: strconv.Itoa(int(s.uid))}
	if u, err := user.LookupId(p.User); err == nil {
		p.User = u.Username
	}
	if s.inode != 0 {
		p.PID = holderOf(s.inode)
	}
	if p.PID != 0 {
		p.Name = programOf(p.PID)
	}
	return p, nil
}

// SocketOf reports whether a UDP socket of this machine and network namespace is
// bound to client, which has sent to server, and which one it is: 0 where the
// kernel does not say. In doubt there is one.
func SocketOf(client, server netip.AddrPort) (socket uint32, open bool) {
	s, err := diagUDP(client, server)
	if err != syscall.ENOENT {
		return s.inode, true
	}
	// It may be connected to somebody else by now.
	bound, err := diagBound(unix.IPPROTO_UDP, client)
	return 0, bound || err != nil
}

// holderOf returns the oldest process that has the socket open, or 0.
func holderOf(inode uint32) int {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return 0
	}
	var pids []int
	for _, e := range entries {
		if pid, err := strconv.Atoi(e.Name()); err == nil {
			pids = append(pids, pid)
		}
	}
	slices.Sort(pids)
	want := fmt.Sprintf("socket:[%d]", inode)
	for _, pid := range pids {
		dir := fmt.Sprintf("/proc/%d/fd", pid)
		fds, err := os.ReadDir(dir)
		if err != nil {
			continue // gone, or not ours to see
		}
		for _, fd := range fds {
			if link, err := os.Readlink(filepath.Join(dir, fd.Name())); err == nil && link == want {
				return pid
			}
		}
	}
	return 0
}

// programOf returns the name of the program's file; comm is cut to 15 bytes.
func programOf(pid int) string {
	if exe, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", pid)); err == nil {
		return filepath.Base(strings.TrimSuffix(exe, " (deleted)"))
	}
	comm, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", pid))
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(comm))
}

// diagSocket is what sock_diag says of one socket.
type diagSocket struct {
	port  uint16 // its own
	peer  uint16 // that of its peer; 0: it has none
	uid   uint32
	inode uint32 // 0 once no descriptor refers to it
}

// diagTCP finds the socket of a TCP connection by its own address and its
// peer's; ENOENT if there is none.
func diagTCP(own, peer netip.AddrPort) (diagSocket, error) {
	s, err := diag(unix.IPPROTO_TCP, own, peer)
	// Where no connection fits, the kernel finds who listens on the port, on all
	// addresses too: then that of another machine would be this user's.
	if err == nil && s.peer != peer.Port() {
		return s, syscall.ENOENT
	}
	return s, err
}

// diagUDP finds the socket that would receive what peer sends to own.
func diagUDP(own, peer netip.AddrPort) (diagSocket, error) {
	// The kernel looks UDP up from the view of a packet that arrives: the
	// source is the peer.
	s, err := diag(unix.IPPROTO_UDP, peer, own)
	if err == nil && s.port != own.Port() {
		return s, syscall.ENOENT
	}
	return s, err
}

// diagBound reports whether any socket is bound to an address, or to its port on
// all addresses. The kernel looks at all sockets.
func diagBound(protocol uint8, own netip.AddrPort) (bool, error) {
	for _, any := range []netip.Addr{netip.IPv4Unspecified(), netip.IPv6Unspecified()} {
		answers, err := ask(unix.NLM_F_DUMP, diagRequest{protocol, netip.AddrPortFrom(any, own.Port()), netip.AddrPortFrom(any, 0)})
		if err != nil {
			return false, err
		}
		for _, b := range answers {
			if len(b) < diagAnswerLen {
				continue
			}
			at := netip.AddrFrom4([4]byte(b[8:]))
			if b[0] == unix.AF_INET6 {
				at = netip.AddrFrom16([16]byte(b[8:])).Unmap()
			}
			if at == own.Addr() || at.IsUnspecified() {
				return true, nil
			}
		}
	}
	return false, nil
}

// diag asks for exactly one socket, which no dump of all sockets is needed for.
// It takes a fifth of what the library does: associations ask again and again. The
// kernel answers before Sendto returns, so nothing waits.
func diag(protocol uint8, source, destination netip.AddrPort) (diagSocket, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_INET_DIAG)
	if err != nil {
		return diagSocket{}, err
	}
	defer unix.Close(fd)
	request := diagRequest{protocol, source, destination}.Serialize()
	var buf [1024]byte // more than one socket and its attributes take
	b := binary.NativeEndian.AppendUint32(buf[:0], uint32(unix.NLMSG_HDRLEN+len(request)))
	b = binary.NativeEndian.AppendUint16(b, nl.SOCK_DIAG_BY_FAMILY)
	b = binary.NativeEndian.AppendUint16(b, unix.NLM_F_REQUEST)
	b = append(b, make([]byte, 4+4)...) // number and sender
	if err := unix.Sendto(fd, append(b, request...), 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return diagSocket{}, err
	}
	n, _, err := unix.Recvfrom(fd, buf[:], 0)
	if err != nil {
		return diagSocket{}, err
	}
	b = buf[:n]
	if n >= unix.NLMSG_HDRLEN+4 && binary.NativeEndian.Uint16(b[4:]) == unix.NLMSG_ERROR {
		return diagSocket{}, syscall.Errno(-int32(binary.NativeEndian.Uint32(b[unix.NLMSG_HDRLEN:])))
	}
	if n < unix.NLMSG_HDRLEN+diagAnswerLen {
		return diagSocket{}, syscall.ENOENT
	}
	b = b[unix.NLMSG_HDRLEN:]
	return diagSocket{
		port:  binary.BigEndian.Uint16(b[4:]),
		peer:  binary.BigEndian.Uint16(b[6:]),
		uid:   binary.NativeEndian.Uint32(b[64:]),
		inode: binary.NativeEndian.Uint32(b[68:]),
	}, nil
}

// ask asks on a goroutine of its own: the library reads into 64 KiB on the
// stack, and a stack that has grown to 128 KiB stays so for as long as an
// association lives (2,000 of them: 328 MB of stacks instead of 17).
func ask(flags int, what diagRequest) (answers [][]byte, err error) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		r := nl.NewNetlinkRequest(nl.SOCK_DIAG_BY_FAMILY, flags)
		r.AddData(what)
		answers, err = r.Execute(unix.NETLINK_INET_DIAG, nl.SOCK_DIAG_BY_FAMILY)
	}()
	<-done
	return answers, err
}

// The layouts of linux/inet_diag.h. struct inet_diag_sockid is 48 bytes: ports
// 2+2 and addresses 16+16 in network order, interface 4, cookie 8.
const (
	diagRequestLen = 1 + 1 + 1 + 1 + 4 + 48   // struct inet_diag_req_v2
	diagAnswerLen  = 1 + 1 + 1 + 1 + 48 + 4*5 // struct inet_diag_msg
	anyCookie      = ^uint64(0)               // INET_DIAG_NOCOOKIE, twice
	anyState       = ^uint32(0)
)

type diagRequest struct {
	protocol            uint8
	source, destination netip.AddrPort
}

func (diagRequest) Len() int { return diagRequestLen }

func (r diagRequest) Serialize() []byte {
	b := make([]byte, 0, diagRequestLen)
	family := byte(unix.AF_INET6)
	if r.source.Addr().Is4() {
		family = unix.AF_INET
	}
	b = append(b, family, r.protocol, 0, 0)
	b = binary.NativeEndian.AppendUint32(b, anyState)
	b = binary.BigEndian.AppendUint16(b, r.source.Port())
	b = binary.BigEndian.AppendUint16(b, r.destination.Port())
	for _, a := range []netip.AddrPort{r.source, r.destination} {
		var field [16]byte
		copy(field[:], a.Addr().AsSlice())
		b = append(b, field[:]...)
	}
	b = binary.NativeEndian.AppendUint32(b, 0)
	return binary.NativeEndian.AppendUint64(b, anyCookie)
}

// socketOwner compares the local user of an association's TCP connection with
// that of a datagram's sender.
type socketOwner struct {
	uid    uint32
	known  bool
	strict bool // what can not be known is not owned
}

// ownersKnown says that this system tells who is behind a connection.
const ownersKnown = true

// userOf looks up the user behind a connection of this machine.
func userOf(c *frontConn) (uid uint32, known bool) {
	s, err := diagTCP(c.from, tunnel.AddrPortOf(c.LocalAddr()))
	return s.uid, err == nil && s.inode != 0
}

// of looks the TCP client up.
func (o *socketOwner) of(c *frontConn) {
	o.uid, o.known = userOf(c)
}

// owns reports whether the sender is of the same local user, or it can not be
// known; sure says that it is known.
func (o *socketOwner) owns(sender, server netip.AddrPort) (owned, sure bool) {
	if !o.known {
		return !o.strict, false
	}
	s, err := diagUDP(sender, server)
	switch {
	case err == nil:
		return s.uid == o.uid, true
	case err != syscall.ENOENT: // such as that there is no descriptor to ask by
		return !o.strict, false
	case o.strict:
		return false, true
	}
	// The TCP client is on this machine, so the sender's socket was too, and
	// has been closed: unless this kernel can not look UDP up, when it does not
	// find our own socket either.
	_, err = diagUDP(server, sender)
	return err != nil, err == nil
}
