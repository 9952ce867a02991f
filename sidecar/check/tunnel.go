package check

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"sync"
	"time"

	"culvert/tunnel"
)

// A leg is one carrier that is tried with sessions of our own.
type leg struct {
	step, title string
	mode        tunnel.Mode
	ok          bool // the network lets it through
	why         string
}

// tunnel takes the steps that need a session: the first on the first carrier
// that works, media on each.
func (r *run) tunnel(ctx context.Context) {
	legs := []leg{
		{StepQUIC, "media over QUIC", tunnel.ModeUDP, r.udpOK && r.cfg.Mode != tunnel.ModeTCP, "UDP does not pass"},
		{StepLanes, "media over TLS lanes", tunnel.ModeTCP, r.tlsOK && r.cfg.Mode != tunnel.ModeUDP, "TLS over TCP does not get there"},
	}
	if r.cfg.Mode == tunnel.ModeTCP {
		legs[0].why = "mode is tcp"
	}
	if r.cfg.Mode == tunnel.ModeUDP {
		legs[1].why = "mode is udp"
	}
	decided := false
	if r.cfg.Shared != "" {
		r.skip(StepToken, "token", r.cfg.Shared)
		r.skip(StepPolicy, "policy", "it needs a session of its own")
		if r.cfg.Beside != nil && (r.udpOK || r.tlsOK) {
			r.beside(ctx)
		}
		return
	}
	for i, l := range legs {
		if !l.ok {
			continue
		}
		done := r.session(ctx, l, !decided)
		decided = true
		if !done {
			for _, rest := range legs[i+1:] {
				r.skip(rest.step, rest.title, "there is no session")
			}
			return
		}
	}
	if !decided {
		for _, s := range [][2]string{{StepToken, "token"}, {StepPolicy, "policy"}} {
			r.skip(s[0], s[1], "the cloud proxy is not reached")
		}
	}
	for _, l := range legs {
		if !l.ok {
			r.skip(l.step, l.title, l.why)
		}
	}
}

// session runs a session over one carrier. It returns false where there is none.
func (r *run) session(ctx context.Context, l leg, first bool) bool {
	ctx, cancel := context.WithCancel(ctx)
	s := &state{news: make(chan struct{}, 1)}
	var wg sync.WaitGroup
	wg.Go(func() { s.end(r.cfg.Link.Run(ctx, l.mode, s.report)) })
	defer wg.Wait()
	defer cancel()

	up := false
	open := func() Outcome {
		err := s.wait(ctx)
		up = err == nil
		return r.admitted(err)
	}
	if first {
		if o := r.step(StepToken, "token", open); o.Status == Failed || !up {
			if !up && o.Status == Good { // a sidecar that runs here has our place
				r.skip(StepPolicy, "policy", "it needs a session of its own")
				r.beside(ctx)
			} else {
				r.skip(StepPolicy, "policy", "there is no session")
				r.skip(l.step, l.title, "there is no session")
			}
			return false
		}
		r.step(StepPolicy, "policy", func() Outcome { return r.destinations(ctx) })
	}
	r.step(l.step, l.title, func() Outcome {
		if !first {
			if o := open(); !up {
				return o
			}
		}
		if r.cfg.Busy != "" {
			return Outcome{Status: Skipped, Says: r.cfg.Busy}
		}
		w, err := Measure(ctx, r.cfg.Link, r.cfg.Media)
		if err != nil {
			return echoFailed(err)
		}
		now := s.last()
		w.Carrier, w.Way = now.Carrier, now.Way
		r.report.Ways = append(r.report.Ways, &w)
		return w.outcome()
	})
	return true
}

// beside has the sidecar that runs here measure.
func (r *run) beside(ctx context.Context) {
	r.step(StepBeside, "media through the sidecar that runs here", func() Outcome {
		if r.cfg.Busy != "" {
			return Outcome{Status: Skipped, Says: r.cfg.Busy}
		}
		w, err := r.cfg.Beside(ctx, r.cfg.Media)
		if err != nil {
			return echoFailed(err)
		}
		r.report.Ways = append(r.report.Ways, &w)
		return w.outcome()
	})
}

// admitted says what came of asking for a session.
func (r *run) admitted(err error) Outcome {
	code := tunnel.CodeOf(err)
	switch {
	case err == nil:
		return Outcome{Status: Good, Says: "the cloud proxy accepts the App ID and the token, and has a place"}
	case code == tunnel.QuotaExceeded && r.cfg.Beside != nil:
		return Outcome{Status: Good, Says: "the cloud proxy accepts the App ID and the token; all places are taken, one by the sidecar that runs here, which measures for us"}
	}
	o := Outcome{Status: Failed, Code: code, Says: tunnel.Sentence(err)}
	switch {
	case strings.HasPrefix(string(code), "token_"):
		o.Do = "get a new token from the cloud proxy's operator ('culvert-cloudproxy token new')"
	case code == tunnel.QuotaExceeded:
		o.Do = "end another sidecar of this App ID, or have a token signed with a higher --concurrency"
	case code == tunnel.VersionMismatch:
		o.Do = "update the older of the two ends"
	default:
		o.Do = "check again; if it lasts, tell the cloud proxy's operator"
	}
	return o
}

func echoFailed(err error) Outcome {
	if tunnel.CodeOf(err) == tunnel.PolicyDenied {
		return Outcome{Status: Skipped, Code: tunnel.PolicyDenied, Says: "the cloud proxy's operator does not allow test calls"}
	}
	return Outcome{Status: Failed, Code: tunnel.CodeOf(err), Says: "the test call ended: " + tunnel.Sentence(err), Do: "check again; if it lasts, tell the cloud proxy's operator"}
}

// outcome puts a way into words.
func (w *Way) outcome() Outcome {
	o := Outcome{Status: Good}
	switch g := w.worst(); {
	case w.Audio.Grade == GradeUnusable:
		o.Status, o.Code = Failed, tunnel.PathStrained
	case g == GradeDegraded, g == GradeUnusable:
		o.Status, o.Code = Degraded, tunnel.PathStrained
	}
	kind := func(name string, k Kind) string {
		s := fmt.Sprintf("%s is %s", name, k.Grade)
		if k.Why != "" {
			s += " (" + k.Why + ")"
		}
		return s
	}
	o.Says = fmt.Sprintf("%s: %s, %s", w.over(), kind("audio", w.Audio), kind("video", w.Video))
	if o.Status != Good {
		o.Do = "have the network looked at: who else uses it, its wireless part, and what shapes traffic on port 443"
	}
	return o
}

// state follows a link.
type state struct {
	mu    sync.Mutex // guards the fields below
	now   tunnel.LinkState
	fails int
	up    bool
	ended bool
	err   error
	news  chan struct{} // capacity 1
}

func (s *state) report(l tunnel.LinkState) {
	s.mu.Lock()
	s.now = l
	switch {
	case l.Phase == tunnel.LinkUp:
		s.up = true
	case l.Code != "":
		s.fails++
	}
	s.mu.Unlock()
	s.tell()
}

func (s *state) end(err error) {
	s.mu.Lock()
	s.ended, s.err = true, err
	s.mu.Unlock()
	s.tell()
}

func (s *state) tell() {
	select {
	case s.news <- struct{}{}:
	default:
	}
}

func (s *state) last() tunnel.LinkState {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.now
}

// wait returns when there is a session, or why there is none.
func (s *state) wait(ctx context.Context) error {
	late := time.After(startTime)
	for {
		s.mu.Lock()
		now, up, fails, ended, err := s.now, s.up, s.fails, s.ended, s.err
		s.mu.Unlock()
		because := &tunnel.Error{Code: now.Code, Text: now.Why}
		switch {
		case up:
			return nil
		case ended && err != nil:
			return err
		case ended:
			return context.Cause(ctx)
		case now.Refused, fails > 1:
			return because
		}
		select {
		case <-s.news:
		case <-late:
			if now.Code == "" {
				return tunnel.Errorf(tunnel.TimedOut, "the cloud proxy did not answer within %v", startTime)
			}
			return because
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

const (
	// maxDestinations bounds how many are tried, and tryTime how long each may
	// take: a refusal by the policy comes at once.
	maxDestinations = 32
	tryTime         = 2 * time.Second
)

// destinations asks the cloud proxy for what the policy here allows.
func (r *run) destinations(ctx context.Context) Outcome {
	all := r.cfg.Destinations
	if len(all) == 0 {
		return Outcome{Status: Skipped, Says: "the policy here names no single destination; the cloud proxy alone decides"}
	}
	more := ""
	if len(all) > maxDestinations {
		more = fmt.Sprintf(" (the first %d of %d were tried)", maxDestinations, len(all))
		all = all[:maxDestinations]
	}
	refused := make([]error, len(all))
	var wg sync.WaitGroup
	for i, d := range all {
		wg.Go(func() { refused[i] = r.try(ctx, d) })
	}
	wg.Wait()
	var denied []string
	silent := 0
	for i, err := range refused {
		switch {
		case errors.Is(err, tunnel.PolicyDenied):
			denied = append(denied, all[i].String())
		case err != nil && !all[i].UDP:
			silent++
		}
	}
	if len(denied) == 0 {
		o := Outcome{Status: Good, Says: fmt.Sprintf("the cloud proxy allows all %d destinations%s", len(all), more)}
		if silent > 0 {
			o.Says += fmt.Sprintf("; %d of them did not answer it over TCP", silent)
		}
		return o
	}
	o := Outcome{Status: Degraded, Code: tunnel.PolicyDenied, Do: "have the cloud proxy's operator allow them in cloudproxy.yaml, or take them out of the policy here"}
	if len(denied) == len(all) {
		o.Status = Failed
	}
	shown := denied
	if len(shown) > 4 {
		shown = append(shown[:3:3], fmt.Sprintf("%d others", len(denied)-3))
	}
	o.Says = fmt.Sprintf("the cloud proxy's policy denies %d of %d destinations%s: %s", len(denied), len(all), more, strings.Join(shown, ", "))
	return o
}

// String returns "udp 192.0.2.1:3478".
func (d Destination) String() string {
	if d.UDP {
		return "udp " + d.To.String()
	}
	return "tcp " + d.To.String()
}

// try opens a connection to a destination, or sends it one datagram. What the
// destination itself answers is not asked for.
func (r *run) try(ctx context.Context, d Destination) error {
	ctx, cancel := context.WithTimeout(ctx, tryTime)
	defer cancel()
	by := tunnel.Peer{User: "check"}
	if !d.UDP {
		s, err := r.cfg.Link.OpenStream(ctx, by, d.To)
		if err == nil {
			s.Close()
		}
		return err
	}
	answer := make(refusal, 1)
	p, err := r.cfg.Link.OpenPackets(by, answer)
	if err != nil {
		return err
	}
	defer p.Close()
	// A STUN binding request (RFC 8489 §5), which harms nobody. A datagram may be
	// lost: so it is said thrice.
	request := append([]byte{0, 1, 0, 0, 0x21, 0x12, 0xa4, 0x42}, make([]byte, 12)...)
	for range 3 {
		if err := p.Send(request, d.To); err != nil {
			return err
		}
		p.Flush()
		select {
		case err := <-answer:
			return err
		case <-time.After(tryTime / 4):
		case <-ctx.Done():
			return nil
		}
	}
	return nil
}

// refusal receives what becomes of an association, its first news.
type refusal chan error

func (r refusal) tell(err error) {
	select {
	case r <- err:
	default:
	}
}

func (r refusal) Deliver([]byte, netip.AddrPort)          { r.tell(nil) }
func (r refusal) Unreachable(_ netip.AddrPort, err error) { r.tell(err) }
func (r refusal) Closed(err error)                        { r.tell(err) }
