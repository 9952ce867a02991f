package channel

import (
	"cmp"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
	"unicode"
)

const (
	maxLeases = 256
	maxByes   = 64  // goodbyes that wait to find their source
	maxWhy    = 256 // reasons that wait for the next Tick
	maxName   = 64  // bytes of a name that came from outside
	maxTexts  = 8   // evidence, per channel
	tickGap   = int64(5 * time.Second)
)

// Config is what a Watcher needs. The zero value works.
type Config struct {
	// Keep is how long a flow stays live after its last packet of evidence.
	// Zero is 30 s; values outside 20 to 60 s are moved to the nearer bound.
	Keep time.Duration
	// QuietFor is how long a call on hold, RTP without ICE on a socket that is
	// still open, stays quiet after its last media. Zero is 10 min.
	QuietFor time.Duration
	// MediaRule reports whether the policy rule for a destination is tagged
	// "media". It is asked once for each flow, on its first packet, and must
	// not block. Nil: no destination is.
	MediaRule func(Target) bool
	// Changed is told of each channel that begins, changes its state or ends.
	// It is called by Tick, on its goroutine, and must not call Tick. Nil: nobody.
	Changed func(Event)
	// Alive reports whether a process lives. A lease whose process does not
	// ends. Nil: all do.
	Alive func(pid int) bool
	// MaxFlows bounds the flows that are followed. Zero is 65,536.
	MaxFlows int
	// Epoch is where the watcher's clock begins; it must not be after any time
	// that is passed in later. Zero is the time of New.
	Epoch time.Time
}

// Owner says whose a socket is. Two with the same process are the same app;
// without a process, those with the same user; without either, those with the
// same address.
type Owner struct {
	App  string     // the process's name, where it is known at once
	PID  int        // 0: not known
	User string     // SOCKS or HTTP user name
	Addr netip.Addr // where the request came from
	// Resolve finds the process. It may take milliseconds: it is called at most
	// once, inside Channels or Tick, and only when the socket has live flows.
	Resolve func() (app string, pid int)
}

// Channel is an app's live flows, or a lease.
type Channel struct {
	Name     string    `json:"name"`
	App      string    `json:"app,omitempty"`
	User     string    `json:"user,omitempty"`
	PID      int       `json:"pid,omitempty"`
	State    string    `json:"state"` // "live" or "quiet"
	Since    time.Time `json:"since"`
	Last     time.Time `json:"last"` // the last evidence
	Evidence []string  `json:"evidence"`
	Lease    bool      `json:"lease,omitempty"` // joined by name
	Flows    int       `json:"flows"`
}

// Event is one change of a channel.
type Event struct {
	Channel Channel `json:"channel"`       // as it is; the last seen where it has ended
	Was     string  `json:"was,omitempty"` // its state before; empty: there was none
	Is      string  `json:"is,omitempty"`  // its state now; empty: it has ended
	Why     string  `json:"why"`           // one clause
}

// A Watcher knows which apps are in a channel. It is safe for concurrent use.
type Watcher struct {
	cfg   Config
	flows atomic.Int64

	// The watcher's clock is the time since the epoch less what stood still.
	still   atomic.Int64
	stopped atomic.Int64 // where the raw clock was paused; 0: it runs
	ticked  atomic.Int64 // the raw clock at the last Tick; 0: there was none

	tickMu sync.Mutex // one Tick at a time; taken before mu
	was    map[string]Channel

	clockMu sync.Mutex // guards changes of the clock
	mu      sync.Mutex // guards what follows; taken after a party's
	hot     map[*party]struct{}
	leases  map[string]lease
	why     map[string]string // by key
	byes    []bye
}

type lease struct {
	pid   int
	since int64
}

// key is what the lease is grouped by: its process, so that the process's own
// flows and the lease are one channel.
func (l lease) key(name string) string {
	if l.pid > 0 {
		return "pid:" + strconv.Itoa(l.pid)
	}
	return "lease:" + name
}

type bye struct {
	addr netip.Addr
	ssrc uint32
}

// New makes a watcher. It holds nothing that would have to be closed.
func New(cfg Config) *Watcher {
	cfg.Keep = min(max(cmp.Or(cfg.Keep, 30*time.Second), 20*time.Second), time.Minute)
	cfg.QuietFor = cmp.Or(cfg.QuietFor, 10*time.Minute)
	cfg.MaxFlows = cmp.Or(cfg.MaxFlows, 1<<16)
	if cfg.Epoch.IsZero() {
		cfg.Epoch = time.Now()
	}
	// Nothing happens at 0, which means never.
	cfg.Epoch = cfg.Epoch.Add(-time.Minute)
	return &Watcher{cfg: cfg, was: map[string]Channel{}, hot: map[*party]struct{}{}, leases: map[string]lease{}, why: map[string]string{}}
}

// OpenSocket begins to follow one UDP association.
func (w *Watcher) OpenSocket(owner Owner) *Socket {
	return &Socket{party: party{w: w, owner: owner, app: owner.App, pid: owner.PID}}
}

// OpenStream begins to follow one TCP stream.
func (w *Watcher) OpenStream(owner Owner, target Target) *StreamFlow {
	s := &StreamFlow{party: party{w: w, owner: owner, app: owner.App, pid: owner.PID}, f: flow{remote: target, stream: true}}
	w.flows.Add(1)
	s.flows = []*flow{&s.f}
	return s
}

// Join takes a lease for a launcher that knows of a channel by itself: it lasts
// until Leave, or until its process has died where pid is not 0.
func (w *Watcher) Join(name string, pid int, now time.Time) error {
	if name == "" || len(name) > maxName || plain(name) != name {
		return fmt.Errorf("the channel's name must be 1 to %d printable characters", maxName)
	}
	if pid < 0 || pid > 0 && w.cfg.Alive != nil && !w.cfg.Alive(pid) {
		return fmt.Errorf("there is no process %d that could hold channel %s", pid, name)
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	old, have := w.leases[name]
	if !have && len(w.leases) >= maxLeases {
		return fmt.Errorf("there are %d channels already joined by name; leave one first", maxLeases)
	}
	if !have || old.pid != pid {
		w.leases[name] = lease{pid, w.at(now)}
	}
	return nil
}

// Leave ends a lease, and reports whether there was one. Channels that have
// evidence of their own stay.
func (w *Watcher) Leave(name string) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	l, ok := w.leases[name]
	delete(w.leases, name)
	if ok {
		w.why[l.key(name)] = "it was left"
	}
	return ok
}

// Pause makes the clock stand still: without a carrier an app's silence says
// nothing. No flow enters meanwhile; sockets that close still end theirs.
func (w *Watcher) Pause(now time.Time) {
	w.clockMu.Lock()
	defer w.clockMu.Unlock()
	if w.stopped.Load() == 0 {
		w.stopped.Store(w.raw(now))
	}
}

// Resume lets the clock go on.
func (w *Watcher) Resume(now time.Time) {
	w.clockMu.Lock()
	defer w.clockMu.Unlock()
	if at := w.stopped.Load(); at != 0 {
		// In this order, a reader in between sees the clock behind, not ahead.
		w.still.Add(w.raw(now) - at)
		w.stopped.Store(0)
		w.ticked.Store(0) // what passed was not a gap between ticks
	}
}

func (w *Watcher) paused() bool { return w.stopped.Load() != 0 }

func (w *Watcher) raw(now time.Time) int64 { return int64(now.Sub(w.cfg.Epoch)) }

// at is now on the watcher's clock. It waits for a Tick that is overdue.
func (w *Watcher) at(now time.Time) int64 {
	raw := w.raw(now)
	if at := w.stopped.Load(); at != 0 {
		raw = at
	} else if last := w.ticked.Load(); last != 0 {
		raw = min(raw, last+tickGap)
	}
	return raw - w.still.Load()
}

// Tick is to be called once a second by whoever owns the watcher: it tells
// Changed what has changed. Where ticks stay away for more than five seconds
// the machine was suspended, or the process stopped: that time does not count.
// (Linux stops its monotonic clock in a suspend anyway.)
func (w *Watcher) Tick(now time.Time) {
	w.tickMu.Lock()
	defer w.tickMu.Unlock()
	w.clockMu.Lock()
	raw := w.raw(now)
	if last := w.ticked.Load(); last != 0 && !w.paused() {
		w.still.Add(max(raw-last-tickGap, 0))
	}
	w.ticked.Store(raw)
	w.clockMu.Unlock()

	is := map[string]Channel{}
	for _, c := range w.survey(now) {
		is[c.key] = c.Channel
	}
	w.mu.Lock()
	why := w.why
	w.why = map[string]string{}
	w.mu.Unlock()
	var events []Event
	for k, c := range is {
		if was := w.was[k]; was.State != c.State {
			events = append(events, Event{Channel: c, Was: was.State, Is: c.State, Why: strings.Join(c.Evidence[:min(1, len(c.Evidence))], "")})
		}
	}
	for k, c := range w.was {
		if _, ok := is[k]; !ok {
			events = append(events, Event{Channel: c, Was: c.State, Why: cmp.Or(why[k], "it ended")})
		}
	}
	w.was = is
	if w.cfg.Changed == nil {
		return
	}
	slices.SortFunc(events, func(a, b Event) int { return cmp.Compare(a.Channel.Name, b.Channel.Name) })
	for _, e := range events {
		w.cfg.Changed(e)
	}
}

// Channels returns the channels at this moment, by name. It may take some
// milliseconds when a process has to be found.
func (w *Watcher) Channels(now time.Time) []Channel {
	all := []Channel{} // never nil: an empty list in JSON
	for _, c := range w.survey(now) {
		all = append(all, c.Channel)
	}
	return all
}

// keyed is a channel with what it was grouped by.
type keyed struct {
	Channel
	key string
}

// survey looks at the flows that count and groups them.
func (w *Watcher) survey(now time.Time) []keyed {
	t := w.at(now)
	w.mu.Lock()
	hot := make([]*party, 0, len(w.hot))
	for p := range w.hot {
		hot = append(hot, p)
	}
	byes := w.byes
	w.byes = nil
	leases := maps.Clone(w.leases)
	w.mu.Unlock()

	groups := map[string]*keyed{}
	when := func(at int64) time.Time { return now.Add(time.Duration(at - t)) }
	for _, p := range hot {
		p.resolve()
		p.mu.Lock()
		seen := false
		for _, f := range p.flows {
			if f.by == byNone {
				continue
			}
			for _, b := range byes {
				if b.addr == p.owner.Addr {
					f.left(b.ssrc, t)
				}
			}
			s, why := f.state(&w.cfg, t)
			if s == none {
				f.end()
				p.cool(why)
				continue
			}
			seen = true
			k := p.key()
			g := groups[k]
			if g == nil {
				g = &keyed{Channel{Name: p.name(), App: plain(p.app), User: plain(p.owner.User), PID: p.pid, State: s.String(), Since: when(f.since), Last: when(f.kept)}, k}
				groups[k] = g
			}
			if s == live {
				g.State = live.String()
			}
			if at := when(f.since); at.Before(g.Since) {
				g.Since = at
			}
			if at := when(f.kept); at.After(g.Last) {
				g.Last = at
			}
			g.Flows++
			for _, e := range f.evidence(s, t) {
				if len(g.Evidence) < maxTexts {
					g.Evidence = append(g.Evidence, e)
				}
			}
		}
		if !seen && p.hot {
			p.hot = false
			w.mu.Lock()
			delete(w.hot, p)
			w.mu.Unlock()
		}
		p.mu.Unlock()
	}
	w.addLeases(groups, leases, now, t)

	all := make([]keyed, 0, len(groups))
	for _, g := range groups {
		slices.Sort(g.Evidence)
		all = append(all, *g)
	}
	slices.SortFunc(all, func(a, b keyed) int { return cmp.Or(cmp.Compare(a.Name, b.Name), cmp.Compare(a.key, b.key)) })
	return all
}

// addLeases adds what launchers have said. A lease for a process that has a
// channel already gives that channel its name.
func (w *Watcher) addLeases(groups map[string]*keyed, leases map[string]lease, now time.Time, t int64) {
	for _, name := range slices.Sorted(maps.Keys(leases)) {
		l := leases[name]
		k := l.key(name)
		if l.pid > 0 && w.cfg.Alive != nil && !w.cfg.Alive(l.pid) {
			w.mu.Lock()
			if w.leases[name] == l {
				delete(w.leases, name)
				w.why[k] = "its process has ended"
			}
			w.mu.Unlock()
			continue
		}
		since := now.Add(time.Duration(l.since - t))
		said := "joined by name " + ago(t-l.since)
		if l.pid > 0 {
			said += ", held by process " + strconv.Itoa(l.pid)
		}
		if have := groups[k]; have != nil && have.Lease {
			k = "lease:" + name // a process may hold several
		}
		g := groups[k]
		if g == nil {
			g = &keyed{Channel{PID: l.pid, Since: since}, k}
			groups[k] = g
		}
		g.Name, g.Lease, g.State, g.Last = name, true, live.String(), now
		if since.Before(g.Since) {
			g.Since = since
		}
		g.Evidence = append(g.Evidence, said)
	}
}

// byeElsewhere keeps a goodbye whose source is not on its own flow.
func (w *Watcher) byeElsewhere(addr netip.Addr, ssrc uint32) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.hot) > 0 && len(w.byes) < maxByes {
		w.byes = append(w.byes, bye{addr, ssrc})
	}
}

// resolve finds the owner's process, once.
func (p *party) resolve() {
	p.ask.Do(func() {
		if p.owner.Resolve == nil || p.owner.PID != 0 {
			return
		}
		app, pid := p.owner.Resolve()
		p.mu.Lock()
		p.app, p.pid = cmp.Or(app, p.app), pid
		p.mu.Unlock()
	})
}

// key is what a party's flows are grouped by. p.mu is held.
func (p *party) key() string {
	switch {
	case p.pid > 0:
		return "pid:" + strconv.Itoa(p.pid)
	case p.owner.User != "":
		return "user:" + p.owner.User
	case p.app != "":
		return "app:" + p.app
	}
	return "addr:" + p.owner.Addr.String()
}

// name is what people call the channel. p.mu is held.
func (p *party) name() string {
	switch {
	case p.pid > 0 && p.app != "":
		return plain(p.app) + "/" + strconv.Itoa(p.pid)
	case p.pid > 0:
		return "pid/" + strconv.Itoa(p.pid)
	case p.owner.User != "":
		return plain(p.owner.User)
	case p.app != "":
		return plain(p.app)
	}
	return p.owner.Addr.String()
}

// plain makes a string from outside safe to show: no control characters, no
// line ends, not long.
func plain(s string) string {
	s = strings.Map(func(r rune) rune {
		if r == unicode.ReplacementChar || !unicode.IsPrint(r) {
			return '?'
		}
		return r
	}, s)
	if len(s) > maxName {
		s = strings.ToValidUTF8(s[:maxName-3], "") + "..."
	}
	return s
}
