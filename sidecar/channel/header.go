package channel

import (
	"encoding/binary"
	"slices"
)

// A kind is what a datagram's header says it is. It is a description, not
// evidence: random bytes have a kind too.
type kind uint8

const (
	opaque kind = iota
	stun
	dtls
	rtp
	rtcp
	channelData // TURN, RFC 8656 §12.4; means nothing before an Allocate
)

// Header lengths in bytes.
const (
	stunHeader    = 20
	dtlsHeader    = 13
	rtpHeader     = 12
	rtcpHeader    = 4
	channelHeader = 4
)

// kindOf classifies by the first byte (RFC 7983 §7), then by what the header
// must also hold. p may be cut; n is the datagram's whole length.
func kindOf(p []byte, n int) kind {
	if len(p) < channelHeader {
		return opaque
	}
	switch b := p[0]; {
	case b < 4:
		if len(p) >= stunHeader && binary.BigEndian.Uint32(p[4:]) == stunCookie {
			if l := int(binary.BigEndian.Uint16(p[2:])); l%4 == 0 && l == n-stunHeader {
				return stun
			}
		}
	case b >= 20 && b < 64:
		if len(p) >= dtlsHeader && b <= dtlsLast && p[1] == 0xfe && (p[2] == 0xff || p[2] == 0xfd) {
			if l := int(binary.BigEndian.Uint16(p[11:])); l > 0 && l <= n-dtlsHeader {
				return dtls
			}
		}
	case b >= 64 && b < 80:
		if int(binary.BigEndian.Uint16(p[2:])) <= n-channelHeader {
			return channelData
		}
	case b >= 128 && b < 192:
		if p[1] >= 192 && p[1] < 224 { // RFC 5761 §4
			if n >= 8 && 4*(int(binary.BigEndian.Uint16(p[2:]))+1) <= n {
				return rtcp
			}
			return opaque
		}
		if len(p) < rtpHeader || n < rtpHeader+4*int(b&0x0f) {
			return opaque
		}
		if ext := rtpHeader + 4*int(b&0x0f); b&0x10 != 0 {
			// The extension's own length (RFC 3550 §5.3.1) must fit too.
			if n < ext+4 || len(p) >= ext+4 && n < ext+4+4*int(binary.BigEndian.Uint16(p[ext+2:])) {
				return opaque
			}
		}
		return rtp
	}
	return opaque
}

// STUN and TURN: the cookie, message types and attributes that are looked at.
const (
	stunCookie = 0x2112a442

	bindingRequest  = 0x0001
	bindingSuccess  = 0x0101
	allocateRequest = 0x0003
	allocateSuccess = 0x0103
	refreshRequest  = 0x0004
	sendIndication  = 0x0016
	dataIndication  = 0x0017

	attrLifetime = 0x000d
	attrData     = 0x0013
)

func stunType(p []byte) uint16 { return binary.BigEndian.Uint16(p) }

// stunAttr returns the first attribute of a kind, or what of it is there, and
// its whole length.
func stunAttr(p []byte, want uint16) (value []byte, n int, ok bool) {
	for p = p[stunHeader:]; len(p) >= 4; {
		n := int(binary.BigEndian.Uint16(p[2:]))
		if binary.BigEndian.Uint16(p) == want {
			return p[4:min(4+n, len(p))], n, true
		}
		p = p[min(4+(n+3)&^3, len(p)):]
	}
	return nil, 0, false
}

// DTLS content types (RFC 6347 §4.1, RFC 9147 §4).
const (
	dtlsAlert     = 21
	dtlsHandshake = 22
	dtlsLast      = 26
)

// rtcpBye appends the sources that a compound packet says goodbye for, and no
// more than fit. In SRTCP everything after the first eight bytes is encrypted,
// so what is found is a goodbye only when the source is known.
func rtcpBye(into []uint32, p []byte) []uint32 {
	for len(p) >= 8 && p[0]>>6 == 2 && p[1] >= 192 && p[1] < 224 {
		l := 4 * (int(binary.BigEndian.Uint16(p[2:])) + 1)
		if p[1] == 203 {
			q := p[rtcpHeader:min(l, len(p))]
			for i := 0; i < int(p[0]&0x1f) && len(q) >= 4 && len(into) < cap(into); i++ {
				into = append(into, binary.BigEndian.Uint32(q))
				q = q[4:]
			}
		}
		p = p[min(l, len(p)):]
	}
	return into
}

// quicVersions that open a flow in the wild: 1, 2, and negotiation.
var quicVersions = []uint32{1, 0x6b3343cf, 0}

// quicLong reports whether p begins as a QUIC long header (RFC 8999 §5.1) of a
// version that is in use.
func quicLong(p []byte) bool {
	if len(p) < 7 || p[0]&0xc0 != 0xc0 {
		return false
	}
	v := binary.BigEndian.Uint32(p[1:])
	known := slices.Contains(quicVersions, v) ||
		v>>8 == 0xff0000 || // drafts
		v&0x0f0f0f0f == 0x0a0a0a0a || // reserved, to exercise negotiation (RFC 9000 §15)
		v>>24 == 'Q' || v>>24 == 'T' // Google's own
	return known && p[5] <= 20
}
