package uplink

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"culvert/tunnel"
)

// Several cloud proxies may serve one sidecar: those of its configuration, in
// their order, and those that a cloud proxy has told of (the proxy information
// of Welcome), until they expire.
//
//	            GoAway, or a better one when nothing runs for 1 min
//	session ──────────────────────────────────────────────────────► Open at the next
//	   │                                                                 │ it has a way for datagrams
//	   │ streams go on here until they end, or the cloud proxy does      ▼
//	   └── associations: what still comes is delivered for 2 s ◄── associations are its own, with other ports
//
// So nothing is lost while a call changes over, where the first still serves.

const (
	// tryTime bounds an attempt at one of several cloud proxies.
	tryTime = 3 * time.Second
	// maxTold bounds the cloud proxies that are told of.
	maxTold = 16
	// moveRest is what lies between attempts to move.
	moveRest = time.Second
	// lateFor is how long what still comes by the session before is delivered.
	lateFor = 2 * time.Second
	// restless is how long nothing may have run before a better cloud proxy is
	// tried, and how long after a failure, doubled up to maxRestless.
	restless, maxRestless = time.Minute, 15 * time.Minute
)

// errMoved is why a session ends from which everything has moved.
var errMoved = tunnel.Errorf(tunnel.CloudProxyGone, "the sidecar has moved to another cloud proxy, and this stream could not")

// hear remembers the cloud proxies that one of them tells of. What can not be
// one is left out, with a line in the log.
func (u *Uplink) hear(from string, all []tunnel.ProxyAddr) {
	var told []tunnel.ProxyAddr
	for _, p := range all[:min(len(all), maxTold)] {
		if p.Address == from {
			continue
		}
		if err := credible(from, p.Address); err != nil {
			u.log.Warn("a cloud proxy was left out that the proxy information names", "code", tunnel.CodeOf(err), "why", tunnel.Sentence(err))
			continue
		}
		told = append(told, p)
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	u.told = told
}

// credible says whether a cloud proxy may send sidecars to an address. One that
// is reached over the network has nothing to say of this machine, or of its link.
func credible(from, to string) error {
	t, _, err := tunnel.ParseAddress(to)
	if err != nil {
		return err
	}
	f, _, _ := tunnel.ParseAddress(from)
	local := func(t tunnel.Target) bool {
		a := t.Addr.Unmap()
		if !a.IsValid() {
			a, _ = netip.ParseAddr(t.Host)
		}
		host := "." + strings.ToLower(strings.TrimSuffix(t.Host, ".")) // RFC 6761 §6.3
		return strings.HasSuffix(host, ".localhost") || a.IsLoopback() || a.IsUnspecified() || a.IsMulticast() || a.IsLinkLocalUnicast()
	}
	if local(t) && !local(f) {
		return tunnel.Errorf(tunnel.NotPermitted, "the cloud proxy at %s names %s, an address of this machine or its link; tell its operator", from, to)
	}
	return nil
}

// candidates returns the cloud proxies to try, in order; after, which has
// just served, comes last.
func (u *Uplink) candidates(after string) []string {
	all := slices.Clone(u.cfg.Proxies)
	u.mu.Lock()
	for _, p := range u.told {
		if (p.Expires.IsZero() || time.Now().Before(p.Expires)) && !slices.Contains(all, p.Address) {
			all = append(all, p.Address)
		}
	}
	u.mu.Unlock()
	if i := slices.Index(all, after); i >= 0 {
		all = append(slices.Delete(all, i, i+1), after)
	}
	return all
}

// others returns the cloud proxies beside the one at address.
func (u *Uplink) others(address string) []string {
	return slices.DeleteFunc(u.candidates(""), func(a string) bool { return same(a, address) })
}

// same says whether two addresses name the same cloud proxy, as far as one can tell.
func same(a, b string) bool {
	x, err := tunnel.ParseTarget(a)
	y, err2 := tunnel.ParseTarget(b)
	return a == b || err == nil && err2 == nil && x.Port == y.Port && (x.Host == y.Host && x.Addr.Unmap() == y.Addr.Unmap())
}

// try opens a session with one cloud proxy, in bounded time where there are several.
func (u *Uplink) try(ctx context.Context, mode tunnel.Mode, address string) (*granted, error) {
	if len(u.candidates("")) == 1 {
		return u.open(ctx, mode, address, maxRedirects)
	}
	ctx, cancel := context.WithTimeoutCause(ctx, tryTime, tunnel.Errorf(tunnel.CloudUnreachable, "the cloud proxy at %s did not answer in %v", address, tryTime))
	defer cancel()
	return u.open(ctx, mode, address, maxRedirects)
}

// moved is the change to another cloud proxy that was made in time.
func (u *Uplink) moved(from, to string) *tunnel.Change {
	return &tunnel.Change{
		What: tunnel.ChangedCloudProxy, From: from, To: to, Cause: tunnel.CloudProxyGone, NewPorts: true,
		Why: fmt.Sprintf("%s; %d associations go on with new ports", u.leftFor, u.Stats().Associations),
	}
}

// Why a cloud proxy is left while it serves.
const (
	whyGoing     = "it is about to stop"
	whySilent    = "nothing came from it any more"
	whyPreferred = "another is preferred"
)

// silentFor is how long a call has nothing come by any way before another cloud
// proxy is asked.
const silentFor = 2 * time.Second

// silent says whether a call has nothing come by any way.
func (r *run) silent(now time.Time) bool {
	return r.u.Busy() && !r.choose.doubt.IsZero() && now.Sub(r.choose.doubt) > silentFor
}

// moves says whether the reason for looking for another cloud proxy still stands.
func (r *run) moves(now time.Time) bool {
	switch r.move.why {
	case whyGoing:
		return true
	case whySilent:
		return r.silent(now)
	case whyPreferred:
		return !r.u.Busy() && !r.u.Streaming()
	}
	return false
}

// others returns the cloud proxies beside the one in use.
func (r *run) others() []string {
	return slices.DeleteFunc(r.u.others(r.address), func(a string) bool { return same(a, r.named) })
}

// A mover looks for another cloud proxy beside a session that goes on.
type mover struct {
	found  chan *granted      // capacity 1
	cancel context.CancelFunc // nil: nothing is looked for
	why    string
	work   sync.WaitGroup
	idle   time.Time     // since when nothing has run
	rest   time.Duration // after a failure to find a better one
}

// begin looks for one at the addresses, again and again until stop.
func (m *mover) begin(r *run, addresses []string, why string) {
	if m.cancel != nil || len(addresses) == 0 {
		return
	}
	ctx, cancel := context.WithCancel(context.Background())
	m.cancel, m.why = cancel, why
	m.work.Go(func() {
		for ctx.Err() == nil {
			for _, a := range addresses {
				g, err := r.u.try(ctx, r.mode, a)
				if err == nil {
					give(m.found, g)
					return
				}
				r.u.log.Info("another cloud proxy can not be had yet", "address", a, "code", tunnel.CodeOf(err), "why", tunnel.Sentence(err))
			}
			select {
			case <-time.After(r.u.cfg.jitter(moveRest)):
			case <-ctx.Done():
			}
		}
	})
}

// give hands a connection over to who wants one; one is enough.
func give(to chan<- *granted, g *granted) {
	select {
	case to <- g:
	default:
		g.cand.Close()
	}
}

// halt ends the search for now.
func (m *mover) halt() {
	if m.cancel != nil {
		m.cancel()
	}
	m.cancel, m.why = nil, ""
}

// stop ends the search. What was found too late is given back.
func (m *mover) stop() {
	if m.cancel != nil {
		m.cancel()
	}
	m.work.Wait()
	select {
	case g := <-m.found:
		g.cand.Close()
	default:
	}
}

// prefer moves to a cloud proxy that stands before the one in use, where nothing
// has run for a while.
func (r *run) prefer(now time.Time) {
	m := &r.move
	better := r.u.cfg.Proxies
	if i := slices.IndexFunc(better, func(a string) bool { return same(a, r.named) }); i >= 0 {
		better = better[:i]
	}
	if len(better) == 0 || r.u.Busy() || r.u.Streaming() || m.cancel != nil {
		m.idle = now
		return
	}
	if m.idle.IsZero() {
		m.idle = now
	}
	if now.Sub(m.idle) < max(restless, m.rest) {
		return
	}
	m.idle, m.rest, m.why = now, min(max(2*m.rest, restless), maxRestless), whyPreferred
	ctx, cancel := context.WithTimeout(context.Background(), tryTime)
	m.work.Go(func() {
		defer cancel()
		for _, a := range better {
			if g, err := r.u.try(ctx, r.mode, a); err == nil {
				give(m.found, g)
				return
			}
		}
	})
}

// linger serves what is open in a session that another has taken over from.
func (r *run) linger(ctx context.Context) {
	late := time.NewTimer(lateFor)
	defer late.Stop()
	tick := time.NewTicker(250 * time.Millisecond)
	defer tick.Stop()
	released := false
	var lost time.Time // since when no path serves it; zero: one does
	for {
		select {
		case <-ctx.Done():
			return
		case <-r.over:
			return
		case <-late.C:
			r.at.Release()
			released = true
		case <-tick.C:
		}
		switch {
		case r.alone() == nil:
			lost = time.Time{}
		case lost.IsZero():
			lost = time.Now()
		case time.Since(lost) > lonely: // it was to end anyway
			return
		}
		if released && r.at.Streams() == 0 {
			r.at.Leave()
			select {
			case <-r.over:
			case <-time.After(leaveTime):
			}
			return
		}
	}
}
