package tunnelquic

import (
	"context"
	"sync"

	"github.com/quic-go/quic-go"
)

// maxWindows bounds, in bytes, what the flow-control windows of all connections of
// a listener have grown by: what peers can have wait there, beside serverConnWindow
// for each.
const maxWindows = 512 << 20

// windows is what the connections' windows have grown by.
type windows struct {
	limit uint64

	mu    sync.Mutex // guards the fields below
	total uint64
	each  map[*quic.Conn]uint64
}

// allow is quic.Config.AllowConnectionWindowIncrease.
func (w *windows) allow(c *quic.Conn, more uint64) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.total+more > w.limit {
		return false
	}
	if _, known := w.each[c]; !known {
		if w.each == nil {
			w.each = map[*quic.Conn]uint64{}
		}
		context.AfterFunc(c.Context(), func() { w.forget(c) })
	}
	w.each[c] += more
	w.total += more
	return true
}

func (w *windows) forget(c *quic.Conn) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.total -= w.each[c]
	delete(w.each, c)
}
