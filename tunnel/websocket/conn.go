package websocket

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"sync/atomic"

	"github.com/coder/websocket"
	"golang.org/x/time/rate"

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
	flood *pings      // of the peer; nil: it is the one that was dialled
	meter *metered    // the same
}

func newConn(ws *websocket.Conn, below tunnel.Layered, via string) *Conn {
	return &Conn{Conn: websocket.NetConn(context.Background(), ws, websocket.MessageBinary), ws: ws, below: below, via: via}
}

// Read and Write fail as those of other connections do: NetConn ends them by a context.
func (c *Conn) Read(p []byte) (int, error) {
	if c.meter == nil {
		n, err := c.Conn.Read(p)
		return n, c.plain(err)
	}
	c.meter.wanted.Store(int64(len(p))) // may all come before any of it is handed out
	n, err := c.Conn.Read(p)
	c.meter.passed(n)
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
	case c.flood != nil && c.flood.over.Load():
		return errPings
	case c.meter != nil && c.meter.over.Load():
		return errExcess
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

// pingRate and pingBurst are how many pings and pongs (RFC 6455 §5.5.2) a peer may
// send in a second. Ours sends none; a load balancer now and then.
const pingRate, pingBurst = 5, 50

var errPings = tunnel.Errorf(tunnel.LimitExceeded, "the WebSocket's peer sends pings more than %d times a second; nothing of ours does that", pingRate)

// pings counts the signs of life that a peer sends and asks for; one that goes on beyond
// the limit is cut. They are counted by the one goroutine that reads.
type pings struct {
	below io.Closer
	rate  *rate.Limiter
	over  atomic.Bool
}

func newPings(below io.Closer) *pings {
	return &pings{below: below, rate: rate.NewLimiter(pingRate, pingBurst)}
}

// count reports whether one is to be answered.
func (p *pings) count() bool {
	if p.rate.Allow() {
		return true
	}
	if !p.over.Swap(true) {
		p.below.Close() // which ends the Read that we are in
	}
	return false
}

// A peer may send excessRate bytes for each that comes out of the WebSocket, and
// maxExcess beside: a frame of one byte has seven (RFC 6455 §5.2). Beyond that it
// sends what carries nothing, such as empty frames.
const excessRate, maxExcess = 8, 64 << 10

var errExcess = tunnel.Errorf(tunnel.LimitExceeded, "the WebSocket's peer sends frames that carry nothing; nothing of ours does that")

// metered is the connection below, and cut when too much comes by it for nothing.
type metered struct {
	tunnel.Layered
	excess atomic.Int64 // changed by the one goroutine that reads
	wanted atomic.Int64 // by the Read that runs above
	over   atomic.Bool
}

func (m *metered) Read(p []byte) (int, error) {
	n, err := m.Layered.Read(p)
	if m.excess.Add(int64(n)) > maxExcess+m.wanted.Load() {
		m.over.Store(true)
		m.Layered.Close()
		return 0, errExcess
	}
	return n, err
}

// passed counts bytes that came out of the WebSocket.
func (m *metered) passed(n int) {
	if m.excess.Add(-excessRate*int64(n)) < 0 {
		m.excess.Store(0)
	}
}
