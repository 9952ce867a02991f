package httpproxy

import (
	"net"

	"culvert/tunnel"
)

// Conn is a connection through a proxy.
type Conn struct {
	net.Conn // below, or TLS on it
	below    tunnel.Layered
	via      string
	first    []byte // what came behind the proxy's answer
}

// Read gives what came behind the proxy's answer first.
func (c *Conn) Read(p []byte) (int, error) {
	if len(c.first) > 0 {
		n := copy(p, c.first)
		c.first = c.first[n:]
		return n, nil
	}
	return c.Conn.Read(p)
}

// Via names the proxy, for people.
func (c *Conn) Via() string { return c.via }

// TCP is the connection to the proxy, whatever is spoken on it.
func (c *Conn) TCP() net.Conn { return c.below.TCP() }

// Sent is how many bytes TCP was given since it was made.
func (c *Conn) Sent() uint64 { return c.below.Sent() }
