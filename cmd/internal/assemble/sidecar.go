package assemble

import (
	"cmp"
	"context"
	"crypto/ed25519"
	"crypto/x509"
	"errors"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"culvert/cloudproxy/egress"
	"culvert/cmd/internal/config"
	"culvert/policy"
	"culvert/sidecar"
	"culvert/sidecar/capture"
	"culvert/sidecar/capture/rules"
	"culvert/sidecar/channel"
	"culvert/tunnel"
	"culvert/tunnel/media"
	"culvert/tunnel/tunnelquic"
	"culvert/tunnel/tunneltls"
	"culvert/tunnel/uplink"
	"culvert/tunnel/wire"
)

// startTimeout is when a start that has not come up counts as failed for now;
// the link goes on. Name lookups, handshakes, openings and further cloud proxies
// can take longer together.
const startTimeout = 12 * time.Second

// Sidecar is a sidecar whose front listens and that can be run.
type Sidecar struct {
	Switch   *sidecar.Switch
	Front    *sidecar.Front
	Watcher  *channel.Watcher
	Capture  *capture.Capture // nil: nothing is captured
	Link     tunnel.Link
	policy   atomic.Pointer[policy.Policy]
	guards   []*policy.Guard
	ask      chan struct{}          // capacity 1: the configuration is to be read again
	renewed  chan struct{}          // capacity 1: the token may be another
	conf     *config.Sidecar        // with flags over it
	seen     map[string]os.FileInfo // of the files that are followed
	changes  *changes
	log      *slog.Logger
	setLive  func(bool) // tells the link whether a channel is live
	listener net.Listener
	egress   *egress.Egress // for direct mode; else nil
	rules    *rules.Rules   // those that the configuration asks for; nil: none
}

// NewSidecar makes a sidecar:
//
//	front ────┬► watch ──► switch ──► guard ──► uplink (session, carriers)
//	capture ──┘               └─ stopped, when_stopped: direct ──► resolve ──► guard ──► egress
func NewSidecar(c *config.Sidecar, log *slog.Logger) (s *Sidecar, err error) {
	s = &Sidecar{changes: newChanges(), conf: c, seen: stamps([]string{c.File(), c.Identity.TokenFile}), ask: make(chan struct{}, 1), renewed: make(chan struct{}, 1), log: log}
	made := s // a return with an error has set s to nil
	defer func() {
		if err != nil {
			made.Close()
		}
	}()
	key, err := sidecarKey(c.Identity.KeyFile)
	if err != nil {
		return nil, err
	}
	link, err := newUplink(c, key, s.changes.told, s.renewed, log)
	if err != nil {
		return nil, err
	}
	s.Link, s.setLive = link, link.SetLive
	own, err := OwnPolicy(c.Policy)
	if err != nil {
		return nil, err
	}
	s.policy.Store(own)
	through := s.guard(link)
	var direct tunnel.Opener
	if c.WhenStopped == "direct" {
		own := protect(c.Capture)
		if s.egress, err = egress.New(egress.Config{Control: own.control}); err != nil {
			return nil, err
		}
		// What the tunnel would refuse is refused here as well. Without a
		// policy of its own the app may go wherever it could without Culvert.
		direct = egress.NewResolve(s.guard(s.egress), egress.ResolveConfig{Resolver: own.resolver})
	}
	// The watcher tells the switch, which does not exist yet.
	s.Watcher = channel.New(channel.Config{
		MediaRule: func(t channel.Target) bool {
			return s.policy.Load().Decide(policy.UDP, tunnel.Target(t)).Tag == policy.TagMedia
		},
		Changed: func(e channel.Event) { s.Switch.ChannelEvent(e) },
		Alive:   alive,
	})
	s.Switch, err = sidecar.NewSwitch(sidecar.SwitchConfig{
		Link: link, Through: through, Direct: direct,
		Channels: func() []channel.Channel { return s.Watcher.Channels(time.Now()) },
		Reconnecting: func(lost bool) {
			if lost {
				s.Watcher.Pause(time.Now())
			} else {
				s.Watcher.Resume(time.Now())
			}
		},
		Mode: tunnel.Mode(c.Mode), StartTimeout: startTimeout, Log: log,
	})
	if err != nil {
		return nil, err
	}
	if s.listener, err = net.Listen("tcp", c.Front.Listen); err != nil {
		return nil, cannotListen("TCP", c.Front.Listen, err)
	}
	front := s.listener.Addr().(*net.TCPAddr).AddrPort()
	find := func(client netip.AddrPort) (string, int) {
		p, err := sidecar.ProcessOfTCP(client, front)
		if err != nil {
			return "", 0
		}
		return p.Name, p.PID
	}
	watch := sidecar.NewWatch(s.Switch, s.Watcher, func(by tunnel.Peer) channel.Owner { return sidecar.OwnerOf(by, find) })
	fc := sidecar.FrontConfig{Listener: s.listener, Next: watch, MaxConns: c.Front.MaxConnections, MaxAge: maxAge(time.Duration(c.Media.MaxWait)), Log: log}
	if c.Front.User != "" {
		password, err := c.Front.Password()
		if err != nil {
			return nil, err
		}
		fc.Auth = sidecar.StaticAuth(c.Front.User, password)
	}
	users, err := LocalUsers(c.Front.Users)
	if err != nil {
		return nil, tunnel.Errorf(tunnel.ConfigInvalid, "front.users: %s", tunnel.Sentence(err))
	}
	for _, u := range users {
		fc.Users = append(fc.Users, u.UID)
	}
	if s.Front, err = sidecar.NewFront(fc); err != nil {
		return nil, err
	}
	if c.Capture != nil {
		if err := s.newCapture(c); err != nil {
			return nil, err
		}
	}
	return s, nil
}

// guard makes one that follows the sidecar's policy.
func (s *Sidecar) guard(next tunnel.Opener) *policy.Guard {
	g := policy.NewGuard(next, func(tunnel.Peer) *policy.Policy { return s.policy.Load() })
	told := newDenials(s.log)
	g.Denied = func(d policy.Denial) {
		if d.Proto == policy.UDP || d.Live { // of other streams the front says so
			told.denied(d)
		}
	}
	s.guards = append(s.guards, g)
	return g
}

func newUplink(c *config.Sidecar, key ed25519.PrivateKey, changed, renewed <-chan struct{}, log *slog.Logger) (*uplink.Uplink, error) {
	if _, err := c.Identity.TokenNow(); err != nil {
		return nil, err
	}
	roots, err := rootsFrom("cloud_proxy.ca_file", c.CloudProxy.CAFile)
	if err != nil {
		return nil, err
	}
	known := uplink.TLSConfig{
		Key: key, Pins: c.CloudProxy.Pin, Roots: roots, ServerName: c.CloudProxy.ServerName, ALPN: c.CloudProxy.ALPN, Inspectors: c.CloudProxy.TrustInterception,
	}
	conf, err := uplink.ClientTLS(known)
	if err != nil {
		return nil, err
	}
	maxWait := time.Duration(c.Media.MaxWait)
	own := protect(c.Capture)
	quic, err := tunnelquic.NewDialer(tunnelquic.Config{TLS: conf, MaxAge: maxWait, Control: own.control, Resolver: own.resolver, Log: log})
	if err != nil {
		return nil, err
	}
	through, err := throughProxy(&c.Proxy, own)
	if err != nil {
		return nil, err
	}
	tcp, err := newOverTCP(through.Dial, known, tunneltls.Config{TLS: conf, Log: log, MaxStreams: max(c.Front.MaxConnections, defaultStreams) + controlStreams, MaxAge: maxWait})
	if err != nil {
		return nil, err
	}
	return uplink.New(uplink.Config{
		Proxies: c.CloudProxy.Address, QUIC: hostAlone{quic}, TLS: tcp, Age: maxWait, Lanes: tunneltls.Lanes(), Log: log, Network: network, Changed: changed, Renewed: renewed,
		Open: func() (wire.Open, error) {
			token, err := c.Identity.TokenNow()
			return wire.Open{App: c.Identity.App, Token: token, Region: c.Identity.Region, Operator: c.Identity.Operator}, err
		},
	})
}

// network names a network by the address that this host has in it. Nothing is
// sent: the system looks up the route alone.
func network(to netip.AddrPort) string {
	c, err := net.DialUDP("udp", nil, net.UDPAddrFromAddrPort(to))
	if err != nil {
		return "" // there is none at the moment
	}
	defer c.Close()
	return c.LocalAddr().(*net.UDPAddr).IP.String()
}

// maxAge is how long a datagram may wait in a socket of this process: less than
// in all, since its way takes time too.
func maxAge(wait time.Duration) time.Duration { return cmp.Or(wait, media.MaxAge) * 2 / 3 }

// rootsFrom adds a file's certificates to the system's. nil: the system's alone.
func rootsFrom(key, file string) (*x509.CertPool, error) {
	if file == "" {
		return nil, nil
	}
	text, err := os.ReadFile(file)
	if err != nil {
		return nil, tunnel.Errorf(tunnel.ConfigInvalid, "%s: %s can not be read: %w", key, file, errors.Unwrap(err))
	}
	pool, err := x509.SystemCertPool()
	if err != nil {
		pool = x509.NewCertPool()
	}
	if !pool.AppendCertsFromPEM(text) {
		return nil, tunnel.Errorf(tunnel.ConfigInvalid, "%s: %s holds no certificate in PEM", key, file)
	}
	return pool, nil
}

// alive reports whether a process lives; one of another user does.
func alive(pid int) bool {
	p, err := os.FindProcess(pid)
	if err != nil {
		return false
	}
	defer p.Release()
	err = p.Signal(syscall.Signal(0))
	return !errors.Is(err, os.ErrProcessDone) && !errors.Is(err, syscall.ESRCH)
}

// Run serves until ctx ends. It does not start the switch: that is the
// caller's decision. It returns when everything has ended.
func (s *Sidecar) Run(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var wg sync.WaitGroup
	errs := make([]error, 3)
	wg.Go(func() { defer cancel(); errs[0] = s.Switch.Run(ctx) })
	wg.Go(func() { defer cancel(); errs[1] = s.Front.Run(ctx) })
	if s.Capture != nil {
		// The rules end first: what is captured must have somebody to take it.
		taking, stop := context.WithCancel(context.WithoutCancel(ctx))
		wg.Go(func() { defer cancel(); errs[2] = s.Capture.Run(taking) })
		wg.Go(func() { defer stop(); s.keepRules(ctx) })
	}
	wg.Go(func() { sidecar.TickWatch(ctx, s.Watcher) })
	wg.Go(func() { s.tellLive(ctx) })
	wg.Go(func() { s.follow(ctx, s.conf) })
	wg.Go(func() { s.changes.run(ctx, s.log) })
	wg.Wait()
	s.Close()
	return errors.Join(errs...)
}

// tellLive keeps the link told whether a channel is live. Bulk must give way
// within a fraction of a second, which is sooner than a channel is announced.
func (s *Sidecar) tellLive(ctx context.Context) {
	t := time.NewTicker(200 * time.Millisecond)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case now := <-t.C:
			s.setLive(slices.ContainsFunc(s.Watcher.Channels(now), func(c channel.Channel) bool { return c.State == "live" }))
		}
	}
}

// Close gives up what a sidecar holds. Run does so itself.
func (s *Sidecar) Close() {
	if s.listener != nil {
		s.listener.Close()
	}
	if s.egress != nil {
		s.egress.Close()
	}
	if s.Capture != nil {
		s.dropRules()
		s.Capture.Close()
	}
}
