package config

import (
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"culvert/tunnel"
)

// Files are read again while a sidecar runs, whatever has been put in their place:
// none is waited for, or read without end.
func TestWhatIsNoPlainFileIsNotWaitedFor(t *testing.T) {
	dir := t.TempDir()
	name := func(s string) string { return filepath.Join(dir, s) }
	if err := syscall.Mkfifo(name("pipe"), 0o600); err != nil {
		t.Fatal(err)
	}
	for link, to := range map[string]string{"device": "/dev/zero", "link": "plain"} {
		if err := os.Symlink(to, name(link)); err != nil {
			t.Fatal(err)
		}
	}
	for file, size := range map[string]int{"plain": 32, "large": maxSecret + 1, "empty": 0} {
		if err := os.WriteFile(name(file), []byte(strings.Repeat("x", size)), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for file, want := range map[string]string{
		"plain": "", "link": "", "pipe": "regular file", "device": "regular file", ".": "regular file", "large": "64 KiB", "none": "no such file", "empty": "0 bytes",
	} {
		c := Control{TokenFile: name(file)}
		token, err := c.Token()
		if want == "" && (err != nil || token != strings.Repeat("x", 32)) {
			t.Errorf("%s: %q, %v", file, token, err)
		}
		if want != "" && (tunnel.CodeOf(err) != tunnel.ConfigInvalid || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), "control.token_file")) {
			t.Errorf("%s: %q, %v", file, token, err)
		}
		if i := (Identity{TokenFile: name(file)}); want != "" && file != "empty" {
			if _, err := i.TokenNow(); err == nil || !strings.Contains(err.Error(), "identity.token_file") {
				t.Errorf("%s as identity.token_file: %v", file, err)
			}
		}
	}
	for _, file := range []string{"pipe", "device", ".", "empty", "large"} {
		if _, err := ReadSidecar(name(file)); tunnel.CodeOf(err) != tunnel.ConfigInvalid {
			t.Errorf("%s as configuration: %v", file, err)
		}
	}
}
