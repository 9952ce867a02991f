package assemble

import (
	"cmp"
	"context"
	"crypto/hkdf"
	"crypto/sha256"
	"crypto/tls"
	"errors"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"culvert/cloudproxy"
	"culvert/cloudproxy/echo"
	"culvert/cloudproxy/egress"
	"culvert/cloudproxy/identity"
	"culvert/cmd/internal/config"
	"culvert/policy"
	"culvert/tunnel"
	"culvert/tunnel/session"
	"culvert/tunnel/tunnelquic"
	"culvert/tunnel/tunneltls"
	"culvert/tunnel/uplink"
	"culvert/tunnel/websocket"
	"culvert/tunnel/wire"
)

// CloudProxyParts is what a cloud proxy is made of, with every file read.
type CloudProxyParts struct {
	Listen      string // ADDRESS:PORT; port 0 is any that is free for UDP and TCP
	Address     string // HOST:PORT; empty: where it listens
	Region      string
	Proxies     []tunnel.ProxyAddr // told to sidecars, in order; empty: this one alone
	Certificate tls.Certificate
	ResetKey    []byte // a secret; nil: none
	ALPN        []string
	WebSocket   config.WebSocket
	Rules
	Egress  egress.Config
	Limits  session.Limits
	Rate    int // bytes per second of each session, each way; 0: unbounded
	Memory  int // bytes that the streams of all sessions keep; 0: the default
	MaxWait time.Duration
	Drain   time.Duration
	Log     *slog.Logger
}

// CloudProxy is a cloud proxy that holds its ports and can be run.
type CloudProxy struct {
	Addr    netip.AddrPort // where it listens, UDP and TCP
	quic    *tunnelquic.Listener
	egress  *egress.Egress
	resolve *egress.Resolve
	server  *cloudproxy.Server
	log     *slog.Logger

	admission *identity.Admission
	guard     *policy.Guard
	rules     atomic.Pointer[Rules]
	ask       chan struct{}      // capacity 1: the configuration is to be read again
	conf      *config.CloudProxy // with flags over it; nil: there is no file
	seen      map[string]os.FileInfo
}

const (
	// defaultStreams is that of session.Limits.Streams and of sidecar.FrontConfig.MaxConns.
	defaultStreams = 4096
	// allUnread is that of tunneltls.Config: memory for what peers have sent and nobody reads.
	allUnread = 512 << 20
	// controlStreams are for what a carrier carries besides a session's streams.
	controlStreams = 16
)

// CloudProxyFrom reads what the configuration names and makes the cloud proxy.
func CloudProxyFrom(c *config.CloudProxy, log *slog.Logger) (*CloudProxy, error) {
	cert, err := LoadCertificate(c.Certificate.CertFile, c.Certificate.KeyFile)
	if err != nil {
		return nil, err
	}
	seen := stamps(cloudFiles(c))
	rules, err := RulesFrom(c)
	if err != nil {
		return nil, err
	}
	out, err := egressConfig(&c.Egress)
	if err != nil {
		return nil, err
	}
	p := CloudProxyParts{
		Listen: c.Listen, Address: c.Address, Region: c.Region, Certificate: cert, ALPN: c.ALPN, WebSocket: c.WebSocket, Rules: rules,
		Egress:  out,
		Limits:  session.Limits{Associations: c.Limits.Associations, Streams: c.Limits.Streams, OpensPerSecond: c.Limits.OpensPerSecond, StreamMemory: c.Limits.StreamMemory << 20},
		Rate:    c.Limits.BytesPerSecond,
		Memory:  c.Limits.TotalStreamMemory << 20,
		MaxWait: time.Duration(c.Media.MaxWait), Drain: time.Duration(c.Drain), Log: log,
	}
	for _, other := range c.Proxies {
		p.Proxies = append(p.Proxies, tunnel.ProxyAddr{Address: other.Address, Region: other.Region})
	}
	if c.ResetKey != "" {
		if p.ResetKey, err = os.ReadFile(c.ResetKey); err != nil {
			return nil, tunnel.Errorf(tunnel.ConfigInvalid, "reset_key_file: %s can not be read: %w", c.ResetKey, errors.Unwrap(err))
		}
		if len(p.ResetKey) < 32 {
			return nil, tunnel.Errorf(tunnel.ConfigInvalid, "reset_key_file: %s holds %d bytes, 32 are needed; 'culvert-cloudproxy init' makes one", c.ResetKey, len(p.ResetKey))
		}
	}
	made, err := NewCloudProxy(p)
	if err == nil && c.File() != "" {
		made.conf, made.seen = c, seen
	}
	return made, err
}

func egressConfig(c *config.Egress) (egress.Config, error) {
	v4, v6, err := c.Addrs()
	if err != nil {
		return egress.Config{}, err
	}
	public, err := c.PublicAddrs()
	return egress.Config{Local4: v4, Local6: v6, Public: public, Idle: time.Duration(c.Idle), MaxAssociations: c.Associations, MaxStreams: c.Streams}, err
}

// NewCloudProxy makes the cloud proxy:
//
//	listeners ──► server ──► session ──► echo ──► resolve ──► guard ──► egress
func NewCloudProxy(p CloudProxyParts) (*CloudProxy, error) {
	if len(p.ALPN) == 0 {
		p.ALPN = []string{uplink.DefaultALPN}
	}
	if p.Log == nil {
		p.Log = slog.New(slog.DiscardHandler)
	}
	tlsConf, err := cloudproxy.ServerTLS(p.Certificate, p.ALPN)
	if err != nil {
		return nil, err
	}
	tcp, udp, err := listenBoth(p.Listen)
	if err != nil {
		return nil, err
	}
	// A session meets its own limit first, and that has a sentence. QUIC counts
	// streams until both ends have confirmed their end, and makes further ones wait.
	streams := cmp.Or(p.Limits.Streams, defaultStreams)
	quicConf := tunnelquic.Config{TLS: tlsConf, Limits: tunnelquic.Limits{Streams: 2*streams + controlStreams}, MaxAge: p.MaxWait, Log: p.Log}
	if p.ResetKey != nil {
		if quicConf.StatelessResetKey, err = resetKey(p.ResetKey, p.Address); err == nil {
			quicConf.TokenGeneratorKey, err = derive(p.ResetKey, "culvert address validation")
		}
		if err != nil {
			return nil, errors.Join(err, tcp.Close(), udp.Close())
		}
	}
	ql, err := tunnelquic.Listen(udp, quicConf)
	if err != nil {
		return nil, errors.Join(err, tcp.Close(), udp.Close())
	}
	listeners, err := listenTLS(tcp, &p, tunneltls.Config{TLS: tlsConf, Log: p.Log, MaxStreams: streams + controlStreams, MaxAge: p.MaxWait})
	if err != nil {
		return nil, errors.Join(err, tcp.Close(), ql.Close())
	}
	listeners = append(listeners, ql)
	shut := func(err error) error {
		for _, l := range listeners {
			err = errors.Join(err, l.Close())
		}
		return err
	}
	c := &CloudProxy{Addr: tcp.Addr().(*net.TCPAddr).AddrPort(), quic: ql, log: p.Log, ask: make(chan struct{}, 1)}
	c.rules.Store(&p.Rules)
	if p.Address == "" {
		p.Address = c.Addr.String()
	}
	p.Egress.MaxAge = maxAge(p.MaxWait)
	if c.egress, err = egress.New(p.Egress); err != nil {
		return nil, shut(err)
	}
	if c.admission, err = identity.NewAdmission(p.Rules.admission()); err != nil {
		return nil, errors.Join(shut(err), c.egress.Close())
	}
	c.guard = policy.NewGuard(c.egress, func(by tunnel.Peer) *policy.Policy { return c.rules.Load().of(by) })
	c.guard.Own = func(proto policy.Proto, to tunnel.Target) bool {
		return c.egress.OnHost(to.Addr) && (proto != policy.UDP || !c.egress.Joins(to.AddrPort()))
	}
	c.guard.Denied = newDenials(p.Log).denied
	c.resolve = egress.NewResolve(c.guard, egress.ResolveConfig{})
	c.server, err = cloudproxy.New(cloudproxy.Config{
		Listeners: listeners,
		Authorize: func(ctx context.Context, o tunnel.Open) (cloudproxy.Grant, error) {
			p, err := c.admission.Admit(ctx, o)
			if err != nil {
				return cloudproxy.Grant{}, err
			}
			app := c.rules.Load().Apps[o.App]
			renew := func(token string) error { _, err := p.Renew(token); return err }
			return cloudproxy.Grant{Next: echo.New(c.resolve, c.echoAllowed(o.App)), Limits: app.Limits, Rate: app.Rate, Release: p.Release, Key: identity.Thumbprint(o.Key), Token: p.Claims().ID, Renew: renew, Check: p.Check}, nil
		},
		Limits: p.Limits, Rate: p.Rate, Memory: p.Memory, Address: p.Address, Region: p.Region, Proxies: p.Proxies, Lanes: tunneltls.Lanes(), Age: p.MaxWait, Drain: p.Drain, Log: p.Log,
	})
	if err != nil {
		return nil, errors.Join(shut(err), c.egress.Close())
	}
	return c, nil
}

// listenTLS listens for what comes by TCP:
//
//	tcp ──► TLS ─┬─ the tunnel's ─────────────────────────► candidates
//	             └─ HTTP's ──► WebSocket ──► TLS, inside ──► candidates
//	plain HTTP ──────────────►
func listenTLS(tcp net.Listener, p *CloudProxyParts, conf tunneltls.Config) ([]tunnel.Listener, error) {
	if p.WebSocket.Path == "" {
		l, err := tunneltls.Listen(tcp, conf)
		return []tunnel.Listener{l}, err
	}
	web, err := websocket.NewListener(websocket.ListenConfig{Path: p.WebSocket.Path, Log: p.Log})
	if err != nil {
		return nil, err
	}
	if at := p.WebSocket.Listen; at != "" {
		plain, err := net.Listen("tcp", at)
		if err != nil {
			web.Close()
			return nil, cannotListen("TCP", at, err)
		}
		web.Serve(plain)
	}
	conf.AllUnread = allUnread / 2 // of each of the two
	inside, err := tunneltls.Listen(web, conf)
	if err != nil {
		web.Close()
		return nil, err
	}
	conf.TLS, conf.Other = cloudproxy.WithWeb(conf.TLS), web.Take
	outside, err := tunneltls.Listen(tcp, conf)
	if err != nil {
		inside.Close()
		return nil, err
	}
	return []tunnel.Listener{outside, inside}, nil
}

// echoAllowed says whether the policy of an App ID lets the cloud proxy echo:
// unless a rule denies it by its name, since to send back what came reaches
// nobody.
func (c *CloudProxy) echoAllowed(app string) func() error {
	return func() error {
		if d := c.rules.Load().of(tunnel.Peer{App: app}).Decide(policy.UDP, wire.Echo); d.Rule != nil && !d.Allow {
			return policy.Denied(policy.UDP, wire.Echo, d)
		}
		return nil
	}
}

// Run serves until ctx ends and lets live calls finish, as cloudproxy.Server
// does.
func (c *CloudProxy) Run(ctx context.Context) error {
	ended, end := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() { logFigures(ended, c.figures, c.log) })
	if c.conf != nil {
		wg.Go(func() { c.follow(ended, c.conf) })
	}
	defer wg.Wait()
	defer end()
	err := c.server.Run(ctx)
	quick, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	c.quic.Shutdown(quick) // the sidecars are told before the socket goes
	return errors.Join(err, c.egress.Close())
}

// Close gives up a cloud proxy that was never run.
func (c *CloudProxy) Close() {
	ended, cancel := context.WithCancel(context.Background())
	cancel()
	c.Run(ended)
}

// Sessions is the number of sidecars that are connected.
func (c *CloudProxy) Sessions() int { return c.server.Sessions() }

// listenBoth listens on the same port for TCP and UDP.
func listenBoth(address string) (*net.TCPListener, *net.UDPConn, error) {
	for tries := 0; ; tries++ {
		l, err := net.Listen("tcp", address)
		if err != nil {
			return nil, nil, cannotListen("TCP", address, err)
		}
		tcp := l.(*net.TCPListener)
		at := tcp.Addr().(*net.TCPAddr)
		// The wildcard must stay one: it serves IPv4 and IPv6 for UDP as well.
		host, _, _ := net.SplitHostPort(address)
		udp, err := listenUDP(host, at.Port)
		if err == nil {
			return tcp, udp, nil
		}
		tcp.Close()
		if _, port, _ := net.SplitHostPort(address); port != "0" || tries == 10 {
			return nil, nil, cannotListen("UDP", address, err)
		}
	}
}

func listenUDP(host string, port int) (*net.UDPConn, error) {
	a, err := net.ResolveUDPAddr("udp", net.JoinHostPort(host, "0"))
	if err != nil {
		return nil, err
	}
	a.Port = port
	return net.ListenUDP("udp", a)
}

func cannotListen(what, address string, err error) error {
	why := err
	var op *net.OpError
	if errors.As(err, &op) {
		why = op.Err
	}
	code := tunnel.ConfigInvalid
	if tunnel.CodeOf(err) == tunnel.NotPermitted {
		code = tunnel.NotPermitted
	}
	return tunnel.Errorf(code, "can not listen on %s %s: %w; choose another address, end what uses it, or allow this one", what, address, why)
}

// resetKey makes the key of stateless resets. Two cloud proxies with one
// ResetKey would else answer for each other's connections, and so tell the
// tokens that end them (RFC 9000 §21.11).
func resetKey(secret []byte, address string) (*[32]byte, error) {
	return derive(secret, "culvert stateless reset "+address)
}

func derive(secret []byte, label string) (*[32]byte, error) {
	k, err := hkdf.Expand(sha256.New, secret, label, 32)
	return (*[32]byte)(k), err
}
