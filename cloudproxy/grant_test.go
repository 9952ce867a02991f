package cloudproxy_test

import (
	"bytes"
	"context"
	"encoding/json"
	"log/slog"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
	"unicode/utf8"

	"culvert/cloudproxy"
	"culvert/tunnel"
	"culvert/tunnel/wire"
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
		synctest.Wait()
		if w.mu.Lock(); w.released != 1 {
			t.Errorf("released %d times", w.released)
		}
		w.mu.Unlock()
	})
}

// What somebody says of itself before it is admitted stands in one line of the
// log, and a short one.
func TestWhatARefusedPeerSaysOfItselfIsOneShortLineOfTheLog(t *testing.T) {
	for name, app := range map[string]string{
		"line breaks":  "a\r\nlevel=ERROR msg=forged",
		"escape codes": "\x1b[2J\x1b]0;owned\a",
		"ten KB":       strings.Repeat("x", 10_000),
		"wide":         strings.Repeat("\u202e", 3_000),
		"not UTF-8":    "a\xff\xfe\x00b",
		"quotes":       `" app="other`,
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var text, lines bytes.Buffer
				w := newWorld()
				w.authorize = func(_ context.Context, o tunnel.Open) (cloudproxy.Grant, error) {
					return cloudproxy.Grant{}, tunnel.Errorf(tunnel.TokenRejected, "the token is for another App ID than %.128q; use the token of this App ID", o.App)
				}
				for _, h := range []slog.Handler{slog.NewJSONHandler(&lines, nil), slog.NewTextHandler(&text, nil)} {
					w.log = slog.New(h)
					stop := w.serve(t)
					c, err := w.tcp.Dialer(key(0)).Dial(t.Context(), address)
					if err != nil {
						t.Fatal(err)
					}
					wire.Write(c, wire.Message{Open: &wire.Open{Version: wire.Current, App: app, Token: "secret"}})
					if m, err := wire.Read(c, wire.Version{}); err != nil || m.Refused == nil {
						t.Fatalf("%+v, %v", m, err)
					}
					c.Close()
					stop()
				}
				var l struct{ Audit, App, Code, Why string }
				if err := json.Unmarshal(lines.Bytes(), &l); err != nil || l.Audit != "session_refused" || l.Code != string(tunnel.TokenRejected) {
					t.Errorf("%v: %s", err, lines.String())
				}
				for _, b := range []string{lines.String(), text.String()} {
					if strings.Count(b, "\n") != 1 || len(b) > 1024 || strings.ContainsAny(b, "\r\x1b\a\x00") || !utf8.ValidString(b) || strings.Contains(b, "secret") {
						t.Errorf("%d bytes: %q", len(b), b)
					}
				}
			})
		})
	}
}
