package uplink

import (
	"context"
	"fmt"
	"net/netip"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"culvert/tunnel"
	"culvert/tunnel/tunneltest"
	"culvert/tunnel/wire"
)

func TestWhereUDPNeverWorksItIsTriedRarelyInTheNextSessionToo(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFarOn(t, tunneltest.Config{}, first)
		defer f.end()
		f.real(0)
		var forgets atomic.Bool // the cloud proxy has been restarted
		known := f.answer
		f.answer = func(kind, address string, m wire.Message) *wire.Message {
			if m.Join != nil && forgets.Load() {
				return refused(tunnel.SessionUnknown)
			}
			return known(kind, address, m)
		}
		f.dialNow(func(ctx context.Context, kind, _ string, _ int) error {
			if kind == "quic" {
				return silent(ctx)
			}
			return nil
		})
		var network atomic.Value
		network.Store("the office")
		r := f.run(tunnel.ModeAuto, func(c *Config) {
			c.Network = func(netip.AddrPort) string { return network.Load().(string) }
		})
		r.up()
		ctx, cancel := context.WithCancel(context.Background())
		ended := r.call(ctx)
		tried := func(d time.Duration) int {
			before := len(f.dialsOf("quic"))
			time.Sleep(d)
			return len(f.dialsOf("quic")) - before
		}
		if n := tried(time.Minute); n < 3 || n > 5 {
			t.Errorf("in the first minute it was tried %d times", n)
		}
		time.Sleep(10 * time.Minute)
		if n := tried(10 * time.Minute); n < 1 || n > 3 {
			t.Errorf("in ten minutes it was tried %d times, want each 5 min", n)
		}
		forgets.Store(true)
		f.nets["tls"].Cut()
		time.Sleep(5 * time.Second) // until another session has been opened
		forgets.Store(false)
		if n := tried(3 * time.Minute); n > 1 { // not after 5 s, 10 s, 20 s and so on
			t.Errorf("in three minutes of the next session it was tried %d times", n)
		}
		network.Store("") // which is none
		if n := tried(3 * networkEvery); n != 0 {
			t.Errorf("without a network it was tried %d times", n)
		}
		network.Store("at home")
		if n := tried(networkEvery + time.Second); n != 1 {
			t.Errorf("in another network it was tried %d times, want 1 at once", n)
		}
		network.Store("the office")
		time.Sleep(networkEvery + time.Second)
		if n := tried(3 * time.Minute); n > 1 {
			t.Errorf("back where it never works it was tried %d times", n)
		}
		cancel()
		<-ended
		r.stop()
	})
}

func TestTheMemoryOfNetworksIsBounded(t *testing.T) {
	var m memory
	for i := range 3 * maxNetworks {
		m.keep(fmt.Sprint(i), remembered{fails: i})
		if got := m.of(fmt.Sprint(i)); got.fails != i {
			t.Errorf("of network %d: %+v", i, got)
		}
	}
	if len(m.networks) != maxNetworks {
		t.Errorf("%d networks", len(m.networks))
	}
	if got := m.of("unknown"); got.fails != 0 || got.again != [wire.WaysEnd]again{} {
		t.Errorf("%+v", got)
	}
}
