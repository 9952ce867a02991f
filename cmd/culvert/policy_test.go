package main

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/urfave/cli/v2"

	"culvert/tunnel"
)

const policyTestConfig = `
cloud_proxy: {address: 198.51.100.9:443, pin: sha256/x}
identity: {app: clinic}
policy:
  profiles: [agora-mainland-test]
  rules:
    - deny: tcp
      to: "*.example.com"
front: {listen: 127.0.0.1:1080}
`

// runPolicy runs culvert policy ARGS and returns what it prints.
func runPolicy(t *testing.T, args ...string) (string, error) {
	t.Helper()
	t.Setenv("CULVERT_CONFIG", "")
	var out bytes.Buffer
	app := &cli.App{Name: "culvert", Writer: &out, ErrWriter: &out, Commands: []*cli.Command{policyCommand()}}
	err := app.Run(append([]string{"culvert", "policy"}, args...))
	return out.String(), err
}

func policyTestFile(t *testing.T, text string) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "culvert.yaml")
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}

func TestPolicyTestSaysWhichRuleDecides(t *testing.T) {
	file := policyTestFile(t, policyTestConfig)
	bare := policyTestFile(t, "rules: [{allow: udp, to: 8.8.8.8}]")
	for _, c := range []struct {
		args []string
		want string // a part of the output
		code tunnel.Code
	}{
		{[]string{"-c", file, "udp", "150.138.153.78:3479"}, "allowed: udp 150.138.153.78:3479: by the rule: allow udp to 150.138.153.78 ports 3478-3500 (profile agora-mainland-test); its traffic is tagged media\n", ""},
		{[]string{"-c", file, "tcp", "a.example.com:443"}, file + " line 7)", tunnel.PolicyDenied},
		{[]string{"-c", file, "tcp", "else.example:443"}, "undecided: tcp else.example:443: not decided here", ""},
		{[]string{"-c", file, "tcp", "10.0.0.1:443"}, "private (RFC 1918)", tunnel.PolicyDenied},
		{[]string{"-c", bare, "udp", "8.8.8.8:1"}, bare + " line 1)", ""},
		{[]string{"--profile", "public", "udp", "8.8.8.8:1"}, "allowed", ""},
		{[]string{"-c", bare, "--profile", "public", "tcp", "8.8.8.8:1"}, "profile public", ""},
		{[]string{"udp", "8.8.8.8:1"}, "", tunnel.ConfigInvalid},
		{[]string{"--profile", "public", "any", "8.8.8.8:1"}, "", tunnel.ConfigInvalid},
		{[]string{"--profile", "public", "udp", "8.8.8.8"}, "", tunnel.ConfigInvalid},
		{[]string{"--profile", "public", "udp"}, "", tunnel.ConfigInvalid},
		{[]string{"udp", "8.8.8.8:1", "--profile", "public"}, "", tunnel.ConfigInvalid},
		{[]string{"--profile", "pubic", "udp", "8.8.8.8:1"}, "", tunnel.PolicyInvalid},
		{[]string{"-c", filepath.Join(t.TempDir(), "none"), "udp", "8.8.8.8:1"}, "", tunnel.ConfigInvalid},
	} {
		out, err := runPolicy(t, append([]string{"test"}, c.args...)...)
		if tunnel.CodeOf(err) != c.code || !strings.Contains(out, c.want) || c.want == "" && out != "" {
			t.Errorf("%q: printed %q, error %v; want %q and code %q", c.args, out, err, c.want, c.code)
		}
	}
}

// A sidecar without a policy refuses nothing, and the command says so.
func TestPolicyOfASidecarWithoutOneIsTheCloudProxys(t *testing.T) {
	for _, section := range []string{"", "policy:\n", "policy: {special: 10.0.0.0/8}\n"} {
		file := policyTestFile(t, "cloud_proxy: {address: cloud.example.net}\nidentity: {app: clinic, token: x}\n"+section)
		out, err := runPolicy(t, "test", "-c", file, "udp", "8.8.8.8:53")
		if err != nil || !strings.HasPrefix(out, "undecided: ") || !strings.Contains(out, "the cloud proxy decides") {
			t.Errorf("%q: %v: %s", section, err, out)
		}
		if out, err := runPolicy(t, "show", "-c", file); err != nil || strings.Contains(out, "deny") {
			t.Errorf("%q: %v: %s", section, err, out)
		}
		if _, err := runPolicy(t, "test", "-c", file, "--profile", "agora-mainland-test", "udp", "8.8.8.8:53"); tunnel.CodeOf(err) != tunnel.PolicyDenied {
			t.Errorf("%q with a profile: %v", section, err)
		}
	}
}

func TestPolicyTestPrintsOneJSONObject(t *testing.T) {
	out, err := runPolicy(t, "test", "-c", policyTestFile(t, policyTestConfig), "--json", "tcp", "a.example.com:443")
	var got struct {
		Decision, Reason string
		Rule             struct{ Deny string }
	}
	if json.Unmarshal([]byte(out), &got) != nil || got.Decision != "refused" || got.Rule.Deny != "tcp" || tunnel.CodeOf(err) != tunnel.PolicyDenied {
		t.Errorf("printed %s, error %v", out, err)
	}
}

func TestPolicyShow(t *testing.T) {
	out, err := runPolicy(t, "show", "-c", policyTestFile(t, policyTestConfig))
	if err != nil || strings.Index(out, "*.example.com") > strings.Index(out, "150.138.153.78") || !strings.Contains(out, "all else") {
		t.Errorf("printed %s, error %v", out, err)
	}
	if out, err = runPolicy(t, "show"); err != nil || !strings.Contains(out, "profile public") || !strings.Contains(out, "148.153.66.218") {
		t.Errorf("without a policy: printed %s, error %v", out, err)
	}
	out, err = runPolicy(t, "show", "--json", "--profile", "public")
	var got struct {
		Profiles []string
		Rules    []struct{ Allow string }
	}
	if err != nil || json.Unmarshal([]byte(out), &got) != nil || len(got.Profiles) != 1 || len(got.Rules) != 1 || got.Rules[0].Allow != "any" {
		t.Errorf("JSON: printed %s, error %v", out, err)
	}
	if _, err = runPolicy(t, "show", "public"); tunnel.CodeOf(err) != tunnel.ConfigInvalid {
		t.Errorf("an argument: %v", err)
	}
}

func TestPolicyFilesWithMistakesNameTheLine(t *testing.T) {
	for text, want := range map[string]string{
		strings.Replace(policyTestConfig, "deny:", "dney:", 1): `line 7: "dney" is not a key of a rule (did you mean "deny"?)`,
		"ruels: []":                  `line 1: "ruels" is not a key of the policy (did you mean "rules"?)`,
		"policy: 5":                  "line 1: the policy is not a mapping",
		"cloud_proxy: {address: {}}": "line 1: cloud_proxy.address is neither",
		"cloud_proxy: 5":             "line 1: cloud_proxy is not a mapping",
		"a: [":                       "line ",
	} {
		file := policyTestFile(t, text)
		_, err := runPolicy(t, "show", "-c", file)
		if code := tunnel.CodeOf(err); code != tunnel.PolicyInvalid && code != tunnel.ConfigInvalid || !strings.Contains(err.Error(), file+": "+want) {
			t.Errorf("%q: %v; want %q", text, err, want)
		}
	}
}

func TestPolicyFirewallKnowsTheCloudProxy(t *testing.T) {
	file := policyTestFile(t, policyTestConfig)
	list := policyTestFile(t, "cloud_proxy: {address: [198.51.100.9:443, '[2001:db8::9]:8443']}\npolicy: {profiles: [public]}")
	sockets := policyTestFile(t, "cloud_proxy: {address: ['wss://w.example.com/culvert', 'wss://198.51.100.9:8443/x']}\npolicy: {profiles: [public]}")
	for _, c := range []struct {
		args []string
		want []string
		code tunnel.Code
	}{
		{[]string{"-c", file}, []string{"198.51.100.9", "150.138.153.78"}, ""},
		{[]string{"-c", list, "--format", "csv"}, []string{"with_culvert,tcp+udp,198.51.100.9,443,", "with_culvert,tcp+udp,2001:db8::9,8443,"}, ""},
		{[]string{"-c", file, "--cloud", "192.0.2.1", "--format", "nftables"}, []string{"ip daddr { 192.0.2.1 } meta l4proto { tcp, udp } th dport { 443 }"}, ""},
		{[]string{"--profile", "public", "--cloud", "2001:db8::1", "--json"}, []string{`"2001:db8::1"`}, ""},
		{[]string{"--profile", "public", "--cloud", "cloud.example.com", "--cloud", "b.example.com:8443"}, []string{"cloud.example.com   443", "b.example.com       8443"}, ""},
		{[]string{"-c", sockets, "--format", "csv"}, []string{"with_culvert,tcp+udp,w.example.com,443,", "with_culvert,tcp+udp,198.51.100.9,8443,"}, ""},
		{[]string{"--profile", "public", "--cloud", "a\nb"}, nil, tunnel.ConfigInvalid},
		{[]string{"--profile", "public", "--cloud", "fe80::1%a\nb"}, nil, tunnel.ConfigInvalid},
		{[]string{"--profile", "public", "--cloud", "a';b"}, nil, tunnel.ConfigInvalid},
		{[]string{"--profile", "public"}, nil, tunnel.ConfigInvalid},
		{[]string{"--cloud", "192.0.2.1"}, nil, tunnel.ConfigInvalid},
		{[]string{"-c", file, "--format", "xml"}, nil, tunnel.ConfigInvalid},
		{[]string{"-c", file, "--cloud", "a:b:c"}, nil, tunnel.ConfigInvalid},
	} {
		out, err := runPolicy(t, append([]string{"firewall"}, c.args...)...)
		if tunnel.CodeOf(err) != c.code {
			t.Errorf("%q: error %v, want code %q", c.args, err, c.code)
		}
		for _, part := range c.want {
			if !strings.Contains(out, part) {
				t.Errorf("%q: %s does not have %q", c.args, out, part)
			}
		}
	}
}

func TestPolicyTestShowsTheRulesAroundTheDecision(t *testing.T) {
	file := policyTestFile(t, "rules: [{allow: udp, to: 8.8.8.8, ports: 1-9}, {allow: udp, to: public, ports: 1-5}]")
	out, err := runPolicy(t, "test", "-c", file, "udp", "8.8.8.8:7")
	if err != nil || !strings.Contains(out, "same destination, other ports: allow udp to public ports 1-5") {
		t.Errorf("%v: %s", err, out)
	}
	out, _ = runPolicy(t, "test", "-c", file, "--json", "udp", "8.8.8.8:3")
	var got struct {
		Also []struct{ Ports string } `json:"also_match"`
	}
	if err := json.Unmarshal([]byte(out), &got); err != nil || len(got.Also) != 1 || got.Also[0].Ports != "1-5" {
		t.Errorf("%v: %s", err, out)
	}
}

func TestPolicyTestJudgesByTheAppsPolicy(t *testing.T) {
	file := policyTestFile(t, `
address: cloud.example.net
policy: {profiles: [public]}
apps:
  - {id: clinic, policy: {rules: [{allow: udp, to: 8.8.8.8}]}}
  - {id: office}
`)
	for app, want := range map[string]tunnel.Code{"": "", "clinic": tunnel.PolicyDenied, "office": "", "unknown": tunnel.ConfigInvalid} {
		args := []string{"test", "-c", file, "tcp", "9.9.9.9:443"}
		if app != "" {
			args = []string{"test", "-c", file, "--app", app, "tcp", "9.9.9.9:443"}
		}
		if out, err := runPolicy(t, args...); tunnel.CodeOf(err) != want {
			t.Errorf("%q: %v\n%s", app, err, out)
		}
	}
}

func TestPolicyDiffSaysWhatChanges(t *testing.T) {
	a := policyTestFile(t, "rules: [{allow: udp, to: 8.8.8.8}]")
	b := policyTestFile(t, "rules: [{allow: udp, to: 8.8.8.8}, {deny: any, to: 8.8.8.8, ports: 9}]")
	if out, err := runPolicy(t, "diff", a, a); err != nil || !strings.Contains(out, "the same") {
		t.Errorf("%v: %s", err, out)
	}
	out, err := runPolicy(t, "diff", a, b)
	if err == nil || exitCode(err) != 1 || !strings.Contains(out, "+ deny any to 8.8.8.8 ports 9") || !strings.Contains(out, "udp 8.8.8.8:9: refused, was allowed: by the rule: deny") {
		t.Errorf("%v: %s", err, out)
	}
	out, err = runPolicy(t, "diff", "--json", a, b)
	var got struct {
		Same         bool
		Added        []struct{ Deny string }
		Destinations []struct{ To, Before, After string }
	}
	if e := json.Unmarshal([]byte(out), &got); e != nil || err == nil || got.Same || len(got.Added) != 1 || len(got.Destinations) != 1 || got.Destinations[0].After != "refused" {
		t.Errorf("%v, %v: %s", err, e, out)
	}
	if out, err := runPolicy(t, "diff", "agora-mainland-test", "agora-overseas-test"); exitCode(err) != 1 || !strings.Contains(out, "150.138.153.78") {
		t.Errorf("%v: %s", err, out)
	}
	for _, args := range [][]string{{}, {a}, {a, "none"}, {a, b, a}} {
		if _, err := runPolicy(t, append([]string{"diff"}, args...)...); exitCode(err) != 2 {
			t.Errorf("%q: %v", args, err)
		}
	}
}
