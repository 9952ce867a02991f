package cloudproxy

import (
	"cmp"
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"log/slog"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/time/rate"

	"culvert/tunnel"
	"culvert/tunnel/crowd"
	"culvert/tunnel/resume"
	"culvert/tunnel/session"
	"culvert/tunnel/wire"
)

const (
	// greetingTime bounds the opening exchange, admission included. It is a little
	// below the 5 s in which a silent peer must be gone.
	greetingTime = 4500 * time.Millisecond
	// maxJoins bounds the connections that have joined a session and live.
	maxJoins    = 16
	maxInstance = 64 // bytes
	// How many bytes of a text that a peer may have chosen are logged, so that a
	// line stays under 1 KiB.
	logName, logSentence = 128, 400
	// maxUnadmitted bounds candidates that have not been admitted yet.
	maxUnadmitted = 1000
	// proxiesFor is how long sidecars may believe what they are told of other cloud proxies.
	proxiesFor = 24 * time.Hour
	// defaultDrain is how long live sessions may take to finish at a stop.
	defaultDrain = 30 * time.Second
)

// Config is what a cloud proxy needs. Listeners and Authorize are required.
type Config struct {
	Listeners []tunnel.Listener
	Authorize Authorize
	Limits    session.Limits     // of each session
	Rate      int                // bytes per second of each session, see Grant.Rate; 0: unbounded
	Memory    int                // bytes that the streams of all sessions keep for their next connection; 0: resume.DefaultBudget
	Address   string             // HOST:PORT under which sidecars reach this very instance
	Region    string             // told to sidecars; may be empty
	Proxies   []tunnel.ProxyAddr // the proxy information, in order; empty: this instance alone. What has no Expires is good for a day
	Lanes     int                // how many lanes serve a session best, told to sidecars; 0: they decide
	Age       time.Duration      // how long a datagram may wait for a sidecar's path; 0: media.MaxAge
	Hold      time.Duration      // how long a session lives without any connection; 0: session.DefaultHold
	Drain     time.Duration      // how long live sessions may take to finish when Run's context ends; 0: 30 s
	Log       *slog.Logger       // nil: none
}

// Authorize admits a session, or fails with a code.
type Authorize func(context.Context, tunnel.Open) (Grant, error)

// A Grant is what a session is admitted with. Next and Release are required.
type Grant struct {
	Next   tunnel.Opener  // what the session's traffic goes into
	Limits session.Limits // its own; zero fields are those of Config
	// Rate bounds its bytes per second in each direction, those of streams and
	// those of datagrams apart; 0: as Config says.
	Rate    int
	Release func() // called once when the session has ended
	// Key and Token name the sidecar's key and its token in the log; no secrets.
	Key, Token string
	// Renew takes another token for the session; nil: none is taken.
	Renew func(token string) error
	// Check says why the session may not go on. It is asked each second; nil:
	// nothing speaks against it.
	Check func() error
}

// Server is a cloud proxy.
type Server struct {
	cfg        Config
	log        *slog.Logger
	refusals   *rate.Limiter // of log lines
	unlogged   atomic.Int64
	strikes    strikes
	memory     *resume.Budget
	unadmitted *crowd.Crowd // candidates in their opening exchange
	wg         sync.WaitGroup

	mu       sync.Mutex // guards the fields below
	draining bool
	byID     map[string]*live
	byKey    map[string]*live // by the sidecar's public key
}

// live is a session and what belongs to it.
type live struct {
	id       string
	key      string
	app      string
	instance string // of the sidecar; "": it has not said
	far      *session.Far
	grant    Grant
	joins    atomic.Int32
}

// New checks the configuration.
func New(cfg Config) (*Server, error) {
	if len(cfg.Listeners) == 0 || cfg.Authorize == nil {
		return nil, tunnel.Errorf(tunnel.ConfigInvalid, "a cloud proxy needs a listener and an Authorize")
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.Drain == 0 {
		cfg.Drain = defaultDrain
	}
	if len(cfg.Proxies) == 0 && cfg.Address != "" {
		cfg.Proxies = []tunnel.ProxyAddr{{Address: cfg.Address, Region: cfg.Region}}
	}
	return &Server{cfg: cfg, memory: resume.NewBudget(cfg.Memory), log: cfg.Log, refusals: rate.NewLimiter(10, 50), unadmitted: crowd.New(maxUnadmitted), byID: map[string]*live{}, byKey: map[string]*live{}}, nil
}

// Run serves until ctx ends, then refuses what is new, lets live sessions
// finish within the drain time, closes the rest and returns nil. It returns an
// error when a listener fails.
func (s *Server) Run(ctx context.Context) error {
	accepting, stop := context.WithCancelCause(context.Background())
	defer stop(nil)
	var accepts sync.WaitGroup
	for _, l := range s.cfg.Listeners {
		accepts.Go(func() {
			if err := s.accept(accepting, l); err != nil {
				stop(err)
			}
		})
	}
	accepts.Go(func() { s.checkAll(accepting) })
	var failed error
	select {
	case <-ctx.Done():
		s.drain(s.cfg.Drain)
	case <-accepting.Done():
		failed = context.Cause(accepting)
		s.drain(0)
	}
	stop(nil)
	for _, l := range s.cfg.Listeners {
		l.Close()
	}
	accepts.Wait()
	s.closeAll(tunnel.Errorf(tunnel.CloudUnreachable, "the cloud proxy has stopped"))
	s.wg.Wait()
	return failed
}

func (s *Server) accept(ctx context.Context, l tunnel.Listener) error {
	for {
		c, err := l.Accept(ctx)
		switch {
		case ctx.Err() != nil || errors.Is(err, net.ErrClosed):
			if c != nil {
				c.Close()
			}
			return nil
		case err != nil:
			return err
		}
		place, ok := s.unadmitted.Enter(c.RemoteAddr().Addr(), func() { s.wg.Go(func() { c.Close() }) })
		if !ok {
			c.Close()
			if s.refusals.Allow() {
				s.log.Warn("too many peers are being admitted, one was turned away", "limit", maxUnadmitted, "from", c.RemoteAddr(), "unlogged", s.unlogged.Swap(0))
			} else {
				s.unlogged.Add(1)
			}
			continue
		}
		s.wg.Go(func() { s.greet(c, place) })
	}
}

// greet hears what a candidate wants and serves it to its end.
func (s *Server) greet(c tunnel.Candidate, place *crowd.Place) {
	serve := s.admit(c)
	place.Leave()
	if serve == nil {
		c.Close()
		return
	}
	serve()
}

// admit answers the opening message. It returns what serves the connection
// from here on, or nil.
func (s *Server) admit(c tunnel.Candidate) (serve func()) {
	ctx, cancel := context.WithTimeout(context.Background(), greetingTime)
	defer cancel()
	deadline, _ := ctx.Deadline()
	c.SetDeadline(deadline)
	m, err := wire.Read(c, wire.Version{})
	var welcome wire.Welcome
	switch {
	case err != nil:
	case c.PeerKey() == nil:
		err = tunnel.Errorf(tunnel.NotPermitted, "the client certificate holds no Ed25519 key")
	case m.Open != nil:
		welcome, serve, err = s.open(ctx, c, m.Open)
	case m.Join != nil:
		welcome, serve, err = s.join(c, m.Join)
	default:
		err = tunnel.Errorf(tunnel.Internal, "the connection begins with a message that does not belong there")
	}
	if m.Join != nil && m.Join.Session != "" && m.Join.As == wire.AsCarrier && tunnel.CodeOf(err) == tunnel.SessionUnknown {
		// After a restart all come at once: they are spared another handshake.
		s.refuse(c, m, err)
		if m, err = wire.Read(c, wire.Version{}); err != nil { // it does not want to
			return nil
		}
		if m.Open == nil {
			err = tunnel.Errorf(tunnel.Internal, "the connection goes on with a message that does not belong there")
		} else {
			welcome, serve, err = s.open(ctx, c, m.Open)
		}
	}
	if err != nil {
		c.SetDeadline(time.Now().Add(time.Second)) // the one before may be over: a Write that TLS can not send breaks its records
		s.refuse(c, m, err)
		if time.Now().Before(deadline) { // else it has had its time
			lingerClose(c)
		}
		return nil
	}
	welcome.Version = wire.Current
	if wire.Write(c, wire.Message{Welcome: &welcome}) == nil && c.SetDeadline(time.Time{}) == nil {
		return serve
	}
	if m.Join != nil {
		s.mu.Lock()
		if l := s.byID[welcome.Session]; l != nil {
			l.joins.Add(-1)
		}
		s.mu.Unlock()
	}
	if m.Open != nil {
		s.end(welcome.Session, tunnel.Errorf(tunnel.CloudUnreachable, "the sidecar went away before it was welcomed"))
	}
	return nil
}

// refuse tells a peer why what it asked for is refused, and the log.
func (s *Server) refuse(c tunnel.Candidate, m wire.Message, err error) {
	app := ""
	if m.Open != nil {
		app = tunnel.LogText(m.Open.App, logName)
	}
	s.strikes.add(c.RemoteAddr().Addr(), strikesFor(err))
	if m.Join == nil || m.Join.Session != "" { // else it only asks for the time
		s.logRefusal(c, app, err)
	}
	no := wire.RefusedBy(err)
	no.Refused.Time = time.Now().UTC().Truncate(time.Millisecond) // a sidecar whose clock is wrong learns why
	wire.Write(c, no)                                             // if it can not be told it has gone
}

// logRefusal logs, but no flood.
func (s *Server) logRefusal(c tunnel.Candidate, app string, err error) {
	if !s.refusals.Allow() {
		s.unlogged.Add(1)
		return
	}
	s.log.Info("refused", "audit", "session_refused", "app", app, "from", c.RemoteAddr(), "carrier", c.Kind(), "code", tunnel.CodeOf(err), "why", tunnel.LogText(tunnel.Sentence(err), logSentence), "unlogged", s.unlogged.Swap(0))
}

// lingerClose lets the refusal arrive: closing with unread bytes would reset
// the connection and might destroy it. The peer closes first, or the deadline
// set before ends the wait.
func lingerClose(c tunnel.Candidate) {
	c.SetDeadline(time.Now().Add(time.Second))
	var b [256]byte
	for range 16 {
		if _, err := c.Read(b[:]); err != nil {
			break
		}
	}
}

// open admits a new session.
func (s *Server) open(ctx context.Context, c tunnel.Candidate, o *wire.Open) (wire.Welcome, func(), error) {
	s.mu.Lock()
	draining, known := s.draining, s.byKey[string(c.PeerKey())] != nil
	s.mu.Unlock()
	if draining {
		return wire.Welcome{}, nil, stopping()
	}
	if err := s.strikes.out(c.RemoteAddr().Addr()); err != nil && !known {
		return wire.Welcome{}, nil, err
	}
	if len(o.Instance) > maxInstance {
		return wire.Welcome{}, nil, tunnel.Errorf(tunnel.LimitExceeded, "the sidecar's instance is longer than %d bytes", maxInstance)
	}
	grant, err := s.cfg.Authorize(ctx, tunnel.Open{App: o.App, Token: o.Token, Region: o.Region, Operator: o.Operator, Key: c.PeerKey(), From: c.RemoteAddr()})
	if err != nil {
		return wire.Welcome{}, nil, err
	}
	l := &live{id: newID(), key: string(c.PeerKey()), app: o.App, instance: o.Instance, grant: grant}
	log := s.log.With("session", l.id, "app", l.app)
	how := session.OfferSealed(o.Sealed)
	sealed, err := session.ReadySealed(c, l.id, how)
	if err != nil {
		grant.Release()
		return wire.Welcome{}, nil, err
	}
	began := time.Now()
	next, throttled := grant.Next, (*throttle)(nil)
	if n := cmp.Or(grant.Rate, s.cfg.Rate); n > 0 {
		throttled = newThrottle(next, n)
		next = throttled
	}
	s.wg.Add(1) // until the session has ended
	l.far = session.NewFar(session.FarConfig{
		Next: next, Peer: tunnel.Peer{App: o.App, Addr: c.RemoteAddr()}, Peered: o.Version,
		Limits: grant.Limits.Or(s.cfg.Limits), Renew: renewal(grant.Renew, log), Memory: s.memory, Age: s.cfg.Age, ID: l.id, Hold: s.cfg.Hold,
		Ended: func(why error) {
			defer s.wg.Done()
			s.end(l.id, why)
			drops := map[string]uint64{}
			l.far.Drops(drops)
			if throttled != nil && throttled.dropped.Load() > 0 {
				drops[overRate] = throttled.dropped.Load()
			}
			if tunnel.CodeOf(why) == tunnel.LimitExceeded {
				s.strikes.add(c.RemoteAddr().Addr(), floodStrikes)
			}
			log.Info("session ended", "audit", "session_ended", "code", tunnel.CodeOf(why), "why", why, "for", time.Since(began).Round(time.Second), "dropped", drops)
		},
	})
	s.mu.Lock()
	if s.draining {
		s.mu.Unlock()
		grant.Release()
		l.far.Close(stopping())
		return wire.Welcome{}, nil, stopping()
	}
	old := s.byKey[l.key]
	s.byID[l.id], s.byKey[l.key] = l, l
	s.mu.Unlock()
	switch {
	case old == nil:
	case old.instance == l.instance: // it may just not have heard our answer
		s.end(old.id, tunnel.Errorf(tunnel.SessionExpired, "the sidecar has opened a new session"))
	default:
		s.supersede(old)
	}
	serve := func() {
		defer c.Close() // for where it turns into nothing
		carrier, err := c.Carrier()
		if err == nil {
			log.Info("session opened", "audit", "session_opened", "key", grant.Key, "token", grant.Token, "from", c.RemoteAddr(), "carrier", c.Kind())
			err = l.far.Serve(carrier, sealed)
		}
		log.Info("carrier ended", "carrier", c.Kind(), "why", err)
	}
	w := s.welcome(l)
	if sealed != nil {
		w.Sealed = how
	}
	return w, serve, nil
}

// renewal logs what comes of another token.
func renewal(renew func(string) error, log *slog.Logger) func(string) error {
	if renew == nil {
		return nil
	}
	return func(token string) error {
		err := renew(token)
		if err != nil {
			log.Info("token refused, the session keeps the one before", "audit", "token_refused", "code", tunnel.CodeOf(err), "why", tunnel.Sentence(err))
		} else {
			log.Info("token renewed", "audit", "token_renewed")
		}
		return err
	}
}

// join brings a lane or another carrier to its session. A session of another key is as unknown as
// one that does not exist.
func (s *Server) join(c tunnel.Candidate, j *wire.Join) (wire.Welcome, func(), error) {
	if j.As != wire.AsLane && j.As != wire.AsCarrier {
		return wire.Welcome{}, nil, tunnel.Errorf(tunnel.Unsupported, "a connection can join as %q or %q", wire.AsLane, wire.AsCarrier)
	}
	s.mu.Lock()
	l := s.byID[j.Session]
	s.mu.Unlock()
	if l == nil || l.key != string(c.PeerKey()) {
		return wire.Welcome{}, nil, tunnel.Errorf(tunnel.SessionUnknown, "there is no such session for this key; open a new one")
	}
	if l.joins.Add(1) > maxJoins {
		l.joins.Add(-1)
		return wire.Welcome{}, nil, tunnel.Errorf(tunnel.LimitExceeded, "%d connections have joined the session already; close some", maxJoins)
	}
	var how *wire.Sealed
	if j.As == wire.AsCarrier {
		how = session.OfferSealed(j.Sealed)
	}
	sealed, err := session.ReadySealed(c, l.id, how)
	if err != nil {
		l.joins.Add(-1)
		return wire.Welcome{}, nil, err
	}
	serve := func() {
		defer l.joins.Add(-1)
		defer c.Close() // for where it turns into nothing
		if j.As == wire.AsCarrier {
			if carrier, err := c.Carrier(); err == nil {
				s.log.Info("carrier joined", "session", l.id, "from", c.RemoteAddr(), "carrier", c.Kind())
				err = l.far.Serve(carrier, sealed)
				s.log.Info("carrier ended", "session", l.id, "carrier", c.Kind(), "why", err)
			}
		} else if lane, err := c.Lane(); err == nil {
			l.far.ServeLane(lane)
		}
	}
	w := s.welcome(l)
	if sealed != nil {
		w.Sealed = how
	}
	return w, serve, nil
}

func (s *Server) welcome(l *live) wire.Welcome {
	proxies := slices.Clone(s.cfg.Proxies)
	for i := range proxies {
		if p := &proxies[i]; p.Expires.IsZero() && p.Address != s.cfg.Address {
			p.Expires = time.Now().Add(proxiesFor).UTC().Truncate(time.Second)
		}
	}
	return wire.Welcome{Session: l.id, Limits: l.far.Limits(), Address: s.cfg.Address, Region: s.cfg.Region, Proxies: proxies, Lanes: s.cfg.Lanes}
}

// end ends a session once.
func (s *Server) end(id string, why error) {
	if l := s.take(id); l != nil {
		l.far.Close(why)
		l.grant.Release()
	}
}

// supersede ends a session whose key another process has come with: its own
// sidecar that was started anew, or one with a copy of the key. One that still
// runs is told so, and does not take the session back.
func (s *Server) supersede(old *live) {
	if s.take(old.id) != nil {
		old.far.End(tunnel.Errorf(tunnel.NotPermitted, "a sidecar with the same key was started and has the session now; give each sidecar a key_file of its own, then start this one again"))
		old.grant.Release()
	}
}

// checkEvery is how often sessions are asked whether they may go on.
const checkEvery = time.Second

// checkAll ends sessions that may not go on, until ctx ends.
func (s *Server) checkAll(ctx context.Context) {
	t := time.NewTicker(checkEvery)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-t.C:
		}
		for _, l := range s.sessions() {
			if l.grant.Check == nil {
				continue
			}
			if err := l.grant.Check(); err != nil {
				s.cut(l, err)
			}
		}
	}
}

// cut ends a session and tells the sidecar why.
func (s *Server) cut(l *live, err error) {
	if s.take(l.id) == nil {
		return
	}
	l.far.End(&tunnel.Error{Code: tunnel.CodeOf(err), Text: tunnel.Sentence(err), Err: err})
	l.grant.Release()
}

// take takes a session out of what can be joined; nil: it is not there.
func (s *Server) take(id string) *live {
	s.mu.Lock()
	defer s.mu.Unlock()
	l := s.byID[id]
	if l != nil {
		delete(s.byID, id)
		if s.byKey[l.key] == l {
			delete(s.byKey, l.key)
		}
	}
	return l
}

func stopping() error {
	return tunnel.Errorf(tunnel.CloudUnreachable, "the cloud proxy is about to stop and takes nothing new; Culvert connects again by itself")
}

// drain refuses new sessions, tells the live ones, and returns when they have
// finished or the time is over.
func (s *Server) drain(within time.Duration) {
	s.mu.Lock()
	s.draining = true
	s.mu.Unlock()
	for _, l := range s.sessions() {
		l.far.Drain(within)
	}
	deadline := time.After(within)
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	for {
		busy := 0
		for _, l := range s.sessions() {
			if l.far.Live() == 0 {
				s.end(l.id, stopping())
			} else {
				busy++
			}
		}
		if busy == 0 {
			return
		}
		select {
		case <-tick.C:
		case <-deadline:
			s.log.Warn("the drain time is over, live sessions are cut", "sessions", busy)
			return
		}
	}
}

func (s *Server) closeAll(why error) {
	for _, l := range s.sessions() {
		s.end(l.id, why)
	}
}

func (s *Server) sessions() []*live {
	s.mu.Lock()
	defer s.mu.Unlock()
	all := make([]*live, 0, len(s.byID))
	for _, l := range s.byID {
		all = append(all, l)
	}
	return all
}

// Sessions is the number of live sessions.
func (s *Server) Sessions() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.byID)
}

func newID() string {
	var b [16]byte
	rand.Read(b[:]) // never fails
	return hex.EncodeToString(b[:])
}
