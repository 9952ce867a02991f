package capture

import (
	"log/slog"
	"net/netip"
	"time"

	"culvert/tunnel"
)

// DefaultPort is where captured traffic goes, on 127.0.0.1 and ::1, TCP and UDP.
const DefaultPort = 1443

const (
	defaultIdle = 2 * time.Minute
	defaultMost = 4096
	// newSources is how many new local UDP sockets are taken in a second, with a
	// burst of twice as many: half of what a session may open, so that a flood of
	// them leaves room for others.
	newSources = 500
)

// Config is what a Capture is made of.
type Config struct {
	// Sockets are Listen's. The Capture owns them from New's success on.
	Sockets *Sockets
	// Next opens what apps ask for. Its Peer has the app's socket in Addr.
	Next tunnel.Opener
	// DNS is where all captured DNS goes, UDP and TCP, instead of the server
	// that the app has asked; the answer comes from the one that it asked.
	// Invalid: nothing is redirected.
	DNS netip.AddrPort
	// Idle is how long a UDP socket may send and receive nothing until its
	// association ends; 0 is 2 minutes.
	Idle time.Duration
	// Socket says which UDP socket is bound to an app's address, which has sent to
	// server; 0: some socket. open is false when there is none, and the
	// association ends then. nil: only Idle ends it.
	Socket func(app, server netip.AddrPort) (socket uint32, open bool)
	// MaxSources and MaxStreams bound associations and connections; 0 is 4096.
	MaxSources, MaxStreams int
	// MaxAge is how long an app's datagram may wait in our socket until it is
	// dropped, as when this process stood still. 0: for ever.
	MaxAge time.Duration
	// Log may be nil.
	Log *slog.Logger
}

// Stats are counters since the Capture was made, and live figures.
type Stats struct {
	Port         uint16            `json:"port"`                // on 127.0.0.1 and ::1
	DNS          string            `json:"dns,omitempty"`       // where captured DNS goes, where that is chosen
	Relays       int               `json:"open_associations"`   // local UDP sockets that are captured now
	Open         int               `json:"open_streams"`        // TCP connections that are captured now
	Associations uint64            `json:"associations"`        // UDP sockets since the start
	Streams      uint64            `json:"streams"`             // TCP connections since the start
	Refused      map[string]uint64 `json:"refused,omitempty"`   // associations and connections, by code
	Dropped      map[string]uint64 `json:"dropped,omitempty"`   // datagrams, by reason
	Evicted      uint64            `json:"evicted"`             // associations that made room for others
	Unreachable  uint64            `json:"unreachable"`         // ICMP errors handed to apps
	Up           uint64            `json:"datagrams_from_apps"` // passed on
	Down         uint64            `json:"datagrams_to_apps"`   // handed to apps
}

// A drop is a reason for dropping a datagram.
type drop int

const (
	dropNotCaptured drop = iota
	dropOpening
	dropTooLarge
	dropPolicy
	dropRefused
	dropFamily
	dropSocketFull
	dropSocketError
	dropKinds
)

var dropNames = [dropKinds]string{
	"not_captured",      // came to the port itself
	"opening",           // its association is being opened by another datagram
	"too_large",         // can not fit
	"policy_denied",     // the destination is not allowed
	"refused",           // the path refused it for another reason
	"wrong_family",      // IPv6 came back for an IPv4 socket, or the other way round
	"app_socket_full",   // no room to hand it to the app
	"app_socket_failed", // the kernel did not take what was for the app
}

// dropLate is the reason for what had waited for longer than Config.MaxAge.
const dropLate = "late"

// DropReasons returns the words under which a Capture counts dropped datagrams.
func DropReasons() []string { return append([]string{dropLate}, dropNames[:]...) }
