//go:build unix

package identity

import (
	"path/filepath"
	"syscall"
	"testing"

	"culvert/tunnel"
)

// Opening a pipe waits for whoever writes into it: this test would not end.
func TestAPipeInTheirPlaceHoldsNobodyUp(t *testing.T) {
	file := filepath.Join(t.TempDir(), "pipe")
	if err := syscall.Mkfifo(file, 0o600); err != nil {
		t.Skip(err)
	}
	_, list := LoadRevoked(file)
	_, public := LoadPublicKey(file)
	for what, err := range map[string]error{"a list": list, "a public key": public} {
		if tunnel.CodeOf(err) != tunnel.ConfigInvalid {
			t.Errorf("%s: %v", what, err)
		}
	}
}
