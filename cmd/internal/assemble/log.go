package assemble

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"os"
	"sync"

	"culvert/cmd/internal/config"
	"culvert/tunnel"
)

// NewLog makes the logger that a configuration asks for. A line that has the
// attribute audit also goes to the audit file, where there is one, as JSON and
// whatever the level is. app is added to such lines that name no App ID; empty:
// it is not.
func NewLog(c config.Log, app string, w io.Writer) (*slog.Logger, error) {
	var level slog.Level
	if level.UnmarshalText([]byte(c.Level)) != nil {
		level = slog.LevelInfo
	}
	o := &slog.HandlerOptions{Level: level}
	var h slog.Handler = slog.NewTextHandler(w, o)
	if c.Format == "json" {
		h = slog.NewJSONHandler(w, o)
	}
	a := &auditHandler{Handler: h, app: app}
	if c.AuditFile != "" {
		f := &auditFile{path: c.AuditFile}
		if err := f.open(); err != nil {
			return nil, tunnel.Errorf(tunnel.ConfigInvalid, "log.audit_file: %s can not be written: %w", c.AuditFile, errors.Unwrap(err))
		}
		f.failed = func(err error) {
			slog.New(h).Error("the audit file can not be written; what belongs in it stands here only", "file", c.AuditFile, "err", err)
		}
		a.file = slog.NewJSONHandler(f, &slog.HandlerOptions{Level: slog.LevelInfo})
	}
	return slog.New(a), nil
}

// auditKey is the attribute of lines that belong in the audit file: its value
// says what happened.
const auditKey = "audit"

// auditHandler sends lines to the log, and those of the audit to its file too.
type auditHandler struct {
	slog.Handler
	file slog.Handler // nil: there is none
	app  string
}

func (h *auditHandler) Enabled(ctx context.Context, l slog.Level) bool {
	return h.Handler.Enabled(ctx, l) || h.file != nil && h.file.Enabled(ctx, l)
}

func (h *auditHandler) Handle(ctx context.Context, r slog.Record) error {
	audit, app := false, h.app == ""
	r.Attrs(func(a slog.Attr) bool {
		audit = audit || a.Key == auditKey
		app = app || a.Key == "app"
		return true
	})
	if audit && !app {
		r = r.Clone()
		r.AddAttrs(slog.String("app", h.app))
	}
	var errs []error
	if h.Handler.Enabled(ctx, r.Level) {
		errs = append(errs, h.Handler.Handle(ctx, r))
	}
	if audit && h.file != nil {
		errs = append(errs, h.file.Handle(ctx, r))
	}
	return errors.Join(errs...)
}

func (h *auditHandler) WithAttrs(attrs []slog.Attr) slog.Handler {
	n := *h
	n.Handler = h.Handler.WithAttrs(attrs)
	if h.file != nil {
		n.file = h.file.WithAttrs(attrs)
	}
	for _, a := range attrs {
		if a.Key == "app" {
			n.app = ""
		}
	}
	return &n
}

func (h *auditHandler) WithGroup(name string) slog.Handler {
	n := *h
	n.Handler = h.Handler.WithGroup(name)
	if h.file != nil {
		n.file = h.file.WithGroup(name)
	}
	return &n
}

// auditFile appends lines to a file. When that has been moved away, as logrotate
// does, the next line begins another.
type auditFile struct {
	path   string
	failed func(error) // told when writing begins to fail

	mu   sync.Mutex // guards the fields below
	f    *os.File
	down bool
}

func (a *auditFile) open() error {
	f, err := os.OpenFile(a.path, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err == nil {
		a.f = f
	}
	return err
}

// Write implements io.Writer for slog, which calls it once for each line.
func (a *auditFile) Write(p []byte) (int, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	err := a.follow()
	if err == nil {
		var n int
		if n, err = a.f.Write(p); err != nil && n > 0 { // a full disk takes a part of it
			if st, e := a.f.Stat(); e == nil {
				a.f.Truncate(st.Size() - int64(n))
			}
		}
	}
	if err != nil && !a.down {
		a.failed(err)
	}
	a.down = err != nil
	return len(p), nil // the log has been told
}

// follow opens the file anew where the path is not it any more. a.mu is held.
func (a *auditFile) follow() error {
	if a.f != nil {
		is, err := os.Stat(a.path)
		if err == nil {
			var was os.FileInfo
			if was, err = a.f.Stat(); err == nil && os.SameFile(is, was) {
				return nil
			}
		}
		a.f.Close()
		a.f = nil
	}
	return a.open()
}
