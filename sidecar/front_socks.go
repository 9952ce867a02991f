package sidecar

import (
	"context"
	"io"
	"log"
	"net"
	"net/netip"
	"strconv"
	"time"

	"github.com/armon/go-socks5"

	"culvert/tunnel"
)

// serveSOCKS serves one connection with a socks5.Server of its own, so that the
// library's callbacks (rule set, dialler, resolver) know their connection.
//
// The library negotiates, authenticates, parses the request, asks the rule set
// and, for CONNECT, dials and replies. Where it falls short, the socksConn that
// it reads from and writes to makes up for it:
//   - its reply code comes from the text of an error: reply puts in ours;
//   - its copy loop turns a reset into an orderly end: it prefers WriteTo, where
//     tunnel.Splice takes over;
//   - it answers UDP ASSOCIATE with "command not supported": the answer is
//     swallowed and the connection goes to associate;
//   - it buffers: it is given one byte at a time, so nothing is left in there.
func (f *Front) serveSOCKS(ctx context.Context, c *frontConn, start time.Time) {
	s := &socksConn{frontConn: c, front: f, ctx: ctx, start: start, done: make(chan struct{})}
	config := &socks5.Config{Rules: s, Resolver: s, Dial: s.dial, Logger: log.New(io.Discard, "", 0)}
	if f.auth != nil {
		config.Credentials = &socksCredentials{f, c}
	}
	server, err := socks5.New(config)
	if err != nil {
		f.log.Error("front: no SOCKS server", "err", err)
		return
	}
	err = server.ServeConn(s)
	switch {
	case s.associate:
		f.associate(c, s.user, s.port)
	case s.stream != nil && !s.spliced:
		s.stream.Abort(err)
	case s.stream == nil:
		c.finish(f.linger)
	}
}

// socksConn is one connection as the library sees it: also the rule set, the
// resolver and the dialler of its request. The library's own goroutine uses it
// alone until both ends of CONNECT are joined.
type socksConn struct {
	*frontConn
	front *Front
	ctx   context.Context
	start time.Time

	greeted   bool
	user      string
	to        tunnel.Target
	asked     string        // BIND: the address, as it is logged
	reply     byte          // replaces the library's reply code when not 0
	associate bool          // UDP ASSOCIATE: swallow the library's reply
	port      uint16        // UDP ASSOCIATE: the client's own port, or 0
	stream    tunnel.Stream // CONNECT: the target
	spliced   bool
	done      chan struct{} // closed when spliced has ended
}

// socksCredentials are the library's name for Auth.
type socksCredentials struct {
	front *Front
	conn  *frontConn
}

func (c *socksCredentials) Valid(user, password string) bool {
	if c.front.auth(user, password) {
		return true
	}
	c.front.wrongPassword(c.conn, user)
	return false
}

// wrongPassword counts and logs a refused login.
func (f *Front) wrongPassword(c *frontConn, user string) {
	f.failed(c, "", tunnel.Errorf(tunnel.NotPermitted, "the user name or the password is wrong; give the app those of this sidecar's configuration"),
		"user", tunnel.LogText(user, logName))
}

// noPassword counts and logs a request that came without one.
func (f *Front) noPassword(c *frontConn) {
	f.failed(c, "", tunnel.Errorf(tunnel.NotPermitted, "the app gave no user name and password; set those of this sidecar's configuration in it"))
}

// Read hands out single bytes: what follows the request stays in our buffer.
func (s *socksConn) Read(p []byte) (int, error) {
	return s.in.Read(p[:min(len(p), 1)])
}

func (s *socksConn) Write(p []byte) (int, error) {
	if !s.greeted {
		// The answer to the greeting: the request may now take its time.
		s.greeted = true
		s.SetDeadline(s.start.Add(s.front.request))
		if len(p) == 2 && p[1] == socksNoMethod {
			if s.front.auth != nil {
				s.front.noPassword(s.frontConn)
			} else {
				s.front.failed(s.frontConn, "", tunnel.Errorf(tunnel.Unsupported, "the app insists on a login, which this proxy does not ask for; set it to none"))
			}
		}
	}
	// What the library refuses by itself, with a whole reply.
	if s.reply == 0 && !s.associate && len(p) > 2 {
		switch p[1] {
		case socksCommandUnsupported: // BIND, or none that RFC 1928 knows
			s.front.failed(s.frontConn, s.asked, tunnel.Errorf(tunnel.Unsupported, "only CONNECT and UDP ASSOCIATE are supported; BIND and other SOCKS commands are not"))
		case socksAddressUnsupported:
			s.front.failed(s.frontConn, "", tunnel.Errorf(tunnel.Unsupported, "the request's address type is none of IPv4, IPv6 and name; use another SOCKS5 client"))
		}
	}
	switch {
	case s.associate:
		return len(p), nil
	case s.reply != 0 && len(p) > 1:
		p = append([]byte(nil), p...)
		p[1] = s.reply
	}
	return s.frontConn.Write(p)
}

// Close is left to serveSOCKS.
func (s *socksConn) Close() error { return nil }

// Resolve leaves names to the far end.
func (s *socksConn) Resolve(ctx context.Context, _ string) (context.Context, net.IP, error) {
	return ctx, nil, nil
}

// Allow is asked when the request has been read.
func (s *socksConn) Allow(ctx context.Context, r *socks5.Request) (context.Context, bool) {
	s.user = r.AuthContext.Payload["Username"]
	s.port = uint16(r.DestAddr.Port)
	s.headRead()
	switch r.Command {
	case socks5.AssociateCommand:
		// The address is the client's idea of its own; with port 0 it has none.
		s.associate = true
	case socks5.ConnectCommand:
		to, err := socksTarget(r.DestAddr)
		if err != nil {
			s.front.failed(s.frontConn, socksAsked(r.DestAddr), err)
			s.reply, _ = frontReply(err)
			return ctx, false
		}
		s.to = to
	default:
		s.asked = socksAsked(r.DestAddr) // BIND: the library refuses it
	}
	return ctx, true
}

// socksAsked is what a client asked for, whether or not it can be a target.
func socksAsked(a *socks5.AddrSpec) string {
	host := a.FQDN
	if host == "" {
		host = a.IP.String()
	}
	return net.JoinHostPort(host, strconv.Itoa(a.Port))
}

func socksTarget(a *socks5.AddrSpec) (tunnel.Target, error) {
	to := tunnel.Target{Port: uint16(a.Port)}
	if addr, ok := netip.AddrFromSlice(a.IP); ok {
		to.Addr = addr
	} else if addr, err := netip.ParseAddr(a.FQDN); err == nil && addr.Zone() == "" {
		to.Addr = addr
	} else if validHost(a.FQDN) {
		to.Host = a.FQDN
	} else {
		return to, tunnel.Errorf(tunnel.ConfigInvalid, "%q is not a host name", a.FQDN)
	}
	if to.Port == 0 {
		return to, tunnel.Errorf(tunnel.ConfigInvalid, "port 0 of %s can not be connected to", to)
	}
	return to, nil
}

func (s *socksConn) dial(context.Context, string, string) (net.Conn, error) {
	stream, err := s.front.open(s.ctx, s.frontConn, s.user, s.to)
	if err != nil {
		s.reply, _ = frontReply(err)
		return nil, err
	}
	s.stream = stream
	return socksTargetConn{stream, s}, nil
}

// WriteTo is what the library's copy from client to target comes to. Its buffer
// is empty by then, so it calls this exactly once, and the other direction's
// WriteTo exactly once.
func (s *socksConn) WriteTo(io.Writer) (int64, error) {
	s.spliced = true
	s.front.splice(s.frontConn, s.to, s.stream)
	close(s.done)
	return 0, nil
}

// CloseWrite has been done by Splice.
func (s *socksConn) CloseWrite() error { return nil }

// socksTargetConn is the target as the library sees it.
type socksTargetConn struct {
	tunnel.Stream
	s *socksConn
}

// LocalAddr becomes BND.ADDR; the library demands this type.
func (t socksTargetConn) LocalAddr() net.Addr {
	if a, ok := t.Stream.LocalAddr().(*net.TCPAddr); ok && a != nil && len(a.IP) != 0 {
		return a
	}
	return &net.TCPAddr{IP: net.IPv4zero}
}

// WriteTo waits for the splice, which carries both directions.
func (t socksTargetConn) WriteTo(io.Writer) (int64, error) {
	<-t.s.done
	return 0, nil
}

// CloseWrite has been done by Splice.
func (t socksTargetConn) CloseWrite() error { return nil }

// Close is left to Splice and serveSOCKS.
func (t socksTargetConn) Close() error { return nil }

// socksReply is a reply of RFC 1928 section 6.
func socksReply(code byte, bind netip.AddrPort) []byte {
	return appendSOCKSAddr([]byte{5, code, 0}, bind)
}
