package measure

import (
	"slices"
	"testing"
	"time"
)

func TestQuantilesAreNearestRanks(t *testing.T) {
	v := make([]time.Duration, 200)
	for i := range v {
		v[i] = time.Duration(200-i) * time.Millisecond
	}
	if got, want := Quantiles(v), (Delays{P50: 100, P95: 190, P99: 198, Max: 200}); got != want {
		t.Errorf("got %+v, want %+v", got, want)
	}
	if got := Quantiles([]time.Duration{3 * time.Millisecond}); got != (Delays{3, 3, 3, 3}) {
		t.Errorf("of one: %+v", got)
	}
	if got := Quantiles(nil); got != (Delays{}) {
		t.Errorf("of none: %+v", got)
	}
}

func TestSeriesBinsByTheTimeOfSending(t *testing.T) {
	ms := time.Millisecond
	s := NewSeries(250*ms, []time.Duration{0, 99 * ms, 100 * ms, 249 * ms, 300 * ms}, []Sample{
		{Sent: 0, Up: 10 * ms, Down: 20 * ms},
		{Sent: 99 * ms, Up: 30 * ms, Down: 5 * ms},
		{Sent: 300 * ms, Up: 1 * ms, Down: 2 * ms}, // past the end: in the last bin
	})
	if !slices.Equal(s.Sent, []int{2, 1, 2}) || !slices.Equal(s.Back, []int{2, 0, 1}) {
		t.Errorf("sent %v, back %v", s.Sent, s.Back)
	}
	if !slices.Equal(s.UpP50, []float64{10, 0, 1}) || !slices.Equal(s.UpMax, []float64{30, 0, 1}) || !slices.Equal(s.DownMax, []float64{20, 0, 2}) {
		t.Errorf("up %v %v, down %v", s.UpP50, s.UpMax, s.DownMax)
	}
	if empty := NewSeries(0, nil, nil); len(empty.Sent) != 0 {
		t.Errorf("no time has bins: %+v", empty)
	}
}

func TestPercentOfNothingIsNothing(t *testing.T) {
	if Percent(1, 0) != 0 || Percent(1, 4) != 25 {
		t.Error(Percent(1, 0), Percent(1, 4))
	}
}
