package session

import (
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"culvert/tunnel"
	"culvert/tunnel/tunneltest"
	"culvert/tunnel/wire"
)

// A reconnect with every stream that there may be is no flood, and what goes on
// beyond that is.
func TestWhatIsAskedOnCarriersIsBoundedFarAboveWhatMayBeOpen(t *testing.T) {
	l := Limits{}.withDefaults()
	asks := l.asks()
	for range l.Streams + l.OpensPerSecond + 1 {
		if !asks.Allow() {
			t.Fatal("a session that comes back with all its streams is cut")
		}
	}
	for range 8 * (l.Streams + l.OpensPerSecond) {
		if !asks.Allow() {
			return
		}
	}
	t.Error("there is no end")
}

func TestASidecarThatFloodsWithStreamsIsCutAndOthersAreNot(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ended := make(chan error, 1)
		p := join(t, NewNear(0), tunneltest.Config{}, FarConfig{Limits: Limits{OpensPerSecond: 10, Streams: 10}, Ended: func(err error) { ended <- err }})
		defer p.end()
		other := join(t, NewNear(0), tunneltest.Config{}, FarConfig{})
		defer other.end()
		began := time.Now()
		carrier := p.at.carriers[0].carrier
		for n := range 1000 {
			s, err := carrier.OpenStream(t.Context())
			if err != nil {
				t.Logf("ended after %d streams: %v", n, err)
				break
			}
			s.Abort(nil)
			time.Sleep(time.Millisecond)
		}
		err := <-ended
		if took := time.Since(began); !errors.Is(err, tunnel.LimitExceeded) || took > 2*time.Second {
			t.Errorf("after %v: %v", took, err)
		}
		s, err := other.near.OpenStream(t.Context(), tunnel.Peer{}, alpha)
		if err != nil {
			t.Fatalf("another session: %v", err)
		}
		s.Close()
	})
}

// What every association's end takes is no flood, and what goes on beyond that is.
func TestASidecarThatFloodsItsControlStreamIsCut(t *testing.T) {
	limits := Limits{OpensPerSecond: 100, Associations: 100}
	closed := wire.Message{Closed: &wire.Closed{Association: 7}}
	for name, c := range map[string]struct {
		m     wire.Message
		n     int
		every time.Duration
		cut   bool
	}{
		"each association ends":    {closed, 200, 0, false},
		"associations come and go": {closed, 5000, 10 * time.Millisecond, false},
		"a flood of ends":          {closed, 5000, 100 * time.Microsecond, true},
		"a token each second":      {wire.Message{Renew: &wire.Renew{Token: "x"}}, 60, time.Second, false},
		"a flood of tokens":        {wire.Message{Renew: &wire.Renew{Token: "x"}}, 100, 5 * time.Millisecond, true},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				ended := make(chan error, 1)
				p := join(t, NewNear(0), tunneltest.Config{}, FarConfig{Limits: limits, Renew: func(string) error { return nil }, Ended: func(err error) { ended <- err }})
				defer p.end()
				began := time.Now()
				for range c.n {
					p.at.control.send(c.m)
					time.Sleep(c.every)
				}
				synctest.Wait()
				select {
				case err := <-ended:
					if took := time.Since(began); !c.cut || !errors.Is(err, tunnel.LimitExceeded) || took > time.Second {
						t.Errorf("after %v: %v", took, err)
					}
				default:
					if c.cut {
						t.Error("it goes on")
					}
				}
			})
		})
	}
}

// What an app leaves before its stream has said what it is for is bounded, well
// below what a session may open.
func TestStreamsThatEndUnusedAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for name, c := range map[string]struct {
			every time.Duration // between them
			cut   bool
		}{
			"a flood":              {200 * time.Microsecond, true},
			"apps that think anew": {50 * time.Millisecond, false},
		} {
			ended := make(chan error, 1)
			p := join(t, NewNear(0), tunneltest.Config{}, FarConfig{Ended: func(err error) { ended <- err }})
			began := time.Now()
			carrier := p.at.carriers[0].carrier
			for range 3000 {
				s, err := carrier.OpenStream(t.Context())
				if err != nil {
					break
				}
				s.Abort(nil)
				time.Sleep(c.every)
			}
			synctest.Wait()
			select {
			case err := <-ended:
				if took := time.Since(began); !c.cut || !errors.Is(err, tunnel.LimitExceeded) || took > time.Second {
					t.Errorf("%s: after %v: %v", name, took, err)
				}
			default:
				if c.cut {
					t.Errorf("%s: it goes on", name)
				}
			}
			p.end()
		}
	})
}
