//go:build linux && (amd64 || arm64 || arm || riscv64)

package capture

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"time"

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

// accept serves connections until ctx ends.
func (c *Capture) accept(ctx context.Context, l *net.TCPListener) error {
	backoff := time.Duration(0)
	for {
		conn, err := l.AcceptTCP()
		switch {
		case ctx.Err() != nil:
			if err == nil {
				conn.Close()
			}
			return nil
		case errors.Is(err, net.ErrClosed):
			return tunnel.Errorf(tunnel.Internal, "the socket for captured connections was closed under it: %w", err)
		case err != nil: // EMFILE and the like: those who are connected can still leave
			backoff = min(max(2*backoff, 5*time.Millisecond), time.Second)
			c.log.Error("capture: can not accept", "err", err, "retry", backoff)
			select {
			case <-ctx.Done():
			case <-time.After(backoff):
			}
			continue
		}
		backoff = 0
		s := &stream{TCPConn: conn, app: addrPort(conn.RemoteAddr()), to: addrPort(conn.LocalAddr())}
		if err := c.admit(s); err != nil {
			s.Abort(err)
			c.failed("TCP", s.app, s.to, err)
			continue
		}
		go c.serve(ctx, s)
	}
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
		s.Abort(err)
		if ctx.Err() == nil {
			c.failed("TCP", s.app, s.to, err)
		}
		return
	}
	if err := tunnel.Splice(s, far); err != nil {
		c.log.Debug("capture: stream broke", "from", s.app, "to", s.to, "err", err)
	}
}

func addrPort(a net.Addr) netip.AddrPort {
	t, ok := a.(*net.TCPAddr)
	if !ok {
		return netip.AddrPort{}
	}
	ap := t.AddrPort()
	return netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port())
}
