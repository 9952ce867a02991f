package tunneltls

import (
	"encoding/binary"
	"time"

	"golang.org/x/time/rate"

	"culvert/tunnel"
)

// What a peer of this package sends in a second is far below these. yamux itself
// answers every ping, and bounds neither those nor what opens, closes and
// widens streams.
const (
	// A peer asks for a sign of life each KeepAlive at most.
	pingRate, pingBurst = 5, 50
	// A stream takes four frames without data: it is opened, acknowledged and
	// ended by each side. Windows are widened with each half that was read.
	frameRate, frameBurst = 20_000, 25_000
)

// The types of yamux frames.
const (
	yamuxData = 0
	yamuxPing = 2
)

// floodMeter counts the frames that come on a yamux connection by their headers.
// It is used by the one goroutine that reads.
type floodMeter struct {
	head  [yamuxHeader]byte
	have  int    // bytes of head
	skip  uint32 // bytes of data that follow
	pings *rate.Limiter
	other *rate.Limiter
}

func newFloodMeter() *floodMeter {
	return &floodMeter{pings: rate.NewLimiter(pingRate, pingBurst), other: rate.NewLimiter(frameRate, frameBurst)}
}

// read looks at what was read. It returns why the connection is to be ended.
func (m *floodMeter) read(p []byte) error {
	for len(p) > 0 {
		if m.skip > 0 {
			n := min(uint64(m.skip), uint64(len(p)))
			m.skip -= uint32(n)
			p = p[n:]
			continue
		}
		n := copy(m.head[m.have:], p)
		m.have += n
		p = p[n:]
		if m.have < yamuxHeader {
			return nil
		}
		m.have = 0
		if err := m.frame(); err != nil {
			return err
		}
	}
	return nil
}

func (m *floodMeter) frame() error {
	length := binary.BigEndian.Uint32(m.head[8:])
	switch kind := m.head[1]; {
	case kind == yamuxData:
		m.skip = length
		if length > 0 {
			return nil
		}
	case kind == yamuxPing && !m.pings.AllowN(time.Now(), 1):
		return tunnel.Errorf(tunnel.LimitExceeded, "the peer asks for signs of life more than %d times a second; nothing of ours does that", pingRate)
	}
	if !m.other.AllowN(time.Now(), 1) {
		return tunnel.Errorf(tunnel.LimitExceeded, "the peer opens, ends and widens streams more than %d times a second; nothing of ours does that", frameRate)
	}
	return nil
}
