package session

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/time/rate"

	"culvert/tunnel"
	"culvert/tunnel/bulk"
	"culvert/tunnel/media"
	"culvert/tunnel/resume"
	"culvert/tunnel/wire"
)

// Limits bound one session at the cloud proxy. Zero fields take the defaults.
type Limits struct {
	Associations   int // at once; default 10,000
	Streams        int // at once; default 4,096
	OpensPerSecond int // of both together, with a burst of as many; default 1,000
	StreamMemory   int // bytes that all its streams keep for the next connection; default resume.DefaultShare
}

func (l Limits) withDefaults() Limits {
	for _, f := range []struct {
		field *int
		def   int
	}{{&l.Associations, 10_000}, {&l.Streams, 4096}, {&l.OpensPerSecond, 1000}, {&l.StreamMemory, resume.DefaultShare}} {
		if *f.field <= 0 {
			*f.field = f.def
		}
	}
	return l
}

// Or returns l with its zero fields taken from m.
func (l Limits) Or(m Limits) Limits {
	for _, f := range []struct {
		field *int
		or    int
	}{{&l.Associations, m.Associations}, {&l.Streams, m.Streams}, {&l.OpensPerSecond, m.OpensPerSecond}, {&l.StreamMemory, m.StreamMemory}} {
		if *f.field == 0 {
			*f.field = f.or
		}
	}
	return l
}

// asks bounds what a sidecar may ask for on its carriers: far more than its
// streams, since each of them asks again after a loss. A sidecar beyond it is cut.
func (l Limits) asks() *rate.Limiter {
	return rate.NewLimiter(rate.Limit(4*l.OpensPerSecond), 4*(l.OpensPerSecond+l.Streams))
}

// says bounds what a sidecar may say on its control stream: far more than the end
// of each association that it may open, at once and over time. A sidecar beyond it
// is cut.
func (l Limits) says() *rate.Limiter {
	return rate.NewLimiter(rate.Limit(max(4*l.OpensPerSecond, 2*renewCost)), max(4*(l.OpensPerSecond+l.Associations), 10*renewCost))
}

// renewCost is as how many messages a renewal counts, which may be 16 KiB long.
const renewCost = 100

// abortRate and abortBurst bound the streams that end before they have said what
// they are for: those of apps that change their mind within a round trip.
const abortRate, abortBurst = 100, 1000

// FarConfig is what a far end needs. Next is required.
type FarConfig struct {
	Next   tunnel.Opener // where the session's traffic goes
	Peer   tunnel.Peer   // who the session's traffic is for
	Peered wire.Version  // the sidecar's version
	Limits Limits
	Age    time.Duration  // how long a datagram may wait; 0: media.MaxAge
	ID     string         // the session's
	Memory *resume.Budget // of the streams of all sessions of the process; nil: Limits.StreamMemory alone bounds them
	Hold   time.Duration  // how long the session lives without any connection; 0: DefaultHold
	// Renew takes another token for the session, or says why not; nil: none is taken.
	Renew func(token string) error
	Ended func(error) // called once, on its own goroutine, when the session has ended; may be nil
}

// errEnded is why a session ends that its sidecar needs no longer.
var errEnded = tunnel.Errorf(tunnel.ProxyStopped, "the sidecar has stopped")

// DefaultHold is how long a session lives without any connection.
const DefaultHold = time.Minute

// Far is the cloud proxy's end of a session.
type Far struct {
	cfg    FarConfig
	drops  media.Drops
	plane  *plane
	opens  *rate.Limiter
	renew  *rate.Limiter
	says   *rate.Limiter // control messages
	asks   *rate.Limiter // streams of carriers, whatever they are for
	aborts *rate.Limiter // those of them that have not said what they are for
	pacer  *bulk.Pacer
	share  *resume.Share // of what streams have sent, and kept of what has come
	kept   *resume.Share

	control  *control
	ending   atomic.Pointer[tunnel.Error] // why the sidecar has been told to go; nil: it has not
	draining atomic.Bool
	streams  atomic.Int64

	ctx  context.Context // ends with the session
	stop context.CancelCauseFunc
	work sync.WaitGroup // what lives as long as the session may

	mu     sync.Mutex              // guards the fields below
	served int                     // connections that serve the session
	hold   *time.Timer             // ends the session while served is 0
	lines  map[uint64]*resume.Conn // streams by number, the control stream's is 0
	assocs map[uint32]*farPackets
	// ended remembers associations for as long as a record of theirs may still
	// be under way, so that it does not open them again. Oldest first.
	ended     map[uint32]struct{}
	endedList []endedID
}

type endedID struct {
	id   uint32
	when time.Time
}

// NewFar starts a session's far end.
func NewFar(cfg FarConfig) *Far {
	cfg.Limits = cfg.Limits.withDefaults()
	f := &Far{
		cfg: cfg, control: newControl(),
		opens: rate.NewLimiter(rate.Limit(cfg.Limits.OpensPerSecond), cfg.Limits.OpensPerSecond), renew: rate.NewLimiter(1, 2), says: cfg.Limits.says(), asks: cfg.Limits.asks(), aborts: rate.NewLimiter(abortRate, abortBurst),
		lines: map[uint64]*resume.Conn{}, assocs: map[uint32]*farPackets{}, ended: map[uint32]struct{}{},
	}
	if cfg.Memory == nil {
		cfg.Memory = resume.NewBudget(cfg.Limits.StreamMemory)
	}
	f.share, f.kept = cfg.Memory.Share(cfg.Limits.StreamMemory), cfg.Memory.Share(cfg.Limits.StreamMemory)
	if f.cfg.Hold <= 0 {
		f.cfg.Hold = DefaultHold
	}
	f.ctx, f.stop = context.WithCancelCause(context.Background())
	f.hold = time.AfterFunc(f.cfg.Hold, f.expire)
	context.AfterFunc(f.ctx, func() {
		f.expireLines(context.Cause(f.ctx))
		f.work.Wait()
		if f.cfg.Ended != nil {
			f.cfg.Ended(context.Cause(f.ctx))
		}
	})
	f.pacer = bulk.New()
	f.plane = newPlane(cfg.Age, &f.drops, f.pacer)
	f.plane.open, f.plane.told = f.open, f.pacer.Live
	return f
}

// Limits returns the limits in force, for Welcome.
func (f *Far) Limits() wire.Limits {
	// Half of what there is: 64 KiB of each stream come on top.
	return wire.Limits{Associations: f.cfg.Limits.Associations, Streams: f.cfg.Limits.Streams, Memory: f.cfg.Limits.StreamMemory / 2}
}

// Serve serves the session over a carrier, beside others, until the carrier or
// the session has ended, and everything on the carrier with it. A session that
// is served by nothing lives on for FarConfig.Hold. sealed is this connection's
// way for sealed packets, which ends with it; nil: there is none.
func (f *Far) Serve(c tunnel.Carrier, sealed *media.Sealed) error {
	if sealed != nil {
		defer sealed.Close()
	}
	if !f.enter() {
		c.Close(context.Cause(f.ctx))
		return context.Cause(f.ctx)
	}
	defer f.leave()
	unhook := context.AfterFunc(f.ctx, func() { c.Close(context.Cause(f.ctx)) })
	defer unhook()
	if w := c.Datagrams(); w != nil {
		defer f.plane.succeed(wire.WayDatagram, w)()
	}
	if sealed != nil {
		defer f.plane.succeed(wire.WaySealed, sealed)()
	}
	var streams sync.WaitGroup
	var err error
	for {
		var s tunnel.Stream
		if s, err = c.AcceptStream(f.ctx); err != nil {
			break
		}
		if !f.asks.Allow() {
			why := tunnel.Errorf(tunnel.LimitExceeded, "the sidecar opens streams far faster than %d a second", f.cfg.Limits.OpensPerSecond)
			s.Abort(why)
			f.endFlood(why)
			err = why
			break
		}
		streams.Go(func() {
			if f.serveStream(s) || c.Err() != nil || f.aborts.Allow() {
				return
			}
			why := tunnel.Errorf(tunnel.LimitExceeded, "the sidecar opens streams and ends them unused more than %d times a second", abortRate)
			f.endFlood(why)
			c.Close(why)
		})
	}
	if f.ctx.Err() != nil {
		err = context.Cause(f.ctx) // why we end it, which the peer is told
	} else if cause := c.Err(); cause != nil {
		err = cause
	}
	f.endFlood(c.Err())
	c.Close(err)
	streams.Wait()
	return err
}

// endFlood ends the session where a connection was cut for what its peer asks of
// us: else it would come again at once.
func (f *Far) endFlood(why error) {
	if cause, ok := errors.AsType[*tunnel.Error](why); ok && cause.Code == tunnel.LimitExceeded {
		f.endWithin(cause, endTime/2) // a tenant that floods is cut within a second in all
	}
}

// ServeLane carries the session's datagrams over a lane until the lane or the
// session ends.
func (f *Far) ServeLane(l tunnel.Lane) error {
	if !f.enter() {
		l.Close(context.Cause(f.ctx))
		return context.Cause(f.ctx)
	}
	defer f.leave()
	f.plane.addWay(wire.WayLanes, l)
	select {
	case <-l.Done():
	case <-f.ctx.Done():
		l.Close(context.Cause(f.ctx))
	}
	f.plane.removeWay(wire.WayLanes, l)
	f.endFlood(l.Err())
	return l.Err()
}

// enter counts a connection in. It reports false when the session has ended.
func (f *Far) enter() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.ctx.Err() != nil {
		return false
	}
	f.served++
	f.hold.Stop()
	return true
}

// leave counts it out.
func (f *Far) leave() {
	f.mu.Lock()
	f.served--
	gone := f.served == 0 && f.ctx.Err() == nil
	why := f.ending.Load()
	if gone && why == nil {
		f.hold.Reset(f.cfg.Hold)
	}
	f.mu.Unlock()
	if gone && why != nil {
		f.Close(why) // nobody is left who could be told
	}
}

// expire ends a session that nothing has served for its time.
func (f *Far) expire() {
	f.mu.Lock()
	served := f.served
	f.mu.Unlock()
	if served == 0 {
		f.Close(tunnel.Errorf(tunnel.SessionExpired, "the sidecar had no connection for %v", f.cfg.Hold))
	}
}

// Close ends the session: associations and streams end, and Serve returns. It
// does not wait for that. Closing again does nothing.
func (f *Far) Close(why error) {
	if why == nil {
		why = context.Canceled
	}
	f.mu.Lock()
	f.stop(why) // within mu, so that spawn starts nothing afterwards
	f.hold.Stop()
	all := f.assocs
	f.assocs = nil
	f.mu.Unlock()
	f.plane.close()
	for _, p := range all {
		f.plane.remove(p.leg)
		p.next.Close()
	}
}

// End tells the sidecar that the session ends, and why. Close follows when the
// sidecar has gone, or after a second.
func (f *Far) End(why *tunnel.Error) { f.endWithin(why, endTime) }

func (f *Far) endWithin(why *tunnel.Error, within time.Duration) {
	f.ending.Store(why)
	f.control.send(wire.Message{End: &wire.End{Code: why.Code, Text: why.Text}})
	timer := time.AfterFunc(within, func() { f.Close(why) })
	context.AfterFunc(f.ctx, func() { timer.Stop() })
}

// Done is closed when the session has ended.
func (f *Far) Done() <-chan struct{} { return f.ctx.Done() }

// Drain refuses what is new from now on and tells the sidecar.
func (f *Far) Drain(within time.Duration) {
	if !f.draining.Swap(true) {
		f.control.send(wire.Message{GoAway: &wire.GoAway{Within: wire.Seconds(within / time.Second)}})
	}
}

// Live is the number of associations and streams.
func (f *Far) Live() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return len(f.assocs) + int(f.streams.Load())
}

// Drops adds the session's dropped datagrams to m, by reason.
func (f *Far) Drops(m map[string]uint64) {
	f.drops.AddTo(m)
	f.plane.lostTo(m)
}

// admit says whether something new may start.
func (f *Far) admit(live, limit int, what string) error {
	switch {
	case f.draining.Load():
		return tunnel.Errorf(tunnel.CloudUnreachable, "the cloud proxy is about to stop and takes nothing new; Culvert connects again by itself")
	case live >= limit:
		return tunnel.Errorf(tunnel.LimitExceeded, "the session has its limit of %d %s; close some, or have the limit raised", limit, what)
	}
	return nil
}

// openingTime bounds how long a new stream may take to say what it is for.
const openingTime = 10 * time.Second

// serveStream serves what a stream is for. It reports false where the stream has
// not said that.
func (f *Far) serveStream(s tunnel.Stream) bool {
	s.SetReadDeadline(time.Now().Add(openingTime))
	m, err := wire.Read(s, f.cfg.Peered)
	s.SetReadDeadline(time.Time{})
	switch {
	case err != nil:
		s.Abort(err)
		return false
	case m.Control != nil:
		f.beginControl()
		f.goOn(s, controlNumber, m.Control.Received)
	case m.Resume != nil && m.Resume.Number != controlNumber:
		f.goOn(s, m.Resume.Number, m.Resume.Received)
	case m.Stream != nil && m.Stream.Number != controlNumber:
		f.serveTarget(s, m.Stream)
	default:
		s.Abort(tunnel.Errorf(tunnel.Internal, "the stream begins with a message that does not belong there"))
		return false
	}
	return true
}

// refuse answers no and ends the stream.
func refuse(s tunnel.Stream, why error) {
	if wire.Write(s, wire.RefusedBy(why)) != nil {
		s.Abort(why)
		return
	}
	s.Close()
}

func (f *Far) handle(m wire.Message) error {
	cost := 1
	if m.Renew != nil {
		cost = renewCost
	}
	switch {
	case !f.says.AllowN(time.Now(), cost):
		return tunnel.Errorf(tunnel.LimitExceeded, "the sidecar says far more on its control stream than %d associations a second give reason to", f.cfg.Limits.OpensPerSecond)
	case m.End != nil:
		return errEnded
	case m.Renew != nil:
		f.control.send(wire.Message{Renewed: f.renewBy(m.Renew.Token)})
		return nil
	case m.Closed == nil:
		return nil // of a newer minor version
	}
	f.mu.Lock()
	p := f.assocs[m.Closed.Association]
	if p == nil { // its first datagram is still under way, or being opened
		f.endLocked(m.Closed.Association)
	}
	f.mu.Unlock()
	if p != nil && f.forget(p) {
		p.next.Close()
	}
	return nil
}

// renewBy answers a renewal.
func (f *Far) renewBy(token string) *wire.Renewed {
	err := error(tunnel.Errorf(tunnel.Unsupported, "the cloud proxy takes no other token for a session"))
	switch {
	case f.cfg.Renew == nil:
	case !f.renew.Allow():
		err = tunnel.Errorf(tunnel.LimitExceeded, "the sidecar renews its token more than once a second")
	default:
		err = f.cfg.Renew(token)
	}
	if err == nil {
		return &wire.Renewed{}
	}
	r := wire.RefusedBy(err).Refused
	return &wire.Renewed{Code: r.Code, Text: r.Text}
}

// serveTarget connects a stream to its target. From then on it does not need
// the carrier that it came by.
func (f *Far) serveTarget(s tunnel.Stream, want *wire.Stream) {
	n := f.streams.Add(1)
	early := &earlyStream{Stream: s}
	out, err := f.reach(int(n), early, want)
	if err != nil {
		f.streams.Add(-1)
		refuse(s, err)
		return
	}
	line, err := f.addLine(want.Number, func(line *resume.Conn) {
		defer f.streams.Add(-1)
		unhook := context.AfterFunc(f.ctx, func() { out.Abort(context.Cause(f.ctx)) })
		defer unhook()
		tunnel.Splice(f.pacer.Wrap(line), out)
	})
	if err != nil {
		f.streams.Add(-1)
		out.Abort(err)
		refuse(s, err)
		return
	}
	if wire.Write(s, wire.Message{Opened: &wire.Opened{}}) != nil || line.Attach(early, 0) != nil {
		line.Expire(tunnel.Errorf(tunnel.CloudUnreachable, "the sidecar was lost while the stream was being opened")) // it does not know of this stream
	}
}

// reach opens what a stream is for. It is the n-th at the moment.
func (f *Far) reach(n int, early *earlyStream, want *wire.Stream) (tunnel.Stream, error) {
	to, err := target(want)
	if err == nil {
		err = f.admit(n-1, f.cfg.Limits.Streams, "streams")
	}
	if err == nil && !f.opens.Allow() {
		err = tunnel.Errorf(tunnel.LimitExceeded, "the session opens more than %d streams and associations a second; slow down, or have the limit raised", f.cfg.Limits.OpensPerSecond)
	}
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(f.ctx)
	defer cancel()
	defer early.watch(cancel)()
	return f.cfg.Next.OpenStream(ctx, f.cfg.Peer, to)
}

func target(want *wire.Stream) (tunnel.Target, error) {
	if want.Port == 0 || want.Host == "" || len(want.Host) > 255 {
		return tunnel.Target{}, tunnel.Errorf(tunnel.Unsupported, "%q port %d is not a destination", want.Host, want.Port)
	}
	if a, err := netip.ParseAddr(want.Host); err == nil {
		return tunnel.Target{Addr: a, Port: want.Port}, nil
	}
	return tunnel.Target{Host: want.Host, Port: want.Port}, nil
}

// earlyStream watches a stream while its target is being reached: the sidecar
// sends nothing before Opened, so whatever a Read returns is either a byte
// ahead of its time, which is kept, or the news that the app has gone.
type earlyStream struct {
	tunnel.Stream
	early []byte
}

// watch cancels when the peer aborts. The returned function ends the watch.
func (e *earlyStream) watch(cancel func()) func() {
	done := make(chan struct{})
	go func() {
		defer close(done)
		var b [1]byte
		n, err := e.Stream.Read(b[:])
		e.early = append(e.early, b[:n]...)
		if err != nil {
			cancel()
		}
	}()
	return func() {
		e.Stream.SetReadDeadline(time.Unix(1, 0)) // wakes the Read
		<-done
		e.Stream.SetReadDeadline(time.Time{})
	}
}

func (e *earlyStream) Read(p []byte) (int, error) {
	if len(e.early) > 0 {
		n := copy(p, e.early)
		e.early = e.early[n:]
		return n, nil
	}
	return e.Stream.Read(p)
}

// farPackets is an association at the far end. It is also the receiver of what
// comes back.
type farPackets struct {
	far  *Far
	leg  *leg
	next tunnel.Packets
	over error // given to Closed; guarded by far.mu
}

// endedRest is longer than a record can be under way; maxEnded bounds memory.
const (
	endedRest = 10 * time.Second
	maxEnded  = 1 << 16
)

// open makes the association that a record names, or counts why not. It runs on
// a reading goroutine.
func (f *Far) open(id uint32, held bool) *leg {
	f.mu.Lock()
	live := len(f.assocs)
	_, ended := f.ended[id]
	closed := f.assocs == nil
	f.mu.Unlock()
	if ended || closed {
		f.drops.Add(media.Unknown)
		return nil
	}
	if !f.opens.Allow() {
		// Only this datagram is lost: the next has the full header too. After a
		// reconnect thousands of live associations come at once.
		f.drops.Add(media.OverLimit)
		return nil
	}
	p := &farPackets{far: f}
	p.leg = &leg{id: id, held: held, plane: f.plane, deliver: p.send}
	err := f.admit(live, f.cfg.Limits.Associations, "associations")
	if err == nil {
		by := f.cfg.Peer
		by.Held = held
		p.next, err = f.cfg.Next.OpenPackets(by, p)
	}
	if err != nil {
		f.drops.Add(media.OverLimit)
		f.mu.Lock()
		f.endLocked(id)
		f.mu.Unlock()
		f.tellClosed(id, err)
		return nil
	}
	f.mu.Lock()
	_, ended = f.ended[id]
	switch {
	case f.assocs == nil || ended: // the session or the association has ended meanwhile
		f.mu.Unlock()
		f.drops.Add(media.Unknown)
		p.next.Close()
		return nil
	case p.over != nil: // it has ended at once
		f.endLocked(id)
		f.mu.Unlock()
		f.drops.Add(media.Unknown)
		p.next.Close()
		f.tellClosed(id, p.over)
		return nil
	case f.assocs[id] != nil: // another way was faster
		other := f.assocs[id].leg
		f.mu.Unlock()
		p.next.Close()
		return other
	}
	f.assocs[id] = p
	f.plane.add(p.leg)
	f.mu.Unlock()
	return p.leg
}

// endLocked remembers an ended association. f.mu is held.
func (f *Far) endLocked(id uint32) {
	now := time.Now()
	for len(f.endedList) > 0 && (now.Sub(f.endedList[0].when) > endedRest || len(f.endedList) >= maxEnded) {
		delete(f.ended, f.endedList[0].id)
		f.endedList = f.endedList[1:]
	}
	if _, again := f.ended[id]; !again {
		f.ended[id] = struct{}{}
		f.endedList = append(f.endedList, endedID{id, now})
	}
}

// forget takes an association out; it reports whether it was there.
func (f *Far) forget(p *farPackets) bool {
	f.mu.Lock()
	there := f.assocs[p.leg.id] == p
	if there {
		delete(f.assocs, p.leg.id)
		f.endLocked(p.leg.id)
	}
	f.mu.Unlock()
	f.plane.remove(p.leg)
	return there
}

func (f *Far) tellClosed(id uint32, err error) {
	r := wire.RefusedBy(err).Refused
	f.control.send(wire.Message{Closed: &wire.Closed{Association: id, Code: r.Code, Text: r.Text}})
}

// send passes a datagram from the sidecar on. The guard and the resolver report
// what they refuse through Unreachable.
func (p *farPackets) send(b []byte, to tunnel.Target) {
	err := p.next.Send(b, to)
	switch {
	case errors.Is(err, tunnel.ErrTooLarge):
		p.far.drops.Add(media.TooLarge)
	case err != nil:
		p.far.drops.Add(media.Refused)
	}
	if errors.Is(err, net.ErrClosed) {
		p.Closed(tunnel.Errorf(tunnel.SessionExpired, "the association has ended at the cloud proxy; the app can open another"))
		return
	}
	p.next.Flush()
}

// Deliver implements tunnel.Receiver.
func (p *farPackets) Deliver(b []byte, from netip.AddrPort) {
	p.leg.send(b, tunnel.TargetOf(from)) // what is too large has been counted
}

// Unreachable implements tunnel.Receiver.
func (p *farPackets) Unreachable(to netip.AddrPort, err error) {
	p.far.plane.tell(wire.Notice{Unreachable: true, Association: p.leg.id, Code: tunnel.CodeOf(err), Address: to})
}

// Closed implements tunnel.Receiver.
func (p *farPackets) Closed(err error) {
	p.far.mu.Lock()
	p.over = err // for open, which may not have taken it in yet
	p.far.mu.Unlock()
	if p.far.forget(p) {
		p.far.tellClosed(p.leg.id, err)
	}
}
