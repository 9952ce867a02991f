package policy

import (
	"net/netip"
	"runtime"
	"testing"

	"culvert/tunnel"
)

func TestAnAssociationRemembersABoundedNumberOfVerdicts(t *testing.T) {
	p, err := New(Config{Profiles: []string{"public"}})
	if err != nil {
		t.Fatal(err)
	}
	g := &guardedPackets{guard: NewGuard(nil, func(tunnel.Peer) *Policy { return p })}
	for port := range 1000 {
		if err := g.judge(tunnel.Target{Addr: netip.AddrFrom4([4]byte{8, 8, 8, 8}), Port: uint16(port + 1)}); err != nil {
			t.Fatal(err)
		}
		if n := len(g.allowed); n > maxVerdicts {
			t.Fatalf("%d verdicts are remembered, more than %d", n, maxVerdicts)
		}
	}
}

// A sidecar may have thousands of associations, and each costs what it remembers.
func TestManyRefusalsTakeNoMemory(t *testing.T) {
	p, err := New(Config{Profiles: []string{"public"}})
	if err != nil {
		t.Fatal(err)
	}
	associations := make([]guardedPackets, 50)
	guard := NewGuard(nil, func(tunnel.Peer) *Policy { return p })
	heap := func() int64 {
		var m runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&m)
		return int64(m.HeapAlloc)
	}
	before := heap()
	for i := range associations {
		associations[i].guard = guard
		for j := range 2 * maxVerdicts {
			if associations[i].judge(tunnel.Target{Addr: netip.AddrFrom4([4]byte{10, 0, byte(j >> 8), byte(j)}), Port: 9}) == nil {
				t.Fatal("it is allowed")
			}
		}
	}
	if each := (heap() - before) / int64(len(associations)); each > 4<<10 {
		t.Errorf("%d bytes for each association", each)
	}
	runtime.KeepAlive(associations)
}
