//go:build !unix

package egress

import "net"

// noBroadcast does nothing: the sockets of this system are left as they are.
func noBroadcast(*net.UDPConn) error { return nil }
