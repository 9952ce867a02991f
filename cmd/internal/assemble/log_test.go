package assemble

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"culvert/cmd/internal/config"
	"culvert/policy"
	"culvert/tunnel"
)

func TestAuditLinesGoToTheirFileWhateverTheLevel(t *testing.T) {
	file := filepath.Join(t.TempDir(), "audit.log")
	var out bytes.Buffer
	log, err := NewLog(config.Log{Level: "error", AuditFile: file}, "clinic", &out)
	if err != nil {
		t.Fatal(err)
	}
	lines := func(name string) (all []map[string]any) {
		t.Helper()
		b, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		for line := range strings.Lines(string(b)) {
			var m map[string]any
			if err := json.Unmarshal([]byte(line), &m); err != nil {
				t.Fatalf("%v in %q", err, line)
			}
			all = append(all, m)
		}
		return all
	}
	log.Info("not of the audit")
	log.Info("hostile\nname", auditKey, "refused", "why", "a\r\nb\x1b[31m\"", "app", "other")
	log.With("session", "s1").Info("opened", auditKey, "session_opened")
	log.With("app", "third").Info("opened", auditKey, "session_opened")
	got := lines(file)
	if len(got) != 3 || got[0]["app"] != "other" || got[0]["why"] != "a\r\nb\x1b[31m\"" || got[1]["app"] != "clinic" || got[1]["session"] != "s1" || got[2]["app"] != "third" {
		t.Fatalf("%v", got)
	}
	if out.Len() > 0 {
		t.Errorf("the log of level error holds %q", out.String())
	}
	if st, _ := os.Stat(file); st.Mode().Perm() != 0o600 {
		t.Error(st.Mode())
	}

	// Moved away, as logrotate does; then where nothing can be made; then again.
	os.Rename(file, file+".1")
	log.Info("after", auditKey, "x")
	if len(lines(file+".1")) != 3 || len(lines(file)) != 1 {
		t.Errorf("%d lines in the old file, %d in the new", len(lines(file+".1")), len(lines(file)))
	}
	os.Remove(file)
	os.Mkdir(file, 0o700)
	log.Info("lost", auditKey, "x")
	log.Info("lost", auditKey, "x")
	if n := strings.Count(out.String(), "the audit file can not be written"); n != 1 {
		t.Errorf("%d complaints: %s", n, out.String())
	}
	os.Remove(file)
	log.Info("back", auditKey, "x")
	if got := lines(file); len(got) != 1 || got[0]["msg"] != "back" {
		t.Errorf("%v", got)
	}
	if _, err := NewLog(config.Log{AuditFile: filepath.Join(file, "x")}, "", &out); err == nil {
		t.Error("a file that can not be made was accepted")
	}
}

func TestWithoutAFileTheLogHasTheAudit(t *testing.T) {
	var out bytes.Buffer
	log, err := NewLog(config.Log{Format: "json"}, "clinic", &out)
	if err != nil {
		t.Fatal(err)
	}
	log.Info("opened", auditKey, "session_opened", "code", "")
	var m map[string]any
	if err := json.Unmarshal(out.Bytes(), &m); err != nil || m["app"] != "clinic" || m["audit"] != "session_opened" {
		t.Errorf("%v: %s", err, out.String())
	}
}

// The policy's refusals name what an app or sidecar has asked for.
func TestADenialIsOneShortLineWhateverWasAskedFor(t *testing.T) {
	for _, host := range []string{"a\r\nb", "\x1b[2J", strings.Repeat("x", 250), strings.Repeat("\u202e", 80), strings.Repeat("\"\\", 120), "\xff\x00"} {
		var out bytes.Buffer
		log, err := NewLog(config.Log{}, "clinic", &out)
		if err != nil {
			t.Fatal(err)
		}
		d := newDenials(log)
		g := policy.NewGuard(nil, func(tunnel.Peer) *policy.Policy { return nil })
		g.Denied = d.denied
		g.OpenStream(t.Context(), tunnel.Peer{App: "clinic"}, tunnel.Target{Host: host, Port: 443})
		line := out.String()
		if strings.Count(line, "\n") != 1 || len(line) > 1024 || strings.ContainsAny(line, "\r\x1b\x00") || !strings.Contains(line, "audit=policy_denied") || !strings.Contains(line, "code=policy_denied") {
			t.Errorf("%d bytes: %q", len(line), line)
		}
		out.Reset()
		for range 1000 {
			g.OpenStream(t.Context(), tunnel.Peer{}, tunnel.Target{Host: host, Port: 443})
		}
		if n := strings.Count(out.String(), "\n"); n < 10 || n > 100 {
			t.Errorf("a thousand denials at once are %d lines", n)
		}
	}
}
