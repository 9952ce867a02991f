package tunnel

import (
	"cmp"
	"fmt"
	"strings"
	"time"
)

// A Change is something that happened to a link while it ran: datagrams went
// another way, a connection was lost, another session was opened.
type Change struct {
	At    time.Time `json:"at"`
	What  string    `json:"what"` // one of the Changed words
	From  string    `json:"from,omitempty"`
	To    string    `json:"to,omitempty"`
	Cause Code      `json:"cause"`         // one word
	Why   string    `json:"why,omitempty"` // a sentence
	// Gap is the longest time without a datagram around the change, as far as a
	// call was there; 0: there was none, or nothing came later than usual.
	Gap time.Duration `json:"gap_ns,omitempty"`
	// Lost is how many datagrams on their way to the apps did not come around the
	// change. Those on their way from the apps are not in it.
	Lost uint64 `json:"lost,omitempty"`
	// LostUp is how many on their way from the apps this end has dropped, or sent
	// by a way from which nothing was heard since: an estimate.
	LostUp uint64 `json:"lost_up,omitempty"`
	// NewPorts says that associations have other ports at the cloud proxy now.
	NewPorts bool `json:"new_ports,omitempty"`
}

// What changes.
const (
	ChangedDatagrams  = "datagrams"   // how datagrams go: from one way to another; to the same: it fell silent and passes again
	ChangedCarrier    = "carrier"     // a connection was lost, or is there again
	ChangedSession    = "session"     // a session ended, or another one was opened
	ChangedCloudProxy = "cloud_proxy" // another cloud proxy serves
	ChangedAddress    = "address"     // this machine's addresses or routes changed
)

// String returns the change as one line without its time.
func (c Change) String() string {
	s := c.What
	from, to := c.From, c.To
	if c.What == ChangedDatagrams { // which have a way, or none
		from, to = cmp.Or(from, "nothing"), cmp.Or(to, "nothing")
	}
	switch {
	case from != "" && to != "":
		s += " " + from + " -> " + to
	case to != "":
		s += " " + to + " is there"
	case from != "":
		s += " " + from + " is gone"
	}
	s += ": " + string(c.Cause)
	if c.Why != "" {
		s += ", " + c.Why
	}
	if cost := c.Cost(); cost != "" {
		s += "; " + cost
	}
	return s
}

// Cost says what the change has cost; "": nothing that is known.
func (c Change) Cost() string {
	var parts []string
	if c.Gap > 0 {
		parts = append(parts, c.Gap.Round(time.Millisecond).String()+" without a datagram")
	}
	if c.Gap > 0 || c.Lost > 0 {
		parts = append(parts, fmt.Sprintf("%d lost on their way to the apps", c.Lost))
	}
	if c.LostUp > 0 {
		parts = append(parts, fmt.Sprintf("some %d lost on their way from the apps", c.LostUp))
	}
	return strings.Join(parts, ", ")
}
