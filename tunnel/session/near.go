package session

import (
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"culvert/tunnel"
	"culvert/tunnel/bulk"
	"culvert/tunnel/media"
	"culvert/tunnel/resume"
	"culvert/tunnel/wire"
)

// Near is the sidecar's end: an Opener whose traffic goes through whatever
// session is attached.
type Near struct {
	age   time.Duration
	drops media.Drops

	pacer  *bulk.Pacer
	memory *resume.Budget // of the streams of all sessions
	live   atomic.Bool    // a channel is live
	wanted chan struct{}  // capacity 1: Busy may have become true

	streamNumber atomic.Uint64
	streams      atomic.Int64
	opening      atomic.Int64  // streams that are being opened
	attached     atomic.Uint64 // sessions
	up, down     counter       // datagrams
	course       *course
	sUp, sDown   atomic.Uint64

	mu      sync.Mutex        // guards the fields below
	lost    map[string]uint64 // datagrams lost by the ways of past sessions, by reason
	assocs  map[uint32]*nearPackets
	nextID  uint32
	current *Attached
}

// nearMemory bounds what the streams of all sessions keep for the next
// connection, in bytes: 64 with a whole window.
const nearMemory = 256 << 20

type counter struct{ n, bytes atomic.Uint64 }

func (c *counter) add(n int) {
	c.n.Add(1)
	c.bytes.Add(uint64(n))
}

// NewNear makes a near end. age bounds how long a datagram may wait for a
// blocked way; 0 means media.MaxAge.
func NewNear(age time.Duration) *Near {
	return &Near{age: age, pacer: bulk.New(), memory: resume.NewBudget(nearMemory), wanted: make(chan struct{}, 1), course: &course{origin: time.Now()}, lost: map[string]uint64{}, assocs: map[uint32]*nearPackets{}}
}

// SetLive says whether a channel is live: bulk then gives way to it at both ends.
func (n *Near) SetLive(live bool) {
	n.live.Store(live)
	n.pacer.Live(live)
	if !live {
		return
	}
	n.want()
	if a, err := n.session(); err == nil {
		a.plane.reports.begin()
	}
}

func (n *Near) want() {
	select {
	case n.wanted <- struct{}{}:
	default:
	}
}

// Wanted receives when Busy may have become true. It is for one receiver.
func (n *Near) Wanted() <-chan struct{} { return n.wanted }

// Busy reports whether a call may be near: a channel is live, or an association
// is open.
func (n *Near) Busy() bool {
	if n.live.Load() {
		return true
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	return len(n.assocs) > 0
}

// Streaming reports whether streams are open or being opened.
func (n *Near) Streaming() bool { return n.streams.Load()+n.opening.Load() > 0 }

// Live returns what SetLive was last given.
func (n *Near) Live() bool { return n.live.Load() }

// Attached is a session, with the connections that serve it at the moment.
type Attached struct {
	near    *Near
	control *control
	plane   *plane
	share   *resume.Share // of the session's streams
	welcome wire.Welcome
	line    *nearLine     // under the control stream
	news    chan struct{} // capacity 1: something about a way is new
	going   chan struct{} // closed when the cloud proxy says that it is going
	goOnce  sync.Once
	renewed chan error // capacity 1: what became of the last token

	ctx  context.Context // ends with the session
	stop context.CancelCauseFunc
	work sync.WaitGroup // streams that seek a carrier

	mu       sync.Mutex // guards the fields below
	carriers []*serving // oldest first
	lines    map[*nearLine]struct{}
	prefer   tunnel.Carrier
	changed  chan struct{} // closed when carriers or prefer change, then replaced
}

// serving is a carrier that serves a session.
type serving struct {
	carrier tunnel.Carrier
	sealed  *media.Sealed // nil: there is none
}

// Attach makes a session, that welcome has opened, the one that traffic goes
// into: Prepare, and Adopt at once. Nothing passes before a carrier is added.
func (n *Near) Attach(welcome wire.Welcome) *Attached {
	a := n.Prepare(welcome)
	a.Adopt()
	return a
}

// Prepare makes a session, that welcome has opened, beside the one that traffic
// goes into, so that it can be served before traffic goes into it.
func (n *Near) Prepare(welcome wire.Welcome) *Attached {
	a := &Attached{
		near: n, control: newControl(), plane: newPlane(n.age, &n.drops, n.pacer), welcome: welcome,
		going: make(chan struct{}), renewed: make(chan error, 1), news: make(chan struct{}, 1), changed: make(chan struct{}), lines: map[*nearLine]struct{}{},
	}
	a.ctx, a.stop = context.WithCancelCause(context.Background())
	a.plane.live, a.plane.proved, a.plane.course = n.live.Load, a.tellNews, n.course
	a.share = n.memory.Share(a.underWay())
	a.line = a.newLine(controlNumber)
	n.attached.Add(1)
	return a
}

// underWay is how many bytes the session's streams keep for the next connection.
// As many may be under way, and the cloud proxy has to keep what nobody takes there.
func (a *Attached) underWay() int {
	if m := a.welcome.Limits.Memory; m > 0 {
		return min(m, nearMemory)
	}
	return nearMemory
}

// Adopt makes the session the one that traffic goes into. Associations of an
// earlier one are carried on, with other ports at the cloud proxy; what still
// comes for them by the earlier one is delivered until that calls Release, or
// ends. Its streams stay there.
func (a *Attached) Adopt() {
	n := a.near
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, p := range n.assocs {
		p.attach(a)
	}
	n.current = a
}

// Release lets go of the associations that another session has taken over. The
// cloud proxy is told.
func (a *Attached) Release() {
	n := a.near
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, p := range n.assocs {
		if l := p.before; l != nil && l.plane == a.plane {
			p.before = nil
			l.plane.remove(l)
			a.control.send(wire.Message{Closed: &wire.Closed{Association: p.id}})
		}
	}
}

// Streams is how many streams of apps the session carries.
func (a *Attached) Streams() int {
	a.mu.Lock()
	defer a.mu.Unlock()
	n := 0
	for line := range a.lines {
		if line.number != controlNumber {
			n++
		}
	}
	return n
}

// AddCarrier makes a carrier, whose Open or Join has been granted, serve the
// session, with its ways for datagrams in the place of an older carrier's.
// sealed is what Welcome has said of sealed packets on this connection.
func (a *Attached) AddCarrier(c tunnel.Carrier, sealed *wire.Sealed) error {
	s, err := newSealed(c, a.welcome.Session, sealed, true, func() {
		c.Close(tunnel.Errorf(tunnel.CloudUnreachable, "the cloud proxy has been restarted"))
	})
	if err != nil {
		return err
	}
	a.put(wire.WayDatagram, c.Datagrams())
	if s != nil {
		a.put(wire.WaySealed, s)
	}
	a.mu.Lock()
	a.carriers = append(a.carriers, &serving{c, s})
	a.tellChangedLocked()
	a.mu.Unlock()
	return nil
}

// put makes w the only transport of its kind.
func (a *Attached) put(kind wire.Way, w tunnel.Way) {
	if w == nil {
		return
	}
	older := a.plane.transports(kind)
	a.plane.addWay(kind, w)
	for _, t := range older {
		a.plane.removeWay(kind, t)
	}
}

// RemoveCarrier takes a carrier out. Streams on it continue on another one
// once the carrier has been closed, which is the caller's to do.
func (a *Attached) RemoveCarrier(c tunnel.Carrier) {
	a.mu.Lock()
	i := slices.IndexFunc(a.carriers, func(s *serving) bool { return s.carrier == c })
	if i < 0 {
		a.mu.Unlock()
		return
	}
	s := a.carriers[i]
	a.carriers = slices.Delete(a.carriers, i, i+1)
	if a.prefer == c {
		a.prefer = nil
	}
	a.tellChangedLocked()
	a.mu.Unlock()
	if w := c.Datagrams(); w != nil {
		a.plane.removeWay(wire.WayDatagram, w)
	}
	if s.sealed != nil {
		a.plane.removeWay(wire.WaySealed, s.sealed)
		s.sealed.Close()
	}
}

func (a *Attached) tellChangedLocked() {
	close(a.changed)
	a.changed = make(chan struct{})
}

func (a *Attached) tellNews() {
	select {
	case a.news <- struct{}{}:
	default:
	}
}

// News receives when a probe has been answered.
func (a *Attached) News() <-chan struct{} { return a.news }

// AddLane makes a lane that has joined the session one of its ways.
func (a *Attached) AddLane(l tunnel.Lane) { a.plane.addWay(wire.WayLanes, l) }

// RemoveLane takes a lane out that has ended.
func (a *Attached) RemoveLane(l tunnel.Lane) { a.plane.removeWay(wire.WayLanes, l) }

// Use says how datagrams go from now on, in both directions: by the way first,
// and sound, STUN and RTCP by also too unless it is wire.NoWay. The cloud proxy learns it with the
// next probe or report; a probe is sent at once.
func (a *Attached) Use(first, also wire.Way) {
	a.plane.say(first, also)
	a.Probe(first, false)
}

// Probe asks whether records arrive by a way and back: a short one, or the
// longest that the way takes in one packet. The answer shows in Way.
func (a *Attached) Probe(kind wire.Way, large bool) {
	p := a.plane
	p.mu.RLock()
	y, use := p.ways[kind], p.said
	p.mu.RUnlock()
	if y != nil {
		y.probe(large, use)
	}
}

// Load asks whether a way carries more than single probes: it sends n of the
// longest that the way takes in one packet, with answers as long. begin makes
// them the first of another load. How many were answered shows in Way.
func (a *Attached) Load(kind wire.Way, n int, begin bool) {
	p := a.plane
	p.mu.RLock()
	y, use := p.ways[kind], p.said
	p.mu.RUnlock()
	if y != nil {
		y.load(n, begin, use)
	}
}

// LoadSize is how long a probe of a load is at most, in bytes.
const LoadSize = largeProbe

// Reporting says whether reports have flowed for long enough that the peer's
// must have come, since datagrams flow.
func (a *Attached) Reporting() bool { return a.plane.reports.flowing() }

// Told says that what a way has taken in vain has been told of: when the way ends
// it is not lost once more.
func (a *Attached) Told(kind wire.Way) {
	p := a.plane
	p.mu.RLock()
	y := p.ways[kind]
	p.mu.RUnlock()
	if y != nil {
		y.passage.tell()
	}
}

// Way tells what is known about a way.
func (a *Attached) Way(kind wire.Way) WayState { return a.plane.state(kind) }

// Prefer makes streams go by a carrier that has been added, for as long as it
// serves; those on others move. nil: new streams go by the newest.
func (a *Attached) Prefer(c tunnel.Carrier) {
	a.mu.Lock()
	if a.prefer == c {
		a.mu.Unlock()
		return
	}
	a.prefer = c
	a.tellChangedLocked()
	var move []*nearLine
	for line := range a.lines {
		if c != nil && line.by != c && line.number != controlNumber {
			move = append(move, line)
		}
	}
	a.mu.Unlock()
	for _, line := range move {
		a.seek(line)
	}
}

// pick returns the carrier for a stream, other than avoid where that can be;
// nil: there is none.
func (a *Attached) pick(avoid tunnel.Carrier) tunnel.Carrier {
	a.mu.Lock()
	defer a.mu.Unlock()
	var best tunnel.Carrier
	for _, s := range a.carriers {
		switch c := s.carrier; {
		case c.Err() != nil:
		case best == nil, best == avoid, c != avoid && best != a.prefer:
			best = c
		}
	}
	return best
}

// carrier is pick, and waits until there is one.
func (a *Attached) carrier(ctx context.Context, avoid tunnel.Carrier) (tunnel.Carrier, error) {
	for {
		a.mu.Lock()
		changed := a.changed
		a.mu.Unlock()
		if a.ctx.Err() != nil {
			return nil, context.Cause(a.ctx)
		}
		if c := a.pick(avoid); c != nil {
			return c, nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		case <-a.ctx.Done():
			return nil, context.Cause(a.ctx)
		}
	}
}

// Going is closed when the cloud proxy has said that it is about to stop.
func (a *Attached) Going() <-chan struct{} { return a.going }

// Run serves the session until it ends: by End, or at the cloud proxy's word.
// It returns why; the carriers are still the caller's to remove and to close.
func (a *Attached) Run() error {
	unhook := context.AfterFunc(a.ctx, func() { a.expireLines(context.Cause(a.ctx)) })
	defer unhook()
	a.seek(a.line)
	err := a.control.run(a.line, a.welcome.Version, a.ctx.Done(), a.handle)
	switch {
	case a.ctx.Err() != nil:
		err = context.Cause(a.ctx)
	case err == io.EOF: // which would be an orderly end of each stream
		err = tunnel.Errorf(tunnel.CloudUnreachable, "the cloud proxy ended the session")
	}
	a.mu.Lock()
	a.stop(err) // within mu, so that nothing seeks a carrier afterwards
	a.mu.Unlock()
	a.expireLines(err)
	n := a.near
	n.mu.Lock()
	if n.current == a {
		n.current = nil
	}
	n.mu.Unlock()
	a.plane.close()
	a.Release()
	a.work.Wait()
	n.mu.Lock()
	a.plane.lostTo(n.lost)
	n.mu.Unlock()
	return err
}

// End ends the session at this end; streams end with why. The cloud proxy holds
// it until nothing has served it for some time.
func (a *Attached) End(why error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.stop(why)
}

// Err is why the session ends or has ended at this end, as soon as that is known;
// nil: it goes on.
func (a *Attached) Err() error { return context.Cause(a.ctx) }

// Renew brings another token for the session to the cloud proxy. Renewed tells
// what comes of it.
func (a *Attached) Renew(token string) {
	a.control.send(wire.Message{Renew: &wire.Renew{Token: token}})
}

// Renewed receives what became of a token; nil: the session has it.
func (a *Attached) Renewed() <-chan error { return a.renewed }

// Leave tells the cloud proxy that the session is needed no longer. Run returns
// when it has agreed.
func (a *Attached) Leave() { a.control.send(wire.Message{End: &wire.End{}}) }

func (a *Attached) handle(m wire.Message) error {
	switch {
	case m.Closed != nil:
		a.near.end(a, m.Closed.Association, m.Closed.Err())
	case m.End != nil:
		why := m.End.Err()
		if why != nil { // nil: it has agreed to ours
			a.End(why) // before the cloud proxy sees that we have gone, and closes its connections
		}
		return why
	case m.GoAway != nil:
		a.goOnce.Do(func() { close(a.going) })
	case m.Renewed != nil:
		select {
		case a.renewed <- m.Renewed.Err():
		default: // nobody wants to know
		}
	}
	return nil // other messages come from a newer minor version
}

// end ends one association at the word of the session's far end, if that has it.
func (n *Near) end(a *Attached, id uint32, why error) {
	n.mu.Lock()
	p := n.assocs[id]
	if p != nil && p.leg.Load().plane != a.plane { // another session has it by now
		n.mu.Unlock()
		return
	}
	delete(n.assocs, id)
	n.mu.Unlock()
	if p == nil {
		return
	}
	if why == nil {
		why = tunnel.Errorf(tunnel.SessionExpired, "the cloud proxy ended the association; the app can open another")
	}
	p.finish(why)
}

// EndAll ends every association with the error; for the end of the link.
func (n *Near) EndAll(why error) {
	n.mu.Lock()
	all := n.assocs
	n.assocs = map[uint32]*nearPackets{}
	n.mu.Unlock()
	for _, p := range all {
		p.finish(why)
	}
}

func (n *Near) session() (*Attached, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.current == nil {
		return nil, noSession()
	}
	return n.current, nil
}

func noSession() error {
	return tunnel.Errorf(tunnel.CloudUnreachable, "there is no connection to the cloud proxy at the moment; Culvert keeps trying, 'culvert status' says why")
}

// openTries bounds the carriers on which one stream is tried.
const openTries = 3

// OpenStream implements tunnel.Opener. While the session has no carrier it
// waits for one.
func (n *Near) OpenStream(ctx context.Context, _ tunnel.Peer, to tunnel.Target) (tunnel.Stream, error) {
	a, err := n.session()
	if err != nil {
		return nil, err
	}
	n.opening.Add(1)
	defer n.opening.Add(-1)
	n.want()
	for try := 1; ; try++ {
		s, c, err := a.openStream(ctx, to)
		if err == nil {
			n.streams.Add(1)
			return &nearStream{Stream: n.pacer.Wrap(s), near: n}, nil
		}
		if c == nil || c.Err() == nil || ctx.Err() != nil || try == openTries {
			return nil, streamError(ctx, to, err)
		}
	}
}

// openStream opens a stream on one carrier, which it returns too where there
// was one.
func (a *Attached) openStream(ctx context.Context, to tunnel.Target) (tunnel.Stream, tunnel.Carrier, error) {
	c, err := a.carrier(ctx, nil)
	if err != nil {
		return nil, nil, err
	}
	host := to.Host
	if host == "" {
		host = to.Addr.String()
	}
	number := a.near.streamNumber.Add(1)
	under, m, err := a.ask(ctx, c, wire.Message{Stream: &wire.Stream{Number: number, Host: host, Port: to.Port}})
	if err != nil {
		return nil, c, err
	}
	if m.Opened == nil {
		err := tunnel.Errorf(tunnel.Internal, "the cloud proxy answered a stream with something else; update the older side")
		under.Abort(err)
		return nil, c, err
	}
	line := a.newLine(number)
	a.mu.Lock()
	line.by = c
	moved := a.prefer != nil && a.prefer != c
	a.mu.Unlock()
	if err := line.Attach(under, 0); err != nil {
		return nil, c, err
	}
	if moved { // meanwhile
		a.seek(line)
	}
	return line, c, nil
}

func streamError(ctx context.Context, to tunnel.Target, err error) error {
	var e *tunnel.Error
	switch {
	case ctx.Err() != nil:
		return context.Cause(ctx)
	case errors.As(err, &e):
		return err
	}
	return tunnel.Errorf(tunnel.CloudUnreachable, "the connection to the cloud proxy broke while %s was being opened; try again: %w", to, err)
}

// nearStream counts.
type nearStream struct {
	tunnel.Stream
	near *Near
	once sync.Once
}

func (s *nearStream) Read(p []byte) (int, error) {
	n, err := s.Stream.Read(p)
	s.near.sDown.Add(uint64(n))
	return n, err
}

func (s *nearStream) Write(p []byte) (int, error) {
	n, err := s.Stream.Write(p)
	s.near.sUp.Add(uint64(n))
	return n, err
}

func (s *nearStream) Close() error {
	s.once.Do(func() { s.near.streams.Add(-1) })
	return s.Stream.Close()
}

func (s *nearStream) Abort(err error) {
	s.once.Do(func() { s.near.streams.Add(-1) })
	s.Stream.Abort(err)
}

// OpenPackets implements tunnel.Opener. Nothing is sent: the far end opens the
// association when its first datagram arrives.
func (n *Near) OpenPackets(by tunnel.Peer, r tunnel.Receiver) (tunnel.Packets, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.current == nil {
		return nil, noSession()
	}
	if limit := n.current.welcome.Limits.Associations; limit > 0 && len(n.assocs) >= limit {
		return nil, tunnel.Errorf(tunnel.LimitExceeded, "the cloud proxy allows %d associations in a session and all are in use; close some, or have the limit raised", limit)
	}
	n.nextID++
	p := &nearPackets{near: n, id: n.nextID, by: by, r: r}
	p.attach(n.current)
	n.assocs[p.id] = p
	if len(n.assocs) == 1 {
		n.want()
	}
	return p, nil
}

// nearPackets is an association. Its leg is that of the current session.
type nearPackets struct {
	near *Near
	id   uint32
	by   tunnel.Peer
	r    tunnel.Receiver
	leg  atomic.Pointer[leg]
	// before is the leg of the session before, by which something may still come;
	// nil: none. Guarded by near.mu.
	before *leg
}

// attach moves the association to a session. near.mu is held.
func (p *nearPackets) attach(a *Attached) {
	l := a.plane.add(&leg{plane: a.plane, id: p.id, held: p.by.Held, deliver: p.deliver, unreachable: p.unreachable})
	if p.before != nil {
		p.before.plane.remove(p.before)
	}
	p.before = p.leg.Swap(l)
}

// forget takes the leg of the session before out. near.mu is not held.
func (p *nearPackets) forget() *leg {
	p.near.mu.Lock()
	defer p.near.mu.Unlock()
	l := p.before
	p.before = nil
	if l != nil && !l.plane.remove(l) {
		return nil
	}
	return l
}

func (p *nearPackets) deliver(b []byte, at tunnel.Target) {
	p.near.down.add(len(b))
	p.r.Deliver(b, at.AddrPort())
}

func (p *nearPackets) unreachable(at netip.AddrPort, err error) {
	where := "a destination"
	if at.IsValid() {
		where = at.String()
	}
	p.r.Unreachable(at, tunnel.Errorf(tunnel.CodeOf(err), "the cloud proxy could not deliver to %s", where))
}

// finish ends the association and says so to the receiver, after the last
// deliver.
func (p *nearPackets) finish(why error) {
	before := p.forget()
	l := p.leg.Load()
	if l.plane.remove(l) {
		l.wait()
		if before != nil {
			before.wait()
		}
		p.r.Closed(why)
	}
}

func (p *nearPackets) Send(b []byte, to tunnel.Target) error {
	err := p.leg.Load().send(b, to)
	if err == nil {
		p.near.up.add(len(b))
	}
	return err
}

func (p *nearPackets) Flush() {}

func (p *nearPackets) Close() error {
	n := p.near
	n.mu.Lock()
	_, open := n.assocs[p.id]
	delete(n.assocs, p.id)
	current := n.current
	n.mu.Unlock()
	if !open {
		return net.ErrClosed
	}
	p.forget()
	l := p.leg.Load()
	l.plane.remove(l)
	if current != nil && current.plane == l.plane {
		current.control.send(wire.Message{Closed: &wire.Closed{Association: p.id}})
	}
	return nil
}

// Stats returns the counters since NewNear.
func (n *Near) Stats() tunnel.LinkStats {
	s := tunnel.LinkStats{
		Streams:     int(n.streams.Load()),
		DatagramsUp: n.up.n.Load(), DatagramsDown: n.down.n.Load(),
		DatagramBytesUp: n.up.bytes.Load(), DatagramBytesDn: n.down.bytes.Load(),
		StreamBytesUp: n.sUp.Load(), StreamBytesDown: n.sDown.Load(),
		Dropped:  map[string]uint64{},
		Connects: n.attached.Load(),
	}
	n.drops.AddTo(s.Dropped)
	n.mu.Lock()
	s.Associations = len(n.assocs)
	for reason, lost := range n.lost {
		s.Dropped[reason] += lost
	}
	current := n.current
	n.mu.Unlock()
	if current != nil {
		if u := current.plane.using.Load(); u != nil {
			s.RTT = u.first.state(time.Now()).RTT
		}
		if c := current.pick(nil); s.RTT == 0 && c != nil {
			s.RTT = c.Stats().RTT
		}
		current.plane.lostTo(s.Dropped)
	}
	return s
}
