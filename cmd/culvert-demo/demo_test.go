package main

import (
	"bytes"
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"culvert/sidecar/control"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// demoPatience bounds every wait for something that should happen soon.
const demoPatience = 20 * time.Second

// demoText collects what the demo writes, and can be read meanwhile.
type demoText struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (t *demoText) Write(p []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.b.Write(p)
}

func (t *demoText) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.b.String()
}

// demoStart runs the demo on a free port; its exit code comes out of the channel.
func demoStart(ctx context.Context, args ...string) (code <-chan int, text *demoText) {
	text = &demoText{}
	exit := make(chan int, 1)
	go func() {
		exit <- run(ctx, append([]string{"culvert-demo", "--listen", "127.0.0.1:0"}, args...), text, text)
	}()
	return exit, text
}

func demoEnd(t *testing.T, code <-chan int, text *demoText) int {
	t.Helper()
	select {
	case c := <-code:
		return c
	case <-time.After(2 * demoPatience):
		t.Fatalf("the demo does not end:\n%s", text)
		return -1
	}
}

func demoEventually(t *testing.T, what string, text *demoText, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(demoPatience); !ok(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("in vain: %s\n%s", what, text)
		}
	}
}

// demoRow is a line of figures: direction, medium, sent, arrived, lost.
var demoRow = regexp.MustCompile(`(?m)^(app to far end|far end to app), (audio|video) +(\d+) +(\d+) +(-?\d+\.\d\d)% .* ms$`)

// demoBoth runs the demo in both modes at the same time. The cli package keeps
// flags in a global, so the second begins when the first has read its own.
func demoBoth(t *testing.T, meanwhile func(text *demoText), check func(mode string, code int, text *demoText)) {
	t.Helper()
	var ends []func()
	for _, mode := range []string{"udp", "tcp"} {
		code, text := demoStart(t.Context(), "--once", "--for", "2s", "--mode", mode)
		demoEventually(t, "the call connects", text, func() bool { return strings.Contains(text.String(), "connected in") })
		meanwhile(text)
		ends = append(ends, func() { check(mode, demoEnd(t, code, text), text) })
	}
	for _, end := range ends {
		end()
	}
}

func TestTheCallArrivesInEitherMode(t *testing.T) {
	demoBoth(t, func(*demoText) {}, func(mode string, code int, text *demoText) {
		if code != 0 {
			t.Fatalf("mode %s: exit %d:\n%s", mode, code, text)
		}
		rows := demoRow.FindAllStringSubmatch(text.String(), -1)
		if len(rows) != 4 {
			t.Fatalf("mode %s: %d rows of figures, want 4:\n%s", mode, len(rows), text)
		}
		for _, r := range rows {
			sent, _ := strconv.Atoi(r[3])
			lost, _ := strconv.ParseFloat(r[5], 64)
			if least := map[string]int{"audio": 50, "video": 120}[r[2]]; sent < least || lost > 5 {
				t.Errorf("mode %s: %s: want at least %d packets sent and at most 5 %% of them lost", mode, r[0], least)
			}
		}
		carried := map[string]string{"udp": "Carried by quic", "tcp": "Carried by tls"}[mode]
		for _, want := range []string{carried, "channel of ", "live", "ended"} {
			if !strings.Contains(text.String(), want) {
				t.Errorf("mode %s: the story does not mention %q:\n%s", mode, want, text)
			}
		}
	})
}

// The demo's sidecar has a control socket like any other, so its proxy can be
// stopped by force while the call is on.
func TestACallThatIsCutFailsTheDemo(t *testing.T) {
	dir, err := os.MkdirTemp("", "demo")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	t.Setenv("TMPDIR", dir)
	seen := map[string]bool{}
	demoBoth(t, func(*demoText) {
		sockets, err := filepath.Glob(filepath.Join(dir, "culvert-demo-*", "*.sock"))
		if err != nil {
			t.Fatal(err)
		}
		for _, socket := range sockets {
			if seen[socket] {
				continue
			}
			seen[socket] = true
			if _, err := control.NewClient(socket).Stop(t.Context(), 0, true); err != nil {
				t.Fatal(err)
			}
		}
	}, func(mode string, code int, text *demoText) {
		if code != 1 || !strings.Contains(text.String(), "media did not arrive") {
			t.Errorf("mode %s: exit %d, want 1:\n%s", mode, code, text)
		}
		rows := demoRow.FindAllStringSubmatch(text.String(), -1)
		if len(rows) != 4 {
			t.Errorf("mode %s: %d rows of figures, want 4:\n%s", mode, len(rows), text)
		}
		for _, r := range rows {
			if lost, _ := strconv.ParseFloat(r[5], 64); lost < 50 {
				t.Errorf("mode %s: a cut call lost only this: %s", mode, r[0])
			}
		}
	})
	if left, _ := os.ReadDir(dir); len(left) != 0 || len(seen) != 2 {
		t.Errorf("of %v it left %v", seen, left)
	}
}

func TestWithoutOnceTheProxyStaysUpUntilInterrupted(t *testing.T) {
	ctx, interrupt := context.WithCancel(t.Context())
	defer interrupt()
	code, text := demoStart(ctx, "--for", "300ms")
	demoEventually(t, "the proxy stays up", text, func() bool { return strings.Contains(text.String(), "Ctrl-C stops it.") })
	line := regexp.MustCompile(`(?m)^ +curl .*$`).FindString(text.String())
	if line == "" {
		t.Fatalf("no curl line:\n%s", text)
	}
	if _, err := exec.LookPath("curl"); err != nil && os.Getenv("CI") != "true" {
		t.Logf("curl is missing, so this was not tried: %s", line)
	} else {
		cmd := exec.CommandContext(ctx, "sh", "-c", line)
		cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "HOME=/nonexistent", "all_proxy=http://127.0.0.1:9", "no_proxy=127.0.0.1"}
		if out, err := cmd.CombinedOutput(); err != nil || !strings.Contains(string(out), "Hello from the far end") {
			t.Errorf("%s: %v: %s", strings.TrimSpace(line), err, out)
		}
	}
	interrupt()
	if code := demoEnd(t, code, text); code != 0 {
		t.Errorf("exit %d:\n%s", code, text)
	}
}
