package netpair

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Addresses of the two ends of the link. They are reserved for measuring
// (RFC 2544), so that no other route of the machine is meant by them.
var (
	NearAddr = netip.MustParseAddr("198.18.80.1")
	FarAddr  = netip.MustParseAddr("198.18.80.2")
)

// device is the link's name in both namespaces.
const device = "link"

// Pair is two joined namespaces. Near sends what it has no other route for to
// Far, so that what leaks is seen; Far knows no way but the link.
type Pair struct{ Near, Far *Space }

// New makes a pair that lasts until the test ends.
func New(t testing.TB) *Pair {
	t.Helper()
	p, err := newPair(t)
	if err != nil {
		unmakeable(t, err)
	}
	return p
}

// unmakeable ends the test, because a pair can not be made.
func unmakeable(t testing.TB, err error) {
	t.Helper()
	// ENOENT, ENODEV: there is no /dev/net/tun, or no driver behind it.
	for _, missing := range []error{unix.EPERM, unix.EACCES, unix.ENOSYS, unix.EOPNOTSUPP, unix.ENOENT, unix.ENODEV} {
		if errors.Is(err, missing) && os.Getenv("CI") != "true" {
			t.Skipf("network namespaces can not be made; this needs root: %v", err)
		}
	}
	t.Fatalf("network namespaces can not be made (CI=true says that nothing may be left out): %v", err)
}

func newPair(t testing.TB) (*Pair, error) {
	near, err := newSpace(t)
	if err != nil {
		return nil, err
	}
	far, err := newSpace(t)
	if err != nil {
		return nil, err
	}
	err = near.Do(func() error {
		return netlink.LinkAdd(&netlink.Veth{
			LinkAttrs: netlink.LinkAttrs{Name: device},
			PeerName:  device, PeerNamespace: netlink.NsFd(int(far.file.Fd())),
		})
	})
	if err != nil {
		return nil, fmt.Errorf("making the link: %w", err)
	}
	if err := near.Do(func() error { return up(NearAddr, FarAddr) }); err != nil {
		return nil, err
	}
	if err := far.Do(func() error { return up(FarAddr, netip.Addr{}) }); err != nil {
		return nil, err
	}
	return &Pair{near, far}, nil
}

// up brings the loopback and the link of this thread's namespace up.
func up(at, gateway netip.Addr) error {
	for _, name := range []string{"lo", device} {
		l, err := netlink.LinkByName(name)
		if err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		if name == device {
			a, err := netlink.ParseAddr(at.String() + "/24")
			if err != nil {
				return err
			}
			if err := netlink.AddrAdd(l, a); err != nil {
				return fmt.Errorf("%s on %s: %w", at, name, err)
			}
		}
		if err := netlink.LinkSetUp(l); err != nil {
			return fmt.Errorf("%s up: %w", name, err)
		}
	}
	if !gateway.IsValid() {
		return nil
	}
	if err := netlink.RouteAdd(&netlink.Route{Gw: gateway.AsSlice()}); err != nil {
		return fmt.Errorf("a route through %s: %w", gateway, err)
	}
	return nil
}

// Space is one network namespace.
type Space struct{ file *os.File }

func newSpace(t testing.TB) (*Space, error) {
	var s Space
	err := onThread(func() (err error) {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return os.NewSyscallError("unshare", err)
		}
		s.file, err = os.Open("/proc/thread-self/ns/net")
		return err
	})
	if err != nil {
		return nil, err
	}
	t.Cleanup(func() { s.file.Close() })
	return &s, nil
}

// Do calls f on a thread inside the namespace. Sockets that f opens itself, not
// on a goroutine that it starts, stay there.
func (s *Space) Do(f func() error) error {
	return onThread(func() error {
		if err := unix.Setns(int(s.file.Fd()), unix.CLONE_NEWNET); err != nil {
			return os.NewSyscallError("setns", err)
		}
		return f()
	})
}

// onThread calls f on a thread of its own, which ends with it: no other
// goroutine may come to run in a namespace that f has entered.
func onThread(f func() error) error {
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // never unlocked
		done <- f()
	}()
	return <-done
}

// Start starts a program in the namespace. When the test ends the program is
// killed, and waited for.
func (s *Space) Start(t testing.TB, cmd *exec.Cmd) {
	t.Helper()
	if err := s.Do(cmd.Start); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		// It may have ended by itself; how it ended is of no interest.
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
}
