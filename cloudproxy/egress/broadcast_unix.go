//go:build unix

package egress

import (
	"net"
	"syscall"
)

// noBroadcast takes back what package net allows every UDP socket: to send to the
// broadcast addresses of this host's own networks, which nobody else can tell from
// the addresses of hosts. The kernel then refuses such a datagram: socket(7),
// SO_BROADCAST.
func noBroadcast(conn *net.UDPConn) error {
	raw, err := conn.SyscallConn()
	if err != nil {
		return err
	}
	var failed error
	err = raw.Control(func(fd uintptr) {
		failed = syscall.SetsockoptInt(int(fd), syscall.SOL_SOCKET, syscall.SO_BROADCAST, 0)
	})
	if err == nil {
		err = failed
	}
	return err
}
