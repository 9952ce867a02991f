package media

import (
	crand "crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"culvert/tunnel"
	"culvert/tunnel/wire"
)

// SealedConfig says what a sealed way is made of.
type SealedConfig struct {
	Flow tunnel.Flow
	Root []byte // of SealedRoot, 32 bytes
	AEAD string // wire.AES128GCM or wire.ChaCha20Poly1305
	Near bool   // this is the sidecar's end
	// OnReset is called once, on any goroutine, when the cloud proxy has
	// answered with a stateless reset: it does not know the way any more. Only
	// at the near end; may be nil; not called after Close. It may call Close.
	OnReset func()
}

// A Sealed is a way of AEAD-sealed packets on a UDP flow (PROTOCOL.md 5.4).
//
//	Send -> counter -> seal -> Flow.Send, at once, on the caller's goroutine
//	recv <- notices of its own taken out <- open <- window <- Flow's reading goroutine
//
// It never waits: what the socket does not take is dropped and counted, so
// Send never returns tunnel.ErrBlocked. It has no goroutine and no timer: Tick
// is to be called while media flows. It is safe for concurrent use.
type Sealed struct {
	flow    tunnel.Flow
	near    bool
	onReset func()

	out     sealer
	in      opener
	deliver atomic.Pointer[func([]byte)] // nil before Start
	closed  atomic.Bool
	reset   sync.Once // calls onReset
	drops   [verdictsEnd]atomic.Uint64

	route   atomic.Pointer[route]
	size    atomic.Int64 // mtu.size
	largest atomic.Int64 // the longest packet sent since size was confirmed
	used    atomic.Bool  // a datagram has gone or come since the last Tick

	mu       sync.Mutex // guards what follows, and changes of route; never held over Flow.Send
	mtu      mtu
	lastUsed time.Time
	moves    uint64
	carrier  tunnel.Path   // what Flow.Path was at the last Tick
	tellAt   time.Time     // far end: when the reset tokens are told again
	tellGap  time.Duration // and how long after that
	tokens   [2]watched    // near end: of the sending epoch and the next
}

// watched is a reset token that the far end has told.
type watched struct {
	wire.Reset
	set bool
}

const (
	// idleAfter ends probing and telling when no datagram has gone or come for so long.
	idleAfter = 5 * time.Second
	// The gaps between two tellings of the reset tokens: doubled each time.
	tellFirst = 500 * time.Millisecond
	tellMost  = time.Minute
)

// noticeKind returns the kind of a notice from its bytes (PROTOCOL.md 5.2).
func noticeKind(record []byte) uint16 { return binary.BigEndian.Uint16(record[2:]) }

// The kinds that a sealed way looks at.
var (
	answerKind   = noticeKind((&wire.Answer{}).Append(nil))
	resetKind    = noticeKind((&wire.Reset{}).Append(nil))
	fragmentKind = noticeKind((&wire.Fragment{}).Append(nil))
)

// freshNonce makes a probe's nonce, which nobody can guess.
func freshNonce() uint64 {
	var b [8]byte
	crand.Read(b[:])
	return binary.BigEndian.Uint64(b[:])
}

// NewSealed makes a sealed way that sends to the flow's path. The IDs that it
// receives on are claimed from now on, so the far end makes it before it
// answers; packets before Start are dropped. It fails where an ID is taken.
func NewSealed(c SealedConfig) (*Sealed, error) { return newSealed(c, epochPackets, epochGap) }

func newSealed(c SealedConfig, limit uint64, gap time.Duration) (*Sealed, error) {
	if len(c.Root) != rootSize || aeadKeySize(c.AEAD) == 0 || c.Flow == nil {
		return nil, fmt.Errorf("sealed: a root of %d bytes, the AEAD %.40q", len(c.Root), c.AEAD)
	}
	send, receive := fromFar, fromNear
	if c.Near {
		send, receive = fromNear, fromFar
	}
	root := append([]byte(nil), c.Root...)
	derive := func(direction byte) func(uint32) (epochKeys, error) {
		return func(number uint32) (epochKeys, error) { return deriveEpoch(root, c.AEAD, direction, number) }
	}
	s := &Sealed{flow: c.Flow, near: c.Near, onReset: c.OnReset, tellGap: tellFirst}
	s.out.limit, s.out.derive, s.out.changed = limit, derive(send), s.sendingEpoch
	s.in = opener{flow: c.Flow, limit: limit, gap: gap, derive: derive(receive), recv: s.receive}

	first, err := s.out.derive(0)
	if err != nil {
		return nil, err
	}
	s.out.epoch.Store(&sealEpoch{epochKeys: first})
	s.out.first, s.out.origin = firstNumber(first.id), time.Now()
	to := c.Flow.Path()
	s.route.Store(&route{to: to})
	s.carrier = to
	s.mtu.start(to.Remote.Addr())
	s.size.Store(mtuFloor)

	s.in.mu.Lock()
	defer s.in.mu.Unlock()
	if s.in.cur, err = s.in.claim(0); err != nil {
		return nil, err
	}
	s.in.arrivals.first = firstNumber(s.in.cur.id)
	s.in.arrivals.highest = s.in.arrivals.first
	if s.in.next, err = s.in.claim(1); err != nil {
		c.Flow.Release(s.in.cur.id)
		return nil, err
	}
	return s, nil
}

// Name returns "sealed".
func (s *Sealed) Name() string { return wire.WaySealed.String() }

// Max is the longest record that fits the path as far as it is known.
func (s *Sealed) Max() int { return int(s.size.Load()) - SealedOverhead }

// Start begins reception. writable is never called, since Send never blocks.
func (s *Sealed) Start(recv func(p []byte), _ func()) { s.deliver.Store(&recv) }

// Send seals a record and sends it at once. It borrows p until it returns. A
// full socket is a counted drop and no error. It returns tunnel.ErrTooLarge,
// net.ErrClosed after Close, or the flow's error when that has ended.
func (s *Sealed) Send(p []byte) error {
	if len(p) > s.Max() {
		return tunnel.ErrTooLarge
	}
	if !s.used.Load() && isTraffic(p) {
		s.used.Store(true)
	}
	if n := int64(len(p) + SealedOverhead); n > s.largest.Load() {
		s.largest.Store(n)
	}
	r := s.route.Load()
	return s.send(p, r.to, r.candidate)
}

// isTraffic tells what the way is there for from what keeps it going: else two
// idle ends would keep each other awake with probes and answers.
func isTraffic(record []byte) bool {
	return !wire.IsNotice(record) || noticeKind(record) == fragmentKind
}

// send seals a record and sends it, and a copy to the candidate where there is
// one whose budget allows it. It is the same packet: the peer opens one of them.
func (s *Sealed) send(record []byte, to tunnel.Path, copyTo *candidate) error {
	if s.closed.Load() {
		return net.ErrClosed
	}
	sc := scratches.Get().(*scratch)
	defer scratches.Put(sc)
	if err := s.out.seal(sc, record); err != nil {
		return err
	}
	err := s.flow.Send(sc.buf, to)
	if copyTo != nil && copyTo.reserve(len(sc.buf)) {
		s.flow.Send(sc.buf, copyTo.path) // only a copy: what becomes of it is no news of the way
	}
	switch {
	case errors.Is(err, tunnel.ErrBlocked):
		s.drops[socketFull].Add(1)
		return nil
	case errors.Is(err, tunnel.ErrTooLarge):
		s.mu.Lock()
		if s.route.Load().to == to {
			s.mtu.tooLarge(len(sc.buf), time.Now())
			s.size.Store(int64(s.mtu.size))
		}
		s.mu.Unlock()
		return tunnel.ErrTooLarge
	}
	return err
}

// receive takes a packet with the ID of an epoch from the flow. False: it is
// not ours, the carrier may have it.
func (s *Sealed) receive(e *openEpoch, p []byte, from tunnel.Path) bool {
	deliver := s.deliver.Load()
	if deliver == nil {
		s.drops[notStarted].Add(1)
		return true
	}
	sc := scratches.Get().(*scratch)
	defer scratches.Put(sc)
	v, highest, moved := s.in.open(sc, e, p)
	if v != opened {
		s.drops[v].Add(1)
		return v != notAuthentic || e.keep
	}
	if !s.near {
		if from != s.route.Load().to {
			s.elsewhere(from, len(p), highest)
		}
		if moved {
			s.mu.Lock()
			s.tellSoonLocked()
			s.mu.Unlock()
		}
	}
	record := sc.buf
	if wire.IsNotice(record) && s.ours(record, from) {
		return true
	}
	if !s.used.Load() && isTraffic(record) {
		s.used.Store(true)
	}
	(*deliver)(record)
	return true
}

// ours takes the notices that are for the way itself: answers to its own probes,
// and at the near end reset tokens.
func (s *Sealed) ours(record []byte, from tunnel.Path) bool {
	kind := noticeKind(record)
	if kind != answerKind && (kind != resetKind || !s.near) {
		return false
	}
	_, _, n, _, err := wire.ParseRecord(record)
	switch {
	case err != nil:
		return false // it is counted where all malformed records are
	case n.Reset != nil:
		s.watch(*n.Reset)
		return true
	}
	return s.answered(*n.Answer, from)
}

func (s *Sealed) answered(a wire.Answer, from tunnel.Path) bool {
	now := time.Now()
	s.mu.Lock()
	if s.provedLocked(a.Nonce, from) {
		s.mu.Unlock()
		return true
	}
	mine, confirmed, more := s.mtu.answer(a.Nonce, now)
	if confirmed {
		s.largest.Store(0)
	}
	s.size.Store(int64(s.mtu.size))
	to := s.route.Load().to
	s.mu.Unlock()
	s.probe(more, to)
	return mine
}

// probe sends probes for the path's MTU. One that is too large for the local
// link or that the socket does not take is one that gets no answer.
func (s *Sealed) probe(probes []mtuProbe, to tunnel.Path) {
	for _, m := range probes {
		p := wire.Probe{Nonce: m.nonce, Size: m.size - SealedOverhead}
		s.send(p.Append(nil), to, nil)
	}
}

// Tick does what is due: path MTU, proof of a new path, reset tokens, the end of
// an old epoch. It is to be called each 250 ms or so while media flows, with the
// time; where it is called later all of that is later too, and nothing else
// suffers. Without datagrams for 5 s it sends nothing.
func (s *Sealed) Tick(now time.Time) {
	if s.closed.Load() {
		return
	}
	s.in.tick(now)
	s.mu.Lock()
	if s.used.Swap(false) {
		s.lastUsed = now
	}
	s.followLocked(s.flow.Path())
	c := s.candidateLocked(now)
	if now.Sub(s.lastUsed) > idleAfter {
		s.mu.Unlock()
		return
	}
	if c != nil && !c.dueLocked(now) {
		c = nil
	}
	probes := s.mtu.tick(now, int(s.largest.Load()))
	s.size.Store(int64(s.mtu.size)) // a try that was not answered can have lowered it
	to := s.route.Load().to
	tell := !s.near && !now.Before(s.tellAt)
	if tell {
		s.tellAt = now.Add(s.tellGap)
		s.tellGap = min(2*s.tellGap, tellMost)
	}
	s.mu.Unlock()

	if c != nil {
		s.challenge(c)
	}
	s.probe(probes, to)
	if tell {
		for _, r := range s.in.tokens() {
			s.send(r.Append(nil), to, nil)
		}
	}
}

// Doubt says that packets are being lost on the way to the peer: whether it is
// for their length is then found out at once, with this and the next Ticks.
func (s *Sealed) Doubt(now time.Time) {
	if s.closed.Load() {
		return
	}
	s.mu.Lock()
	s.mtu.doubt(now)
	probes := s.mtu.tick(now, int(s.largest.Load()))
	s.size.Store(int64(s.mtu.size))
	to := s.route.Load().to
	s.mu.Unlock()
	s.probe(probes, to)
}

// tellSoonLocked makes the next Tick tell the reset tokens, and begin with the
// shortest gap again. Nobody acknowledges them.
func (s *Sealed) tellSoonLocked() { s.tellAt, s.tellGap = time.Time{}, tellFirst }

// watch waits for resets with a token, if it is that of an epoch this end sends in now or next.
func (s *Sealed) watch(r wire.Reset) {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := s.out.epoch.Load().number
	t := &s.tokens[r.Epoch%2]
	if s.closed.Load() || r.Epoch < now || r.Epoch-now > 1 || t.set && t.Reset == r {
		return
	}
	if t.set {
		s.flow.WatchReset(t.Token, nil)
	}
	*t = watched{r, true}
	s.flow.WatchReset(r.Token, s.wasReset)
}

// sendingEpoch is told that this end seals with another epoch now. The tokens
// of those before must not be heeded any more: once the far end has released
// their IDs, anybody who repeats an old packet gets a reset for it.
func (s *Sealed) sendingEpoch(number uint32) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.unwatchLocked(number)
}

func (s *Sealed) unwatchLocked(before uint32) {
	for i := range s.tokens {
		if t := &s.tokens[i]; t.set && t.Epoch < before {
			s.flow.WatchReset(t.Token, nil)
			t.set = false
		}
	}
}

func (s *Sealed) wasReset() {
	if s.onReset != nil && !s.closed.Load() {
		s.reset.Do(s.onReset)
	}
}

// Close ends the way: it releases its IDs and its watches and waits for
// nothing, so it may be called inside recv and OnReset. A packet that comes
// after it has returned is not delivered; a recv that runs then, or whose
// packet has been opened already, may still be running.
func (s *Sealed) Close() {
	if s.closed.Swap(true) {
		return
	}
	s.in.close()
	s.mu.Lock()
	defer s.mu.Unlock()
	for i := range s.tokens {
		if t := &s.tokens[i]; t.set {
			s.flow.WatchReset(t.Token, nil)
			t.set = false
		}
	}
}

// Lost counts what was dropped, by reason: "socket_full" when sending;
// "not_authentic", "truncated", "replayed", "old_epoch", "early_epoch", "not_started" and
// "late" (they had waited in this end's socket) when receiving.
func (s *Sealed) Lost() map[string]uint64 {
	m := map[string]uint64{}
	if n := s.flow.Late(); n > 0 {
		m["late"] = n
	}
	for v := opened + 1; v < verdictsEnd; v++ {
		if n := s.drops[v].Load(); n > 0 {
			m[verdictWords[v]] = n
		}
	}
	return m
}

// SealedStats describes a sealed way.
type SealedStats struct {
	Size       int         // bytes of UDP payload that the path is known to carry
	BlackHoles uint64      // times that only long packets vanished, and Size was lowered for it
	Epoch      uint32      // in which this end sends
	Path       tunnel.Path // where it sends
	Moves      uint64      // changes of Path
}

// Stats returns what is known of the way.
func (s *Sealed) Stats() SealedStats {
	s.mu.Lock()
	defer s.mu.Unlock()
	return SealedStats{s.mtu.size, s.mtu.blackHoles, s.out.epoch.Load().number, s.route.Load().to, s.moves}
}
