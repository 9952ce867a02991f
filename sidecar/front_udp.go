package sidecar

import (
	"encoding/binary"
	"errors"
	"io"
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
	// udpPayload is the most that an IPv4 datagram can hold.
	udpPayload = 65507
	// udpSocketBuffer holds 100 ms of 80 Mbit/s; the system may grant less.
	udpSocketBuffer = 1 << 20
	// controlBytes bounds what a client may send on the TCP connection of an
	// association, where RFC 1928 has nothing to send.
	controlBytes = 64 << 10
	// strangerPause bounds how often the owner of a refused sender is looked up.
	strangerPause = time.Second
	// ownerPause is how often the owner of the sender is looked up again, while
	// datagrams pass: its port may be another user's by now. A lookup takes some
	// 10 µs.
	ownerPause = 2 * time.Second
)

// The header of a SOCKS datagram, RFC 1928 section 7:
//
//	+----+------+------+----------+----------+----------+
//	|RSV | FRAG | ATYP | DST.ADDR | DST.PORT |   DATA   |
//	+----+------+------+----------+----------+----------+
//	| 2  |  1   |  1   | Variable |    2     | Variable |
//	+----+------+------+----------+----------+----------+
const (
	atypIPv4 = 1
	atypName = 3
	atypIPv6 = 4
)

// udpHeader is the parsed header; host aliases the datagram.
type udpHeader struct {
	addr netip.Addr // invalid where host is set
	host []byte
	port uint16
}

// parseUDPHeader splits a datagram into its header and its payload, which may
// be empty. It allocates nothing and both results alias p.
func parseUDPHeader(p []byte) (h udpHeader, payload []byte, why drop, ok bool) {
	if len(p) < 2+1+1 {
		return h, nil, dropMalformed, false
	}
	// RSV is not looked at: clients are known to leave rubbish there.
	if p[2] != 0 {
		return h, nil, dropFragment, false
	}
	atyp, p := p[3], p[4:]
	switch {
	case atyp == atypIPv4 && len(p) >= 4+2:
		h.addr, p = netip.AddrFrom4([4]byte(p)), p[4:]
	case atyp == atypIPv6 && len(p) >= 16+2:
		h.addr, p = netip.AddrFrom16([16]byte(p)), p[16:]
	case atyp == atypName && len(p) >= 1 && len(p) >= 1+int(p[0])+2:
		h.host, p = p[1:1+int(p[0])], p[1+int(p[0]):]
		if !validHost(h.host) {
			return h, nil, dropMalformed, false
		}
	default:
		return h, nil, dropMalformed, false
	}
	h.port = binary.BigEndian.Uint16(p)
	if h.port == 0 {
		return h, nil, dropMalformed, false
	}
	return h, p[2:], 0, true
}

// appendSOCKSAddr appends ATYP, address and port; an invalid address is 0.0.0.0.
func appendSOCKSAddr(b []byte, a netip.AddrPort) []byte {
	switch addr := a.Addr().Unmap(); {
	case addr.Is6():
		v := addr.As16()
		b = append(append(b, atypIPv6), v[:]...)
	case addr.Is4():
		v := addr.As4()
		b = append(append(b, atypIPv4), v[:]...)
	default:
		b = append(b, atypIPv4, 0, 0, 0, 0)
	}
	return binary.BigEndian.AppendUint16(b, a.Port())
}

// A drop is a reason for dropping a datagram.
type drop int

const (
	dropMalformed drop = iota
	dropFragment
	dropWrongSource
	dropWrongUser
	dropNoSender
	dropTooLarge
	dropPolicy
	dropRefused
	dropSocketFull
	dropSocketError
	dropKinds
)

var dropNames = [dropKinds]string{
	"malformed",         // not a SOCKS datagram
	"fragment",          // FRAG is not 0
	"wrong_source",      // not from the address that the association is locked to
	"wrong_user",        // from another local user than the one who asked for the association
	"no_sender",         // came back before the app had sent anything
	"too_large",         // can not fit
	"policy_denied",     // the destination is not allowed
	"refused",           // the path refused it for another reason
	"app_socket_full",   // no room to hand it to the app
	"app_socket_failed", // the app's socket could not be written to, or is gone
}

// DropReasons returns the words under which a front counts dropped datagrams.
func DropReasons() []string { return append([]string(nil), dropNames[:]...) }

type frontDrops struct {
	count       [dropKinds]atomic.Uint64
	up, down    atomic.Uint64
	unreachable atomic.Uint64
}

func (d *frontDrops) byReason() map[string]uint64 {
	m := make(map[string]uint64)
	for i := range d.count {
		if n := d.count[i].Load(); n != 0 {
			m[dropNames[i]] = n
		}
	}
	return m
}

// dropLate is the reason for what had waited for longer than FrontConfig.MaxAge.
const dropLate = "late"

// An association is one UDP ASSOCIATE: a socket on the address at which the
// client reached us, relayed for the one client address that it is locked to.
//
// It has no goroutine: the front's poller reads its socket and its TCP
// connection, which ends it. What comes back is written by whoever delivers it.
type association struct {
	front  *Front
	conn   *frontConn
	socket *netio.Socket
	relay  netip.AddrPort // the socket's address
	port   uint16         // the client's port where it named one
	out    tunnel.Packets

	sender  atomic.Pointer[netip.AddrPort] // the client's socket, once it has sent
	owner   socketOwner
	ownedAt atomic.Int64 // when its owner was looked up, since the front was made
	lost    atomic.Bool  // it is not that user's any more

	// What belongs to the reader of the socket.
	stranger  netip.AddrPort // the last sender refused for its owner
	refusedAt time.Time
	lastHost  string // the last name, and what it stands for
	lastTo    tunnel.Target

	left int // bytes that the TCP connection may still bring; its reader's

	mu      sync.Mutex    // held while sockets are closed; never while the path is called
	control *netio.Socket // guarded by mu: the TCP connection, once the poller has it
	started bool          // guarded by mu: who ends it finishes it
	ended   bool          // guarded by mu
	endErr  error         // guarded by mu until ended
}

// associate begins to serve a UDP ASSOCIATE, or refuses it. port is what the
// client named as its own.
func (f *Front) associate(c *frontConn, user string, port uint16) {
	a, err := f.newAssociation(c, user, port)
	if err != nil {
		f.failed(c, "UDP ASSOCIATE", err)
		code, _ := frontReply(err)
		c.Write(socksReply(code, netip.AddrPort{}))
		c.finish(f.linger)
		return
	}
	if _, err := c.Write(socksReply(socksSucceeded, a.relay)); err != nil {
		a.end(err)
	}
	a.start()
}

func (f *Front) newAssociation(c *frontConn, user string, port uint16) (*association, error) {
	if c.stranger != nil {
		return nil, c.stranger
	}
	local := tunnel.AddrPortOf(c.LocalAddr()).Addr()
	failed := func(err error) error {
		return tunnel.Errorf(tunnel.Internal, "no UDP socket on %s for an association: %w", local, err)
	}
	conn, err := f.listenUDP(local)
	if err != nil {
		return nil, failed(err)
	}
	conn.SetReadBuffer(udpSocketBuffer)
	conn.SetWriteBuffer(udpSocketBuffer)
	a := &association{front: f, conn: c, relay: tunnel.AddrPortOf(conn.LocalAddr()), port: port, left: controlBytes}
	if a.socket, err = f.poller.Packet(conn, (*fromUDP)(a)); err != nil {
		return nil, failed(err)
	}
	a.owner.of(c)
	a.owner.strict = len(f.users) > 0
	a.out, err = f.next.OpenPackets(tunnel.Peer{User: user, Addr: c.from, Held: true}, a)
	if err != nil {
		a.socket.Close()
		return nil, err
	}
	c.held.Store(a)
	f.relays.Add(1)
	f.associations.Add(1)
	return a, nil
}

// start gives the connection and the socket to the poller.
func (a *association) start() {
	a.conn.in = nil // what else came with the request is ignored
	control, err := a.front.poller.Stream(a.conn.TCPConn, (*fromTCP)(a))
	a.mu.Lock()
	a.started, a.control = true, control
	ended := a.ended
	a.mu.Unlock()
	if ended {
		if control != nil {
			control.Close()
		}
		a.finish()
		return
	}
	if err == nil {
		err = control.Start()
	}
	if err == nil {
		err = a.socket.Start()
	}
	switch {
	case errors.Is(err, net.ErrClosed): // it has just ended
		a.end(nil)
	case err != nil:
		a.end(tunnel.Errorf(tunnel.Internal, "the association's sockets can not be read: %w", err))
	}
}

// end closes everything. It never waits and may be called from anywhere.
func (a *association) end(err error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.ended {
		return
	}
	a.ended, a.endErr = true, err
	a.socket.Close()
	a.conn.Close()
	if a.control != nil {
		a.control.Close()
	}
	if a.started {
		go a.finish() // the caller may be the path, inside Closed
	}
}

// reset ends the association, and its connection with RST.
func (a *association) reset() {
	a.mu.Lock()
	if a.control != nil {
		a.control.Reset()
	}
	a.mu.Unlock()
	a.end(nil)
}

// finish leaves nothing behind.
func (a *association) finish() {
	a.out.Close()
	if a.endErr != nil {
		if n, ok := a.front.failures.allow(); ok {
			a.front.log.Info("front: association ended before its app ended it", "code", string(tunnel.CodeOf(a.endErr)),
				"from", a.conn.from, "why", tunnel.LogText(tunnel.Sentence(a.endErr), logSentence), "unlogged", n)
		}
	}
	a.front.relays.Add(-1)
	a.front.gone(a.conn)
}

// fromTCP is the association as its TCP connection's reader. RFC 1928 has
// nothing to send there.
type fromTCP association

func (a *fromTCP) Take(p []byte, _ netip.AddrPort) {
	if a.left -= len(p); a.left <= 0 {
		(*association)(a).end(nil)
	}
}

func (a *fromTCP) Flush() {}

// Failed is the end of the connection.
func (a *fromTCP) Failed() { (*association)(a).end(nil) }

// fromUDP is the association as its socket's reader.
type fromUDP association

func (a *fromUDP) Take(p []byte, from netip.AddrPort) { (*association)(a).fromApp(p, from) }

func (a *fromUDP) Flush() { a.out.Flush() }

// Failed is the echo of a reply that the app's socket refused.
func (a *fromUDP) Failed() {}

// fromApp passes one datagram on.
func (a *association) fromApp(p []byte, from netip.AddrPort) {
	drops := &a.front.drops
	h, payload, why, ok := parseUDPHeader(p)
	switch {
	case !ok: // and never locks the association
		drops.count[why].Add(1)
		return
	case !a.isSender(from):
		return
	}
	to := tunnel.Target{Addr: h.addr, Port: h.port}
	if h.host != nil {
		to = a.target(h)
	}
	switch err := a.out.Send(payload, to); {
	case err == nil:
		drops.up.Add(1)
	case errors.Is(err, tunnel.ErrTooLarge):
		drops.count[dropTooLarge].Add(1)
	case errors.Is(err, tunnel.PolicyDenied):
		drops.count[dropPolicy].Add(1)
	default:
		drops.count[dropRefused].Add(1)
	}
}

// isSender reports whether from is the socket that this association is for. The
// first one that may be locks it: the address of the TCP client, the port that
// it named if it did, and, where the system can tell, the same local user.
func (a *association) isSender(from netip.AddrPort) bool {
	if locked := a.sender.Load(); locked != nil {
		switch {
		case *locked != from:
			a.front.drops.count[dropWrongSource].Add(1)
			return false
		case !a.stillOwned(from):
			a.front.drops.count[dropWrongUser].Add(1)
			return false
		}
		return true
	}
	unmapped := netip.AddrPortFrom(from.Addr().Unmap(), from.Port())
	if unmapped.Addr() != a.conn.from.Addr() || a.port != 0 && from.Port() != a.port {
		a.front.drops.count[dropWrongSource].Add(1)
		return false
	}
	owned := unmapped != a.stranger || time.Since(a.refusedAt) >= strangerPause
	if owned {
		owned, _ = a.owner.owns(unmapped, a.relay)
	}
	if !owned {
		a.stranger, a.refusedAt = unmapped, time.Now()
		a.front.drops.count[dropWrongUser].Add(1)
		return false
	}
	a.ownedAt.Store(int64(time.Since(a.front.made)))
	locked := from // not from itself, which would then be allocated for every datagram
	a.sender.Store(&locked)
	return true
}

// stillOwned reports whether the socket that the association is locked to is its
// user's, by the last lookup: a port that an app gives up while it keeps its
// connection can be taken by anybody.
func (a *association) stillOwned(sender netip.AddrPort) bool {
	now, at := int64(time.Since(a.front.made)), a.ownedAt.Load()
	if now-at >= int64(a.front.ownerPause) && a.ownedAt.CompareAndSwap(at, now) {
		if owned, sure := a.owner.owns(netip.AddrPortFrom(sender.Addr().Unmap(), sender.Port()), a.relay); sure {
			a.lost.Store(!owned)
		}
	}
	return !a.lost.Load()
}

// target turns a name into a target, without allocating for the name that the
// last datagram had.
func (a *association) target(h udpHeader) tunnel.Target {
	if string(h.host) != a.lastHost {
		a.lastHost = string(h.host)
		a.lastTo = tunnel.Target{Host: a.lastHost}
		if addr, err := netip.ParseAddr(a.lastHost); err == nil && addr.Zone() == "" {
			a.lastTo = tunnel.Target{Addr: addr}
		}
	}
	to := a.lastTo
	to.Port = h.port
	return to
}

// Deliver hands one datagram to the app. It never waits: what the socket does
// not take at once is dropped.
func (a *association) Deliver(p []byte, from netip.AddrPort) {
	drops := &a.front.drops
	sender := a.sender.Load()
	if sender == nil {
		drops.count[dropNoSender].Add(1)
		return
	}
	if !a.stillOwned(*sender) {
		drops.count[dropSocketError].Add(1)
		return
	}
	b := udpBuffers.Get().(*udpBuffer)
	defer udpBuffers.Put(b)
	head := appendSOCKSAddr(append(b.data[:0], 0, 0, 0), from)
	if len(head)+len(p) > udpPayload {
		drops.count[dropTooLarge].Add(1)
		return
	}
	n := len(head) + copy(b.data[len(head):], p)
	drops.handed(a.socket.Send(b.data[:n], *sender))
}

// handed counts what the app's socket said to a datagram.
func (d *frontDrops) handed(err error) {
	switch {
	case err == nil:
		d.down.Add(1)
	case errors.Is(err, tunnel.ErrBlocked), errors.Is(err, syscall.ENOBUFS):
		d.count[dropSocketFull].Add(1)
	default:
		d.count[dropSocketError].Add(1)
	}
}

// Unreachable is counted: SOCKS has no word for it.
func (a *association) Unreachable(netip.AddrPort, error) {
	a.front.drops.unreachable.Add(1)
}

// Closed ends the TCP connection, which is how an app learns of it.
func (a *association) Closed(err error) {
	if err == nil {
		err = io.EOF
	}
	a.end(err)
}

// udpBuffer holds one datagram for an app.
type udpBuffer struct {
	data [1 << 16]byte
}

// udpBuffers are shared by all associations of the process.
var udpBuffers = sync.Pool{New: func() any { return new(udpBuffer) }}
