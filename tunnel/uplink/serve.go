package uplink

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"culvert/tunnel"
	"culvert/tunnel/media"
	"culvert/tunnel/session"
	"culvert/tunnel/wire"
)

const (
	// companionRest is how long TLS stays joined beside QUIC after the last
	// stream or association.
	companionRest = 30 * time.Second
	// tcpDead is how long nothing comes over TCP until its connections are given
	// up and streams go by UDP. A lane that lives is heard each 250 ms.
	tcpDead = 1500 * time.Millisecond
	// leaveTime bounds how long a stop waits for the cloud proxy to hear of it.
	leaveTime = 500 * time.Millisecond
	// lonely is how long a session may be without any carrier before another
	// cloud proxy is asked, where there is one.
	lonely = 5 * time.Second
)

// granted is a connection that has been welcomed to a session.
type granted struct {
	cand    tunnel.Candidate
	welcome wire.Welcome
	address string // of the cloud proxy that was asked
	why     string // why this kind of connection
	token   string // the session's
	took    time.Duration
}

// A run is one session, from its Welcome to its end: it keeps the paths that
// are needed joined, and does what the chooser says.
//
//	            the last path is lost           60 s, or 5 s where there
//	served ────────────────────────────► alone ─ is another cloud proxy ─► ended
//	 │ │ ▲                                │ │                               ▲
//	 │ │ └────────── a path joins ────────┘ └─ a Join: session_unknown ─────┤
//	 │ └──────────── a stop, or the cloud proxy's word ─────────────────────┤
//	 │                                                                      │
//	 └─ another cloud proxy has taken over ─► lingering ─ streams have ended┘
//
// It is left for another cloud proxy when it says that it is going, when a call
// hears nothing from it, and when a better one answers while nothing runs
// (move.go). From ended Uplink.Run opens another session, unless that was a stop:
// associations go on with new ports, streams are reset. After session_unknown it
// does so at once, on the connection that was answered so.
//
// While it is served datagrams go by the way that the chooser names (choose.go),
// and for two seconds around a change by a second one too. Each path joins and
// leaves by itself (path.go):
//
//	path QUIC on UDP ─┬─ sealed           first choice
//	                  └─ quic-datagram    where QUIC passes, and sealed does not
//	path TLS on TCP ──┬─ lanes            where UDP does not pass, or is throttled
//	                  └─ streams          by QUIC while TLS is not joined
//
// What changes is told by the narrator (narrate.go).
type run struct {
	u       *Uplink
	at      *session.Attached
	welcome wire.Welcome
	address string // where joins go
	named   string // the cloud proxy by its address in the configuration, or as it was told of
	mode    tunnel.Mode
	udp     *path // nil: not allowed, or there is none
	tcp     *path
	news    chan struct{} // capacity 1: something has changed
	over    chan error    // capacity 1: the session has ended

	choose   chooser
	state    tunnel.LinkState
	reported tunnel.LinkState // what was reported last
	report   func(tunnel.LinkState)
	served   bool           // datagrams have had a way
	busyTill time.Time      // TLS stays joined until then
	adopt    *tunnel.Change // what is to be told when traffic goes into the session; nil: it does
	move     mover
	vain     uint64      // datagrams that the way in use took in vain while it was in doubt, as far as was seen
	left     atomic.Bool // another session has taken over
	lost     time.Time   // since when no path serves the session; zero: one does
	tcpHeard time.Time   // when something last came by lanes
	network  string      // which it was when last asked, at asked
	asked    time.Time
	askedOf  netip.AddrPort // where to
	moved    *tunnel.Change // of the address, to be told; nil: there is none
	token    string         // what the cloud proxy was told last
}

func (r *run) tell() {
	select {
	case r.news <- struct{}{}:
	default:
	}
}

// end says that the session has ended.
func (r *run) end(why error) {
	if said := r.at.Err(); said != nil {
		why = said                                      // rather than what comes of it
		if tunnel.CodeOf(said) == tunnel.NotPermitted { // what ends a session with this is the cloud proxy's word
			why = refusal{said}
		}
	}
	select {
	case r.over <- why:
	default:
	}
}

// paths returns those that there are.
func (r *run) paths() []*path {
	var all []*path
	for _, p := range []*path{r.udp, r.tcp} {
		if p != nil {
			all = append(all, p)
		}
	}
	return all
}

// other returns the path that p is not; nil: there is none.
func (r *run) other(p *path) *path {
	if p == r.udp {
		return r.tcp
	}
	return r.udp
}

// serve carries a session until it ends, until ctx does (it then returns nil),
// or until another one at another cloud proxy is there to take over: then it
// returns that, and what is open in this one goes on in the background. It
// returns why the session ended, and since when nothing has passed.
//
// takesOver is told where the session takes over from one that still serves:
// traffic goes into it only when it has a way for datagrams. nil: there is none.
func (u *Uplink) serve(ctx context.Context, g *granted, takesOver *tunnel.Change, mode tunnel.Mode, took time.Duration, report func(tunnel.LinkState)) (next *granted, lost time.Time, err error) {
	r := &run{
		u: u, at: u.Prepare(g.welcome), adopt: takesOver, welcome: g.welcome, address: g.welcome.Address, mode: mode, token: g.token,
		news: make(chan struct{}, 1), over: make(chan error, 1),
	}
	if _, u, _ := tunnel.ParseAddress(g.address); r.address == "" || u != nil {
		r.address = g.address // by WebSocket: the address behind it can not be reached by TCP
	}
	r.named = g.address
	r.move = mover{found: make(chan *granted, 1)}
	if takesOver == nil {
		r.at.Adopt()
	}
	r.report = func(s tunnel.LinkState) {
		r.reported = s
		report(s)
	}
	r.state = tunnel.LinkState{
		Carrier: g.cand.Kind(), Streams: g.cand.Kind(), Why: g.why, Session: g.welcome.Session, Remote: g.cand.RemoteAddr(),
		Info: tunnel.ProxyInfo{Proxies: g.welcome.Proxies}, Took: took,
	}
	if mode != tunnel.ModeTCP && u.cfg.QUIC != nil {
		r.udp = &path{run: r, kind: "quic", dial: u.cfg.QUIC, wake: make(chan struct{}, 1), wanted: true}
	}
	if mode != tunnel.ModeUDP && u.cfg.TLS != nil {
		r.tcp = &path{run: r, kind: "tls", dial: u.cfg.TLS, wake: make(chan struct{}, 1), lanesWake: make(chan struct{}, 1), wanted: r.udp == nil}
	}
	r.enter(time.Now())
	inner, cancel := context.WithCancelCause(context.WithoutCancel(ctx)) // so that a stop can be told
	var wg sync.WaitGroup
	for _, p := range r.paths() {
		first := g
		if p.kind != g.cand.Kind() {
			first = nil
			if p == r.udp { // which has just lost the race
				p.later = time.Now().Add(min(udpAgain<<min(p.fails, 10), maxUDPAgain))
				p.fails++
			}
		} else {
			p.wanted, p.granted = true, true
		}
		wg.Go(func() { p.keep(inner, first) })
		if p == r.tcp {
			wg.Go(func() { p.keepLanes(inner) })
		}
	}
	wg.Go(func() {
		r.end(r.at.Run())
	})
	next, err = r.loop(ctx)
	r.move.stop()
	if next != nil { // what is open here goes on
		r.left.Store(true)
		u.leftFor = r.move.why
		u.lingering.Go(func() {
			r.linger(ctx)
			r.at.End(errMoved)
			cancel(errMoved)
			wg.Wait()
		})
		return next, time.Time{}, nil
	}
	if r.adopt != nil { // it had no time to
		r.at.Adopt()
	}
	r.tellChanges(u.narrator.finish(time.Now()))
	if lost = r.lost; lost.IsZero() {
		lost = time.Now()
	}
	why := err
	if why == nil {
		why = errStopped
		r.leave()
	} else {
		s := connecting(err) // before closing, which may take a second
		s.Change = sessionLost(time.Now(), lost, g.welcome.Session, err)
		report(s)
	}
	r.remember()
	r.at.End(why)
	cancel(why)
	wg.Wait()
	return nil, lost, err
}

// sessionLost tells that a session has ended which nothing has served since a
// time.
func sessionLost(now, since time.Time, id string, why error) *tunnel.Change {
	c := &tunnel.Change{At: now, What: tunnel.ChangedSession, From: id, Cause: tunnel.CodeOf(why), Why: tunnel.Sentence(why)}
	held := fmt.Sprintf("nothing has served it for %v", session.DefaultHold)
	switch alone := now.Sub(since); {
	case c.Cause == tunnel.SessionExpired && alone > session.DefaultHold/2: // a stream has noticed first
		c.Why = held
	case alone >= session.DefaultHold:
		c.Cause, c.Why = tunnel.SessionExpired, held+": "+c.Why
	}
	return c
}

// networkEvery is how often the network is asked for.
const networkEvery = 2 * time.Second

// enter finds out in which network the session is, and takes what is known of it.
func (r *run) enter(now time.Time) {
	r.asked, r.askedOf = now, r.remote()
	r.network = r.u.cfg.Network(r.askedOf)
	known := r.u.memory.of(r.network)
	r.choose.again = known.again
	if r.state.Carrier == "quic" && r.choose.way == wire.NoWay { // UDP has just passed
		for i := range r.choose.again {
			r.choose.again[i].at = time.Time{}
		}
	}
	if r.udp != nil {
		r.udp.enter(known.fails)
	}
}

// remember keeps what was found in the network that the session is in.
func (r *run) remember() {
	known := remembered{again: r.choose.again}
	for i := range known.again {
		known.again[i].back = false
	}
	if r.udp != nil {
		known.fails = r.udp.failures()
	}
	r.u.memory.keep(r.network, known)
}

// follow sees to it that what was found in one network is not held against
// another.
func (r *run) follow(now time.Time) {
	remote := r.remote()
	if now.Sub(r.asked) < networkEvery && remote == r.askedOf {
		return
	}
	r.asked, r.askedOf = now, remote
	if before, network := r.network, r.u.cfg.Network(remote); network != "" && network != before {
		r.remember()
		r.enter(now)
		if before != "" {
			r.moved = &tunnel.Change{At: now, What: tunnel.ChangedAddress, From: before, To: network, Cause: tunnel.AddressChanged}
		}
	}
}

// remote is the cloud proxy's address that the session is reached at.
func (r *run) remote() netip.AddrPort {
	for _, p := range r.paths() {
		if at := p.reached(); at.IsValid() {
			return at
		}
	}
	return r.state.Remote
}

// tryAll asks at once whether what served still does: this host's addresses or
// routes have changed, or it stood still.
func (r *run) tryAll(now time.Time) {
	r.asked = time.Time{} // for the network
	for _, p := range r.paths() {
		p.move()
	}
	r.choose.suspect(now)
}

const (
	// clockEvery is how often the clocks are looked at.
	clockEvery = time.Second
	// stoodFor is from when on what is missing means that this process stood still.
	stoodFor = time.Second
)

// stood is for how long this process or its machine stood still between two
// looks at the clocks, by what the two show. The monotonic one goes on while a
// process is stopped, and not while a machine sleeps; the wall clock does, and
// may be set.
func stood(monotonic, wall time.Duration) time.Duration {
	return max(monotonic-clockEvery, wall-monotonic)
}

// leave lets the cloud proxy end the session, so that nothing is held for us.
func (r *run) leave() {
	if r.alone() != nil {
		return
	}
	r.at.Leave()
	select {
	case <-r.over:
	case <-time.After(leaveTime):
	}
}

var errStopped = errors.New("the sidecar has stopped")

// loop looks and decides until the session or ctx ends, or another one is there
// to take over, which it returns.
func (r *run) loop(ctx context.Context) (*granted, error) {
	timer := time.NewTimer(0)
	defer timer.Stop()
	going := r.at.Going()
	looked := time.Now()
	due := looked
	for {
		clock := false // the clock alone is to be looked at
		select {
		case <-ctx.Done():
			return nil, nil
		case err := <-r.over:
			return nil, wrapLost(err)
		case g := <-r.move.found:
			if r.moves(time.Now()) {
				return g, nil
			}
			g.cand.Close()
		case <-going:
			going = nil
			r.u.log.Warn("the cloud proxy is about to stop: what is running may finish, nothing new is taken")
			r.move.begin(r, r.others(), whyGoing)
		case <-r.news:
		case <-r.at.News():
		case <-r.u.Wanted():
		case <-r.u.cfg.Changed:
			r.tryAll(time.Now())
		case <-r.u.cfg.Renewed:
			r.renew()
		case err := <-r.at.Renewed():
			r.renewed(err)
		case <-timer.C:
			clock = true
		}
		now := time.Now()
		if slept := stood(now.Sub(looked), now.Round(0).Sub(looked.Round(0))); slept > stoodFor {
			r.u.log.Info("the sidecar or its machine stood still; all paths are tried", "for", slept.Round(time.Millisecond))
			r.tcpHeard = now // nothing could be heard
			r.tryAll(now)
			clock = false
		}
		looked = now
		if clock && now.Before(due) {
			timer.Reset(min(due.Sub(now), clockEvery))
			continue
		}
		next := r.step(now)
		switch lost := r.alone(); {
		case lost == nil:
			r.lost = time.Time{}
		case r.lost.IsZero():
			r.lost = now
		case now.Sub(r.lost) > session.DefaultHold, len(r.u.cfg.Proxies) > 1 && now.Sub(r.lost) > lonely:
			return nil, wrapLost(lost)
		}
		if r.silent(now) {
			r.move.begin(r, r.others(), whySilent)
		} else if r.move.why == whySilent {
			r.move.halt()
		}
		r.prefer(now)
		due = now.Add(next)
		timer.Reset(min(next, clockEvery))
	}
}

// renew brings another token to the cloud proxy where there is one.
func (r *run) renew() {
	hello, err := r.u.cfg.Open()
	switch {
	case err != nil:
		r.u.log.Warn("the token can not be read; the session goes on with the one before", "code", tunnel.CodeOf(err), "why", tunnel.Sentence(err))
	case hello.Token != r.token:
		r.token = hello.Token
		r.at.Renew(hello.Token)
	}
}

// renewed says what came of it.
func (r *run) renewed(err error) {
	if err != nil {
		r.u.log.Warn("the new token was refused; the session goes on with the one before, as long as that is good", "code", tunnel.CodeOf(err), "why", tunnel.Sentence(err))
		return
	}
	r.u.log.Info("the session has another token", "session", r.welcome.Session)
}

// alone returns why no path serves the session; nil: one does, or none has
// failed yet.
func (r *run) alone() error {
	var errs []error
	for _, p := range r.paths() {
		carrier, failed := p.stands()
		if carrier {
			return nil
		}
		errs = append(errs, failed)
	}
	return errors.Join(errs...)
}

// mute returns why datagrams have no way; nil: nothing has failed yet.
func (r *run) mute() error {
	var errs []error
	for _, p := range r.paths() {
		_, failed := p.stands()
		errs = append(errs, failed)
	}
	return errors.Join(errs...)
}

// step has the chooser look, does what it orders, and returns when to look again.
func (r *run) step(now time.Time) time.Duration {
	r.follow(now)
	v := view{now: now, live: r.u.Busy(), flowing: r.at.Reporting()}
	for w := range v.ways {
		v.ways[w] = r.at.Way(wire.Way(w))
	}
	was, alsoBefore, doubt := r.choose.way, r.choose.also, r.choose.doubt
	o := r.choose.step(v)
	if r.udp == nil && o.why == wayAtHand[wire.WayLanes] {
		o.why = fmt.Sprintf("mode is %s", r.mode)
	}
	if o.first != was || o.also != alsoBefore {
		r.at.Use(o.first, o.also)
	}
	for w := range v.ways {
		if o.short[w] {
			r.at.Probe(wire.Way(w), false)
		}
		if o.long[w] {
			r.at.Probe(wire.Way(w), true)
		}
	}
	if o.load > 0 {
		r.at.Load(r.choose.trial.way, o.load, o.begin)
	}
	r.needs(now, v)
	if o.first == wire.NoWay && r.at.Err() != nil {
		return o.next // it is over, and why is about to be told
	}
	state := r.describe(o)
	if state != nil {
		r.report(*state)
	}
	change := r.changed(now, v, was, doubt, o)
	if r.adopt != nil && o.first != wire.NoWay {
		r.at.Adopt()
		change, r.adopt = r.adopt, nil
		change.At = now
	}
	if change == nil {
		change, r.moved = r.moved, nil
	}
	told, more := r.u.narrator.step(now, change, !r.choose.doubt.IsZero() || o.first == wire.NoWay, v.flowing)
	r.tellChanges(told)
	if more > 0 {
		return min(o.next, more)
	}
	return o.next
}

// changed returns the change of the way that was just made; nil: there was none,
// or it belongs to the beginning. was is the way before it, and doubt since when
// that had been in doubt.
func (r *run) changed(now time.Time, v view, was wire.Way, doubt time.Time, o orders) *tunnel.Change {
	old := v.ways[was]
	if doubt.IsZero() {
		r.vain = 0
	} else {
		r.vain = max(r.vain, old.Unheard)
	}
	if o.first == was {
		return r.cameBack(now, was, doubt)
	}
	c := &tunnel.Change{At: now, What: tunnel.ChangedDatagrams, Cause: o.cause, Why: o.why}
	if o.cause == tunnel.PathSilent || o.cause == tunnel.UDPBlocked {
		if c.LostUp = r.vain; now.Sub(old.Heard) < deaf { // only our direction is shut
			c.LostUp = old.Unproved
		}
		r.at.Told(was)
	}
	if was != wire.NoWay {
		c.From = was.String()
	}
	switch {
	case o.first == wire.NoWay:
		c.Cause, c.Why = tunnel.PathLost, "there is no connection to the cloud proxy at the moment"
		if lost := r.mute(); lost != nil {
			c.Why = tunnel.Sentence(wrapLost(lost))
		}
	case was == wire.NoWay && r.served:
		c.To, c.Cause = o.first.String(), tunnel.PathJoined
	default:
		c.To = o.first.String()
	}
	r.served = r.served || o.first != wire.NoWay
	if c.Cause == "" {
		return nil
	}
	return c
}

// cameBack returns what there is to tell of a way that was silent for so long
// that it would have been left, had anything else passed; nil: nothing.
func (r *run) cameBack(now time.Time, way wire.Way, doubt time.Time) *tunnel.Change {
	took := now.Sub(doubt)
	if doubt.IsZero() || !r.choose.doubt.IsZero() || took <= deaf-doubtful {
		return nil
	}
	if open := r.u.narrator.open; open != nil { // which has made it so
		open.LostUp += r.vain
		return nil
	}
	return &tunnel.Change{
		At: now, What: tunnel.ChangedDatagrams, From: way.String(), To: way.String(), Cause: tunnel.PathSilent, LostUp: r.vain,
		Why: fmt.Sprintf("nothing was answered by it for %v, nor by anything else; it passes again", took.Round(time.Millisecond)),
	}
}

// tellChanges reports changes beside the state that was reported last.
func (r *run) tellChanges(all []tunnel.Change) {
	for _, c := range all {
		s := r.reported
		if s.Phase == "" {
			s.Phase = tunnel.LinkConnecting // which is no news
		}
		s.Change = &c
		r.report(s)
	}
	r.reported.Change = nil
}

// needs says which paths are to be joined, and how many lanes.
func (r *run) needs(now time.Time, v view) {
	if r.u.Streaming() || v.live {
		r.busyTill = now.Add(companionRest)
	}
	if r.udp != nil { // datagrams go by lanes and nothing comes, or their way is lost: UDP may pass by now
		lost := r.choose.way == wire.NoWay && !r.choose.since.IsZero()
		r.udp.want(true, v.live && (lost || r.choose.way == wire.WayLanes && !r.choose.doubt.IsZero()))
	}
	if r.tcp == nil {
		return
	}
	udp := false
	if r.udp != nil {
		udp, _ = r.udp.stands()
		// Where nothing runs, a connection that was lost is joined again alone first:
		// after a restart of the cloud proxy many come at once.
		udp = udp || r.served && r.udp.failures() == 0
	}
	urgent := v.live && (r.choose.way == wire.WayLanes || !r.choose.doubt.IsZero() || r.choose.way == wire.NoWay && r.served)
	r.tcp.want(!udp || now.Before(r.busyTill) || r.choose.way == wire.WayLanes, urgent)
	lanes := 1
	// On a link that is too slow for both, more lanes would only be more that waits.
	if v.live && (r.choose.way == wire.WayLanes || !r.choose.doubt.IsZero() && !r.choose.congested || r.choose.apart >= strained/2) {
		lanes = min(max(r.u.cfg.Lanes, r.welcome.Lanes), maxLanes)
	}
	r.tcp.wantLanes(lanes)
	if quiet := r.tcpQuiet(now, v); quiet > tcpDead {
		r.tcp.drop(tunnel.Errorf(tunnel.PathSilent, "nothing came over TCP for %v, while UDP passes", quiet.Round(time.Millisecond)))
	}
	r.at.Prefer(r.tcp.joined())
}

// tcpQuiet is for how long nothing has come over TCP while UDP passes; 0: that
// can not be told, as there is nothing to expect. TCP itself needs many seconds
// to notice, in which streams stand still.
// Where UDP is overloaded TCP may just not get through either.
func (r *run) tcpQuiet(now time.Time, v view) time.Duration {
	c, since := r.tcp.joinedSince()
	r.tcpHeard = later(later(r.tcpHeard, v.ways[wire.WayLanes].Heard), since)
	w := r.choose.way
	if c == nil || !v.flowing || !r.choose.strain.IsZero() || w == wire.NoWay || w == wire.WayLanes || now.Sub(v.ways[w].Heard) > deaf {
		return 0
	}
	return now.Sub(r.tcpHeard)
}

// describe returns the link's state where it has changed.
func (r *run) describe(o orders) *tunnel.LinkState {
	s := r.state
	if o.first == wire.NoWay {
		lost := r.mute()
		if lost == nil { // a lane may be on its way
			return nil
		}
		r.state.Phase = tunnel.LinkConnecting
		c := connecting(wrapLost(lost))
		return &c
	}
	s.Phase, s.Remote = tunnel.LinkUp, r.remote()
	s.Way = o.first.String()
	s.Carrier = "quic"
	if o.first == wire.WayLanes {
		s.Carrier = "tls"
	}
	if o.why != "" {
		s.WayWhy = o.why
	}
	s.Streams = s.Carrier
	if r.tcp != nil && r.tcp.joined() != nil {
		s.Streams = "tls"
	}
	if s.Phase == r.state.Phase && s.Way == r.state.Way && s.WayWhy == r.state.WayWhy && s.Streams == r.state.Streams {
		return nil
	}
	r.state = s
	return &s
}

// mayOpenOn says whether the next session may be opened on a connection by this
// dialer: by what is preferred, to the cloud proxy that is.
func (r *run) mayOpenOn(d tunnel.Dialer) bool {
	return (r.udp == nil || d == r.udp.dial) && same(r.named, r.u.cfg.Proxies[0]) && !r.left.Load()
}

// join joins one more connection to the session. Where that is not known any more
// the connection is kept, since another session may be opened on it.
func (r *run) join(ctx context.Context, d tunnel.Dialer, as string) (*granted, error) {
	address := r.address
	if own := r.welcome.Address; d.Kind() == "quic" && own != "" {
		address = own // not by what passes WebSockets on, if at all
	}
	began := time.Now()
	cand, err := d.Dial(ctx, address)
	if err != nil {
		return nil, err
	}
	j := &wire.Join{Version: wire.Current, Session: r.welcome.Session, As: as}
	if as == wire.AsCarrier {
		j.Sealed = media.PreferredAEADs()
	}
	m, err := exchange(ctx, cand, wire.Message{Join: j})
	switch {
	case err != nil:
	case m.Refused != nil:
		err = m.Refused.Err()
		if m.Refused.Code == tunnel.SessionUnknown && as == wire.AsCarrier && r.mayOpenOn(d) {
			give(r.u.spare, &granted{cand: cand, took: time.Since(began)})
			return nil, err
		}
	case m.Welcome == nil || m.Welcome.Session != r.welcome.Session:
		err = tunnel.Errorf(tunnel.Internal, "%s answered a join with something else", r.address)
	}
	if err != nil {
		cand.Close()
		return nil, err
	}
	return &granted{cand: cand, welcome: *m.Welcome, address: r.address, took: time.Since(began)}, nil
}
