package uplink

import (
	"context"
	"errors"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"culvert/tunnel"
	"culvert/tunnel/wire"
)

const (
	// joinTime bounds one attempt to join, where a call waits or it is the first:
	// where a link comes back, a fresh attempt is quicker than a first packet that
	// waits to be repeated.
	joinTime = time.Second
	// joinStagger is what lies between attempts while nothing serves the session.
	joinStagger = 200 * time.Millisecond
	joinTries   = 3 // so often before that becomes longer
	maxJoinRest = time.Minute
	// renewals is how often joining anew is tried after a change of address.
	renewals = 5
)

// A path is one of the two families by which a session is reached: QUIC on UDP,
// or TLS on TCP with lanes for datagrams. It keeps a carrier joined while that
// is wanted:
//
//	         wanted             welcomed
//	idle ─────────────► joining ─────────► joined ◄──┐ the address has changed:
//	 ▲                   │   ▲              │  │ └───┘ another takes its place
//	 │            failed │   │ rested,      │  │
//	 │                   ▼   │ or urgent    │  │ lost, or dropped: no lane can be had
//	 ├── not wanted ── resting              │  │ beside it, or nothing comes over TCP
//	 └── not wanted ────────────────────────┘  └──► joining, at once
//
// A rest is 200 ms, thrice, and up to a second where a call waits, which counts
// from the beginning of the attempt, or where nothing else serves the session; else
// 1 s to a minute; and for QUIC beside TLS 5 s to 15 s, or to 5 min where it never
// worked. An answer that the session is not known ends the session, and the path
// with it.
type path struct {
	run  *run
	kind string // "quic", "tls"
	dial tunnel.Dialer
	wake chan struct{} // capacity 1: something below has changed

	lanes     atomic.Int32  // how many are wanted, where datagrams need them
	lanesWake chan struct{} // capacity 1: lanes has changed

	mu      sync.Mutex // guards the fields below
	wanted  bool
	urgent  bool           // datagrams go by it, or may soon: it is joined again without a rest
	granted bool           // a carrier is welcomed: it serves, or is about to
	carrier tunnel.Carrier // nil: not joined
	since   time.Time      // when it was joined, or lost
	failed  error          // of the last attempt; nil: it succeeded
	fails   int            // in a row
	worked  bool           // it has been joined in this session
	later   time.Time      // not to be joined before
	leave   error          // why the carrier has to go; nil: it may stay
	drops   int            // how often it had to go, or its lanes
	renew   int            // attempts left to join anew while the carrier serves
	remote  netip.AddrPort // of the carrier
	network string         // by which the carrier was reached when it was joined
	took    time.Duration  // to join, where the carrier goes through a proxy; else 0
	told    bool           // that it was lost
}

// want says whether the path is to be joined, and whether a call waits for it.
func (p *path) want(wanted, urgent bool) {
	p.mu.Lock()
	changed := p.wanted != wanted || urgent && !p.urgent
	p.wanted, p.urgent = wanted, urgent
	p.mu.Unlock()
	if changed {
		p.poke()
		p.pokeLanes()
	}
}

// wantLanes says how many lanes there should be.
func (p *path) wantLanes(n int) {
	if p.lanes.Swap(int32(n)) != int32(n) {
		p.pokeLanes()
	}
}

func (p *path) pokeLanes() {
	select {
	case p.lanesWake <- struct{}{}:
	default:
	}
}

// enter begins to count failures anew, in a network where there were so many.
func (p *path) enter(fails int) {
	p.mu.Lock()
	p.fails, p.worked, p.later = fails, p.carrier != nil, time.Time{}
	p.mu.Unlock()
	p.poke()
}

// failures returns how many there were in a row.
func (p *path) failures() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.fails
}

// drop gives the carrier and its lanes up; where the path is wanted it joins
// again.
func (p *path) drop(why error) {
	p.mu.Lock()
	p.leave = why
	p.drops++
	p.fails = 0
	p.mu.Unlock()
	p.poke()
	p.pokeLanes()
}

func (p *path) poke() {
	select {
	case p.wake <- struct{}{}:
	default:
	}
}

// joined returns the carrier, nil where there is none.
func (p *path) joined() tunnel.Carrier {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.carrier
}

// joinedSince returns the carrier, nil where there is none, and since when.
func (p *path) joinedSince() (tunnel.Carrier, time.Time) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.carrier, p.since
}

// reached returns the address that the carrier goes to; invalid: there is none.
func (p *path) reached() netip.AddrPort {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.carrier == nil {
		return netip.AddrPort{}
	}
	return p.remote
}

// detour is what the way through a proxy takes, whose length no round trip shows:
// TCP's is that of the way to the proxy. 0: there is none.
func (p *path) detour() time.Duration {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.took
}

// serving returns the carrier, nil where there is none, whether the path is
// wanted, and how often it was dropped. eager: it is about to have a carrier
// again, and a call waits.
func (p *path) serving() (c tunnel.Carrier, wanted, eager bool, drops int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.carrier, p.wanted, p.wanted && p.urgent && p.worked && p.carrier == nil, p.drops
}

// stands reports whether the path is joined, and what failed last: a join, or a
// lane.
func (p *path) stands() (joined bool, failed error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.granted, p.failed
}

// fail notes what has failed.
func (p *path) fail(err error) {
	p.mu.Lock()
	p.failed = err
	p.mu.Unlock()
	p.run.tell()
}

// move is told that this host's addresses or routes have changed. What is joined
// by another address is joined again, beside what there is: for TCP, which ends
// with its address, and where nothing leads to the cloud proxy's address any more,
// which may have one of the other family. What waits to be joined is joined at once.
func (p *path) move() {
	p.mu.Lock()
	at := p.network
	if p.carrier != nil {
		at = p.run.u.cfg.Network(p.remote)
	}
	switch {
	case p.carrier == nil:
		p.later, p.fails = time.Time{}, 0
	case at == p.network:
	case at == "", p.kind != "quic": // QUIC and sealed packets go on by any address
		p.renew = renewals
	}
	if p.kind != "quic" && (p.carrier == nil || at != p.network) {
		p.drops++ // of the lanes, which are joined again at once
	}
	if at != "" {
		p.network = at
	}
	p.mu.Unlock()
	p.poke()
	p.pokeLanes()
}

// keep runs the path until ctx ends. granted is a connection that has been
// welcomed already; nil: none.
func (p *path) keep(ctx context.Context, granted *granted) {
	var before tunnel.Carrier // serves until the next does; nil: none does
	var leaving sync.WaitGroup
	part := func() {
		if c := before; c != nil {
			before = nil
			p.run.at.RemoveCarrier(c)
			leaving.Go(func() { c.Close(errReplaced) }) // which may take a second
		}
	}
	defer leaving.Wait()
	for ctx.Err() == nil {
		if granted == nil {
			var rest time.Duration
			if granted, rest = p.join(ctx); granted == nil {
				p.rest(ctx, rest)
				continue
			}
		}
		c, next, err := p.serve(ctx, granted, part)
		if granted, before = next, c; next != nil {
			continue
		}
		if err != nil && ctx.Err() == nil {
			p.narrate("", tunnel.CodeOf(err), tunnel.Sentence(err))
		}
		p.mu.Lock()
		p.carrier, p.granted, p.since, p.failed = nil, false, time.Now(), err
		p.mu.Unlock()
		p.run.tell()
	}
	part()
	if granted != nil {
		granted.cand.Close()
	}
}

// narrate tells that the connection was lost, or is there again after that.
func (p *path) narrate(to string, cause tunnel.Code, why string) {
	c := tunnel.Change{At: time.Now(), What: tunnel.ChangedCarrier, To: to, Cause: cause, Why: why}
	if to == "" {
		c.From = p.kind
	}
	p.mu.Lock()
	p.told = to == ""
	p.mu.Unlock()
	if p.run.left.Load() {
		return
	}
	p.run.u.narrator.hear(c)
	p.run.tell()
}

// rest waits until there is something to do, for rest at most; 0: for ever.
func (p *path) rest(ctx context.Context, rest time.Duration) {
	var over <-chan time.Time
	if rest > 0 {
		over = time.After(rest)
	}
	select {
	case <-p.wake:
	case <-over:
	case <-ctx.Done():
	}
}

// join tries once, where the path is wanted. Where it returns nothing it says
// how long to rest; 0: until something changes.
func (p *path) join(ctx context.Context) (*granted, time.Duration) {
	p.mu.Lock()
	wanted, urgent, fails, rest := p.wanted, p.urgent, p.fails, time.Until(p.later)
	if urgent {
		rest = 0
	}
	p.mu.Unlock()
	switch {
	case !wanted:
		return nil, 0
	case rest > 0:
		return nil, rest
	}
	limit := joinTime
	switch {
	case fails > 5: // the path may just be long
		limit = openTime
	case !urgent: // or many come at once, for whom each attempt that is given up is work in vain
		limit = min(limit<<fails, openTime)
	}
	began := time.Now()
	dialling, cancel := context.WithTimeoutCause(ctx, limit, tunnel.Errorf(tunnel.CloudUnreachable, "joining over %s took longer than %v", p.kind, limit))
	g, err := p.run.join(dialling, p.dial, wire.AsCarrier)
	cancel()
	if ctx.Err() != nil {
		if g != nil {
			g.cand.Close()
		}
		return nil, 0
	}
	if err == nil {
		fails = 0
	} else {
		fails++
	}
	p.mu.Lock()
	p.failed, p.granted, p.fails = err, err == nil, fails
	p.mu.Unlock()
	if err == nil {
		return g, 0
	}
	p.run.tell()
	if tunnel.CodeOf(err) == tunnel.SessionUnknown {
		p.run.end(err)
		return nil, 0
	}
	return nil, p.pause(fails, time.Since(began))
}

// pause is how long to rest after so many failures in a row, the last of which
// took so long.
func (p *path) pause(fails int, took time.Duration) time.Duration {
	p.mu.Lock()
	urgent, worked := p.urgent, p.worked
	p.mu.Unlock()
	rest, most := time.Second, maxJoinRest
	switch other := p.run.other(p); {
	case urgent || other == nil || other.joined() == nil:
		rest, most = joinStagger, time.Second // a call may be waiting; the session does not for long
		fails = max(1, fails-joinTries)
	case p.kind == "quic" && worked:
		rest, most = udpAgain, goodUDPAgain
	case p.kind == "quic": // it may never work here
		rest, most = udpAgain, maxUDPAgain
	}
	for range fails - 1 {
		rest = min(2*rest, most)
	}
	rest = p.run.u.cfg.jitter(rest)
	if urgent { // nobody is spared by a rest on top of an attempt that was long
		rest = max(rest-took, time.Millisecond)
	}
	return rest
}

// serve lets a connection serve the session until it is lost or not wanted, and
// returns why; nil: it is not wanted. Or until another is welcomed, which it
// returns, with the carrier that still serves. joined is called when the
// connection serves.
func (p *path) serve(ctx context.Context, g *granted, joined func()) (c tunnel.Carrier, next *granted, err error) {
	c, err = g.cand.Carrier()
	if err != nil {
		g.cand.Close()
		joined()
		return nil, nil, err
	}
	if err = p.run.at.AddCarrier(c, g.welcome.Sealed); err != nil {
		c.Close(err)
		joined()
		return nil, nil, err
	}
	remote := g.cand.RemoteAddr()
	network := p.run.u.cfg.Network(remote)
	took := g.took
	if via(g.cand) == "" {
		took = 0
	}
	p.mu.Lock()
	again := p.told
	p.carrier, p.since, p.leave, p.failed, p.worked = c, time.Now(), nil, nil, true
	p.remote, p.network, p.took, p.renew = remote, network, took, 0
	p.mu.Unlock()
	joined()
	if again {
		p.narrate(p.kind, tunnel.PathJoined, "")
	}
	p.run.tell()
	p.pokeLanes()

	next, err = p.watch(ctx, c)
	if next != nil {
		return c, next, nil
	}
	p.mu.Lock()
	p.carrier, p.granted, p.failed = nil, false, err
	p.mu.Unlock()
	p.pokeLanes()
	p.run.at.RemoveCarrier(c)
	p.run.tell() // before closing, which may take a second
	c.Close(err)
	if err == errNotWanted {
		err = nil
	}
	return nil, nil, err
}

// Why a carrier ends that still served.
var (
	errNotWanted = errors.New("the sidecar needs it no longer")
	errReplaced  = errors.New("the sidecar has joined by another address")
)

// watch returns why a carrier has to go, or another connection that is to take
// its place.
func (p *path) watch(ctx context.Context, c tunnel.Carrier) (*granted, error) {
	for {
		p.mu.Lock()
		wanted, leave, renew := p.wanted, p.leave, p.renew
		p.renew = max(renew-1, 0)
		p.mu.Unlock()
		switch {
		case leave != nil:
			return nil, leave
		case !wanted:
			return nil, errNotWanted
		}
		var again <-chan time.Time
		if renew > 0 {
			if g := p.fresh(ctx); g != nil {
				return g, nil
			}
			again = time.After(joinStagger)
		}
		select {
		case <-c.Done():
			return nil, wrapLost(c.Err())
		case <-p.wake:
		case <-again:
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
}

// fresh joins once more; nil: it can not be done now.
func (p *path) fresh(ctx context.Context) *granted {
	ctx, cancel := context.WithTimeout(ctx, joinTime)
	defer cancel()
	g, err := p.run.join(ctx, p.dial, wire.AsCarrier)
	switch {
	case err == nil:
		return g
	case tunnel.CodeOf(err) == tunnel.SessionUnknown:
		p.run.end(err)
	}
	return nil
}
