package policy_test

import (
	"net/netip"
	"strings"
	"testing"

	"culvert/policy"
	"culvert/tunnel"
)

// specials holds the edges of every special block, and for each what an
// operator must list to lift it.
var specials = []struct {
	class string // a part of it
	list  string // "": can not be lifted
	addrs []string
}{
	{"this network", "0.0.0.0/8", []string{"0.0.0.0", "0.255.255.255"}},
	{"private", "10.0.0.0/8", []string{"10.0.0.0", "10.255.255.255"}},
	{"carrier NAT", "100.64.0.0/10", []string{"100.64.0.0", "100.127.255.255"}},
	{"loopback", "127.0.0.0/8", []string{"127.0.0.1", "127.255.255.255", "127.0.0.53"}},
	{"link-local", "169.254.0.0/16", []string{"169.254.0.0", "169.254.255.255"}},
	{"private", "172.16.0.0/12", []string{"172.16.0.0", "172.31.255.255"}},
	{"protocol assignments", "192.0.0.0/24", []string{"192.0.0.0", "192.0.0.255"}},
	{"TEST-NET-1", "192.0.2.0/24", []string{"192.0.2.0", "192.0.2.255"}},
	{"6to4 relay", "192.88.99.0/24", []string{"192.88.99.1"}},
	{"private", "192.168.0.0/16", []string{"192.168.0.0", "192.168.255.255"}},
	{"benchmarks", "198.18.0.0/15", []string{"198.18.0.0", "198.19.255.255"}},
	{"TEST-NET-2", "198.51.100.0/24", []string{"198.51.100.0", "198.51.100.255"}},
	{"TEST-NET-3", "203.0.113.0/24", []string{"203.0.113.0", "203.0.113.255"}},
	{"multicast", "224.0.0.0/4", []string{"224.0.0.0", "239.255.255.255", "224.0.0.251"}},
	{"reserved", "240.0.0.0/4", []string{"240.0.0.0", "255.255.255.254"}},
	{"broadcast", "255.255.255.255", []string{"255.255.255.255"}},
	{"metadata", "169.254.169.254", []string{"169.254.169.254"}},
	{"metadata", "169.254.170.2", []string{"169.254.170.2"}},
	{"metadata", "169.254.170.23", []string{"169.254.170.23"}},
	{"metadata", "168.63.129.16", []string{"168.63.129.16"}},
	{"metadata", "100.100.100.200", []string{"100.100.100.200"}},
	{"metadata", "192.0.0.192", []string{"192.0.0.192"}},

	{"unspecified", "::/128", []string{"::"}},
	{"loopback", "::1/128", []string{"::1"}},
	{"IPv4-compatible", "::/96", []string{"::8.8.8.8", "::1.1.1.1"}},
	{"IPv4-mapped", "::ffff:0:0/96", []string{"::ffff:8.8.8.8", "::ffff:1.1.1.1"}},
	{"IPv4-translated", "::ffff:0:0:0/96", []string{"::ffff:0:8.8.8.8"}},
	{"reserved", "::/8", []string{"0:1::", "ff:ffff::1"}},
	{"NAT64", "64:ff9b::/96", []string{"64:ff9b::8.8.8.8"}},
	{"local NAT64", "64:ff9b:1::/48", []string{"64:ff9b:1::", "64:ff9b:1:ffff::1", "64:ff9b:1::10.0.0.1"}},
	{"discard", "100::/64", []string{"100::", "100::ffff"}},
	{"reserved", "100:0:0:1::/64", []string{"100:0:0:1::1"}},
	{"Teredo", "2001::/32", []string{"2001:0:4136:e378:8000:63bf:f7f7:f7f7"}}, // holds 8.8.8.8
	{"protocol assignments", "2001::/23", []string{"2001:2::1", "2001:10::1", "2001:20::1", "2001:1ff:ffff::1"}},
	{"documentation", "2001:db8::/32", []string{"2001:db8::1"}},
	{"6to4", "2002::/16", []string{"2002:808:808::1"}},
	{"documentation", "3fff::/20", []string{"3fff::1", "3fff:fff::1"}},
	{"segment routing", "5f00::/16", []string{"5f00::1"}},
	{"reserved", "4000::/3", []string{"4000::1", "5eff::1"}},
	{"reserved", "8000::/1", []string{"8000::1", "fe00::1"}},
	{"private", "fc00::/7", []string{"fc00::", "fdff:ffff::1"}},
	{"metadata", "fd00:ec2::254", []string{"fd00:ec2::254"}},
	{"metadata", "fd20:ce::254", []string{"fd20:ce::254"}},
	{"link-local", "fe80::/10", []string{"fe80::1", "febf::1"}},
	{"site-local", "fec0::/10", []string{"fec0::1", "feff::1"}},
	{"multicast", "ff00::/8", []string{"ff00::", "ff02::1", "ffff::1"}},

	{"zone", "", []string{"fe80::1%eth0", "2606:4700::1111%eth0"}},
}

func TestSpecialAddressesAreRefusedUnlessListed(t *testing.T) {
	allowAll := policy.Rule{Allow: true, Proto: policy.Any, To: []policy.Dest{{Word: "any"}}}
	open, err := policy.New(policy.Config{Profiles: []string{"public"}, Rules: []policy.Rule{allowAll}})
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range specials {
		var lifting *policy.Policy
		if s.list != "" {
			lifting = parse(t, `special: ["`+s.list+`"]`+"\nrules: [{allow: any, to: any}]")
		}
		for _, text := range s.addrs {
			a := addr(text)
			class, special := policy.Special(a)
			if !special || !strings.Contains(class, s.class) {
				t.Errorf("Special(%s) = %q, %v; want one with %q", a, class, special, s.class)
			}
			for _, proto := range []policy.Proto{policy.TCP, policy.UDP} {
				for _, to := range []tunnel.Target{
					{Addr: a, Port: 443},
					{Host: text, Port: 443},                      // a literal that came as a name
					{Host: "innocent.example", Addr: a, Port: 1}, // through DNS
				} {
					if d := open.Decide(proto, to); d.Allow || d.Class != class || d.Rule != nil {
						t.Errorf("%s %+v: got %+v, want it refused as %s", proto, to, d, class)
					}
					if lifting != nil {
						if d := lifting.Decide(proto, to); !d.Allow {
							t.Errorf("%s %+v with %s listed: got %+v, want it allowed", proto, to, s.list, d)
						}
					}
				}
			}
		}
	}
}

func TestPublicAddressesAreNotSpecial(t *testing.T) {
	p := parse(t, "profiles: [public]")
	for _, text := range []string{
		"1.0.0.0", "8.8.8.8", "9.255.255.255", "11.0.0.0", "100.63.255.255", "100.128.0.0", "126.255.255.255", "128.0.0.0",
		"168.63.129.15", "168.63.129.17", "169.253.255.255", "169.255.0.0", "172.15.255.255", "172.32.0.0", "192.0.1.0",
		"192.0.3.0", "192.167.255.255", "192.169.0.0", "198.17.255.255", "198.20.0.0", "198.51.101.0", "203.0.112.255",
		"203.0.114.0", "223.255.255.255", "150.138.153.78",
		"2000::1", "2001:200::1", "2001:db7::1", "2001:db9::1", "2003::1", "2606:4700::1111", "3ffe::1", "3fff:1000::1",
	} {
		a := addr(text)
		if class, special := policy.Special(a); special {
			t.Errorf("Special(%s) = %q", a, class)
		}
		for _, proto := range []policy.Proto{policy.TCP, policy.UDP} {
			if d := p.Decide(proto, tunnel.Target{Addr: a, Port: 9}); !d.Allow || d.Tag != "" {
				t.Errorf("%s to %s: %+v, want it allowed without a tag", proto, a, d)
			}
		}
	}
	if class, special := policy.Special(netip.Addr{}); special {
		t.Errorf("the zero address is %q", class)
	}
}

func TestFormsAreJudgedByTheAddressInsideToo(t *testing.T) {
	forms := map[string]string{ // of 10.0.0.1
		"::ffff:0:0/96":   "::ffff:10.0.0.1",
		"::ffff:0:0:0/96": "::ffff:0:10.0.0.1",
		"::/96":           "::10.0.0.1",
		"64:ff9b::/96":    "64:ff9b::10.0.0.1",
		"2002::/16":       "2002:a00:1::1",
		"2001::/32":       "2001:0:808:808::f5ff:fffe",
	}
	for form, text := range forms {
		to := tunnel.Target{Addr: addr(text), Port: 443}
		for _, c := range []struct {
			special string
			allow   bool
		}{
			{"[]", false},
			{"[10.0.0.0/8]", false}, // the form is not listed
			{`["` + form + `"]`, false},
			{`["` + form + `", 10.0.0.0/8]`, true},
			{`["::/0"]`, false},
		} {
			p := parse(t, "special: "+c.special+"\nrules: [{allow: any, to: any}]")
			if d := p.Decide(policy.UDP, to); d.Allow != c.allow {
				t.Errorf("%s with special %s: %+v, want allow %v", text, c.special, d, c.allow)
			}
		}
		p := parse(t, `special: ["`+form+`", 10.0.0.0/8]`+"\nrules: [{allow: any, to: any}, {deny: tcp, to: 10.0.0.1}]")
		if d := p.Decide(policy.TCP, to); d.Allow || d.Rule == nil {
			t.Errorf("%s: %+v, want the deny rule for the address inside to decide", text, d)
		}
	}
}

func TestAllowRulesForTheAddressInsideCountOnlyWhereItIsTranslated(t *testing.T) {
	p := parse(t, `
special: ["::ffff:0:0/96", "64:ff9b::/96", "2002::/16", "::/96", "2001::/32"]
rules: [{allow: udp, to: 8.8.8.8}]`)
	for text, allow := range map[string]bool{
		"::ffff:8.8.8.8":                       true,
		"64:ff9b::8.8.8.8":                     true,
		"2002:808:808::1":                      false,
		"::8.8.8.8":                            false,
		"2001:0:4136:e378:8000:63bf:f7f7:f7f7": false,
		"64:ff9b::8.8.4.4":                     false,
	} {
		if d := p.Decide(policy.UDP, tunnel.Target{Addr: addr(text), Port: 53}); d.Allow != allow {
			t.Errorf("%s: %+v, want allow %v", text, d, allow)
		}
	}
}

func TestMetadataIsLiftedOnlyByItsOwnAddress(t *testing.T) {
	for _, text := range []string{"169.254.169.254", "100.100.100.200", "192.0.0.192", "168.63.129.16", "fd00:ec2::254"} {
		for _, wide := range []string{`0.0.0.0/0", "::/0`, "169.254.0.0/16", "169.254.169.254/31", "100.64.0.0/10", "fc00::/7", "fd00:ec2::/64"} {
			p := parse(t, `special: ["`+wide+`"]`+"\nrules: [{allow: any, to: any}]")
			if d := p.Decide(policy.TCP, tunnel.Target{Addr: addr(text), Port: 80}); d.Allow {
				t.Errorf("%s is lifted by %s", text, wide)
			}
		}
	}
}

func TestZonesCanNotBeListed(t *testing.T) {
	p := parse(t, `special: ["::/0", "fe80::/10"]`+"\nrules: [{allow: any, to: any}]")
	for _, text := range []string{"fe80::1%eth0", "2606:4700::1111%1"} {
		if d := p.Decide(policy.UDP, tunnel.Target{Addr: addr(text), Port: 1}); d.Allow {
			t.Errorf("%s: %+v", text, d)
		}
	}
}

func TestListingNeedsAnAllowRuleAsWell(t *testing.T) {
	to := tunnel.Target{Addr: addr("10.0.0.1"), Port: 443}
	if d := parse(t, "special: [10.0.0.0/8]\nprofiles: [public]").Decide(policy.TCP, to); d.Allow {
		t.Errorf("listed and profile public: %+v, want it refused: it is not public", d)
	}
	if d := parse(t, "rules: [{allow: any, to: 10.0.0.1}]").Decide(policy.TCP, to); d.Allow || d.Class == "" {
		t.Errorf("allowed and not listed: %+v, want it refused as special", d)
	}
	if d := parse(t, "special: [10.0.0.0/8]\nrules: [{allow: tcp, to: '*.corp.example'}]").Decide(policy.TCP,
		tunnel.Target{Host: "a.corp.example", Addr: to.Addr, Port: 443}); !d.Allow {
		t.Errorf("listed and allowed by name: %+v, want it allowed", d)
	}
}
