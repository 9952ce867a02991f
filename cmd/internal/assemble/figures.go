package assemble

import (
	"context"
	"log/slog"
	"maps"
	"slices"
	"time"

	"culvert/tunnel"
)

// figuresEvery is how often a cloud proxy logs what it has done.
const figuresEvery = time.Minute

// figures are what a cloud proxy has done since it was made, and does now.
type figures struct {
	sessions, associations, streams int
	sent, received                  uint64 // datagrams
	dropped                         map[string]uint64
}

// droppedName is the reason for datagrams lost while they waited for a name.
const droppedName = "name_unresolved"

func (c *CloudProxy) figures() figures {
	st := c.egress.Stats()
	if n := c.resolve.Dropped(); n > 0 {
		st.Dropped[droppedName] = n
	}
	if n := c.guard.Dropped(); n > 0 {
		st.Dropped[string(tunnel.PolicyDenied)] = n
	}
	return figures{c.server.Sessions(), st.Associations, st.Streams, st.Sent, st.Received, st.Dropped}
}

func (f figures) equal(g figures) bool {
	return f.sessions == g.sessions && f.associations == g.associations && f.streams == g.streams &&
		f.sent == g.sent && f.received == g.received && maps.Equal(f.dropped, g.dropped)
}

func (f figures) log(log *slog.Logger) {
	attrs := []any{"sessions", f.sessions, "associations", f.associations, "streams", f.streams, "sent", f.sent, "received", f.received}
	var dropped []any
	for _, reason := range slices.Sorted(maps.Keys(f.dropped)) {
		dropped = append(dropped, reason, f.dropped[reason])
	}
	log.Info("egress", append(attrs, slog.Group("dropped", dropped...))...)
}

// logFigures logs them once a minute while they change, and what has become of
// them when ctx ends. Of a cloud proxy that nobody has used it logs nothing.
func logFigures(ctx context.Context, now func() figures, log *slog.Logger) {
	tick := time.NewTicker(figuresEvery)
	defer tick.Stop()
	var last figures
	for {
		select {
		case <-tick.C:
			if f := now(); !f.equal(last) {
				last = f
				f.log(log)
			}
		case <-ctx.Done():
			if f := now(); !f.equal(figures{}) {
				f.log(log)
			}
			return
		}
	}
}
