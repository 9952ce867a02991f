package session

import (
	"context"
	"time"

	"culvert/tunnel"
	"culvert/tunnel/resume"
	"culvert/tunnel/wire"
)

// A line is a stream that outlives the carriers under it: the control stream,
// or the stream of an app. The near end brings it to a carrier.

// controlNumber is the control stream's among the session's lines.
const controlNumber = 0

const (
	// lineRest is what lies between attempts to bring a line to a carrier that
	// takes no streams.
	lineRest = 100 * time.Millisecond
	// lineTime bounds one attempt: a carrier that does not answer for this long
	// is left for another.
	lineTime = 5 * time.Second
)

// newLine makes a line that seeks a carrier whenever it has lost its own.
func (a *Attached) newLine(number uint64) *resume.Conn {
	var line *resume.Conn
	line = resume.New(resume.Config{Detached: func(error) {
		a.mu.Lock()
		defer a.mu.Unlock()
		if a.ctx.Err() == nil {
			a.work.Go(func() { a.reattach(line, number) })
		}
	}})
	return line
}

// reattach brings a line to a carrier again.
func (a *Attached) reattach(line *resume.Conn, number uint64) {
	var avoid tunnel.Carrier
	for {
		c, err := a.carrier(a.ctx, avoid)
		if err != nil {
			line.Expire(err)
			return
		}
		under, received, err := a.ask(a.ctx, c, wire.Message{Resume: &wire.Resume{Number: number, Received: line.Received()}})
		switch {
		case err == nil:
			if line.Attach(under, received) == nil {
				return
			}
		case isRefusal(err):
			line.Expire(err)
			return
		}
		avoid = c
		select {
		case <-time.After(lineRest):
		case <-a.ctx.Done():
		}
	}
}
