//go:build linux && (amd64 || arm64 || arm || riscv64)

package capture

import (
	"context"
	"net"
	"net/netip"

	"culvert/tunnel"
)

// A stream is one captured connection.
type stream struct {
	*net.TCPConn
	app, to netip.AddrPort
}

// Abort resets the connection.
func (s *stream) Abort(error) {
	s.SetLinger(0)
	s.Close()
}

// take serves a connection, unless it is refused.
func (c *Capture) take(ctx context.Context, conn net.Conn) {
	s := &stream{TCPConn: conn.(*net.TCPConn), app: tunnel.AddrPortOf(conn.RemoteAddr()), to: tunnel.AddrPortOf(conn.LocalAddr())}
	if err := c.admit(s); err != nil {
		c.failed("TCP", s.app, s.to, err) // first: who is told finds it counted
		s.Abort(err)
		return
	}
	go c.serve(ctx, s)
}

// admit counts a connection in.
func (c *Capture) admit(s *stream) error {
	if c.sockets.mine(s.to) {
		return tunnel.Errorf(tunnel.NotPermitted, "the connection was made to the port for captured traffic itself; apps need no proxy setting when they are captured, and use the front's port when they have one")
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case c.closed:
		return tunnel.ProxyStopped
	case len(c.streams) >= c.cfg.MaxStreams:
		return tunnel.Errorf(tunnel.LimitExceeded, "%d captured connections are open, which is the limit", len(c.streams))
	}
	c.streams[s] = struct{}{}
	c.connections++
	c.wg.Add(1)
	return nil
}

// serve joins a connection to where it wants to go.
func (c *Capture) serve(ctx context.Context, s *stream) {
	defer c.wg.Done()
	defer func() {
		c.mu.Lock()
		delete(c.streams, s)
		c.mu.Unlock()
		s.Close()
	}()
	target := tunnel.TargetOf(s.to)
	if s.to.Port() == dnsPort && c.cfg.DNS.IsValid() {
		target = tunnel.TargetOf(c.cfg.DNS)
	}
	far, err := c.cfg.Next.OpenStream(ctx, tunnel.Peer{Addr: s.app}, target)
	if err != nil {
		if ctx.Err() == nil {
			c.failed("TCP", s.app, s.to, err)
		}
		s.Abort(err)
		return
	}
	if err := tunnel.Splice(s, far); err != nil {
		c.log.Debug("capture: stream broke", "from", s.app, "to", s.to, "err", err)
	}
}
