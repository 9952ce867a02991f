package netpair

import (
	"encoding/binary"
	"errors"
	"os"
	"sync"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"
)

const (
	// backlog holds far more than any test sends, so that a busy machine loses
	// nothing, in bytes.
	backlog = 64 << 20
	// snap is how much of a packet is looked at.
	snap = 256
)

// A tap reads a packet socket, packet(7), on a goroutine of its own.
type tap struct {
	t    testing.TB
	fd   int
	end  atomic.Bool
	wg   sync.WaitGroup
	once sync.Once
}

// open makes the socket in this thread's namespace. Bound to no device, which is
// ifindex 0, it hears them all.
func (p *tap) open(kind, ifindex int) (err error) {
	all := binary.NativeEndian.Uint16(binary.BigEndian.AppendUint16(nil, unix.ETH_P_ALL))
	// Protocol 0 receives nothing until it is bound.
	p.fd, err = unix.Socket(unix.AF_PACKET, kind|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return os.NewSyscallError("socket", err)
	}
	err = errors.Join(
		unix.SetsockoptInt(p.fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, backlog),
		unix.SetsockoptTimeval(p.fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Usec: 50_000}),
		unix.Bind(p.fd, &unix.SockaddrLinklayer{Protocol: all, Ifindex: ifindex}),
	)
	if err != nil {
		unix.Close(p.fd)
	}
	return err
}

// begin hands what comes to take, of which the end may be missing, until stop, or
// until the test ends.
func (p *tap) begin(take func(at *unix.SockaddrLinklayer, packet []byte)) {
	p.wg.Go(func() { p.read(take) })
	p.t.Cleanup(p.stop)
}

// read reads until the end is wanted and nothing is left to read. From then on it
// does not wait: what passes may never pause for as long as a read waits.
func (p *tap) read(take func(at *unix.SockaddrLinklayer, packet []byte)) {
	var b [snap]byte
	for {
		flags := 0
		if p.end.Load() {
			flags = unix.MSG_DONTWAIT
		}
		n, from, err := unix.Recvfrom(p.fd, b[:], flags)
		switch {
		case errors.Is(err, unix.EINTR):
		case errors.Is(err, unix.EAGAIN):
			if p.end.Load() {
				return
			}
		case err != nil:
			p.t.Errorf("the capture: %v", err)
			return
		default:
			take(from.(*unix.SockaddrLinklayer), b[:n])
		}
	}
}

// stop ends the reading. It fails the test when a packet may have been missed.
func (p *tap) stop() {
	p.once.Do(func() {
		p.end.Store(true)
		p.wg.Wait()
		if s, err := unix.GetsockoptTpacketStats(p.fd, unix.SOL_PACKET, unix.PACKET_STATISTICS); err != nil || s.Drops > 0 {
			p.t.Errorf("the capture missed packets: %+v, %v", s, err)
		}
		unix.Close(p.fd)
	})
}
