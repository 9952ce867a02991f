package uplink

import (
	"context"
	"net/netip"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"culvert/tunnel"
	"culvert/tunnel/tunneltest"
	"culvert/tunnel/wire"
)

// roaming is where a sidecar is.
type roaming struct {
	at   atomic.Value
	told chan struct{}
}

func newRoaming(at string) *roaming {
	r := &roaming{told: make(chan struct{}, 1)}
	r.at.Store(at)
	return r
}

func (r *roaming) into(c *Config) {
	c.Network = func(netip.AddrPort) string { return r.at.Load().(string) }
	c.Changed = r.told
}

func (r *roaming) move(to string) {
	r.at.Store(to)
	r.told <- struct{}{}
}

// addresses are the changes of address that were told.
func (r *running) addresses() (all []string) {
	for _, s := range r.all() {
		if c := s.Change; c != nil && c.What == tunnel.ChangedAddress {
			all = append(all, c.From+" -> "+c.To+" "+string(c.Cause))
		}
	}
	return all
}

func TestAfterAChangeOfAddressIsJoinedAgainWhatEndsWithIt(t *testing.T) {
	const soon = 100 * time.Millisecond
	for name, c := range map[string]struct {
		mode tunnel.Mode
		way  wire.Way
		to   string
		quic int // dials
		tls  int // of the carrier and of lanes
		told int
	}{
		"the same, TCP":     {tunnel.ModeTCP, wire.WayLanes, "here", 0, 0, 0},
		"another, TCP":      {tunnel.ModeTCP, wire.WayLanes, "there", 0, 5, 1},
		"the same, UDP":     {tunnel.ModeUDP, wire.WaySealed, "here", 0, 0, 0},
		"another, UDP":      {tunnel.ModeUDP, wire.WaySealed, "there", 0, 0, 1},
		"none, UDP":         {tunnel.ModeUDP, wire.WaySealed, "", 1, 0, 0},
		"another, with TLS": {tunnel.ModeAuto, wire.WaySealed, "there", 0, 5, 1},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := newFarOn(t, tunneltest.Config{Flow: true, Packet: func(bool, []byte) tunneltest.Fate {
					return tunneltest.Fate{Delay: 20 * time.Millisecond}
				}}, first)
				defer f.end()
				f.real(4)
				home := newRoaming("here")
				r := f.run(c.mode, home.into)
				r.up()
				ctx, cancel := context.WithCancel(context.Background())
				ended := r.call(ctx)
				r.SetLive(true)
				time.Sleep(5 * time.Second)
				if s := r.up(); s.Way != c.way.String() {
					t.Fatalf("datagrams go by %s, want %v", s.Way, c.way)
				}
				quic, tls := len(f.dialsOf("quic")), len(f.dialsOf("tls"))
				home.move(c.to)
				time.Sleep(soon)
				if n := len(f.dialsOf("quic")) - quic; n != c.quic {
					t.Errorf("QUIC was dialled %d times, want %d", n, c.quic)
				}
				if n := len(f.dialsOf("tls")) - tls; n != c.tls {
					t.Errorf("TLS was dialled %d times, want %d", n, c.tls)
				}
				time.Sleep(7 * time.Second)
				// These cloud proxies offer no sealed packets to who joins.
				if s := r.up(); s.Way != c.way.String() && c.quic == 0 {
					t.Errorf("afterwards datagrams go by %s, want %v", s.Way, c.way)
				}
				if all := r.addresses(); len(all) != c.told || c.told > 0 && all[0] != "here -> there address_changed" {
					t.Errorf("told: %q", all)
				}
				cancel()
				<-ended
				r.stop()
			})
		})
	}
}

// A machine that has just got an address does not wait for a pause to end.
func TestAChangeOfAddressEndsAPause(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFar(t, first)
		defer f.end()
		f.dialNow(func(context.Context, string, string, int) error {
			return tunnel.Errorf(tunnel.CloudUnreachable, "there is no network")
		})
		home := newRoaming("")
		r := f.run(tunnel.ModeAuto, home.into)
		time.Sleep(time.Minute)
		f.dialNow(func(context.Context, string, string, int) error { return nil })
		synctest.Wait()
		began := time.Now()
		home.move("here")
		r.up()
		if took := time.Since(began); took > 10*time.Millisecond {
			t.Errorf("it took %v", took)
		}
		r.stop()
	})
}

func TestAStandstillShowsByTheClocks(t *testing.T) {
	const s = time.Second
	for name, c := range map[string]struct{ monotonic, wall, want time.Duration }{
		"nothing":                      {s, s, 0},
		"a busy machine":               {s + s/2, s + s/2, s / 2},
		"the process was stopped":      {11 * s, 11 * s, 10 * s},
		"the machine slept":            {s, time.Hour + s, time.Hour},
		"the wall clock was set back":  {s, s - time.Hour, 0},
		"it slept for a moment, awake": {s / 2, 3 * s, 2*s + s/2},
	} {
		if got := stood(c.monotonic, c.wall); got != c.want {
			t.Errorf("%s: %v, want %v", name, got, c.want)
		}
	}
}
