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
	err := p.Firewall(policy.CloudProxy{Target: target(t, "cloud.example.com:443")}).Write(&b, "nftables")
	if tunnel.CodeOf(err) != tunnel.ConfigInvalid || !strings.Contains(err.Error(), "cloud.example.com") || b.Len() > 0 {
		t.Errorf("a name in nftables: %v and %q", err, b.String())
	}
	if err := p.Firewall().Write(&b, "tabel"); tunnel.CodeOf(err) != tunnel.ConfigInvalid || !strings.Contains(err.Error(), `"table"`) {
		t.Errorf("an unknown format: %v", err)
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
