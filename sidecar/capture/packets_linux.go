//go:build linux && (amd64 || arm64 || arm || riscv64)

package capture

import (
	"cmp"
	"errors"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"

	"culvert/tunnel"
)

// dnsPort is where name servers answer.
const dnsPort = 53

// A source is one local UDP socket of an app, and the association that is for it.
type source struct {
	c     *Capture
	app   netip.AddrPort
	first netip.AddrPort // where it sent to first

	out   atomic.Pointer[tunnel.Packets] // nil while it is being opened
	last  atomic.Int64                   // the tick of the last datagram, either way
	sent  atomic.Int64                   // that of the last one from the app
	heard atomic.Bool                    // something came back
	told  atomic.Uint64                  // how many errors the path has handed on
	asked dnsAsked

	born   uint64 // how many were before
	socket uint32 // the app's, as Config.Socket has named it; of the goroutine that sweeps
	ended  bool   // guarded by Capture.mu: not in its map any more
	once   sync.Once
}

// reader takes datagrams from one socket.
type reader struct {
	c       *Capture
	touched []*source // of this batch, which have to be flushed
}

// Take is for sockets that are not transparent.
func (r *reader) Take([]byte, netip.AddrPort) {}

// Failed is an error of a socket that sends nothing: there is none to expect.
func (r *reader) Failed() {}

// TakeFor passes one datagram on.
func (r *reader) TakeFor(p []byte, app, to netip.AddrPort) {
	c := r.c
	if !to.IsValid() || c.sockets.mine(to) {
		c.drops[dropNotCaptured].Add(1)
		c.tellUnreachable(app, to, reasonPort)
		return
	}
	s := c.source(app, to)
	if s == nil {
		return
	}
	out := s.out.Load()
	if out == nil {
		c.drops[dropOpening].Add(1)
		return
	}
	now := c.tick.Load()
	s.last.Store(now)
	s.sent.Store(now)
	target := tunnel.TargetOf(to)
	if to.Port() == dnsPort && c.cfg.DNS.IsValid() {
		s.asked.note(p, to)
		target = tunnel.TargetOf(c.cfg.DNS)
	}
	told := s.told.Load()
	err := (*out).Send(p, target)
	if !slices.Contains(r.touched, s) {
		r.touched = append(r.touched, s)
	}
	switch {
	case err == nil:
		c.up.Add(1)
	case errors.Is(err, tunnel.ErrTooLarge):
		c.drops[dropTooLarge].Add(1)
	case errors.Is(err, tunnel.PolicyDenied):
		c.drops[dropPolicy].Add(1)
	default:
		c.drops[dropRefused].Add(1)
	}
	if err != nil && !errors.Is(err, tunnel.ErrTooLarge) && s.told.Load() == told {
		// A stage of the path may have reported it before Send returned: of one
		// datagram an app hears once.
		c.tellUnreachable(app, to, reasonOf(err))
	}
}

// Flush ends a batch.
func (r *reader) Flush() {
	for i, s := range r.touched {
		(*s.out.Load()).Flush()
		r.touched[i] = nil
	}
	r.touched = r.touched[:0]
}

// source returns that of an app's socket, which it opens for the first datagram.
// nil: it was refused, and the app has been told.
func (c *Capture) source(app, to netip.AddrPort) *source {
	c.mu.Lock()
	s := c.sources[app]
	if s != nil || c.closed {
		c.mu.Unlock()
		return s
	}
	if !c.fresh.Allow() {
		c.mu.Unlock()
		c.refuse(app, to, tunnel.Errorf(tunnel.LimitExceeded, "more than %d new UDP sockets a second are captured", newSources))
		return nil
	}
	var gone []*source
	if len(c.sources) >= c.cfg.MaxSources {
		gone = c.evictLocked()
	}
	s = &source{c: c, app: app, first: to, born: c.associations}
	s.last.Store(c.tick.Load())
	s.sent.Store(c.tick.Load())
	c.sources[app] = s
	c.associations++
	c.wg.Add(1)
	c.mu.Unlock()
	for _, g := range gone {
		g.close()
	}

	out, err := c.cfg.Next.OpenPackets(tunnel.Peer{Addr: app, Held: true}, s)
	if err != nil {
		c.forget(s)
		c.wg.Done()
		c.refuse(app, to, err)
		return nil
	}
	s.out.Store(&out)
	c.mu.Lock()
	ended := s.ended
	c.mu.Unlock()
	if ended { // while it was being opened
		s.close()
		return nil
	}
	return s
}

// refuse refuses an association.
func (c *Capture) refuse(app, to netip.AddrPort, err error) {
	c.failed("UDP", app, to, err)
	c.tellUnreachable(app, to, reasonOf(err))
}

// evictLocked makes room: a sixteenth of all, so that a flood of new sources does
// not look at all of them for each. Those that have never had an answer go first,
// of them those that were used last the longest ago.
func (c *Capture) evictLocked() []*source {
	all := make([]*source, 0, len(c.sources))
	for _, s := range c.sources {
		all = append(all, s)
	}
	slices.SortFunc(all, func(a, b *source) int {
		if x, y := a.heard.Load(), b.heard.Load(); x != y {
			if x {
				return 1
			}
			return -1
		}
		return cmp.Or(cmp.Compare(a.last.Load(), b.last.Load()), cmp.Compare(a.born, b.born))
	})
	all = all[:(len(all)+15)/16]
	for _, s := range all {
		s.ended = true
		delete(c.sources, s.app)
	}
	c.evicted += uint64(len(all))
	return all
}

// sweep ends what has been idle, and what has no socket any more.
func (c *Capture) sweep(now int64) {
	var gone, silent []*source
	c.mu.Lock()
	for _, s := range c.sources {
		switch {
		case now-s.last.Load() > int64(c.cfg.Idle/tickTime):
			s.ended = true
			delete(c.sources, s.app)
			gone = append(gone, s)
		case c.cfg.Socket != nil && lookAt(now-s.sent.Load()):
			silent = append(silent, s)
		}
	}
	c.mu.Unlock()
	for _, s := range silent {
		if s.hasLeft() {
			c.forget(s)
			gone = append(gone, s)
		}
	}
	for _, s := range gone {
		s.close()
	}
}

// lookAt reports whether a socket is looked for that has sent nothing for so
// many ticks: soon, then seldom, since each time the kernel is asked.
func lookAt(silent int64) bool { return silent == 4 || silent == 8 || silent > 0 && silent%16 == 0 }

// hasLeft reports whether the app's socket is gone, or is another one that has
// come to the same address.
func (s *source) hasLeft() bool {
	socket, open := s.c.cfg.Socket(s.app, s.first)
	if s.socket == 0 {
		s.socket = socket
	}
	return !open || socket != 0 && socket != s.socket
}

// forget takes a source out of the map.
func (c *Capture) forget(s *source) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !s.ended {
		s.ended = true
		delete(c.sources, s.app)
	}
}

// close ends the association of a source that is not in the map any more. It does
// nothing while the association is being opened: who opens it sees that it ended.
func (s *source) close() {
	out := s.out.Load()
	if out == nil {
		return
	}
	s.once.Do(func() {
		go func() { // the caller may be the path, inside Closed
			(*out).Close()
			s.c.wg.Done()
		}()
	})
}

// Deliver hands one datagram to the app, as if it came from there. It never
// waits: what the socket does not take at once is dropped.
func (s *source) Deliver(p []byte, from netip.AddrPort) {
	c := s.c
	from = netip.AddrPortFrom(from.Addr().Unmap(), from.Port())
	if from == c.cfg.DNS {
		from = s.asked.server(p, from)
	}
	if !s.heard.Load() {
		s.heard.Store(true)
	}
	s.last.Store(c.tick.Load())
	b := packets.Get().(*packet)
	defer packets.Put(b)
	whole, ok := appendUDP(b.data[:0], from, s.app, p)
	switch {
	case ok:
	case from.Addr().Is4() != s.app.Addr().Is4():
		c.drops[dropFamily].Add(1)
		return
	default:
		c.drops[dropTooLarge].Add(1)
		return
	}
	switch err := c.sockets.send(whole, s.app.Addr()); {
	case err == nil:
		c.down.Add(1)
	case errors.Is(err, tunnel.ErrBlocked), errors.Is(err, syscall.ENOBUFS):
		c.drops[dropSocketFull].Add(1)
	case errors.Is(err, tunnel.ErrTooLarge):
		c.drops[dropTooLarge].Add(1)
	default:
		c.drops[dropSocketError].Add(1)
	}
}

// Unreachable hands an error on to the app.
func (s *source) Unreachable(to netip.AddrPort, err error) {
	if !to.IsValid() {
		return
	}
	to = netip.AddrPortFrom(to.Addr().Unmap(), to.Port())
	if to == s.c.cfg.DNS { // the app knows only the one that it has asked
		to = s.asked.last(to)
	}
	s.told.Add(1)
	s.c.tellUnreachable(s.app, to, reasonOf(err))
}

// Closed ends the source; the app's next datagram opens another.
func (s *source) Closed(err error) {
	s.c.forget(s)
	s.close()
}

// tellUnreachable tells an app's socket that an address does not take what it
// sends there.
func (c *Capture) tellUnreachable(app, to netip.AddrPort, why reason) {
	b := packets.Get().(*packet)
	defer packets.Put(b)
	if p, ok := appendUnreachable(b.data[:0], app, to, why); ok && c.sockets.send(p, app.Addr()) == nil {
		c.unreachable.Add(1)
	}
}

// packet holds one packet for an app.
type packet struct{ data [mostHeaders + 1<<16]byte }

// packets are shared by all associations of the process.
var packets = sync.Pool{New: func() any { return new(packet) }}

// dnsAsked remembers which server an app has asked, by the number of its query
// (RFC 1035 section 4.1.1), for the last few.
type dnsAsked struct {
	mu   sync.Mutex
	next int
	ring [16]struct {
		id       [2]byte
		answered bool
		server   netip.AddrPort
	}
}

func (d *dnsAsked) note(p []byte, server netip.AddrPort) {
	if len(p) < 2 {
		return
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	e := &d.ring[d.next]
	d.next = (d.next + 1) % len(d.ring)
	e.id, e.answered, e.server = [2]byte(p), false, server
}

// server returns whom the app has asked what p answers. Some resolvers send one
// query, with one number, to all servers at once: each of them answers once. Where
// too many have been asked since it is the one that was asked last; nobody: from.
func (d *dnsAsked) server(p []byte, from netip.AddrPort) netip.AddrPort {
	if len(p) < 2 {
		return from
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	var again netip.AddrPort
	for i := range d.ring { // the latest first
		e := &d.ring[(d.next-1-i+2*len(d.ring))%len(d.ring)]
		switch {
		case !e.server.IsValid() || e.id != [2]byte(p):
		case !e.answered:
			e.answered = true
			return e.server
		case !again.IsValid():
			again = e.server
		}
	}
	if again.IsValid() {
		return again
	}
	return d.lastLocked(from)
}

// last returns the server that was asked last; none: from.
func (d *dnsAsked) last(from netip.AddrPort) netip.AddrPort {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.lastLocked(from)
}

func (d *dnsAsked) lastLocked(from netip.AddrPort) netip.AddrPort {
	if e := d.ring[(d.next-1+len(d.ring))%len(d.ring)]; e.server.IsValid() {
		return e.server
	}
	return from
}
