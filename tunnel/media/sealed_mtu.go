package media

import (
	"net/netip"
	"time"
)

// The sizes that are tried, as lengths of UDP payloads in bytes. 1,232 fits
// every IPv6 path (1,280 less 48); 1,452 and 1,472 are Ethernet's for IPv6 and IPv4.
var mtuSteps = []int{576, 1052, 1200, mtuFloor, 1280, 1352, 1404, 1432, mtuTop6, mtuTop4}

const (
	mtuFloor = 1232 // where each path starts
	mtuTop6  = 1452
	mtuTop4  = 1472

	mtuTries   = 3
	mtuTimeout = 200 * time.Millisecond // of the first try while no round trip is known
	mtuConfirm = 5 * time.Second        // between two confirmations of the size in use
	mtuRaise   = 10 * time.Minute       // before a larger size is tried again
	mtuDoubt   = time.Second            // between two confirmations because of losses
)

// An mtu finds how long a packet may be on one path: it raises the size step by
// step as probes are answered, confirms it while long packets are sent, and
// lowers it when only those vanish. It is driven from outside and not safe for
// concurrent use.
//
//	confirm ──answered──► (5 s, or losses) ──► confirm
//	   │ 3 tries unanswered, shorter ones answered: the longest of these
//	raise ──answered──► next step up ── … ──► top
//	   │ 3 tries unanswered: (10 min) ──► raise
type mtu struct {
	top, size int

	trying     int // the size that is probed; 0: none
	tries      int
	nonce      uint64 // of the probes of that size
	small      uint64 // of the small ones beside it; 0: none has been sent
	smallHeard bool
	lower      []mtuProbe // beside it too: the sizes that it may have to become
	found      int        // the longest of lower that was answered; 0: none
	hasty      bool       // packets are lost, maybe for their length
	doubted    time.Time  // when that was last so
	sentAt     time.Time  // the latest try
	deadline   time.Time
	rtt        time.Duration // of the latest answer to a first try; 0: not known

	confirmAt, raiseAt time.Time // not before
	blackHoles         uint64
}

// A mtuProbe is a probe to send: how long the packet is to be, and its nonce.
type mtuProbe struct {
	size  int // 0: as short as possible
	nonce uint64
}

// start begins anew, for a new path.
func (m *mtu) start(to netip.Addr) {
	*m = mtu{top: mtuTop6, size: mtuFloor, blackHoles: m.blackHoles}
	if to.Unmap().Is4() {
		m.top = mtuTop4
	}
}

// above is the next step up; 0: there is none.
func (m *mtu) above() int {
	for _, s := range mtuSteps {
		if s > m.size && s <= m.top {
			return s
		}
	}
	return 0
}

// below is the next step down; 0: there is none.
func (m *mtu) below() (lower int) {
	for _, s := range mtuSteps {
		if s < m.size {
			lower = s
		}
	}
	return lower
}

// vital is the length above which packets would go on where the size is lowered.
func (m *mtu) vital() int {
	if m.size > mtuFloor {
		return mtuFloor
	}
	return m.below()
}

// tick returns the probes that are due. largest is the longest packet that has
// been sent since the size was last confirmed.
func (m *mtu) tick(now time.Time, largest int) []mtuProbe {
	if m.trying != 0 {
		if now.Before(m.deadline) {
			return nil
		}
		if m.tries < mtuTries {
			return m.try(now)
		}
		m.fail(now)
	}
	vital := m.vital()
	if m.hasty {
		vital = mtuSteps[0]
	}
	switch {
	case m.below() > 0 && largest > vital && !now.Before(m.confirmAt):
		m.trying = m.size
	case m.above() > 0 && !now.Before(m.raiseAt):
		m.trying = m.above()
	default:
		return nil
	}
	m.tries, m.small, m.smallHeard, m.nonce = 0, 0, false, freshNonce()
	m.lower, m.found = m.lower[:0], 0
	return m.try(now)
}

// doubt says that packets are lost: it may be for their length.
func (m *mtu) doubt(now time.Time) {
	switch {
	case m.trying == m.size:
		m.hasty = true
	case m.trying == 0 && now.Sub(m.doubted) >= mtuDoubt:
		m.hasty, m.doubted, m.confirmAt = true, now, now
	}
}

// try sends one more probe of the size. Where it confirms a size and is not the
// first, or packets are lost, a small one goes beside it, to tell a narrow path
// from a dead one, and from the second try on those of the sizes that are left.
func (m *mtu) try(now time.Time) []mtuProbe {
	wait := max(mtuTimeout, 2*m.rtt)
	if !m.hasty {
		wait <<= m.tries
	}
	m.sentAt, m.deadline = now, now.Add(wait)
	m.tries++
	out := []mtuProbe{{m.trying, m.nonce}}
	if m.trying != m.size || m.tries == 1 && !m.hasty {
		return out
	}
	if m.small == 0 {
		m.small = freshNonce()
	}
	if m.tries > 1 && len(m.lower) == 0 {
		for _, s := range mtuSteps {
			if s < m.size && s <= mtuFloor {
				m.lower = append(m.lower, mtuProbe{s, freshNonce()})
			}
		}
	}
	return append(append(out, mtuProbe{0, m.small}), m.lower...)
}

func (m *mtu) fail(now time.Time) {
	confirmed := m.trying == m.size
	m.trying = 0
	if !confirmed {
		m.raiseAt = now.Add(mtuRaise)
		return
	}
	m.hasty, m.confirmAt = false, now.Add(mtuConfirm)
	if !m.smallHeard { // nothing passes: no question of size
		return
	}
	m.blackHoles++
	m.raiseAt = now.Add(mtuRaise)
	if m.found == mtuFloor { // what the path has become is found from here
		m.raiseAt = now
	}
	m.size = max(m.found, mtuSteps[0])
}

// answer takes an answer. mine: it was to a probe of this search; confirmed:
// the size in use is good. A raised size is followed by the next step at once.
func (m *mtu) answer(nonce uint64, now time.Time) (mine, confirmed bool, more []mtuProbe) {
	switch {
	case m.trying == 0:
		return false, false, nil
	case nonce == m.small && m.small != 0:
		m.smallHeard = true
		return true, false, nil
	case nonce != m.nonce:
		for _, l := range m.lower {
			if l.nonce == nonce {
				m.smallHeard, m.found = true, max(m.found, l.size)
				return true, false, nil
			}
		}
		return false, false, nil
	}
	if m.tries == 1 { // else nobody knows which try was answered
		m.rtt = now.Sub(m.sentAt)
	}
	confirmed = m.trying == m.size
	m.size, m.trying, m.hasty = m.trying, 0, false
	m.confirmAt = now.Add(mtuConfirm)
	if !confirmed {
		more = m.tick(now, 0)
	}
	return true, confirmed, more
}

// tooLarge: the local link takes no packet of n bytes.
func (m *mtu) tooLarge(n int, now time.Time) {
	for m.size >= n && m.below() > 0 {
		m.size = m.below()
	}
	m.trying, m.hasty, m.raiseAt = 0, false, now.Add(mtuRaise)
}
