package assemble

import (
	"context"
	"log/slog"
	"time"
)

// Changes of addresses and routes come in bursts. They are told changesSettle
// after the first, and changesRest apart.
const (
	changesSettle = 10 * time.Millisecond
	changesRest   = 100 * time.Millisecond
)

// changes tells a link that this host's addresses or routes have changed.
type changes struct {
	seen chan struct{} // capacity 1
	told chan struct{} // capacity 1
}

func newChanges() *changes {
	return &changes{seen: make(chan struct{}, 1), told: make(chan struct{}, 1)}
}

// run watches until ctx ends.
func (c *changes) run(ctx context.Context, log *slog.Logger) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		watchChanges(ctx, func() { poke(c.seen) }, log)
	}()
	c.tell(ctx)
	<-done
}

// tell passes on what is seen, burst by burst.
func (c *changes) tell(ctx context.Context) {
	for {
		select {
		case <-c.seen:
		case <-ctx.Done():
			return
		}
		time.Sleep(changesSettle)
		select {
		case <-c.seen: // of the same burst
		default:
		}
		poke(c.told)
		time.Sleep(changesRest - changesSettle)
	}
}

func poke(c chan<- struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}
