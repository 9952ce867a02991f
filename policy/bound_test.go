package policy

import (
	"net/netip"
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
		if n := len(g.verdicts); n > maxVerdicts {
			t.Fatalf("%d verdicts are remembered, more than %d", n, maxVerdicts)
		}
	}
}
