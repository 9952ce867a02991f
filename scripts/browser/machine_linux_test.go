package browser

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"culvert/sidecar"
	"culvert/tunnel"
)

// policies is where Debian's Chromium looks.
const policies = "/etc/chromium/policies/managed"

// machine is a network and a view of the file system of their own: with a
// policy file, a front on the default port, and a default route to nowhere.
type machine struct {
	jobs chan func()
	out  int // the TUN device to nowhere
}

// do runs f on the thread that is the machine.
func (m *machine) do(f func() error) error {
	done := make(chan error)
	m.jobs <- func() { done <- f() }
	return <-done
}

func newMachine(t *testing.T, policy []byte, next tunnel.Opener) *machine {
	t.Helper()
	m := &machine{jobs: make(chan func())}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		runtime.LockOSThread() // never unlocked: the thread ends with this goroutine
		for job := range m.jobs {
			job()
		}
	}()
	t.Cleanup(func() { close(m.jobs); <-ended })

	var l net.Listener
	err := m.do(func() (err error) {
		if err := unix.Unshare(unix.CLONE_NEWNET | unix.CLONE_NEWNS); err != nil {
			return fmt.Errorf("namespaces: %w", err)
		}
		if err := mounts(policy); err != nil {
			return err
		}
		if m.out, err = links(); err != nil {
			return err
		}
		l, err = net.Listen("tcp", listen)
		return err
	})
	if m.out > 0 {
		t.Cleanup(func() { unix.Close(m.out) })
	}
	for _, lacks := range []error{unix.EPERM, unix.EACCES, unix.ENOSYS, unix.ENOENT, unix.ENODEV} {
		if errors.Is(err, lacks) {
			missing(t, fmt.Sprintf("a machine can not be made; this needs root: %v", err))
		}
	}
	if err != nil {
		t.Fatal(err)
	}

	front, err := sidecar.NewFront(sidecar.FrontConfig{Listener: l, Next: next})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	failed := make(chan error)
	go func() { failed <- front.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-failed; err != nil {
			t.Error(err)
		}
	})

	// What leaves is seen.
	err = m.do(func() error {
		c, err := net.Dial("udp", "192.0.2.9:9")
		if err != nil {
			return err
		}
		defer c.Close()
		_, err = c.Write([]byte("x"))
		return err
	})
	if sent := m.sent(t); err != nil || !slices.Equal(sent, []string{"udp 192.0.2.9:9"}) {
		t.Fatalf("a datagram that leaves is seen as %q: %v", sent, err)
	}
	return m
}

// mounts puts the policy file where Chromium looks, for this thread and what it
// starts.
func mounts(policy []byte) error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("private mounts: %w", err)
	}
	// The folder above managed is there wherever Debian's chromium is.
	above := filepath.Dir(filepath.Dir(policies))
	if err := unix.Mount("culvert", above, "tmpfs", 0, ""); err != nil {
		return fmt.Errorf("%s: %w", above, err)
	}
	if err := os.MkdirAll(policies, 0o755); err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(policies, "culvert.json"), policy, 0o644); err != nil {
		return err
	}
	// Chromium asks the machine's own resolver for the TURN server's name, and hands the
	// name to the proxy when that fails. Here it fails at once.
	resolv := filepath.Join(above, "resolv.conf")
	if err := os.WriteFile(resolv, []byte("nameserver 127.0.0.1\n"), 0o644); err != nil {
		return err
	}
	if err := unix.Mount(resolv, "/etc/resolv.conf", "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("/etc/resolv.conf: %w", err)
	}
	return nil
}

// links brings up loopback and a TUN device that the default route leads to.
func links() (int, error) {
	lo, err := netlink.LinkByName("lo")
	if err == nil {
		err = netlink.LinkSetUp(lo)
	}
	if err != nil {
		return 0, fmt.Errorf("loopback: %w", err)
	}
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return 0, fmt.Errorf("/dev/net/tun: %w", err)
	}
	request, err := unix.NewIfreq("out")
	if err != nil {
		return fd, err
	}
	request.SetUint16(unix.IFF_TUN | unix.IFF_NO_PI)
	if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, request); err != nil {
		return fd, fmt.Errorf("a TUN device: %w", err)
	}
	out, err := netlink.LinkByName("out")
	if err != nil {
		return fd, err
	}
	addr, err := netlink.ParseAddr("198.18.80.1/24") // RFC 2544
	if err != nil {
		return fd, err
	}
	return fd, errors.Join(
		netlink.LinkSetUp(out),
		netlink.AddrAdd(out, addr),
		netlink.RouteAdd(&netlink.Route{LinkIndex: out.Attrs().Index, Scope: netlink.SCOPE_LINK, Dst: &net.IPNet{IP: net.IPv4zero, Mask: net.CIDRMask(0, 32)}}),
	)
}

// sent returns what has left the machine since the last call: the protocols and
// destinations of TCP and UDP. The kernel's own messages (IGMP, neighbours) do
// not count.
func (m *machine) sent(t *testing.T) []string {
	t.Helper()
	var all []string
	p := make([]byte, 64<<10)
	for {
		n, err := unix.Read(m.out, p)
		if errors.Is(err, unix.EAGAIN) {
			slices.Sort(all)
			return slices.Compact(all)
		}
		if err != nil {
			t.Fatal(err)
		}
		if to, ok := destination(p[:n]); ok {
			all = append(all, to)
		}
	}
}

// destination reads the packet's protocol and where it goes.
func destination(p []byte) (string, bool) {
	if len(p) < 20 {
		return "", false
	}
	var header int
	var protocol byte
	var to netip.Addr
	switch p[0] >> 4 {
	case 4:
		header, protocol, to = int(p[0]&15)*4, p[9], netip.AddrFrom4([4]byte(p[16:20]))
	case 6:
		if len(p) < 40 {
			return "", false
		}
		header, protocol, to = 40, p[6], netip.AddrFrom16([16]byte(p[24:40]))
	}
	name, ok := map[byte]string{unix.IPPROTO_TCP: "tcp", unix.IPPROTO_UDP: "udp"}[protocol]
	if !ok || len(p) < header+4 {
		return "", false
	}
	port := uint16(p[header+2])<<8 | uint16(p[header+3])
	return name + " " + netip.AddrPortFrom(to, port).String(), true
}
