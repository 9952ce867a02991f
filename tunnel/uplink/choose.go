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
	// deaf is how long nothing may come by a way while the peer reports.
	deaf = 600 * time.Millisecond
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

// chooseWay decides how the datagrams of a session on a QUIC carrier go, by
// payload that arrived:
//
//	probing ──a short and a long sealed packet answered──► sealed
//	   │ 10 probes unanswered                                │ nothing comes by it for 600 ms, or all
//	   ▼                                                     ▼ of ours is lost, and DATAGRAM answers
//	datagram ◄───────────────────────────────────────────────┘
//	   └── after 2 s, 4 s … 1 min: probing again, while datagrams go on as they went
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
func probe(ctx context.Context, at *session.Attached) bool {
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
func listen(ctx context.Context, at *session.Attached) (why string) {
	tick := time.NewTicker(lookEvery)
	defer tick.Stop()
	var since time.Time // when the way began to look shut
	for {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return ""
		}
		now := time.Now()
		s := at.Way(wire.WaySealed)
		silent := at.Reporting() && now.Sub(s.Heard) > deaf
		shut := s.Lost > gone && now.Sub(s.Reported) < deaf
		if !silent && !shut {
			since = time.Time{}
			continue
		}
		if since.IsZero() {
			since = now
		}
		if at.Way(wire.WayDatagram).Small.After(since) {
			if silent {
				return fmt.Sprintf("nothing came by sealed packets for %v, QUIC DATAGRAM passes", now.Sub(s.Heard).Round(time.Millisecond))
			}
			return fmt.Sprintf("%.0f %% of our sealed packets were lost, QUIC DATAGRAM passes", 100*s.Lost)
		}
		at.Probe(wire.WaySealed, false)
		at.Probe(wire.WayDatagram, false)
	}
}
