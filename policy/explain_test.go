package policy_test

import (
	"strings"
	"testing"

	"culvert/policy"
	"culvert/tunnel"
)

func TestAnExplanationNamesWhatElseThereIsForADestination(t *testing.T) {
	p := parse(t, `
rules:
  - allow: udp
    to: 8.8.8.0/24
    ports: 3478-3500
  - allow: any
    to: [8.8.8.8, "*.example.com"]
  - deny: tcp
    to: 8.8.8.8
    ports: 25
`)
	for _, c := range []struct {
		proto      policy.Proto
		to         string
		rule       string // a part of the rule that decides; "": none does
		also, near string
	}{
		{policy.UDP, "8.8.8.8:3478", "line 3", "line 6", "protocol line 8"},
		{policy.UDP, "8.8.8.9:9", "", "", "ports line 3"},
		{policy.TCP, "8.8.8.9:3478", "", "", "protocol line 3"},
		{policy.TCP, "8.8.8.8:25", "line 8", "line 6", "protocol line 3"},
		{policy.TCP, "A.Example.com.:1", "line 6", "", ""},
		{policy.TCP, "example.com:1", "", "", ""},
	} {
		e := p.Explain(c.proto, target(t, c.to))
		var also, near []string
		for _, r := range e.Also {
			also = append(also, strings.TrimPrefix(r.Origin(), "test.yaml "))
		}
		for _, n := range e.Near {
			near = append(near, n.Not+" "+strings.TrimPrefix(n.Rule.Origin(), "test.yaml "))
		}
		rule := ""
		if e.Rule != nil {
			rule = strings.TrimPrefix(e.Rule.Origin(), "test.yaml ")
		}
		if rule != c.rule || strings.Join(also, ", ") != c.also || strings.Join(near, ", ") != c.near {
			t.Errorf("%s %s: rule %q, also %q, near %q; want %+v", c.proto, c.to, rule, also, near, c)
		}
	}
}

// The tables that decide fast say what a look at every rule says.
func TestTheFirstRuleThatMatchesDecides(t *testing.T) {
	p := parse(t, mixed)
	for _, host := range []string{"", "a.example.com", "old.example.com", "x.bad.example.com", "example.org", "deep.example.net", "else.example"} {
		for _, a := range []string{"9.9.9.9", "9.9.9.130", "9.9.9.1", "8.8.8.8", "150.138.153.78", "47.74.211.17", "2620:fe::fe"} {
			for _, port := range []uint16{1, 53, 443, 3478, 4000, 8000, 8101} {
				for _, proto := range []policy.Proto{policy.TCP, policy.UDP} {
					e := p.Explain(proto, tunnel.Target{Host: host, Addr: addr(a), Port: port})
					if e.Rule == nil {
						if len(e.Also) > 0 {
							t.Errorf("%s %s (%s) port %d: no rule decides, but %d match", proto, host, a, port, len(e.Also))
						}
						continue
					}
					for _, r := range e.Also {
						if !r.Allow && e.Rule.Allow {
							t.Errorf("%s %s (%s) port %d: %s decides, but %s denies", proto, host, a, port, e.Rule, &r)
						}
					}
				}
			}
		}
	}
}

func TestADiffNamesTheRulesAndTheDestinationsThatChange(t *testing.T) {
	old := parse(t, `
profiles: [agora-mainland-test]
special: [10.0.0.0/8]
rules:
  - {allow: udp, to: 8.8.8.0/24, ports: 3478-3500, tag: media}
  - {allow: tcp, to: "*.example.com"}
  - {allow: tcp, to: 10.0.0.1}
`)
	same := parse(t, `
# written another way
special: [10.0.0.0/8]
profiles: [agora-mainland-test]
rules:
  - {allow: tcp, to: 10.0.0.1}
  - allow: tcp
    to: "*.example.com"
    name: with a name
  - {allow: udp, to: 8.8.8.0/24, ports: "3479-3500,3478", tag: media}
`)
	if d := policy.Diff(old, same); !d.Same() {
		t.Errorf("the same policies differ: %+v", d)
	}
	fresh := parse(t, `
profiles: [agora-mainland-test]
rules:
  - {allow: udp, to: 8.8.8.0/24, ports: 3478-3490, tag: media}
  - {allow: tcp, to: "*.example.com"}
  - {allow: tcp, to: 10.0.0.1}
  - {deny: any, to: 8.8.8.255}
`)
	d := policy.Diff(old, fresh)
	if len(d.Removed) != 1 || len(d.Added) != 2 || len(d.SpecialRemoved) != 1 || len(d.SpecialAdded) != 0 {
		t.Fatalf("%+v", d)
	}
	got := map[string]bool{}
	for _, f := range d.Flips {
		got[f.Proto.String()+" "+f.To.String()] = f.After.Allow
	}
	for to, allow := range map[string]bool{"udp 8.8.8.0:3500": false, "udp 8.8.8.255:3478": false, "tcp 10.0.0.1:443": false} {
		if now, changed := got[to]; !changed || now != allow {
			t.Errorf("%s: changed %v, allowed now %v; all: %v", to, changed, now, got)
		}
	}
	for _, to := range []string{"udp 8.8.8.0:3478", "tcp x.example.com:443", "udp 150.138.153.78:3478"} {
		if _, changed := got[to]; changed {
			t.Errorf("%s is said to change", to)
		}
	}
}
