package policy_test

import (
	"net/netip"
	"testing"

	"go.uber.org/goleak"

	"culvert/policy"
	"culvert/tunnel"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func parse(t testing.TB, text string) *policy.Policy {
	t.Helper()
	p, err := policy.Parse([]byte(text), "test.yaml")
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func target(t testing.TB, s string) tunnel.Target {
	t.Helper()
	to, err := tunnel.ParseTarget(s)
	if err != nil {
		t.Fatal(err)
	}
	return to
}

func addr(s string) netip.Addr { return netip.MustParseAddr(s) }
