package bulk

import "encoding/binary"

// A framing is how messages lie in one direction of a stream.
type framing uint8

const (
	unsure   framing = iota // too few bytes yet
	turnTCP                 // STUN and ChannelData one after the other (RFC 8656 §2.1, §12.5)
	rfc4571                 // 16 bits of length before each packet of RTP, RTCP, DTLS or STUN
	unframed                // neither
)

// Header lengths in bytes, and what STUN begins with.
const (
	stunHeader    = 20
	channelHeader = 4
	dtlsHeader    = 13
	rtpHeader     = 12
	rtcpLeast     = 8
	stunCookie    = 0x2112a442

	// firstBytes is what it takes to know the framing. No first frame is shorter.
	firstBytes = 2 + rtcpLeast
)

// A deframer follows the frames in one direction of a stream. It keeps no more
// than the beginning of a header.
type deframer struct {
	framing framing
	n       uint8 // bytes in head
	head    [firstBytes]byte
	skip    int // bytes left of the frame under way; less than 128 KiB
}

// feed takes the next bytes.
func (d *deframer) feed(p []byte) {
	for len(p) > 0 && d.framing != unframed {
		if d.skip > 0 {
			k := min(d.skip, len(p))
			d.skip -= k
			p = p[k:]
			continue
		}
		k := copy(d.head[d.n:d.want()], p)
		d.n += uint8(k)
		p = p[k:]
		if int(d.n) < d.want() { // which may be more, now that the length is known
			continue
		}
		if d.framing == unsure {
			d.framing = framingOf(&d.head)
		}
		total, ok := d.size()
		if !ok {
			d.framing = unframed
			return
		}
		d.skip = total - int(d.n)
		d.n = 0
	}
}

// want is how much of a header it takes to go on, in bytes.
func (d *deframer) want() int {
	switch {
	case d.framing == unsure:
		return firstBytes
	case d.framing == turnTCP:
		return channelHeader
	case d.n < 2 || binary.BigEndian.Uint16(d.head[:]) == 0:
		return 2 // an empty frame keeps the connection alive
	}
	return 3 // the kind of packet is looked at too
}

// framingOf decides by a direction's first bytes.
func framingOf(p *[firstBytes]byte) framing {
	stun := func(p []byte) bool { return p[0] < 4 && binary.BigEndian.Uint32(p[4:]) == stunCookie }
	l := int(binary.BigEndian.Uint16(p[:]))
	switch q := p[2:]; {
	case stun(p[:]):
		return turnTCP
	case l >= stunHeader && stun(q),
		l > dtlsHeader && q[0] == 22 && q[1] == 0xfe,                  // a DTLS handshake
		l >= rtcpLeast && q[0]>>6 == 2 && q[1] >= 192 && q[1] < 224,   // RTCP (RFC 5761 §4)
		l >= rtpHeader && q[0]>>6 == 2 && (q[1] < 192 || q[1] >= 224): // RTP
		return rfc4571
	}
	return unframed
}

// size returns the length of the frame that begins with head, its header
// included; ok is false when this can be no frame.
func (d *deframer) size() (total int, ok bool) {
	switch d.framing {
	case turnTCP:
		l := int(binary.BigEndian.Uint16(d.head[2:]))
		switch b := d.head[0]; {
		case b < 4:
			return stunHeader + l, l%4 == 0
		case b >= 64 && b < 80:
			return channelHeader + (l+3)&^3, true
		}
	case rfc4571:
		l := int(binary.BigEndian.Uint16(d.head[:]))
		b := d.head[2] // RFC 7983 §7
		return 2 + l, l == 0 || b < 4 || b >= 16 && b < 80 || b>>6 == 2
	}
	return 0, false
}

// framed reports whether a stream with these directions carries framed media. A
// direction in which nothing has come yet does not contradict.
func framed(out, in *deframer) bool {
	switch {
	case out.framing == unframed || in.framing == unframed:
		return false
	case out.framing == unsure || in.framing == unsure:
		return out.framing != in.framing
	}
	return out.framing == in.framing
}
