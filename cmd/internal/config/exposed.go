package config

import (
	"os"
	"path/filepath"
	"runtime"
	"slices"
)

// Exposed returns the files with secrets that every user of this machine can read,
// the configuration among them where the token stands in it.
func (c *Sidecar) Exposed() []string {
	files := []string{c.Identity.TokenFile, c.Proxy.PasswordFile, c.Front.PasswordFile, c.Control.TokenFile}
	if c.Identity.Token != "" {
		files = append(files, c.file)
	}
	return exposed(files...)
}

// Exposed is that of Sidecar.
func (c *CloudProxy) Exposed() []string { return exposed(c.Certificate.KeyFile, c.ResetKey) }

func exposed(files ...string) []string {
	slices.Sort(files)
	return slices.DeleteFunc(slices.Compact(files), func(file string) bool { return !everybodyReads(file) })
}

// everybodyReads reports whether a file and all folders on the way to it are open to
// everybody. Windows has no such bits.
func everybodyReads(file string) bool {
	if file == "" || runtime.GOOS == "windows" {
		return false
	}
	file, err := filepath.EvalSymlinks(file)
	if err != nil {
		return false
	}
	if file, err = filepath.Abs(file); err != nil {
		return false
	}
	for need := os.FileMode(0o004); ; need = 0o001 {
		if st, err := os.Stat(file); err != nil || st.Mode().Perm()&need == 0 {
			return false
		}
		up := filepath.Dir(file)
		if up == file {
			return true
		}
		file = up
	}
}
