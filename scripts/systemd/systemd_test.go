// Package systemd holds the units that run Culvert as a service, and the test
// that systemd itself finds them right and well confined.
package systemd

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
)

// limit is what the exposure of a unit must stay below; systemd's scale goes from 0 to 10.
const limit = 2.0

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

func TestUnitsAreConfined(t *testing.T) {
	analyze := analyze(t)
	overall := regexp.MustCompile(`Overall exposure level for .*: ([0-9.]+)`)
	for _, unit := range units {
		t.Run(unit, func(t *testing.T) {
			out, err := exec.Command(analyze, "security", "--offline=true", "--no-pager", fullName(t, unit)).CombinedOutput()
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

// fullName is the unit's own file by its full name: a bare name would be looked for among installed units.
func fullName(t *testing.T, unit string) string {
	t.Helper()
	path, err := filepath.Abs(unit)
	if err != nil {
		t.Fatal(err)
	}
	return path
}
