// Package systemd holds the units that run Culvert as a service, and the test
// that systemd itself finds them right and well confined.
package systemd

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// limit is what the exposure of a unit must stay below; systemd's scale goes from 0 to 10.
const limit = 2.0

// setsRules is the unit in the variant of culvert-capture.conf with CAP_NET_ADMIN.
const setsRules = "culvert.service that captures and sets the rules"

var units = []string{"culvert.service", "culvert-cloudproxy.service"}

func TestUnitsAreVerified(t *testing.T) {
	analyze := analyze(t)
	for _, unit := range units {
		t.Run(unit, func(t *testing.T) {
			file := installed(t, unit)
			out, err := exec.Command(analyze, "verify", "--man=no", "--generators=no", "--recursive-errors=no", file).CombinedOutput()
			if err != nil || len(out) > 0 {
				t.Errorf("systemd-analyze verify %s: %v\n%s", unit, err, out)
			}
		})
	}
}

// Rules must go however the sidecar ends, and it must get no more than it uses.
func TestCaptureDropIn(t *testing.T) {
	analyze := analyze(t)
	text, err := os.ReadFile("culvert-capture.conf")
	if err != nil {
		t.Fatal(err)
	}
	var lines []string
	for line := range strings.Lines(string(text)) {
		if line = strings.TrimSpace(line); line != "" && !strings.HasPrefix(line, "#") {
			lines = append(lines, line)
		}
	}
	want := []string{
		"[Service]",
		"CapabilityBoundingSet=CAP_NET_RAW",
		"AmbientCapabilities=CAP_NET_RAW",
		"ExecStartPre=+-/usr/bin/culvert capture off",
		"ExecStopPost=+/usr/bin/culvert capture off",
	}
	if !slices.Equal(lines, want) {
		t.Errorf("culvert-capture.conf says %q, want %q", lines, want)
	}

	// The drop-in as systemd would find it.
	file := installed(t, "culvert.service")
	folder := file + ".d"
	if err := os.Mkdir(folder, 0o755); err != nil {
		t.Fatal(err)
	}
	program, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	text = bytes.ReplaceAll(text, []byte("/usr/bin/culvert"), []byte(program))
	if err := os.WriteFile(filepath.Join(folder, "culvert-capture.conf"), text, 0o644); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command(analyze, "verify", "--man=no", "--generators=no", "--recursive-errors=no", file).CombinedOutput()
	if err != nil || len(out) > 0 {
		t.Errorf("systemd-analyze verify culvert.service with culvert-capture.conf: %v\n%s", err, out)
	}
}

func TestUnitsAreConfined(t *testing.T) {
	analyze := analyze(t)
	overall := regexp.MustCompile(`Overall exposure level for .*: ([0-9.]+)`)
	files := map[string]string{"culvert.service that captures": withCapture(t, false), setsRules: withCapture(t, true)}
	for _, unit := range units {
		files[unit] = fullName(t, unit)
	}
	for unit, file := range files {
		limit := limit
		if unit == setsRules {
			limit += 0.1 // CAP_NET_ADMIN alone is 0.2 of it
		}
		t.Run(unit, func(t *testing.T) {
			out, err := exec.Command(analyze, "security", "--offline=true", "--no-pager", file).CombinedOutput()
			match := overall.FindSubmatch(out)
			if match == nil {
				t.Fatalf("systemd-analyze security %s told no exposure: %v\n%s", unit, err, out)
			}
			exposure, err := strconv.ParseFloat(string(match[1]), 64)
			if err != nil {
				t.Fatal(err)
			}
			if exposure >= limit {
				t.Errorf("the exposure of %s is %.1f and must be below %.1f:\n%s", unit, exposure, limit, out)
			}
		})
	}
}

// What the programs rely on, and what systemd would accept the lack of.
func TestUnitsSayWhatTheProgramsNeed(t *testing.T) {
	common := []string{
		"Type=notify",
		"WatchdogSec=30",
		"DynamicUser=yes",
		"RestartPreventExitStatus=2", // a wrong configuration
	}
	for unit, own := range map[string][]string{
		"culvert.service": {
			"ExecStart=/usr/bin/culvert run -c /etc/culvert/culvert.yaml",
			"RuntimeDirectory=culvert", // where the command line looks for the control socket
			"Group=culvert",            // whose members may use it
			"CapabilityBoundingSet=",
		},
		"culvert-cloudproxy.service": {
			"ExecStart=/usr/bin/culvert-cloudproxy run -c /etc/culvert-cloudproxy/cloudproxy.yaml",
			"AmbientCapabilities=CAP_NET_BIND_SERVICE", // port 443
			"CapabilityBoundingSet=CAP_NET_BIND_SERVICE",
		},
	} {
		text, err := os.ReadFile(unit)
		if err != nil {
			t.Fatal(err)
		}
		lines := map[string]bool{}
		for line := range strings.Lines(string(text)) {
			lines[strings.TrimSpace(line)] = true
		}
		for _, want := range append(own, common...) {
			if !lines[want] {
				t.Errorf("%s must have the line %q", unit, want)
			}
		}
	}
}

// The groups that the units name must be made by the files beside them.
func TestGroupsOfUnitsAreMade(t *testing.T) {
	sysusers, err := os.ReadFile("culvert.sysusers")
	if err != nil {
		t.Fatal(err)
	}
	named := regexp.MustCompile(`(?m)^(?:Group|SupplementaryGroups)=(\S+)$`)
	for _, unit := range units {
		text, err := os.ReadFile(unit)
		if err != nil {
			t.Fatal(err)
		}
		groups := named.FindAllStringSubmatch(string(text), -1)
		if len(groups) == 0 {
			t.Errorf("%s names no group, so nothing lets it read its configuration", unit)
		}
		for _, g := range groups {
			if !strings.Contains(string(sysusers), "\ng "+g[1]+" -\n") {
				t.Errorf("%s runs with group %s, which culvert.sysusers does not make", unit, g[1])
			}
		}
	}
}

// analyze finds systemd-analyze. CI must have it; elsewhere the test is skipped.
func analyze(t *testing.T) string {
	t.Helper()
	path, err := exec.LookPath("systemd-analyze")
	if err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatal("systemd-analyze is missing; CI must install systemd")
		}
		t.Skip("systemd-analyze is missing; install systemd to run this test")
	}
	return path
}

// installed is the unit as verify wants it: its program must exist, so the
// test itself takes the program's place.
func installed(t *testing.T, unit string) string {
	t.Helper()
	text, err := os.ReadFile(unit)
	if err != nil {
		t.Fatal(err)
	}
	program, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	start := regexp.MustCompile(`(?m)^ExecStart=\S+`)
	if !start.Match(text) {
		t.Fatalf("%s has no ExecStart=", unit)
	}
	file := filepath.Join(t.TempDir(), unit)
	if err := os.WriteFile(file, start.ReplaceAllLiteral(text, []byte("ExecStart="+program)), 0o644); err != nil {
		t.Fatal(err)
	}
	return file
}

// withCapture is the sidecar's unit with its drop-in, in one file: what stands
// later counts, or adds to a list, as it does in a drop-in.
func withCapture(t *testing.T, admin bool) string {
	t.Helper()
	unit, err := os.ReadFile("culvert.service")
	if err != nil {
		t.Fatal(err)
	}
	dropIn, err := os.ReadFile("culvert-capture.conf")
	if err != nil {
		t.Fatal(err)
	}
	if admin {
		dropIn = regexp.MustCompile(`(?m)^#(\w+=CAP_NET_ADMIN)$`).ReplaceAll(dropIn, []byte("$1"))
	}
	file := filepath.Join(t.TempDir(), "culvert.service")
	if err := os.WriteFile(file, append(append(unit, '\n'), dropIn...), 0o644); err != nil {
		t.Fatal(err)
	}
	return file
}

// fullName is the unit's own file by its full name: a bare name would be looked for among installed units.
func fullName(t *testing.T, unit string) string {
	t.Helper()
	path, err := filepath.Abs(unit)
	if err != nil {
		t.Fatal(err)
	}
	return path
}
