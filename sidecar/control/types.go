package control

import (
	"context"
	"net/netip"
	"time"

	"culvert/sidecar/capture"
	"culvert/sidecar/check"
	"culvert/tunnel"
)

// Host is the Host header of every request.
const Host = "culvert"

// Status is what GET /v1/status answers.
type Status struct {
	Version      string            `json:"version,omitempty"`
	Uptime       time.Duration     `json:"uptime_ns"`
	Ready        bool              `json:"ready"` // the front listens and the first start has been decided, whichever way
	State        string            `json:"state"` // stopped, starting, running, stopping or failed
	Since        time.Time         `json:"since"`
	Mode         tunnel.Mode       `json:"mode"`
	Draining     bool              `json:"draining,omitempty"` // a stop waits for channels to end
	Code         tunnel.Code       `json:"code,omitempty"`     // of Cause
	Cause        string            `json:"cause,omitempty"`    // why it failed, or why there is no connection
	Listen       string            `json:"listen,omitempty"`   // where apps find the proxy
	Link         tunnel.LinkState  `json:"link"`
	Changes      []tunnel.Change   `json:"changes,omitempty"` // of the link, the last ones, oldest first
	Tunnel       tunnel.LinkStats  `json:"tunnel"`
	Front        any               `json:"front,omitempty"`   // the front's counters
	Capture      *capture.Stats    `json:"capture,omitempty"` // nil: this sidecar takes no captured traffic
	Streams      int               `json:"streams"`
	Associations int               `json:"associations"`
	Channels     []Channel         `json:"channels"`
	Dropped      map[string]uint64 `json:"dropped,omitempty"` // datagrams by reason, all parts together
	Losers       []Loser           `json:"losers,omitempty"`  // open associations that lost most to waiting, at most MaxLosers
}

// MaxLosers bounds Status.Losers.
const MaxLosers = 10

// Loser is an open association of which the sidecar has dropped something since
// the present session began.
type Loser struct {
	From    netip.AddrPort    `json:"from"` // the connection of the app that asked for it
	User    string            `json:"user,omitempty"`
	Dropped map[string]uint64 `json:"dropped"` // datagrams by reason
}

// Channel is an app that is in a channel.
type Channel struct {
	Name     string    `json:"name"`
	App      string    `json:"app,omitempty"`
	User     string    `json:"user,omitempty"`
	PID      int       `json:"pid,omitempty"`
	State    string    `json:"state"` // "live" or "quiet"
	Since    time.Time `json:"since"`
	Last     time.Time `json:"last"`
	Evidence []string  `json:"evidence"`
	Lease    bool      `json:"lease,omitempty"`
	Flows    int       `json:"flows"`
}

// Event is one change.
type Event struct {
	At     time.Time         `json:"at"`
	Kind   string            `json:"kind"`           // "switch", "link", "channel" or "change"
	Name   string            `json:"name,omitempty"` // the channel's, or what changed
	From   string            `json:"from,omitempty"`
	To     string            `json:"to,omitempty"`
	Code   tunnel.Code       `json:"code,omitempty"`
	Cause  string            `json:"cause,omitempty"`
	Link   *tunnel.LinkState `json:"link,omitempty"`
	Change *tunnel.Change    `json:"change,omitempty"` // with its time and what it has cost
}

// Done is the answer to a request that changes something.
type Done struct {
	State   string `json:"state"`
	Already bool   `json:"already,omitempty"` // it was so before
}

// ActiveError says which channels stand in the way. Its code is ChannelActive.
type ActiveError struct {
	Channels []Channel
	Err      error // with the code ChannelActive
}

// Error returns the sentence.
func (e *ActiveError) Error() string { return e.Err.Error() }

// Unwrap returns Err.
func (e *ActiveError) Unwrap() error { return e.Err }

// Backend does what is asked. Its methods are called concurrently and end when
// ctx does. A refusal because of channels is an *ActiveError.
type Backend interface {
	Status() Status
	Start(ctx context.Context, mode tunnel.Mode) (already bool, err error)
	Stop(ctx context.Context, wait time.Duration, force bool) (already bool, err error)
	Channels() []Channel
	Join(name string, pid int) error
	Leave(name string) (there bool)
	// Media sends a test call through the tunnel and says how it fared.
	Media(ctx context.Context, d time.Duration) (check.Way, error)
	// Events returns the state now and then each change, until ctx ends.
	Events(ctx context.Context) <-chan Event
}

type startRequest struct {
	Mode string `json:"mode"`
}

type stopRequest struct {
	Wait  string `json:"wait"`
	Force bool   `json:"force"`
}

type mediaRequest struct {
	For string `json:"for"`
}

// maxMedia bounds a test call.
const maxMedia = time.Minute

type joinRequest struct {
	PID int `json:"pid"`
}

type channelsReply struct {
	Channels []Channel `json:"channels"`
}

type errorReply struct {
	Error errorBody `json:"error"`
}

type errorBody struct {
	Code     tunnel.Code `json:"code"`
	Text     string      `json:"text"`
	Channels []Channel   `json:"channels,omitempty"`
}
