package resume

import (
	"sync"
	"time"
)

// deadline wakes those that wait on cond when its time has come. Its owner's
// lock, cond's, guards it.
type deadline struct {
	cond  *sync.Cond
	at    time.Time // zero: none
	timer *time.Timer
}

func (d *deadline) set(t time.Time) {
	d.at = t
	if d.timer != nil {
		d.timer.Stop()
		d.timer = nil
	}
	if wait := time.Until(t); !t.IsZero() && wait > 0 {
		d.timer = time.AfterFunc(wait, func() {
			d.cond.L.Lock()
			defer d.cond.L.Unlock()
			d.cond.Broadcast()
		})
	}
	d.cond.Broadcast()
}

func (d *deadline) over() bool { return !d.at.IsZero() && !time.Now().Before(d.at) }
