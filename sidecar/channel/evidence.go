package channel

import (
	"cmp"
	"fmt"
	"slices"
	"time"
)

// maxSourceTexts bounds the sources that are described for one flow.
const maxSourceTexts = 2

// evidence says in words why a flow counts.
func (f *flow) evidence(s state, t int64) []string {
	var all []string
	if f.sources != nil && f.rtpAt != 0 {
		var busy []*source
		for i := range f.sources {
			if s := &f.sources[i]; s.count > 1 {
				busy = append(busy, s)
			}
		}
		slices.SortFunc(busy, func(a, b *source) int {
			return cmp.Or(cmp.Compare(b.count, a.count), cmp.Compare(a.ssrc, b.ssrc))
		})
		for _, s := range busy[:min(maxSourceTexts, len(busy))] {
			inner := ""
			if s.inner {
				inner = " inside TURN"
			}
			if f.stream {
				inner += " on TCP"
			}
			all = append(all, fmt.Sprintf("RTP ssrc 0x%08x: %d packets %s in %.1f s %s %s%s, last %s",
				s.ssrc, s.count, word(s.up, "up", "down"), seconds(s.last-s.first), word(s.up, "to", "from"), f.from(), inner, ago(t-s.last)))
		}
	}
	if f.by == byRTP && len(all) == 0 {
		all = append(all, fmt.Sprintf("RTP with %s, last %s", f.from(), ago(t-f.rtpAt)))
	}
	if f.consent != 0 {
		all = append(all, fmt.Sprintf("STUN consent with %s answered %s after DTLS", f.from(), ago(t-f.consent)))
	}
	switch f.by {
	case byOpaque:
		all = append(all, fmt.Sprintf("UDP at %d/s up and %d/s down with %s, which the policy tags media, last %s", f.lastUp, f.lastDown, f.from(), ago(t-f.kept)))
	case byTURN:
		all = append(all, fmt.Sprintf("TURN on TCP with %s: %d messages with data, last %s", f.from(), f.framed.count, ago(t-f.framed.last)))
	case byRhythm:
		all = append(all, fmt.Sprintf("TCP with %s: in 10 of 12 seconds at least 5 writes each way and less than 5 Mbit/s, last %s", f.from(), ago(t-f.kept)))
	}
	for i := range all {
		switch {
		case f.bye != 0:
			all[i] += "; it said goodbye " + ago(t-f.bye)
		case s == quiet:
			all[i] += "; on hold: no ICE, and its socket is open"
		}
	}
	return all
}

// from names the other side.
func (f *flow) from() string {
	s := f.remote.String()
	if f.alias != (Target{}) {
		s += " (" + f.alias.String() + ")"
	}
	return s
}

func seconds(d int64) float64 { return time.Duration(d).Seconds() }

func ago(d int64) string { return fmt.Sprintf("%.1f s ago", seconds(max(d, 0))) }

func word(b bool, yes, no string) string {
	if b {
		return yes
	}
	return no
}
