package tunnelquic

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/quic-go/quic-go"

	"culvert/tunnel"
	"culvert/tunnel/crowd"
)

// A Listener accepts connections on one UDP socket.
//
//	accepting ──Close──► draining ──last connection gone──► gone (socket closed)
type Listener struct {
	cfg       Config
	sock      *socket
	transport *quic.Transport
	quic      *quic.Listener

	queue     chan *candidate
	accepting sync.WaitGroup
	closed    chan struct{} // closed when accept has returned: by Close, or because the socket has failed
	gone      chan struct{} // closed by finish
	closing   sync.Once
	finishing sync.Once

	windows    windows
	handshakes atomic.Int64 // open ones; changed under mu
	unanswered *crowd.Crowd // connections whose opening has not been answered
	proved     atomic.Uint64
	refused    atomic.Uint64
	warned     atomic.Int64 // when warn last logged, Unix seconds

	mu       sync.Mutex
	live     map[*link]struct{}
	opening  map[netip.Prefix]int // open handshakes by source; none is 0
	draining bool
	failure  error // why accepting ended without Close
}

// Listen accepts connections on conn, which the listener closes when it has
// been closed and its last connection has ended. The error's code is ConfigInvalid
// or the system's.
func Listen(conn *net.UDPConn, c Config) (*Listener, error) {
	c, err := c.check()
	if err != nil {
		return nil, err
	}
	if conn == nil {
		return nil, tunnel.Errorf(tunnel.ConfigInvalid, "the QUIC listener needs a UDP socket")
	}
	sock, err := newSocket(conn, c, true)
	if err != nil {
		return nil, tunnel.Errorf(tunnel.CodeOf(err), "the QUIC listener can not use its socket: %w", err)
	}
	l := &Listener{
		cfg:        c,
		sock:       sock,
		queue:      make(chan *candidate, c.Limits.Unanswered),
		unanswered: crowd.New(c.Limits.Unanswered),
		closed:     make(chan struct{}),
		gone:       make(chan struct{}),
		live:       make(map[*link]struct{}),
		opening:    make(map[netip.Prefix]int),

		windows: windows{limit: maxWindows},
	}
	crowded := func() bool { return l.handshakes.Load() >= int64(c.Limits.Retry) }
	sock.unproved.wanted = func() bool { return !crowded() }
	l.transport = &quic.Transport{
		Conn:                l.sock,
		ConnectionIDLength:  connIDLen,
		VerifySourceAddress: func(net.Addr) bool { return crowded() },
		ConnContext:         l.countHandshake,
	}
	if c.StatelessResetKey != nil {
		key := quic.StatelessResetKey(*c.StatelessResetKey)
		l.transport.StatelessResetKey = &key
	}
	if c.TokenGeneratorKey != nil {
		key := quic.TokenGeneratorKey(*c.TokenGeneratorKey)
		l.transport.TokenGeneratorKey = &key
	}
	conf := c.quic(true)
	conf.AllowConnectionWindowIncrease = l.windows.allow
	l.quic, err = l.transport.Listen(c.TLS, conf)
	if err != nil {
		l.transport.Close()
		return nil, tunnel.Errorf(tunnel.CodeOf(err), "QUIC can not listen on %s: %w", conn.LocalAddr(), err)
	}
	l.sock.bound()
	l.accepting.Go(l.accept)
	go l.watch()
	return l, nil
}

type handshakeKey struct{}

// countHandshake counts a handshake as open until it has succeeded or failed.
func (l *Listener) countHandshake(ctx context.Context, from *quic.ClientInfo) (context.Context, error) {
	address := tunnel.AddrPortOf(from.RemoteAddr)
	source := crowd.SourceOf(address.Addr())
	if !l.begin(source) {
		l.warn("refused a QUIC connection: too many handshakes are open", l.cfg.Limits.Handshakes)
		return nil, errors.New("too many handshakes are open")
	}
	if from.AddrVerified {
		l.proved.Add(1)
		l.sock.unproved.over(address)
	} else {
		l.sock.unproved.begun(address)
	}
	done := sync.OnceFunc(func() {
		l.over(source)
		l.sock.unproved.over(address)
	})
	context.AfterFunc(ctx, done)
	return context.WithValue(ctx, handshakeKey{}, done), nil
}

// fewOpen is how many open handshakes a source may have where it finds more than
// three quarters of the places taken: those that stop halfway may all be another's.
const fewOpen = 16

// begin counts one more open handshake of a source, or reports that there is no
// place for it.
func (l *Listener) begin(source netip.Prefix) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	all, limit := l.handshakes.Load(), int64(l.cfg.Limits.Handshakes)
	if all >= limit || all >= limit-limit/4 && l.opening[source] >= fewOpen {
		return false
	}
	l.handshakes.Add(1)
	l.opening[source]++
	return true
}

func (l *Listener) over(source netip.Prefix) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.handshakes.Add(-1)
	if l.opening[source]--; l.opening[source] == 0 {
		delete(l.opening, source)
	}
}

// accept empties quic-go's queue of 32: a full one refuses connections.
func (l *Listener) accept() {
	for {
		conn, err := l.quic.Accept(context.Background())
		if err != nil {
			l.mu.Lock()
			if !l.draining {
				l.failure = tunnel.Errorf(tunnel.Internal, "the QUIC listener's socket failed: %w", err)
				l.cfg.Log.Error("the QUIC listener's socket failed", "err", err)
			}
			l.mu.Unlock()
			close(l.closed)
			return
		}
		if done, ok := conn.Context().Value(handshakeKey{}).(func()); ok {
			done()
		}
		refuse := func() { l.accepting.Go(func() { conn.CloseWithError(codeRefused, "") }) }
		place, ok := l.unanswered.Enter(tunnel.AddrPortOf(conn.RemoteAddr()).Addr(), refuse) // or it is turned out by this very goroutine
		if !ok {
			l.warn("refused a QUIC connection: too many wait to be answered", l.cfg.Limits.Unanswered)
			refuse()
			continue
		}
		settled := place.Leave
		k := newLink(conn, l.sock, true, l.cfg.MaxAge, func(k *link) {
			settled()
			l.ended(k)
		})
		l.mu.Lock()
		if conn.Context().Err() == nil { // else ended may have been called already
			l.live[k] = struct{}{}
		}
		l.mu.Unlock()
		c := newServerCandidate(k, settled)
		select {
		case l.queue <- c:
		default: // connections that have ended unseen are still in it
			l.accepting.Go(func() { c.Close() })
		}
	}
}

// watch ends connections whose peers send what brings nothing, until the last
// connection is gone.
func (l *Listener) watch() {
	tick := time.NewTicker(lookEvery)
	defer tick.Stop()
	for {
		select {
		case <-l.gone:
			return
		case now := <-tick.C:
			l.mu.Lock()
			for k := range l.live {
				// Unlike bytes, quic-go counts packets when they are known to be the peer's.
				if k.conn.Context().Err() == nil && k.idle.over(int64(k.conn.ConnectionStats().PacketsReceived), now) {
					go k.close(codeFailed, errIdle)
				}
			}
			l.mu.Unlock()
		}
	}
}

// warn counts a refusal and logs at most one in 10 seconds.
func (l *Listener) warn(text string, limit int) {
	l.refused.Add(1)
	now, last := time.Now().Unix(), l.warned.Load()
	if now-last >= 10 && l.warned.CompareAndSwap(last, now) {
		l.cfg.Log.Warn(text, "limit", limit)
	}
}

// ended forgets a connection.
func (l *Listener) ended(k *link) {
	l.mu.Lock()
	delete(l.live, k)
	last := l.draining && len(l.live) == 0
	l.mu.Unlock()
	if last {
		l.finish()
	}
}

// finish closes the transport and the socket.
func (l *Listener) finish() {
	l.finishing.Do(func() {
		l.transport.Close()
		l.sock.Close()
		if n := l.sock.failed.Load(); n > 0 {
			l.cfg.Log.Info("the kernel refused packets of the QUIC listener", "packets", n)
		}
		close(l.gone)
	})
}

// ListenerStats are what a listener does at the moment, and counters since it began.
type ListenerStats struct {
	Handshakes  int    // open handshakes
	Unanswered  int    // connections whose opening has not been answered
	Connections int    // live connections, with the unanswered ones
	Proved      uint64 // handshakes that began with a proof of the peer's address (Retry)
	Refused     uint64 // connections refused because a limit was reached
	Unsent      uint64 // packets that the kernel refused to send
}

// Stats returns the listener's figures.
func (l *Listener) Stats() ListenerStats {
	l.mu.Lock()
	live := len(l.live)
	l.mu.Unlock()
	return ListenerStats{
		Handshakes:  int(l.handshakes.Load()),
		Unanswered:  l.unanswered.Len(),
		Connections: live,
		Proved:      l.proved.Load(),
		Refused:     l.refused.Load(),
		Unsent:      l.sock.failed.Load(),
	}
}

// Accept returns the next connection; they come in the order in which their
// handshakes ended. It must be called without delay, and what it returns be
// read elsewhere.
func (l *Listener) Accept(ctx context.Context) (tunnel.Candidate, error) {
	select {
	case <-l.closed:
		return nil, l.end()
	default:
	}
	select {
	case c := <-l.queue:
		return c, nil
	case <-l.closed:
		return nil, l.end()
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

func (l *Listener) end() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.failure != nil {
		return l.failure
	}
	return net.ErrClosed
}

// Addr returns the socket's address.
func (l *Listener) Addr() net.Addr { return l.sock.LocalAddr() }

// Close stops accepting and refuses handshakes that are under way. Carriers
// live on; the socket is closed with the last of them.
func (l *Listener) Close() error {
	l.closing.Do(func() {
		l.mu.Lock()
		l.draining = true
		l.mu.Unlock()
		l.quic.Close()
		l.accepting.Wait()
		for drained := false; !drained; {
			select {
			case c := <-l.queue:
				c.Close()
			default:
				drained = true
			}
		}
		l.mu.Lock()
		last := len(l.live) == 0
		l.mu.Unlock()
		if last {
			l.finish()
		}
	})
	return nil
}

// Shutdown closes the listener and waits until its last connection has ended.
// When ctx ends first it closes those that are left and returns ctx's error.
// The socket is closed when it returns.
func (l *Listener) Shutdown(ctx context.Context) error {
	l.Close()
	select {
	case <-l.gone:
		return nil
	case <-ctx.Done():
	}
	l.mu.Lock()
	var left []*link
	for k := range l.live {
		left = append(left, k)
	}
	l.mu.Unlock()
	var all sync.WaitGroup
	for _, k := range left {
		all.Go(func() { k.close(codeDone, tunnel.Errorf(tunnel.ProxyStopped, "the listener was shut down")) })
	}
	all.Wait()
	<-l.gone
	return ctx.Err()
}
