//go:build unix

package config

import (
	"os"
	"path/filepath"
	"slices"
	"testing"
)

func TestSecretsThatEverybodyCanReadAreNamed(t *testing.T) {
	// Not t.TempDir: its folder may be closed to others already.
	dir, err := os.MkdirTemp("/tmp", "exposed")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	file := func(name string, mode os.FileMode) string {
		t.Helper()
		path := filepath.Join(dir, name)
		for _, err := range []error{os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte("x"), 0o600), os.Chmod(path, mode)} { // the umask may forbid the mode to WriteFile
			if err != nil {
				t.Fatal(err)
			}
		}
		return path
	}
	for path, mode := range map[string]os.FileMode{dir: 0o755, filepath.Dir(file("closed/token", 0o644)): 0o750, filepath.Dir(file("passable/token", 0o644)): 0o711} {
		if err := os.Chmod(path, mode); err != nil {
			t.Fatal(err)
		}
	}
	open, link := file("open", 0o644), filepath.Join(dir, "link")
	if err := os.Symlink(file("behind", 0o604), link); err != nil {
		t.Fatal(err)
	}
	c := &Sidecar{
		file:     file("culvert.yaml", 0o644),
		Identity: Identity{TokenFile: open},
		Proxy:    HTTPProxy{PasswordFile: file("group", 0o640)},
		Front:    Front{PasswordFile: open},
		Control:  Control{TokenFile: filepath.Join(dir, "closed/token")},
	}
	if got := c.Exposed(); !slices.Equal(got, []string{open}) {
		t.Errorf("%q", got)
	}
	c = &Sidecar{file: c.file, Identity: Identity{Token: "x"}, Control: Control{TokenFile: link}, Proxy: HTTPProxy{PasswordFile: filepath.Join(dir, "none")}}
	if got := c.Exposed(); !slices.Equal(got, []string{c.file, link}) {
		t.Errorf("%q", got)
	}
	p := &CloudProxy{Certificate: Certificate{KeyFile: filepath.Join(dir, "passable/token")}, ResetKey: file("reset.key", 0o600)}
	if got := p.Exposed(); !slices.Equal(got, []string{p.Certificate.KeyFile}) {
		t.Errorf("%q", got)
	}
	if got := (&Sidecar{}).Exposed(); len(got) != 0 {
		t.Errorf("without any: %q", got)
	}
}
