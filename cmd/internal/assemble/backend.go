package assemble

import (
	"context"
	"errors"
	"maps"
	"slices"
	"sync/atomic"
	"time"

	"culvert/sidecar"
	"culvert/sidecar/capture"
	"culvert/sidecar/channel"
	"culvert/sidecar/check"
	"culvert/sidecar/control"
	"culvert/tunnel"
	"culvert/tunnel/media"
	"culvert/tunnel/session"
	"culvert/tunnel/tunnelquic"
	"culvert/tunnel/tunneltls"
)

// notConnected is the reason for datagrams that came before there was a tunnel.
const notConnected = "not_connected"

// DropReasons returns the words under which a sidecar counts dropped datagrams.
func DropReasons() []string {
	all := slices.Concat(media.Reasons(), tunnelquic.Reasons(), tunneltls.Reasons(), sidecar.DropReasons(), capture.DropReasons(), []string{notConnected})
	slices.Sort(all)
	return slices.Compact(all)
}

// Backend is what the control API does to a sidecar.
type Backend struct {
	Sidecar *Sidecar
	Version string
	Began   time.Time // when the process started

	// Ready says that the first start has been decided, whichever way.
	Ready atomic.Bool

	measuring atomic.Bool // a test call runs
}

// Status implements control.Backend.
func (b *Backend) Status() control.Status {
	s := b.Sidecar
	sw, front, link := s.Switch.Status(), s.Front.Stats(), s.Link.Stats()
	st := control.Status{
		Version: b.Version, Uptime: time.Since(b.Began), Ready: b.Ready.Load(),
		State: string(sw.State), Since: sw.Since, Mode: sw.Mode, Draining: sw.Draining, Code: sw.Code, Cause: sw.Cause,
		Listen: s.Front.Addr().String(), Link: sw.Link, Changes: sw.Changes, Tunnel: link, Front: front,
		Streams: sw.Streams, Associations: sw.Associations, Channels: b.Channels(), Dropped: map[string]uint64{},
	}
	fronts := maps.Clone(front.Dropped)
	delete(fronts, "too_large") // what the link was given and could not hold: it has counted that
	var captured map[string]uint64
	if s.Capture != nil {
		stats := s.Capture.Stats()
		captured = maps.Clone(stats.Dropped)
		delete(captured, "too_large") // as of the front
		st.Capture = &stats
	}
	for _, more := range []map[string]uint64{link.Dropped, fronts, captured, {notConnected: sw.HeldDrops}} {
		for reason, n := range more {
			st.Dropped[reason] += n
		}
	}
	maps.DeleteFunc(st.Dropped, func(_ string, n uint64) bool { return n == 0 })
	if link, ok := s.Link.(interface{ Losses(most int) []session.Loss }); ok {
		for _, l := range link.Losses(control.MaxLosers) {
			st.Losers = append(st.Losers, control.Loser{From: l.By.Addr, User: l.By.User, Dropped: l.Dropped})
		}
	}
	return st
}

// Start implements control.Backend.
func (b *Backend) Start(ctx context.Context, mode tunnel.Mode) (bool, error) {
	already, err := b.Sidecar.Switch.Start(ctx, sidecar.StartOptions{Mode: mode})
	return already, active(err)
}

// Stop implements control.Backend.
func (b *Backend) Stop(ctx context.Context, wait time.Duration, force bool) (bool, error) {
	already, err := b.Sidecar.Switch.Stop(ctx, sidecar.StopOptions{Wait: wait, Force: force})
	return already, active(err)
}

func active(err error) error {
	var a *sidecar.ChannelActiveError
	if errors.As(err, &a) {
		return &control.ActiveError{Channels: channels(a.Channels), Err: err}
	}
	return err
}

// Media implements control.Backend. It passes the front and the policy by: the
// cloud proxy's echo is nobody's destination, and the test call no channel.
func (b *Backend) Media(ctx context.Context, d time.Duration) (check.Way, error) {
	if !b.measuring.CompareAndSwap(false, true) {
		return check.Way{}, tunnel.Errorf(tunnel.LimitExceeded, "another test call runs; wait until it has ended")
	}
	defer b.measuring.Store(false)
	w, err := check.Measure(ctx, b.Sidecar.Link, d)
	if link := b.Sidecar.Switch.Status().Link; err == nil {
		w.Carrier, w.Way = link.Carrier, link.Way
	}
	return w, err
}

// Channels implements control.Backend.
func (b *Backend) Channels() []control.Channel {
	return channels(b.Sidecar.Watcher.Channels(time.Now()))
}

func channels(all []channel.Channel) []control.Channel {
	out := make([]control.Channel, len(all))
	for i, c := range all {
		out[i] = control.Channel(c)
	}
	return out
}

// Join implements control.Backend.
func (b *Backend) Join(name string, pid int) error {
	if err := b.Sidecar.Watcher.Join(name, pid, time.Now()); err != nil {
		return tunnel.Errorf(tunnel.ConfigInvalid, "%w", err)
	}
	return nil
}

// Leave implements control.Backend.
func (b *Backend) Leave(name string) bool { return b.Sidecar.Watcher.Leave(name) }

// Events implements control.Backend.
func (b *Backend) Events(ctx context.Context) <-chan control.Event {
	in, cancel := b.Sidecar.Switch.Subscribe()
	out := make(chan control.Event)
	go func() {
		defer close(out)
		defer cancel()
		for {
			select {
			case e, ok := <-in:
				if !ok {
					return
				}
				select {
				case out <- control.Event(e):
				case <-ctx.Done():
					return
				}
			case <-ctx.Done():
				return
			}
		}
	}()
	return out
}
