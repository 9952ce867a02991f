package check

import (
	"fmt"
	"net"
	"strings"
	"time"

	"culvert/tunnel"
)

// A Report is what a test has found.
type Report struct {
	Version    string      `json:"version,omitempty"`
	Machine    string      `json:"machine,omitempty"`
	App        string      `json:"app,omitempty"` // App ID
	At         time.Time   `json:"at"`
	CloudProxy string      `json:"cloud_proxy"`
	Mode       tunnel.Mode `json:"mode"`
	Steps      []*Step     `json:"steps"`
	Ways       []*Way      `json:"media"`
	Open       []Opening   `json:"open"` // what a firewall has to let through

	Verdict Status `json:"verdict"` // good, degraded or failed
	// Interrupted: the test was ended before it was done, and what it says is not known.
	Interrupted bool        `json:"interrupted,omitempty"`
	Code        tunnel.Code `json:"code,omitempty"`
	Sentence    string      `json:"sentence"`
	Next        string      `json:"next"`
}

// An Opening is one line of what a firewall has to let through.
type Opening struct {
	Protocol string `json:"protocol"`
	To       string `json:"to"` // address or name
	Port     string `json:"port"`
	For      string `json:"for"`
	Status   Status `json:"status"` // of now
}

// Exit is the exit code: 0 good, 1 not usable, 5 usable but degraded.
func (r *Report) Exit() int {
	switch r.Verdict {
	case Good:
		return 0
	case Degraded:
		return 5
	}
	return 1
}

func (r *Report) find(name string) *Step {
	for _, s := range r.Steps {
		if s.Name == name {
			return s
		}
	}
	return &Step{Name: name, Outcome: Outcome{Status: Skipped}}
}

// open lists what has to be let through.
func (r *Report) open(run *run) {
	host, port, err := net.SplitHostPort(r.CloudProxy)
	if err != nil {
		return
	}
	var to []string
	for _, a := range run.addrs {
		to = append(to, a.String())
	}
	if len(to) == 0 {
		to = []string{host}
	}
	where := strings.Join(to, ", ")
	if where != host {
		where = host + " (" + where + ")"
	}
	udp, tcp := r.find(StepUDP), r.find(StepTCP)
	tcpNow := tcp.Status
	if t := r.find(StepTLS); tcpNow == Good && t.Status == Failed {
		tcpNow = Failed
	}
	const rest = "everything else, and calls where UDP does not pass; without TLS inspection"
	r.Open = []Opening{
		{"UDP", where, port, "calls, by the best way", udp.Status},
		{"TCP", where, port, rest, tcpNow},
	}
	if run.cfg.Proxy != nil {
		proxy := r.find(StepProxy).Status
		if t := r.find(StepTLS); proxy == Good && t.Status == Failed {
			proxy = Failed
		}
		r.Open[1] = Opening{"HTTP CONNECT, by the proxy", host, port, rest, proxy}
	}
}

// conclude finds the one thing to say. The order is that of causes: what stands
// first explains what stands after it.
func (r *Report) conclude() {
	tcp, udp := r.find(StepTCP), r.find(StepUDP)
	tls, portal, proxy := r.find(StepTLS), r.find(StepPortal), r.find(StepProxy)
	noTCP := tcp.Status == Failed || proxy.Status == Failed || tls.Status == Failed
	reached := tls.Status == Good || udp.Status == Good || udp.Status == Degraded

	// What no call survives.
	for _, s := range []*Step{r.find(StepConfig), r.find(StepNames), portal} {
		if s.Status == Failed && !(s == portal && reached) {
			r.because(Failed, s)
			return
		}
	}
	if !reached {
		first := tcp // which carries both ways' blame where the cloud proxy is away
		for _, s := range []*Step{proxy, tls, udp} {
			if first.Status != Failed {
				first = s
			}
		}
		switch {
		case first == tcp && udp.Status == Failed && r.Mode != tunnel.ModeTCP:
			r.Verdict, r.Code, r.Next = Failed, tcp.Code, tcp.Do
			r.Sentence = fmt.Sprintf("the cloud proxy is reached neither over TCP nor over UDP: %s; %s", tcp.Says, udp.Says)
			if r.Mode == tunnel.ModeUDP {
				r.Code, r.Next = udp.Code, udp.Do
			}
		default:
			r.because(Failed, first)
		}
		return
	}
	if r.Mode == tunnel.ModeUDP && udp.Status == Failed {
		r.because(Failed, udp)
		return
	}
	for _, name := range []string{StepToken, StepPolicy} {
		if s := r.find(name); s.Status == Failed {
			r.because(Failed, s)
			return
		}
	}
	way, usable := r.used()
	quic, lanes, beside := r.find(StepQUIC), r.find(StepLanes), r.find(StepBeside)
	if !usable {
		for _, s := range []*Step{quic, lanes, beside} {
			if s.Status == Failed {
				r.because(Failed, s)
				return
			}
		}
	}

	// What makes it worse than it could be.
	for _, s := range []*Step{r.find(StepClock), r.find(StepPolicy)} {
		if s.Status == Degraded {
			r.because(Degraded, s)
			return
		}
	}
	switch throttled := r.throttled(); {
	case throttled != "":
		r.Verdict, r.Code, r.Sentence = Degraded, tunnel.PathStrained, throttled
		r.Next = "have IT take UDP " + portOf(r.CloudProxy) + " to the cloud proxy out of traffic shaping"
		return
	case udp.Status == Failed && r.Mode == tunnel.ModeAuto:
		r.because(Degraded, udp)
		r.Sentence = "calls go over TCP only, which is worse where packets are lost: " + r.Sentence
		return
	case noTCP && r.Mode == tunnel.ModeAuto:
		for _, s := range []*Step{tcp, proxy, tls} {
			if s.Status == Failed {
				r.because(Degraded, s)
				r.Sentence = "calls go over UDP only, with nothing to fall back to: " + r.Sentence
				return
			}
		}
	case lanes.Status == Failed && lanes.Code != tunnel.PathStrained && quic.Status == Good && r.Mode == tunnel.ModeAuto: // TLS begins, and is cut then
		r.because(Degraded, lanes)
		r.Sentence = "calls go over UDP only, with nothing to fall back to: " + r.Sentence
		return
	case quic.Status == Failed || way != nil && (way.worst() == GradeDegraded || way.worst() == GradeUnusable):
		for _, s := range []*Step{quic, lanes, beside} {
			if s.Status == Degraded || s.Status == Failed {
				r.because(Degraded, s)
				if s == quic && way != nil && way.Carrier == "tls" {
					r.Sentence += "; calls go over TCP"
				}
				return
			}
		}
	case udp.Status == Degraded:
		r.because(Degraded, udp)
		return
	}
	r.Verdict, r.Next = Good, "nothing is to be done"
	r.Sentence = "calls can be made"
	if way != nil {
		r.Sentence = fmt.Sprintf("calls can be made: %s audio is %s and video is %s", way.over(), way.Audio.Grade, way.Video.Grade)
	} else {
		r.Sentence += ", as far as it can be told without a test call"
	}
}

func (r *Report) because(v Status, s *Step) {
	r.Verdict, r.Code, r.Sentence, r.Next = v, s.Code, s.Says, s.Do
	if r.Next == "" {
		r.Next = "check again"
	}
}

// used returns the way that calls would go: QUIC's, which is measured first, unless
// it can not carry one. usable says whether any can, as far as is known.
func (r *Report) used() (w *Way, usable bool) {
	usable = true
	for _, s := range []string{StepQUIC, StepLanes, StepBeside} {
		if r.find(s).Status == Failed {
			usable = false
		}
	}
	for _, w := range r.Ways {
		if w.Audio.Grade != GradeUnusable {
			return w, true
		}
	}
	return nil, usable
}

// throttled says that UDP carries little and TCP much; "": it is not so. A path
// that just loses does so of little as well, and what TCP loses it sends again.
func (r *Report) throttled() string {
	var udp, tcp *Way
	for _, w := range r.Ways {
		switch w.Carrier {
		case "quic":
			udp = w
		case "tls":
			tcp = w
		}
	}
	if udp == nil || tcp == nil {
		return ""
	}
	loss := func(w *Way) float64 {
		return max(w.Video.Up.Loss, w.Video.Down.Loss, w.Audio.Up.Loss, w.Audio.Down.Loss)
	}
	if loss(udp) < 0.05 || loss(tcp) > loss(udp)/4 || udp.Light > loss(udp)/4 {
		return ""
	}
	return fmt.Sprintf("UDP %s is throttled: %.0f %% of a test call was lost there, of a tenth as much %.1f %%, and over TCP %.1f %%", portOf(r.CloudProxy), 100*loss(udp), 100*udp.Light, 100*loss(tcp))
}

func portOf(address string) string {
	_, port, _ := net.SplitHostPort(address)
	return port
}
