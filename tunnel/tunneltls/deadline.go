package tunneltls

import (
	"sync"
	"time"
)

// deadline is a point in time that can be moved while something waits for it.
type deadline struct {
	mu    sync.Mutex
	at    time.Time
	timer *time.Timer
	gone  chan struct{} // closed once it has passed
}

func (d *deadline) init() { d.gone = make(chan struct{}) }

func (d *deadline) set(t time.Time) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.at = t
	if d.timer != nil {
		d.timer.Stop()
		d.timer = nil
	}
	select {
	case <-d.gone:
		d.gone = make(chan struct{})
	default:
	}
	if t.IsZero() {
		return
	}
	gone := d.gone
	if left := time.Until(t); left > 0 {
		var mine *time.Timer
		mine = time.AfterFunc(left, func() {
			d.mu.Lock()
			defer d.mu.Unlock()
			if d.timer == mine { // not moved meanwhile
				close(gone)
			}
		})
		d.timer = mine
		return
	}
	close(gone)
}

func (d *deadline) passed() <-chan struct{} {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.gone
}

func (d *deadline) time() time.Time {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.at
}
