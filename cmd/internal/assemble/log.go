package assemble

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"strings"
	"sync"
	"syscall"

	"golang.org/x/time/rate"

	"culvert/cmd/internal/config"
	"culvert/tunnel"
)

// NewLog makes the logger that a configuration asks for. A line that has the
// attribute audit also goes to the audit file, where there is one, as JSON and
// whatever the level is. app is added to such lines that name no App ID; empty:
// it is not.
//
// Whatever text a peer, an app or a file has put into a line, the line is one,
// has no more than lineMost bytes, and comes no more often than a flood lets it.
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
	a := &auditHandler{Handler: h, app: app, flood: &flood{}}
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

// WarnOfExposed names secrets that everybody on this machine can read. They are used
// all the same: in a container nobody else may be there.
func WarnOfExposed(log *slog.Logger, files []string) {
	for _, file := range files {
		log.Warn("a file with a secret can be read by every user of this machine; run chmod o= on it", "file", file)
	}
}

// auditKey is the attribute of lines that belong in the audit file: its value
// says what happened.
const auditKey = "audit"

// auditHandler sends lines to the log, and those of the audit to its file too.
type auditHandler struct {
	slog.Handler
	file  slog.Handler // nil: there is none
	app   string
	flood *flood
	taken int // bytes of a line that WithAttrs has used
}

func (h *auditHandler) Enabled(ctx context.Context, l slog.Level) bool {
	return h.Handler.Enabled(ctx, l) || h.file != nil && h.file.Enabled(ctx, l)
}

func (h *auditHandler) Handle(ctx context.Context, r slog.Record) error {
	leftOut, ok := h.flood.pass(r.Level, r.Message)
	if !ok {
		return nil
	}
	audit, app := false, h.app == ""
	n := slog.NewRecord(r.Time, r.Level, tunnel.LogText(r.Message, messageMost), r.PC)
	r.Attrs(func(a slog.Attr) bool {
		audit = audit || a.Key == auditKey
		app = app || a.Key == "app"
		return true
	})
	if audit && !app {
		r = r.Clone()
		r.AddAttrs(slog.String("app", h.app))
	}
	left := lineMost - lineHead - h.taken - written(n.Message)
	r.Attrs(func(a slog.Attr) bool { left -= least(a); return true })
	r.Attrs(func(a slog.Attr) bool { n.AddAttrs(fit(a, &left)); return true })
	if leftOut > 0 {
		n.AddAttrs(slog.Int("left_out", leftOut))
	}
	r = n
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
	left, short := withMost-h.taken, make([]slog.Attr, len(attrs))
	for _, a := range attrs {
		left -= least(a)
	}
	for i, a := range attrs {
		short[i] = fit(a, &left)
	}
	attrs, n.taken = short, withMost-left
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

// How many bytes there are, as they are written.
const (
	lineMost    = 1024 // in a line
	lineHead    = 120  // of these for its time, level, what stands around the message, and left_out
	messageMost = 200  // in a message
	withMost    = 256  // in all that With has added
	textMost    = 400  // in one text
	textShort   = 48   // in one that is never cut for others
)

// ofText returns the text of a value that somebody else may have chosen.
func ofText(v slog.Value) (text string, ok bool) {
	switch {
	case v.Kind() == slog.KindString:
		return v.String(), true
	case v.Kind() != slog.KindAny:
		return "", false
	}
	switch v := v.Any().(type) {
	case error:
		return v.Error(), true
	case fmt.Stringer:
		return v.String(), true
	}
	return "", false // what we have counted, by words of ours
}

// written is how many bytes a text takes that LogText has made.
func written(text string) int {
	return len(text) + strings.Count(text, `"`) + strings.Count(text, `\`)
}

// least is how many bytes an attribute takes whose text is cut to nothing, unless
// it is short.
func least(a slog.Attr) int {
	n, v := len(`,"":"..."`)+len(a.Key), a.Value.Resolve()
	if v.Kind() == slog.KindGroup {
		for _, in := range v.Group() {
			n += len(a.Key) + least(in) // the key may stand before each
		}
	} else if text, ok := ofText(v); ok && len(text) <= textShort {
		n += written(tunnel.LogText(text, textShort))
	} else if !ok {
		n += max(len(v.String()), len("2006-01-02T15:04:05.999999999-07:00"))
	}
	return n
}

// fit cuts the text of an attribute to the bytes that are left in its line, and
// takes off what it uses.
func fit(a slog.Attr, left *int) slog.Attr {
	v := a.Value.Resolve()
	if v.Kind() == slog.KindGroup {
		var in []slog.Attr
		for _, one := range v.Group() {
			in = append(in, fit(one, left))
		}
		return slog.Attr{Key: a.Key, Value: slog.GroupValue(in...)}
	}
	text, ok := ofText(v)
	if !ok {
		return slog.Attr{Key: a.Key, Value: v}
	}
	if len(text) <= textShort {
		return slog.String(a.Key, tunnel.LogText(text, textShort))
	}
	text = tunnel.LogText(text, max(0, min(textMost, *left)))
	*left -= written(text)
	return slog.String(a.Key, text)
}

const (
	floodBurst = 2000 // lines of one message: as when a thousand sidecars come back at once
	floodRate  = 20   // a second, from then on
	debugBurst = 50   // the same of level debug, where strangers come to who say nothing of use
	debugRate  = 10
	floodKinds = 256 // messages that are told apart; some come from libraries
)

// flood bounds how often each message is written.
type flood struct {
	mu    sync.Mutex
	kinds map[string]*floodKind // guarded by mu
}

type floodKind struct {
	limit   *rate.Limiter
	leftOut int
}

// pass reports whether a line with this message may be written, and how many
// have not been since the last.
func (f *flood) pass(level slog.Level, message string) (leftOut int, ok bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.kinds == nil {
		f.kinds = map[string]*floodKind{}
	}
	k := f.kinds[message]
	if k == nil && len(f.kinds) >= floodKinds {
		message = ""
		k = f.kinds[message]
	}
	if k == nil {
		k = &floodKind{limit: rate.NewLimiter(floodRate, floodBurst)}
		if level < slog.LevelInfo {
			k.limit = rate.NewLimiter(debugRate, debugBurst)
		}
		f.kinds[message] = k
	}
	if !k.limit.Allow() {
		k.leftOut++
		return 0, false
	}
	leftOut, k.leftOut = k.leftOut, 0
	return leftOut, true
}

// Line is an error on one line, for where nothing logs it.
func Line(err error) string {
	text := strings.ReplaceAll(err.Error(), "\n", "; ")
	code := " (" + string(tunnel.CodeOf(err)) + ")"
	if sentence, ok := strings.CutSuffix(text, code); ok {
		return tunnel.LogText(sentence, lineMost-lineHead) + code
	}
	return tunnel.LogText(text, lineMost-lineHead)
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
	// A pipe that nobody reads is an error, and not waited for.
	f, err := os.OpenFile(a.path, os.O_WRONLY|os.O_CREATE|os.O_APPEND|syscall.O_NONBLOCK, 0o600)
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
