package sidecar

import (
	"bufio"
	"context"
	"crypto/sha256"
	"crypto/subtle"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"culvert/tunnel"
	"culvert/tunnel/fair"
	"culvert/tunnel/netio"
)

const (
	// frontGreeting is a little below the 5 s in which a silent connection must
	// be gone.
	frontGreeting = 4500 * time.Millisecond
	// frontRequest bounds everything up to the request's last byte.
	frontRequest = 10 * time.Second
	// frontLinger is how long a refused client may take to read its reply.
	frontLinger = 500 * time.Millisecond
	// frontHeadLimit bounds the bytes of a request of either protocol.
	frontHeadLimit = 16 << 10
	// frontMaxConns bounds open connections where the config does not.
	frontMaxConns = 4096
)

// FrontConfig is what a Front is made of.
type FrontConfig struct {
	// Listener accepts TCP. Without Auth it must be bound to a loopback
	// address. The Front owns it from NewFront's success on.
	Listener net.Listener
	// Next opens what apps ask for. Its Peer has App empty.
	Next tunnel.Opener
	// Auth decides on a user name and password of up to 255 bytes each; nil
	// asks for none. It must take the same time for every wrong answer:
	// StaticAuth does.
	Auth func(user, password string) bool
	// Users are the numbers of those users of this machine who may use the front,
	// whatever address they come from; empty: everybody may. It needs Linux. What
	// the kernel can not tell the user of is refused.
	Users []uint32
	// MaxConns bounds open connections, those that hold a UDP association
	// included. What comes beyond it is closed at once. 0 is 4096.
	MaxConns int
	// MaxAge is how long an app's datagram may wait in our socket until it is
	// dropped, as when this process stood still. 0: for ever.
	MaxAge time.Duration
	// Log may be nil.
	Log *slog.Logger
	// ListenUDP makes the socket of one UDP association, bound to the given
	// address and any port; nil is net.ListenUDP.
	ListenUDP func(netip.Addr) (*net.UDPConn, error)
}

// A Front offers a path as SOCKS5 and HTTP proxy on one TCP port.
type Front struct {
	listener  net.Listener
	next      tunnel.Opener
	auth      func(user, password string) bool
	users     []uint32
	strangers atomic.Int64 // open connections of other users
	maxConns  int
	log       *slog.Logger
	listenUDP func(netip.Addr) (*net.UDPConn, error)

	greeting, request, linger, ownerPause time.Duration

	made time.Time // zero of the clock that associations go by

	connections  atomic.Uint64
	streams      atomic.Uint64
	associations atomic.Uint64
	relays       atomic.Int64
	drops        frontDrops
	refused      tunnel.Refusals
	failures     logLimit
	overflows    logLimit
	poller       netio.Poller // reads associations

	mu     sync.Mutex
	conns  map[*frontConn]struct{} // guarded by mu
	shares *fair.Places[uint32]    // the same, what users hold of them; nil: not known
	wg     sync.WaitGroup          // one for each of conns
}

// FrontStats are counters since the Front was made, and live figures.
type FrontStats struct {
	Open         int               `json:"open"`                // connections open now
	Relays       int               `json:"open_associations"`   // UDP associations open now
	Connections  uint64            `json:"connections"`         // connections accepted
	Streams      uint64            `json:"streams"`             // CONNECT requests that succeeded, SOCKS and HTTP
	Associations uint64            `json:"associations"`        // UDP ASSOCIATE requests that succeeded
	Refused      map[string]uint64 `json:"refused,omitempty"`   // requests and connections, by code
	Dropped      map[string]uint64 `json:"dropped,omitempty"`   // datagrams, by reason
	Unreachable  uint64            `json:"unreachable"`         // ICMP errors that came back for datagrams
	Up           uint64            `json:"datagrams_from_apps"` // datagrams passed on
	Down         uint64            `json:"datagrams_to_apps"`   // datagrams handed to apps
}

// NewFront checks the configuration. Errors have the code ConfigInvalid and
// name the field.
func NewFront(c FrontConfig) (*Front, error) {
	if c.Listener == nil {
		return nil, tunnel.Errorf(tunnel.ConfigInvalid, "Listener is missing")
	}
	if c.Next == nil {
		return nil, tunnel.Errorf(tunnel.ConfigInvalid, "Next is missing")
	}
	if c.MaxConns < 0 {
		return nil, tunnel.Errorf(tunnel.ConfigInvalid, "MaxConns is %d; it can not be negative", c.MaxConns)
	}
	if len(c.Users) > 0 && !ownersKnown {
		return nil, tunnel.Errorf(tunnel.ConfigInvalid, "Users: this system does not tell who is behind a connection; leave the users out, or set a user and password")
	}
	if c.MaxAge < 0 {
		return nil, tunnel.Errorf(tunnel.ConfigInvalid, "MaxAge is %v; it can not be negative", c.MaxAge)
	}
	addr, ok := c.Listener.Addr().(*net.TCPAddr)
	if !ok {
		return nil, tunnel.Errorf(tunnel.ConfigInvalid, "Listener is on %s, which is not TCP", c.Listener.Addr())
	}
	if c.Auth == nil && !addr.IP.IsLoopback() {
		return nil, tunnel.Errorf(tunnel.ConfigInvalid,
			"the front would listen on %s for anyone who can reach it; use a loopback address or set a user and password", addr)
	}
	f := &Front{
		listener:   c.Listener,
		next:       c.Next,
		auth:       c.Auth,
		users:      slices.Clone(c.Users),
		maxConns:   c.MaxConns,
		log:        c.Log,
		listenUDP:  c.ListenUDP,
		greeting:   frontGreeting,
		request:    frontRequest,
		linger:     frontLinger,
		made:       time.Now(),
		ownerPause: ownerPause,
		conns:      make(map[*frontConn]struct{}),
	}
	f.poller.MaxAge = c.MaxAge
	if f.maxConns == 0 {
		f.maxConns = frontMaxConns
	}
	if len(f.users) > 0 {
		f.shares = fair.New[uint32](f.maxConns)
	}
	if f.log == nil {
		f.log = slog.New(slog.DiscardHandler)
	}
	if f.listenUDP == nil {
		f.listenUDP = func(a netip.Addr) (*net.UDPConn, error) {
			return net.ListenUDP("udp", net.UDPAddrFromAddrPort(netip.AddrPortFrom(a, 0)))
		}
	}
	return f, nil
}

// StaticAuth accepts one user name and password, in a time that does not
// depend on how much of them was right.
func StaticAuth(user, password string) func(user, password string) bool {
	wantUser, wantPassword := sha256.Sum256([]byte(user)), sha256.Sum256([]byte(password))
	return func(user, password string) bool {
		gotUser, gotPassword := sha256.Sum256([]byte(user)), sha256.Sum256([]byte(password))
		return subtle.ConstantTimeCompare(gotUser[:], wantUser[:])&
			subtle.ConstantTimeCompare(gotPassword[:], wantPassword[:]) == 1
	}
}

// Addr returns the address that the front listens on.
func (f *Front) Addr() net.Addr { return f.listener.Addr() }

// Stats returns the counters.
func (f *Front) Stats() FrontStats {
	dropped := f.drops.byReason()
	if n := f.poller.Late(); n > 0 {
		dropped[dropLate] = n
	}
	s := FrontStats{
		Relays:       int(f.relays.Load()),
		Refused:      f.refused.ByCode(),
		Connections:  f.connections.Load(),
		Streams:      f.streams.Load(),
		Associations: f.associations.Load(),
		Dropped:      dropped,
		Unreachable:  f.drops.unreachable.Load(),
		Up:           f.drops.up.Load(),
		Down:         f.drops.down.Load(),
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	s.Open = len(f.conns)
	return s
}

// Run serves until ctx ends, then resets every connection, waits for all that
// it started and returns nil. It returns an error only when the listener
// fails. Run may be called once.
func (f *Front) Run(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stopped := context.AfterFunc(ctx, func() { f.listener.Close() })
	defer stopped()

	err := tunnel.AcceptConns(ctx, f.listener, f.log, func(c net.Conn) { f.take(ctx, c) })
	cancel()
	f.listener.Close()
	f.mu.Lock()
	for c := range f.conns {
		// A reset, because a transfer that we cut short must not look complete.
		c.Abort(tunnel.ProxyStopped)
	}
	f.mu.Unlock()
	f.wg.Wait()
	f.poller.Close()
	return err
}

// take serves a connection, unless there are too many.
func (f *Front) take(ctx context.Context, c net.Conn) {
	f.connections.Add(1)
	tcp, ok := c.(*net.TCPConn)
	if !ok {
		f.log.Error("front: the listener gave a connection that is not TCP", "addr", c.RemoteAddr())
		c.Close()
		return
	}
	conn := newFrontConn(tcp)
	f.mu.Lock()
	full := len(f.conns) >= f.maxConns
	if !full {
		f.conns[conn] = struct{}{}
		f.wg.Add(1)
	}
	f.mu.Unlock()
	if full {
		f.refused.Add(tunnel.LimitExceeded) // first: who is closed finds it counted
		c.Close()
		if n, ok := f.overflows.allow(); ok {
			f.log.Warn("front: too many connections are open; a new one was closed", "limit", f.maxConns, "unlogged", n)
		}
		return
	}
	go func() {
		f.serve(ctx, conn)
		if conn.held.Load() == nil {
			f.gone(conn)
		}
	}()
}

// gone closes a connection and forgets it.
func (f *Front) gone(c *frontConn) {
	c.Close()
	f.mu.Lock()
	defer f.mu.Unlock()
	if _, ok := f.conns[c]; ok {
		delete(f.conns, c)
		if c.placed {
			f.shares.Leave(c.uid)
		}
		f.wg.Done()
	}
}

// serve tells the protocols apart by the first byte. A UDP association outlives
// it: then it holds the connection.
func (f *Front) serve(ctx context.Context, c *frontConn) {
	start := time.Now()
	c.SetDeadline(start.Add(f.greeting))
	if c.stranger = f.strange(c); c.stranger != nil { // who is told so, if there are not many
		defer f.strangers.Add(-1)
		if f.strangers.Add(1) > int64(min(maxStrangers, max(f.maxConns/16, 1))) {
			f.failed(c, "", c.stranger)
			return
		}
	}
	first, err := c.in.Peek(1)
	if err != nil {
		return
	}
	switch b := first[0]; {
	case b == 5:
		f.serveSOCKS(ctx, c, start)
	case b >= 'A' && b <= 'Z':
		c.SetDeadline(start.Add(f.request))
		f.serveHTTP(ctx, c)
	case b == 4:
		// SOCKS4: "request rejected or failed" with no address.
		f.failed(c, "", tunnel.Errorf(tunnel.Unsupported, "SOCKS4 is not supported; set the app to SOCKS5 or to an HTTP proxy"))
		c.Write([]byte{0, 0x5b, 0, 0, 0, 0, 0, 0})
		c.finish(f.linger)
	case b == 0x16: // a TLS record with a handshake
		f.failed(c, "", tunnel.Errorf(tunnel.Unsupported, "the app speaks TLS to the proxy; set the proxy as socks5:// or http://, not https://"))
	default:
		f.failed(c, "", tunnel.Errorf(tunnel.Unsupported, "the app speaks neither SOCKS5 nor HTTP; set it to one of them"))
	}
}

// maxStrangers bounds the refused connections that are answered at once, so that they
// take no places of those who may use the front. It is a sixteenth of a small front.
const maxStrangers = 64

// strange says why a connection's user may not use the front, or not more of it; nil:
// the user may, and holds one place more.
func (f *Front) strange(c *frontConn) error {
	if len(f.users) == 0 {
		return nil
	}
	uid, known := userOf(c)
	switch {
	case !known:
		return tunnel.Errorf(tunnel.NotPermitted, "the system does not tell which user of this machine asks, and only some may use Culvert here; connect from this machine itself")
	case !slices.Contains(f.users, uid):
		return tunnel.Errorf(tunnel.NotPermitted, "user %d may not use Culvert on this machine; ask its administrator to add the user to front.users", uid)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	c.uid = uid
	if _, c.placed = f.shares.Enter(uid); !c.placed {
		return tunnel.Errorf(tunnel.LimitExceeded, "the apps of user %d have their share of the %d connections that Culvert takes on this machine; close some of them, or raise front.max_connections", uid, f.maxConns)
	}
	return nil
}

// open asks for a stream, and gives up when the client leaves first.
func (f *Front) open(ctx context.Context, c *frontConn, user string, to tunnel.Target) (tunnel.Stream, error) {
	if c.stranger != nil {
		f.failed(c, to.String(), c.stranger)
		return nil, c.stranger
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	settled := whenLeft(c.TCPConn, cancel)
	stream, err := f.next.OpenStream(ctx, tunnel.Peer{User: user, Addr: c.from}, to)
	settled()
	switch {
	case ctx.Err() != nil:
		f.refused.Add("client_left")
		if err == nil {
			stream.Abort(ctx.Err())
		}
		return nil, ctx.Err()
	case err != nil:
		f.failed(c, to.String(), err)
		return nil, err
	}
	f.streams.Add(1)
	return stream, nil
}

// splice joins the app to the target until both directions have ended.
func (f *Front) splice(c *frontConn, to tunnel.Target, stream tunnel.Stream) {
	if err := tunnel.Splice(c, stream); err != nil {
		f.log.Debug("front: stream broke", "from", c.from, "to", tunnel.LogText(to.String(), logName), "err", tunnel.LogText(err.Error(), logSentence))
	}
}

// failed counts and logs a request that was not served. to may be empty; more
// are further attributes, their texts cut already.
func (f *Front) failed(c *frontConn, to string, err error, more ...any) {
	code := tunnel.CodeOf(err)
	f.refused.Add(code)
	if n, ok := f.failures.allow(); ok {
		attrs := []any{"code", string(code), "from", c.from}
		if to != "" {
			attrs = append(attrs, "to", tunnel.LogText(to, logName))
		}
		attrs = append(append(attrs, more...), "why", tunnel.LogText(tunnel.Sentence(err), logSentence), "unlogged", n)
		f.log.Info("front: request refused", append(attrs, "audit", "refused")...)
	}
}

// A frontConn is one accepted connection, as a tunnel.Stream.
type frontConn struct {
	*net.TCPConn
	from netip.AddrPort
	in   *bufio.Reader // what was read but not consumed; nil once empty
	head io.LimitedReader
	held atomic.Pointer[association] // the one that the connection now belongs to

	stranger error  // why its user may not use the front, or not more of it; nil: the user may
	uid      uint32 // the user, where placed
	placed   bool   // counts among what that user holds; guarded by Front.mu
}

func newFrontConn(c *net.TCPConn) *frontConn {
	f := &frontConn{TCPConn: c, from: tunnel.AddrPortOf(c.RemoteAddr())}
	f.head = io.LimitedReader{R: c, N: frontHeadLimit}
	f.in = bufio.NewReader(&f.head)
	return f
}

// headRead ends the part of the connection that is bounded in bytes and time.
func (c *frontConn) headRead() {
	c.SetDeadline(time.Time{})
	c.head.N = 0
	if c.in.Buffered() == 0 {
		c.in = nil
	}
}

// Read returns first what came together with the request.
func (c *frontConn) Read(p []byte) (int, error) {
	if c.in == nil {
		return c.TCPConn.Read(p)
	}
	n, err := c.in.Read(p[:min(len(p), c.in.Buffered())])
	if c.in.Buffered() == 0 {
		c.in = nil
	}
	return n, err
}

// WriteTo hides TCPConn's, which would overtake what Read still has.
func (c *frontConn) WriteTo(w io.Writer) (int64, error) {
	return io.Copy(w, struct{ io.Reader }{c})
}

// Abort resets the connection.
func (c *frontConn) Abort(error) {
	c.SetLinger(0)
	c.Close()
	if a := c.held.Load(); a != nil {
		a.reset()
	}
}

// finish closes after a reply. A close with unread bytes would be a reset,
// which takes the reply away from a client that has not read it yet.
func (c *frontConn) finish(linger time.Duration) {
	c.CloseWrite()
	c.SetDeadline(time.Now().Add(linger))
	io.CopyN(io.Discard, c.TCPConn, 256<<10)
	c.Close()
}

// validHost reports whether a name may go to a resolver and a log: 1 to 255
// bytes, none of them a space or a control character.
func validHost[T string | []byte](host T) bool {
	if len(host) == 0 || len(host) > 255 {
		return false
	}
	for i := range len(host) {
		if host[i] <= ' ' || host[i] == 0x7f {
			return false
		}
	}
	return true
}

// How many bytes of a text are logged, counted as the log writes them: a line
// with two names and a sentence stays under 1 KiB.
const (
	logName     = 120
	logSentence = 400
)

// A logLimit lets ten lines a second pass.
type logLimit struct {
	mu         sync.Mutex
	second     time.Time // guarded by mu: when the current second began
	passed     int       // guarded by mu
	suppressed int       // guarded by mu
}

// allow reports whether a line may be written, and how many were not since the
// last.
func (l *logLimit) allow() (suppressed int, ok bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if now := time.Now(); now.Sub(l.second) >= time.Second {
		l.second, l.passed = now, 0
	}
	if l.passed >= 10 {
		l.suppressed++
		return 0, false
	}
	l.passed++
	suppressed, l.suppressed = l.suppressed, 0
	return suppressed, true
}
