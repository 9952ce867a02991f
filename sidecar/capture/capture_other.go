//go:build !linux || !(amd64 || arm64 || arm || riscv64)

package capture

import (
	"context"
	"net"
	"net/netip"
	"syscall"

	"culvert/tunnel"
)

// Sockets are for Linux.
type Sockets struct{}

// Listen is for Linux.
func Listen(uint16, uint32) (*Sockets, error) {
	return nil, tunnel.Errorf(tunnel.Unsupported, "capturing traffic needs Linux; leave 'capture' out of the configuration and set the app's proxy instead")
}

// Port is for Linux.
func (*Sockets) Port() uint16 { return 0 }

// Close is for Linux.
func (*Sockets) Close() {}

// A Capture is for Linux.
type Capture struct{}

// New is for Linux.
func New(Config) (*Capture, error) {
	_, err := Listen(0, 0)
	return nil, err
}

// Run is for Linux.
func (*Capture) Run(context.Context) error { return nil }

// Close is for Linux.
func (*Capture) Close() {}

// Stats is for Linux.
func (*Capture) Stats() Stats { return Stats{} }

// Server is for Linux.
func (*Capture) Server(netip.AddrPort) (server netip.AddrPort, network string, ok bool) { return }

// Protect is for Linux.
func Protect(uint32) func(network, address string, c syscall.RawConn) error { return nil }

// Resolver is for Linux.
func Resolver(uint32) *net.Resolver { return net.DefaultResolver }

// MayMark is for Linux.
func MayMark() error {
	_, err := Listen(0, 0)
	return err
}
