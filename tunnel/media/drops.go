package media

import "sync/atomic"

// A Reason is why a datagram was dropped: the word in status and metrics.
type Reason int

// The reasons.
const (
	Aged         Reason = iota // waited longer than the age limit
	Full                       // the waiting room held its limit of bytes
	TooLarge                   // longer than the way can carry
	NoWay                      // there was no way to send it on
	WayFailed                  // the way returned an error
	Duplicate                  // had arrived before
	Unknown                    // for an association or context that is not known here
	Malformed                  // could not be read
	Refused                    // the next stage refused it
	OverLimit                  // the session has reached a limit
	FragmentLost               // a piece of it did not come in time
	FragmentBad                // a piece contradicts itself or the others
	FrameShed                  // of a video frame that could not be sent whole
	reasonsEnd                 // not a reason
)

var reasonWords = [reasonsEnd]string{"queue_age", "queue_full", "too_large", "no_way", "way_failed", "duplicate", "unknown_association", "malformed", "refused", "limit_exceeded", "fragment_incomplete", "fragment_malformed", "frame_shed"}

// String returns the reason's word.
func (r Reason) String() string { return reasonWords[r] }

// Reasons returns the words under which a session can count a datagram as
// dropped: those of Drops, and those of a sealed way's Lost.
func Reasons() []string { return append(reasonWords[:], verdictWords[opened+1:]...) }

// Drops counts dropped datagrams by reason. The zero value is ready.
type Drops struct{ n [reasonsEnd]atomic.Uint64 }

// Add counts one.
func (d *Drops) Add(r Reason) { d.n[r].Add(1) }

// Get returns one reason's count.
func (d *Drops) Get(r Reason) uint64 { return d.n[r].Load() }

// AddTo adds the counts that are not zero to m.
func (d *Drops) AddTo(m map[string]uint64) {
	for r := range reasonsEnd {
		if n := d.n[r].Load(); n > 0 {
			m[r.String()] += n
		}
	}
}
