package tunneltls

import (
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"time"
)

// yamuxLog passes on what yamux prints, at most one line a second: a peer can
// make it print for every frame.
type yamuxLog struct {
	to *slog.Logger

	mu      sync.Mutex
	next    time.Time
	dropped int
}

func (l *yamuxLog) Printf(format string, v ...any) { l.line(fmt.Sprintf(format, v...)) }
func (l *yamuxLog) Print(v ...any)                 { l.line(fmt.Sprint(v...)) }
func (l *yamuxLog) Println(v ...any)               { l.line(fmt.Sprintln(v...)) }

func (l *yamuxLog) line(s string) {
	l.mu.Lock()
	now := time.Now()
	if now.Before(l.next) {
		l.dropped++
		l.mu.Unlock()
		return
	}
	dropped := l.dropped
	l.next, l.dropped = now.Add(time.Second), 0
	l.mu.Unlock()
	l.to.Debug(strings.TrimSpace(s), "left_out", dropped)
}
