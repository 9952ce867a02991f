package egress

import (
	"context"
	"testing"

	"culvert/tunnel"
)

func TestNoAppTakesAllPlaces(t *testing.T) {
	for _, c := range []struct {
		limit int
		apps  []string // each takes all it gets, one after the other
		want  []int
	}{
		{1, []string{"a", "b"}, []int{1, 0}},
		{2, []string{"a"}, []int{2}},
		{10, []string{"a", "b", "c"}, []int{9, 1, 0}},
		{900, []string{"a", "b", "c"}, []int{800, 89, 10}},
		{50000, []string{"a", "b", "c", "d"}, []int{44445, 4938, 549, 61}},
	} {
		s := newShares(c.limit)
		for i, app := range c.apps {
			n := 0
			for {
				if _, ok := s.enter(app); !ok {
					break
				}
				n++
			}
			if n != c.want[i] {
				t.Errorf("of %d places %q gets %d, want %d", c.limit, app, n, c.want[i])
			}
		}
	}
}

func TestAppsThatGrowTogetherGetTheSame(t *testing.T) {
	s := newShares(1700)
	for full := false; !full; {
		_, a := s.enter("a")
		_, b := s.enter("b")
		full = !a && !b
	}
	if s.by["a"] != s.by["b"] || s.by["a"] != 800 {
		t.Errorf("%v", s.by)
	}
	for range 800 {
		s.leave("a")
	}
	n := 0
	for ok := true; ok; n++ {
		_, ok = s.enter("b")
	}
	if _, there := s.by["a"]; there || n < 700 || s.held != s.by["b"] {
		t.Errorf("when a has left: b got %d more, %+v", n, s)
	}
}

func TestAnAppWithManyAssociationsAndStreamsLeavesRoomForOthers(t *testing.T) {
	e := newEgress(t, Config{MaxAssociations: 18, MaxStreams: 18})
	l := listener(t)
	to := tunnel.TargetOf(tunnel.AddrPortOf(l.Addr()))
	for kind, open := range map[string]func(by tunnel.Peer) (end func(), _ error){
		"streams": func(by tunnel.Peer) (func(), error) {
			s, err := e.OpenStream(context.Background(), by, to)
			return func() { s.Close(); s.Abort(nil) }, err // both: it is counted once
		},
		"associations": func(by tunnel.Peer) (func(), error) {
			p, err := e.OpenPackets(by, newReceiver())
			return func() { p.Close(); p.Close() }, err
		},
	} {
		var ends []func()
		take := func(app string, want int) {
			t.Helper()
			n := 0
			for {
				end, err := open(tunnel.Peer{App: app})
				if err != nil {
					if tunnel.CodeOf(err) != tunnel.LimitExceeded {
						t.Error(err)
					}
					break
				}
				ends, n = append(ends, end), n+1
			}
			if n != want {
				t.Errorf("%s: %s got %d, want %d", kind, app, n, want)
			}
		}
		take("greedy", 16)
		take("other", 2)
		for _, end := range ends {
			end()
		}
		take("other", 16)
		for _, end := range ends {
			end()
		}
	}
	if st := e.Stats(); st.Streams != 0 || st.Associations != 0 || e.streamShares.held != 0 || e.assocShares.held != 0 {
		t.Errorf("%+v, %+v, %+v are left", st, e.streamShares, e.assocShares)
	}
}
