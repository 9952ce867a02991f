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
)

const (
	// udpPayload is the most that an IPv4 datagram can hold.
	udpPayload = 65507
	// udpSocketBuffer holds 100 ms of 80 Mbit/s; the system may grant less.
	udpSocketBuffer = 1 << 20
	// udpBatch is how many datagrams are read before the batch is flushed.
	udpBatch = 32
	// controlBytes bounds what a client may send on the TCP connection of an
	// association, where RFC 1928 has nothing to send.
	controlBytes = 64 << 10
	// strangerPause bounds how often the owner of a refused sender is looked up.
	strangerPause = time.Second
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
	"app_socket_failed", // the app's socket could not be written to
}

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

// An association is one UDP ASSOCIATE: a socket on the address at which the
// client reached us, relayed for the one client address that it is locked to.
//
// Two goroutines serve it: its TCP connection's, which ends it, and one that
// reads the socket. What comes back is written by whoever delivers it.
type association struct {
	front  *Front
	conn   *frontConn
	socket *net.UDPConn
	raw    syscall.RawConn
	v6     bool
	port   uint16 // the client's port where it named one
	out    tunnel.Packets

	sender atomic.Pointer[netip.AddrPort] // the client's socket, once it has sent

	// The rest belongs to the reading goroutine.
	owner     socketOwner
	stranger  netip.AddrPort // the last sender refused for its owner
	refusedAt time.Time
	lastHost  string // the last name, and what it stands for
	lastTo    tunnel.Target

	endOnce sync.Once
	endErr  error
}

// associate serves a UDP ASSOCIATE until its TCP connection ends. port is what
// the client named as its own.
func (f *Front) associate(c *frontConn, user string, port uint16) {
	a, err := f.newAssociation(c, user, port)
	if err != nil {
		f.failed(c, "UDP ASSOCIATE", err)
		code, _ := frontReply(err)
		c.Write(socksReply(code, netip.AddrPort{}))
		c.finish(f.linger)
		return
	}
	defer f.relays.Add(-1)
	if _, err := c.Write(socksReply(socksSucceeded, addrPortUDP(a.socket))); err != nil {
		a.end(err)
	}
	var readers sync.WaitGroup
	readers.Go(a.read)
	a.hold()
	a.end(nil)
	readers.Wait()
	a.out.Close()
	if a.endErr == nil {
		return
	}
	if n, ok := f.failures.allow(); ok {
		f.log.Info("front: association ended before its app ended it", "code", string(tunnel.CodeOf(a.endErr)),
			"from", c.from, "why", logText(tunnel.Sentence(a.endErr), logSentence), "unlogged", n)
	}
}

func (f *Front) newAssociation(c *frontConn, user string, port uint16) (*association, error) {
	local := addrPort(c.LocalAddr()).Addr()
	socket, err := f.listenUDP(local)
	if err != nil {
		return nil, tunnel.Errorf(tunnel.Internal, "no UDP socket on %s for an association: %w", local, err)
	}
	socket.SetReadBuffer(udpSocketBuffer)
	socket.SetWriteBuffer(udpSocketBuffer)
	raw, err := socket.SyscallConn()
	if err != nil {
		socket.Close()
		return nil, tunnel.Errorf(tunnel.Internal, "no UDP socket on %s for an association: %w", local, err)
	}
	a := &association{front: f, conn: c, socket: socket, raw: raw, v6: local.Is6(), port: port}
	a.owner.of(c)
	out, err := f.next.OpenPackets(tunnel.Peer{User: user, Addr: c.from, Held: true}, a)
	if err != nil {
		socket.Close()
		return nil, err
	}
	a.out = out
	f.relays.Add(1)
	f.associations.Add(1)
	return a, nil
}

// hold returns when the association's TCP connection has ended.
func (a *association) hold() {
	buf := make([]byte, 64)
	for left := controlBytes; left > 0; {
		n, err := a.conn.Read(buf)
		if err != nil {
			return
		}
		left -= n
	}
}

// end makes both goroutines return. It may be called from anywhere.
func (a *association) end(err error) {
	a.endOnce.Do(func() {
		a.endErr = err
		a.socket.Close()
		a.conn.Close()
	})
}

// read carries datagrams from the app. An idle association has no buffer.
func (a *association) read() {
	wait := newReadiness(a.raw)
	for wait.readable() == nil {
		b := udpBuffers.Get().(*udpBuffer)
		for range udpBatch {
			n, from, err := a.socket.ReadFromUDPAddrPort(b.data[:])
			if errors.Is(err, net.ErrClosed) {
				udpBuffers.Put(b)
				return
			}
			if err == nil {
				a.fromApp(b.data[:n], from)
			}
			// Other errors are the echo of a reply that the app's socket
			// refused: nothing was read.
			if !wait.more() {
				break
			}
		}
		udpBuffers.Put(b)
		a.out.Flush()
	}
}

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
		if *locked == from {
			return true
		}
		a.front.drops.count[dropWrongSource].Add(1)
		return false
	}
	unmapped := netip.AddrPortFrom(from.Addr().Unmap(), from.Port())
	switch {
	case unmapped.Addr() != a.conn.from.Addr(), a.port != 0 && from.Port() != a.port:
		a.front.drops.count[dropWrongSource].Add(1)
		return false
	case unmapped == a.stranger && time.Since(a.refusedAt) < strangerPause,
		!a.owner.owns(unmapped, addrPortUDP(a.socket)):
		a.stranger, a.refusedAt = unmapped, time.Now()
		a.front.drops.count[dropWrongUser].Add(1)
		return false
	}
	locked := from // not from itself, which would then be allocated for every datagram
	a.sender.Store(&locked)
	return true
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
	b := udpBuffers.Get().(*udpBuffer)
	defer udpBuffers.Put(b)
	head := appendSOCKSAddr(append(b.data[:0], 0, 0, 0), from)
	if len(head)+len(p) > udpPayload {
		drops.count[dropTooLarge].Add(1)
		return
	}
	n := len(head) + copy(b.data[len(head):], p)
	switch err := b.send(a, n, *sender); {
	case err == nil:
		drops.down.Add(1)
	case isSocketFull(err):
		drops.count[dropSocketFull].Add(1)
	default:
		drops.count[dropSocketError].Add(1)
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

func addrPortUDP(c *net.UDPConn) netip.AddrPort {
	u, ok := c.LocalAddr().(*net.UDPAddr)
	if !ok {
		return netip.AddrPort{}
	}
	ap := u.AddrPort()
	return netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port())
}

// udpBuffers are shared by all associations of the process and both directions.
var udpBuffers = sync.Pool{New: func() any { return newUDPBuffer() }}
