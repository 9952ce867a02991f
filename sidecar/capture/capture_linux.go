//go:build linux && (amd64 || arm64 || arm || riscv64)

package capture

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/time/rate"

	"culvert/tunnel"
	"culvert/tunnel/netio"
)

// tickTime is how exactly idle time is known.
const tickTime = time.Second

// A Capture serves captured traffic.
//
//	app's UDP socket ──TPROXY──► sockets ──► source ──► Next.OpenPackets
//	             ▲                              │
//	             └── a packet from where it came ◄
//	app's TCP connection ──TPROXY──► accept ──► Next.OpenStream
type Capture struct {
	cfg     Config
	log     *slog.Logger
	sockets *Sockets
	poller  netio.Poller
	limited rate.Sometimes // lines about refusals
	fresh   *rate.Limiter  // new sources

	tick        atomic.Int64 // tickTimes since the start
	drops       [dropKinds]atomic.Uint64
	up, down    atomic.Uint64
	unreachable atomic.Uint64
	refused     tunnel.Refusals
	wg          sync.WaitGroup // connections and associations; added to under mu while not closed

	mu           sync.Mutex // guards what follows; nothing is called while it is held
	closed       bool
	sources      map[netip.AddrPort]*source
	streams      map[*stream]struct{}
	associations uint64
	connections  uint64
	evicted      uint64
}

// New checks the configuration. Errors have the code ConfigInvalid and name the
// field.
func New(cfg Config) (*Capture, error) {
	switch {
	case cfg.Sockets == nil:
		return nil, tunnel.Errorf(tunnel.ConfigInvalid, "Sockets is missing")
	case cfg.Next == nil:
		return nil, tunnel.Errorf(tunnel.ConfigInvalid, "Next is missing")
	case cfg.Idle < 0 || cfg.MaxAge < 0 || cfg.MaxSources < 0 || cfg.MaxStreams < 0:
		return nil, tunnel.Errorf(tunnel.ConfigInvalid, "Idle, MaxAge, MaxSources and MaxStreams can not be negative")
	}
	or(&cfg.Idle, defaultIdle)
	or(&cfg.MaxSources, defaultMost)
	or(&cfg.MaxStreams, defaultMost)
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	c := &Capture{
		cfg: cfg, log: cfg.Log, sockets: cfg.Sockets, limited: rate.Sometimes{First: 10, Interval: time.Second}, fresh: rate.NewLimiter(newSources, 2*newSources),
		sources: map[netip.AddrPort]*source{}, streams: map[*stream]struct{}{},
	}
	c.poller.MaxAge = cfg.MaxAge
	return c, nil
}

func or[T comparable](field *T, value T) {
	var zero T
	if *field == zero {
		*field = value
	}
}

// Run serves until ctx ends, then ends every association, resets every
// connection, waits for all that it started and returns nil. It returns an error
// only when its sockets fail. It may be called once.
func (c *Capture) Run(ctx context.Context) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var parts sync.WaitGroup
	for _, l := range c.sockets.tcp {
		parts.Go(func() {
			if err := tunnel.AcceptConns(ctx, l, c.log, func(conn net.Conn) { c.take(ctx, conn) }); err != nil {
				cancel(err)
			}
		})
	}
	if err := c.read(); err != nil {
		cancel(err)
	}
	ticker := time.NewTicker(tickTime)
	defer ticker.Stop()
	for ctx.Err() == nil {
		select {
		case <-ctx.Done():
		case <-ticker.C:
			c.sweep(c.tick.Add(1))
		}
	}
	c.end()
	parts.Wait()
	c.poller.Close()
	c.wg.Wait()
	c.sockets.Close()
	if err := context.Cause(ctx); !errors.Is(err, context.Canceled) && !errors.Is(err, context.DeadlineExceeded) {
		return err
	}
	return nil
}

// read gives the UDP sockets to the poller.
func (c *Capture) read() error {
	failed := func(err error) error {
		return tunnel.Errorf(tunnel.Internal, "the sockets for captured datagrams can not be read: %w", err)
	}
	for _, conn := range c.sockets.takeUDP() {
		s, err := c.poller.Packet(conn, &reader{c: c})
		if err != nil {
			return failed(err)
		}
		c.sockets.polled = append(c.sockets.polled, s)
		if err := s.Start(); err != nil {
			return failed(err)
		}
	}
	return nil
}

// end closes everything; it does not wait.
func (c *Capture) end() {
	for _, l := range c.sockets.tcp {
		l.Close()
	}
	for _, s := range c.sockets.polled {
		s.Close()
	}
	c.mu.Lock()
	c.closed = true
	all := c.sources
	c.sources = map[netip.AddrPort]*source{}
	for _, s := range all {
		s.ended = true
	}
	for s := range c.streams {
		s.Abort(tunnel.ProxyStopped)
	}
	c.mu.Unlock()
	for _, s := range all {
		s.close()
	}
}

// Close gives up the sockets of a Capture that has not run.
func (c *Capture) Close() { c.sockets.Close() }

// Stats returns the counters.
func (c *Capture) Stats() Stats {
	s := Stats{
		Port: c.sockets.Port(), Dropped: map[string]uint64{}, Refused: c.refused.ByCode(),
		Unreachable: c.unreachable.Load(), Up: c.up.Load(), Down: c.down.Load(),
	}
	if c.cfg.DNS.IsValid() {
		s.DNS = c.cfg.DNS.String()
	}
	for i := range c.drops {
		if n := c.drops[i].Load(); n > 0 {
			s.Dropped[dropNames[i]] = n
		}
	}
	if n := c.poller.Late(); n > 0 {
		s.Dropped[dropLate] = n
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	s.Relays, s.Open = len(c.sources), len(c.streams)
	s.Associations, s.Streams, s.Evicted = c.associations, c.connections, c.evicted
	return s
}

// Server returns what a captured socket has talked to first, and whether it is
// "tcp" or "udp": with that the kernel can say whose it is.
func (c *Capture) Server(client netip.AddrPort) (server netip.AddrPort, network string, ok bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if s := c.sources[client]; s != nil {
		return s.first, "udp", true
	}
	for s := range c.streams {
		if s.app == client {
			return s.to, "tcp", true
		}
	}
	return netip.AddrPort{}, "", false
}

// failed counts and logs what was refused to an app.
func (c *Capture) failed(what string, app, to netip.AddrPort, err error) {
	code := tunnel.CodeOf(err)
	c.refused.Add(code)
	c.limited.Do(func() {
		c.log.Info("capture: refused", "what", what, "code", string(code), "from", app, "to", to, "why", tunnel.Sentence(err))
	})
}

// reasonOf says in ICMP why something is refused. Of what lies with us an app must
// learn: Linux tells it of a port and of a denial, and ignores other reasons,
// which may pass.
func reasonOf(err error) reason {
	switch tunnel.CodeOf(err) {
	case tunnel.PolicyDenied, tunnel.NotPermitted:
		return reasonDenied
	case tunnel.HostUnreachable, tunnel.NameUnresolved, tunnel.TimedOut:
		return reasonHost
	case tunnel.NetworkUnreachable:
		return reasonNetwork
	}
	return reasonPort
}
