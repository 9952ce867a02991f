package netpair

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// The addresses of a space that has an Outside. They are none of those that are
// reserved for something, so that whoever judges addresses takes them for public.
var (
	OutsideAddr4 = netip.MustParsePrefix("198.51.101.1/24")
	OutsideAddr6 = netip.MustParsePrefix("2001:db9::1/64")
)

// outside is the device that a space's Outside goes by.
const outside = "outside"

// Outside gives the namespace a way to every address of both families, from
// which nothing comes back: what is sent there is only to be seen by a Capture.
func (s *Space) Outside(t testing.TB) {
	t.Helper()
	err := s.Do(func() error {
		const sink = "sink"
		if err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: outside}, PeerName: sink}); err != nil {
			return err
		}
		var index int
		for _, name := range []string{sink, outside} {
			l, err := netlink.LinkByName(name)
			if err == nil {
				err = errors.Join(netlink.LinkSetARPOff(l), netlink.LinkSetUp(l)) // else it would wait for neighbours
			}
			if err != nil {
				return fmt.Errorf("%s: %w", name, err)
			}
			index = l.Attrs().Index
		}
		l, err := netlink.LinkByIndex(index)
		if err != nil {
			return err
		}
		for _, p := range []netip.Prefix{OutsideAddr4, OutsideAddr6} {
			a, err := netlink.ParseAddr(p.String())
			if err != nil {
				return err
			}
			if p.Addr().Is6() {
				a.Flags = unix.IFA_F_NODAD // else it is of no use for a second
			}
			if err := netlink.AddrAdd(l, a); err != nil {
				return fmt.Errorf("%s: %w", p, err)
			}
			everywhere := &net.IPNet{IP: make(net.IP, p.Addr().BitLen()/8), Mask: make(net.IPMask, p.Addr().BitLen()/8)}
			if err := netlink.RouteAdd(&netlink.Route{LinkIndex: index, Dst: everywhere}); err != nil {
				return fmt.Errorf("a route to %s: %w", everywhere, err)
			}
		}
		return nil
	})
	if err != nil {
		unmakeable(t, err)
	}
}

// Packet is one that was sent on a device.
type Packet struct {
	Device   string
	Protocol int            // unix.IPPROTO_…; -1: of another kind than IP, or a later fragment
	From, To netip.AddrPort // ports are those of TCP and UDP
}

func (p Packet) String() string {
	return fmt.Sprintf("protocol %d from %s to %s on %s", p.Protocol, p.From, p.To, p.Device)
}

// Capture holds what a namespace sends on any of its devices, its loopback
// included, but what the kernel sends by itself to keep links working.
type Capture struct {
	t    testing.TB
	fd   int
	end  atomic.Bool
	wg   sync.WaitGroup
	once sync.Once
	name map[int]string // of devices

	mu   sync.Mutex
	sent []Packet // guarded by mu
}

// Capture begins to capture. All devices must be there.
func (s *Space) Capture(t testing.TB) *Capture {
	t.Helper()
	c := &Capture{t: t, name: map[int]string{}}
	if err := s.Do(c.open); err != nil {
		t.Fatalf("the capture: %v", err)
	}
	c.wg.Go(c.read)
	t.Cleanup(func() { c.Stop() })
	return c
}

func (c *Capture) open() error {
	all, err := net.Interfaces()
	if err != nil {
		return err
	}
	for _, i := range all {
		c.name[i.Index] = i.Name
	}
	// Bound to no device, it hears them all: packet(7).
	c.fd, err = capture(unix.SOCK_DGRAM, 0)
	return err
}

// read reads as Watch.read does.
func (c *Capture) read() {
	var b [snap]byte
	for {
		flags := 0
		if c.end.Load() {
			flags = unix.MSG_DONTWAIT
		}
		n, from, err := unix.Recvfrom(c.fd, b[:], flags)
		switch {
		case errors.Is(err, unix.EINTR):
		case errors.Is(err, unix.EAGAIN):
			if c.end.Load() {
				return
			}
		case err != nil:
			c.t.Errorf("the capture: %v", err)
			return
		default:
			if at, ok := from.(*unix.SockaddrLinklayer); ok && at.Pkttype == unix.PACKET_OUTGOING {
				c.add(at, b[:n])
			}
		}
	}
}

func (c *Capture) add(at *unix.SockaddrLinklayer, p []byte) {
	kind := binary.BigEndian.Uint16(binary.NativeEndian.AppendUint16(nil, at.Protocol))
	h := read(kind, p)
	// RFC 4861 and 3810: neighbours, routers and listeners are from 130 to 143.
	ofLink := h.protocol == unix.IPPROTO_ICMPV6 && len(h.segment) > 0 && h.segment[0] >= 130 && h.segment[0] <= 143
	if kind == unix.ETH_P_ARP || ofLink || h.protocol == unix.IPPROTO_IGMP {
		return
	}
	one := Packet{c.name[at.Ifindex], h.protocol, netip.AddrPortFrom(h.src, 0), netip.AddrPortFrom(h.dst, 0)}
	if (h.protocol == unix.IPPROTO_UDP || h.protocol == unix.IPPROTO_TCP) && len(h.segment) >= 4 {
		one.From = netip.AddrPortFrom(h.src, binary.BigEndian.Uint16(h.segment))
		one.To = netip.AddrPortFrom(h.dst, binary.BigEndian.Uint16(h.segment[2:]))
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.sent = append(c.sent, one)
}

// Sent returns what was seen so far.
func (c *Capture) Sent() []Packet {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.Clone(c.sent)
}

// Stop ends the capture and returns what was seen. It fails the test when a
// packet may have been missed.
func (c *Capture) Stop() []Packet {
	c.once.Do(func() {
		c.end.Store(true)
		c.wg.Wait()
		closeCapture(c.t, c.fd)
	})
	return c.Sent()
}

// capture makes a packet socket in this thread's namespace. ifindex 0 is every
// device.
func capture(kind, ifindex int) (fd int, err error) {
	all := binary.NativeEndian.Uint16(binary.BigEndian.AppendUint16(nil, unix.ETH_P_ALL))
	// Protocol 0 receives nothing until it is bound.
	fd, err = unix.Socket(unix.AF_PACKET, kind|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0, os.NewSyscallError("socket", err)
	}
	err = errors.Join(
		unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, backlog),
		unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Usec: 50_000}),
		unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: all, Ifindex: ifindex}),
	)
	if err != nil {
		unix.Close(fd)
	}
	return fd, err
}

// closeCapture fails the test when a packet may have been missed.
func closeCapture(t testing.TB, fd int) {
	if s, err := unix.GetsockoptTpacketStats(fd, unix.SOL_PACKET, unix.PACKET_STATISTICS); err != nil || s.Drops > 0 {
		t.Errorf("the capture missed packets: %+v, %v", s, err)
	}
	unix.Close(fd)
}
