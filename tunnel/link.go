package tunnel

import (
	"context"
	"fmt"
	"net/netip"
	"time"
)

// A Mode says which carriers may be used.
type Mode string

// The modes.
const (
	ModeAuto Mode = "auto" // QUIC, and TLS over TCP where that is better or all that works
	ModeUDP  Mode = "udp"  // QUIC only
	ModeTCP  Mode = "tcp"  // TLS over TCP only
)

// ParseMode reads a mode; "" is auto.
func ParseMode(s string) (Mode, error) {
	switch m := Mode(s); m {
	case "":
		return ModeAuto, nil
	case ModeAuto, ModeUDP, ModeTCP:
		return m, nil
	}
	return "", Errorf(ConfigInvalid, "%q is not a mode; use auto, udp or tcp", s)
}

// A Link is the near end of the tunnel as the switch sees it: something that
// can be run, and that opens traffic while it runs.
type Link interface {
	Opener
	// Run connects and stays connected until ctx ends (it then returns nil
	// after telling the far end) or until there is no point in going on: a
	// refusal that repeating can not mend, or 20 minutes since a session was
	// lost. The first session is sought for as long as ctx lasts. Each change
	// of state is given to report, in order, on Run's own goroutine.
	// OpenStream and OpenPackets fail with CloudUnreachable while there is no
	// session. Run may be called again after it has returned.
	Run(ctx context.Context, mode Mode, report func(LinkState)) error
	// Stats returns counters and live figures.
	Stats() LinkStats
}

// A Phase is where a link stands.
type Phase string

// The phases of a link.
const (
	LinkConnecting Phase = "connecting" // no session; trying
	LinkUp         Phase = "up"         // a session with a carrier
)

// LinkState is one state of a link.
type LinkState struct {
	Phase   Phase          `json:"phase"`
	Carrier string         `json:"carrier,omitempty"` // "quic", "tls"
	Way     string         `json:"way,omitempty"`     // how datagrams go: "sealed", "quic-datagram", "lanes"
	WayWhy  string         `json:"way_why,omitempty"` // why datagrams go this way: one sentence
	Streams string         `json:"streams,omitempty"` // what carries new TCP streams: "quic", "tls"
	Why     string         `json:"why,omitempty"`     // why this carrier and way, or why there is none: one sentence
	Code    Code           `json:"code,omitempty"`    // the failure's code while connecting after one
	Refused bool           `json:"refused,omitempty"` // the failure was a refusal, not an absence: somebody has to do something
	Session string         `json:"session,omitempty"`
	Remote  netip.AddrPort `json:"remote,omitzero"` // the cloud proxy in use, or the proxy on the way to it
	Info    ProxyInfo      `json:"proxy_information,omitzero"`
	Change  *Change        `json:"-"`                 // what has just happened; nil: only the state is told
	Took    time.Duration  `json:"took_ns,omitempty"` // from the beginning of the attempt that succeeded to up
}

// ProxyInfo is the proxy information that the cloud proxy gave.
type ProxyInfo struct {
	Proxies []ProxyAddr `json:"cloud_proxies,omitempty"`
}

// ProxyAddr is one cloud proxy that serves this sidecar.
type ProxyAddr struct {
	Address string    `json:"address"` // HOST:PORT
	Region  string    `json:"region,omitempty"`
	Expires time.Time `json:"expires,omitzero"`
}

// LinkStats are a link's counters since the process began, and live figures.
type LinkStats struct {
	Associations    int               `json:"associations"`
	Streams         int               `json:"streams"`
	DatagramsUp     uint64            `json:"datagrams_up"`
	DatagramsDown   uint64            `json:"datagrams_down"`
	DatagramBytesUp uint64            `json:"datagram_bytes_up"`
	DatagramBytesDn uint64            `json:"datagram_bytes_down"`
	StreamBytesUp   uint64            `json:"stream_bytes_up"`
	StreamBytesDown uint64            `json:"stream_bytes_down"`
	Dropped         map[string]uint64 `json:"dropped,omitempty"` // datagrams, by reason
	Connects        uint64            `json:"connects"`          // sessions opened
	RTT             time.Duration     `json:"rtt_ns,omitempty"`
}

// String returns a line for logs.
func (s LinkState) String() string {
	if s.Phase == LinkUp {
		return fmt.Sprintf("up over %s (datagrams: %s, streams: %s) to %s: %s", s.Carrier, s.Way, s.Streams, s.Remote, s.Why)
	}
	return fmt.Sprintf("%s: %s", s.Phase, s.Why)
}
