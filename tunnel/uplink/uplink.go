package uplink

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net/netip"
	"slices"
	"sync"
	"time"

	"culvert/tunnel"
	"culvert/tunnel/media"
	"culvert/tunnel/session"
	"culvert/tunnel/wire"
)

// Config is what an uplink needs.
type Config struct {
	Proxies   []string                  // cloud proxies as tunnel.ParseAddress reads them, in order of preference; at least one
	QUIC, TLS tunnel.Dialer             // one may be nil
	Open      func() (wire.Open, error) // what to say of ourselves; asked anew each time, since tokens are renewed
	Age       time.Duration             // how long a datagram may wait; 0: media.MaxAge
	Lanes     int                       // how many lanes serve a call best with this host's TCP; 0: 4
	GiveUp    time.Duration             // how long to try after a session was lost; 0: 20 minutes
	// Network names the network by which an address is reached at the moment, so
	// that what was found about UDP is remembered for each. "": there is none at
	// the moment. nil: all are one.
	Network func(to netip.AddrPort) string
	// Renewed receives when Open may have another token to say: it then becomes
	// the session's. nil: only new sessions have it.
	Renewed <-chan struct{}
	// Changed receives when this host's addresses or routes may have changed, as
	// often as it likes. nil: nobody tells.
	Changed <-chan struct{}
	Log     *slog.Logger                      // nil: none
	jitter  func(time.Duration) time.Duration // tests
}

const (
	// headStart is what QUIC gets before TLS over TCP is tried too: a round
	// trip of most paths, and little against the 700 ms that a start may take.
	headStart = 150 * time.Millisecond
	// openTime bounds the opening exchange.
	openTime = 5 * time.Second
	giveUp   = 20 * time.Minute

	firstBackoff = 250 * time.Millisecond
	maxBackoff   = 10 * time.Second // before jitter of half up or down
	maxRedirects = 3

	// After a loss a call may be waiting: for so long pauses stay this short.
	lossWatch   = 30 * time.Second
	lossBackoff = time.Second
)

// Uplink is the near end of the tunnel: a tunnel.Link.
//
//	Run: ──► connect ──ok──► serve ──carrier lost──► backoff ──► connect …
//	            │ failed: backoff                       │
//	            └── can not be mended, or lost for 20 min ──► return the cause
//
//	connect: for each cloud proxy: race ──► Open; or Open alone, on the connection
//	         on which a Join was answered with session_unknown
//	race:    QUIC ─────────────► first handshake wins; the other is dropped
//	         150 ms ──► TLS ───►
//	         and, when the cloud proxy says that it is going, the next one (move.go)
//	serve:   each path (QUIC; TLS with its lanes) is joined while it is needed
//	         (path.go, lanes.go), and datagrams go by the way that the chooser
//	         names (choose.go)
type Uplink struct {
	*session.Near
	cfg       Config
	log       *slog.Logger
	instance  string // of this sidecar, for Open
	narrator  narrator
	memory    memory
	lingering sync.WaitGroup // sessions that another has taken over from
	leftFor   string         // why the last one was left; Run's goroutine's
	spare     chan *granted  // capacity 1: a connection on which a session may be opened

	mu   sync.Mutex         // guards told
	told []tunnel.ProxyAddr // cloud proxies that one of them has told of
}

// New checks the configuration.
func New(cfg Config) (*Uplink, error) {
	if len(cfg.Proxies) == 0 {
		return nil, tunnel.Errorf(tunnel.ConfigInvalid, "there is no cloud proxy to connect to; set cloud_proxy.address")
	}
	for _, p := range cfg.Proxies {
		if _, _, err := tunnel.ParseAddress(p); err != nil {
			return nil, err
		}
	}
	if cfg.QUIC == nil && cfg.TLS == nil || cfg.Open == nil {
		return nil, tunnel.Errorf(tunnel.ConfigInvalid, "an uplink needs a dialer and something to say")
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.Lanes == 0 {
		cfg.Lanes = defaultLanes
	}
	if cfg.GiveUp == 0 {
		cfg.GiveUp = giveUp
	}
	if cfg.Network == nil {
		cfg.Network = func(netip.AddrPort) string { return "" }
	}
	if cfg.jitter == nil {
		cfg.jitter = func(d time.Duration) time.Duration { return d/2 + rand.N(d) }
	}
	near := session.NewNear(cfg.Age)
	return &Uplink{Near: near, spare: make(chan *granted, 1), cfg: cfg, log: cfg.Log, instance: fmt.Sprintf("%016x", rand.Uint64()), narrator: narrator{course: near.Course}}, nil
}

// Run implements tunnel.Link.
func (u *Uplink) Run(ctx context.Context, mode tunnel.Mode, report func(tunnel.LinkState)) error {
	var err error
	defer func() {
		why := err
		if why == nil {
			why = tunnel.Errorf(tunnel.ProxyStopped, "Culvert has been stopped; 'culvert start' starts it again")
		}
		u.EndAll(why)
		u.lingering.Wait()
		u.dropSpare()
	}()
	var said tunnel.LinkState
	say := func(state tunnel.LinkState) {
		if state.Change != nil || state.Phase == tunnel.LinkUp || state.Phase != said.Phase || state.Code != said.Code || state.Why != said.Why {
			said = state
			report(state)
		}
	}
	say(tunnel.LinkState{Phase: tunnel.LinkConnecting, Why: "started"})
	var lost time.Time // when the last session ended
	var ended error    // why
	everUp, address, wait := false, "", firstBackoff
	for {
		var g *granted
		trying := time.Now()
		if g, err = u.again(ctx, mode, address); g == nil && err == nil {
			g, err = u.connect(ctx, mode, address)
		}
		if err == nil {
			up := time.Now()
			if everUp {
				u.reopened(g, address, lost, ended, say)
			}
			everUp = true
			took := up.Sub(trying)
			var change *tunnel.Change
			for g != nil {
				address = g.address
				g, lost, err = u.serve(ctx, g, change, mode, took, say)
				if g != nil {
					change, took = u.moved(address, g.address), 0
				}
			}
			ended = err
			if lost.Sub(up) > maxBackoff { // else it may come and go as fast as it can
				wait = firstBackoff
			}
		}
		if ctx.Err() != nil {
			err = nil
			return nil
		}
		if final(err, everUp) || everUp && time.Since(lost) > u.cfg.GiveUp {
			return err
		}
		say(connecting(err))
		if wait == firstBackoff && len(u.spare) > 0 {
			wait *= 2 // once, or it might come and go as fast as it can
			continue
		}
		u.dropSpare()
		pause := u.cfg.jitter(wait)
		u.log.Warn("no connection to the cloud proxy", "code", tunnel.CodeOf(err), "why", tunnel.Sentence(err), "again_in", pause.Round(time.Millisecond))
		wait = min(2*wait, maxBackoff)
		if everUp && time.Since(lost) < lossWatch {
			wait = min(wait, lossBackoff) // a call may be waiting
		}
		select {
		case <-time.After(pause):
		case <-u.cfg.Changed:
			wait = firstBackoff
		case <-ctx.Done():
			err = nil
			return nil
		}
	}
}

// reopened tells that another session follows one that ended at lost, and why
// that was. What it cost is counted until datagrams come by the new one.
func (u *Uplink) reopened(g *granted, before string, lost time.Time, ended error, say func(tunnel.LinkState)) {
	now := time.Now()
	var told []tunnel.Change
	if g.address != before {
		told = append(told, tunnel.Change{
			At: now, What: tunnel.ChangedCloudProxy, From: before, To: g.address, Cause: tunnel.CloudProxyGone, NewPorts: true,
			Why: "the one before did not answer any more, or sent us on",
		})
	}
	c := tunnel.Change{
		At: now, What: tunnel.ChangedSession, To: g.welcome.Session, Cause: tunnel.CodeOf(ended), Gap: now.Sub(lost), NewPorts: true,
		Why: fmt.Sprintf("another session was opened; %d associations go on with new ports, streams were reset", u.Stats().Associations),
	}
	if c.Gap > session.DefaultHold { // whatever had made it so
		c.Cause = tunnel.SessionExpired
	}
	last := u.narrator.calm.Last
	told = append(told, u.narrator.begin(now, &c, u.Busy() && lost.Sub(last) <= recently)...)
	for _, c := range told {
		say(tunnel.LinkState{Phase: tunnel.LinkConnecting, Change: &c})
	}
}

// connecting is the state after a failure.
func connecting(err error) tunnel.LinkState {
	code := tunnel.CodeOf(err)
	return tunnel.LinkState{
		Phase: tunnel.LinkConnecting, Code: code, Why: tunnel.Sentence(err),
		Refused: saidNo(err) || slices.Contains(forPeople, code),
	}
}

// forPeople are failures on the way that only a person can mend.
var forPeople = []tunnel.Code{tunnel.CertificateUntrusted, tunnel.TLSIntercepted, tunnel.ProxyAuthRequired}

// A refusal is what a cloud proxy said, in a connection that its certificate
// has vouched for. The same code from elsewhere proves nothing.
type refusal struct{ error }

func (r refusal) Unwrap() error { return r.error }

func saidNo(err error) bool {
	var r refusal
	return errors.As(err, &r)
}

// final says whether repeating can not mend the error: the cloud proxy itself
// has said what only a person can change. A full quota empties, and a
// certificate that is not the right one may be a captive portal's; but what is
// wrong here from the beginning stays wrong.
func final(err error, everUp bool) bool {
	switch tunnel.CodeOf(err) {
	case tunnel.TokenExpired, tunnel.TokenRejected, tunnel.VersionMismatch, tunnel.NotPermitted:
		return saidNo(err)
	case tunnel.ConfigInvalid:
		return !everUp
	}
	return false
}

// connect opens a session with the first cloud proxy that grants one. after is
// the one that served last, which comes last; "": none did.
func (u *Uplink) connect(ctx context.Context, mode tunnel.Mode, after string) (*granted, error) {
	var first error // one that is not final before one that is
	for _, address := range u.candidates(after) {
		c, err := u.try(ctx, mode, address)
		if err == nil {
			return c, nil
		}
		if first == nil || final(first, true) && !final(err, true) {
			first = err
		}
		if ctx.Err() != nil {
			break
		}
	}
	return nil, first
}

// hello is what is said to open a session.
func (u *Uplink) hello() (wire.Open, error) {
	hello, err := u.cfg.Open()
	hello.Version, hello.Sealed, hello.Instance = wire.Current, media.PreferredAEADs(), u.instance
	return hello, err
}

// open opens a session with one cloud proxy.
func (u *Uplink) open(ctx context.Context, mode tunnel.Mode, address string, redirects int) (*granted, error) {
	hello, err := u.hello()
	if err != nil {
		return nil, err
	}
	ask := wire.Message{Open: &hello}
	began := time.Now()
	cand, why, err := u.race(ctx, mode, address)
	if err != nil {
		return nil, err
	}
	m, err := exchange(ctx, cand, ask)
	if tunnel.CodeOf(err) == tunnel.CloudUnreachable && mode == tunnel.ModeAuto && cand.Kind() == "quic" && u.cfg.TLS != nil && ctx.Err() == nil {
		// UDP passed a handshake and then nothing.
		cand.Close()
		why = "UDP stopped passing after the QUIC handshake, so TLS over TCP is used"
		if cand, err = u.cfg.TLS.Dial(ctx, address); err != nil {
			return nil, err
		}
		m, err = exchange(ctx, cand, ask)
	}
	return u.answered(ctx, mode, &granted{cand: cand, address: address, why: why, token: hello.Token, took: time.Since(began)}, m, err, redirects)
}

// again opens a session on the connection on which the cloud proxy at address has
// said that it does not know the one before, as after a restart: a call waits,
// and many sidecars come at once. It returns nothing where there is none.
func (u *Uplink) again(ctx context.Context, mode tunnel.Mode, address string) (*granted, error) {
	var g *granted
	select {
	case g = <-u.spare:
	default:
		return nil, nil
	}
	hello, err := u.hello()
	if err != nil {
		g.cand.Close()
		return nil, err
	}
	g.address, g.token = address, hello.Token
	g.why = fmt.Sprintf("%s answered in %v when the session before was to be joined", g.cand.Kind(), inWords(g.took))
	m, err := exchange(ctx, g.cand, wire.Message{Open: &hello})
	return u.answered(ctx, mode, g, m, err, maxRedirects)
}

func (u *Uplink) dropSpare() {
	select {
	case g := <-u.spare:
		g.cand.Close()
	default:
	}
}

// answered returns what came of an Open on a connection, by the answer.
func (u *Uplink) answered(ctx context.Context, mode tunnel.Mode, g *granted, m wire.Message, err error, redirects int) (*granted, error) {
	switch {
	case err != nil:
	case m.Refused != nil:
		err = refusal{m.Refused.Err()}
	case m.Redirect != nil:
		g.cand.Close()
		return u.follow(ctx, mode, g.address, m.Redirect.Addresses, redirects)
	case m.Welcome == nil:
		err = tunnel.Errorf(tunnel.Internal, "%s answered the opening with something else", g.address)
	}
	if err != nil {
		g.cand.Close()
		return nil, err
	}
	g.welcome = *m.Welcome
	u.hear(g.address, m.Welcome.Proxies)
	if v := via(g.cand); v != "" {
		g.why += "; through " + v
	}
	return g, nil
}

// via says what a connection goes through, such as a proxy; "": nothing.
func via(c tunnel.Candidate) string {
	if v, ok := c.(interface{ Via() string }); ok {
		return v.Via()
	}
	return ""
}

// follow opens a session where a cloud proxy has sent us.
func (u *Uplink) follow(ctx context.Context, mode tunnel.Mode, from string, to []string, redirects int) (*granted, error) {
	if redirects == 0 || len(to) == 0 {
		return nil, tunnel.Errorf(tunnel.CloudUnreachable, "the cloud proxy at %s sends on to nowhere, or the %d cloud proxies asked send in a circle; tell its operator", from, maxRedirects+1)
	}
	var err error
	for _, next := range to[:min(len(to), maxRedirects)] {
		if err = credible(from, next); err != nil {
			continue
		}
		var c *granted
		if c, err = u.open(ctx, mode, next, redirects-1); err == nil || ctx.Err() != nil {
			return c, err
		}
	}
	return nil, err
}

// exchange says one thing on a candidate and reads the answer.
func exchange(ctx context.Context, cand tunnel.Candidate, m wire.Message) (wire.Message, error) {
	cand.SetDeadline(time.Now().Add(openTime))
	unhook := context.AfterFunc(ctx, func() { cand.SetDeadline(time.Unix(1, 0)) })
	defer unhook()
	err := wire.Write(cand, m)
	if err == nil {
		m, err = wire.Read(cand, wire.Version{})
	}
	var coded *tunnel.Error
	if err != nil && !errors.As(err, &coded) {
		err = tunnel.Errorf(tunnel.CloudUnreachable, "the cloud proxy at %s closed the connection or did not answer: %w", cand.RemoteAddr(), err)
	}
	if err == nil {
		err = cand.SetDeadline(time.Time{})
	}
	return m, err
}

func wrapLost(err error) error {
	var coded *tunnel.Error
	if errors.As(err, &coded) {
		return err
	}
	return tunnel.Errorf(tunnel.CloudUnreachable, "the connection to the cloud proxy was lost: %w", err)
}

// race dials as the mode allows and returns the first candidate, with the
// reason why it is the one.
func (u *Uplink) race(ctx context.Context, mode tunnel.Mode, address string) (tunnel.Candidate, string, error) {
	quic, tls := u.cfg.QUIC, u.cfg.TLS
	switch mode {
	case tunnel.ModeUDP:
		tls = nil
	case tunnel.ModeTCP:
		quic = nil
	}
	switch {
	case quic == nil && tls == nil:
		return nil, "", tunnel.Errorf(tunnel.ConfigInvalid, "mode %s has no carrier here", mode)
	case quic == nil:
		c, err := tls.Dial(ctx, address)
		return c, fmt.Sprintf("mode is %s", mode), err
	case tls == nil:
		c, err := quic.Dial(ctx, address)
		return c, fmt.Sprintf("mode is %s", mode), err
	}

	ctx, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	defer func() { cancel(); wg.Wait() }() // the loser ends with us
	type result struct {
		c    tunnel.Candidate
		err  error
		kind string
	}
	results := make(chan result, 2)
	dial := func(d tunnel.Dialer) {
		wg.Go(func() {
			c, err := d.Dial(ctx, address)
			if err == nil && ctx.Err() != nil {
				c.Close()
				err = ctx.Err()
			}
			results <- result{c, err, d.Kind()}
		})
	}
	began := time.Now()
	dial(quic)
	timer := time.NewTimer(headStart)
	defer timer.Stop()
	running, tlsStarted := 1, false
	startTLS := func() {
		if !tlsStarted {
			tlsStarted = true
			running++
			dial(tls)
		}
	}
	var errs [2]error
	for running > 0 {
		select {
		case <-timer.C:
			startTLS()
		case r := <-results:
			running--
			switch {
			case r.err == nil:
				if running > 0 { // the other may have finished in this very moment
					cancel()
					wg.Wait()
					if other := <-results; other.err == nil {
						other.c.Close()
					}
				}
				return r.c, raceWon(r.kind, time.Since(began), tlsStarted, errs[0]), nil
			case r.kind == quic.Kind():
				errs[0] = r.err
				startTLS()
			default:
				errs[1] = r.err
			}
		}
	}
	if errs[1] != nil && tunnel.CodeOf(errs[1]) != tunnel.CloudUnreachable {
		return nil, "", errs[1] // TCP got further than nowhere: that says more
	}
	if c := tunnel.CodeOf(errs[0]); c != tunnel.UDPBlocked && c != tunnel.CloudUnreachable {
		return nil, "", errs[0]
	}
	return nil, "", tunnel.Errorf(tunnel.CloudUnreachable, "the cloud proxy at %s answers neither over UDP nor over TCP; check the address, and that the firewall lets it through on this port: %w", address, errors.Join(errs[:]...))
}

func raceWon(kind string, took time.Duration, both bool, quicErr error) string {
	ms := inWords(took)
	switch {
	case kind == "quic" && !both:
		return fmt.Sprintf("QUIC answered in %v", ms)
	case kind == "quic":
		return fmt.Sprintf("QUIC answered in %v, before TLS over TCP", ms)
	case quicErr != nil:
		return fmt.Sprintf("QUIC failed (%s), TLS over TCP answered in %v", tunnel.CodeOf(quicErr), ms)
	}
	return fmt.Sprintf("UDP had not answered when TLS over TCP did, after %v", ms)
}
