package tunneltls

import (
	"net"
	"sync"
	"time"

	"culvert/tunnel"
)

// gather is the TCP connection as TLS writes it. Between hold and release the
// records collect and leave with one system call, since those are
// most of what a bulk transfer costs.
type gather struct {
	net.Conn
	timeout time.Duration  // Config.WriteTimeout
	layered tunnel.Layered // Conn where it is not TCP itself; else nil

	mu   sync.Mutex // the reading side of TLS writes too: alerts, key updates
	held bool
	buf  []byte
	sent uint64 // bytes that TCP was given
}

// newGather returns the TCP connection of conn, and what TLS is to write to.
func newGather(conn net.Conn, timeout time.Duration) (raw net.Conn, g *gather) {
	g = &gather{Conn: conn, timeout: timeout}
	if layered, ok := conn.(tunnel.Layered); ok {
		g.layered = layered
		return layered.TCP(), g
	}
	return conn, g
}

func (g *gather) Write(p []byte) (int, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.held {
		g.buf = append(g.buf, p...)
		return len(p), nil
	}
	n, err := g.Conn.Write(p)
	g.sent += uint64(n)
	return n, err
}

func (g *gather) hold() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.held = true
}

func (g *gather) release() error {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.held = false
	n, err := g.Conn.Write(g.buf)
	g.sent += uint64(n)
	g.buf = g.buf[:0]
	return err
}

// total is how many bytes TCP was given since the connection began.
func (g *gather) total() uint64 {
	if g.layered != nil {
		return g.layered.Sent()
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.sent
}

// expect gives what is written next its time to leave.
func (g *gather) expect() { g.Conn.SetWriteDeadline(time.Now().Add(g.timeout)) }
