package netpair

import (
	"fmt"
	"net/netip"
	"os"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"culvert/cmd/internal/link"
)

// NewBad makes a pair like New's whose link is as bad as it is told to be. The
// test's own process carries the packets.
func NewBad(t testing.TB, s link.Settings) (*Pair, *link.Link) {
	t.Helper()
	var p Pair
	var devices [2]*os.File
	for i, end := range []struct {
		space       **Space
		at, gateway netip.Addr
	}{{&p.Near, NearAddr, FarAddr}, {&p.Far, FarAddr, netip.Addr{}}} {
		space, err := newSpace(t)
		if err == nil {
			*end.space = space
			err = space.Do(func() (err error) {
				if devices[i], err = openTUN(); err != nil {
					return err
				}
				t.Cleanup(func() { devices[i].Close() })
				return up(end.at, end.gateway)
			})
		}
		if err != nil {
			unmakeable(t, err)
		}
	}
	l := link.New(devices[0], devices[1], s)
	t.Cleanup(func() {
		for _, d := range devices {
			d.Close()
		}
		l.Close()
	})
	return &p, l
}

// openTUN makes a device for IP packets in this thread's namespace. It lasts
// as long as the file is open.
func openTUN() (*os.File, error) {
	const path = "/dev/net/tun"
	// Non-blocking, so that a read ends when the file is closed.
	fd, err := unix.Open(path, unix.O_RDWR|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: path, Err: err}
	}
	r, err := unix.NewIfreq(device)
	if err == nil {
		r.SetUint16(unix.IFF_TUN | unix.IFF_NO_PI)
		err = unix.IoctlIfreq(fd, unix.TUNSETIFF, r)
	}
	if err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("a TUN device: %w", err)
	}
	l, err := netlink.LinkByName(device)
	if err == nil {
		err = netlink.LinkSetTxQLen(l, 5000) // what drops is the link, not the device
	}
	if err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("a TUN device's queue: %w", err)
	}
	return os.NewFile(uintptr(fd), path), nil
}
