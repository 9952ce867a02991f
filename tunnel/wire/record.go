package wire

import (
	"encoding/binary"
	"errors"
	"net/netip"

	"culvert/tunnel"
)

// A record is what every way carries: one datagram of an association, or a
// notice about contexts and addresses.
//
//	 0                   1                   2                   3
//	 0 1 2 3 4 5 6 7 8 9 0 1 2 3 4 5 6 7 8 9 0 1 2 3 4 5 6 7 8 9 0 1
//	+-+-----------------------------+-------------------------------+
//	|F|        context (15)         |          number (16)          |
//	+-+-----------------------------+-------------------------------+
//
// F=0, context > 0: the payload follows.
//
// F=1: the sender has no acknowledged context for this association and address:
//
//	+---------------------------------------------------------------+
//	|                       association (32)                        |
//	+---------------+-----------------------------------------------+
//	|   flags (8)   |  address ...                                  |
//	+---------------+-----------------------------------------------+
//
// and then the payload. A context > 0 is proposed for later records.
//
// F=0, context = 0: a notice; its kind stands in place of number.
const (
	shortHeader = 4
	fullFlag    = 1 << 15
	// MaxContext is the highest context.
	MaxContext = 1<<15 - 1

	flagHeld = 1 << 0

	// ShortHeader is the length of a header with an acknowledged context.
	ShortHeader = shortHeader
)

// Address types. An address is its type, the address, and the port (16).
const (
	addrNone = 0 // nothing follows, no port
	addrName = 3 // length (8), name
	addr4    = 4 // 4 bytes
	addr6    = 6 // 16 bytes
)

// Notice kinds.
const (
	noticeNone        = iota
	noticeAck         // context (16): it is known here, the short header suffices
	noticeUnknown     // context (16): it is not known here, send the full header again
	noticeUnreachable // association (32), code length (8), code, address
	noticeReport      // see Report
	noticeProbe       // see Probe
	noticeAnswer      // see Answer
	noticeFragment    // see Fragment
	noticeReset       // see Reset
)

// ErrMalformed says that a record can not be read.
var ErrMalformed = errors.New("malformed record")

// Header is what stands before a datagram's payload.
type Header struct {
	Context uint16
	Number  uint16

	Full        bool // the fields below are present
	Held        bool
	Association uint32
	Target      tunnel.Target
}

// Append writes a header; the payload is appended behind it.
func (h *Header) Append(b []byte) []byte {
	c := h.Context
	if h.Full {
		c |= fullFlag
	}
	b = binary.BigEndian.AppendUint16(b, c)
	b = binary.BigEndian.AppendUint16(b, h.Number)
	if !h.Full {
		return b
	}
	b = binary.BigEndian.AppendUint32(b, h.Association)
	var flags byte
	if h.Held {
		flags |= flagHeld
	}
	return appendTarget(append(b, flags), h.Target)
}

// Append writes a notice.
func (n *Notice) Append(b []byte) []byte {
	b = append(b, 0, 0, 0)
	switch {
	case n.Ack != 0:
		return binary.BigEndian.AppendUint16(append(b, noticeAck), n.Ack)
	case n.Unknown != 0:
		return binary.BigEndian.AppendUint16(append(b, noticeUnknown), n.Unknown)
	}
	b = binary.BigEndian.AppendUint32(append(b, noticeUnreachable), n.Association)
	code := n.Code[:min(len(n.Code), 255)]
	b = append(append(b, byte(len(code))), code...)
	return appendTarget(b, tunnel.TargetOf(n.Address))
}

func appendTarget(b []byte, t tunnel.Target) []byte {
	switch {
	case t.Addr.Is4():
		a := t.Addr.As4()
		b = append(append(b, addr4), a[:]...)
	case t.Addr.IsValid():
		a := t.Addr.As16()
		b = append(append(b, addr6), a[:]...)
	case t.Host == "":
		return append(b, addrNone)
	default:
		name := t.Host[:min(len(t.Host), 255)]
		b = append(append(b, addrName, byte(len(name))), name...)
	}
	return binary.BigEndian.AppendUint16(b, t.Port)
}

// readTarget reads an address and returns what follows it.
func readTarget(p []byte) (tunnel.Target, []byte, error) {
	var t tunnel.Target
	if len(p) < 1 {
		return t, nil, ErrMalformed
	}
	kind, p := p[0], p[1:]
	n := 0
	switch kind {
	case addrNone:
		return t, p, nil
	case addr4:
		n = 4
	case addr6:
		n = 16
	case addrName:
		if len(p) < 1 || p[0] == 0 {
			return t, nil, ErrMalformed
		}
		n, p = int(p[0]), p[1:]
	default:
		return t, nil, ErrMalformed
	}
	if len(p) < n+2 {
		return t, nil, ErrMalformed
	}
	if kind == addrName {
		t.Host = string(p[:n])
	} else {
		t.Addr, _ = netip.AddrFromSlice(p[:n])
	}
	t.Port = binary.BigEndian.Uint16(p[n:])
	return t, p[n+2:], nil
}

// ParseRecord reads a record. Where isNotice is false the header and payload
// count; payload is a part of p. Short headers are read without allocation.
func ParseRecord(p []byte) (h Header, payload []byte, n Notice, isNotice bool, err error) {
	if len(p) < shortHeader {
		return h, nil, n, false, ErrMalformed
	}
	c := binary.BigEndian.Uint16(p)
	h = Header{Context: c &^ fullFlag, Number: binary.BigEndian.Uint16(p[2:]), Full: c&fullFlag != 0}
	p = p[shortHeader:]
	switch {
	case h.Full:
		if len(p) < 5 {
			return h, nil, n, false, ErrMalformed
		}
		h.Association, h.Held = binary.BigEndian.Uint32(p), p[4]&flagHeld != 0
		h.Target, payload, err = readTarget(p[5:])
		if err == nil && h.Target == (tunnel.Target{}) {
			err = ErrMalformed
		}
		return h, payload, n, false, err
	case h.Context != 0:
		return h, p, n, false, nil
	}
	n, err = readNotice(h.Number, p)
	return h, nil, n, true, err
}

// IsNotice says whether a record is a notice, without reading it.
func IsNotice(p []byte) bool {
	return len(p) >= shortHeader && p[0] == 0 && p[1] == 0
}

// IsOwnProbe says whether a record is a probe of the way that it came by itself,
// for the size of its packets or for a new path: it says nothing of use.
func IsOwnProbe(p []byte) bool {
	return IsNotice(p) && len(p) >= MinProbe && binary.BigEndian.Uint16(p[2:]) == noticeProbe && readUse(p[shortHeader:]).N == 0
}

func readNotice(kind uint16, p []byte) (n Notice, err error) {
	switch kind {
	case noticeAck, noticeUnknown:
		if len(p) < 2 {
			return n, ErrMalformed
		}
		c := binary.BigEndian.Uint16(p)
		if c == 0 || c > MaxContext {
			return n, ErrMalformed
		}
		if kind == noticeAck {
			n.Ack = c
		} else {
			n.Unknown = c
		}
		return n, nil
	case noticeUnreachable:
		if len(p) < 5 || len(p) < 5+int(p[4]) {
			return n, ErrMalformed
		}
		n.Unreachable, n.Association = true, binary.BigEndian.Uint32(p)
		n.Code = tunnel.Code(printable(string(p[5:5+int(p[4])]), 40))
		t, _, err := readTarget(p[5+int(p[4]):])
		if t.Addr.IsValid() { // a name says nothing here
			n.Address = t.AddrPort()
		}
		return n, err
	case noticeReport:
		if len(p) < sizeReport {
			return n, ErrMalformed
		}
		flags := p[sizeUse]
		r := &Report{Use: readUse(p), Live: flags&flagLive != 0, Often: flags&flagOften != 0, Strained: flags&flagStrained != 0}
		p = p[sizeUse+1:]
		r.Time, r.Echo, r.Sent = binary.BigEndian.Uint32(p), binary.BigEndian.Uint32(p[4:]), binary.BigEndian.Uint32(p[8:])
		r.Lost, r.Rate, r.Delay = binary.BigEndian.Uint16(p[12:]), binary.BigEndian.Uint32(p[14:]), binary.BigEndian.Uint16(p[18:])
		r.Seen, r.Held = binary.BigEndian.Uint32(p[20:]), binary.BigEndian.Uint32(p[24:])
		n.Report = r
	case noticeProbe:
		if len(p) < MinProbe-shortHeader {
			return n, ErrMalformed
		}
		n.Probe = &Probe{
			Use: readUse(p), Nonce: binary.BigEndian.Uint64(p[sizeUse:]), Size: shortHeader + len(p),
			Full: len(p) > MinProbe-shortHeader && p[MinProbe-shortHeader]&flagFull != 0,
		}
	case noticeAnswer:
		if len(p) < sizeAnswer {
			return n, ErrMalformed
		}
		n.Answer = &Answer{Nonce: binary.BigEndian.Uint64(p), Size: binary.BigEndian.Uint16(p[8:])}
	case noticeFragment:
		if len(p) <= FragmentHeader-shortHeader || p[3] < 2 || p[2] >= p[3] {
			return n, ErrMalformed
		}
		n.Fragment = Fragment{ID: binary.BigEndian.Uint16(p), Index: p[2], Count: p[3], Piece: p[4:]}
	case noticeReset:
		if len(p) < sizeReset {
			return n, ErrMalformed
		}
		n.Reset = &Reset{Epoch: binary.BigEndian.Uint32(p), Token: [16]byte(p[4:])}
	}
	return n, nil // a kind of a newer minor version: ignored
}
