//go:build !unix

package sidecar

import (
	"net/netip"
	"syscall"
)

// udpBuffer holds one datagram.
type udpBuffer struct {
	data [1 << 16]byte
}

func newUDPBuffer() *udpBuffer { return new(udpBuffer) }

// send writes the first n bytes. Loopback takes or drops them at once.
func (b *udpBuffer) send(a *association, n int, to netip.AddrPort) error {
	_, err := a.socket.WriteToUDPAddrPort(b.data[:n], to)
	return err
}

func isSocketFull(error) bool { return false }

// readiness is not known apart from reading here: an idle association holds a
// buffer.
type readiness struct{}

func newReadiness(syscall.RawConn) *readiness { return new(readiness) }

func (*readiness) readable() error { return nil }

func (*readiness) more() bool { return false }
