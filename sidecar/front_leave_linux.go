package sidecar

import (
	"net"
	"net/netip"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"culvert/tunnel"
)

// orphanPause is how often a client that has sent FIN is looked up again.
const orphanPause = 250 * time.Millisecond

// whenLeft calls left when the client leaves, until settled is called. It reads
// nothing from the connection.
//
// A reset is leaving. A FIN is not, by itself: RFC 1928 and HTTP let a client
// shut down its sending side right after the request and still wait for the
// answer, and on the wire a full close looks the same. On this machine
// sock_diag tells them apart: a closed socket belongs to no file any more.
// A client elsewhere that sent FIN is waited for.
func whenLeft(c *net.TCPConn, left func()) (settled func()) {
	raw, err := c.SyscallConn()
	if err != nil {
		return func() {}
	}
	stop, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		if raw.Read(func(fd uintptr) bool { return hungUp(fd) != 0 }) != nil {
			return // told to stop, or closed by us
		}
		for {
			var events int16
			if raw.Control(func(fd uintptr) { events = hungUp(fd) }) != nil {
				return
			}
			if events&(unix.POLLHUP|unix.POLLERR) != 0 || orphaned(tunnel.AddrPortOf(c.RemoteAddr()), tunnel.AddrPortOf(c.LocalAddr())) {
				left()
				return
			}
			select {
			case <-stop:
				return
			case <-time.After(orphanPause):
			}
		}
	}()
	return func() {
		close(stop)
		c.SetReadDeadline(time.Unix(1, 0)) // ends raw.Read
		<-done
		c.SetReadDeadline(time.Time{})
	}
}

// hungUp returns which of FIN, reset and error have arrived.
func hungUp(fd uintptr) int16 {
	fds := [1]unix.PollFd{{Fd: int32(fd), Events: unix.POLLRDHUP}}
	for {
		if _, err := unix.Poll(fds[:], 0); err != unix.EINTR {
			return fds[0].Revents
		}
	}
}

// orphaned reports whether the client's socket has been closed entirely. It is
// false where that can not be known.
func orphaned(client, server netip.AddrPort) bool {
	if !client.Addr().IsLoopback() && client.Addr() != server.Addr() {
		return false
	}
	// Finding our own end shows that sock_diag works here.
	if own, err := diagTCP(server, client); err != nil || own.inode == 0 {
		return false
	}
	app, err := diagTCP(client, server)
	return err == syscall.ENOENT || err == nil && app.inode == 0
}
