package tunnel_test

import (
	"fmt"
	"testing"

	"culvert/tunnel"
)

func TestRefusalsAreCountedByCodeAndDoNotGrowWithoutBound(t *testing.T) {
	var r tunnel.Refusals
	if n := r.ByCode(); len(n) != 0 {
		t.Errorf("%v before anything was refused", n)
	}
	for range 3 {
		r.Add(tunnel.PolicyDenied)
	}
	for i := range 1000 {
		r.Add(tunnel.Code(fmt.Sprintf("made_up_%d", i)))
	}
	r.Add(tunnel.PolicyDenied)
	n, sum := r.ByCode(), uint64(0)
	for _, count := range n {
		sum += count
	}
	// Internal may be the one beyond.
	if len(n) > 65 || n[string(tunnel.PolicyDenied)] != 4 || n["made_up_0"] != 1 || n[string(tunnel.Internal)] < 900 || sum != 1004 {
		t.Errorf("%d codes, %d refusals: %v", len(n), sum, n)
	}
	n[string(tunnel.PolicyDenied)] = 0
	if r.ByCode()[string(tunnel.PolicyDenied)] != 4 {
		t.Error("what was returned is not a copy")
	}
}
