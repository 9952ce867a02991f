package main

import (
	"net/netip"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"culvert/cmd/internal/link"
	"culvert/cmd/internal/netcall"
	"culvert/cmd/internal/netpair"
	"culvert/tunnel"
)

// moveAddr is the near end's address after a move.
var moveAddr = netip.MustParseAddr("198.18.80.3")

// Addresses of the two ends where they have IPv6 (RFC 5180 §8: for measuring).
var (
	near6 = netip.MustParseAddr("2001:2:0:80::1")
	far6  = netip.MustParseAddr("2001:2:0:80::2")
)

// oldest is how old a packet may be that is delivered: what it may have waited, to
// a clock tick, and the way itself.
const oldest = 150*time.Millisecond + outliveDelay + 10*time.Millisecond

// moveOff takes all addresses of a family from the link of a namespace.
func moveOff(t *testing.T, at *netpair.Space, family int) {
	t.Helper()
	err := at.Do(func() error {
		l, err := netlink.LinkByName("link")
		if err != nil {
			return err
		}
		all, err := netlink.AddrList(l, family)
		for _, a := range all {
			if err == nil {
				err = netlink.AddrDel(l, &a)
			}
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}

// moveOn gives the link of a namespace an address, and the route by gateway
// where there is one.
func moveOn(t *testing.T, at *netpair.Space, to, gateway netip.Addr) {
	t.Helper()
	err := at.Do(func() error {
		l, err := netlink.LinkByName("link")
		if err != nil {
			return err
		}
		bits := 24
		if to.Is6() {
			bits = 64
		}
		a, err := netlink.ParseAddr(netip.PrefixFrom(to, bits).String())
		if err != nil {
			return err
		}
		if to.Is6() {
			a.Flags = syscall.IFA_F_NODAD
		}
		if err := netlink.AddrAdd(l, a); err != nil || !gateway.IsValid() {
			return err
		}
		return netlink.RouteReplace(&netlink.Route{LinkIndex: l.Attrs().Index, Gw: gateway.AsSlice()})
	})
	if err != nil {
		t.Fatal(err)
	}
}

// moved holds the gap of a move against its bound, beyond the time without an
// address.
func (o *outlive) moved(off, on time.Time) {
	o.t.Helper()
	time.Sleep(2 * time.Second)
	now := time.Now()
	o.within("the gap beyond the time without an address", o.call.Gap(off, now)-on.Sub(off), 300*time.Millisecond, off, now)
	o.within("the oldest packet", o.call.Oldest(off, now), oldest, off, now)
	o.onePort()
	for _, c := range runStatus(o.t, o.socket).Changes {
		o.t.Logf("told: %s  %v", c.At.Format("15:04:05.000"), c)
	}
	if c := o.changed(tunnel.ChangedAddress); c.Cause != tunnel.AddressChanged {
		o.t.Errorf("of the address is told: %v", c)
	}
}

// A call goes on from wherever its machine is.
func TestACallOutlivesAMove(t *testing.T) {
	if testing.Short() {
		t.Skip("the calls last some minutes")
	}
	bin := buildBoth(t)
	for mode, way := range map[string]string{"auto": "sealed", "tcp": "lanes"} {
		for name, without := range map[string]time.Duration{"at once": 0, "after a second": time.Second} {
			t.Run("another address "+name+", mode "+mode, func(t *testing.T) {
				o := newOutlive(t, bin, "--mode", mode)
				o.talk()
				o.goesBy(way)
				settle()
				off := time.Now()
				moveOff(t, o.pair.Near, netlink.FAMILY_V4)
				time.Sleep(without)
				on := time.Now()
				moveOn(t, o.pair.Near, moveAddr, netpair.FarAddr)
				o.moved(off, on)
			})
		}
	}
	for mode, way := range map[string]string{"auto": "sealed", "tcp": "lanes"} {
		t.Run("from IPv4 to IPv6, mode "+mode, func(t *testing.T) {
			o := newTwoFamilies(t, bin, "--mode", mode)
			o.talk()
			o.goesBy(way)
			settle()
			off := time.Now()
			moveOff(t, o.pair.Near, netlink.FAMILY_V4)
			moveOn(t, o.pair.Near, near6, far6)
			o.moved(off, off)
			o.goesBy(way)
		})
	}
}

// newTwoFamilies is newOutlive with a cloud proxy whose name has addresses of
// both families. The near end begins with IPv4 alone.
func newTwoFamilies(t *testing.T, bin string, args ...string) *outlive {
	t.Helper()
	const name = "cloud.example"
	pair, l := netpair.NewBad(t, link.Settings{Delay: outliveDelay})
	moveOn(t, pair.Far, far6, netip.Addr{})
	o := &outlive{only443: newOnly443Named(t, bin, pair, name), link: l, stalls: callStalls(t), pressure: outlivePressure(t)}
	hosts := filepath.Join(o.dir, "hosts")
	text := "127.0.0.1 localhost\n" + netpair.FarAddr.String() + " " + name + "\n" + far6.String() + " " + name + "\n"
	if err := os.WriteFile(hosts, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	o.far = netcall.NewFar(t, pair.Far)
	// The name is known to the sidecar alone, in a namespace for files of its own.
	o.sidecar = o.start(pair.Near, append([]string{"unshare", "--mount", "sh", "-c", `mount --bind "$0" /etc/hosts && exec "$@"`, hosts,
		o.culvert, "run", "-c", filepath.Join(o.dir, "culvert.yaml"), "--listen", "127.0.0.1:0", "--control", o.socket}, args...)...)
	runReady(t, o.socket)
	return o
}

// inHand is how many packets a process may be about to send when it is stopped:
// one of each direction. Nothing between its last look at the clock and the
// system call can keep those from being sent when it goes on.
const inHand = 2

// A call goes on when one of the two ends stood still, and nothing of before is
// delivered then, but what was in hand.
func TestACallOutlivesAFrozenEnd(t *testing.T) {
	if testing.Short() {
		t.Skip("the calls last some minutes")
	}
	bin := buildBoth(t)
	for mode, way := range map[string]string{"auto": "sealed", "tcp": "lanes"} {
		for end, which := range map[string]func(*outlive) *os.Process{
			"the sidecar":     func(o *outlive) *os.Process { return o.sidecar.Process },
			"the cloud proxy": func(o *outlive) *os.Process { return o.clouds[0].Process },
		} {
			t.Run(end+", mode "+mode, func(t *testing.T) {
				o := newOutlive(t, bin, "--mode", mode)
				o.talk()
				o.goesBy(way)
				settle()
				frozen := time.Now()
				if err := which(o).Signal(syscall.SIGSTOP); err != nil {
					t.Fatal(err)
				}
				time.Sleep(lasts(10*time.Second, 45*time.Second))
				again := time.Now()
				if err := which(o).Signal(syscall.SIGCONT); err != nil {
					t.Fatal(err)
				}
				time.Sleep(4 * time.Second)
				now := time.Now()
				took, ok := o.call.After(again)
				if !ok {
					t.Fatal("media does not come again")
				}
				// The TCP of a peer that stood still may repeat what it lost only after
				// seconds, and all lanes may have to be opened again.
				most := time.Second
				if mode == "tcp" && end == "the cloud proxy" {
					most = 2 * time.Second
				}
				o.mostly("media comes again after", took, time.Second, most, again, now)
				o.mostly("the longest gap after that", o.call.Gap(again.Add(took), now), time.Second, most, again, now)
				o.within("the oldest packet but for those in hand", o.call.OldestBut(inHand, frozen, now), oldest, frozen, now)
				o.onePort()
				for _, c := range runStatus(t, o.socket).Changes {
					t.Logf("told: %s  %v", c.At.Format("15:04:05.000"), c)
				}
			})
		}
	}
}
