package main

import (
	"encoding/json"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"culvert/cmd/internal/assemble"
	"culvert/cmd/internal/cmdtest"
	"culvert/cmd/internal/config"
	"culvert/sidecar"
	"culvert/tunnel"
)

// until waits for something that must come true.
func until(t *testing.T, what string, is func() bool) {
	t.Helper()
	for end := time.Now().Add(initPatience); !is(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%s: not in %v", what, initPatience)
		}
	}
}

// logged waits until a line stands n times in a log.
func logged(t *testing.T, log *cmdtest.Text, line string, n int) {
	t.Helper()
	until(t, "the log says: "+line, func() bool { return strings.Count(log.String(), line) >= n })
}

// replace puts a file in the place of another at once.
func replace(t *testing.T, file string, data []byte) {
	t.Helper()
	if err := os.WriteFile(file+".new", data, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(file+".new", file); err != nil {
		t.Fatal(err)
	}
}

// echoing is a stream through a sidecar to a server that sends everything back.
type echoing struct{ net.Conn }

func newEchoing(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() { io.Copy(c, c); c.Close() }()
		}
	}()
	return l.Addr().String()
}

func dialThrough(t *testing.T, s *assemble.Sidecar, to string) *echoing {
	t.Helper()
	c, err := net.Dial("tcp", s.Front.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(initPatience))
	io.WriteString(c, "CONNECT "+to+" HTTP/1.1\r\nHost: "+to+"\r\n\r\n")
	head := make([]byte, 4096)
	if n, err := io.ReadAtLeast(c, head, len("HTTP/1.1 200")); err != nil || !strings.HasPrefix(string(head[:n]), "HTTP/1.1 200") {
		t.Fatalf("%q, %v", head[:n], err)
	}
	return &echoing{c}
}

func (e *echoing) echoes() error {
	if _, err := io.WriteString(e, "ping"); err != nil {
		return err
	}
	var b [4]byte
	_, err := io.ReadFull(e, b[:])
	return err
}

func TestBothEndsFollowTheirFilesWhileASessionLives(t *testing.T) {
	dir, address := initMake(t)
	with, err := os.OpenFile(filepath.Join(dir, "cloudproxy.yaml"), os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	io.WriteString(with, "log: {audit_file: audit.log}\n")
	with.Close()
	log := initCloud(t, dir, address)
	in := func(name string) string { return filepath.Join(dir, name) }
	token := func() (text, id string) {
		t.Helper()
		text, err := runToken("", "new", "--dir", dir, "--app", "clinic")
		if err != nil {
			t.Fatal(err)
		}
		r, err := inspect(t, text, "--dir", dir)
		if err != nil {
			t.Fatal(err)
		}
		return text, r.Claims.ID
	}
	first, firstID := token()
	replace(t, in("token"), []byte(first))
	s := initSidecar(t, dir, func(c *config.Sidecar) { c.Identity.Token, c.Identity.TokenFile = "", in("token") })
	if err := initStart(t, s); err != nil {
		t.Fatal(err)
	}
	session := s.Switch.Status().Link.Session
	far := newEchoing(t)
	stream := dialThrough(t, s, far)

	// Another token, and the first is revoked: the session has the second.
	second, secondID := token()
	replace(t, in("token"), []byte(second))
	logged(t, log, "token renewed", 1)
	if _, err := runToken("", "revoke", "--dir", dir, "--id", firstID); err != nil {
		t.Fatal(err)
	}
	const again = "the configuration was read again"
	logged(t, log, again, 1)

	// A policy that is none.
	cloudYAML, err := os.ReadFile(in("cloudproxy.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	replace(t, in("cloudproxy.yaml"), []byte(strings.Replace(string(cloudYAML), "allow: any", "allow: everything", 1)))
	logged(t, log, "what was in force before stays so", 1)
	if text := log.String(); !strings.Contains(text, "policy_invalid") && !strings.Contains(text, "config_invalid") || !strings.Contains(text, "everything") || !strings.Contains(text, "line ") {
		t.Errorf("the log does not say what is wrong:\n%s", text)
	}
	if err := stream.echoes(); err != nil {
		t.Errorf("with a policy that can not be used the stream ended: %v", err)
	}

	// A policy that forbids what is live, at each end.
	for end, change := range map[string]struct {
		file   string
		reload func()
	}{
		"cloud proxy": {in("cloudproxy.yaml"), func() { syscall.Kill(os.Getpid(), syscall.SIGHUP) }},
		"sidecar":     {in("culvert.yaml"), s.Reload},
	} {
		yaml := string(cloudYAML)
		if end == "sidecar" {
			b, err := os.ReadFile(change.file)
			if err != nil {
				t.Fatal(err)
			}
			yaml = string(b)
		}
		none := strings.Replace(yaml, "allow: any", "allow: any\n      ports: 1", 1)
		if none == yaml {
			t.Fatalf("the policy of the %s is another than expected:\n%s", end, yaml)
		}
		replace(t, change.file, []byte(none))
		change.reload()
		began := time.Now()
		if _, err := stream.Read(make([]byte, 1)); err == nil || os.IsTimeout(err) {
			t.Errorf("%s: the stream lives on: %v", end, err)
		} else if took := time.Since(began); took > 5*time.Second { // on a busy machine
			t.Errorf("%s: the stream ended after %v", end, took)
		} else {
			t.Logf("%s: ended after %v", end, took)
		}
		if got, body := initHTTP(t, s.Front.Addr(), far); got != 403 || !strings.Contains(body, string(tunnel.PolicyDenied)) {
			t.Errorf("%s: HTTP %d: %s", end, got, body)
		}
		replace(t, change.file, []byte(yaml))
		change.reload()
		until(t, "allowed again at the "+end, func() bool { got, _ := initHTTP(t, s.Front.Addr(), far); return got == 200 })
		stream = dialThrough(t, s, far)
	}
	if now := s.Switch.Status().Link.Session; now != session {
		t.Errorf("the session %s has been followed by %s", session, now)
	}

	// The token of the session is revoked.
	began := time.Now()
	if _, err := runToken("", "revoke", "--dir", dir, "--id", secondID); err != nil {
		t.Fatal(err)
	}
	until(t, "the sidecar has failed", func() bool { return s.Switch.Status().State == sidecar.Failed })
	if st, took := s.Switch.Status(), time.Since(began); st.Code != tunnel.TokenRejected || !strings.Contains(st.Cause, "revoked") || took > 10*time.Second {
		t.Errorf("after %v: %+v", took, st)
	} else {
		t.Logf("revoked: ended after %v", took)
	}
	if err := stream.echoes(); err == nil {
		t.Error("the stream of a session that was cut lives on")
	}

	// There is a good one again.
	third, _ := token()
	replace(t, in("token"), []byte(third))
	until(t, "the sidecar runs again", func() bool { return s.Switch.Status().State == sidecar.Running })
	audit, err := os.ReadFile(in("audit.log"))
	if err != nil {
		t.Fatal(err)
	}
	for _, secret := range []string{first, second, third} {
		if strings.Contains(log.String()+string(audit), strings.TrimSpace(secret)) {
			t.Error("the log or the audit holds a token")
		}
	}
	// The first of each kind, in order.
	want := []string{"started", "session_opened", "token_renewed", "changed", "not_changed", "policy_denied", "session_ended", "session_refused"}
	var kinds []string
	for line := range strings.Lines(string(audit)) {
		var l struct{ Audit, App, Code, Why, Session, Token string }
		if err := json.Unmarshal([]byte(line), &l); err != nil || len(line) > 1024 {
			t.Fatalf("%v in %d bytes: %s", err, len(line), line)
		}
		if !slices.Contains(kinds, l.Audit) {
			kinds = append(kinds, l.Audit)
		}
		switch l.Audit {
		case "session_opened":
			if l.App != "clinic" || l.Session == "" || l.Token == "" {
				t.Errorf("%s", line)
			}
		case "session_ended", "session_refused":
			if l.App != "clinic" || l.Code == "" || l.Why == "" {
				t.Errorf("%s", line)
			}
		case "policy_denied":
			if l.App != "clinic" || l.Code != string(tunnel.PolicyDenied) {
				t.Errorf("%s", line)
			}
		}
	}
	if len(kinds) < len(want) || !slices.Equal(slices.Sorted(slices.Values(kinds[:len(want)])), slices.Sorted(slices.Values(want))) {
		t.Errorf("the audit has %v, want %v\n%s", kinds, want, audit)
	}
}

// A mistake in one file must not keep tokens valid that were revoked in another.
func TestRevocationsAreFollowedWhileTheConfigurationIsWrong(t *testing.T) {
	dir, address := initMake(t)
	log := initCloud(t, dir, address)
	s := initSidecar(t, dir, nil)
	if err := initStart(t, s); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(dir, "cloudproxy.yaml")
	yaml, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	replace(t, file, append(yaml, "no_key_of_ours: 1\n"...))
	logged(t, log, "what was in force before stays so", 1)
	if _, err := runToken("", "revoke", "--dir", dir, "--app", "clinic"); err != nil {
		t.Fatal(err)
	}
	until(t, "the sidecar has failed", func() bool { return s.Switch.Status().State == sidecar.Failed })
	if st := s.Switch.Status(); st.Code != tunnel.TokenRejected || !strings.Contains(st.Cause, "revoked") {
		t.Errorf("%+v", st)
	}
}
