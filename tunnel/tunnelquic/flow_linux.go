//go:build linux && (amd64 || arm64 || arm || riscv64)

package tunnelquic

import (
	"crypto/hmac"
	"crypto/sha256"
	"crypto/subtle"
	"errors"
	"maps"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/net/ipv4"
	"golang.org/x/sys/unix"

	"culvert/tunnel"
	"culvert/tunnel/netio"
)

const (
	// batch is how many packets are read at once. quic-go takes 8 of its own at
	// a time; what is more waits for its next call.
	batch = 16
	// sizeReset is how long quic-go makes its stateless resets, in bytes.
	sizeReset = 42
	// minReset is how short a stateless reset can be (RFC 9000 §10.3).
	minReset = 21
	// patience is how many errors in a row are taken as passing ones.
	patience = 100
)

// flows share a socket with QUIC. quic-go reads through ReadBatch, on one
// goroutine, and what somebody claims never gets further than that:
//
//	recvmmsg ─► 01xxxxxx, id claimed ─► recv, done (too long for a buffer: its header alone)
//	       └──► any other, or recv says it is not its own ─► copied to quic-go
type flows struct {
	raw    syscall.RawConn
	sender *netio.Sender
	// local: the socket has many addresses, and answers must leave by the one
	// that was asked.
	local bool
	key   []byte        // of stateless resets; nil: none are sent
	age   time.Duration // how long a claimed packet may wait in the socket; 0: for ever

	changes sync.Mutex // held while one of these three is replaced
	claims  table[*claim]
	// live holds the reset tokens of what is claimed, by their first half.
	live    table[int]
	watches atomic.Pointer[[]*watch]

	// For the reading goroutine alone.
	unproved   *unproved // the socket's
	packets    *netio.Batch
	next, held int            // packets of the batch: looked at, read
	into       []ipv4.Message // of the ReadBatch under way
	got        int            // of into, filled
	err        error
	fill       func(fd uintptr) bool
	from       netip.AddrPort // of the last QUIC packet
	addr       *net.UDPAddr   // the same; never changed once made, so packets can share it
}

type claim struct {
	flow  *flow
	recv  func([]byte, tunnel.Path) bool
	token [16]byte // of a reset that would answer it
}

type watch struct {
	flow  *flow
	token [16]byte
	f     func()
}

// table maps eight random bytes. Readers take no lock. A writer, one at a time,
// replaces one shard by a changed copy, so that it copies a 256th of all.
type table[V any] struct {
	shards [256]atomic.Pointer[map[[8]byte]V]
}

func (t *table[V]) get(k [8]byte) (v V) {
	if m := t.shards[k[0]].Load(); m != nil {
		v = (*m)[k]
	}
	return v
}

func (t *table[V]) change(k [8]byte, f func(m map[[8]byte]V)) {
	m := map[[8]byte]V{}
	if old := t.shards[k[0]].Load(); old != nil {
		m = maps.Clone(*old)
	}
	if f(m); len(m) == 0 {
		t.shards[k[0]].Store(nil)
		return
	}
	t.shards[k[0]].Store(&m)
}

func (s *socket) start(c Config, server bool) error {
	f := &s.flows
	var err error
	if f.raw, err = s.SyscallConn(); err != nil {
		return err
	}
	if f.sender, err = netio.NewSender(s.UDPConn); err != nil {
		return err
	}
	if at, ok := s.LocalAddr().(*net.UDPAddr); ok && server {
		f.local = at.IP.IsUnspecified()
	}
	if server && c.StatelessResetKey != nil {
		f.key = append([]byte(nil), c.StatelessResetKey[:]...)
	}
	f.age = c.MaxAge * 2 / 3 // the way to here has taken its time too
	var failed error
	if err = f.raw.Control(func(fd uintptr) { failed = netio.Stamp(fd) }); err == nil {
		err = failed
	}
	if err != nil {
		return err
	}
	f.unproved = &s.unproved
	f.packets = netio.NewBatch(batch, maxPacket)
	f.fill = f.read
	return nil
}

// ReadBatch is how quic-go reads: it waits for QUIC packets, copies them into
// the buffers of ms and returns how many.
func (s *socket) ReadBatch(ms []ipv4.Message, _ int) (int, error) {
	f := &s.flows
	f.into = ms
	f.hand() // what the last batch still holds
	for failures := 0; f.got == 0; {
		if err := f.raw.Read(f.fill); err != nil {
			return 0, err
		}
		if f.err == nil {
			failures = 0
			continue
		}
		// Reading has cleared it. To quic-go it would be the end of the socket.
		if failures++; failures > patience || !passes(f.err) {
			return 0, f.err
		}
	}
	return f.got, nil
}

// read takes one batch from the socket. It returns false to wait for more.
func (f *flows) read(fd uintptr) bool {
	f.next, f.held = 0, 0
	n, err := f.packets.TryRead(fd)
	if f.err = err; err == tunnel.ErrBlocked {
		f.err = nil
		return false
	}
	f.held = n
	f.hand()
	// A batch that is not full has emptied the socket, and what has come since
	// is noted in the poller: no need to ask once more before waiting. A full
	// one returns, so that a flood cannot outlast the deadline which ends us.
	return f.got > 0 || err != nil || n == f.packets.Cap()
}

// hand deals out what the batch holds, until f.into is full of QUIC packets.
func (f *flows) hand() {
	f.got = 0
	for ; f.next < f.held && f.got < len(f.into); f.next++ {
		d := f.packets.At(f.next)
		if f.take(&d) {
			continue
		}
		f.unproved.came(d.P, d.From)
		m := &f.into[f.got]
		f.got++
		m.N = copy(m.Buffers[0], d.P)
		m.NN = copy(m.OOB, d.OOB)
		m.Flags = 0
		if d.Truncated || m.N < len(d.P) {
			m.Flags = unix.MSG_TRUNC
		}
		if f.from != d.From {
			f.from, f.addr = d.From, net.UDPAddrFromAddrPort(d.From)
		}
		m.Addr = f.addr
	}
}

// take reports whether a packet is not for QUIC. Only those that look like
// short headers can be (RFC 8999 §5.2).
func (f *flows) take(d *netio.Datagram) bool {
	if len(d.P) < 9 || d.P[0]>>6 != 1 {
		return false
	}
	if c := f.claims.get([8]byte(d.P[1:])); c != nil {
		// Asked of each: the process may stand still in the middle of a batch.
		if f.age > 0 && netio.Before(d.OOB, netio.Oldest(f.age)) {
			c.flow.late.Add(1)
			return true
		}
		path := tunnel.Path{Remote: d.From}
		if f.local {
			path.Local = netio.Local(d.OOB)
		}
		if d.Truncated { // longer than any packet of QUIC: it can not be its own either
			c.recv(d.P[:9], path)
			return true
		}
		return c.recv(d.P, path)
	}
	return !d.Truncated && f.reset(d.P)
}

// reset looks whether a packet ends with a token that is watched for.
func (f *flows) reset(p []byte) bool {
	watches := f.watches.Load()
	if watches == nil || len(p) < minReset {
		return false
	}
	var hit *watch
	for _, w := range *watches {
		// In constant time (RFC 9000 §10.3.1).
		if subtle.ConstantTimeCompare(p[len(p)-len(w.token):], w.token[:]) == 1 {
			hit = w
		}
	}
	if hit != nil && f.unwatch(func(w *watch) bool { return w == hit }) {
		go hit.f() // it may close the carrier, which waits for this goroutine
	}
	return hit != nil
}

// unwatch ends watches and reports whether there were any.
func (f *flows) unwatch(which func(*watch) bool) bool {
	f.changes.Lock()
	defer f.changes.Unlock()
	old := f.watches.Load()
	if old == nil {
		return false
	}
	var left []*watch
	for _, w := range *old {
		if !which(w) {
			left = append(left, w)
		}
	}
	if f.watches.Store(&left); len(left) == 0 {
		f.watches.Store(nil)
	}
	return len(left) < len(*old)
}

// token is what quic-go's stateless resets for a packet with this id end with.
func (f *flows) token(id [8]byte) (token [16]byte) {
	h := hmac.New(sha256.New, f.key)
	h.Write(id[:connIDLen])
	copy(token[:], h.Sum(nil))
	return token
}

// secret reports whether a packet that is about to leave is a reset whose token
// would end a flow that lives. quic-go answers every packet that it cannot
// place, also one that somebody who has seen a connection ID has made up: the
// token in the answer would let them end the flow (RFC 9000 §21.11).
func (f *flows) secret(p []byte) bool {
	return len(p) == sizeReset && f.key != nil && f.live.get([8]byte(p[sizeReset-16:])) > 0
}

func (f *flows) release(id [8]byte, c *claim) {
	f.changes.Lock()
	defer f.changes.Unlock()
	if f.claims.get(id) != c {
		return
	}
	f.claims.change(id, func(m map[[8]byte]*claim) { delete(m, id) })
	if f.key != nil {
		f.count(c.token, -1)
	}
}

// count says that a token belongs to one more or one less of the claims.
func (f *flows) count(token [16]byte, by int) {
	half := [8]byte(token[:])
	f.live.change(half, func(m map[[8]byte]int) {
		if m[half] += by; m[half] == 0 {
			delete(m, half)
		}
	})
}

// A flow is a link's share of its socket.
type flow struct {
	link *link
	all  *flows
	late atomic.Uint64

	mu    sync.Mutex // before flows.changes
	mine  map[[8]byte]*claim
	ended bool
}

func newFlow(l *link) *flow {
	return &flow{link: l, all: &l.sock.flows, mine: map[[8]byte]*claim{}}
}

func (l *link) Flow() tunnel.Flow { return l.flow }

// end gives back all claims and watches.
func (f *flow) end() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.ended = true
	for id, c := range f.mine {
		f.all.release(id, c)
	}
	f.mine = nil
	f.all.unwatch(func(w *watch) bool { return w.flow == f })
}

func (f *flow) Claim(id [8]byte, recv func([]byte, tunnel.Path) bool) error {
	c := &claim{flow: f, recv: recv}
	if f.all.key != nil {
		c.token = f.all.token(id)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.ended {
		return f.over()
	}
	f.all.changes.Lock()
	defer f.all.changes.Unlock()
	if f.all.claims.get(id) != nil {
		return errors.New("the connection ID is claimed already")
	}
	f.all.claims.change(id, func(m map[[8]byte]*claim) { m[id] = c })
	if f.all.key != nil {
		f.all.count(c.token, 1)
	}
	f.mine[id] = c
	return nil
}

func (f *flow) Late() uint64 { return f.late.Load() }

func (f *flow) Release(id [8]byte) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if c := f.mine[id]; c != nil {
		f.all.release(id, c)
		delete(f.mine, id)
	}
}

// over says why the flow has ended.
func (f *flow) over() error {
	if err := f.link.reason(); err != nil {
		return err
	}
	return net.ErrClosed
}

// Send sends around quic-go. As with its packets, one that the kernel refuses
// for a reason that may pass counts as sent.
func (f *flow) Send(p []byte, to tunnel.Path) error {
	select {
	case <-f.link.conn.Context().Done():
		return f.over()
	default:
	}
	err := f.all.sender.SendFrom(p, to.Remote, to.Local)
	switch {
	case err == nil, err == tunnel.ErrBlocked, err == tunnel.ErrTooLarge:
		return err
	case passes(err):
		f.link.sock.failed.Add(1)
		return nil
	case errors.Is(err, net.ErrClosed):
		return f.over()
	}
	return err
}

func (f *flow) Path() tunnel.Path {
	path := tunnel.Path{Remote: f.link.RemoteAddr()}
	if f.all.local {
		path.Local = tunnel.AddrPortOf(f.link.conn.LocalAddr()).Addr()
	}
	return path
}

func (f *flow) ResetToken(id [8]byte) (token [16]byte, ok bool) {
	if f.all.key == nil {
		return token, false
	}
	return f.all.token(id), true
}

func (f *flow) WatchReset(token [16]byte, seen func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.all.unwatch(func(w *watch) bool { return w.flow == f && w.token == token })
	if seen == nil || f.ended {
		return
	}
	f.all.changes.Lock()
	defer f.all.changes.Unlock()
	var watches []*watch
	if old := f.all.watches.Load(); old != nil {
		watches = append(watches, *old...)
	}
	watches = append(watches, &watch{f, token, seen})
	f.all.watches.Store(&watches)
}
