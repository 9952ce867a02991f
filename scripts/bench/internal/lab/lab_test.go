package lab

import (
	"path/filepath"
	"runtime"
	"strings"
	"testing"
)

func TestProcessIsReadAndEnds(t *testing.T) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	p, err := Place("").Start(filepath.Join(t.TempDir(), "log"), "sh", "-c", "echo hello; exec cat")
	if err != nil {
		t.Fatal(err)
	}
	if line, err := p.Line(); err != nil || line != "hello" {
		t.Errorf("got %q, %v", line, err)
	}
	p.Stop()
	p.Stop()
}

func TestProgramThatEndsTooSoonSaysWhy(t *testing.T) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	p, err := Place("").Start(filepath.Join(t.TempDir(), "log"), "sh", "-c", "echo no port >&2")
	if err != nil {
		t.Fatal(err)
	}
	defer p.Stop()
	if _, err := p.Line(); err == nil || !strings.Contains(err.Error(), "no port") {
		t.Errorf("got %v", err)
	}
}

func TestRunSaysWhatTheProgramSaid(t *testing.T) {
	if out, err := Place("").Run("echo", "hi"); err != nil || string(out) != "hi\n" {
		t.Errorf("got %q, %v", out, err)
	}
	if _, err := Place("").Run("sh", "-c", "echo woe >&2; exit 3"); err == nil || !strings.Contains(err.Error(), "woe") {
		t.Errorf("got %v", err)
	}
}
