package tunnelquic

import (
	"context"
	"crypto/ed25519"
	"net"
	"net/netip"
	"sync"
	"time"

	"github.com/quic-go/quic-go"

	"culvert/tunnel"
)

// A link is a QUIC connection after its handshake, as candidate and carrier
// share it.
type link struct {
	conn   *quic.Conn
	sock   *socket
	flow   *flow
	server bool
	maxAge time.Duration
	peer   ed25519.PublicKey
	gone   chan struct{} // closed when the connection has ended and release has returned
	idle   *idleMeter

	mu  sync.Mutex
	why error // given to close; nil: it was not us
}

// newLink takes over conn. release is called once when the connection has
// ended, for whatever reason.
func newLink(conn *quic.Conn, sock *socket, server bool, maxAge time.Duration, release func(*link)) *link {
	l := &link{conn: conn, sock: sock, server: server, maxAge: maxAge, gone: make(chan struct{}), idle: newIdleMeter(time.Now())}
	if certs := conn.ConnectionState().TLS.PeerCertificates; len(certs) > 0 {
		l.peer, _ = certs[0].PublicKey.(ed25519.PublicKey)
	}
	l.flow = newFlow(l)
	context.AfterFunc(conn.Context(), func() {
		l.flow.end()
		release(l)
		close(l.gone)
	})
	return l
}

func (l *link) PeerKey() ed25519.PublicKey { return l.peer }
func (l *link) Kind() string               { return "quic" }
func (l *link) RemoteAddr() netip.AddrPort { return tunnel.AddrPortOf(l.conn.RemoteAddr()) }

func (l *link) ExportKey(label string, context []byte, n int) ([]byte, error) {
	tls := l.conn.ConnectionState().TLS
	return tls.ExportKeyingMaterial(label, context, n)
}

// reason says why the connection has ended; nil: it has not.
func (l *link) reason() error {
	select {
	case <-l.conn.Context().Done():
	default:
		return nil
	}
	return l.because(context.Cause(l.conn.Context()))
}

// because puts the error that ended the connection into words. Streams get
// that error a little before the connection's context ends.
func (l *link) because(err error) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.why != nil {
		return l.why
	}
	return endError(err, l.RemoteAddr().String())
}

// close ends the connection, tells the peer the code and, where there is a
// reason, its first words, and waits until the connection is gone.
func (l *link) close(code quic.ApplicationErrorCode, why error) {
	phrase := ""
	if why != nil {
		phrase = why.Error()
		phrase = phrase[:min(len(phrase), 300)] // it must fit a packet
	} else {
		why = net.ErrClosed
	}
	l.mu.Lock()
	if l.why == nil && l.conn.Context().Err() == nil {
		l.why = why
	}
	l.mu.Unlock()
	l.conn.CloseWithError(code, phrase)
	<-l.gone
}
