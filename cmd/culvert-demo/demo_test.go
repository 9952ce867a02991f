package main

import (
	"bytes"
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"culvert/sidecar/control"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// demoPatience bounds every wait for something that must happen. It is far more
// than that takes on a busy machine.
const demoPatience = time.Minute

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
	case <-time.After(demoPatience):
		t.Fatalf("the demo does not end:\n%s", text)
		return -1
	}
}

// demoUntil starts the demo until one writes what is wanted, and returns that
// one. A machine that stands still for a moment makes a call lose media, and
// then the demo rightly ends without.
func demoUntil(t *testing.T, ctx context.Context, wanted string, args ...string) (code <-chan int, text *demoText) {
	t.Helper()
	for deadline := time.Now().Add(3 * demoPatience); ; {
		code, text := demoStart(ctx, args...)
		for !strings.Contains(text.String(), wanted) && len(code) == 0 {
			time.Sleep(10 * time.Millisecond)
		}
		if strings.Contains(text.String(), wanted) {
			return code, text
		}
		if time.Now().After(deadline) {
			t.Fatalf("in vain: %q\n%s", wanted, text)
		}
	}
}

// demoRow is a line of figures: direction, medium, sent, arrived, lost.
var demoRow = regexp.MustCompile(`(?m)^(app to far end|far end to app), (audio|video) +(\d+) +(\d+) +(-?\d+\.\d\d)% .* ms$`)

func TestTheCallArrivesInEitherMode(t *testing.T) {
	for mode, carried := range map[string]string{"udp": "Carried by quic", "tcp": "Carried by tls"} {
		t.Run(mode, func(t *testing.T) {
			code, text := demoUntil(t, t.Context(), ": ended (", "--once", "--for", "2s", "--mode", mode)
			if code := demoEnd(t, code, text); code != 0 {
				t.Errorf("exit %d", code)
			}
			if rows := demoRow.FindAllString(text.String(), -1); len(rows) != 4 {
				t.Errorf("%d rows of figures, want 4", len(rows))
			}
			for _, want := range []string{carried, "channel of ", ": live ("} {
				if !strings.Contains(text.String(), want) {
					t.Errorf("the story does not mention %q", want)
				}
			}
			if t.Failed() {
				t.Log(text)
			}
		})
	}
}

// The demo's sidecar has a control socket like any other, so its proxy can be
// stopped by force while the call is on.
func TestACallThatIsCutFailsTheDemo(t *testing.T) {
	for _, mode := range []string{"udp", "tcp"} {
		t.Run(mode, func(t *testing.T) {
			dir, err := os.MkdirTemp("", "demo")
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { os.RemoveAll(dir) })
			t.Setenv("TMPDIR", dir)
			code, text := demoUntil(t, t.Context(), "connected in", "--once", "--for", "4s", "--mode", mode)
			sockets, err := filepath.Glob(filepath.Join(dir, "culvert-demo-*", "*.sock"))
			if err != nil || len(sockets) != 1 {
				t.Fatalf("control sockets: %v, %v", sockets, err)
			}
			if _, err := control.NewClient(sockets[0]).Stop(t.Context(), 0, true); err != nil {
				t.Fatal(err)
			}
			if code := demoEnd(t, code, text); code != 1 || !strings.Contains(text.String(), "media did not arrive") {
				t.Errorf("exit %d, want 1:\n%s", code, text)
			}
			if rows := demoRow.FindAllString(text.String(), -1); len(rows) != 4 {
				t.Errorf("%d rows of figures, want 4:\n%s", len(rows), text)
			}
			if left, _ := os.ReadDir(dir); len(left) != 0 {
				t.Errorf("it left %v", left)
			}
		})
	}
}

func TestWithoutOnceTheProxyStaysUpUntilInterrupted(t *testing.T) {
	ctx, interrupt := context.WithCancel(t.Context())
	defer interrupt()
	code, text := demoUntil(t, ctx, "Ctrl-C stops it.", "--for", "1s")
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
