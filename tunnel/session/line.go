package session

import (
	"context"
	"errors"
	"maps"
	"slices"
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
	// endTime is how long a farewell may take.
	endTime = time.Second
	// lineTime bounds one attempt: a carrier that does not answer for this long
	// is left for another.
	lineTime = 5 * time.Second
)

// nearLine is a line at the near end.
type nearLine struct {
	*resume.Conn
	number uint64

	// The session's mu guards these.
	by      tunnel.Carrier // the carrier that it is on; nil: none
	seeking bool
}

// newLine makes a line that seeks a carrier whenever it has lost its own.
func (a *Attached) newLine(number uint64) *nearLine {
	line := &nearLine{number: number}
	line.Conn = resume.New(resume.Config{
		Share:    a.share,
		Detached: func(error) { a.seek(line) },
		Over: func() {
			a.mu.Lock()
			defer a.mu.Unlock()
			delete(a.lines, line)
		},
	})
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.ctx.Err() != nil {
		line.Expire(context.Cause(a.ctx))
	} else {
		a.lines[line] = struct{}{}
	}
	return line
}

// seek brings a line to a carrier, on a goroutine of its own.
func (a *Attached) seek(line *nearLine) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if !line.seeking && a.ctx.Err() == nil { // within mu, so that Run does not wait too early
		line.seeking = true
		a.work.Go(func() { a.bring(line) })
	}
}

// expireLines ends all lines with the session.
func (a *Attached) expireLines(why error) {
	a.mu.Lock()
	all := slices.Collect(maps.Keys(a.lines))
	a.mu.Unlock()
	for _, line := range all {
		line.Expire(why)
	}
}

// bring brings a line to a carrier.
func (a *Attached) bring(line *nearLine) {
	found := func(c tunnel.Carrier) {
		a.mu.Lock()
		line.by, line.seeking = c, false
		a.mu.Unlock()
	}
	var avoid tunnel.Carrier
	for {
		received := line.Detach()
		c, err := a.carrier(a.ctx, avoid)
		if err != nil {
			line.Expire(err)
			return
		}
		m := wire.Message{Resume: &wire.Resume{Number: line.number, Received: received}}
		if line.number == controlNumber {
			m = wire.Message{Control: &wire.Control{Received: received}}
		}
		ctx, cancel := context.WithTimeout(a.ctx, lineTime)
		under, answer, err := a.ask(ctx, c, m)
		cancel()
		var no refusal
		switch {
		case errors.As(err, &no):
			line.Expire(no.error)
			return
		case err != nil:
		case answer.Resumed == nil:
			under.Abort(nil)
			line.Expire(tunnel.Errorf(tunnel.Internal, "the cloud proxy answered with something else; update the older side"))
			return
		default:
			found(c) // before it can be lost again
			line.Attach(under, answer.Resumed.Received)
			return
		}
		avoid = c
		select {
		case <-time.After(lineRest):
		case <-a.ctx.Done():
		}
	}
}

// refusal is what the cloud proxy said, and not a failure on the way to it.
type refusal struct{ error }

func (r refusal) Unwrap() error { return r.error }

// ask opens a stream on a carrier, says what it is for and reads the answer.
// The error is a refusal where the cloud proxy said no.
func (a *Attached) ask(ctx context.Context, c tunnel.Carrier, m wire.Message) (tunnel.Stream, wire.Message, error) {
	s, err := c.OpenStream(ctx)
	if err != nil {
		return nil, wire.Message{}, err
	}
	stop := context.AfterFunc(ctx, func() { s.Abort(context.Cause(ctx)) })
	err = wire.Write(s, m)
	var answer wire.Message
	if err == nil {
		answer, err = wire.Read(s, a.welcome.Version)
	}
	if !stop() && err == nil {
		err = context.Cause(ctx)
	}
	switch {
	case err != nil:
		s.Abort(err)
		return nil, wire.Message{}, err
	case answer.Refused != nil:
		s.Close()
		return nil, wire.Message{}, refusal{answer.Refused.Err()}
	}
	return s, answer, nil
}

// addLine makes a line, which waits until the near end brings it to a carrier
// again, and runs what it is for. It is the session's until it is over: what was
// written last may have to be said again.
func (f *Far) addLine(number uint64, serve func(line *resume.Conn)) (*resume.Conn, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	switch {
	case f.ctx.Err() != nil:
		return nil, context.Cause(f.ctx)
	case f.lines[number] != nil:
		return nil, tunnel.Errorf(tunnel.Internal, "stream %d is open already", number)
	}
	line := resume.New(resume.Config{Share: f.share, Kept: f.kept, Limit: f.cfg.Hold, Over: func() {
		f.mu.Lock()
		defer f.mu.Unlock()
		delete(f.lines, number)
	}})
	f.lines[number] = line
	f.work.Go(func() { serve(line) })
	return line, nil
}

// expireLines ends all lines with the session.
func (f *Far) expireLines(why error) {
	f.mu.Lock()
	all := slices.Collect(maps.Values(f.lines))
	f.mu.Unlock()
	for _, line := range all {
		line.Expire(why)
	}
}

// beginControl makes the control stream, where there is none yet.
func (f *Far) beginControl() {
	f.addLine(controlNumber, func(line *resume.Conn) {
		err := f.control.run(line, f.cfg.Peered, f.ctx.Done(), f.handle)
		if err == errEnded { // the sidecar may hear that we agree
			select {
			case <-line.Done():
			case <-time.After(endTime):
			}
		}
		if why := f.ending.Load(); why != nil {
			err = why
		}
		f.Close(err) // nobody can be told anything any more
	})
}

// goOn brings a line of the session to a fresh stream.
func (f *Far) goOn(s tunnel.Stream, number, received uint64) {
	f.mu.Lock()
	line := f.lines[number]
	f.mu.Unlock()
	if line == nil {
		refuse(s, tunnel.Errorf(tunnel.SessionExpired, "the stream has ended at the cloud proxy"))
		return
	}
	if err := wire.Write(s, wire.Message{Resumed: &wire.Resumed{Received: line.Detach()}}); err != nil {
		s.Abort(err)
		return
	}
	line.Attach(s, received)
}
