package fair

import (
	"testing"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// all takes as many places as there are for one.
func all(p *Places[string], who string) (n int) {
	for {
		if _, ok := p.Enter(who); !ok {
			return n
		}
		n++
	}
}

func TestNobodyTakesAllPlaces(t *testing.T) {
	for _, c := range []struct {
		limit int
		who   []string // each takes all it gets, one after the other
		want  []int
	}{
		{0, []string{"a"}, []int{0}},
		{1, []string{"a", "b"}, []int{1, 0}},
		{2, []string{"a"}, []int{2}},
		{10, []string{"a", "b", "c"}, []int{9, 1, 0}},
		{900, []string{"a", "b", "c"}, []int{800, 89, 10}},
		{50000, []string{"a", "b", "c", "d"}, []int{44445, 4938, 549, 61}},
	} {
		p := New[string](c.limit)
		for i, who := range c.who {
			if n := all(p, who); n != c.want[i] {
				t.Errorf("of %d places %q gets %d, want %d", c.limit, who, n, c.want[i])
			}
		}
	}
}

func TestThoseWhoGrowTogetherGetTheSame(t *testing.T) {
	p := New[string](1700)
	for grown := true; grown; {
		_, a := p.Enter("a")
		_, b := p.Enter("b")
		grown = a || b
	}
	if p.by["a"] != 800 || p.by["b"] != 800 || p.Held() != 1600 {
		t.Errorf("%+v", p)
	}
}

func TestWhatIsGivenBackIsForAll(t *testing.T) {
	p := New[string](18)
	if a, b := all(p, "a"), all(p, "b"); a != 16 || b != 2 {
		t.Fatalf("%d, %d", a, b)
	}
	if full, ok := p.Enter("c"); !full || ok {
		t.Errorf("the 19th of 18: full %v, %v", full, ok)
	}
	for range 16 {
		p.Leave("a")
	}
	if full, ok := p.Enter("c"); full || !ok {
		t.Errorf("with 16 free: full %v, %v", full, ok)
	}
	if n := all(p, "b"); n != 14 || len(p.by) != 2 {
		t.Errorf("b gets %d more, %+v", n, p)
	}
}
