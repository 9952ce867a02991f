package websocket

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"sync/atomic"

	"github.com/coder/websocket"

	"culvert/tunnel"
)

// Conn is the byte stream inside a WebSocket. A deadline that ends a Read or a
// Write ends the connection.
type Conn struct {
	net.Conn
	ws    *websocket.Conn
	below tunnel.Layered
	via   string
	over  atomic.Bool // Close was called
}

func newConn(ws *websocket.Conn, below tunnel.Layered, via string) *Conn {
	return &Conn{Conn: websocket.NetConn(context.Background(), ws, websocket.MessageBinary), ws: ws, below: below, via: via}
}

// Read and Write fail as those of other connections do: NetConn ends them by a context.
func (c *Conn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	return n, c.plain(err)
}

func (c *Conn) Write(p []byte) (int, error) {
	n, err := c.Conn.Write(p)
	return n, c.plain(err)
}

func (c *Conn) plain(err error) error {
	switch {
	case err == nil || err == io.EOF:
		return err
	case c.over.Load():
		return net.ErrClosed
	case errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		return os.ErrDeadlineExceeded
	}
	return err
}

// LocalAddr and RemoteAddr are those of TCP.
func (c *Conn) LocalAddr() net.Addr  { return c.below.LocalAddr() }
func (c *Conn) RemoteAddr() net.Addr { return c.below.RemoteAddr() }

// TCP is the TCP connection below.
func (c *Conn) TCP() net.Conn { return c.below.TCP() }

// Sent is how many bytes TCP was given since it was made.
func (c *Conn) Sent() uint64 { return c.below.Sent() }

// Via says what the connection goes through, for people.
func (c *Conn) Via() string { return c.via }

// Close ends the connection at once. What runs inside has said farewell itself,
// so the closing handshake (RFC 6455 §7.1.2), for which one has to wait, is left out.
func (c *Conn) Close() error {
	c.over.Store(true)
	err := c.ws.CloseNow()
	c.Conn.Close() // its timers
	return err
}
