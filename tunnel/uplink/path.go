package uplink

import (
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"time"

	"culvert/tunnel"
	"culvert/tunnel/wire"
)

const (
	// joinTime bounds one attempt to join: where a link comes back, a fresh
	// attempt is quicker than a first packet that waits to be repeated.
	joinTime = time.Second
	// joinStagger is what lies between attempts while nothing serves the session.
	joinStagger = 200 * time.Millisecond
	joinTries   = 3 // so often before that becomes longer
	maxJoinRest = time.Minute
)

// A path is one of the two families by which a session is reached: QUIC on UDP,
// or TLS on TCP with lanes for datagrams. It keeps a carrier joined while that
// is wanted:
//
//	idle ──wanted──► joining ──welcomed──► joined ──lost, or left for dead──► joining
//	  ▲                 │ failed: rest 200 ms … 1 min     │
//	  └──not wanted─────┴─────────────────────────────────┘
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
	drops   int            // how often it had to go
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

// serving returns the carrier, nil where there is none, whether the path is
// wanted, and how often it was dropped.
func (p *path) serving() (c tunnel.Carrier, wanted bool, drops int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.carrier, p.wanted, p.drops
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

// keep runs the path until ctx ends. granted is a connection that has been
// welcomed already; nil: none.
func (p *path) keep(ctx context.Context, granted *granted) {
	for ctx.Err() == nil {
		if granted == nil {
			var rest time.Duration
			if granted, rest = p.join(ctx); granted == nil {
				p.rest(ctx, rest)
				continue
			}
		}
		err := p.serve(ctx, granted)
		if err != nil && ctx.Err() == nil {
			p.narrate("", tunnel.CodeOf(err), tunnel.Sentence(err))
		}
		granted = nil
		p.mu.Lock()
		p.granted, p.since, p.failed = false, time.Now(), err
		p.mu.Unlock()
		p.run.tell()
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
	wanted, fails, rest := p.wanted, p.fails, time.Until(p.later)
	if p.urgent {
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
	if fails > 5 { // the path may just be long
		limit = openTime
	}
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
	if tunnel.CodeOf(err) == tunnel.SessionUnknown {
		p.run.end(err)
	}
	p.run.tell()
	return nil, p.pause(fails)
}

// pause is how long to rest after so many failures in a row.
func (p *path) pause(fails int) time.Duration {
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
	return p.run.u.cfg.jitter(rest)
}

// serve lets a connection serve the session until it is lost or not wanted. It
// returns why; nil: it is not wanted.
func (p *path) serve(ctx context.Context, g *granted) error {
	c, err := g.cand.Carrier()
	if err != nil {
		g.cand.Close()
		return err
	}
	if err = p.run.at.AddCarrier(c, g.welcome.Sealed); err != nil {
		c.Close(err)
		return err
	}
	p.mu.Lock()
	again := p.told
	p.carrier, p.since, p.leave, p.failed, p.worked = c, time.Now(), nil, nil, true
	p.mu.Unlock()
	if again {
		p.narrate(p.kind, tunnel.PathJoined, "")
	}
	p.run.tell()
	p.pokeLanes()

	err = p.watch(ctx, c)
	p.mu.Lock()
	p.carrier, p.granted, p.failed = nil, false, err
	p.mu.Unlock()
	p.pokeLanes()
	p.run.at.RemoveCarrier(c)
	p.run.tell() // before closing, which may take a second
	c.Close(err)
	if err == errNotWanted {
		return nil
	}
	return err
}

// errNotWanted is why a carrier ends that is no longer needed.
var errNotWanted = errors.New("the sidecar needs it no longer")

// watch returns why a carrier has to go.
func (p *path) watch(ctx context.Context, c tunnel.Carrier) error {
	for {
		p.mu.Lock()
		wanted, leave := p.wanted, p.leave
		p.mu.Unlock()
		switch {
		case leave != nil:
			return leave
		case !wanted:
			return errNotWanted
		}
		select {
		case <-c.Done():
			return wrapLost(c.Err())
		case <-p.wake:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}
