package tunneltls

import (
	"net"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// unsent is how many bytes the kernel holds that it has not sent once
// (TCP_NOTSENT_LOWAT): what waits there can neither be dropped nor overtaken.
const unsent = 16 << 10

// tune prepares a TCP connection; all of it is best effort. BBR keeps its rate
// where loss is not congestion, and its queue short.
func tune(c net.Conn) {
	control(c, func(fd int) {
		unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1)
		unix.SetsockoptString(fd, unix.IPPROTO_TCP, unix.TCP_CONGESTION, "bbr")
	})
}

// keepShort makes the kernel's own queue short and gives up on data that
// nobody acknowledges for longer than timeout.
func keepShort(c net.Conn, unsent int, timeout time.Duration) {
	control(c, func(fd int) {
		unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_NOTSENT_LOWAT, unsent)
		unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, int(timeout.Milliseconds()))
	})
}

// roundTrip is the kernel's smoothed round trip; 0: not known.
func roundTrip(c net.Conn) (rtt time.Duration) {
	control(c, func(fd int) {
		if info, err := unix.GetsockoptTCPInfo(fd, unix.IPPROTO_TCP, unix.TCP_INFO); err == nil {
			rtt = time.Duration(info.Rtt) * time.Microsecond
		}
	})
	return rtt
}

func control(c net.Conn, f func(fd int)) {
	s, ok := c.(syscall.Conn)
	if !ok {
		return
	}
	if rc, err := s.SyscallConn(); err == nil {
		rc.Control(func(fd uintptr) { f(int(fd)) })
	}
}
