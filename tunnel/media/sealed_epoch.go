package media

import (
	"errors"
	"math"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"

	"culvert/tunnel"
	"culvert/tunnel/wire"
)

// A sealed packet:
//
//	 0                   1                   2                   3
//	 0 1 2 3 4 5 6 7 8 9 0 1 2 3 4 5 6 7 8 9 0 1 2 3 4 5 6 7 8 9 0 1
//	+-+-+-----------+-----------------------------------------------+
//	|0|1|  any (6)  |                                               |
//	+-+-+-----------+        connection ID (64)                     +
//	|                                                               |
//	+               +-----------------------------------------------+
//	|               |                 counter (24)                  |
//	+---------------+-----------------------------------------------+
//	|  one record (tunnel/wire), encrypted ...                      |
//	+---------------------------------------------------------------+
//	|  tag (128)                                                    |
//	+---------------------------------------------------------------+
//
// The first byte is that of a QUIC packet with a short header (RFC 8999 §5.2).
// The 12 bytes before the record are the additional data.
const (
	sealedHeader = 1 + idSize + counterSize
	counterSize  = 3
	sealedTag    = 16
	// SealedOverhead is what sealing adds to a record, in bytes.
	SealedOverhead = sealedHeader + sealedTag

	// epochPackets is how many packets one key seals: half of what RFC 9001 §6.6
	// allows for AES-GCM with the largest packets there are.
	epochPackets = 1 << 22
	// maxForged is how many packets may fail under one key before it opens no
	// more: RFC 9001 §6.6 has 2³⁶ for ChaCha20-Poly1305 and more for AES-GCM.
	maxForged = 1 << 36
	// oldEpochLife is how long packets of the epoch before the current one are
	// still opened: longer than a packet can be under way.
	oldEpochLife = 2 * time.Second
	// epochGap is the least time between two moves of a receiver to another
	// epoch. Nobody seals epochPackets in it, and each move costs a key schedule
	// on the goroutine that reads for all sessions.
	epochGap = time.Second
)

// errRootUsed says that all epochs of a root are used up, after 2⁵⁴ packets.
var errRootUsed = errors.New("the sealed way has used all its keys")

// scratch is what sealing or opening one packet needs. It is pooled since what
// is given to an AEAD through its interface would be allocated.
type scratch struct {
	nonce [ivSize]byte
	buf   []byte
}

var scratches = sync.Pool{New: func() any { return &scratch{buf: make([]byte, 0, 2048)} }}

// sealEpoch is an epoch of what this end sends.
type sealEpoch struct {
	epochKeys
	// next is the counter of the next packet. It goes past the limit by at most
	// one for each goroutine that meets the epoch's end.
	next atomic.Uint64
}

// sealer seals what this end sends. It is safe for concurrent use.
type sealer struct {
	epoch atomic.Pointer[sealEpoch]
	limit uint64     // packets of an epoch; epochPackets but in tests
	first uint32     // number of the first packet
	mu    sync.Mutex // held while one epoch follows another
	departures
	// derive makes the keys of an epoch, changed is told of each new one, both under mu.
	derive  func(number uint32) (epochKeys, error)
	changed func(number uint32)
}

// seal makes a packet of the record, in sc.buf.
func (o *sealer) seal(sc *scratch, record []byte) error {
	for {
		e := o.epoch.Load()
		// The counter is taken before anything else is done with it, so no two
		// packets of an epoch ever have the same, whoever sends.
		n := e.next.Add(1) - 1
		if n >= o.limit {
			if err := o.advance(e); err != nil {
				return err
			}
			continue
		}
		o.note(o.first + e.number*uint32(o.limit) + uint32(n))
		b := append(sc.buf[:0], 0x40|byte(rand.Uint32())&0x3f)
		b = append(b, e.id[:]...)
		b = append(b, byte(n>>16), byte(n>>8), byte(n))
		sc.buf = e.aead.Seal(b, e.nonce(&sc.nonce, uint32(n)), record, b)
		return nil
	}
}

// advance follows the epoch that has ended, unless another goroutine has.
func (o *sealer) advance(ended *sealEpoch) error {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.epoch.Load() != ended {
		return nil
	}
	if ended.number == math.MaxUint32 {
		return errRootUsed
	}
	k, err := o.derive(ended.number + 1)
	if err != nil {
		return err
	}
	o.epoch.Store(&sealEpoch{epochKeys: k})
	o.changed(k.number)
	return nil
}

// replayBits is how many counters back a packet may come and still be told
// from a replay: 1.4 s at 1,500 packets a second.
const replayBits = 2048

// replay remembers the counters of one epoch that have come.
type replay struct {
	bits [replayBits / 64]uint64 // bit n%replayBits: n has come
	next uint32                  // the highest that has come plus 1
}

// fresh reports whether n has not come yet. What lies 2,048 or more behind the
// highest can not be told from a replay.
func (r *replay) fresh(n uint32) bool {
	return n >= r.next || r.next-n <= replayBits && r.bits[n%replayBits/64]&(1<<(n%64)) == 0
}

// commit remembers n. Only an authentic packet may get here: a forged one
// could move the window past everything.
func (r *replay) commit(n uint32) {
	if n >= r.next {
		if n-r.next >= replayBits {
			clear(r.bits[:])
		} else {
			for i := r.next; i < n; i++ {
				r.bits[i%replayBits/64] &^= 1 << (i % 64)
			}
		}
		r.next = n + 1
	}
	r.bits[n%replayBits/64] |= 1 << (n % 64)
}

// openEpoch is an epoch of what the peer sends.
type openEpoch struct {
	epochKeys
	replay
	forged uint64 // packets that were not authentic
	// token is how the carrier's resets for this ID end. With keep there is one,
	// and what is not authentic must not reach the carrier, which would answer
	// it with the token of a living ID (RFC 9000 §21.11).
	token [16]byte
	keep  bool
}

// opener opens what the peer sends. It is safe for concurrent use, although
// packets come on one goroutine.
type opener struct {
	flow   tunnel.Flow
	limit  uint64
	gap    time.Duration // least time between two moves; epochGap but in tests
	derive func(number uint32) (epochKeys, error)
	recv   func(e *openEpoch, p []byte, from tunnel.Path) bool

	mu       sync.Mutex // guards what follows, and the windows
	old      *openEpoch // the epoch before cur until oldUntil; nil: none
	cur      *openEpoch
	next     *openEpoch // claimed before the peer uses it; nil: its ID could not be claimed
	oldUntil time.Time
	arrivals arrivals
	movedAt  time.Time // when cur became that; zero: it is the first
	closed   bool
}

// verdict is what became of a packet.
type verdict int

const (
	opened       verdict = iota
	notAuthentic         // forged, damaged, or QUIC's own
	truncated            // shorter than any sealed packet, or too long to be read whole
	replayed             // its counter has come before, or lies behind the window
	oldEpoch             // of an epoch that is over
	earlyEpoch           // of the next epoch, too soon after the last has begun
	notStarted           // it came before Start or after Close
	socketFull           // sending: the socket took no packet
	verdictsEnd          // not a verdict
)

var verdictWords = [verdictsEnd]string{notAuthentic: "not_authentic", truncated: "truncated", replayed: "replayed", oldEpoch: "old_epoch", earlyEpoch: "early_epoch", notStarted: "not_started", socketFull: "socket_full"}

// claim makes an epoch and claims its ID.
func (i *opener) claim(number uint32) (*openEpoch, error) {
	k, err := i.derive(number)
	if err != nil {
		return nil, err
	}
	e := &openEpoch{epochKeys: k}
	e.token, e.keep = i.flow.ResetToken(e.id)
	return e, i.flow.Claim(e.id, func(p []byte, from tunnel.Path) bool { return i.recv(e, p, from) })
}

// open opens a packet of an epoch into sc.buf. highest says that no packet
// that was sent later has come yet; moved, that the peer has begun this epoch.
func (i *opener) open(sc *scratch, e *openEpoch, p []byte) (v verdict, highest, moved bool) {
	if len(p) < SealedOverhead {
		return truncated, false, false
	}
	n := uint32(p[9])<<16 | uint32(p[10])<<8 | uint32(p[11])
	i.mu.Lock()
	defer i.mu.Unlock()
	switch {
	case i.closed:
		return notStarted, false, false
	case e == i.old && time.Now().After(i.oldUntil), e != i.old && e != i.cur && e != i.next:
		return oldEpoch, false, false
	case e == i.next && !i.movedAt.IsZero() && time.Since(i.movedAt) < i.gap:
		return earlyEpoch, false, false
	case uint64(n) >= i.limit, e.forged >= maxForged:
		return notAuthentic, false, false // nobody seals so many; nobody may try so often
	case !e.fresh(n):
		return replayed, false, false
	}
	record, err := e.aead.Open(sc.buf[:0], e.nonce(&sc.nonce, n), p[sealedHeader:], p[:sealedHeader])
	if err != nil {
		e.forged++
		return notAuthentic, false, false
	}
	sc.buf = record
	highest = e == i.next || e == i.cur && n >= e.replay.next
	e.commit(n)
	i.arrivals.add(i.arrivals.first+e.number*uint32(i.limit)+n, highest)
	if e == i.next {
		i.advanceLocked()
		moved = true
	}
	return opened, highest, moved
}

// advanceLocked moves on to the next epoch and makes the one after it ready.
func (i *opener) advanceLocked() {
	if i.old != nil {
		i.flow.Release(i.old.id)
	}
	i.old, i.cur, i.next = i.cur, i.next, nil
	i.movedAt = time.Now()
	i.oldUntil = i.movedAt.Add(oldEpochLife)
	i.readyLocked()
}

// readyLocked claims the next epoch's ID. It fails only if something else has
// that ID on this flow, one of 2⁶⁴; then it is tried again at each Tick.
func (i *opener) readyLocked() {
	if i.next == nil && !i.closed && i.cur.number < math.MaxUint32 {
		if e, err := i.claim(i.cur.number + 1); err == nil {
			i.next = e
		}
	}
}

// tick releases an old epoch whose time is over.
func (i *opener) tick(now time.Time) {
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.old != nil && now.After(i.oldUntil) {
		i.flow.Release(i.old.id)
		i.old = nil
	}
	i.readyLocked()
}

// close releases all IDs. No packet is opened afterwards.
func (i *opener) close() {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.closed = true
	for _, e := range []*openEpoch{i.old, i.cur, i.next} {
		if e != nil {
			i.flow.Release(e.id)
		}
	}
	i.old, i.cur, i.next = nil, nil, nil
}

// tokens returns the reset tokens of the epochs that the peer uses next.
func (i *opener) tokens() (known []wire.Reset) {
	i.mu.Lock()
	defer i.mu.Unlock()
	for _, e := range []*openEpoch{i.cur, i.next} {
		if e != nil && e.keep {
			known = append(known, wire.Reset{Epoch: e.number, Token: e.token})
		}
	}
	return known
}
