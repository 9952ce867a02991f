package tunneltls

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"slices"
	"sync"
	"time"

	"culvert/tunnel"
	"culvert/tunnel/crowd"
)

// listener implements tunnel.Listener.
//
//	accept ──► hello ──► slot ──► handshake ──► ready ──► Accept
//	           └────────── HandshakeTimeout in all ──────────┘
//
// A connection takes a slot only once its whole ClientHello is here, and gives it
// back when that is answered, so silent ones keep nobody out.
type listener struct {
	ln    net.Listener
	cfg   Config
	held  *crowd.Crowd  // connections that nobody has accepted yet
	slots chan struct{} // ClientHellos that are being answered
	ready chan *candidate
	ctx   context.Context
	stop  context.CancelFunc
	wg    sync.WaitGroup
}

// Listen serves a TCP listener, which it owns from now on.
func Listen(ln net.Listener, cfg Config) (tunnel.Listener, error) {
	cfg, err := cfg.validated()
	if err != nil {
		return nil, err
	}
	if ln == nil {
		return nil, tunnel.Errorf(tunnel.ConfigInvalid, "tunneltls: the listener is missing")
	}
	l := &listener{
		ln:    ln,
		cfg:   cfg,
		held:  crowd.New(cfg.Unauthenticated),
		slots: make(chan struct{}, cfg.Handshakes),
		ready: make(chan *candidate),
	}
	l.ctx, l.stop = context.WithCancel(context.Background())
	l.wg.Go(l.serve)
	return l, nil
}

func (l *listener) Addr() net.Addr { return l.ln.Addr() }

func (l *listener) Accept(ctx context.Context) (tunnel.Candidate, error) {
	if l.ctx.Err() != nil {
		return nil, net.ErrClosed
	}
	select {
	case c := <-l.ready:
		return c, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	case <-l.ctx.Done():
		return nil, net.ErrClosed
	}
}

func (l *listener) Close() error {
	l.stop()
	err := l.ln.Close()
	l.wg.Wait()
	if errors.Is(err, net.ErrClosed) {
		return nil
	}
	return err
}

func (l *listener) serve() {
	err := tunnel.AcceptConns(l.ctx, l.ln, l.cfg.Log, func(conn net.Conn) {
		place, ok := l.held.Enter(tunnel.AddrPortOf(conn.RemoteAddr()).Addr(), func() { conn.Close() })
		if !ok {
			conn.Close()
			return
		}
		l.wg.Go(func() {
			defer place.Leave()
			l.admit(conn)
		})
	})
	if err != nil {
		l.stop() // somebody else has closed it
	}
}

// admit takes one connection to the point where Accept has returned it.
func (l *listener) admit(conn net.Conn) {
	// A tenth less, so that a silent one is gone by then where much goes on, too.
	ctx, cancel := context.WithTimeout(l.ctx, l.cfg.HandshakeTimeout*9/10)
	defer cancel()
	c, err := l.handshake(ctx, conn)
	if err != nil {
		conn.Close()
		l.cfg.Log.Debug("a TLS handshake failed", "from", conn.RemoteAddr(), "err", err)
		return
	}
	if l.cfg.Other != nil && !slices.Contains(l.cfg.TLS.NextProtos, c.link.ConnectionState().NegotiatedProtocol) {
		l.cfg.Other(other{c.link})
		return
	}
	select {
	case l.ready <- c:
	case <-ctx.Done():
		conn.Close()
	}
}

// other is a connection that is not for this listener's candidates.
type other struct{ *link }

func (o other) TCP() net.Conn { return o.raw }
func (o other) Sent() uint64  { return o.gather.total() }
func (o other) Close() error  { return o.shut() }

var _ tunnel.Layered = other{}

func (l *listener) handshake(ctx context.Context, conn net.Conn) (*candidate, error) {
	raw, g := newGather(conn, l.cfg.WriteTimeout)
	tune(raw)
	broken := context.AfterFunc(ctx, func() { raw.SetDeadline(time.Unix(1, 0)) })
	hello, err := readHello(conn)
	if !broken() || err != nil {
		return nil, errors.Join(ctx.Err(), err)
	}
	select {
	case l.slots <- struct{}{}:
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	turn := &turn{Conn: conn, over: sync.OnceFunc(func() { <-l.slots })}
	defer turn.over()
	rekeys := newRekeyMeter(&replay{Conn: turn, first: hello})
	g.Conn = rekeys
	secured := tls.Server(g, l.cfg.TLS)
	if err := secured.HandshakeContext(ctx); err != nil {
		return nil, err
	}
	return &candidate{link: &link{Conn: secured, raw: raw, gather: g, rekeys: rekeys}, cfg: &l.cfg}, nil
}

// turn is a connection whose slot is over when TLS waits for the peer. What is left
// to compute then is done without one: whoever has come that far is not to wait
// behind those who begin.
type turn struct {
	net.Conn
	over func()
}

func (t *turn) Read(p []byte) (int, error) {
	t.over()
	return t.Conn.Read(p)
}

// readHello reads the first TLS record. What does not begin as a handshake
// record is refused without an answer.
//
//	+----------+--------------+--------------+----------------+
//	| type (8) | version (16) | length (16)  | length bytes   |    RFC 8446 §5.1
//	+----------+--------------+--------------+----------------+
func readHello(r io.Reader) ([]byte, error) {
	const (
		head      = 5
		handshake = 22
		longest   = 1 << 14
	)
	var b bytes.Buffer // grows with what arrives, not with what is declared
	if _, err := io.CopyN(&b, r, head); err != nil {
		return nil, err
	}
	n := int64(binary.BigEndian.Uint16(b.Bytes()[3:]))
	if b.Bytes()[0] != handshake || b.Bytes()[1] != 3 || n > longest {
		return nil, errors.New("it does not begin with a TLS ClientHello")
	}
	_, err := io.CopyN(&b, r, n)
	return b.Bytes(), err
}

// replay gives back what was read from a connection.
type replay struct {
	net.Conn
	first []byte
}

func (r *replay) Read(p []byte) (int, error) {
	if len(r.first) == 0 {
		return r.Conn.Read(p)
	}
	n := copy(p, r.first)
	if r.first = r.first[n:]; len(r.first) == 0 {
		r.first = nil
	}
	return n, nil
}
