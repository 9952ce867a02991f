package main

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"sync"
	"testing"
	"time"

	"culvert/cmd/internal/assemble"
	"culvert/cmd/internal/cmdtest"
	"culvert/cmd/internal/config"
	"culvert/sidecar"
	"culvert/tunnel"
)

// A restart of a cloud proxy that serves many sidecars must not keep them from
// coming back: each learns of it at once, and comes again. CULVERT_SIDECARS says
// how many, where a figure is wanted: a test with a hundred ends sooner.
func TestManySidecarsComeBackAfterARestart(t *testing.T) {
	many := 100
	if text := os.Getenv("CULVERT_SIDECARS"); text != "" {
		var err error
		if many, err = strconv.Atoi(text); err != nil {
			t.Fatal(err)
		}
	}
	dir := t.TempDir()
	program := filepath.Join(dir, "culvert-cloudproxy")
	if out, err := exec.CommandContext(t.Context(), "go", "build", "-o", program, "culvert/cmd/culvert-cloudproxy").CombinedOutput(); err != nil {
		t.Fatalf("go build: %v\n%s", err, out)
	}
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	at := l.Addr().String()
	l.Close()
	conf := filepath.Join(dir, "conf")
	if out, err := exec.Command(program, "init", "--host", at, "--dir", conf, "--profile", "public", "--concurrency", strconv.Itoa(2*many)).CombinedOutput(); err != nil {
		t.Fatalf("init: %v\n%s", err, out)
	}
	cloud := func() *exec.Cmd {
		cmd := exec.Command(program, "run", "-c", filepath.Join(conf, "cloudproxy.yaml"))
		log := &cmdtest.Text{}
		cmd.Stdout, cmd.Stderr = log, log
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			cmd.Process.Kill()
			cmd.Wait()
			if t.Failed() {
				t.Logf("the cloud proxy's log:\n%s", log)
			}
		})
		runEventually(t, "the cloud proxy listens", func() bool {
			c, err := net.Dial("tcp4", at)
			if err == nil {
				c.Close()
			}
			return err == nil
		})
		return cmd
	}
	first := cloud()

	ctx, cancel := context.WithCancel(context.Background())
	var running, starting sync.WaitGroup
	t.Cleanup(func() { cancel(); running.Wait() })
	sidecars := make([]*assemble.Sidecar, many)
	place := make(chan struct{}, 16) // so that the start is not what is measured
	for i := range sidecars {
		c, err := config.ReadSidecar(filepath.Join(conf, "culvert.yaml"))
		if err != nil {
			t.Fatal(err)
		}
		c.Identity.KeyFile, c.Front.Listen = "", "127.0.0.1:0"
		s, err := assemble.NewSidecar(c, slog.New(slog.DiscardHandler))
		if err != nil {
			t.Fatal(err)
		}
		sidecars[i] = s
		running.Go(func() { s.Run(ctx) })
		starting.Go(func() {
			place <- struct{}{}
			defer func() { <-place }()
			if _, err := s.Switch.Start(ctx, sidecar.StartOptions{Keep: true}); err != nil {
				t.Errorf("sidecar %d: %v", i, err)
			}
		})
	}
	starting.Wait()
	if t.Failed() {
		return
	}
	before := make([]string, many)
	for i, s := range sidecars {
		before[i] = s.Switch.Status().Link.Session
	}
	first.Process.Kill()
	first.Wait()
	time.Sleep(500 * time.Millisecond)
	cloud()
	again := time.Now()
	back := make([]time.Duration, many)
	left := many
	for end := again.Add(time.Minute); left > 0 && time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		for i, s := range sidecars {
			if l := s.Switch.Status().Link; back[i] == 0 && l.Phase == tunnel.LinkUp && l.Session != before[i] {
				back[i] = time.Since(again)
				left--
			}
		}
	}
	if left > 0 {
		states := map[string]int{}
		for i, s := range sidecars {
			if back[i] == 0 {
				states[s.Switch.Status().Link.String()]++
			}
		}
		t.Fatalf("%d of %d sidecars are not back after a minute: %v", left, many, states)
	}
	slices.Sort(back)
	part := func(n int) string { return fmt.Sprint(back[(many-1)*n/100].Round(time.Millisecond)) }
	t.Logf("of %d sidecars half were back %s after it listened again, 95 %% after %s, all after %s", many, part(50), part(95), part(100))
	if late := back[(many-1)*95/100]; late > 10*time.Second {
		t.Errorf("95 %% were back after %v, want at most 10 s", late)
	}
}
