package tunnel

import (
	"net"
	"sync/atomic"
)

// A Layered connection is not TCP itself but runs on it, in a WebSocket, say. What
// the kernel tells of TCP is of use only beside how much it was given.
type Layered interface {
	net.Conn
	TCP() net.Conn // the TCP connection below
	Sent() uint64  // how many bytes that was given since it was made
}

// CountTCP makes the lowest layer of a TCP connection, which counts what it is
// given from now on. A connection that is Layered already is returned as it is.
func CountTCP(c net.Conn) Layered {
	if l, ok := c.(Layered); ok {
		return l
	}
	return &countedTCP{Conn: c}
}

type countedTCP struct {
	net.Conn
	sent atomic.Uint64
}

func (c *countedTCP) Write(p []byte) (int, error) {
	n, err := c.Conn.Write(p)
	c.sent.Add(uint64(n))
	return n, err
}

func (c *countedTCP) TCP() net.Conn { return c.Conn }
func (c *countedTCP) Sent() uint64  { return c.sent.Load() }
