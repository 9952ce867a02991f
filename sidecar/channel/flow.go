package channel

import (
	"cmp"
	"encoding/binary"
	"math/bits"
	"net"
	"net/netip"
	"strconv"
	"time"
)

// Times inside the package are nanoseconds on the watcher's own clock, which
// stands still while the watcher is paused.
const (
	second = int64(time.Second)

	enterPackets = 20            // packets of one source ...
	enterSlots   = 6             // ... in as many slots
	slotLength   = second / 2    // so: 20 in 3 s
	byeKeep      = 5 * second    // what is left of a flow after a goodbye
	byeGrace     = second        // what still arrives this soon after one was under way
	maxSources   = 8             // RTP sources followed per flow
	sourceTrial  = second / 2    // by then a newcomer has sent a second packet, or is noise
	sourceDead   = 30 * second   // silent so long, a source counts as one that never was
	sourceIdle   = 2 * second    // then a newcomer may take its place
	maxDropout   = 3000          // RFC 3550 §A.1
	maxMisorder  = 100           // RFC 3550 §A.1
	opaqueBoth   = 10            // datagrams per second, each way
	opaqueOne    = 25            // datagrams per second, one way
	opaqueFor    = 5             // seconds
	rhythmWrites = 5             // per second, each way
	rhythmBytes  = 5_000_000 / 8 // per second, both ways together
	rhythmOf     = 12            // seconds
	rhythmNeed   = 10            // of them
	rhythmMask   = 1<<rhythmOf - 1
)

// Target is the other side of a flow: a name or a numeric address. It has the
// fields of tunnel.Target, so that one converts into the other.
type Target struct {
	Host string
	Addr netip.Addr
	Port uint16
}

// String returns "host:port" with nothing in it that a log or a terminal could
// take for more than text.
func (t Target) String() string {
	host := plain(t.Host)
	if host == "" {
		host = t.Addr.String()
	}
	return net.JoinHostPort(host, strconv.Itoa(int(t.Port)))
}

// A rule is the reason for which a flow counts.
type rule uint8

const (
	byNone    rule = iota
	byRTP          // 20 packets of one source in 3 s
	byConsent      // answered consent checks after DTLS
	byOpaque       // steady datagrams to a destination that the policy tags media
	byTURN         // TURN framing on TCP that carries data
	byRhythm       // a TCP stream with the rhythm of media
)

// A meter counts packets in the last three seconds and altogether.
type meter struct {
	first, last int64
	slot        int64 // the current slot: time / slotLength
	recent      [enterSlots]uint8
	count       uint32
}

func (m *meter) add(t int64) {
	slot := t / slotLength
	switch gone := slot - m.slot; {
	case m.count == 0:
		m.first, m.slot = t, slot
	case gone >= enterSlots || gone < 0: // below 0: the clock was put back
		m.recent, m.slot = [enterSlots]uint8{}, slot
	default:
		for ; gone > 0; gone-- {
			m.slot++
			m.recent[m.slot%enterSlots] = 0
		}
	}
	m.last = t
	m.count++
	if c := &m.recent[m.slot%enterSlots]; *c < 255 {
		*c++
	}
}

// enough reports whether the last three seconds held enough to enter.
func (m *meter) enough() bool {
	n := 0
	for _, c := range m.recent {
		n += int(c)
	}
	return n >= enterPackets
}

// A source is one RTP synchronisation source in one direction.
type source struct {
	ssrc  uint32
	high  uint16 // the highest sequence number
	up    bool
	inner bool // inside TURN
	gone  bool // has said goodbye
	meter
}

// advance notes a packet and reports whether the sequence went on.
func (s *source) advance(seq uint16, t int64) bool {
	switch d := int16(seq - s.high); {
	case d > 0 && d < maxDropout:
		s.high = seq
		s.add(t)
		return true
	case d <= 0 && d > -maxMisorder:
		return false // repeated or late: neither progress nor a fault
	}
	s.high, s.meter = seq, meter{}
	s.add(t)
	return false
}

// A flow is what goes between one socket and one remote address, or one stream.
type flow struct {
	remote Target
	alias  Target // the numeric address from which a name's answers come

	seen   bool // has had its first packet
	quic   bool // opened by a QUIC long header: never counts
	tagged bool // the policy tags the destination media
	turn   bool // an Allocate has succeeded
	dtls   bool // DTLS has been seen
	ice    bool // a connectivity check has been answered
	stream bool

	by      rule // why it counts; byNone: it does not
	since   int64
	kept    int64 // the last packet that kept it
	rtpAt   int64 // the last RTP packet that advanced
	consent int64 // the last answered check after DTLS
	bye     int64 // the goodbye, if one was said
	used    int64 // the last packet of any kind

	sources *[maxSources]source
	framed  meter // TURN data messages, on TCP

	// The current second and the run of good ones.
	sec                   int64
	up, down              uint32
	lastUp, lastDown      uint32
	bytes                 int
	runBoth, runUp, runDn uint8
	rhythm                uint16 // a bit for each of the last seconds
}

// A state is where a flow stands.
type state uint8

const (
	none state = iota
	quiet
	live
)

func (s state) String() string { return [...]string{"", "quiet", "live"}[s] }

// state returns where the flow stands at t, and why it ended if it just has.
func (f *flow) state(c *Config, t int64) (state, string) {
	switch {
	case f.by == byNone:
		return none, ""
	case f.bye != 0:
		if t-f.bye <= byeKeep {
			return live, ""
		}
		return none, "it said goodbye"
	case t-f.kept <= int64(c.Keep):
		return live, ""
	case f.rtpAt != 0 && !f.ice && !f.stream && t-f.rtpAt <= int64(c.QuietFor):
		return quiet, ""
	}
	return none, "no media for " + time.Duration(t-f.kept).Round(time.Second).String()
}

// end forgets why the flow counted; it may enter again.
func (f *flow) end() {
	f.by, f.since, f.kept, f.rtpAt, f.bye, f.consent = byNone, 0, 0, 0, 0, 0
	f.framed, f.rhythm, f.runBoth, f.runUp, f.runDn = meter{}, 0, 0, 0, 0
	if f.sources != nil {
		*f.sources = [maxSources]source{}
	}
}

// goodbye shortens what is left of the flow.
func (f *flow) goodbye(t int64) {
	if f.by != byNone && f.bye == 0 {
		f.bye = t
	}
}

// evidence notes that a packet speaks for the flow: it keeps one that counts,
// and lets one enter that does not yet.
func (p *party) evidence(f *flow, r rule, enter bool, t int64) {
	if f.by == byNone {
		if enter && !p.w.paused() {
			f.by, f.since, f.kept = r, t, t
			p.heat()
		}
		return
	}
	if f.bye != 0 {
		// Only media can show that the goodbye was not the flow's: a source of
		// several has left. Checks go on being answered for a while.
		if r != byRTP || t-f.bye <= byeGrace {
			return
		}
		f.bye = 0
	}
	f.kept = max(f.kept, t)
}

// datagram takes the facts of one datagram, or of one framed message on TCP.
// b may be cut, n is the whole length.
func (p *party) datagram(f *flow, up bool, b []byte, n int, t int64) {
	f.used = t
	if !f.seen {
		f.seen, f.quic = true, !f.stream && quicLong(b)
	}
	if f.quic {
		return
	}
	if f.by != byNone {
		if s, why := f.state(&p.w.cfg, t); s == none {
			f.end()
			p.cool(why)
		}
	}
	k := kindOf(b, n)
	if f.tagged && !f.stream && k != stun {
		p.opaque(f, up, t)
	}
	switch k {
	case channelData:
		if f.turn {
			l := int(binary.BigEndian.Uint16(b[2:]))
			p.carried(f, up, b[channelHeader:min(channelHeader+l, len(b))], l, t)
		}
	case stun:
		if m := stunType(b); m == sendIndication || m == dataIndication {
			if v, l, ok := stunAttr(b, attrData); ok && f.turn {
				p.carried(f, up, v, l, t)
			}
			return
		}
		p.stun(f, up, b, t)
	default:
		p.media(f, k, up, false, b, t)
	}
}

// carried takes what TURN carries. What is inside is not unwrapped again.
func (p *party) carried(f *flow, up bool, b []byte, n int, t int64) {
	if f.stream {
		f.framed.add(t)
		p.evidence(f, byTURN, f.framed.enough(), t)
	}
	if k := kindOf(b, n); k == stun {
		p.stun(f, up, b, t)
	} else {
		p.media(f, k, up, true, b, t)
	}
}

func (p *party) media(f *flow, k kind, up, inner bool, b []byte, t int64) {
	switch k {
	case dtls:
		f.dtls = true
		switch {
		case b[0] == dtlsAlert:
			f.goodbye(t)
		case b[0] == dtlsHandshake && f.bye != 0 && t-f.bye > byeGrace:
			f.bye = 0 // it begins anew
		}
	case rtp:
		s := f.source(binary.BigEndian.Uint32(b[8:]), up, t)
		if s == nil {
			return
		}
		if s.count == 0 {
			s.high, s.inner = binary.BigEndian.Uint16(b[2:]), inner
			s.add(t)
			return
		}
		if s.advance(binary.BigEndian.Uint16(b[2:]), t) && !s.gone {
			p.evidence(f, byRTP, f.by == byNone && s.enough(), t)
			if f.by != byNone {
				f.rtpAt = t
			}
		}
	case rtcp:
		var buf [4]uint32
		for _, ssrc := range rtcpBye(buf[:0], b) {
			if !f.left(ssrc, t) {
				// RTP and RTCP on a port each: the source is another flow's.
				p.w.byeElsewhere(p.owner.Addr, ssrc)
			}
		}
	}
}

// left notes that a source has said goodbye, and reports whether it was here.
func (f *flow) left(ssrc uint32, t int64) (here bool) {
	if f.sources == nil {
		return false
	}
	for i := range f.sources {
		if s := &f.sources[i]; s.count > 0 && s.ssrc == ssrc {
			s.gone, here = true, true
		}
	}
	if here {
		f.goodbye(t)
	}
	return here
}

// source returns a place for a source: its own, or that of one that never
// advanced or has fallen silent; nil: there is none now. Sources that advance
// are not pushed out by newcomers, and newcomers not by one another at once, so
// that neither many sources nor noise can hide a call.
func (f *flow) source(ssrc uint32, up bool, t int64) *source {
	if f.sources == nil {
		f.sources = new([maxSources]source)
	}
	var junk, idle *source
	for i := range f.sources {
		s := &f.sources[i]
		if s.count > 0 && s.ssrc == ssrc && s.up == up {
			return s
		}
		switch {
		case s.count == 0 || s.count == 1 && t-s.last > sourceTrial || t-s.last > sourceDead:
			if junk == nil || s.last < junk.last {
				junk = s
			}
		case t-s.last > sourceIdle:
			if idle == nil || s.last < idle.last {
				idle = s
			}
		}
	}
	free := cmp.Or(junk, idle)
	if free != nil {
		*free = source{ssrc: ssrc, up: up}
	}
	return free
}

// A transaction is a STUN request that waits for its answer.
type transaction struct {
	id     [12]byte
	method uint16
	up     bool
	flow   *flow
}

// stun follows requests and their answers. They are matched across the socket,
// since a request to a name is answered from an address.
func (p *party) stun(f *flow, up bool, b []byte, t int64) {
	switch m := stunType(b); m {
	case refreshRequest:
		if v, _, ok := stunAttr(b, attrLifetime); ok && len(v) == 4 && binary.BigEndian.Uint32(v) == 0 {
			f.goodbye(t)
		}
	case bindingRequest, allocateRequest:
		if p.asked == nil {
			p.asked = new([maxAsked]transaction)
		}
		q := &p.asked[p.nextAsked%maxAsked]
		p.nextAsked++
		*q = transaction{id: [12]byte(b[8:20]), method: m, up: up, flow: f}
	case bindingSuccess, allocateSuccess:
		if p.asked == nil {
			return
		}
		for i := range p.asked {
			q := &p.asked[i]
			if q.flow == nil || q.up == up || q.method != m&^0x0110 || q.id != [12]byte(b[8:20]) {
				continue
			}
			g := q.flow
			*q = transaction{}
			if m == allocateSuccess {
				f.turn, g.turn = true, true
				return
			}
			f.ice, g.ice = true, true
			if f.dtls || g.dtls {
				p.evidence(f, byConsent, true, t)
				f.consent = t
			}
			return
		}
	}
}

// opaque counts datagrams to a destination that the policy tags media.
func (p *party) opaque(f *flow, up bool, t int64) {
	if f.by == byOpaque {
		p.evidence(f, byOpaque, false, t)
	}
	if sec := t / second; sec != f.sec {
		run := func(r *uint8, ok bool) {
			switch {
			case !ok || sec != f.sec+1:
				*r = 0
			case *r < opaqueFor:
				*r++
			}
		}
		run(&f.runBoth, f.up >= opaqueBoth && f.down >= opaqueBoth)
		run(&f.runUp, f.up >= opaqueOne)
		run(&f.runDn, f.down >= opaqueOne)
		f.lastUp, f.lastDown = f.up, f.down
		f.sec, f.up, f.down = sec, 0, 0
		if f.by == byNone && max(f.runBoth, f.runUp, f.runDn) >= opaqueFor {
			p.evidence(f, byOpaque, true, t)
		}
	}
	if up {
		f.up++
	} else {
		f.down++
	}
}

// write takes the facts of one write on a stream.
func (p *party) write(f *flow, up bool, n int, t int64) {
	if f.by != byNone {
		if s, why := f.state(&p.w.cfg, t); s == none {
			f.end()
			p.cool(why)
		}
	}
	if sec := t / second; sec != f.sec {
		good := f.up >= rhythmWrites && f.down >= rhythmWrites && f.bytes < rhythmBytes
		f.rhythm <<= 1
		if good {
			f.rhythm |= 1
		}
		f.rhythm <<= min(uint64(sec-f.sec-1), 15)
		f.rhythm &= rhythmMask
		f.sec, f.up, f.down, f.bytes = sec, 0, 0, 0
		if good {
			p.evidence(f, byRhythm, bits.OnesCount16(f.rhythm) >= rhythmNeed, t)
		}
	}
	f.used = t
	f.bytes += n
	if up {
		f.up++
	} else {
		f.down++
	}
}
