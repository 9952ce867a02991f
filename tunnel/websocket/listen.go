package websocket

import (
	"context"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/coder/websocket"

	"culvert/tunnel"
)

// maxHead bounds the head of a request and of an answer, in bytes.
const maxHead = 16 << 10

// ListenConfig is what a Listener needs. The zero value of a field is its default.
type ListenConfig struct {
	// Path is where a WebSocket is opened; DefaultPath.
	Path string
	// Timeout bounds the way to a WebSocket; 5 s.
	Timeout time.Duration
	// Waiting is how many connections may be on that way; more are closed at
	// once. 1000.
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
	waiting atomic.Int64
	ctx     context.Context
	stop    context.CancelFunc
	wg      sync.WaitGroup
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
	l := &Listener{cfg: cfg, ready: make(chan net.Conn), taken: make(chan net.Conn)}
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
		if l.waiting.Add(1) > int64(l.cfg.Waiting) {
			c.Close()
		}
	case http.StateHijacked, http.StateClosed:
		l.waiting.Add(-1)
	}
}

func (l *Listener) upgrade(w http.ResponseWriter, r *http.Request) {
	if r.URL.Path != l.cfg.Path {
		http.NotFound(w, r)
		return
	}
	below := r.Context().Value(belowKey{}).(tunnel.Layered)
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
	c.flood = flood
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
	return tunnel.CountTCP(conn), nil
}
