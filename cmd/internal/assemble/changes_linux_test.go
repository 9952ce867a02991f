package assemble

import (
	"context"
	"log/slog"
	"net/netip"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"culvert/cmd/internal/netpair"
)

func TestAnotherAddressIsTold(t *testing.T) {
	near := netpair.New(t).Near
	c := newChanges()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	subscribed := make(chan struct{})
	go func() {
		defer close(done)
		near.Do(func() error { // the socket is opened on this thread
			watchChanges(ctx, func() { poke(c.seen) }, slog.New(slog.DiscardHandler))
			return nil
		})
	}()
	telling := make(chan struct{})
	go func() { defer close(telling); c.tell(ctx) }()
	defer func() { cancel(); <-done; <-telling }()

	add := func(i byte) {
		t.Helper()
		err := near.Do(func() error {
			l, err := netlink.LinkByName("link")
			if err != nil {
				return err
			}
			a, err := netlink.ParseAddr(netip.AddrFrom4([4]byte{198, 18, 81, i}).String() + "/24")
			if err != nil {
				return err
			}
			return netlink.AddrAdd(l, a)
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	// It may take a moment until the socket listens.
	go func() { defer close(subscribed); <-c.told }()
	for i := byte(100); ; i++ {
		add(i)
		select {
		case <-subscribed:
		case <-time.After(50 * time.Millisecond):
			if i < 250 {
				continue
			}
			t.Fatal("nothing is told of other addresses")
		}
		break
	}
	// A burst is told a few times, not each of it.
	for i := byte(1); i < 50; i++ {
		add(i)
	}
	told := 0
	for quiet := false; !quiet; {
		select {
		case <-c.told:
			told++
		case <-time.After(5 * changesRest):
			quiet = true
		}
	}
	if told == 0 || told > 25 {
		t.Errorf("a burst of 49 addresses was told %d times", told)
	}
}
