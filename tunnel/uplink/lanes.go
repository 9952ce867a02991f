package uplink

import (
	"context"
	"time"

	"culvert/tunnel"
	"culvert/tunnel/session"
)

const (
	defaultLanes = 4
	maxLanes     = 12 // what a cloud proxy may ask for; it takes 16 joins in all
	// laneTime is how long a session may be without any lane before its carrier
	// is given up too.
	laneTime = 10 * time.Second
	// laneDial bounds one attempt, beside some round trips: where a link comes
	// back, a fresh attempt is quicker than a SYN that waits to be repeated.
	laneDial = time.Second
	// laneStagger is what lies between attempts while there is no lane at all.
	laneStagger = 200 * time.Millisecond
	maxLaneRest = 5 * time.Second
)

// keepLanes keeps lanes joined to a session whose carrier has no datagrams: one,
// and as many as serve a call best while a channel is live or an association
// is open. It returns an error when no lane can be had, nil when ctx has ended;
// its lanes are closed then.
func (u *Uplink) keepLanes(ctx context.Context, c *connection, at *session.Attached) error {
	type dialled struct {
		lane tunnel.Lane
		err  error
	}
	want := min(max(u.cfg.Lanes, c.welcome.Lanes), maxLanes)
	live := map[tunnel.Lane]bool{}
	ended := make(chan tunnel.Lane)
	results := make(chan dialled)
	dialling := 0
	inner, cancel := context.WithCancel(ctx)
	add := func(l tunnel.Lane) {
		live[l] = true
		at.AddLane(l)
		go func() {
			<-l.Done()
			ended <- l
		}()
	}
	defer func() {
		cancel()
		for l := range live {
			at.RemoveLane(l)
			l.Close(context.Cause(ctx))
		}
		for len(live) > 0 || dialling > 0 {
			select {
			case l := <-ended:
				delete(live, l)
			case r := <-results:
				dialling--
				if r.err == nil {
					r.lane.Close(context.Cause(ctx))
				}
			}
		}
	}()
	add(c.lane)
	rest := time.Duration(0) // after a failure
	var none time.Time       // since when there is no lane
	var failure error
	soon := time.NewTimer(0)
	defer soon.Stop()
	for {
		need := 1
		if u.Busy() {
			need = want
		}
		if len(live)+dialling < need {
			soon.Reset(rest)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-c.carrier.Done():
			return c.carrier.Err()
		case <-u.Wanted():
		case <-soon.C:
			if len(live)+dialling >= need {
				continue
			}
			if len(live) == 0 && time.Since(none) > laneTime {
				return failure
			}
			dialling++
			go func() {
				limit := laneDial + 4*c.carrier.Stats().RTT
				ctx, cancel := context.WithTimeoutCause(inner, limit, tunnel.Errorf(tunnel.CloudUnreachable, "a lane to the cloud proxy took longer than %v", limit.Round(time.Millisecond)))
				defer cancel()
				l, err := c.dialLane(ctx)
				results <- dialled{l, err}
			}()
			if len(live) == 0 {
				rest = max(rest, laneStagger)
			}
		case r := <-results:
			dialling--
			if r.err == nil {
				rest, none = 0, time.Time{}
				add(r.lane)
				continue
			}
			failure = r.err
			if tunnel.CodeOf(r.err) == tunnel.SessionUnknown {
				return r.err
			}
			if len(live) > 0 || rest < laneStagger {
				rest = min(max(2*rest, firstBackoff), maxLaneRest)
				u.log.Info("a lane for datagrams could not be opened", "code", tunnel.CodeOf(r.err), "why", tunnel.Sentence(r.err), "again_in", rest)
			}
		case l := <-ended:
			delete(live, l)
			at.RemoveLane(l)
			l.Close(nil)
			rest = 0
			u.log.Info("a lane for datagrams was lost", "why", l.Err(), "left", len(live))
			if len(live) == 0 && none.IsZero() {
				none, failure = time.Now(), wrapLost(l.Err())
			}
		}
	}
}
