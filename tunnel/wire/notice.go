package wire

import (
	"encoding/binary"
	"net/netip"
	"time"

	"culvert/tunnel"
)

// A Way names one way for datagrams on the wire.
type Way uint8

// The ways, best first.
const (
	NoWay       Way = iota
	WaySealed       // sealed packets on the QUIC carrier's UDP flow
	WayDatagram     // QUIC DATAGRAM frames
	WayLanes        // lanes
	WaysEnd         // not a way
)

var wayWords = [WaysEnd]string{"none", "sealed", "quic-datagram", "lanes"}

// String returns the way's word in status and metrics.
func (w Way) String() string {
	if w >= WaysEnd {
		return "unknown"
	}
	return wayWords[w]
}

// Use says how datagrams go, both ways. The sidecar decides; the cloud proxy
// obeys the highest N. Also is a second way that gets a copy of everything.
type Use struct {
	N         uint32 // counts from 1; 0: nothing is said
	Way, Also Way
}

// A Report says what one end sees of one way. It travels on the way that it is
// about. Times are the sender's clock in microseconds modulo 2³², from any
// origin.
type Report struct {
	Use  Use  // from the sidecar
	Live bool // a channel is live; from the sidecar
	// Often asks the peer to report every 50 ms instead of every 250.
	Often bool
	// Strained: this way carries less than its sender has to send by it.
	Strained bool

	Time uint32 // when it was sent
	// Echo is the Time of the last report that came on this way plus how long
	// ago that was, so that the peer's clock less Echo is the round trip; 0: none.
	Echo uint32
	Sent uint32 // records sent on this way so far, modulo 2³²; this one counts

	// What came on this way between the last two reports of the peer.
	Lost  uint16 // of 65,535 records
	Rate  uint32 // kbit/s of records
	Delay uint16 // the least delay of a report since the last one we sent, above the shortest of late, in DelayUnit

	// Seen is the number of a packet that has come on a way that numbers its
	// packets, and Held how long before Time, in microseconds: its sender knows
	// when it left, and so how long it took.
	Seen, Held uint32
}

const (
	// DelayUnit is the unit of Report.Delay.
	DelayUnit = 100 * time.Microsecond
	// NoDelay says that no delay has been measured since the last report.
	NoDelay = 1<<16 - 1
	// NothingSeen in Report.Held says that no such packet has come.
	NothingSeen = 1<<32 - 1
)

// A Probe asks for an Answer on the way that it came by. Size is how long the
// record is, padding included.
type Probe struct {
	Use   Use // from the sidecar
	Nonce uint64
	Size  int
	// Full asks for an answer that is padded to Size too. It stands in the first
	// byte of the padding, so Size is more than MinProbe.
	Full bool
}

// An Answer says that a probe of this size has arrived.
type Answer struct {
	Nonce uint64
	Size  uint16
}

// A Fragment is one piece of a record that was too long for a way. The pieces
// of one record have the same ID and Count; all but the last are equally long.
type Fragment struct {
	ID    uint16
	Index uint8 // from 0
	Count uint8 // 2 or more
	Piece []byte
}

// A Reset tells the stateless reset token that goes with a connection ID of a
// sealed way (RFC 9000 §10.3).
type Reset struct {
	Epoch uint32
	Token [16]byte
}

// Sizes of notices in bytes.
const (
	FragmentHeader = shortHeader + 4                     // what a fragment adds to its piece
	MinProbe       = shortHeader + sizeUse + 8           // a probe without padding
	sizeUse        = 4 + 1 + 1                           // n, way, also
	sizeReport     = sizeUse + 1 + 3*4 + 2 + 4 + 2 + 2*4 // use, flags, time, echo, sent, lost, rate, delay, seen, held
	sizeAnswer     = 8 + 2
	sizeReset      = 4 + 16

	flagLive     = 1 << 0
	flagOften    = 1 << 1
	flagStrained = 1 << 2

	flagFull = 1 << 0 // of a probe
)

func appendUse(b []byte, u Use) []byte {
	return append(binary.BigEndian.AppendUint32(b, u.N), byte(u.Way), byte(u.Also))
}

func readUse(p []byte) Use {
	return Use{binary.BigEndian.Uint32(p), Way(p[4]), Way(p[5])}
}

func notice(b []byte, kind uint16) []byte {
	return binary.BigEndian.AppendUint16(append(b, 0, 0), kind)
}

// Append writes a report.
func (r *Report) Append(b []byte) []byte {
	var flags byte
	if r.Live {
		flags |= flagLive
	}
	if r.Often {
		flags |= flagOften
	}
	if r.Strained {
		flags |= flagStrained
	}
	b = append(appendUse(notice(b, noticeReport), r.Use), flags)
	for _, v := range []uint32{r.Time, r.Echo, r.Sent} {
		b = binary.BigEndian.AppendUint32(b, v)
	}
	b = binary.BigEndian.AppendUint16(b, r.Lost)
	b = binary.BigEndian.AppendUint32(b, r.Rate)
	b = binary.BigEndian.AppendUint16(b, r.Delay)
	return binary.BigEndian.AppendUint32(binary.BigEndian.AppendUint32(b, r.Seen), r.Held)
}

// Append writes a probe, padded to Size.
func (r *Probe) Append(b []byte) []byte {
	b = binary.BigEndian.AppendUint64(appendUse(notice(b, noticeProbe), r.Use), r.Nonce)
	padding := make([]byte, max(0, r.Size-MinProbe))
	if r.Full && len(padding) > 0 {
		padding[0] = flagFull
	}
	return append(b, padding...)
}

// Append writes an answer.
func (r *Answer) Append(b []byte) []byte {
	return binary.BigEndian.AppendUint16(binary.BigEndian.AppendUint64(notice(b, noticeAnswer), r.Nonce), r.Size)
}

// Append writes a fragment.
func (r *Fragment) Append(b []byte) []byte {
	b = binary.BigEndian.AppendUint16(notice(b, noticeFragment), r.ID)
	return append(append(b, r.Index, r.Count), r.Piece...)
}

// Append writes a reset token.
func (r *Reset) Append(b []byte) []byte {
	return append(binary.BigEndian.AppendUint32(notice(b, noticeReset), r.Epoch), r.Token[:]...)
}

// Notice is a record that carries no datagram. One of its parts is set; none:
// it is of a kind that a newer minor version knows.
type Notice struct {
	Ack, Unknown uint16 // a context; 0: not this kind
	Unreachable  bool
	Association  uint32
	Code         tunnel.Code
	Address      netip.AddrPort // invalid: not known

	Report   *Report
	Probe    *Probe
	Answer   *Answer
	Reset    *Reset
	Fragment Fragment // its Piece is a part of the record; Count 0: not this kind
}
