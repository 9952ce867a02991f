//go:build !linux || !(amd64 || arm64 || arm || riscv64)

package tunnelquic

import "culvert/tunnel"

// flows: elsewhere quic-go reads the socket itself and nobody shares it.
type flows struct{}

func (s *socket) start(Config, bool) error { return nil }

func (*flows) secret([]byte) bool { return false }

type flow struct{}

func newFlow(*link) *flow { return nil }

func (*flow) end() {}

func (l *link) Flow() tunnel.Flow { return nil }
