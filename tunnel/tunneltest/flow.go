package tunneltest

import (
	"fmt"
	"net/netip"
	"sync"

	"culvert/tunnel"
)

// flow is one end of a UDP flow in memory. It sends to its peer alone.
type flow struct {
	way  *way
	peer netip.AddrPort

	mu      sync.Mutex // guards the fields below
	claims  map[[8]byte]func([]byte, tunnel.Path) bool
	started bool
}

func (f *flow) Claim(id [8]byte, recv func([]byte, tunnel.Path) bool) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.claims[id] != nil {
		return fmt.Errorf("the ID %x is claimed already", id)
	}
	if f.claims == nil {
		f.claims = map[[8]byte]func([]byte, tunnel.Path) bool{}
	}
	f.claims[id] = recv
	if !f.started {
		f.started = true
		f.way.Start(f.receive, func() {})
	}
	return nil
}

func (f *flow) receive(p []byte) {
	if len(p) < 9 || p[0]>>6 != 1 {
		return
	}
	f.mu.Lock()
	recv := f.claims[[8]byte(p[1:])]
	f.mu.Unlock()
	if recv != nil {
		recv(p, f.Path())
	}
}

func (f *flow) Release(id [8]byte) {
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.claims, id)
}

func (f *flow) Send(p []byte, to tunnel.Path) error {
	if to != f.Path() {
		return fmt.Errorf("this flow leads to %v, not to %v", f.peer, to.Remote)
	}
	return f.way.Send(p)
}

func (f *flow) Path() tunnel.Path { return tunnel.Path{Remote: f.peer} }

func (f *flow) Late() uint64 { return 0 }

func (f *flow) ResetToken([8]byte) (token [16]byte, ok bool) { return token, false }

func (f *flow) WatchReset([16]byte, func()) {}
