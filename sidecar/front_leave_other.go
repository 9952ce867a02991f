//go:build !linux

package sidecar

import "net"

// whenLeft does nothing here: an attempt whose client has left runs to its end.
func whenLeft(*net.TCPConn, func()) (settled func()) { return func() {} }
