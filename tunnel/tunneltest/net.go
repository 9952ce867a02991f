package tunneltest

import (
	"context"
	"crypto/ed25519"
	"crypto/hkdf"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"time"

	"culvert/tunnel"
)

// Config says how a Net behaves. The zero value is ready to use.
type Config struct {
	// Kind is "quic" (the default): carriers have a way for datagrams and there
	// are no lanes; or "tls": carriers have none and candidates can be lanes.
	Kind string
	// MaxDatagram is the largest datagram in bytes; 0: 1,200.
	MaxDatagram int
	// Queue is how many datagrams one direction takes while nobody receives
	// them; 0: 64.
	Queue int
	// Buffer is how many bytes one direction of a stream takes while nobody
	// reads them; 0: 64 KiB.
	Buffer int
	// Datagram decides each datagram's fate; nil: it arrives. It is called
	// concurrently and borrows p.
	Datagram func(fromClient bool, p []byte) Fate
	// Flow gives carriers of the kind "quic" a UDP flow. Packet decides the fate
	// of each packet on it (nil: it arrives), and MaxPacket is the largest that
	// it takes, in bytes; 0: 1,472.
	Flow      bool
	Packet    func(fromClient bool, p []byte) Fate
	MaxPacket int
	// Dial is asked before each dial; an error is the dial's result. It may
	// wait for ctx. nil: all dials succeed where somebody listens.
	Dial func(ctx context.Context, address string) error
}

// A Net is a network in memory: addresses to listen on, and dialers.
type Net struct {
	cfg Config

	mu        sync.Mutex
	listeners map[string]*listener
	conns     map[*conn]struct{}
	dials     uint16 // the next client's port
	blocked   bool
}

// NewNet returns a network on which nobody listens yet.
func NewNet(c Config) *Net {
	set := func(v *int, to int) {
		if *v == 0 {
			*v = to
		}
	}
	set(&c.MaxDatagram, 1200)
	set(&c.MaxPacket, 1472)
	set(&c.Queue, 64)
	set(&c.Buffer, 64<<10)
	if c.Kind == "" {
		c.Kind = "quic"
	}
	return &Net{cfg: c, listeners: make(map[string]*listener), conns: make(map[*conn]struct{}), dials: 40000}
}

// Pair returns the two ends of a new connection. Both are closed, with what
// they have turned into, when the test is over.
func Pair(t testing.TB, c Config, key ed25519.PublicKey) (client, server tunnel.Candidate) {
	t.Helper()
	n := NewNet(c)
	l, err := n.Listen("192.0.2.1:443")
	if err != nil {
		t.Fatal(err)
	}
	client, err = n.Dialer(key).Dial(context.Background(), "192.0.2.1:443")
	if err != nil {
		t.Fatal(err)
	}
	server, err = l.Accept(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { n.Cut(); l.Close() })
	return client, server
}

// Block makes every datagram way refuse to send, or ends that.
func (n *Net) Block(on bool) {
	n.mu.Lock()
	n.blocked = on
	var ways []*way
	for c := range n.conns {
		ways = append(ways, c.ways[:]...)
	}
	n.mu.Unlock()
	for _, w := range ways {
		w.unblock()
	}
}

func (n *Net) datagramsBlocked() bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.blocked
}

// Cut ends every connection, as when the network goes away; both ends notice
// at once. New ones can be made.
func (n *Net) Cut() { n.cut(func(*conn) bool { return true }) }

// CutLanes ends every lane and leaves the carriers.
func (n *Net) CutLanes() {
	n.cut(func(c *conn) bool {
		c.mu.Lock()
		defer c.mu.Unlock()
		return c.lane
	})
}

func (n *Net) cut(which func(*conn) bool) {
	n.mu.Lock()
	conns := slices.Collect(maps.Keys(n.conns))
	n.mu.Unlock()
	var all []*conn
	for _, c := range conns {
		if which(c) {
			all = append(all, c)
		}
	}
	err := errors.New("the network was cut")
	for _, c := range all {
		c.shut(err, err)
		for i := range c.ways {
			c.ways[i].wait()
			c.flows[i].way.wait()
		}
	}
}

// Listen listens on an address, which is a numeric HOST:PORT.
func (n *Net) Listen(address string) (tunnel.Listener, error) {
	at, err := netip.ParseAddrPort(address)
	if err != nil {
		return nil, err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.listeners[address] != nil {
		return nil, fmt.Errorf("somebody listens on %s", address)
	}
	l := &listener{net: n, address: address, at: at, queue: make(chan *candidate, 64), closed: make(chan struct{})}
	n.listeners[address] = l
	return l, nil
}

// Dialer returns a dialer that proves key; nil: no Ed25519 key.
func (n *Net) Dialer(key ed25519.PublicKey) tunnel.Dialer { return &dialer{net: n, key: key} }

type dialer struct {
	net *Net
	key ed25519.PublicKey
}

func (d *dialer) Kind() string { return d.net.cfg.Kind }

func (d *dialer) Dial(ctx context.Context, address string) (tunnel.Candidate, error) {
	if d.net.cfg.Dial != nil {
		if err := d.net.cfg.Dial(ctx, address); err != nil {
			return nil, err
		}
	}
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	d.net.mu.Lock()
	l := d.net.listeners[address]
	d.net.dials++
	from := netip.AddrPortFrom(netip.AddrFrom4([4]byte{198, 51, 100, 1}), d.net.dials)
	d.net.mu.Unlock()
	if l == nil {
		return nil, tunnel.Errorf(tunnel.CloudUnreachable, "nobody listens on %s", address)
	}
	client, server := d.net.connect(d.key, from, l.at)
	select {
	case l.queue <- server:
		return client, nil
	case <-l.closed:
	case <-ctx.Done():
	}
	client.Close()
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	return nil, tunnel.Errorf(tunnel.CloudUnreachable, "nobody listens on %s any more", address)
}

type listener struct {
	net     *Net
	address string
	at      netip.AddrPort
	queue   chan *candidate
	once    sync.Once
	closed  chan struct{}
}

func (l *listener) Addr() net.Addr { return net.UDPAddrFromAddrPort(l.at) }

func (l *listener) Accept(ctx context.Context) (tunnel.Candidate, error) {
	select {
	case <-l.closed:
		return nil, net.ErrClosed
	default:
	}
	select {
	case c := <-l.queue:
		return c, nil
	case <-l.closed:
		return nil, net.ErrClosed
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

func (l *listener) Close() error {
	l.once.Do(func() {
		close(l.closed)
		l.net.mu.Lock()
		delete(l.net.listeners, l.address)
		l.net.mu.Unlock()
	})
	for {
		select {
		case c := <-l.queue:
			c.Close()
		default:
			return nil
		}
	}
}

// A conn is what its two ends share.
type conn struct {
	net    *Net
	secret [32]byte // what keys are exported from
	ends   [2]*end  // client, server
	ways   [2]*way
	flows  [2]*flow

	mu      sync.Mutex
	streams map[*stream]struct{} // those of both ends that are not closed
	lane    bool                 // an end has become a lane
	shutErr error
}

// An end is one end of a connection; candidate, carrier and lane are views of it.
type end struct {
	*conn
	i             int // 0: client, 1: server
	local, remote netip.AddrPort
	peerKey       ed25519.PublicKey
	incoming      chan *stream
	done          chan struct{}
	err           error // set before done is closed
}

func (n *Net) connect(key ed25519.PublicKey, from, to netip.AddrPort) (client, server *candidate) {
	c := &conn{net: n, streams: make(map[*stream]struct{})}
	rand.Read(c.secret[:])
	name := "quic-datagram"
	if n.cfg.Kind == "tls" {
		name = "lane"
	}
	c.ways[0], c.ways[1] = newWays(n, name, n.cfg.Datagram, n.cfg.MaxDatagram)
	client0, server0 := newWays(n, "flow", n.cfg.Packet, n.cfg.MaxPacket)
	c.flows[0], c.flows[1] = &flow{way: client0, peer: to}, &flow{way: server0, peer: from}
	for i := range c.ends {
		c.ends[i] = &end{conn: c, i: i, local: from, remote: to,
			incoming: make(chan *stream, 4096), done: make(chan struct{})}
	}
	c.ends[1].local, c.ends[1].remote = to, from
	c.ends[1].peerKey = key
	n.mu.Lock()
	n.conns[c] = struct{}{}
	n.mu.Unlock()
	a, b := c.newStreams(c.ends[0])
	return &candidate{end: c.ends[0], greeting: a}, &candidate{end: c.ends[1], greeting: b}
}

// newStreams makes both ends of a stream that e opens.
func (c *conn) newStreams(e *end) (a, b *stream) {
	up, down := newHalf(c.net.cfg.Buffer), newHalf(c.net.cfg.Buffer)
	make1 := func(e *end, in, out *half) *stream {
		s := &stream{in: in, out: out, local: net.UDPAddrFromAddrPort(e.local), remote: net.UDPAddrFromAddrPort(e.remote)}
		s.closed = func() {
			c.mu.Lock()
			delete(c.streams, s)
			c.mu.Unlock()
		}
		return s
	}
	a, b = make1(e, down, up), make1(c.ends[1-e.i], up, down)
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.shutErr != nil {
		up.stop(c.shutErr, c.shutErr)
		down.stop(c.shutErr, c.shutErr)
		return a, b
	}
	c.streams[a], c.streams[b] = struct{}{}, struct{}{}
	return a, b
}

// shut ends everything on the connection; each end is told its own reason.
func (c *conn) shut(client, server error) {
	c.mu.Lock()
	if c.shutErr != nil {
		c.mu.Unlock()
		return
	}
	c.shutErr = client
	streams := c.streams
	c.streams = make(map[*stream]struct{})
	c.mu.Unlock()

	for i, err := range []error{client, server} {
		c.ends[i].err = err
		c.ways[i].end(err)
		c.flows[i].way.end(err)
		close(c.ends[i].done)
	}
	for s := range streams {
		s.in.stop(client, client)
		s.out.stop(client, client)
	}
	c.net.mu.Lock()
	delete(c.net.conns, c)
	c.net.mu.Unlock()
}

// close is shut from one end; it returns when nothing of that end runs.
func (e *end) close(why error) {
	if why == nil {
		why = net.ErrClosed
	}
	// The peer learns the words, not the value, as across a network.
	reasons := []error{why, why}
	reasons[1-e.i] = fmt.Errorf("the peer closed the connection: %s", why.Error())
	e.shut(reasons[0], reasons[1])
	e.ways[e.i].wait()
	e.flows[e.i].way.wait()
}

func (e *end) Done() <-chan struct{} { return e.done }

func (e *end) Err() error {
	select {
	case <-e.done:
		return e.err
	default:
		return nil
	}
}

type candidate struct {
	*end
	greeting *stream

	mu     sync.Mutex
	turned bool // Carrier or Lane has succeeded
}

func (c *candidate) Read(p []byte) (int, error)    { return c.greeting.Read(p) }
func (c *candidate) Write(p []byte) (int, error)   { return c.greeting.Write(p) }
func (c *candidate) SetDeadline(t time.Time) error { return c.greeting.SetDeadline(t) }
func (c *candidate) PeerKey() ed25519.PublicKey    { return c.peerKey }
func (c *candidate) RemoteAddr() netip.AddrPort    { return c.remote }
func (c *candidate) Kind() string                  { return c.net.cfg.Kind }

func (c *candidate) turn() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.turned {
		return errors.New("the candidate has been used")
	}
	if err := c.Err(); err != nil {
		return err
	}
	c.turned = true
	return nil
}

func (c *candidate) Carrier() (tunnel.Carrier, error) {
	if err := c.turn(); err != nil {
		return nil, err
	}
	c.greeting.Close()
	return &carrier{c.end}, nil
}

func (c *candidate) Lane() (tunnel.Lane, error) {
	if c.net.cfg.Kind != "tls" {
		return nil, tunnel.Errorf(tunnel.Unsupported, "a %s connection can not be a lane", c.net.cfg.Kind)
	}
	if err := c.turn(); err != nil {
		return nil, err
	}
	c.conn.mu.Lock()
	c.conn.lane = true
	c.conn.mu.Unlock()
	return &lane{c.ways[c.i], c.end}, nil
}

func (c *candidate) Close() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.turned {
		c.turned = true
		c.close(nil)
	}
	return nil
}

type lane struct {
	*way
	e *end
}

func (l *lane) Done() <-chan struct{} { return l.e.Done() }
func (l *lane) Err() error            { return l.e.Err() }

func (l *lane) Close(err error) error {
	l.e.close(err)
	return nil
}

type carrier struct{ *end }

func (c *carrier) OpenStream(ctx context.Context) (tunnel.Stream, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if err := c.Err(); err != nil {
		return nil, err
	}
	a, b := c.newStreams(c.end)
	// As with QUIC, the peer does not see the stream before something is said on it.
	return &opened{stream: a, show: sync.OnceFunc(func() {
		select {
		case c.ends[1-c.i].incoming <- b:
		default:
			b.Abort(nil)
		}
	})}, nil
}

// An opened stream has not been seen by the peer until something is said on it.
type opened struct {
	*stream
	show func()
}

func (s *opened) Write(p []byte) (int, error) { s.show(); return s.stream.Write(p) }
func (s *opened) CloseWrite() error           { s.show(); return s.stream.CloseWrite() }
func (s *opened) Close() error                { s.show(); return s.stream.Close() }
func (s *opened) Abort(err error)             { s.show(); s.stream.Abort(err) }

func (c *carrier) AcceptStream(ctx context.Context) (tunnel.Stream, error) {
	select {
	case s := <-c.incoming:
		return s, nil
	case <-c.done:
		return nil, c.err
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

func (c *end) Flow() tunnel.Flow {
	if c.net.cfg.Kind != "quic" || !c.net.cfg.Flow {
		return nil
	}
	return c.flows[c.i]
}

func (c *carrier) Datagrams() tunnel.Way {
	if c.net.cfg.Kind == "tls" {
		return nil
	}
	return c.ways[c.i]
}

func (c *end) ExportKey(label string, context []byte, n int) ([]byte, error) {
	info := fmt.Sprintf("%d %s %s", len(label), label, context)
	return hkdf.Expand(sha256.New, c.secret[:], info, n)
}

func (c *carrier) Close(err error) error {
	c.close(err)
	return nil
}

func (c *carrier) Stats() tunnel.CarrierStats {
	return tunnel.CarrierStats{Kind: c.net.cfg.Kind, Local: c.local, Remote: c.remote}
}
