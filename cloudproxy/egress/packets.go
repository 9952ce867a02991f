package egress

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"culvert/tunnel"
	"culvert/tunnel/netio"
)

const (
	maxRemotes   = 256
	remoteLife   = int64(5 * time.Minute)
	maxDatagram4 = 65507 // 65,535 less the IPv4 and UDP headers
	maxHairpin   = 64    // deliveries to one association at once; also ends two echoes that answer each other
	reportsEvery = int64(time.Second)
	maxReports   = 20 // of Unreachable, in reportsEvery
)

// association states. Only ended leads to Receiver.Closed.
const (
	stateOpen   = iota
	stateClosed // by Close
	stateEnded  // by itself; Closed is still to be called
	stateTold   // Closed has been called
)

// association is one UDP association.
type association struct {
	e    *Egress
	r    tunnel.Receiver
	app  string
	held bool
	used atomic.Int64 // when a datagram last passed

	state  atomic.Int32
	inside atomic.Int64 // calls of r that run; the last one out after the end calls Closed
	cause  error        // written before state becomes ended
	nested atomic.Int32 // hairpin deliveries that run

	sockets [2]atomic.Pointer[socket] // IPv4, IPv6; made by the first Send of the family

	mu      sync.Mutex // guards what follows and the making of sockets
	remotes map[netip.Addr]int64
	reports int
	since   int64 // when reports was last zero
}

// OpenPackets starts an association. Its sockets are made by its first Sends.
func (e *Egress) OpenPackets(by tunnel.Peer, r tunnel.Receiver) (tunnel.Packets, error) {
	a := &association{e: e, r: r, app: by.App, held: by.Held, remotes: map[netip.Addr]int64{}}
	a.used.Store(e.now())
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.closed {
		return nil, errStopped
	}
	switch full, ok := e.assocShares.Enter(by.App); {
	case full:
		return nil, tunnel.Errorf(tunnel.LimitExceeded, "the cloud proxy has its limit of %d UDP associations of all sidecars; close some, or have egress.associations and the limit of open files raised there", e.cfg.MaxAssociations)
	case !ok:
		return nil, tunnel.Errorf(tunnel.LimitExceeded, "the sidecars of this App ID have their share of the %d UDP associations that the cloud proxy may open; close some, or have egress.associations and the limit of open files raised there", e.cfg.MaxAssociations)
	}
	e.assocs[a] = struct{}{}
	return a, nil
}

// enter begins a call of r. False: the association has ended.
func (a *association) enter() bool {
	a.inside.Add(1)
	if a.state.Load() != stateOpen {
		a.leave()
		return false
	}
	return true
}

func (a *association) leave() {
	if a.inside.Add(-1) == 0 && a.state.CompareAndSwap(stateEnded, stateTold) {
		a.r.Closed(a.cause)
	}
}

// end closes the association from our side.
func (a *association) end(err error) {
	a.inside.Add(1) // nobody else calls Closed before the sockets are on their way out
	a.mu.Lock()
	if a.state.Load() == stateOpen {
		a.cause = err
		a.state.Store(stateEnded)
	}
	a.mu.Unlock()
	a.drop()
	a.leave()
}

// Close ends the association.
func (a *association) Close() error {
	a.mu.Lock()
	if s := a.state.Load(); s == stateOpen || s == stateEnded {
		a.state.CompareAndSwap(s, stateClosed)
	}
	a.mu.Unlock()
	a.drop()
	return nil
}

// drop closes the sockets.
func (a *association) drop() {
	e := a.e
	e.mu.Lock()
	if _, open := e.assocs[a]; open { // an end and a Close may both come here
		delete(e.assocs, a)
		e.assocShares.Leave(a.app)
	}
	for i := range a.sockets {
		if s := a.sockets[i].Load(); s != nil && e.ports[s.key] == s {
			delete(e.ports, s.key)
		}
	}
	e.mu.Unlock()
	for i := range a.sockets {
		if s := a.sockets[i].Load(); s != nil {
			s.conn.Close()
		}
	}
}

// Flush does nothing: each datagram leaves with its Send.
func (a *association) Flush() {}

// Send sends one datagram. Besides what tunnel.Packets says, it fails at once
// where there is no route.
func (a *association) Send(p []byte, to tunnel.Target) error {
	if a.state.Load() != stateOpen {
		return net.ErrClosed
	}
	if err := check(to); err != nil {
		return err
	}
	if len(p) > maxDatagram4 {
		return tunnel.ErrTooLarge
	}
	s, err := a.socket(family(to.Addr))
	if err != nil {
		return err
	}
	now := a.e.now()
	a.remember(to.Addr, now)
	a.used.Store(now)

	if a.e.own.has(to.Addr) {
		a.e.mu.RLock()
		peer := a.e.ports[mapping{to.Addr.Is6(), to.Port}]
		a.e.mu.RUnlock()
		if peer != nil {
			// The kernel, too, sends from the destination's address when that is its own.
			peer.a.hairpin(p, netip.AddrPortFrom(to.Addr, s.key.port), now)
			return nil
		}
	}
	for range 3 {
		err = s.conn.Send(p, to.AddrPort())
		if !errors.Is(err, syscall.ECONNREFUSED) && !errors.Is(err, syscall.EHOSTUNREACH) {
			break
		}
		// An ICMP error to an earlier datagram: the queue has it for Failed, and this datagram has not been sent.
	}
	return a.outcome(to.AddrPort(), err)
}

// outcome counts what the kernel said to a datagram, and says what Send returns.
func (a *association) outcome(to netip.AddrPort, err error) error {
	switch {
	case err == nil:
		a.e.sent.Add(1)
		return nil
	case errors.Is(err, tunnel.ErrBlocked), errors.Is(err, syscall.ENOBUFS), errors.Is(err, syscall.ENOMEM):
		a.e.full.Add(1)
		return nil
	case errors.Is(err, tunnel.ErrTooLarge):
		return tunnel.ErrTooLarge
	case a.state.Load() != stateOpen:
		return net.ErrClosed
	}
	a.e.failed.Add(1)
	err = explain(to.String(), err)
	if tunnel.CodeOf(err) == tunnel.NetworkUnreachable {
		return err
	}
	a.unreachable(to, err)
	return nil
}

// hairpin takes a datagram from another association of this Egress.
func (a *association) hairpin(p []byte, from netip.AddrPort, now int64) {
	defer a.nested.Add(-1)
	if a.nested.Add(1) > maxHairpin {
		a.e.full.Add(1)
		return
	}
	a.e.sent.Add(1)
	a.deliver(p, from, now)
}

func (a *association) deliver(p []byte, from netip.AddrPort, now int64) {
	if !a.known(from.Addr(), now) {
		a.e.filter.Add(1)
		return
	}
	if !a.enter() {
		return
	}
	defer a.leave()
	a.used.Store(now)
	a.e.recvd.Add(1)
	a.r.Deliver(p, from)
}

// unreachable reports within the rate.
func (a *association) unreachable(to netip.AddrPort, err error) {
	now := a.e.now()
	a.mu.Lock()
	if now-a.since >= reportsEvery {
		a.since, a.reports = now, 0
	}
	a.reports++
	ok := a.reports <= maxReports
	a.mu.Unlock()
	if !ok || !a.enter() {
		return
	}
	defer a.leave()
	a.r.Unreachable(to, err)
}

// remember opens the filter for an address; the one unused for longest makes room.
func (a *association) remember(addr netip.Addr, now int64) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if _, ok := a.remotes[addr]; !ok && len(a.remotes) >= maxRemotes {
		var oldest netip.Addr
		at := now + 1
		for r, t := range a.remotes {
			if t < at {
				oldest, at = r, t
			}
		}
		delete(a.remotes, oldest)
	}
	a.remotes[addr] = now
}

func (a *association) known(addr netip.Addr, now int64) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	at, ok := a.remotes[addr]
	if ok && now-at > remoteLife {
		delete(a.remotes, addr)
		return false
	}
	return ok
}

// socket returns the family's socket.
func (a *association) socket(f int) (*socket, error) {
	if s := a.sockets[f].Load(); s != nil {
		return s, nil
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if s := a.sockets[f].Load(); s != nil {
		return s, nil
	}
	network, local := "udp4", a.e.cfg.Local4
	if f == 1 {
		network, local = "udp6", a.e.cfg.Local6
	}
	var at *net.UDPAddr
	if local.IsValid() {
		at = net.UDPAddrFromAddrPort(netip.AddrPortFrom(local, 0))
	}
	bind := ":0"
	if at != nil {
		bind = at.String()
	}
	made, err := (&net.ListenConfig{Control: a.e.cfg.Control}).ListenPacket(context.Background(), network, bind)
	if err != nil {
		a.e.failed.Add(1)
		return nil, explain("no UDP socket: the destination", err)
	}
	conn := made.(*net.UDPConn)
	s := &socket{a: a, key: mapping{f == 1, conn.LocalAddr().(*net.UDPAddr).AddrPort().Port()}}
	if err := s.open(conn); err != nil {
		a.e.failed.Add(1)
		return nil, tunnel.Errorf(tunnel.Internal, "the UDP socket can not be used: %w", err)
	}
	a.e.mu.Lock()
	defer a.e.mu.Unlock()
	if a.e.closed || a.state.Load() != stateOpen {
		s.conn.Close()
		return nil, net.ErrClosed
	}
	a.e.ports[s.key] = s
	a.sockets[f].Store(s)
	return s, nil
}

// socket is one unconnected UDP socket, and its netio.Reader.
type socket struct {
	a    *association
	conn *netio.Socket
	key  mapping
}

// open takes over a socket. It has sent nothing yet, so nothing that arrives
// before the association knows it gets through the filter.
func (s *socket) open(conn *net.UDPConn) (err error) {
	if err = noBroadcast(conn); err != nil {
		conn.Close()
		return err
	}
	if s.conn, err = s.a.e.poller.Packet(conn, s); err != nil {
		return err
	}
	if err = s.wantErrors(); err == nil {
		err = s.conn.Start()
	}
	if err != nil {
		s.conn.Close()
	}
	return err
}

// Take is one datagram.
func (s *socket) Take(p []byte, from netip.AddrPort) { s.a.deliver(p, from, s.a.e.now()) }

// Flush does nothing: each datagram has been delivered by itself.
func (s *socket) Flush() {}
