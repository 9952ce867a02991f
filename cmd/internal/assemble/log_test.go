package assemble

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"
	"unicode/utf8"

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
	if len(got) != 3 || got[0]["app"] != "other" || got[0]["why"] != `a??b?[31m"` || got[1]["app"] != "clinic" || got[1]["session"] != "s1" || got[2]["app"] != "third" {
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

// hostile are texts that somebody may give himself as a name.
var hostile = map[string]string{
	"line breaks": "a\r\nlevel=ERROR msg=forged", "escape codes": "\x1b[2J\x1b]0;owned\a", "ten KB": strings.Repeat("x", 10_000),
	"wide": strings.Repeat("\u202e", 3_000), "letters": strings.Repeat("\u65e5", 3_000), "no UTF-8": "a\xff\xfe\x00b", "quotes": strings.Repeat(`"\`, 5_000), "JSON": `"},{"level":"ERROR"`,
}

// named is a text that comes as something else than a string.
type named string

func (n named) String() string { return string(n) }

func TestALineIsOneAndShortWhateverItHolds(t *testing.T) {
	cases := 0
	for name, text := range hostile {
		for _, format := range []string{"text", "json"} {
			var out bytes.Buffer
			log, err := NewLog(config.Log{Format: format, Level: "debug"}, "clinic", &out)
			if err != nil {
				t.Fatal(err)
			}
			log = log.With("session", text, "app", text, "peer", errors.New(text))
			for what, attrs := range map[string][]any{
				"none": nil, "a string": {"to", text}, "an error": {"why", errors.New(text)}, "ours": {"code", tunnel.Code(text)}, "a Stringer": {"by", named(text)},
				"many":    {"a", text, "b", text, "c", errors.New(text), "d", named(text), "n", 7, "for", time.Second, "at", time.Now(), "from", netip.MustParseAddrPort("192.0.2.1:9"), auditKey, "x"},
				"a group": {slog.Group("g", "a", text, "b", slog.GroupValue(slog.String("c", text)))},
			} {
				for _, message := range []string{"message", text} { // those of libraries may hold anything
					out.Reset()
					log.Warn(message, attrs...)
					cases++
					line := out.String()
					if strings.Count(line, "\n") != 1 || len(line) > lineMost || strings.ContainsAny(line, "\r\x1b\a\x00\u202e") || !utf8.ValidString(line) {
						t.Errorf("%s as %s, %s: %d bytes: %q", name, what, format, len(line), line)
					}
					if format == "json" && !json.Valid([]byte(line)) {
						t.Errorf("%s as %s is no JSON: %s", name, what, line)
					}
					if what == "many" && (!strings.Contains(line, "192.0.2.1:9") || !strings.Contains(line, auditKey)) {
						t.Errorf("%s: what is short was lost: %s", name, line)
					}
				}
			}
		}
	}
	t.Logf("%d lines", cases)
}

func TestAMessageThatComesAllTheTimeIsLeftOutAndCounted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var out bytes.Buffer
		log, err := NewLog(config.Log{Level: "debug"}, "", &out)
		if err != nil {
			t.Fatal(err)
		}
		for range 10_000 {
			log.Debug("strangers")
		}
		if n := strings.Count(out.String(), "\n"); n != debugBurst {
			t.Errorf("10,000 lines of level debug at once are %d", n)
		}
		out.Reset()
		for range 10_000 {
			log.With("session", "1").Info("flood")
		}
		if n := strings.Count(out.String(), "\n"); n != floodBurst {
			t.Errorf("10,000 lines at once are %d", n)
		}
		for i := range 10 * floodKinds { // as where the message itself is chosen
			for range 3 * floodBurst / floodKinds {
				log.Info(fmt.Sprint("message ", i))
			}
		}
		if n := strings.Count(out.String(), "\n"); n > (2+3)*floodBurst+floodBurst {
			t.Errorf("messages that differ are %d lines", n)
		}
		out.Reset()
		time.Sleep(time.Second) // of the bubble's clock
		for range 1000 {
			log.Info("flood")
		}
		if n := strings.Count(out.String(), "\n"); n != floodRate || !strings.Contains(out.String(), fmt.Sprint("left_out=", 10_000-floodBurst)) {
			t.Errorf("a second later 1,000 lines are %d: %.300s", n, out.String())
		}
	})
}

func TestAnErrorIsOneLineThatEndsWithItsCode(t *testing.T) {
	for name, text := range hostile {
		for _, err := range []error{errors.New(text), tunnel.Errorf(tunnel.ConfigInvalid, "a.yaml: %s", text), errors.Join(errors.New(text), errors.New(text))} {
			line := Line(err)
			if len(line) > lineMost || strings.ContainsAny(line, "\r\n\x1b\a\x00\u202e") || !utf8.ValidString(line) {
				t.Errorf("%s: %d bytes: %q", name, len(line), line)
			}
			if _, coded := err.(*tunnel.Error); coded && !strings.HasSuffix(line, "(config_invalid)") {
				t.Errorf("%s: no code in %q", name, line)
			}
		}
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
