package crowd

import (
	"net/netip"
	"sync"
	"testing"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func addr(s string) netip.Addr { return netip.MustParseAddr(s) }

func TestOneSourceCanNotTakeEveryPlace(t *testing.T) {
	c := New(10)
	var out []int
	enter := func(a string, n int) (*Place, bool) {
		return c.Enter(addr(a), func() { out = append(out, n) })
	}
	var places []*Place
	for n := range 10 { // one source may have them all while nobody else comes
		p, ok := enter("192.0.2.1", n)
		if !ok {
			t.Fatal(n)
		}
		places = append(places, p)
	}
	if _, ok := enter("192.0.2.1", 10); ok {
		t.Error("an eleventh of ten")
	}
	for n := range 5 { // others come, up to as many
		if _, ok := enter("192.0.2.2", 100+n); !ok || len(out) != n+1 || out[n] != n {
			t.Errorf("the other's %d.: %v, turned out %v", n, ok, out)
		}
	}
	if _, ok := enter("192.0.2.2", 200); ok {
		t.Error("a source took more than another one's")
	}
	if _, ok := enter("192.0.2.3", 300); !ok || out[len(out)-1] != 5 && out[len(out)-1] != 100 {
		t.Errorf("a third source: turned out %v", out)
	}
	for _, p := range places {
		p.Leave()
		p.Leave()
	}
	if n := c.Len(); n > 6 || n < 5 {
		t.Errorf("%d places are taken", n)
	}
}

func TestWhatIsOneSource(t *testing.T) {
	for a, b := range map[string]string{
		"192.0.2.1": "::ffff:192.0.2.1", "2001:db8::1": "2001:db8::ffff:1", "fe80::1%eth0": "fe80::2",
	} {
		if SourceOf(addr(a)) != SourceOf(addr(b)) {
			t.Errorf("%s and %s are two", a, b)
		}
	}
	for a, b := range map[string]string{"192.0.2.1": "192.0.2.2", "2001:db8::1": "2001:db8:0:1::1"} {
		if SourceOf(addr(a)) == SourceOf(addr(b)) {
			t.Errorf("%s and %s are one", a, b)
		}
	}
	if SourceOf(netip.Addr{}).IsValid() {
		t.Error("no address is a source")
	}
}

func TestPlacesAreCountedRightWhoeverComesAndGoes(t *testing.T) {
	c := New(50)
	var wg sync.WaitGroup
	for g := range 8 {
		wg.Go(func() {
			for range 500 {
				var held []*Place
				for range g + 5 {
					if p, ok := c.Enter(netip.AddrFrom4([4]byte{192, 0, 2, byte(g)}), func() {}); ok {
						held = append(held, p)
					}
					if n := c.Len(); n > 50 {
						t.Errorf("%d places are taken", n)
					}
				}
				for _, p := range held {
					p.Leave()
				}
			}
		})
	}
	wg.Wait()
	if c.Len() != 0 || len(c.by) != 0 {
		t.Errorf("%d places and %d sources are left", c.Len(), len(c.by))
	}
}
