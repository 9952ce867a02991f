package netpair

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"sync"
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
	tap
	name map[int]string // of devices

	mu   sync.Mutex
	sent []Packet // guarded by mu
}

// Capture begins to capture. All devices must be there.
func (s *Space) Capture(t testing.TB) *Capture {
	t.Helper()
	c := &Capture{tap: tap{t: t}, name: map[int]string{}}
	err := s.Do(func() error {
		all, err := net.Interfaces()
		if err != nil {
			return err
		}
		for _, i := range all {
			c.name[i.Index] = i.Name
		}
		return c.open(unix.SOCK_DGRAM, 0)
	})
	if err != nil {
		t.Fatalf("the capture: %v", err)
	}
	c.begin(func(at *unix.SockaddrLinklayer, p []byte) {
		if at.Pkttype == unix.PACKET_OUTGOING {
			c.add(at, p)
		}
	})
	return c
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
	c.stop()
	return c.Sent()
}
