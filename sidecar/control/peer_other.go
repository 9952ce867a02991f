//go:build !linux

package control

import "net"

// peerRefused leaves it to the rights of the socket here.
func peerRefused(net.Conn, int) string { return "" }
