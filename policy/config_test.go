package policy_test

import (
	"fmt"
	"net/netip"
	"os"
	"reflect"
	"strings"
	"testing"

	"go.yaml.in/yaml/v3"

	"culvert/policy"
	"culvert/tunnel"
)

func TestBadPoliciesNameTheLineAndWhatWasMeant(t *testing.T) {
	for _, c := range []struct {
		text string
		line int
		want []string // parts of the sentence
	}{
		{"profiles: [public]\nruels: []", 2, []string{`"ruels"`, `did you mean "rules"?`}},
		{"profiles: [public]\nprofiles: [public]", 2, []string{"twice", "line 1"}},
		{"profiles:\n  - publik", 2, []string{`did you mean "public"?`, "agora-mainland-test"}},
		{"profiles: [a, b]", 1, []string{`"a"`}},
		{"profiles: {a: b}", 1, []string{`"profiles"`}},
		{"profiles: [[public]]", 1, []string{`"profiles"`}},
		{"special:\n- 10.0.0.0/8\n- 10.0.0.1/8", 3, []string{"10.0.0.0/8 or 10.0.0.1"}},
		{"special: example.com", 1, []string{"is not an address or a CIDR"}},
		{"special: [fe80::1%eth0]", 1, []string{"zone"}},
		{"special:", 1, []string{"no value"}},
		{"rules: 5", 1, []string{"not a list"}},
		{"rules:\n  allow: tcp\n  to: any", 2, []string{"dash"}},
		{"rules:\n- 5", 2, []string{"not a mapping"}},
		{"rules:\n-", 2, []string{"neither allows nor denies"}},
		{"rules:\n- to: any", 2, []string{"neither allows nor denies"}},
		{"rules:\n- allow: tcp", 2, []string{"no destination"}},
		{"rules:\n- allow: tcp\n  to: []", 2, []string{"no destination"}},
		{"rules:\n- allow: tcp\n  deny: udp\n  to: any", 3, []string{"both"}},
		{"rules:\n- allow: tpc\n  to: any", 2, []string{`did you mean "tcp"?`}},
		{"rules:\n- allow: [tcp]\n  to: any", 2, []string{`"allow"`}},
		{"rules:\n- allow:\n  to: any", 2, []string{`"allow" has no value`}},
		{"rules:\n- allow: tcp\n  to: any\n  prots: 443", 4, []string{`did you mean "ports"?`}},
		{"rules:\n- allow: tcp\n  to: any\n  ports: 0", 4, []string{"1 to 65535"}},
		{"rules:\n- allow: tcp\n  to: any\n  ports: 65536", 4, []string{"1 to 65535"}},
		{"rules:\n- allow: tcp\n  to: any\n  ports: 0x1bb", 4, []string{`"0x1bb"`}},
		{"rules:\n- allow: tcp\n  to: any\n  ports: +443", 4, []string{`"+443"`}},
		{"rules:\n- allow: tcp\n  to: any\n  ports: 443,", 4, []string{`""`}},
		{"rules:\n- allow: tcp\n  to: any\n  ports: 90-80", 4, []string{"did you mean 80-90?"}},
		{"rules:\n- allow: tcp\n  to: any\n  ports:\n  - 443\n  - https", 6, []string{`"https"`}},
		{"rules:\n- allow: tcp\n  to:\n  - 1.2.3.4\n  - 1.2.3.400", 5, []string{`"1.2.3.400"`}},
		{"rules:\n- allow: tcp\n  to: 1.2.3.4:443", 3, []string{"ports", `"1.2.3.4"`}},
		{"rules:\n- allow: tcp\n  to: example.com:443", 3, []string{"ports", `"example.com"`}},
		{"rules:\n- allow: tcp\n  to: '*'", 3, []string{`did you mean "any"?`}},
		{"rules:\n- allow: tcp\n  to: 'a.*.com'", 3, []string{"before the first dot"}},
		{"rules:\n- allow: tcp\n  to: '*a.com'", 3, []string{"before the first dot"}},
		{"rules:\n- allow: tcp\n  to: a..com", 3, []string{"1 to 63"}},
		{"rules:\n- allow: tcp\n  to: ''", 3, []string{"1 to 63"}},
		{"rules:\n- allow: tcp\n  to: bücher.example", 3, []string{"xn--"}},
		{"rules:\n- allow: tcp\n  to: 'a b'", 3, []string{"not a host name"}},
		{"rules:\n- allow: tcp\n  to: " + strings.Repeat("abc.", 100) + "d", 3, []string{"253"}},
		{"rules:\n- allow: tcp\n  to: any\n  tag: Media!", 4, []string{"not a tag"}},
		{"rules:\n- allow: tcp\n  to: any\n  tag: " + strings.Repeat("a", 33), 4, []string{"32"}},
		{"rules:\n- allow: tcp\n  to: any\n  name: \"a\\nb\"", 4, []string{"one line"}},
		{"rules:\n- allow: tcp\n  to: any\n  name: " + strings.Repeat("a", 65), 4, []string{"64"}},
		{"hello", 1, []string{"not a mapping"}},
		{"[]", 1, []string{"not a mapping"}},
		{"? [a]\n: b", 1, []string{"not a word"}},
		{"rules: []\n---\nrules: []", 2, []string{"second document"}},
		// What the YAML parser itself finds.
		{"rules:\n- allow: tcp\n  to: *.example.com", 3, []string{"quotes"}},
		{"special: [::1]", 1, []string{"quotes"}},
		{"profiles: []\nspecial: [::1]", 2, []string{"quotes"}},
		{"rules: []\n\tspecial: []", 2, nil},
		{"rules: []\nspecial: [1.1.1.1\n", 2, nil},
		{"rules: []\n---\n\t*", 3, nil},
	} {
		_, err := policy.Parse([]byte(c.text), "p.yaml")
		if err == nil {
			t.Errorf("%q: no error", c.text)
			continue
		}
		if tunnel.CodeOf(err) != tunnel.PolicyInvalid {
			t.Errorf("%q: code %s", c.text, tunnel.CodeOf(err))
		}
		for _, part := range append(c.want, fmt.Sprintf("p.yaml: line %d: ", c.line)) {
			if !strings.Contains(err.Error(), part) {
				t.Errorf("%q: %q does not say %q", c.text, err, part)
			}
		}
	}
}

func TestSectionIsStrictInsideALaxDecoder(t *testing.T) {
	var file struct {
		Front  any           `yaml:"front"`
		Policy policy.Config `yaml:"policy"`
	}
	text := "front: {}\nother: 1\npolicy:\n  profiles: public\n  rules:\n  - allow: udp\n    to: any\n    port: 1\n"
	err := yaml.Unmarshal([]byte(text), &file)
	if err == nil || !strings.Contains(err.Error(), `line 8: "port" is not a key`) || tunnel.CodeOf(err) != tunnel.PolicyInvalid {
		t.Errorf("got %v", err)
	}
	if err := yaml.Unmarshal([]byte(strings.Replace(text, "port:", "ports:", 1)), &file); err != nil {
		t.Fatal(err)
	}
	if r := file.Policy.Rules; len(r) != 1 || r[0].Line != 6 {
		t.Errorf("rules %+v, want one of line 6", r)
	}
	if err := yaml.Unmarshal([]byte("policy:\n"), &file); err != nil {
		t.Errorf("an empty section: %v", err)
	}
}

func TestTheExampleOfThePackageWorks(t *testing.T) {
	text, err := os.ReadFile("doc.go")
	if err != nil {
		t.Fatal(err)
	}
	var example strings.Builder
	for line := range strings.Lines(string(text)) {
		if line, ok := strings.CutPrefix(line, "//\t"); ok {
			example.WriteString(line)
		}
	}
	var file struct{ Policy policy.Config }
	if err := yaml.Unmarshal([]byte(example.String()), &file); err != nil {
		t.Fatal(err)
	}
	p, err := policy.New(file.Policy)
	if err != nil {
		t.Fatal(err)
	}
	for to, allow := range map[string]bool{"10.20.0.7:443": true, "10.20.0.8:443": false, "a.example.com:8100": true, "old.example.com:443": false} {
		if d := p.Decide(policy.TCP, target(t, to)); d.Allow != allow {
			t.Errorf("%s: %+v", to, d)
		}
	}
}

func TestAliasesAreFollowed(t *testing.T) {
	p := parse(t, `
rules:
- {allow: tcp, to: &hosts [1.1.1.1, 1.0.0.1], ports: &ports 53}
- allow: udp
  to: *hosts
  ports: *ports
`)
	if d := p.Decide(policy.UDP, target(t, "1.0.0.1:53")); !d.Allow {
		t.Errorf("%+v", d)
	}
}

func TestConfigSurvivesWritingAndReading(t *testing.T) {
	var c policy.Config
	if err := yaml.Unmarshal([]byte(mixed), &c); err != nil {
		t.Fatal(err)
	}
	c.Special = append(c.Special, netip.MustParsePrefix("::/96"))
	c.AllowCIDR(netip.MustParsePrefix("::1/128"))
	text, err := yaml.Marshal(c)
	if err != nil {
		t.Fatal(err)
	}
	var again policy.Config
	if err := yaml.Unmarshal(text, &again); err != nil {
		t.Fatalf("%v in\n%s", err, text)
	}
	for i := range c.Rules {
		c.Rules[i].Line, again.Rules[i].Line = 0, 0
	}
	if !reflect.DeepEqual(c, again) {
		t.Errorf("wrote\n%s\nwhich is\n%+v\nnot\n%+v", text, again, c)
	}
}

func TestAllowCIDRMakesItReachable(t *testing.T) {
	for _, c := range []struct {
		cidr    string
		special bool
	}{
		{"127.0.0.0/8", true}, {"10.1.2.3/32", true}, {"169.254.169.254/32", true}, {"::1/128", true}, {"fd00::/8", true},
		{"9.0.0.0/8", false}, {"8.0.0.0/6", true}, {"0.0.0.0/0", true}, {"2000::/3", true}, {"2606::/16", false}, {"::/0", true},
		{"::ffff:0:0/96", true},
	} {
		prefix := netip.MustParsePrefix(c.cidr)
		var config policy.Config
		config.AllowCIDR(prefix)
		if got := len(config.Special) == 1; got != c.special {
			t.Errorf("%s: special lists %v, want %v", c.cidr, config.Special, c.special)
		}
		p, err := policy.New(config)
		if err != nil {
			t.Fatal(err)
		}
		a := prefix.Addr()
		if prefix.Addr().Is4In6() { // the IPv4 address inside is judged as well
			a = addr("::ffff:8.8.8.8")
		}
		for _, proto := range []policy.Proto{policy.TCP, policy.UDP} {
			if d := p.Decide(proto, tunnel.Target{Addr: a, Port: 1}); !d.Allow {
				t.Errorf("%s: %s to %s: %+v", c.cidr, proto, a, d)
			}
		}
	}
}

func TestPoliciesMadeByProgramsAreChecked(t *testing.T) {
	good := policy.Rule{Proto: policy.TCP, To: []policy.Dest{{Word: "any"}}}
	for name, c := range map[string]policy.Config{
		"no protocol":      {Rules: []policy.Rule{{To: good.To}}},
		"no destination":   {Rules: []policy.Rule{good, {Proto: policy.TCP}}},
		"empty":            {Rules: []policy.Rule{{Proto: policy.TCP, To: []policy.Dest{{}}}}},
		"plain form":       {Rules: []policy.Rule{{Proto: policy.TCP, To: []policy.Dest{{Name: "EXAMPLE.com"}}}}},
		`"10.0.0.1/8"`:     {Rules: []policy.Rule{{Proto: policy.TCP, To: []policy.Dest{{Prefix: netip.MustParsePrefix("10.0.0.1/8")}}}}},
		"port range":       {Rules: []policy.Rule{{Proto: policy.TCP, To: good.To, Ports: policy.Ports{{Low: 2, High: 1}}}}},
		"not a profile":    {Profiles: []string{"x"}},
		"empty CIDR":       {Special: make([]netip.Prefix, 1)},
		"bad tag":          {Rules: []policy.Rule{{Proto: policy.TCP, To: good.To, Tag: "a b"}}},
		"500000 destinati": {Rules: []policy.Rule{{Proto: policy.TCP, To: make([]policy.Dest, 500_001)}}},
	} {
		if strings.HasPrefix(name, "500000") {
			for i := range c.Rules[0].To {
				c.Rules[0].To[i].Word = "any"
			}
		}
		_, err := policy.New(c)
		if tunnel.CodeOf(err) != tunnel.PolicyInvalid || !strings.Contains(err.Error(), name) {
			t.Errorf("%s: got %v", name, err)
		}
	}
}

func TestPortsAreJoined(t *testing.T) {
	for text, want := range map[string]string{
		"443,4000,3433-3460": "443,3433-3460,4000",
		" 5 - 7 , 1-4":       "1-7",
		"1-65535,80":         "1-65535",
		"65535,65534":        "65534-65535",
	} {
		got, err := policy.ParsePorts(text)
		if err != nil || got.String() != want {
			t.Errorf("%q: %q, %v; want %q", text, got, err, want)
		}
	}
}

func FuzzParse(f *testing.F) {
	f.Add([]byte(mixed))
	f.Add([]byte("special: [\"::1\", 10.0.0.0/8]\nrules:\n- {deny: udp, to: &a [1.1.1.1, public], ports: 1-2}\n- {allow: any, to: *a}\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		p, err := policy.Parse(data, "f")
		if (p == nil) == (err == nil) {
			t.Fatalf("policy %v and error %v", p, err)
		}
		if err != nil {
			if tunnel.CodeOf(err) != tunnel.PolicyInvalid || strings.ContainsAny(err.Error(), "\r\n\x1b\x00") {
				t.Fatalf("%s: %q", tunnel.CodeOf(err), err)
			}
			return
		}
		text, err := yaml.Marshal(policy.Config{Profiles: p.Profiles(), Special: p.Special(), Rules: operators(p)})
		if err != nil {
			t.Fatal(err)
		}
		again, err := policy.Parse(text, "f")
		if err != nil {
			t.Fatalf("%v in\n%s", err, text)
		}
		for _, to := range []string{"a.example.com:443", "1.1.1.1:1", "10.0.0.1:443", "[::1]:2"} {
			a, b := p.Decide(policy.UDP, target(t, to)), again.Decide(policy.UDP, target(t, to))
			if a.Allow != b.Allow || a.Undecided != b.Undecided || a.Tag != b.Tag {
				t.Fatalf("%s: %+v, then %+v", to, a, b)
			}
		}
	})
}

// operators returns the rules that are not of a profile.
func operators(p *policy.Policy) []policy.Rule {
	var out []policy.Rule
	for _, r := range p.Rules() {
		if r.Profile == "" {
			out = append(out, r)
		}
	}
	return out
}
