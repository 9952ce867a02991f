package capture

import (
	"encoding/binary"
	"math/bits"
	"net/netip"
)

// The headers that a packet to an app begins with.
const (
	ipv4Header   = 20
	ipv6Header   = 40
	udpHeader    = 8
	icmpHeader   = 8
	mostHeaders  = ipv6Header + icmpHeader + ipv6Header + udpHeader
	mostIPv4     = 1<<16 - 1
	hops         = 64
	protocolICMP = 1
	protocolUDP  = 17
	protocolICM6 = 58
)

// appendUDP appends an IP packet with a datagram for an app; ok is false where
// the families differ or IPv4 can not hold it. For IPv4 the kernel fills in the
// header's checksum, and the datagram has none (RFC 768): it never leaves this
// machine.
func appendUDP(b []byte, from, to netip.AddrPort, p []byte) (_ []byte, ok bool) {
	size := udpHeader + len(p)
	start := len(b)
	if b, ok = appendIP(b, protocolUDP, from.Addr(), to.Addr(), size); !ok {
		return b, false
	}
	at := len(b)
	b = binary.BigEndian.AppendUint16(b, from.Port())
	b = binary.BigEndian.AppendUint16(b, to.Port())
	b = binary.BigEndian.AppendUint16(b, uint16(size))
	b = append(b, 0, 0)
	b = append(b, p...)
	if from.Addr().Is6() {
		sum := checksum(b[at:], pseudo(b[start:], protocolUDP, size))
		if sum == 0 {
			sum = 0xffff // RFC 8200 section 8.1: 0 would mean that there is none
		}
		binary.BigEndian.PutUint16(b[at+6:], sum)
	}
	return b, true
}

// appendIP appends the header of a packet.
func appendIP(b []byte, protocol byte, from, to netip.Addr, size int) (_ []byte, ok bool) {
	switch {
	case from.Is4() && to.Is4() && ipv4Header+size <= mostIPv4:
		b = append(b, 0x45, 0)
		b = binary.BigEndian.AppendUint16(b, uint16(ipv4Header+size))
		b = append(b, 0, 0, 0, 0, hops, protocol, 0, 0) // the kernel numbers and sums it
		f, t := from.As4(), to.As4()
		return append(append(b, f[:]...), t[:]...), true
	case from.Is6() && to.Is6() && size < 1<<16:
		b = append(b, 0x60, 0, 0, 0)
		b = binary.BigEndian.AppendUint16(b, uint16(size))
		b = append(b, protocol, hops)
		f, t := from.As16(), to.As16()
		return append(append(b, f[:]...), t[:]...), true
	}
	return b, false
}

// A reason is what ICMP says of a datagram that can not be delivered.
type reason int

const (
	reasonPort reason = iota // nobody takes it
	reasonHost
	reasonNetwork
	reasonDenied // by an administrator
)

// The code of each reason, with type 3 (RFC 792, RFC 1812) and with type 1 (RFC
// 4443 section 3.1).
var icmpCodes = [...]struct{ v4, v6 byte }{
	reasonPort: {3, 4}, reasonHost: {1, 3}, reasonNetwork: {0, 0}, reasonDenied: {13, 1},
}

// appendUnreachable appends an IP packet that tells an app's socket that what it
// sends to an address is not delivered. It seems to come from that address, and
// quotes the headers of what was sent, as far as they are looked at.
func appendUnreachable(b []byte, app, to netip.AddrPort, why reason) (_ []byte, ok bool) {
	v6 := app.Addr().Is6()
	head, protocol := ipv4Header, byte(protocolICMP)
	if v6 {
		head, protocol = ipv6Header, protocolICM6
	}
	size := icmpHeader + head + udpHeader
	start := len(b)
	if b, ok = appendIP(b, protocol, to.Addr(), app.Addr(), size); !ok {
		return b, false
	}
	at := len(b)
	if v6 {
		b = append(b, 1, icmpCodes[why].v6)
	} else {
		b = append(b, 3, icmpCodes[why].v4)
	}
	b = append(b, 0, 0, 0, 0, 0, 0)
	quoted := len(b)
	b, _ = appendIP(b, protocolUDP, app.Addr(), to.Addr(), udpHeader)
	if !v6 {
		binary.BigEndian.PutUint16(b[quoted+10:], checksum(b[quoted:], 0))
	}
	b = binary.BigEndian.AppendUint16(b, app.Port())
	b = binary.BigEndian.AppendUint16(b, to.Port())
	b = append(b, 0, udpHeader, 0, 0)
	sum := uint64(0)
	if v6 {
		sum = pseudo(b[start:], protocolICM6, size)
	}
	binary.BigEndian.PutUint16(b[at+2:], checksum(b[at:], sum))
	return b, true
}

// pseudo is the sum of IPv6's pseudo header (RFC 8200 section 8.1) for the packet
// that b begins with.
func pseudo(b []byte, protocol byte, size int) uint64 {
	return add(b[8:ipv6Header], uint64(size)+uint64(protocol))
}

// checksum is that of RFC 1071.
func checksum(b []byte, sum uint64) uint16 {
	sum = add(b, sum)
	for sum>>16 != 0 {
		sum = sum&0xffff + sum>>16
	}
	return ^uint16(sum)
}

// add adds b in words of 16 bits, four at a time: the carries of a sum of longer
// words are those of the shorter ones.
func add(b []byte, sum uint64) uint64 {
	sum = sum>>32 + sum&0xffffffff
	var wide, carry uint64
	for len(b) >= 8 {
		wide, carry = bits.Add64(wide, binary.BigEndian.Uint64(b), carry)
		b = b[8:]
	}
	sum += wide>>32 + wide&0xffffffff + carry
	for len(b) >= 2 {
		sum += uint64(binary.BigEndian.Uint16(b))
		b = b[2:]
	}
	if len(b) == 1 {
		sum += uint64(b[0]) << 8
	}
	return sum
}
