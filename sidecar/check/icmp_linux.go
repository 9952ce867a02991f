package check

import (
	"net"
	"syscall"
)

// hearRejections has a UDP socket fail for every ICMP error. Without it the kernel
// keeps "network unreachable" and "host unreachable" to itself (ip(7), IP_RECVERR),
// with which many a firewall rejects. A socket of the other family takes one of the
// two options only.
func hearRejections(c net.Conn) {
	s, ok := c.(syscall.Conn)
	if !ok {
		return
	}
	if raw, err := s.SyscallConn(); err == nil {
		raw.Control(func(fd uintptr) {
			syscall.SetsockoptInt(int(fd), syscall.IPPROTO_IP, syscall.IP_RECVERR, 1)
			syscall.SetsockoptInt(int(fd), syscall.IPPROTO_IPV6, syscall.IPV6_RECVERR, 1)
		})
	}
}
