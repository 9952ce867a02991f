package websocket

import (
	"context"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"time"

	"github.com/coder/websocket"

	"culvert/tunnel"
	"culvert/tunnel/crowd"
)

// maxHead bounds the head of a request and of an answer, in bytes.
const maxHead = 16 << 10

// ListenConfig is what a Listener needs. The zero value of a field is its default.
type ListenConfig struct {
	// Path is where a WebSocket is opened; DefaultPath.
	Path string
	// Timeout bounds the way to a WebSocket; 5 s.
	Timeout time.Duration
	// Waiting is how many connections may be on that way; 1000. A further one is
	// closed at once, or the oldest of the source that has the most where that is another.
	Waiting int
	// Log takes what happens below; nil discards it.
	Log *slog.Logger
}

// Listener is a net.Listener of byte streams inside WebSockets.
//
//	Serve: accept ──┐
//	                ├─► HTTP request ──► upgrade ──► Accept
//	Take ───────────┘   └────── Timeout ──────┘
type Listener struct {
	cfg     ListenConfig
	server  *http.Server
	ready   chan net.Conn
	taken   chan net.Conn
	waiting *crowd.Crowd
	ctx     context.Context
	stop    context.CancelFunc
	wg      sync.WaitGroup

	mu     sync.Mutex                // guards places
	places map[net.Conn]*crowd.Place // of those that wait
}

// NewListener returns a listener to which nothing is connected yet.
func NewListener(cfg ListenConfig) (*Listener, error) {
	if cfg.Path == "" {
		cfg.Path = DefaultPath
	}
	if !strings.HasPrefix(cfg.Path, "/") {
		return nil, tunnel.Errorf(tunnel.ConfigInvalid, "websocket.path: %.60q does not begin with /", cfg.Path)
	}
	if cfg.Timeout == 0 {
		cfg.Timeout = 5 * time.Second
	}
	if cfg.Waiting == 0 {
		cfg.Waiting = 1000
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	l := &Listener{cfg: cfg, ready: make(chan net.Conn), taken: make(chan net.Conn), waiting: crowd.New(cfg.Waiting), places: map[net.Conn]*crowd.Place{}}
	l.ctx, l.stop = context.WithCancel(context.Background())
	l.server = &http.Server{
		Handler:           http.HandlerFunc(l.upgrade),
		ReadHeaderTimeout: cfg.Timeout,
		ReadTimeout:       cfg.Timeout, // hijacking ends it
		WriteTimeout:      cfg.Timeout,
		IdleTimeout:       cfg.Timeout,
		MaxHeaderBytes:    maxHead,
		ErrorLog:          slog.NewLogLogger(cfg.Log.Handler(), slog.LevelDebug),
		ConnContext:       func(ctx context.Context, c net.Conn) context.Context { return context.WithValue(ctx, belowKey{}, c) },
		ConnState:         l.count,

		DisableGeneralOptionsHandler: true, // upgrade answers all, and ends the connection
	}
	l.Serve(inlet{l})
	return l, nil
}

// belowKey is under which a request's context has its connection.
type belowKey struct{}

// Serve serves HTTP on what ln accepts, until Close. It owns ln and does not wait.
func (l *Listener) Serve(ln net.Listener) {
	l.wg.Go(func() {
		// Where ln is closed or broken for good; what passes the server tries again.
		if err := l.server.Serve(counting{ln}); l.ctx.Err() == nil {
			l.cfg.Log.Error("no more WebSockets are accepted", "address", ln.Addr(), "err", err)
		}
	})
}

// Take serves HTTP on one connection. It waits until the server has it.
func (l *Listener) Take(c net.Conn) {
	select {
	case l.taken <- c:
	case <-l.ctx.Done():
		c.Close()
	}
}

// count bounds the connections that are no WebSocket yet.
func (l *Listener) count(c net.Conn, s http.ConnState) {
	switch s {
	case http.StateNew:
		var from netip.Addr
		if a, ok := c.RemoteAddr().(*net.TCPAddr); ok {
			from = a.AddrPort().Addr()
		}
		place, ok := l.waiting.Enter(from, func() { l.wg.Go(func() { c.Close() }) })
		if !ok {
			c.Close()
			return
		}
		l.mu.Lock()
		l.places[c] = place
		l.mu.Unlock()
	case http.StateHijacked, http.StateClosed:
		l.mu.Lock()
		place := l.places[c]
		delete(l.places, c)
		l.mu.Unlock()
		if place != nil {
			place.Leave()
		}
	}
}

func (l *Listener) upgrade(w http.ResponseWriter, r *http.Request) {
	w = lastAnswer{w}
	if r.URL.Path != l.cfg.Path {
		http.NotFound(w, r)
		return
	}
	below := r.Context().Value(belowKey{}).(*metered)
	flood := newPings(below)
	ws, err := websocket.Accept(w, r, &websocket.AcceptOptions{ // which answers what is not a WebSocket, and other sites' pages
		OnPingReceived: func(context.Context, []byte) bool { return flood.count() },
		OnPongReceived: func(context.Context, []byte) { flood.count() },
	})
	if err != nil {
		l.cfg.Log.Debug("no WebSocket", "from", r.RemoteAddr, "err", err)
		return
	}
	c := newConn(ws, below, "")
	c.flood, c.meter = flood, below
	below.excess.Store(0)
	late := time.NewTimer(l.cfg.Timeout)
	defer late.Stop()
	select {
	case l.ready <- c:
	case <-late.C:
		c.Close()
	case <-l.ctx.Done():
		c.Close()
	}
}

// lastAnswer ends the connection with the answer, unless it becomes a WebSocket.
type lastAnswer struct{ http.ResponseWriter }

func (a lastAnswer) WriteHeader(status int) {
	if status != http.StatusSwitchingProtocols {
		a.Header().Set("Connection", "close")
	}
	a.ResponseWriter.WriteHeader(status)
}

// Unwrap is for http.ResponseController.
func (a lastAnswer) Unwrap() http.ResponseWriter { return a.ResponseWriter }

// Accept waits for the next connection.
func (l *Listener) Accept() (net.Conn, error) {
	select {
	case c := <-l.ready:
		return c, nil
	case <-l.ctx.Done():
		return nil, net.ErrClosed
	}
}

// Close ends the listener and whatever has not been accepted.
func (l *Listener) Close() error {
	l.stop()
	err := l.server.Close()
	l.wg.Wait()
	return err
}

// Addr is of no use: connections come from several listeners.
func (l *Listener) Addr() net.Addr { return &net.TCPAddr{} }

// inlet is the listener of what Take is given.
type inlet struct{ l *Listener }

func (i inlet) Accept() (net.Conn, error) {
	select {
	case c := <-i.l.taken:
		return c, nil
	case <-i.l.ctx.Done():
		return nil, net.ErrClosed
	}
}

func (i inlet) Close() error   { return nil }
func (i inlet) Addr() net.Addr { return i.l.Addr() }

// counting makes connections know the TCP connection below.
type counting struct{ net.Listener }

func (c counting) Accept() (net.Conn, error) {
	conn, err := c.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return &metered{Layered: tunnel.CountTCP(conn)}, nil
}
