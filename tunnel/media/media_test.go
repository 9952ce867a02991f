package media

import (
	"math/rand/v2"
	"testing"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestAWindowTakesEachNumberOnce(t *testing.T) {
	for name, c := range map[string]struct {
		in   []uint16
		want []bool
	}{
		"in order":               {[]uint16{7, 8, 9}, []bool{true, true, true}},
		"repeated":               {[]uint16{7, 7, 8, 7, 8}, []bool{true, false, true, false, false}},
		"reordered":              {[]uint16{7, 10, 9, 8, 9}, []bool{true, true, true, true, false}},
		"across the wrap":        {[]uint16{65534, 1, 65535, 0, 65535}, []bool{true, true, true, true, false}},
		"a jump and what is old": {[]uint16{0, 5000, 3990, 3977, 3976}, []bool{true, true, true, true, false}},
		"zero first":             {[]uint16{0, 0}, []bool{true, false}},
	} {
		t.Run(name, func(t *testing.T) {
			var w Window
			for i, n := range c.in {
				if got := w.Fresh(n); got != c.want[i] {
					t.Errorf("number %d (%d.) is fresh: %v", n, i, got)
				}
			}
		})
	}
}

func TestAWindowAgreesWithASet(t *testing.T) {
	var w Window
	seen := map[int]bool{}
	at := 60000
	for range 200_000 {
		at += rand.IntN(3)
		n := at - rand.IntN(windowBits/2)
		if got := w.Fresh(uint16(n)); got == seen[n] {
			t.Fatalf("%d: fresh %v, seen before %v", n, got, seen[n])
		}
		seen[n] = true
	}
}
