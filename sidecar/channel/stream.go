package channel

import (
	"encoding/binary"
	"time"
)

// A StreamFlow is one TCP stream of an app. It is safe for concurrent use.
type StreamFlow struct {
	party
	f  flow
	in [2]deframer // up, down
}

// Data takes the facts of one write: up is from the app to the target. p is
// borrowed until Data returns.
func (s *StreamFlow) Data(up bool, p []byte, now time.Time) {
	if len(p) == 0 {
		return
	}
	t := s.w.at(now)
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return
	}
	s.write(&s.f, up, len(p), t)
	d := &s.in[0]
	if !up {
		d = &s.in[1]
	}
	if d.framing != unframed {
		d.feed(s, up, p, t)
	}
}

// Close ends the flow at once.
func (s *StreamFlow) Close(time.Time) { s.close("its stream was closed") }

// A framing is how messages lie in a stream.
type framing uint8

const (
	unsure   framing = iota
	turnTCP          // STUN and ChannelData one after the other (RFC 8656 §2.1, §12.5)
	rfc4571          // 16 bits of length before each packet
	unframed         // neither
)

// What of a message is looked at, in bytes: enough for the attributes of a
// Refresh, and for the header of RTP inside a Send indication.
const lookAt = 128

// A deframer finds the messages in one direction of a stream, without keeping
// more of them than their beginnings.
type deframer struct {
	framing framing
	skip    int           // left of a message that has been looked at
	n       int           // bytes in buf
	buf     *[lookAt]byte // a beginning that is not complete yet
}

// firstBytes is what it takes to know the framing.
const firstBytes = 2 + 8

// framingOf decides by a stream's first bytes.
func framingOf(p []byte) framing {
	cookie := func(p []byte) bool { return p[0] < 4 && binary.BigEndian.Uint32(p[4:]) == stunCookie }
	l := int(binary.BigEndian.Uint16(p))
	switch q := p[2:]; {
	case cookie(p):
		return turnTCP
	case l >= stunHeader && cookie(q),
		l > dtlsHeader && q[0] == dtlsHandshake && q[1] == 0xfe,
		l >= rtcpHeader+4 && q[0]>>6 == 2:
		return rfc4571
	}
	return unframed
}

// size returns the length of the frame that begins at p, its header included,
// and where in it the packet begins; ok is false when this can be no frame.
func (fr framing) size(p []byte) (total, at int, ok bool) {
	l := int(binary.BigEndian.Uint16(p))
	if fr == rfc4571 {
		return 2 + l, 2, true
	}
	l = int(binary.BigEndian.Uint16(p[2:]))
	switch {
	case p[0] < 4:
		return stunHeader + l, 0, l%4 == 0
	case p[0] >= 64 && p[0] < 80:
		return channelHeader + (l+3)&^3, 0, true
	}
	return 0, 0, false
}

// feed takes the next bytes and hands what begins in them to the rules.
func (d *deframer) feed(s *StreamFlow, up bool, p []byte, t int64) {
	for len(p) > 0 {
		if d.skip > 0 {
			k := min(d.skip, len(p))
			d.skip -= k
			p = p[k:]
			continue
		}
		// The usual case: a whole message lies in p.
		if d.n == 0 && d.framing != unsure && len(p) >= channelHeader {
			total, at, ok := d.framing.size(p)
			if !ok {
				d.framing, d.buf = unframed, nil
				return
			}
			if len(p) >= total {
				s.message(up, p[at:total], total-at, t)
				p = p[total:]
				continue
			}
		}
		if d.buf == nil {
			d.buf = new([lookAt]byte)
		}
		want := 2
		switch d.framing {
		case unsure:
			want = firstBytes
		case turnTCP:
			want = channelHeader
		}
		total, at := 0, 0
		if d.framing != unsure && d.n >= want {
			var ok bool
			if total, at, ok = d.framing.size(d.buf[:]); !ok {
				d.framing, d.buf = unframed, nil
				return
			}
			want = min(total, lookAt)
		}
		k := copy(d.buf[d.n:max(want, d.n)], p)
		d.n += k
		p = p[k:]
		switch {
		case d.n < want:
		case d.framing == unsure:
			if d.framing = framingOf(d.buf[:]); d.framing == unframed {
				d.buf = nil
				return
			}
			if d.replay(s, up, t); d.framing == unframed {
				return
			}
		case total > 0:
			s.message(up, d.buf[at:max(at, d.n)], total-at, t)
			d.skip, d.n = total-d.n, 0
		case d.framing == rfc4571 && binary.BigEndian.Uint16(d.buf[:]) == 0:
			d.n = 0 // an empty frame keeps the connection alive
		}
	}
}

// replay takes up the first bytes again once their framing is known. A frame
// may be shorter than they are.
func (d *deframer) replay(s *StreamFlow, up bool, t int64) {
	first := *d.buf
	n := d.n
	d.n = 0
	d.feed(s, up, first[:n], t)
}

// message takes one framed message.
func (s *StreamFlow) message(up bool, p []byte, n int, t int64) {
	if len(p) > 0 {
		s.datagram(&s.f, up, p, n, t)
	}
}
