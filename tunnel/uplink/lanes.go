package uplink

import (
	"context"
	"sync"
	"time"

	"culvert/tunnel"
	"culvert/tunnel/wire"
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
	// busyLaneRest is its bound while a call may be near.
	busyLaneRest = 500 * time.Millisecond
)

// keepLanes keeps lanes joined while the path is wanted: one, and as many as
// serve a call best while datagrams go by lanes or may soon. New ones are
// dialled while the path has a carrier without datagrams of its own, or is about
// to have one again and a call waits; those that there are outlive it, since the
// call may go by them. It gives the carrier up when no lane can be had beside it,
// and returns when ctx has ended.
func (p *path) keepLanes(ctx context.Context) {
	at, log := p.run.at, p.run.u.log
	type dialled struct {
		lane tunnel.Lane
		err  error
	}
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
	var closing sync.WaitGroup // which may take a second each
	shut := func(l tunnel.Lane, why error) {
		at.RemoveLane(l)
		closing.Go(func() { l.Close(why) })
	}
	closeAll := func(why error) {
		for l := range live {
			shut(l, why)
		}
	}
	defer func() {
		cancel()
		closeAll(context.Cause(ctx))
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
		closing.Wait()
	}()
	var beside tunnel.Carrier // nil: none, or one that needs no lanes
	rest := time.Duration(0)  // after a failure
	var none time.Time        // since when the carrier has no lane beside it; zero: it has
	var failure error
	drops := 0
	soon := time.NewTimer(0)
	defer soon.Stop()
	for {
		need := 0
		c, wanted, eager, now := p.serving()
		if c != nil && c.Datagrams() == nil || eager {
			need = int(p.lanes.Load())
		} else {
			c = nil
		}
		if c != beside {
			beside, rest, none = c, 0, time.Time{}
			if len(live) == 0 {
				none = time.Now()
			}
		}
		if !wanted || now != drops {
			drops, rest = now, 0
			closeAll(errNotWanted)
		}
		if len(live)+dialling < need {
			soon.Reset(rest)
		}
		select {
		case <-ctx.Done():
			return
		case <-p.lanesWake:
		case <-soon.C:
			if len(live)+dialling >= need {
				continue
			}
			if !none.IsZero() && time.Since(none) > laneTime {
				none = time.Now()
				p.drop(failure)
				continue
			}
			dialling++
			go func() {
				limit := laneDial
				if c != nil {
					limit += 4*c.Stats().RTT + p.detour()
				}
				ctx, cancel := context.WithTimeoutCause(inner, limit, tunnel.Errorf(tunnel.CloudUnreachable, "a lane to the cloud proxy took longer than %v", limit.Round(time.Millisecond)))
				defer cancel()
				g, err := p.run.join(ctx, p.dial, wire.AsLane)
				var l tunnel.Lane
				if err == nil {
					l, err = g.cand.Lane()
				}
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
				p.run.tell()
				continue
			}
			failure = r.err
			p.fail(r.err)
			if tunnel.CodeOf(r.err) == tunnel.SessionUnknown {
				p.run.end(r.err)
				return
			}
			if len(live) > 0 || rest < laneStagger {
				most := maxLaneRest
				if p.run.u.Busy() { // a call may be waiting
					most = busyLaneRest
				}
				rest = min(max(2*rest, firstBackoff), most)
				log.Info("a lane for datagrams could not be opened", "code", tunnel.CodeOf(r.err), "why", tunnel.Sentence(r.err), "again_in", rest)
			}
		case l := <-ended:
			delete(live, l)
			shut(l, nil)
			if !wanted {
				continue
			}
			rest = 0
			log.Info("a lane for datagrams was lost", "why", l.Err(), "left", len(live))
			p.run.tell()
			if len(live) == 0 && none.IsZero() {
				none, failure = time.Now(), wrapLost(l.Err())
			}
		}
	}
}
