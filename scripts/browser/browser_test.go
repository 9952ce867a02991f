package browser

import (
	"encoding/json"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// listen is the front's default address, which the files name.
const listen = "127.0.0.1:1080"

// names are the policies that a file may set. Those of Chromium are also held
// against a real one.
var names = map[string][]string{
	"chromium.json":     {"ProxySettings", "WebRtcIPHandling", "QuicAllowed"},
	"chromium-pac.json": {"ProxySettings", "WebRtcIPHandling", "QuicAllowed"},
	"chrome.reg":        {"ProxySettings", "WebRtcIPHandling", "QuicAllowed"},
	// Edge has Chromium's WebRtcIPHandling by another name, with the same values.
	"edge.json": {"ProxySettings", "WebRtcLocalhostIpHandling", "QuicAllowed"},
	"edge.reg":  {"ProxySettings", "WebRtcLocalhostIpHandling", "QuicAllowed"},
	// Of Firefox's modules/policies/policies-schema.json, ESR 153.
	"firefox.json": {"Proxy", "Preferences"},
}

// within are the names inside a policy that has some.
var within = map[string][]string{
	"ProxySettings": {"ProxyMode", "ProxyServer", "ProxyBypassList", "ProxyPacUrl", "ProxyPacMandatory"},
	"Proxy":         {"Mode", "Locked", "SOCKSProxy", "SOCKSVersion", "UseProxyForDNS"},
	// Firefox takes preferences of a few branches only; media. and network. are among them.
	"Preferences": {"media.peerconnection.ice.relay_only", "network.proxy.failover_direct"},
}

func TestFilesNameOnlyPoliciesThatExist(t *testing.T) {
	for _, file := range files(t) {
		known, ok := names[file]
		if !ok {
			t.Errorf("%s is not known here; add its policies to names", file)
			continue
		}
		set := policiesOf(t, file)
		for name, value := range set {
			if !slices.Contains(known, name) {
				t.Errorf("%s sets %s, which is not known here", file, name)
			}
			inner, _ := value.(map[string]any)
			for key := range inner {
				if !slices.Contains(within[name], key) {
					t.Errorf("%s sets %s of %s, which is not known here", file, key, name)
				}
			}
		}
		if len(set) != len(known) {
			t.Errorf("%s sets %d policies, want %q", file, len(set), known)
		}
	}
}

func TestFilesNameTheDefaultAddress(t *testing.T) {
	documented := regexp.MustCompile("(?m)^\\| `front.listen` \\|.*\\| `([^`]+)` \\|$").FindSubmatch(read(t, "../../docs/configuration.md"))
	if documented == nil || string(documented[1]) != listen {
		t.Fatalf("docs/configuration.md says that the front listens on %q by default, these files say %s", documented, listen)
	}
	address := regexp.MustCompile(`\d+\.\d+\.\d+\.\d+:\d+`)
	for _, file := range files(t) {
		found := address.FindAllString(string(read(t, file)), -1)
		if len(found) != 1 || found[0] != listen {
			t.Errorf("%s names %q, want %s once", file, found, listen)
		}
	}
}

func TestFilesOfOneBrowserSayTheSame(t *testing.T) {
	chromium := policiesOf(t, "chromium.json")
	edge := policiesOf(t, "edge.json")
	if got := policiesOf(t, "chrome.reg"); !reflect.DeepEqual(got, chromium) {
		t.Errorf("chrome.reg sets %v, chromium.json %v", got, chromium)
	}
	if got := policiesOf(t, "edge.reg"); !reflect.DeepEqual(got, edge) {
		t.Errorf("edge.reg sets %v, edge.json %v", got, edge)
	}
	chromium["WebRtcLocalhostIpHandling"] = chromium["WebRtcIPHandling"]
	delete(chromium, "WebRtcIPHandling")
	if !reflect.DeepEqual(edge, chromium) {
		t.Errorf("edge.json sets %v, want what chromium.json sets: %v", edge, chromium)
	}
}

func TestReadmeNamesEachFile(t *testing.T) {
	text := string(read(t, "README.md"))
	for _, file := range files(t) {
		if !strings.Contains(text, "]("+file+")") {
			t.Errorf("README.md does not say where %s goes", file)
		}
	}
}

// files are the policy files here.
func files(t *testing.T) []string {
	t.Helper()
	var all []string
	for _, pattern := range []string{"*.json", "*.reg"} {
		found, err := filepath.Glob(pattern)
		if err != nil || len(found) == 0 {
			t.Fatalf("no files %s here: %v", pattern, err)
		}
		all = append(all, found...)
	}
	return all
}

// policiesOf returns what a file sets. Registry values become what they are in JSON.
func policiesOf(t *testing.T, file string) map[string]any {
	t.Helper()
	data := read(t, file)
	set := map[string]any{}
	if filepath.Ext(file) == ".reg" {
		lines := strings.Split(strings.TrimSuffix(string(data), "\r\n"), "\r\n")
		if len(lines) < 4 || lines[0] != "Windows Registry Editor Version 5.00" || lines[1] != "" ||
			!strings.HasPrefix(lines[2], `[HKEY_LOCAL_MACHINE\SOFTWARE\Policies\`) || strings.ContainsAny(string(data), "\t") {
			t.Fatalf("%s has not the form of a registry file: the version, an empty line, a key below Policies; lines end with CR LF", file)
		}
		for _, line := range lines[3:] {
			name, value, ok := strings.Cut(line, "=")
			name, err := strconv.Unquote(name)
			if !ok || err != nil {
				t.Fatalf("%s: %q is not \"NAME\"=VALUE: %v", file, line, err)
			}
			set[name] = registryValue(t, value)
		}
		return set
	}
	if err := json.Unmarshal(data, &set); err != nil {
		t.Fatalf("%s: %v", file, err)
	}
	if file == "firefox.json" {
		inner, ok := set["policies"].(map[string]any)
		if !ok || len(set) != 1 {
			t.Fatalf("%s must hold \"policies\" alone", file)
		}
		return inner
	}
	return set
}

// registryValue reads a REG_SZ or a REG_DWORD. Policies that are objects are
// JSON in a string, those that are boolean 0 or 1.
func registryValue(t *testing.T, value string) any {
	t.Helper()
	if digits, ok := strings.CutPrefix(value, "dword:"); ok {
		n, err := strconv.ParseUint(digits, 16, 32)
		if err != nil || n > 1 || len(digits) != 8 {
			t.Fatalf("%q is no boolean: %v", value, err)
		}
		return n == 1
	}
	text, err := strconv.Unquote(value)
	if err != nil {
		t.Fatalf("%q is no string: %v", value, err)
	}
	if !strings.HasPrefix(text, "{") {
		return text
	}
	object := map[string]any{}
	if err := json.Unmarshal([]byte(text), &object); err != nil {
		t.Fatalf("%q is no JSON: %v", text, err)
	}
	return object
}

func read(t *testing.T, file string) []byte {
	t.Helper()
	data, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	return data
}
