package check

import (
	"context"
	"crypto/tls"
	"fmt"
	"net"
	"net/netip"
	"time"

	"culvert/tunnel"
)

// A Status says how a step ended.
type Status string

// The statuses, best first.
const (
	Good     Status = "good"
	Skipped  Status = "skipped"
	Degraded Status = "degraded" // usable, but worse than it could be
	Failed   Status = "failed"
)

// An Outcome is what a step has found.
type Outcome struct {
	Status Status      `json:"status"`
	Code   tunnel.Code `json:"code,omitempty"`
	Says   string      `json:"says"`         // one sentence
	Do     string      `json:"do,omitempty"` // what to do about it

	via string // the proxy that has let a connection through
}

// A Step is one that was taken.
type Step struct {
	Name  string        `json:"name"`
	Title string        `json:"title"`
	Took  time.Duration `json:"took_ns"`
	Outcome
}

// Names of steps.
const (
	StepConfig = "config"
	StepNames  = "names"
	StepTCP    = "tcp"
	StepProxy  = "proxy"
	StepTLS    = "tls"
	StepPortal = "portal"
	StepUDP    = "udp"
	StepClock  = "clock"
	StepToken  = "token"
	StepPolicy = "policy"
	StepQUIC   = "media_quic"
	StepLanes  = "media_lanes"
	StepBeside = "media_sidecar"
)

// Config says what is tested. Address, TLS, QUIC and Link are required.
type Config struct {
	Address string      // of the cloud proxy, HOST:PORT
	Mode    tunnel.Mode // which carriers the sidecar may use
	TLS     *tls.Config // of every connection to the cloud proxy, which also says who it is
	Pins    []string    // accepted public keys; empty: TLS.RootCAs decide
	// Web: TLS ends at a web server before the cloud proxy, and the tunnel's own
	// runs inside a WebSocket. Any authority of TLS.RootCAs may vouch for that server.
	Web bool
	// Inspectors are the common names of authorities that may open TLS; then, too,
	// the tunnel's own runs inside.
	Inspectors []string

	Lookup func(ctx context.Context, host string) ([]netip.Addr, error) // nil: the system's
	Direct tunnel.DialFunc                                              // nil: a net.Dialer
	// Through dials TCP as the sidecar does, where that is not Direct: through an
	// enterprise proxy. Proxy is the step that tells whether it lets us.
	Through tunnel.DialFunc
	Proxy   func(ctx context.Context) Outcome

	QUIC tunnel.Dialer
	// Link is the sidecar's, with a session of its own. Run is called for each
	// mode that works.
	Link tunnel.Link
	// Beside is what a sidecar that runs here measures, for where there is no
	// place for a session of our own; nil: none runs.
	Beside func(ctx context.Context, d time.Duration) (Way, error)
	// Shared says why there can be no session of our own, since it would end that
	// of the sidecar which runs here; "": there can.
	Shared string
	// Busy says why no test call is to be made; "": one is.
	Busy string

	Setup        Outcome // of reading the configuration
	Destinations []Destination
	Media        time.Duration    // for each way; 0: 10 s
	Now          func() time.Time // nil: time.Now
	// Begin and End tell of each step; nil: nobody wants to know.
	Begin func(title string)
	End   func(Step)
}

// A Destination is one that the policy here allows, and a call needs.
type Destination struct {
	UDP bool
	To  tunnel.Target
}

// Skew is how far two clocks may differ.
const Skew = 5 * time.Minute

// times bound the steps.
const (
	lookupTime = 4 * time.Second
	dialTime   = 4 * time.Second
	tlsTime    = 4 * time.Second
	portalTime = 2 * time.Second
	startTime  = 12 * time.Second
)

// run is one test.
type run struct {
	cfg    Config
	report *Report
	host   string
	addrs  []netip.Addr

	tcpOK, tlsOK, udpOK bool
	via                 string // the proxy that TCP goes through; empty: none
	tls                 verdict
	skew                time.Duration // of our clock: the cloud proxy's less ours
	skewKnown           bool

	done <-chan struct{} // the test is to end
	cut  string          // the title of the first step that was not taken for that
}

// Run takes all steps. It fails only where the configuration can not be tested
// at all.
func Run(ctx context.Context, cfg Config) *Report {
	if cfg.Lookup == nil {
		cfg.Lookup = func(ctx context.Context, host string) ([]netip.Addr, error) {
			return net.DefaultResolver.LookupNetIP(ctx, "ip", host)
		}
	}
	if cfg.Direct == nil {
		cfg.Direct = new(net.Dialer).DialContext
	}
	if cfg.Through == nil {
		cfg.Through = cfg.Direct
	}
	if cfg.Media == 0 {
		cfg.Media = 10 * time.Second
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.Mode == "" {
		cfg.Mode = tunnel.ModeAuto
	}
	r := &run{cfg: cfg, done: ctx.Done(), report: &Report{At: cfg.Now().UTC().Truncate(time.Second), CloudProxy: cfg.Address, Mode: cfg.Mode, Ways: []*Way{}, Open: []Opening{}}}
	r.step(StepConfig, "configuration", func() Outcome { return cfg.Setup })
	if cfg.Setup.Status != Failed {
		r.host, _, _ = net.SplitHostPort(cfg.Address)
		r.network(ctx)
		r.tunnel(ctx)
	}
	r.report.open(r)
	r.report.conclude()
	if r.cut != "" {
		r.report.Verdict, r.report.Code, r.report.Interrupted = Failed, "", true
		r.report.Sentence, r.report.Next = fmt.Sprintf("the check was interrupted at the step %q", r.cut), "check again"
	}
	return r.report
}

// network takes the steps that need no session.
func (r *run) network(ctx context.Context) {
	r.step(StepNames, "name resolution", func() Outcome { return r.names(ctx) })
	if len(r.addrs) == 0 && r.cfg.Proxy == nil {
		for _, s := range [][2]string{{StepTCP, "TCP 443"}, {StepTLS, "TLS"}, {StepPortal, "captive portal"}, {StepUDP, "UDP 443"}, {StepClock, "clock"}} {
			r.skip(s[0], s[1], "the cloud proxy's address is not known")
		}
		return
	}
	r.step(StepTCP, "TCP "+r.port(), func() Outcome { return r.tcp(ctx) })
	if r.cfg.Proxy == nil {
		r.skip(StepProxy, "enterprise proxy", "none is configured")
	} else {
		r.step(StepProxy, "enterprise proxy", func() Outcome {
			o := r.cfg.Proxy(ctx)
			r.tcpOK, r.via = o.Status == Good || o.Status == Degraded, o.via
			return o
		})
	}
	if r.tcpOK {
		r.step(StepTLS, "TLS", func() Outcome { return r.handshake(ctx) })
	} else {
		r.skip(StepTLS, "TLS", "no TCP connection")
	}
	r.step(StepPortal, "captive portal", func() Outcome { return r.portal(ctx) })
	if len(r.addrs) == 0 {
		r.skip(StepUDP, "UDP "+r.port(), "the cloud proxy's address is not known here")
	} else {
		r.step(StepUDP, "UDP "+r.port(), func() Outcome { return r.udp(ctx) })
	}
	r.step(StepClock, "clock", r.clock)
}

func (r *run) port() string {
	_, port, _ := net.SplitHostPort(r.cfg.Address)
	return port
}

func (r *run) over() bool {
	select {
	case <-r.done:
		return true
	default:
		return false
	}
}

// step takes one step and notes what came of it.
func (r *run) step(name, title string, do func() Outcome) *Step {
	if r.cfg.Begin != nil {
		r.cfg.Begin(title)
	}
	began := time.Now()
	s := &Step{Name: name, Title: title, Outcome: Outcome{Status: Skipped}}
	if !r.over() {
		s.Outcome = do()
	}
	if r.over() && s.Status != Good { // what it met may be the end itself
		s.Outcome = Outcome{Status: Skipped, Says: "the check was interrupted"}
		if r.cut == "" {
			r.cut = title
		}
	}
	s.Took = time.Since(began)
	r.report.Steps = append(r.report.Steps, s)
	if r.cfg.End != nil {
		r.cfg.End(*s)
	}
	return s
}

func (r *run) skip(name, title, why string) {
	r.step(name, title, func() Outcome { return Outcome{Status: Skipped, Says: why} })
}
