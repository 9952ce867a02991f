package tunneltls

import (
	"net"
	"sync"
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

// keepUnsent changes how many bytes the kernel holds that it has not sent.
func keepUnsent(c net.Conn, n int) {
	control(c, func(fd int) { unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_NOTSENT_LOWAT, n) })
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

// waited is for how long at least has waited what can be read: since when nothing
// more has come. 0: not known.
func waited(c net.Conn) (since time.Duration) {
	control(c, func(fd int) {
		if info, err := unix.GetsockoptTCPInfo(fd, unix.IPPROTO_TCP, unix.TCP_INFO); err == nil {
			since = time.Duration(info.Last_data_recv) * time.Millisecond
		}
	})
	return since
}

// ask asks what becomes of the data that c has sent.
func ask(c net.Conn) (is progress, ok bool) {
	control(c, func(fd int) {
		i, err := unix.GetsockoptTCPInfo(fd, unix.IPPROTO_TCP, unix.TCP_INFO)
		if err != nil {
			return
		}
		const loss = 4 // TCP_CA_Loss of the kernel
		ok = true
		is = progress{
			flying:  int(i.Unacked),
			sacked:  int(i.Sacked),
			acked:   i.Bytes_acked,
			unsent:  int(i.Notsent_bytes),
			open:    i.Snd_wnd >= i.Snd_mss, // false where the kernel does not tell (before Linux 5.4)
			full:    int(i.Unacked)-int(i.Sacked)-int(i.Lost)+int(i.Retrans) >= int(i.Snd_cwnd),
			expiry:  i.Ca_state == loss,
			trip:    time.Duration(i.Rtt) * time.Microsecond,
			least:   time.Duration(i.Min_rtt) * time.Microsecond,
			segment: int(i.Bytes_sent / max(1, uint64(i.Data_segs_out))),
		}
	})
	return is, ok
}

// bbr reports whether a TCP connection of this process can have BBR.
var bbr = sync.OnceValue(func() bool {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return false
	}
	defer unix.Close(fd)
	return unix.SetsockoptString(fd, unix.IPPROTO_TCP, unix.TCP_CONGESTION, "bbr") == nil
})

func control(c net.Conn, f func(fd int)) {
	s, ok := c.(syscall.Conn)
	if !ok {
		return
	}
	if rc, err := s.SyscallConn(); err == nil {
		rc.Control(func(fd uintptr) { f(int(fd)) })
	}
}
