package uplink

import (
	"sync"

	"culvert/tunnel/wire"
)

// maxNetworks bounds the networks that are remembered.
const maxNetworks = 64

// A memory is what was found about UDP in the networks that the sidecar has
// been in. It outlives sessions: where UDP never works it is not tried more
// often because the session is a new one.
type memory struct {
	mu       sync.Mutex // guards networks
	networks map[string]remembered
}

type remembered struct {
	again [wire.WaysEnd]again
	fails int // of joining over QUIC, in a row
}

func (m *memory) of(network string) remembered {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.networks[network]
}

func (m *memory) keep(network string, r remembered) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.networks == nil {
		m.networks = map[string]remembered{}
	}
	if _, known := m.networks[network]; !known && len(m.networks) >= maxNetworks {
		for other := range m.networks { // any: it is a bound, not a choice
			delete(m.networks, other)
			break
		}
	}
	m.networks[network] = r
}
