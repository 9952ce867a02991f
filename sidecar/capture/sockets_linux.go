//go:build linux && (amd64 || arm64 || arm || riscv64)

package capture

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"os"
	"slices"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"

	"culvert/tunnel"
	"culvert/tunnel/netio"
)

const (
	// udpSockets is how many sockets of a family share the datagrams, by the
	// app's address: so many times the memory that the kernel lets one have, and
	// work for as many goroutines as the poller has.
	udpSockets = 8
	// udpBuffer is what each asks for; without CAP_NET_ADMIN the system's limit
	// (net.core.rmem_max) applies.
	udpBuffer = 4 << 20
)

// Sockets are those that receive what the kernel hands over, and those that
// answer.
type Sockets struct {
	port   uint16
	tcp    []*net.TCPListener
	udp    []*net.UDPConn
	polled []*netio.Socket
	raw    []*net.IPConn
	out    [2]*netio.Sender // raw, for IPv4 and IPv6
	own    []netip.AddrPort // where they listen

	once sync.Once
}

// Listen opens the sockets on 127.0.0.1 and ::1, where the system has it. Port 0
// is any. What they send has the mark, as of Protect: by it the rules know what
// an app hears from us. The error's code is NotPermitted without CAP_NET_RAW, and
// ConfigInvalid where the port is taken.
func Listen(port uint16, mark uint32) (_ *Sockets, err error) {
	s := &Sockets{port: port}
	defer func() {
		if err != nil {
			s.Close()
		}
	}()
	if err := MayMark(); err != nil {
		return nil, err
	}
	for i, a := range []netip.Addr{netip.AddrFrom4([4]byte{127, 0, 0, 1}), netip.IPv6Loopback()} {
		err := s.listen(a, mark)
		if err == nil {
			s.out[i], err = s.rawSocket(a, mark)
		}
		switch {
		case err == nil:
		case a.Is6() && (errors.Is(err, unix.EADDRNOTAVAIL) || errors.Is(err, unix.EAFNOSUPPORT)):
			return s, nil // a machine without IPv6
		default:
			return nil, explain(netip.AddrPortFrom(a, s.port), err)
		}
	}
	return s, nil
}

func (s *Sockets) listen(a netip.Addr, mark uint32) error {
	v6, suffix := a.Is6(), "4"
	if v6 {
		suffix = "6"
	}
	transparent := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		var err error
		return errors.Join(c.Control(func(fd uintptr) {
			if err = netio.Transparent(fd, v6); err != nil {
				return
			}
			if err = setMark(fd, mark); err != nil { // what a connection sends has it too, and counts as ours
				return
			}
			if kind, e := unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_TYPE); e == nil && kind == unix.SOCK_DGRAM {
				err = os.NewSyscallError("setsockopt", unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEPORT, 1))
				if unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, udpBuffer) != nil {
					unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVBUF, udpBuffer)
				}
			}
		}), err)
	}}
	ctx := context.Background()
	l, err := transparent.Listen(ctx, "tcp"+suffix, netip.AddrPortFrom(a, s.port).String())
	if err != nil {
		return err
	}
	s.tcp = append(s.tcp, l.(*net.TCPListener))
	s.port = l.Addr().(*net.TCPAddr).AddrPort().Port()
	at := netip.AddrPortFrom(a, s.port)
	s.own = append(s.own, at)
	// Sharing the port is for our own sockets: that nobody else has it, the first,
	// which does not share, finds out.
	alone, err := net.ListenUDP("udp"+suffix, net.UDPAddrFromAddrPort(at))
	if err != nil {
		return err
	}
	alone.Close()
	for range udpSockets {
		u, err := transparent.ListenPacket(ctx, "udp"+suffix, at.String())
		if err != nil {
			return err
		}
		s.udp = append(s.udp, u.(*net.UDPConn))
	}
	return nil
}

// rawSocket is one that sends packets with any source.
func (s *Sockets) rawSocket(a netip.Addr, mark uint32) (*netio.Sender, error) {
	network, any := "ip4:255", "0.0.0.0" // IPPROTO_RAW: it receives nothing
	if a.Is6() {
		network, any = "ip6:255", "::"
	}
	c, err := (&net.ListenConfig{Control: Protect(mark)}).ListenPacket(context.Background(), network, any)
	if err != nil {
		return nil, err
	}
	raw := c.(*net.IPConn)
	s.raw = append(s.raw, raw)
	raw.SetWriteBuffer(udpBuffer)
	return netio.NewRawSender(raw)
}

// Port is where they listen.
func (s *Sockets) Port() uint16 { return s.port }

// mine reports whether an address is one where they listen.
func (s *Sockets) mine(a netip.AddrPort) bool { return slices.Contains(s.own, a) }

// takeUDP hands the sockets over, once.
func (s *Sockets) takeUDP() []*net.UDPConn {
	all := s.udp
	s.udp = nil
	return all
}

// send sends a packet to an app.
func (s *Sockets) send(p []byte, to netip.Addr) error {
	out := s.out[0]
	if to.Is6() {
		out = s.out[1]
	}
	if out == nil {
		return unix.EAFNOSUPPORT
	}
	return out.Send(p, netip.AddrPortFrom(to, 0))
}

// Close closes all.
func (s *Sockets) Close() {
	s.once.Do(func() {
		for _, l := range s.tcp {
			l.Close()
		}
		for _, c := range s.takeUDP() {
			c.Close()
		}
		for _, p := range s.polled {
			p.Close()
		}
		for _, c := range s.raw {
			c.Close()
		}
	})
}

// Protect marks a socket of this process, so that what it sends is never
// captured. It is for net.Dialer and net.ListenConfig.
func Protect(mark uint32) func(network, address string, c syscall.RawConn) error {
	return func(_, _ string, c syscall.RawConn) error {
		var err error
		return errors.Join(c.Control(func(fd uintptr) { err = setMark(fd, mark) }), err)
	}
}

// Resolver looks names up by packets that rules with this mark leave alone. The C
// library's makes sockets that nobody can mark.
func Resolver(mark uint32) *net.Resolver {
	return &net.Resolver{PreferGo: true, Dial: (&net.Dialer{Control: Protect(mark)}).DialContext}
}

func setMark(fd uintptr, mark uint32) error {
	return os.NewSyscallError("setsockopt", unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_MARK, int(mark)))
}

// MayMark returns why this process may not mark its sockets, as Protect does; nil:
// it may. It puts a capability to use that the process has in reserve.
func MayMark() error {
	raise()
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return tunnel.Errorf(tunnel.Internal, "no socket: %w", err)
	}
	defer unix.Close(fd)
	if err := setMark(uintptr(fd), 0); err != nil {
		return explain(netip.AddrPort{}, err)
	}
	return nil
}

func explain(at netip.AddrPort, err error) error {
	switch {
	case errors.Is(err, unix.EACCES) && at.Port() != 0: // bind's; all else fails with EPERM
		return tunnel.Errorf(tunnel.NotPermitted, "to listen on %s needs CAP_NET_BIND_SERVICE; choose a port of 1024 or above with capture.port", at)
	case errors.Is(err, unix.EPERM), errors.Is(err, unix.EACCES):
		return tunnel.Errorf(tunnel.NotPermitted, "capturing traffic needs CAP_NET_RAW, on a kernel before 5.17 CAP_NET_ADMIN too; run the sidecar as root, or grant it (systemd: AmbientCapabilities=CAP_NET_RAW)")
	case errors.Is(err, unix.EADDRINUSE):
		return tunnel.Errorf(tunnel.ConfigInvalid, "another program listens on %s, perhaps another sidecar; choose another port with capture.port", at)
	case at.IsValid():
		return tunnel.Errorf(tunnel.Internal, "no transparent socket on %s: %w", at, err)
	}
	return tunnel.Errorf(tunnel.Internal, "sockets can not be marked: %w", err)
}
