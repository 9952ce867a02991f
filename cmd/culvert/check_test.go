package main

import (
	"bytes"
	"crypto/ed25519"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"culvert/cloudproxy/identity"
	"culvert/sidecar/check"
)

func TestCheckUsage(t *testing.T) {
	t.Chdir(t.TempDir())
	t.Setenv("CULVERT_CONFIG", "")
	if _, err := os.Stat("/etc/culvert/culvert.yaml"); err != nil {
		if _, bad := runWant(t, 2, "check"); !strings.Contains(bad, "-c culvert.yaml") {
			t.Errorf("without a configuration: %s", bad)
		}
	}
	for want, args := range map[string][]string{
		"takes no arguments": {"check", "-c", "x", "y"},
		"between 500ms":      {"check", "-c", "x", "--media", "0s"},
		"1m0s":               {"check", "-c", "x", "--media", "2m"},
		"is not a mode":      {"check", "-c", "x", "--mode", "sctp"},
		"--report":           {"check", "-c", "x", "--report", filepath.Join(t.TempDir(), "no", "folder")},
		"not defined":        {"check", "--nonsense"},
	} {
		if _, bad := runWant(t, 2, args...); !strings.Contains(bad, want) {
			t.Errorf("%v: %s", args, bad)
		}
	}
}

func TestCheckNamesWhatIsWrongWithTheConfiguration(t *testing.T) {
	file := filepath.Join(t.TempDir(), "culvert.yaml")
	for text, want := range map[string]struct{ code, says string }{
		"": {"config_invalid", "cloud_proxy.address"},
		"cloud_proxy: {address: a.example, nonsense: 1}\n":                                                  {"config_invalid", "nonsense"},
		"cloud_proxy: {address: a.example}\nidentity: {app: x, token: not-a-token}\n":                       {"token_rejected", "not a token"},
		"cloud_proxy: {address: a.example}\nidentity: {app: x, token_file: none}\n":                         {"config_invalid", "none"},
		"cloud_proxy: {address: a.example}\nidentity: {app: x, token: y}\npolicy: {profiles: [nonsense]}\n": {"config_invalid", "nonsense"},
	} {
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		out, _ := runWant(t, 1, "check", "-c", file, "--json")
		var r check.Report
		if err := json.Unmarshal([]byte(out), &r); err != nil || string(r.Code) != want.code || !strings.Contains(r.Sentence, want.says) || r.Verdict != check.Failed || len(r.Steps) != 1 {
			t.Errorf("%q: %v\n%s", text, err, out)
		}
		if out, _ = runWant(t, 1, "check", "-c", file); !strings.Contains(out, "Not usable: ") || !strings.Contains(out, "\nNext: ") {
			t.Errorf("in words: %s", out)
		}
	}
}

func TestCheckTellsWhatItFoundWhereThePageCanNotBeWritten(t *testing.T) {
	if _, err := os.Stat("/dev/full"); err != nil {
		t.Skip("a disk that is full: ", err)
	}
	file := filepath.Join(t.TempDir(), "culvert.yaml")
	if err := os.WriteFile(file, []byte("nonsense: 1\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	out, bad := runWant(t, 1, "check", "-c", file, "--json", "--report", "/dev/full")
	var r check.Report
	if err := json.Unmarshal([]byte(out), &r); err != nil || !strings.Contains(r.Sentence, "nonsense") || !strings.Contains(bad, "the report can not be written") {
		t.Errorf("%v\n%s%s", err, out, bad)
	}
}

// A test that is ended tells what it has found so far, and blames nothing.
func TestCheckIsEndedBySignals(t *testing.T) {
	if runtime.GOOS == "windows" {
		t.Skip("there are no signals")
	}
	silent, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	_, key, err := ed25519.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	token, err := identity.Issue(key, identity.Claims{App: "x", Concurrency: 1, Expires: time.Now().Add(time.Hour)})
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	file, page := filepath.Join(dir, "culvert.yaml"), filepath.Join(dir, "page.html")
	text := fmt.Sprintf("cloud_proxy: {address: %q, server_name: a.example}\nidentity: {app: x, token: %s}\n", silent.Addr(), token)
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(os.Args[0], "check", "-c", file, "--mode", "tcp", "--json", "--report", page)
	cmd.Env = append(os.Environ(), runAsCulvert+"=1", "CULVERT_CONTROL="+filepath.Join(dir, "none.sock"), "NO_PROXY=*")
	var out, bad bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &bad
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	for range 2 { // of the step about TCP, and of the one about TLS, which waits for an answer
		c, err := silent.Accept()
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
	}
	cmd.Process.Signal(syscall.SIGTERM)
	cmd.Wait()
	var r check.Report
	if err := json.Unmarshal(out.Bytes(), &r); err != nil || !r.Interrupted || !strings.Contains(r.Sentence, `at the step "TLS"`) || cmd.ProcessState.ExitCode() != 1 {
		t.Errorf("%v, %v\n%s%s", err, cmd.ProcessState, &out, &bad)
	}
	if got, err := os.ReadFile(page); err != nil || !strings.Contains(string(got), "Not known") {
		t.Errorf("the page is %.200q, %v", got, err)
	}
}

func TestCheckWritesItsPageOverNoConfiguration(t *testing.T) {
	dir := t.TempDir()
	file, other := filepath.Join(dir, "culvert.yaml"), filepath.Join(dir, "link")
	const text = "cloud_proxy: {address: a.example}\nidentity: {app: x, token: not-a-token}\n"
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Link(file, other); err != nil {
		t.Fatal(err)
	}
	for _, page := range []string{file, other} {
		if _, bad := runWant(t, 2, "check", "-c", file, "--report", page); !strings.Contains(bad, "is the configuration") {
			t.Error(bad)
		}
	}
	if got, err := os.ReadFile(file); err != nil || string(got) != text {
		t.Errorf("the configuration is %q, %v", got, err)
	}
}

func TestCheckPrintsFiguresAndOneSentence(t *testing.T) {
	f := check.Figures{Sent: 500, Arrived: 495, Loss: 0.01, Delay: 20 * time.Millisecond, P99: 31500 * time.Microsecond, Gap: 45 * time.Millisecond}
	k := check.Kind{Up: f, Down: f, Grade: check.GradeAcceptable}
	r := &check.Report{Verdict: check.Degraded, Sentence: "it is so", Next: "do this", Ways: []*check.Way{{Carrier: "tls", Way: "lanes", Audio: k, Video: k}}}
	var b bytes.Buffer
	if err := (&checkOutput{w: &b}).conclusion(r); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"lanes", "audio up", "video down", "1.0 %", "20.0 ms", "31.5 ms", "acceptable", "\nUsable, but: it is so.\nNext: do this.\n"} {
		if !strings.Contains(b.String(), want) {
			t.Errorf("%q is missing in\n%s", want, &b)
		}
	}
}
