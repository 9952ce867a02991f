package policy_test

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"culvert/policy"
	"culvert/tunnel"
)

const mixed = `
profiles: [agora-mainland-test]
special: [10.20.0.0/16]
rules:
  - allow: tcp
    to: ["*.example.com", Example.ORG., 10.20.0.7]
    ports: [443, 8000-8100]
    tag: media
    name: ours
  - deny: any
    to: [old.example.com, 9.9.9.9]
  - deny: udp
    to: "*.bad.example.com"
  - allow: udp
    to: 9.9.9.0/24
  - deny: udp
    to: 9.9.9.128/25
    ports: 53
  - allow: any
    to: deep.example.net
`

func TestDecisions(t *testing.T) {
	p := parse(t, mixed)
	for _, c := range []struct {
		proto policy.Proto
		to    string
		want  string // allow, deny or pass
		rule  string // a part of the rule; "" for none
	}{
		{policy.TCP, "a.example.com:443", "allow", "line 5"},
		{policy.TCP, "A.B.Example.COM.:8100", "allow", `"ours"`},
		{policy.TCP, "a.example.com:8101", "deny", ""},
		{policy.TCP, "example.com:443", "pass", ""},     // not below itself; edge addresses have 443
		{policy.TCP, "notexample.com:8000", "pass", ""}, // it could be 10.20.0.7
		{policy.TCP, "notexample.com:8101", "deny", ""},
		{policy.TCP, "example.org:8000", "allow", "line 5"},
		{policy.TCP, "www.example.org:8000", "pass", ""},
		{policy.TCP, "OLD.example.com:443", "deny", "line 10"},
		{policy.TCP, "x.old.example.com:443", "allow", "line 5"},
		{policy.TCP, "x.bad.example.com:443", "allow", "line 5"},
		{policy.UDP, "x.bad.example.com:443", "deny", "line 12"},
		{policy.UDP, "a.example.com:443", "pass", ""}, // 9.9.9.0/24 has every port
		{policy.UDP, "deep.example.net:1", "allow", "line 19"},

		{policy.TCP, "10.20.0.7:443", "allow", "line 5"},
		{policy.UDP, "10.20.0.7:443", "deny", ""},
		{policy.TCP, "10.20.0.8:443", "deny", ""},
		{policy.TCP, "10.21.0.7:443", "deny", ""},
		{policy.UDP, "9.9.9.1:1", "allow", "line 14"},
		{policy.UDP, "9.9.9.9:1", "deny", "line 10"},
		{policy.UDP, "9.9.9.200:53", "deny", "line 16"},
		{policy.UDP, "9.9.9.200:54", "allow", "line 14"},
		{policy.TCP, "9.9.9.1:1", "deny", ""},
		{policy.TCP, "9.9.10.1:1", "deny", ""},

		{policy.TCP, "150.138.153.78:3433", "allow", "profile agora-mainland-test"},
		{policy.TCP, "150.138.153.78:3461", "deny", ""},
		{policy.UDP, "150.138.153.78:3478", "allow", "profile agora-mainland-test"},
	} {
		d := p.Decide(c.proto, target(t, c.to))
		got := "deny"
		if d.Allow {
			got = "allow"
		}
		if d.Undecided {
			got = "pass"
		}
		if got != c.want || d.Undecided && !d.Allow || d.Reason == "" {
			t.Errorf("%s %s: %+v, want %s", c.proto, c.to, d, c.want)
		}
		switch {
		case c.rule == "" && d.Rule != nil, c.rule != "" && d.Rule == nil:
			t.Errorf("%s %s: rule %v, want %q", c.proto, c.to, d.Rule, c.rule)
		case d.Rule != nil && !strings.Contains(d.Rule.String(), c.rule):
			t.Errorf("%s %s: rule %v, want %q", c.proto, c.to, d.Rule, c.rule)
		case d.Rule != nil && !strings.Contains(d.Reason, d.Rule.Origin()):
			t.Errorf("%s %s: reason %q does not name %s", c.proto, c.to, d.Reason, d.Rule.Origin())
		}
	}
}

func TestNamesCountOnceTheyHaveAnAddress(t *testing.T) {
	p := parse(t, mixed)
	public := addr("1.2.3.4")
	for _, c := range []struct {
		proto policy.Proto
		to    tunnel.Target
		allow bool
	}{
		{policy.TCP, tunnel.Target{Host: "a.Example.com.", Addr: public, Port: 443}, true},
		{policy.TCP, tunnel.Target{Host: "old.example.com", Addr: addr("47.74.211.17"), Port: 443}, false},
		{policy.TCP, tunnel.Target{Host: "a.example.com", Addr: addr("9.9.9.9"), Port: 443}, false},
		{policy.TCP, tunnel.Target{Host: "a.example.com", Addr: addr("127.0.0.1"), Port: 443}, false},
		{policy.TCP, tunnel.Target{Host: "a.example.com", Addr: addr("::ffff:1.2.3.4"), Port: 443}, false},
		// An undecided name is decided by its address, never passed on.
		{policy.TCP, tunnel.Target{Host: "else.example", Addr: public, Port: 443}, false},
		{policy.TCP, tunnel.Target{Host: "else.example", Addr: addr("47.74.211.17"), Port: 443}, true},
	} {
		if d := p.Decide(c.proto, c.to); d.Allow != c.allow || d.Undecided {
			t.Errorf("%+v: %+v, want allow %v", c.to, d, c.allow)
		}
	}
}

func TestTargetsThatAreNoneAreRefused(t *testing.T) {
	p := parse(t, "rules: [{allow: any, to: any}]")
	for _, to := range []tunnel.Target{
		{},
		{Port: 1},
		{Host: ".", Port: 1},
		{Host: "a.example"},
		{Addr: addr("8.8.8.8")},
		{Host: strings.Repeat("a.", 127), Port: 1, Addr: addr("8.8.8.8")}, // 253 without its dot: fits
		{Host: strings.Repeat("a.", 127) + "b", Port: 1},
		{Host: strings.Repeat("x", 100_000), Port: 1},
	} {
		fits := len(to.Host) == 254
		if d := p.Decide(policy.TCP, to); d.Allow != fits || d.Reason == "" {
			t.Errorf("%.40q port %d: %+v, want allow %v", to.Host, to.Port, d, fits)
		}
	}
	var none *policy.Policy
	if d := none.Decide(policy.TCP, target(t, "8.8.8.8:1")); d.Allow || d.Reason == "" {
		t.Errorf("without a policy: %+v", d)
	}
	if d := parse(t, "").Decide(policy.TCP, target(t, "8.8.8.8:1")); d.Allow {
		t.Errorf("the empty policy: %+v", d)
	}
}

// The seed's tables, written out again by hand.
func TestProfilesAreTheSeedsTables(t *testing.T) {
	type opening struct {
		proto policy.Proto
		addr  string
		ports []uint16
		tag   string
	}
	messages := []uint16{443, 4000}
	for port := uint16(3433); port <= 3460; port++ {
		messages = append(messages, port)
	}
	var media []uint16
	for port := uint16(3478); port <= 3500; port++ {
		media = append(media, port)
	}
	edge := []opening{
		{policy.TCP, "47.74.211.17", []uint16{443}, "edge"}, {policy.TCP, "52.80.192.229", []uint16{443}, "edge"},
		{policy.TCP, "52.52.84.170", []uint16{443}, "edge"}, {policy.TCP, "47.96.234.219", []uint16{443}, "edge"},
	}
	tables := map[string][]opening{
		"agora-mainland-test": append([]opening{
			{policy.TCP, "150.138.153.78", messages, "messages+media"}, {policy.UDP, "150.138.153.78", media, "media"},
		}, edge...),
		"agora-overseas-test": append([]opening{
			{policy.TCP, "23.236.115.138", messages, "messages+media"}, {policy.TCP, "148.153.66.218", messages, "messages+media"},
			{policy.UDP, "23.236.115.138", media, "media"}, {policy.UDP, "148.153.66.218", media, "media"},
		}, edge...),
	}
	for name, table := range tables {
		p := parse(t, "profiles: ["+name+"]")
		want := map[string]string{}
		addrs := map[string]bool{"150.138.153.79": true, "23.236.115.138": true, "150.138.153.78": true}
		for _, o := range table {
			addrs[o.addr] = true
			for _, port := range o.ports {
				want[fmt.Sprint(o.proto, o.addr, port)] = o.tag
			}
		}
		for a := range addrs {
			for _, proto := range []policy.Proto{policy.TCP, policy.UDP} {
				for port := 1; port <= 65535; port++ {
					d := p.Decide(proto, tunnel.Target{Addr: addr(a), Port: uint16(port)})
					if port < 3400 && port != 443 && d.Allow || port >= 3400 && port < 4100 || port == 443 || d.Allow {
						tag, ok := want[fmt.Sprint(proto, a, port)]
						if d.Allow != ok || d.Tag != tag {
							t.Fatalf("%s: %s %s:%d: %+v, want allow %v with tag %q", name, proto, a, port, d, ok, tag)
						}
						delete(want, fmt.Sprint(proto, a, port))
					}
				}
			}
		}
		if len(want) > 0 {
			t.Errorf("%s: not asked about %v", name, want)
		}
	}
	if got := policy.Profiles(); !slices.Equal(got, []string{"agora-mainland-test", "agora-overseas-test", "public"}) {
		t.Errorf("profiles: %v", got)
	}
}

// TestDecideAgreesWithReadingTheRulesOneByOne checks the tables against the
// plainest way to decide.
func TestDecideAgreesWithReadingTheRulesOneByOne(t *testing.T) {
	var c policy.Config
	seed := uint32(1)
	next := func(n uint32) uint32 { seed = seed*1664525 + 1013904223; return (seed >> 8) % n }
	for i := range 60 {
		prefix := netip.PrefixFrom(netip.AddrFrom4([4]byte{8, byte(next(4)), byte(next(4)), byte(next(4))}), 8+int(next(25))).Masked()
		low := uint16(1 + next(40))
		c.Rules = append(c.Rules, policy.Rule{
			Allow: next(3) > 0, Proto: policy.Proto(1 + next(3)), To: []policy.Dest{{Prefix: prefix}},
			Ports: policy.Ports{{Low: low, High: low + uint16(next(20))}}, Line: i + 1,
		})
	}
	p, err := policy.New(c)
	if err != nil {
		t.Fatal(err)
	}
	for range 20_000 {
		to := tunnel.Target{Addr: netip.AddrFrom4([4]byte{8, byte(next(4)), byte(next(4)), byte(next(4))}), Port: uint16(1 + next(60))}
		proto := policy.Proto(1 + next(2))
		want := 0
		for _, deny := range []bool{true, false} {
			for _, r := range c.Rules {
				if want == 0 && r.Allow != deny && r.Proto&proto != 0 && r.To[0].Prefix.Contains(to.Addr) && r.Ports.Contains(to.Port) {
					want = r.Line
				}
			}
		}
		d, got := p.Decide(proto, to), 0
		if d.Rule != nil {
			got = d.Rule.Line
		}
		if got != want || d.Allow != (want > 0 && c.Rules[want-1].Allow) {
			t.Fatalf("%s %s: rule %d, want %d", proto, to, got, want)
		}
	}
}

func TestDecideAllocatesNothing(t *testing.T) {
	p := parse(t, mixed)
	for _, to := range []tunnel.Target{
		target(t, "150.138.153.78:3479"),
		target(t, "10.0.0.1:1"),
		target(t, "8.8.8.8:1"),
		target(t, "[64:ff9b::1]:1"),
		target(t, "A.example.com:443"),
		{Host: "A.very.Deep.example.com.", Addr: addr("1.2.3.4"), Port: 443},
	} {
		if n := testing.AllocsPerRun(100, func() { p.Decide(policy.UDP, to) }); n != 0 {
			t.Errorf("%s: %v allocations", to, n)
		}
	}
}

func BenchmarkDecide(b *testing.B) {
	c := policy.Config{Profiles: policy.Profiles()}
	for i := range 10_000 {
		a := netip.AddrFrom4([4]byte{20, byte(i >> 8), byte(i), 0})
		c.Rules = append(c.Rules, policy.Rule{Proto: policy.Any, To: []policy.Dest{{Prefix: netip.PrefixFrom(a, 24)}}})
	}
	c.Rules = append(c.Rules, policy.Rule{Allow: true, Proto: policy.TCP, To: []policy.Dest{{Name: "*.example.com"}}})
	p, err := policy.New(c)
	if err != nil {
		b.Fatal(err)
	}
	for name, to := range map[string]tunnel.Target{
		"address":             target(b, "150.138.153.78:3479"),
		"special":             target(b, "10.0.0.1:1"),
		"name":                target(b, "media.eu.example.com:443"),
		"name-and-an-address": {Host: "media.eu.example.com", Addr: addr("150.138.153.78"), Port: 3479},
	} {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				p.Decide(policy.UDP, to)
			}
		})
	}
}

func FuzzDecide(f *testing.F) {
	p := parse(f, mixed+"  - allow: any\n    to: public\n    ports: 5000\n")
	f.Add("a.example.com", []byte{1, 2, 3, 4}, uint16(443), true)
	f.Add("", []byte{10, 20, 0, 7}, uint16(443), true)
	f.Add("127.0.0.1", []byte{}, uint16(443), true)
	f.Fuzz(func(t *testing.T, host string, ip []byte, port uint16, tcp bool) {
		to := tunnel.Target{Host: host, Port: port}
		to.Addr, _ = netip.AddrFromSlice(ip)
		proto := policy.UDP
		if tcp {
			proto = policy.TCP
		}
		d := p.Decide(proto, to)
		if d.Reason == "" || d.Undecided && (!d.Allow || to.Addr.IsValid()) {
			t.Fatalf("%+v: %+v", to, d)
		}
		if _, special := policy.Special(to.Addr); special && d.Allow && !netip.MustParsePrefix("10.20.0.0/16").Contains(to.Addr) {
			t.Fatalf("special %s is allowed: %+v", to.Addr, d)
		}
		if !d.Allow {
			err := policy.Denied(proto, to, d)
			if text := err.Error(); len(text) > 1024 || strings.ContainsAny(text, "\r\n\x1b\x00") || tunnel.CodeOf(err) != tunnel.PolicyDenied {
				t.Fatalf("%q", text)
			}
		}
	})
}
