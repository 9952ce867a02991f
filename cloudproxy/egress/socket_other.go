//go:build !linux || !(amd64 || arm64 || arm || riscv64)

package egress

// wantErrors does nothing: here a socket has no queue of ICMP errors.
func (s *socket) wantErrors() error { return nil }

// Failed does nothing: the error was of a datagram that has gone.
func (s *socket) Failed() {}
