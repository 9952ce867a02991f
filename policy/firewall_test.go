package policy_test

import (
	"bytes"
	"encoding/csv"
	"encoding/json"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"culvert/policy"
	"culvert/tunnel"
)

// every kind of rule that a packet filter has to show.
const kinds = `
profiles: [agora-mainland-test, agora-overseas-test, public]
rules:
- {allow: any, to: any, ports: "5000-5010,6000"}
- {allow: tcp, to: [10.0.0.0/8, 10.1.0.0/16, 10.1.2.3, "2001:db8::/32", "2001:db8::1"], name: 'quotes " and \ and umlauts ü'}
- {allow: udp, to: ["*.example.com", 192.0.2.0/25, 192.0.2.128/25]}
- {allow: udp, to: only.example.com, ports: 443}
- {deny: any, to: 203.0.113.7}
- {allow: any, to: "::ffff:0:0/96", tag: aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa, name: bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb}
`

func firewall(t *testing.T, format string, cloud ...policy.CloudProxy) string {
	t.Helper()
	if cloud == nil {
		cloud = []policy.CloudProxy{
			{Target: target(t, "198.51.100.9:443")},
			{Target: target(t, "[2001:db8::9]:8443")},
			{Target: target(t, "cloud.example.com:443"), Addrs: []netip.Addr{addr("203.0.113.9"), addr("2001:db8::99"), addr("::ffff:203.0.113.10")}},
		}
	}
	var b bytes.Buffer
	if err := parse(t, kinds).Firewall(cloud...).Write(&b, format); err != nil {
		t.Fatal(err)
	}
	return b.String()
}

func TestFirewallHasEveryAllowRuleInEveryFormat(t *testing.T) {
	for _, format := range policy.FirewallFormats() {
		text := firewall(t, format)
		for _, want := range []string{
			"198.51.100.9", "2001:db8::9", "cloud.example.com", "8443",
			"150.138.153.78", "23.236.115.138", "148.153.66.218", "3478-3500", "443,3433-3460,4000",
			"47.74.211.17", "52.80.192.229", "52.52.84.170", "47.96.234.219",
			"5000-5010,6000", "10.0.0.0/8", "*.example.com", "only.example.com", "profile public", "test.yaml line 5",
		} {
			if !strings.Contains(text, want) {
				t.Errorf("%s does not have %s:\n%s", format, want, text)
			}
		}
		if strings.Contains(text, "203.0.113.7") {
			t.Errorf("%s shows a destination that is denied:\n%s", format, text)
		}
	}
}

func TestFirewallCSVAndJSONCanBeRead(t *testing.T) {
	rows, err := csv.NewReader(strings.NewReader(firewall(t, "csv"))).ReadAll()
	if err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(rows[1], []string{"with_culvert", "tcp+udp", "198.51.100.9", "443", "cloud proxy: QUIC over UDP, TLS over TCP", ""}) {
		t.Errorf("first row %q", rows[1])
	}
	media := slices.IndexFunc(rows, func(r []string) bool { return r[4] == policy.TagMedia })
	if media < 0 || !slices.Equal(rows[media], []string{"replaces", "udp", "150.138.153.78", "3478-3500", "media", "profile agora-mainland-test"}) {
		t.Errorf("no row for media as expected in %q", rows)
	}
	var out struct {
		With     []struct{ Protocol, Ports string } `json:"with_culvert"`
		Replaces []struct{ To []string }            `json:"replaces"`
	}
	if err := json.Unmarshal([]byte(firewall(t, "json")), &out); err != nil {
		t.Fatal(err)
	}
	if len(out.With) != 3 || out.With[1].Ports != "8443" || len(out.Replaces) != 12 {
		t.Errorf("read %+v", out)
	}
}

func TestFirewallRefusesWhatItCanNotWrite(t *testing.T) {
	p := parse(t, kinds)
	var b bytes.Buffer
	for _, format := range policy.FirewallFormats() {
		b.Reset()
		err := p.Firewall(policy.CloudProxy{Target: target(t, "cloud.example.com:443")}).Write(&b, format)
		if policy.NeedsAddresses(format) && (tunnel.CodeOf(err) != tunnel.ConfigInvalid || !strings.Contains(err.Error(), "cloud.example.com") || b.Len() > 0) {
			t.Errorf("a name in %s: %v and %q", format, err, b.String())
		} else if !policy.NeedsAddresses(format) && err != nil {
			t.Errorf("a name in %s: %v", format, err)
		}
	}
	if err := p.Firewall().Write(&b, "tabel"); tunnel.CodeOf(err) != tunnel.ConfigInvalid || !strings.Contains(err.Error(), `"table"`) {
		t.Errorf("an unknown format: %v", err)
	}
}

// What a file or a rule is called begins no line and no command in any format, is
// no formula in a spreadsheet, and no text is longer than the tools read.
func TestHostileNamesStayWhatTheyAre(t *testing.T) {
	for _, name := range []string{`a\nb`, `a\rb`, `\e[2J`, `\x9b2J`, `\u202egnp`, `\u2028`, `\ufeff`, `\u0085`} {
		if _, err := policy.Parse([]byte(`rules: [{allow: udp, to: 8.8.8.8, name: "`+name+`"}]`), ""); tunnel.CodeOf(err) != tunnel.PolicyInvalid {
			t.Errorf("the name %s: %v", name, err)
		}
	}
	var many strings.Builder
	for i := range 2000 {
		many.WriteString(", " + netip.AddrFrom4([4]byte{8, 8, byte(i >> 7), byte(i << 1)}).String())
	}
	const file = "x\n}\ninclude \"evil\"\n'; evil; '\x1b[2J\n-evil\nEOF\nevil"
	p, err := policy.Parse([]byte(`
rules:
- {allow: udp, to: [evil.example, 9.9.9.9], name: "'; $(evil) \u2019; evil; \u2018 |evil # EOF"}
- {allow: tcp, to: [9.9.9.9`+many.String()+`], name: "=evil()"}
- {allow: any, to: [names.example], name: "@evil"}
`), file)
	if err != nil {
		t.Fatal(err)
	}
	for _, format := range policy.FirewallFormats() {
		var b bytes.Buffer
		if err := p.Firewall(policy.CloudProxy{Target: target(t, "192.0.2.1:443")}).Write(&b, format); err != nil {
			t.Fatal(err)
		}
		text := b.String()
		if strings.ContainsAny(text, "\x1b\r") {
			t.Errorf("%s: a control character", format)
		}
		for line := range strings.Lines(text) {
			begin := strings.TrimLeft(line, " \t'")
			for _, bad := range []string{"evil;", "include", "}\n#", "-evil", "EOF\nevil"} {
				if strings.HasPrefix(begin, bad) {
					t.Errorf("%s: a line %.80q", format, line)
				}
			}
			if format == "powershell" && line[0] != '#' && strings.Count(line, "'")%2 != 0 {
				t.Errorf("a quote is open: %s", line)
			}
			if format == "iptables" && len(line) > 4000 {
				t.Errorf("%s: a line of %d bytes", format, len(line))
			}
		}
		if format == "csv" {
			all, err := csv.NewReader(strings.NewReader(text)).ReadAll()
			if err != nil {
				t.Fatal(err)
			}
			for _, row := range all {
				for _, cell := range row[4:] {
					if cell != "" && strings.ContainsAny(cell[:1], "=+-@") {
						t.Errorf("a cell %q", cell)
					}
				}
			}
		}
	}
}

// Some releases of nft refuse a set whose intervals overlap.
func TestNFTablesSetsDoNotOverlap(t *testing.T) {
	text := firewall(t, "nftables")
	for _, inside := range []string{"10.1.0.0/16", "10.1.2.3", "2001:db8::1 ", "2001:db8::1,"} {
		if strings.Contains(text, inside) {
			t.Errorf("%s is in the ruleset beside the CIDR around it:\n%s", inside, text)
		}
	}
}

func TestNFTablesLoads(t *testing.T) {
	nft, err := exec.LookPath("nft")
	if err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatal("nft is not installed, and CI=true says that nothing may be left out")
		}
		t.Skip("nft is not installed")
	}
	file := filepath.Join(t.TempDir(), "culvert.nft")
	check := func(text string) ([]byte, error) {
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return exec.Command(nft, "-c", "-f", file).CombinedOutput()
	}
	// Even a check asks the kernel, which not everybody may.
	if out, err := check("table inet filter {\n}\n"); err != nil {
		t.Skipf("nft can not check here: %s", out)
	}
	if out, err := check("table inet filter {\n chain a { nonsense }\n}\n"); err == nil {
		t.Fatalf("nft accepts anything: %s", out)
	}
	text := firewall(t, "nftables")
	if out, err := check(text); err != nil {
		t.Errorf("%v: %s\nin\n%s", err, out, text)
	}
}

// optional runs a tool that is not on every machine, with the text on its
// standard input.
func optional(t *testing.T, text, tool string, args ...string) (string, error) {
	t.Helper()
	path, err := exec.LookPath(tool)
	if err != nil {
		t.Skipf("%s is not installed", tool)
	}
	cmd := exec.Command(path, args...)
	cmd.Stdin = strings.NewReader(text)
	out, err := cmd.CombinedOutput()
	return string(out), err
}

func TestTheScriptForIptablesIsOneForTheShell(t *testing.T) {
	text := firewall(t, "iptables")
	if out, err := optional(t, text, "sh", "-n"); err != nil {
		t.Errorf("%v: %s\nin\n%s", err, out, text)
	}
	for _, want := range []string{
		"-A culvert -d 198.51.100.9 -p udp -m multiport --dports 443 -j ACCEPT\n",
		"-A culvert -d 2001:db8::9 -p tcp -m multiport --dports 8443 -j ACCEPT\n",
		"-A culvert_replaces -d 150.138.153.78 -p udp -m multiport --dports 3478:3500 -j ACCEPT\n",
		"-A culvert_replaces -d 0.0.0.0/0 -p tcp -m multiport --dports 5000:5010,6000 -j ACCEPT\n",
	} {
		if strings.Count(text, want) != 1 {
			t.Errorf("%q does not stand once in\n%s", want, text)
		}
	}
	four, six, _ := strings.Cut(text, "ip6tables-restore --noflush <<")
	for _, line := range strings.Split(four[strings.Index(four, "*filter"):], "\n") {
		if strings.HasPrefix(line, "-A") && strings.Contains(strings.Fields(line)[3], ":") {
			t.Errorf("an IPv6 address among the rules of IPv4: %s", line)
		}
	}
	for _, line := range strings.Split(six, "\n") {
		if strings.HasPrefix(line, "-A") && strings.Contains(strings.Fields(line)[3], ".") && !strings.Contains(strings.Fields(line)[3], ":") {
			t.Errorf("an IPv4 address among the rules of IPv6: %s", line)
		}
	}
	for tool, part := range map[string]string{"iptables-restore": four, "ip6tables-restore": six} {
		t.Run(tool, func(t *testing.T) {
			part = part[strings.Index(part, "*filter"):]
			part, _, _ = strings.Cut(part, "EOF")
			if out, err := optional(t, "*filter\nCOMMIT\n", tool, "--test"); err != nil { // even a test asks the kernel
				t.Skipf("%s can not check here: %s", tool, out)
			}
			if out, err := optional(t, part, tool, "--noflush", "--test"); err != nil {
				t.Errorf("%v: %s\nin\n%s", err, out, part)
			}
		})
	}
}

// A multiport match takes fifteen ports, and a range counts twice.
func TestLongListsOfPortsAreCutForIptables(t *testing.T) {
	r := policy.Rule{Allow: true, Proto: policy.TCP, To: []policy.Dest{{Prefix: netip.MustParsePrefix("8.8.8.8/32")}}}
	for i := range uint16(20) {
		r.Ports = append(r.Ports, policy.PortRange{Low: 1000 + 10*i, High: 1000 + 10*i + i%2})
	}
	p, err := policy.New(policy.Config{Rules: []policy.Rule{r}})
	if err != nil {
		t.Fatal(err)
	}
	var b bytes.Buffer
	if err := p.Firewall(policy.CloudProxy{Target: target(t, "198.51.100.9:443")}).Write(&b, "iptables"); err != nil {
		t.Fatal(err)
	}
	seen := 0
	for _, line := range strings.Split(b.String(), "\n") {
		if !strings.HasPrefix(line, "-A culvert_replaces") {
			continue
		}
		_, list, _ := strings.Cut(line, "--dports ")
		list, _, _ = strings.Cut(list, " ")
		n := 0
		for _, word := range strings.Split(list, ",") {
			seen++
			n += 1 + strings.Count(word, ":")
		}
		if n > 15 {
			t.Errorf("%d ports in %s", n, line)
		}
	}
	if seen != 20 {
		t.Errorf("%d of 20 ranges are there:\n%s", seen, b.String())
	}
}

func TestTheScriptForWindowsOpensWhatIsNeededAndNothingElse(t *testing.T) {
	text := firewall(t, "powershell")
	on, off := 0, 0
	for _, line := range strings.Split(text, "\n") {
		if !strings.HasPrefix(line, "New-NetFirewallRule ") {
			continue
		}
		if strings.Contains(line, "-Enabled True") {
			on++
		} else if strings.Contains(line, "-Enabled False") && strings.Contains(line, "-Group 'Culvert replaces'") {
			off++
		} else {
			t.Errorf("neither on nor off: %s", line)
		}
		if strings.Count(line, "'")%2 != 0 || !strings.Contains(line, "-Direction Outbound -Action Allow") {
			t.Errorf("not a rule: %s", line)
		}
	}
	if on != 2*3 || off == 0 {
		t.Errorf("%d rules are on, %d off:\n%s", on, off, text)
	}
	if want := "-Protocol UDP -RemoteAddress @('150.138.153.78') -RemotePort @('3478-3500') | Out-Null"; strings.Count(text, want) != 1 {
		t.Errorf("%q does not stand once in\n%s", want, text)
	}
	t.Run("pwsh", func(t *testing.T) {
		check := `$e = $null; [System.Management.Automation.Language.Parser]::ParseInput([Console]::In.ReadToEnd(), [ref]$null, [ref]$e) | Out-Null; $e; exit $e.Count`
		if out, err := optional(t, text, "pwsh", "-NoProfile", "-Command", check); err != nil {
			t.Errorf("%v: %s", err, out)
		}
	})
}
