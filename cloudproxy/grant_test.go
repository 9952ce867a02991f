package cloudproxy_test

import (
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"culvert/tunnel"
)

func TestALiveSessionTakesAnotherTokenWithoutANewConnection(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld()
		w.renewed = make(chan struct{}, 1)
		var got []string
		answer := error(nil)
		w.renew = func(token string) error { got = append(got, token); return answer }
		stop := w.serve(t)
		defer stop()
		s := w.sidecar(t, 0, tunnel.ModeTCP)
		defer s.stop()
		s.up(t)
		before := s.Stats().Connects
		say := func(token string) {
			w.token.Store(&token)
			w.renewed <- struct{}{}
			time.Sleep(3 * time.Second)
			synctest.Wait()
		}
		say("secret") // the file was touched
		say("second")
		answer = tunnel.Errorf(tunnel.TokenRejected, "because")
		say("third")
		if len(got) != 2 || got[0] != "second" || got[1] != "third" {
			t.Errorf("the cloud proxy was told %q", got)
		}
		if n := s.Stats().Connects; n != before || w.server.Sessions() != 1 || len(w.opens) != 1 {
			t.Errorf("%d sessions were opened, %d before; %d opens", n, before, len(w.opens))
		}
	})
}

func TestASessionThatMayNotGoOnEndsWithinTwoSecondsAndSaysWhy(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld()
		var no atomic.Pointer[tunnel.Error]
		w.check = func() error {
			if e := no.Load(); e != nil {
				return e
			}
			return nil
		}
		stop := w.serve(t)
		defer stop()
		s := w.sidecar(t, 0, tunnel.ModeTCP)
		defer s.stop()
		s.up(t)
		began := time.Now()
		no.Store(tunnel.Errorf(tunnel.TokenRejected, "the token has been revoked"))
		for st := range s.states {
			if st.Phase == tunnel.LinkUp {
				continue
			}
			// The word of it and the end of the connection come together.
			if took := time.Since(began); took > 2*time.Second || st.Code != tunnel.TokenRejected || st.Change != nil && !strings.Contains(st.Change.Why, "the token has been revoked") {
				t.Errorf("after %v: %+v, %+v", took, st, st.Change)
			}
			if st.Change != nil {
				break
			}
		}
		if w.mu.Lock(); w.released != 1 {
			t.Errorf("released %d times", w.released)
		}
		w.mu.Unlock()
	})
}
