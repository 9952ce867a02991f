package assemble_test

import (
	"io"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"culvert/cmd/internal/assemble"
	"culvert/cmd/internal/config"
	"culvert/tunnel"
)

// Nothing waits for a reader of the audit: what cannot be written is an error.
func TestAPipeThatNobodyReadsIsNoAuditFile(t *testing.T) {
	pipe := filepath.Join(t.TempDir(), "audit")
	if err := syscall.Mkfifo(pipe, 0o600); err != nil {
		t.Fatal(err)
	}
	_, err := assemble.NewLog(config.Log{AuditFile: pipe}, "clinic", io.Discard)
	if tunnel.CodeOf(err) != tunnel.ConfigInvalid || !strings.Contains(err.Error(), "log.audit_file") {
		t.Errorf("error %v", err)
	}
}
