package netpair

import (
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"testing"

	"golang.org/x/sys/unix"
)

// Seen is what passed between the two ends.
type Seen struct {
	UDP, TCP int            // packets to and from the watched port of Far
	Link     int            // ARP, and ICMP and IGMP that keep the link working
	Stray    map[string]int // all others, by what they are
}

// Watch is a capture of the link, both directions.
type Watch struct {
	tap
	seen Seen // of the reading goroutine, until it has ended
}

// Watch begins to capture. port is where the cloud proxy listens, at Far.
func (p *Pair) Watch(t testing.TB, port uint16) *Watch {
	t.Helper()
	w := &Watch{tap: tap{t: t}, seen: Seen{Stray: map[string]int{}}}
	err := p.Near.Do(func() error {
		i, err := net.InterfaceByName(device)
		if err != nil {
			return err
		}
		return w.open(unix.SOCK_RAW, i.Index)
	})
	if err != nil {
		t.Fatalf("the capture: %v", err)
	}
	w.begin(func(_ *unix.SockaddrLinklayer, frame []byte) { w.seen.add(frame, port) })
	return w
}

// Stop ends the capture and returns what was seen. It fails the test when a
// packet may have been missed.
func (w *Watch) Stop() Seen {
	w.stop()
	return w.seen
}

// add judges an Ethernet frame, of which the end may be missing.
func (s *Seen) add(frame []byte, port uint16) {
	what := "a frame of unknown kind"
	var h header
	if len(frame) >= 14 {
		kind := binary.BigEndian.Uint16(frame[12:])
		if kind == unix.ETH_P_ARP {
			s.Link++
			return
		}
		what = fmt.Sprintf("Ethernet type %#04x", kind)
		h = read(kind, frame[14:])
		if h.src.IsValid() {
			what = fmt.Sprintf("IP protocol %d from %s to %s", h.protocol, h.src, h.dst)
		}
	}
	protocol, src, dst, segment := h.protocol, h.src, h.dst, h.segment
	switch {
	// IGMP (RFC 3376) is for IPv4 what some of ICMPv6 is for IPv6.
	case (protocol == unix.IPPROTO_ICMP || protocol == unix.IPPROTO_ICMPV6 || protocol == unix.IPPROTO_IGMP) && ofLink(src, dst):
		s.Link++
		return
	case (protocol == unix.IPPROTO_UDP || protocol == unix.IPPROTO_TCP) && len(segment) >= 4:
		name, count := "UDP", &s.UDP
		if protocol == unix.IPPROTO_TCP {
			name, count = "TCP", &s.TCP
		}
		from := netip.AddrPortFrom(src, binary.BigEndian.Uint16(segment))
		to := netip.AddrPortFrom(dst, binary.BigEndian.Uint16(segment[2:]))
		if at := netip.AddrPortFrom(FarAddr, port); from == at && dst == NearAddr || to == at && src == NearAddr {
			*count++
			return
		}
		what = fmt.Sprintf("%s from %s to %s", name, from, to)
	}
	s.Stray[what]++
}

// ofLink reports whether a packet concerns the link alone: it goes to a group or
// to somebody on the link. What tells somebody beyond it of an error does not.
func ofLink(src, dst netip.Addr) bool {
	bits := 24 // as the pair's own addresses
	if dst.Is6() {
		bits = 64
	}
	own, err := src.Prefix(bits)
	return err == nil && own.Contains(dst) || dst.IsMulticast() || dst.IsLinkLocalUnicast() || dst.Is6() && src.IsLinkLocalUnicast()
}
