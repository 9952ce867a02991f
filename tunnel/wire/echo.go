package wire

import (
	"encoding/binary"
	"net/netip"
	"time"

	"culvert/tunnel"
)

// Echo is the target of datagrams that the cloud proxy itself sends back
// (PROTOCOL.md 5.7). Its name can be nobody else's (RFC 6761 §6.4).
var Echo = tunnel.Target{Host: "echo.culvert.invalid", Port: 7}

// EchoFrom is where echoed datagrams come from: an address that stands for no
// host (RFC 7600 §3.1).
var EchoFrom = netip.AddrPortFrom(netip.AddrFrom4([4]byte{192, 0, 0, 8}), Echo.Port)

const (
	// EchoStampAt is where the echo writes its stamp: after what could be an RTP
	// header (RFC 3550 §5.1).
	EchoStampAt = 12
	// EchoMin is the shortest datagram that is echoed.
	EchoMin = EchoStampAt + 4 + 8
)

// EchoStamp is what the echo writes into each datagram, in the place of what was
// there.
//
//	+---------------+-------------------------------+
//	|  count (32)   |  time (64), microseconds      |
//	+---------------+-------------------------------+
type EchoStamp struct {
	Count uint32        // how many of the association have been echoed, this one included
	Time  time.Duration // of the echo's clock when it came, from any origin
}

// Put writes the stamp into a datagram of at least EchoMin bytes.
func (s EchoStamp) Put(p []byte) {
	binary.BigEndian.PutUint32(p[EchoStampAt:], s.Count)
	binary.BigEndian.PutUint64(p[EchoStampAt+4:], uint64(s.Time.Microseconds()))
}

// ReadEchoStamp reads the stamp of a datagram of at least EchoMin bytes.
func ReadEchoStamp(p []byte) EchoStamp {
	us := binary.BigEndian.Uint64(p[EchoStampAt+4:])
	return EchoStamp{binary.BigEndian.Uint32(p[EchoStampAt:]), time.Duration(us&(1<<50-1)) * time.Microsecond}
}
