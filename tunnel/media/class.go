package media

import "encoding/binary"

// A kind is what the first bytes of a datagram say it is.
type kind uint8

const (
	opaque  kind = iota // none of the below, or not told apart
	stream              // RTP or SRTP
	control             // RTCP, SRTCP or STUN
)

// A head is what is read of a datagram. The fields but kind are RTP's.
type head struct {
	kind kind
	seq  uint16
	time uint32 // RTP timestamp
	ssrc uint32
}

const (
	stunCookie   = 0x2112A442 // RFC 8489 §5
	stunHeader   = 20
	rtpHeader    = 12
	rtcpHeader   = 8 // RTCP's with the sender's SSRC
	channelBytes = 4 // TURN ChannelData's header
)

// read looks at a datagram's first bytes: by RFC 7983 §7 the first says which
// protocol shares the socket, by RFC 5761 §4 the second tells RTCP from RTP.
// What must fit together (lengths, the cookie) is compared, since ciphertext
// begins with any byte.
func read(p []byte) head {
	if len(p) > channelBytes && p[0] >= 64 && p[0] < 80 {
		// ChannelData (RFC 8656 §12.4) carries one datagram; over UDP it may be padded.
		n := int(binary.BigEndian.Uint16(p[2:]))
		if rest := p[channelBytes:]; n <= len(rest) && len(rest) < n+4 {
			return plain(rest[:n])
		}
		return head{}
	}
	return plain(p)
}

// plain reads what is not wrapped.
func plain(p []byte) head {
	switch {
	case len(p) >= stunHeader && p[0] < 4 && binary.BigEndian.Uint32(p[4:]) == stunCookie:
		if n := int(binary.BigEndian.Uint16(p[2:])); n%4 == 0 && n == len(p)-stunHeader {
			return head{kind: control}
		}
	case len(p) >= rtcpHeader && p[0]>>6 == 2 && p[1] >= 192 && p[1] < 224:
		// The first packet of a compound; SRTCP's tail follows it.
		if n := 4 * (int(binary.BigEndian.Uint16(p[2:])) + 1); n >= rtcpHeader && n <= len(p) {
			return head{kind: control}
		}
	case len(p) >= rtpHeader && p[0]>>6 == 2:
		return head{
			kind: stream,
			seq:  binary.BigEndian.Uint16(p[2:]),
			time: binary.BigEndian.Uint32(p[4:]),
			ssrc: binary.BigEndian.Uint32(p[8:]),
		}
	}
	return head{}
}
