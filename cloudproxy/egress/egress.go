package egress

import (
	"context"
	"errors"
	"maps"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"culvert/tunnel"
	"culvert/tunnel/fair"
	"culvert/tunnel/netio"
)

// Config says how traffic leaves. The zero value is usable.
type Config struct {
	Local4, Local6 netip.Addr    // source addresses; invalid: the kernel chooses
	Public         []netip.Addr  // further addresses under which this host is reached, as behind a 1:1 NAT
	Idle           time.Duration // an association without a datagram ends after it; 0: 2 minutes
	DialTimeout    time.Duration // for one TCP connection; 0: 10 s
	// Control is called on each socket before it is used, as in net.Dialer; nil:
	// nothing is.
	Control         func(network, address string, c syscall.RawConn) error
	MaxAge          time.Duration // how long a datagram from outside may wait in a socket until it is dropped; 0: for ever
	MaxAssociations int           // of all sessions together; 0: 100,000. Where the process may open fewer files: 80 % of these. One App ID gets at most eight ninths
	MaxStreams      int           // the same of TCP connections; 0: 50,000. Where the process may open fewer files: 15 % of these
}

// Stats are counters since New, and live figures.
type Stats struct {
	Associations int
	Streams      int
	Sent         uint64 // datagrams that the kernel or a hairpin took
	Received     uint64 // datagrams delivered
	Dropped      map[string]uint64
}

// Reasons for drops.
const (
	dropFull     = "egress_full"     // the socket's send buffer, or too many hairpinned at once
	dropFiltered = "egress_filtered" // from an address that was not sent to
	dropError    = "egress_error"    // the kernel refused
	dropLate     = "egress_late"     // waited in the socket for longer than MaxAge
)

// Egress is the last stage of a path. Its methods may be called concurrently.
type Egress struct {
	cfg    Config
	epoch  time.Time
	stop   chan struct{}
	wg     sync.WaitGroup // the sweeper
	poller netio.Poller   // reads all sockets
	own    ownAddrs
	sent   atomic.Uint64
	recvd  atomic.Uint64
	full   atomic.Uint64
	filter atomic.Uint64
	failed atomic.Uint64

	mu      sync.RWMutex
	closed  bool
	assocs  map[*association]struct{}
	streams map[*stream]struct{}
	ports   map[mapping]*socket
	// What the App IDs hold of both; of the streams also those that are to be.
	assocShares, streamShares *fair.Places[string]
}

// mapping names a socket. All sockets of a family are bound to the same
// address, so the port is enough.
type mapping struct {
	v6   bool
	port uint16
}

// New returns an Egress. Errors name the field.
func New(cfg Config) (*Egress, error) {
	if cfg.Local4.IsValid() && !cfg.Local4.Is4() {
		return nil, tunnel.Errorf(tunnel.ConfigInvalid, "Local4: %s is not an IPv4 address", cfg.Local4)
	}
	if cfg.Local6.IsValid() && (!cfg.Local6.Is6() || cfg.Local6.Is4In6()) {
		return nil, tunnel.Errorf(tunnel.ConfigInvalid, "Local6: %s is not an IPv6 address", cfg.Local6)
	}
	if cfg.Idle < 0 || cfg.DialTimeout < 0 || cfg.MaxAge < 0 || cfg.MaxAssociations < 0 || cfg.MaxStreams < 0 {
		return nil, tunnel.Errorf(tunnel.ConfigInvalid, "Idle, DialTimeout, MaxAge, MaxAssociations and MaxStreams can not be negative")
	}
	if cfg.Idle == 0 {
		cfg.Idle = 2 * time.Minute
	}
	if cfg.DialTimeout == 0 {
		cfg.DialTimeout = 10 * time.Second
	}
	if cfg.MaxAssociations == 0 {
		cfg.MaxAssociations = 100000
	}
	if cfg.MaxStreams == 0 {
		cfg.MaxStreams = 50000
	}
	if n := maxFiles(); n > 0 {
		// An association takes one descriptor, with both families two. The rest is
		// for the sidecars' connections, listeners and lookups.
		cfg.MaxAssociations = min(cfg.MaxAssociations, max(n/5*4, 1))
		cfg.MaxStreams = min(cfg.MaxStreams, max(n/20*3, 1))
	}
	e := &Egress{
		cfg: cfg, epoch: time.Now(), stop: make(chan struct{}),
		assocs: map[*association]struct{}{}, streams: map[*stream]struct{}{}, ports: map[mapping]*socket{},
		assocShares: fair.New[string](cfg.MaxAssociations), streamShares: fair.New[string](cfg.MaxStreams),
	}
	e.poller.MaxAge = cfg.MaxAge
	e.own.refresh(cfg)
	e.wg.Add(1)
	go e.sweep()
	return e, nil
}

// now is monotonic, and cheaper to keep in an atomic than a time.Time.
func (e *Egress) now() int64 { return int64(time.Since(e.epoch)) }

// sweep ends idle associations and follows the host's addresses.
func (e *Egress) sweep() {
	defer e.wg.Done()
	tick := time.NewTicker(max(min(e.cfg.Idle/4, 5*time.Second), time.Millisecond))
	defer tick.Stop()
	addrs := time.NewTicker(30 * time.Second)
	defer addrs.Stop()
	for {
		select {
		case <-e.stop:
			return
		case <-addrs.C:
			e.own.refresh(e.cfg)
		case <-tick.C:
			oldest := e.now() - int64(e.cfg.Idle)
			var idle []*association
			e.mu.RLock()
			for a := range e.assocs {
				if !a.held && a.used.Load() < oldest {
					idle = append(idle, a)
				}
			}
			e.mu.RUnlock()
			for _, a := range idle {
				a.end(tunnel.Errorf(tunnel.TimedOut, "no datagram passed for %s, so the association has ended; open another one", e.cfg.Idle))
			}
		}
	}
}

// Close ends every association and stream and waits for its goroutines. It must
// not be called by a Receiver.
func (e *Egress) Close() error {
	e.mu.Lock()
	if e.closed {
		e.mu.Unlock()
		e.wg.Wait()
		e.poller.Close()
		return nil
	}
	e.closed = true
	close(e.stop)
	assocs, streams := maps.Clone(e.assocs), maps.Clone(e.streams)
	e.mu.Unlock()
	for a := range assocs {
		a.end(errStopped)
	}
	for s := range streams {
		s.Abort(errStopped)
	}
	e.wg.Wait()
	e.poller.Close()
	return nil
}

var errStopped = tunnel.Errorf(tunnel.ProxyStopped, "the proxy has stopped; start it again")

// Stats may be called at any time.
func (e *Egress) Stats() Stats {
	e.mu.RLock()
	a, s := len(e.assocs), len(e.streams)
	e.mu.RUnlock()
	st := Stats{Associations: a, Streams: s, Sent: e.sent.Load(), Received: e.recvd.Load(), Dropped: map[string]uint64{}}
	for reason, n := range map[string]uint64{dropFull: e.full.Load(), dropFiltered: e.filter.Load(), dropError: e.failed.Load(), dropLate: e.poller.Late()} {
		if n > 0 {
			st.Dropped[reason] = n
		}
	}
	return st
}

// check refuses what no guard should have let through.
func check(to tunnel.Target) error {
	a := to.Addr
	switch {
	case !a.IsValid():
		return tunnel.Errorf(tunnel.NameUnresolved, "%q has not been resolved to an address", to.Host)
	case a.Is4In6():
		// The policy has judged another form of this address than the one that would be used.
		return tunnel.Errorf(tunnel.Unsupported, "%s is an IPv4 address in IPv6 form; use the IPv4 address", a)
	case a.Zone() != "":
		return tunnel.Errorf(tunnel.Unsupported, "%s names a network interface of the far end; use an address without a zone", a)
	case a.IsUnspecified(), a.IsMulticast(), a == netip.AddrFrom4([4]byte{255, 255, 255, 255}):
		return tunnel.Errorf(tunnel.Unsupported, "%s is not the address of one host; use a unicast address", a)
	case to.Port == 0:
		return tunnel.Errorf(tunnel.Unsupported, "port 0 of %s can not be reached; name a port", a)
	}
	return nil
}

// explain makes a sentence of a socket's error.
func explain(to string, err error) error {
	code := tunnel.CodeOf(err)
	if errors.Is(err, syscall.EAFNOSUPPORT) || errors.Is(err, syscall.EINVAL) {
		code = tunnel.NetworkUnreachable
	}
	var t interface{ Timeout() bool }
	if code == tunnel.Internal && errors.As(err, &t) && t.Timeout() {
		code = tunnel.TimedOut
	}
	var what string
	switch code {
	case tunnel.ConnectionRefused:
		what = "%s refused: nothing listens on that port (%w)"
	case tunnel.HostUnreachable:
		what = "%s is not reachable: its network says that the host does not answer; check the address and firewalls there (%w)"
	case tunnel.NetworkUnreachable:
		what = "%s is not reachable: the cloud proxy has no route or no address of that family; use another address (%w)"
	case tunnel.TimedOut:
		what = "%s did not answer in time; check that it runs and that no firewall drops the traffic (%w)"
	case tunnel.NotPermitted:
		what = "%s is not reachable: the host that runs the proxy does not permit it; check its firewall (%w)"
	default:
		what = "%s can not be reached: %w"
	}
	return tunnel.Errorf(code, what, to, err)
}

// OpenStream dials. See tunnel.Opener.
func (e *Egress) OpenStream(ctx context.Context, by tunnel.Peer, to tunnel.Target) (tunnel.Stream, error) {
	if err := check(to); err != nil {
		return nil, err
	}
	e.mu.Lock()
	full, ok := e.streamShares.Enter(by.App)
	e.mu.Unlock()
	switch {
	case full:
		return nil, tunnel.Errorf(tunnel.LimitExceeded, "the cloud proxy has its limit of %d TCP connections of all sidecars; close some, or have egress.streams and the limit of open files raised there", e.cfg.MaxStreams)
	case !ok:
		return nil, tunnel.Errorf(tunnel.LimitExceeded, "the sidecars of this App ID have their share of the %d TCP connections that the cloud proxy may open; close some, or have egress.streams and the limit of open files raised there", e.cfg.MaxStreams)
	}
	s, err := e.dial(ctx, by.App, to)
	e.mu.Lock()
	defer e.mu.Unlock()
	if err == nil && e.closed {
		s.TCPConn.Close()
		err = errStopped
	}
	if err != nil {
		e.streamShares.Leave(by.App)
		return nil, err
	}
	e.streams[s] = struct{}{}
	return s, nil
}

func (e *Egress) dial(ctx context.Context, app string, to tunnel.Target) (*stream, error) {
	d := net.Dialer{
		Timeout:         e.cfg.DialTimeout,
		Control:         e.cfg.Control,
		KeepAliveConfig: net.KeepAliveConfig{Enable: true, Idle: 30 * time.Second, Interval: 15 * time.Second, Count: 6},
	}
	network, local := "tcp4", e.cfg.Local4
	if to.Addr.Is6() {
		network, local = "tcp6", e.cfg.Local6
	}
	if local.IsValid() {
		d.LocalAddr = net.TCPAddrFromAddrPort(netip.AddrPortFrom(local, 0))
	}
	c, err := d.DialContext(ctx, network, to.AddrPort().String())
	if err != nil {
		if ctx.Err() != nil {
			return nil, explain(to.String(), context.Cause(ctx))
		}
		return nil, explain(to.String(), err)
	}
	return &stream{TCPConn: c.(*net.TCPConn), e: e, app: app}, nil
}

// stream is a TCP connection.
type stream struct {
	*net.TCPConn
	e   *Egress
	app string
}

func (s *stream) Close() error {
	s.forget()
	return s.TCPConn.Close()
}

// Abort closes with RST.
func (s *stream) Abort(error) {
	s.forget()
	s.SetLinger(0)
	s.TCPConn.Close()
}

func (s *stream) forget() {
	s.e.mu.Lock()
	defer s.e.mu.Unlock()
	if _, open := s.e.streams[s]; open {
		delete(s.e.streams, s)
		s.e.streamShares.Leave(s.app)
	}
}

// OnHost reports whether an address is one of this host's, or leads here.
func (e *Egress) OnHost(a netip.Addr) bool {
	if _, there := (*e.own.set.Load())[a]; there {
		return true
	}
	for _, p := range *e.own.routed.Load() {
		if p.Contains(a) {
			return true
		}
	}
	return false
}

// Joins reports whether what is sent to an address by UDP goes to another
// association, inside this Egress.
func (e *Egress) Joins(to netip.AddrPort) bool {
	if !e.own.has(to.Addr()) {
		return false
	}
	e.mu.RLock()
	defer e.mu.RUnlock()
	return e.ports[mapping{to.Addr().Is6(), to.Port()}] != nil
}

// ownAddrs are the addresses of this host, and whether associations are reached at
// them. They are replaced, never changed.
type ownAddrs struct {
	set    atomic.Pointer[map[netip.Addr]bool]
	routed atomic.Pointer[[]netip.Prefix] // what else leads here, in any case not to an association
	any    [2]bool                        // the family (0: IPv4) is bound to the wildcard; fixed by the first refresh
}

func (o *ownAddrs) refresh(cfg Config) {
	m := map[netip.Addr]bool{}
	for _, a := range append([]netip.Addr{cfg.Local4, cfg.Local6}, cfg.Public...) {
		if a.IsValid() {
			m[a.Unmap()] = true
		}
	}
	any4, any6 := !cfg.Local4.IsValid(), !cfg.Local6.IsValid()
	if o.set.Load() == nil {
		o.any = [2]bool{any4, any6}
	}
	nets, _ := net.InterfaceAddrs() // without them only the configured ones are known
	for _, n := range nets {
		if p, ok := n.(*net.IPNet); ok {
			if a, ok := netip.AddrFromSlice(p.IP); ok {
				a = a.Unmap()
				m[a] = m[a] || a.Is4() && any4 || a.Is6() && any6
			}
		}
	}
	var routed []netip.Prefix
	for _, p := range localPrefixes() {
		if !p.IsSingleIP() {
			routed = append(routed, p)
		} else if _, there := m[p.Addr()]; !there {
			m[p.Addr()] = false
		}
	}
	o.routed.Store(&routed)
	o.set.Store(&m)
}

func (o *ownAddrs) has(a netip.Addr) bool {
	if a.IsLoopback() && o.any[family(a)] {
		return true // all of 127.0.0.0/8
	}
	return (*o.set.Load())[a]
}

func family(a netip.Addr) int {
	if a.Is6() {
		return 1
	}
	return 0
}
