package check

import (
	"bytes"
	"strings"
	"testing"
	"time"

	"culvert/tunnel"
)

// found makes a report of a machine on which all is well, but for some steps.
func found(mode tunnel.Mode, ways []*Way, changes map[string]Outcome) *Report {
	r := &Report{CloudProxy: "cloud.example.net:443", Mode: mode, Ways: ways}
	for _, name := range []string{StepConfig, StepNames, StepTCP, StepProxy, StepTLS, StepPortal, StepUDP, StepClock, StepToken, StepPolicy, StepQUIC, StepLanes} {
		s := &Step{Name: name, Title: name, Outcome: Outcome{Status: Good, Says: name + " is well"}}
		if o, ok := changes[name]; ok {
			s.Outcome = o
		}
		r.Steps = append(r.Steps, s)
	}
	r.conclude()
	return r
}

func measured(carrier, way string, loss float64, delay time.Duration) *Way {
	f := Figures{Sent: 1000, Arrived: 1000 - int(1000*loss), Loss: loss, Delay: delay, Jitter: ms, Gap: 30 * ms}
	w := &Way{Carrier: carrier, Way: way, Audio: Kind{Up: f, Down: f}, Video: Kind{Up: f, Down: f}}
	w.Audio.judge(audioLimits)
	w.Video.judge(videoLimits)
	return w
}

func light(w *Way, loss float64) *Way { w.Light = loss; return w }

func bad(s Status, code tunnel.Code, says string) Outcome {
	return Outcome{Status: s, Code: code, Says: says, Do: "do " + says}
}

func TestOneSentenceNamesTheCause(t *testing.T) {
	good := []*Way{measured("quic", "sealed", 0, 20*ms), measured("tls", "lanes", 0, 25*ms)}
	type steps = map[string]Outcome
	skipped := Outcome{Status: Skipped}
	for name, c := range map[string]struct {
		mode  tunnel.Mode
		ways  []*Way
		steps steps
		exit  int
		code  tunnel.Code
		says  string
	}{
		"all is well":                       {"auto", good, nil, 0, "", "over UDP audio is good"},
		"no test call":                      {"auto", nil, steps{StepQUIC: skipped, StepLanes: skipped}, 0, "", "without a test call"},
		"no configuration":                  {"auto", nil, steps{StepConfig: bad(Failed, "config_invalid", "line 3")}, 1, "config_invalid", "line 3"},
		"UDP blocked":                       {"auto", good[1:], steps{StepUDP: bad(Failed, "udp_blocked", "dropped"), StepQUIC: skipped}, 5, "udp_blocked", "over TCP only"},
		"UDP blocked, TCP meant":            {"tcp", good[1:], steps{StepUDP: skipped, StepQUIC: skipped}, 0, "", "over TCP audio"},
		"UDP blocked, UDP meant":            {"udp", nil, steps{StepUDP: bad(Failed, "udp_blocked", "dropped"), StepQUIC: skipped, StepLanes: skipped}, 1, "udp_blocked", "dropped"},
		"TCP blocked":                       {"auto", good[:1], steps{StepTCP: bad(Failed, "cloud_unreachable", "refused"), StepTLS: skipped, StepLanes: skipped}, 5, "cloud_unreachable", "over UDP only"},
		"TCP inspected, UDP not":            {"auto", good[:1], steps{StepTLS: bad(Failed, "tls_intercepted", "Hospital CA"), StepLanes: skipped}, 5, "tls_intercepted", "Hospital CA"},
		"TCP cut after a while":             {"auto", good[:1], steps{StepLanes: bad(Failed, "cloud_unreachable", "no answer")}, 5, "cloud_unreachable", "over UDP only"},
		"a proxy that wants a password":     {"auto", nil, steps{StepProxy: bad(Failed, "proxy_auth_required", "407"), StepTCP: skipped, StepTLS: skipped, StepUDP: bad(Failed, "udp_blocked", "dropped"), StepToken: skipped}, 1, "proxy_auth_required", "407"},
		"both blocked":                      {"auto", nil, steps{StepTCP: bad(Failed, "cloud_unreachable", "A"), StepTLS: skipped, StepUDP: bad(Failed, "udp_blocked", "B")}, 1, "cloud_unreachable", "neither over TCP nor over UDP: A; B"},
		"a portal explains what is blocked": {"auto", nil, steps{StepTCP: bad(Failed, "cloud_unreachable", "A"), StepTLS: skipped, StepPortal: bad(Failed, "captive_portal", "hotel"), StepUDP: bad(Failed, "udp_blocked", "B")}, 1, "captive_portal", "hotel"},
		"a token":                           {"auto", nil, steps{StepToken: bad(Failed, "token_expired", "old"), StepPolicy: skipped}, 1, "token_expired", "old"},
		"a clock":                           {"auto", good, steps{StepClock: bad(Degraded, "clock_wrong", "behind")}, 5, "clock_wrong", "behind"},
		"some destinations":                 {"auto", good, steps{StepPolicy: bad(Degraded, "policy_denied", "one")}, 5, "policy_denied", "one"},
		"UDP throttled":                     {"auto", []*Way{measured("quic", "sealed", 0.4, 20*ms), good[1]}, steps{StepQUIC: bad(Failed, "path_strained", "loss")}, 5, "path_strained", "UDP 443 is throttled: 40 %"},
		"UDP loses, of little as well":      {"auto", []*Way{light(measured("quic", "sealed", 0.06, 20*ms), 0.05), good[1]}, steps{StepQUIC: bad(Degraded, "path_strained", "loss")}, 5, "path_strained", "loss"},
		"UDP carries nothing":               {"auto", []*Way{light(measured("quic", "sealed", 0.9, 20*ms), 0.9), good[1]}, steps{StepQUIC: bad(Failed, "path_strained", "loss")}, 5, "path_strained", "loss; calls go over TCP"},
		"both lose":                         {"auto", []*Way{measured("quic", "sealed", 0.1, 20*ms), measured("tls", "lanes", 0.1, 20*ms)}, steps{StepQUIC: bad(Degraded, "path_strained", "loss"), StepLanes: bad(Degraded, "path_strained", "loss")}, 5, "path_strained", "loss"},
		"one way is good enough":            {"auto", []*Way{good[0], measured("tls", "lanes", 0, 200*ms)}, steps{StepLanes: bad(Degraded, "path_strained", "delay")}, 0, "", "over UDP audio"},
		"too far away":                      {"auto", []*Way{measured("quic", "sealed", 0, 500*ms)}, steps{StepQUIC: bad(Failed, "path_strained", "delay"), StepLanes: skipped}, 1, "path_strained", "delay"},
	} {
		r := found(c.mode, c.ways, c.steps)
		if r.Exit() != c.exit || r.Code != c.code || !strings.Contains(r.Sentence, c.says) || r.Next == "" {
			t.Errorf("%s: exit %d (%s): %s; next: %s", name, r.Exit(), r.Code, r.Sentence, r.Next)
		}
	}
}

func TestThePageNeedsNothingElseAndEscapesWhatOthersSay(t *testing.T) {
	r := found("auto", []*Way{measured("quic", "sealed", 0.4, 20*ms)}, map[string]Outcome{
		StepTLS: bad(Failed, tunnel.TLSIntercepted, `issued by "<script src=//evil.example>"`),
	})
	r.Open = []Opening{{"UDP", "198.51.100.7", "443", "calls", Failed}}
	var b bytes.Buffer
	if err := r.WritePage(&b); err != nil {
		t.Fatal(err)
	}
	page := b.String()
	for _, want := range []string{"<!doctype html>", "198.51.100.7", "blocked", "40.0 %", "tls_intercepted", "Content-Security-Policy"} {
		if !strings.Contains(page, want) {
			t.Errorf("the page lacks %q", want)
		}
	}
	for _, no := range []string{"<script", "src=", "href=", "http:", "https:", "@import"} {
		if strings.Contains(strings.ReplaceAll(page, "&lt;script src=//evil.example&gt;", ""), no) {
			t.Errorf("the page has %q", no)
		}
	}
}
