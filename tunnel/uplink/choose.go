package uplink

import (
	"context"
	"fmt"
	"time"

	"culvert/tunnel"
	"culvert/tunnel/session"
	"culvert/tunnel/wire"
)

const (
	probeEvery = 50 * time.Millisecond // while an answer is awaited
	probeTries = 10
	lookEvery  = 250 * time.Millisecond
	// doubt is how long nothing may come by a way, while the peer reports, until
	// it is probed; after deaf datagrams go by another way too.
	doubt, deaf = 300 * time.Millisecond, 600 * time.Millisecond
	// maxBoth bounds how long datagrams go by two ways.
	maxBoth = 2 * time.Second
	// risen is the delay from which on silence is taken for congestion, which
	// sending everything twice would make worse.
	risen = 40 * time.Millisecond
	// Sealed packets that do not arrive are tried again after a while.
	firstAgain, maxAgain = 2 * time.Second, time.Minute
	// gone is the loss from which on a way counts as shut in our direction.
	gone = 0.9
)

// wayAtHand says why a way is used before anything has been probed.
var wayAtHand = [wire.WaysEnd]string{
	wire.WayDatagram: "it is there from the beginning; sealed packets are being tried",
	wire.WayLanes:    "UDP does not pass, or is not allowed to be used",
}

// noSealed is why where there is nothing to try.
const noSealed = "the cloud proxy or this system offers no sealed packets"

// ways is what is decided on: a session, as chooseWay sees it.
type ways interface {
	Way(wire.Way) session.WayState
	Use(first, also wire.Way)
	Probe(kind wire.Way, large bool)
	News() <-chan struct{}
	Reporting() bool
}

// chooseWay decides how the datagrams of a session on a QUIC carrier go, by
// payload that arrived:
//
//	probing ──a short and a long sealed packet answered──► sealed ◄────────────┐
//	   │ 10 probes unanswered                                │ silent 300 ms   │ one comes
//	   ▼                                                     ▼                 │
//	datagram ◄─── DATAGRAM answers, 600 ms silent ──────── in doubt ───────────┤
//	   │  ▲       or delay had risen                         │ silent 600 ms,  │
//	   │  │                                                  │ or all of ours  │
//	   │  │                                                  ▼ is lost         │
//	   │  └──────────── DATAGRAM answers ────────── both ways, 2 s at most ────┘
//	   └── after 2 s, 4 s … 1 min: probing again, while datagrams go on as they went
//
// In doubt both ways are probed every 50 ms. Where delay had risen before the
// silence the two are congested, and nothing is sent twice.
//
// It returns when ctx has ended.
func (u *Uplink) chooseWay(ctx context.Context, at *session.Attached, change func(func(*tunnel.LinkState))) {
	tell := func(w wire.Way, why string) {
		u.log.Info("datagrams", "way", w, "why", why)
		change(func(s *tunnel.LinkState) { s.Way, s.WayWhy = w.String(), why })
	}
	if !at.Way(wire.WaySealed).Present {
		return
	}
	at.Use(wire.WayDatagram, wire.NoWay)
	again := firstAgain
	for ctx.Err() == nil {
		began := time.Now()
		if !probe(ctx, at) {
			if again == firstAgain && ctx.Err() == nil {
				tell(wire.WayDatagram, fmt.Sprintf("%d sealed packets in %v were not answered, QUIC DATAGRAM passes", probeTries, time.Since(began).Round(time.Millisecond)))
			}
			wait(ctx, again)
			again = min(2*again, maxAgain)
			continue
		}
		at.Use(wire.WaySealed, wire.NoWay)
		tell(wire.WaySealed, fmt.Sprintf("sealed packets, short and long, were answered in %v", time.Since(began).Round(time.Millisecond)))
		why := listen(ctx, at)
		if ctx.Err() != nil {
			return
		}
		at.Use(wire.WayDatagram, wire.NoWay)
		tell(wire.WayDatagram, why)
		wait(ctx, again)
		again = min(2*again, maxAgain)
	}
}

func wait(ctx context.Context, d time.Duration) {
	select {
	case <-time.After(d):
	case <-ctx.Done():
	}
}

// probe reports whether sealed packets arrive and come back, short and long. The
// way makes itself smaller where only long ones vanish.
func probe(ctx context.Context, at ways) bool {
	began := time.Now()
	tick := time.NewTicker(probeEvery)
	defer tick.Stop()
	for range probeTries {
		s := at.Way(wire.WaySealed)
		if !s.Small.After(began) {
			at.Probe(wire.WaySealed, false)
		}
		if !s.Large.After(began) {
			at.Probe(wire.WaySealed, true)
		}
		for waiting := true; waiting; {
			select {
			case <-at.News():
				if s := at.Way(wire.WaySealed); s.Small.After(began) && s.Large.After(began) {
					return true
				}
			case <-tick.C:
				waiting = false
			case <-ctx.Done():
				return false
			}
		}
	}
	return at.Way(wire.WaySealed).Small.After(began)
}

// listen returns why sealed packets are no longer the way, or when ctx has ended.
func listen(ctx context.Context, at ways) (why string) {
	var since, both time.Time // when the way began to look shut, and both ways to be used
	var once, congested bool  // both ways are over; delay had risen before
	look := time.NewTimer(lookEvery)
	defer look.Stop()
	for {
		select {
		case <-look.C:
		case <-ctx.Done():
			return ""
		}
		now := time.Now()
		s := at.Way(wire.WaySealed)
		quiet := time.Duration(0)
		if at.Reporting() {
			quiet = now.Sub(s.Heard)
		}
		shut := s.Lost > gone && now.Sub(s.Reported) < deaf
		// Where only our direction is shut the peer, which hears us by the other
		// way, is still heard: then only an answer ends the doubt.
		if quiet <= doubt && !shut && (since.IsZero() || s.Small.After(since)) {
			if !both.IsZero() && !once {
				at.Use(wire.WaySealed, wire.NoWay)
			}
			since, both, once = time.Time{}, time.Time{}, false
			if at.Reporting() {
				look.Reset(probeEvery)
			} else {
				look.Reset(lookEvery)
			}
			continue
		}
		if since.IsZero() {
			since, congested = now, s.Delay > risen || s.Shaped
		}
		asked := since // an answer counts from here on
		switch {
		case now.Sub(since) < deaf-doubt && !shut:
			asked = now // too early
		case congested:
		case both.IsZero():
			both, asked = now, now
			at.Use(wire.WaySealed, wire.WayDatagram)
		case once:
		case now.Sub(both) >= maxBoth:
			once = true
			at.Use(wire.WaySealed, wire.NoWay)
		default:
			asked = both
		}
		if at.Way(wire.WayDatagram).Small.After(asked) {
			if shut {
				return fmt.Sprintf("%.0f %% of our sealed packets were lost, QUIC DATAGRAM passes", 100*s.Lost)
			}
			if quiet <= deaf {
				return fmt.Sprintf("no sealed packet was answered for %v, QUIC DATAGRAM passes", now.Sub(since).Round(time.Millisecond))
			}
			return fmt.Sprintf("nothing came by sealed packets for %v, QUIC DATAGRAM passes", quiet.Round(time.Millisecond))
		}
		at.Probe(wire.WaySealed, false)
		at.Probe(wire.WayDatagram, false)
		if now.Sub(since) < deaf+maxBoth {
			look.Reset(probeEvery)
		} else {
			look.Reset(lookEvery)
		}
	}
}
