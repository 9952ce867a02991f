package tunnelquic

import (
	"sync/atomic"
	"time"

	"culvert/tunnel"
)

const (
	// idleRate is how many packets a second a peer may send that bring nothing:
	// those beyond what the bytes which came and went account for. idleBurst is how
	// many at once. It is also as many as may be acknowledged after all has been
	// written: quic-go has 10,000 packets under way at most.
	idleRate, idleBurst = 4_000, 10_000
	// lookEvery is how often a listener looks at what its connections have received.
	lookEvery = 250 * time.Millisecond

	// What is read and written accounts for one packet, and one for each of so many
	// bytes. Small writes of a peer come in packets of their own, and are read
	// together when we are slow; what we write is acknowledged.
	bytesIn, bytesOut = 128, 512
	// What a datagram accounts for: quic-go keeps 128 for us and drops others unseen.
	datagramIn = 4
)

// errIdle is why a connection ends whose peer sends frames without end.
var errIdle = tunnel.Errorf(tunnel.LimitExceeded, "the peer sends QUIC packets that bring nothing, as PINGs do, more than %d times a second; nothing of ours does that", idleRate)

// An idleMeter tells packets that bring something from others. A peer may send
// PING, MAX_DATA, PATH_CHALLENGE and the like as often as it likes (RFC 9000
// §19), and each costs as much as data.
type idleMeter struct {
	due atomic.Int64 // packets accounted for

	// Used by the one goroutine that calls over.
	last time.Time
	seen int64 // of packets and of due
	paid int64
	left float64 // packets that may still bring nothing
}

func newIdleMeter(now time.Time) *idleMeter { return &idleMeter{last: now, left: idleBurst} }

func (m *idleMeter) read(n int)  { m.due.Add(1 + int64(n)/bytesIn) }
func (m *idleMeter) wrote(n int) { m.due.Add(1 + int64(n)/bytesOut) }
func (m *idleMeter) datagram()   { m.due.Add(datagramIn) }

// over reports whether too many of the packets that had been received brought
// nothing. Only authentic ones may be counted, and each once: anybody can send others.
func (m *idleMeter) over(packets int64, now time.Time) bool {
	due := m.due.Load()
	m.left += float64(due-m.paid) - float64(packets-m.seen) + idleRate*now.Sub(m.last).Seconds()
	m.left = min(m.left, idleBurst)
	m.seen, m.paid, m.last = packets, due, now
	return m.left < 0
}
