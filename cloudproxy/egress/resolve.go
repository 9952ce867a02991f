package egress

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"culvert/tunnel"
)

// A Resolver looks names up.
type Resolver = tunnel.Resolver

// ResolveConfig says how names are resolved. The zero value is usable.
type ResolveConfig struct {
	Resolver Resolver      // nil: the system's
	Timeout  time.Duration // for one lookup; 0: 5 s
	TTL      time.Duration // how long an answer is used; 0: 30 s, at most 60 s
	Families string        // "ip4", "ip6"; empty: both
}

const (
	maxTTL     = 60 * time.Second
	failureTTL = 5 * time.Second        // for an answer that there is no such name
	stagger    = 250 * time.Millisecond // RFC 8305 §5, Connection Attempt Delay
	maxCached  = 4096
	maxLookups = 256  // at once
	maxShare   = 32   // of them for one peer
	maxOfApp   = 128  // and for all peers of one App ID
	maxWaits   = 4096 // that associations of one peer wait for at once: one name may be waited for by thousands
	maxAddrs   = 16   // of one name that are tried

	maxNames     = 256 // that an association remembers
	maxPending   = 16  // names that an association waits for
	heldPackets  = 8   // datagrams that wait for one name
	heldBytes    = 16 << 10
	nameReports  = time.Second
	maxLabelName = 253 // RFC 1035 §2.3.4, as text without the last dot
)

// Resolve fills in the address of targets that have only a name. Host stays.
type Resolve struct {
	next tunnel.Opener
	cfg  ResolveConfig
	drop atomic.Uint64

	mu      sync.Mutex
	cache   map[string]*answer
	lookups int
	shares  map[share]int  // of lookups; none is 0
	ofApps  map[string]int // the same by App ID
	waits   map[share]int  // names that associations wait for; none is 0
}

// share is whom a lookup counts for: at the cloud proxy one sidecar's session.
type share struct {
	app  string
	addr netip.AddrPort
}

// answer is what a name resolved to. addrs and err may be read once done is closed.
type answer struct {
	done    chan struct{}
	addrs   []netip.Addr
	err     error
	expires time.Time // zero while the lookup runs
}

// NewResolve returns the stage. Each address of a name goes through next.
// Values out of range are brought into range.
func NewResolve(next tunnel.Opener, cfg ResolveConfig) *Resolve {
	if cfg.Resolver == nil {
		cfg.Resolver = net.DefaultResolver
	}
	if cfg.Timeout <= 0 {
		cfg.Timeout = 5 * time.Second
	}
	if cfg.TTL <= 0 {
		cfg.TTL = 30 * time.Second
	}
	cfg.TTL = min(cfg.TTL, maxTTL)
	if cfg.Families != "ip4" && cfg.Families != "ip6" {
		cfg.Families = "ip"
	}
	return &Resolve{next: next, cfg: cfg, cache: map[string]*answer{}, shares: map[share]int{}, ofApps: map[string]int{}, waits: map[share]int{}}
}

// Dropped counts datagrams that were lost while they waited for a name.
func (r *Resolve) Dropped() uint64 { return r.drop.Load() }

// lookup returns the answer for a name; it may still be on its way. It counts
// for the peer who is the first to ask.
func (r *Resolve) lookup(by tunnel.Peer, host string) *answer {
	host = strings.ToLower(strings.TrimSuffix(host, "."))
	r.mu.Lock()
	defer r.mu.Unlock()
	if a := r.cache[host]; a != nil && (a.expires.IsZero() || time.Now().Before(a.expires)) {
		return a
	}
	a := &answer{done: make(chan struct{})}
	of := share{by.App, by.Addr}
	switch {
	case host == "" || len(host) > maxLabelName || strings.ContainsAny(host, "\x00 /%:"):
		a.err = tunnel.Errorf(tunnel.NameUnresolved, "%.80q can not be a host name; use a name or an address", host)
	case r.lookups >= maxLookups:
		a.err = tunnel.Errorf(tunnel.LimitExceeded, "%d names are being looked up, which is the limit; try again", r.lookups)
	case r.shares[of] >= maxShare:
		a.err = tunnel.Errorf(tunnel.LimitExceeded, "%d names are being looked up for this sidecar, which is its share; try again", r.shares[of])
	case r.ofApps[of.app] >= maxOfApp:
		a.err = tunnel.Errorf(tunnel.LimitExceeded, "%d names are being looked up for this App ID, which is its share; try again", r.ofApps[of.app])
	}
	if a.err != nil {
		close(a.done)
		return a
	}
	if len(r.cache) >= maxCached {
		now := time.Now()
		for h, old := range r.cache {
			if !old.expires.IsZero() && now.After(old.expires) {
				delete(r.cache, h)
			}
		}
		for h, old := range r.cache { // still full: any will do
			if len(r.cache) < maxCached {
				break
			}
			if !old.expires.IsZero() {
				delete(r.cache, h)
			}
		}
	}
	r.cache[host] = a
	r.lookups++
	r.shares[of]++
	r.ofApps[of.app]++
	go r.ask(of, host, a)
	return a
}

// wait reports whether one more association of a peer may wait for a name; then
// waited must follow.
func (r *Resolve) wait(by tunnel.Peer) bool {
	of := share{by.App, by.Addr}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.waits[of] >= maxWaits {
		return false
	}
	r.waits[of]++
	return true
}

func (r *Resolve) waited(by tunnel.Peer) {
	of := share{by.App, by.Addr}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.waits[of]--; r.waits[of] == 0 {
		delete(r.waits, of)
	}
}

// ask looks one name up. It serves everybody who waits, so it has its own time limit.
func (r *Resolve) ask(of share, host string, a *answer) {
	ctx, cancel := context.WithTimeout(context.Background(), r.cfg.Timeout)
	defer cancel()
	name := host
	if strings.Contains(name, ".") {
		name += "." // absolute: the search list of this host is nobody's business
	}
	addrs, err := r.cfg.Resolver.LookupNetIP(ctx, r.cfg.Families, name)
	ttl := r.cfg.TTL
	var dns *net.DNSError
	switch {
	case err == nil && len(addrs) == 0, errors.As(err, &dns) && dns.IsNotFound:
		err = tunnel.Errorf(tunnel.NameUnresolved, "%q does not exist in the DNS of the cloud proxy; check the name (%w)", host, err)
		if dns == nil {
			err = tunnel.Errorf(tunnel.NameUnresolved, "%q has no address; check the name", host)
		}
		ttl = failureTTL
	case err != nil:
		err = tunnel.Errorf(tunnel.NameUnresolved, "%q could not be looked up at the cloud proxy; check its DNS or try again (%w)", host, err)
		ttl = 0
	}
	for i := range addrs {
		addrs[i] = addrs[i].Unmap() // package net gives IPv4 in either form
	}
	if addrs = interleave(addrs); len(addrs) > maxAddrs {
		addrs = addrs[:maxAddrs]
	}
	r.mu.Lock()
	a.addrs, a.err, a.expires = addrs, err, time.Now().Add(ttl)
	r.lookups--
	if r.shares[of]--; r.shares[of] == 0 {
		delete(r.shares, of)
	}
	if r.ofApps[of.app]--; r.ofApps[of.app] == 0 {
		delete(r.ofApps, of.app)
	}
	r.mu.Unlock()
	close(a.done)
}

// interleave alternates the families and keeps the order within each: RFC 8305 §4.
func interleave(addrs []netip.Addr) []netip.Addr {
	if len(addrs) == 0 {
		return nil
	}
	var same, other []netip.Addr
	for _, a := range addrs {
		if a.Is4() == addrs[0].Is4() {
			same = append(same, a)
		} else {
			other = append(other, a)
		}
	}
	out := make([]netip.Addr, 0, len(addrs))
	for len(same)+len(other) > 0 {
		if len(same) > 0 {
			out, same = append(out, same[0]), same[1:]
		}
		if len(other) > 0 {
			out, other = append(out, other[0]), other[1:]
		}
	}
	return out
}

// numeric returns the target with its address where no lookup is needed.
func numeric(to tunnel.Target) (tunnel.Target, bool) {
	if to.Addr.IsValid() {
		return to, true
	}
	if a, err := netip.ParseAddr(to.Host); err == nil {
		return tunnel.Target{Addr: a, Port: to.Port}, true
	}
	return to, false
}

// OpenStream tries the addresses of a name as RFC 8305 §5 says; the first that
// answers is used. The error is the last attempt's, and PolicyDenied only when
// every address was denied.
func (r *Resolve) OpenStream(ctx context.Context, by tunnel.Peer, to tunnel.Target) (tunnel.Stream, error) {
	if to, ok := numeric(to); ok {
		return r.next.OpenStream(ctx, by, to)
	}
	a := r.lookup(by, to.Host)
	select {
	case <-a.done:
	case <-ctx.Done():
		return nil, tunnel.Errorf(tunnel.TimedOut, "%q was given up before its address was known (%w)", to.Host, context.Cause(ctx))
	}
	if a.err != nil {
		return nil, a.err
	}
	return r.race(ctx, by, to, a.addrs)
}

func (r *Resolve) race(ctx context.Context, by tunnel.Peer, to tunnel.Target, addrs []netip.Addr) (tunnel.Stream, error) {
	type result struct {
		s   tunnel.Stream
		err error
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	results := make(chan result)
	won := make(chan struct{})
	defer close(won)
	timer := time.NewTimer(0)
	defer timer.Stop()
	var failure, denied error
	for next, running := 0, 0; ; {
		var start <-chan time.Time
		if next < len(addrs) {
			start = timer.C
		} else if running == 0 {
			if failure == nil {
				failure = denied
			}
			return nil, failure
		}
		select {
		case <-start:
			to := tunnel.Target{Host: to.Host, Addr: addrs[next], Port: to.Port}
			next++
			running++
			timer.Reset(stagger)
			go func() {
				s, err := r.next.OpenStream(ctx, by, to)
				select {
				case results <- result{s, err}:
				case <-won:
					if err == nil {
						s.Abort(errLost)
					}
				}
			}()
		case got := <-results:
			running--
			if got.err == nil {
				return got.s, nil
			}
			if errors.Is(got.err, tunnel.PolicyDenied) {
				denied = got.err
			} else {
				failure = got.err
			}
			timer.Reset(0) // a failure need not be waited out
		}
	}
}

var errLost = errors.New("another address answered first")

// OpenPackets wraps the next stage's association.
func (r *Resolve) OpenPackets(by tunnel.Peer, recv tunnel.Receiver) (tunnel.Packets, error) {
	rr := &resolveReceiver{Receiver: recv, reported: map[string]time.Time{}}
	next, err := r.next.OpenPackets(by, rr)
	if err != nil {
		return nil, err
	}
	return &resolvePackets{Packets: next, r: r, by: by, recv: rr, names: map[string]*resolved{}}, nil
}

// resolvePackets keeps, for each name, the address that was chosen for it: an
// association stays with one while it lives.
type resolvePackets struct {
	tunnel.Packets
	r    *Resolve
	by   tunnel.Peer
	recv *resolveReceiver

	mu      sync.Mutex
	names   map[string]*resolved
	pending int // names without an address
}

// resolved is one name. Datagrams wait in held while addr is invalid.
type resolved struct {
	addr  netip.Addr
	held  []heldDatagram
	bytes int
}

type heldDatagram struct {
	p    []byte
	port uint16
}

func (p *resolvePackets) Send(b []byte, to tunnel.Target) error {
	if n, ok := numeric(to); ok {
		return p.Packets.Send(b, n)
	}
	if p.recv.closed.Load() {
		return net.ErrClosed
	}
	p.mu.Lock()
	n := p.names[to.Host]
	if n != nil && n.addr.IsValid() {
		p.mu.Unlock()
		to.Addr = n.addr // written once, before it was seen under mu
		return p.Packets.Send(b, to)
	}
	defer p.mu.Unlock()
	if len(b) > heldBytes {
		p.r.drop.Add(1)
		return nil
	}
	if n == nil {
		if p.pending >= maxPending || !p.r.wait(p.by) {
			p.r.drop.Add(1)
			return nil
		}
		if len(p.names) >= maxNames {
			for host, old := range p.names {
				if old.addr.IsValid() {
					delete(p.names, host)
					break
				}
			}
		}
		n = &resolved{}
		p.names[to.Host] = n
		p.pending++
		go p.await(to.Host, n, p.r.lookup(p.by, to.Host))
	}
	for len(n.held) > 0 && (len(n.held) >= heldPackets || n.bytes+len(b) > heldBytes) {
		n.bytes -= len(n.held[0].p)
		n.held = n.held[1:]
		p.r.drop.Add(1)
	}
	n.held = append(n.held, heldDatagram{append([]byte(nil), b...), to.Port})
	n.bytes += len(b)
	return nil
}

// await sends what waits for a name, in order, and then opens the direct way.
func (p *resolvePackets) await(host string, n *resolved, a *answer) {
	defer p.r.waited(p.by)
	<-a.done
	addrs, err := a.addrs, a.err
	var denied error
	var chosen netip.Addr
	for {
		p.mu.Lock()
		if len(n.held) == 0 || len(addrs) == 0 || p.recv.closed.Load() {
			p.pending--
			n.addr = chosen
			p.r.drop.Add(uint64(len(n.held)))
			n.held = nil
			if !chosen.IsValid() {
				delete(p.names, host) // the next datagram asks again
			}
			p.mu.Unlock()
			break
		}
		held := n.held
		n.held, n.bytes = nil, 0
		p.mu.Unlock()
		for _, d := range held {
			for len(addrs) > 0 {
				e := p.Packets.Send(d.p, tunnel.Target{Host: host, Addr: addrs[0], Port: d.port})
				if e == nil || errors.Is(e, tunnel.ErrTooLarge) {
					chosen = addrs[0]
					break
				}
				if errors.Is(e, tunnel.PolicyDenied) {
					denied = e
				} else {
					err = e
				}
				if chosen.IsValid() {
					break // another port of an address that works
				}
				addrs = addrs[1:]
			}
		}
		p.Packets.Flush()
	}
	if err == nil {
		err = denied
	}
	if !chosen.IsValid() && err != nil && !errors.Is(err, net.ErrClosed) {
		p.recv.report(host, err)
	}
}

func (p *resolvePackets) Close() error {
	p.recv.closed.Store(true)
	return p.Packets.Close()
}

// resolveReceiver keeps Closed the last call, and reports within their rate.
type resolveReceiver struct {
	tunnel.Receiver
	closed atomic.Bool // by either end

	mu       sync.Mutex // held while Unreachable is called
	reported map[string]time.Time
}

func (r *resolveReceiver) report(host string, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	now := time.Now()
	if r.closed.Load() || now.Sub(r.reported[host]) < nameReports {
		return
	}
	if len(r.reported) >= maxNames {
		clear(r.reported)
	}
	r.reported[host] = now
	r.Receiver.Unreachable(netip.AddrPort{}, err)
}

// Closed is called by the next stage.
func (r *resolveReceiver) Closed(err error) {
	r.mu.Lock() // a report that has begun ends first
	r.closed.Store(true)
	r.mu.Unlock()
	r.Receiver.Closed(err)
}
