package uplink

import (
	"context"
	"time"

	"culvert/tunnel"
	"culvert/tunnel/session"
	"culvert/tunnel/wire"
)

const (
	firstStreamsBackoff = time.Second
	maxStreamsBackoff   = time.Minute
)

// carryStreams keeps a TLS carrier joined to a session whose first carrier is
// QUIC, and lets it carry new TCP streams: the kernel's congestion control
// fills paths on which quic-go's NewReno does not, and bulk stays out of the
// datagrams' congestion window. Where TCP does not pass, streams stay on QUIC.
// It returns when ctx has ended.
func (u *Uplink) carryStreams(ctx context.Context, c *connection, at *session.Attached, change func(func(*tunnel.LinkState))) {
	tell := func(what string) { change(func(s *tunnel.LinkState) { s.Streams = what }) }
	wait := firstStreamsBackoff
	for ctx.Err() == nil {
		cand, err := c.join(ctx, u.cfg.TLS, wire.AsStreams)
		var carrier tunnel.Carrier
		if err == nil {
			if carrier, err = cand.Carrier(); err != nil {
				cand.Close()
			}
		}
		if err == nil {
			wait = firstStreamsBackoff
			at.SetStreams(carrier)
			tell(cand.Kind())
			select {
			case <-carrier.Done():
			case <-ctx.Done():
			}
			at.SetStreams(nil)
			err = carrier.Err()
			carrier.Close(context.Cause(ctx))
			tell(c.carrier.Stats().Kind)
		}
		pause := u.cfg.jitter(wait)
		wait = min(2*wait, maxStreamsBackoff)
		if ctx.Err() == nil {
			u.log.Info("TCP streams go over QUIC", "why", err, "tls_again_in", pause.Round(time.Millisecond))
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
		}
	}
}
