// Package packet is the test packet: RTP on the outside, so that a proxy that
// looks at media sees media, and inside it the times that the figures come from.
//
//	 0              RTP header (RFC 3550): version 2, payload type, sequence, timestamp, SSRC
//	12  run         which run of the load program sent it
//	16  flow        which flow of that run
//	18  flags       1: it counts (warm-up packets do not)
//	20  sequence    in full, from 0
//	24  sent        when it left, ns since 1970
//	32  turned      when the far end sent it back, ns since 1970
//	40              padding
//
// All numbers are big-endian. It promises nothing about two machines: the
// one-way delays are differences of one machine's clock.
package packet

import (
	"encoding/binary"
	"time"
)

// Min is the least size of a packet in bytes.
const Min = 40

// Payload types. 111 is what browsers use for Opus, 96 for VP8.
const (
	Audio = 111
	Video = 96
)

// Packet is what one carries.
type Packet struct {
	Run      uint32
	Flow     uint16
	Counts   bool
	Sequence uint32
	Sent     time.Time
	Turned   time.Time // zero until the far end has sent it back
}

// Put writes p into b, which holds at least Min bytes.
func Put(b []byte, p Packet, payloadType byte) {
	b[0], b[1] = 2<<6, payloadType
	binary.BigEndian.PutUint16(b[2:], uint16(p.Sequence))
	binary.BigEndian.PutUint32(b[4:], p.Sequence*960)
	binary.BigEndian.PutUint32(b[8:], p.Run<<8^uint32(p.Flow))
	binary.BigEndian.PutUint32(b[12:], p.Run)
	binary.BigEndian.PutUint16(b[16:], p.Flow)
	var flags uint16
	if p.Counts {
		flags = 1
	}
	binary.BigEndian.PutUint16(b[18:], flags)
	binary.BigEndian.PutUint32(b[20:], p.Sequence)
	binary.BigEndian.PutUint64(b[24:], uint64(p.Sent.UnixNano()))
	binary.BigEndian.PutUint64(b[32:], 0)
}

// Turn stamps a packet at the far end.
func Turn(b []byte, now time.Time) {
	binary.BigEndian.PutUint64(b[32:], uint64(now.UnixNano()))
}

// Get reads a packet; false where b can't be one.
func Get(b []byte) (Packet, bool) {
	if len(b) < Min || b[0] != 2<<6 {
		return Packet{}, false
	}
	p := Packet{
		Run:      binary.BigEndian.Uint32(b[12:]),
		Flow:     binary.BigEndian.Uint16(b[16:]),
		Counts:   binary.BigEndian.Uint16(b[18:]) == 1,
		Sequence: binary.BigEndian.Uint32(b[20:]),
		Sent:     time.Unix(0, int64(binary.BigEndian.Uint64(b[24:]))),
	}
	if t := binary.BigEndian.Uint64(b[32:]); t != 0 {
		p.Turned = time.Unix(0, int64(t))
	}
	return p, true
}
