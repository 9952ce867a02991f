package tunnel_test

import (
	"context"
	"errors"
	"net"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"culvert/tunnel"
)

func TestDialingAgainTakesTheFirstAnswer(t *testing.T) {
	const ms = time.Millisecond
	refused := errors.New("refused")
	type attempt struct {
		after time.Duration // of the attempt; 0: it is never answered
		err   error
	}
	for name, c := range map[string]struct {
		attempts []attempt
		within   time.Duration // the caller's patience
		took     time.Duration
		tried    int
		err      error
	}{
		"at once":                          {[]attempt{{40 * ms, nil}}, time.Second, 40 * ms, 1, nil},
		"refused at once":                  {[]attempt{{40 * ms, refused}}, time.Second, 40 * ms, 1, refused},
		"the first packet is lost":         {[]attempt{{}, {40 * ms, nil}}, time.Second, 290 * ms, 2, nil},
		"a way longer than the pause":      {[]attempt{{600 * ms, nil}, {600 * ms, nil}, {600 * ms, nil}}, time.Second, 600 * ms, 3, nil},
		"the link comes back":              {[]attempt{{}, {}, {}, {40 * ms, nil}}, time.Second, 790 * ms, 4, nil},
		"the first packet, repeated later": {[]attempt{{1040 * ms, nil}, {}, {}, {}}, 5 * time.Second, 1040 * ms, 4, nil},
		"nobody answers":                   {[]attempt{{}, {}, {}, {}}, 5 * time.Second, 5 * time.Second, 4, context.DeadlineExceeded},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var mu sync.Mutex // guards the two below
				tried, open := 0, map[*closing]bool{}
				dial := tunnel.DialAgain(func(ctx context.Context, network, address string) (net.Conn, error) {
					if network != "tcp" || address != "there:443" {
						t.Errorf("dials %s %s", network, address)
					}
					mu.Lock()
					a := c.attempts[tried]
					tried++
					mu.Unlock()
					if a.after == 0 {
						<-ctx.Done()
						return nil, ctx.Err()
					}
					// Like a connection that comes although nobody waits any more.
					time.Sleep(a.after)
					if a.err != nil {
						return nil, a.err
					}
					mu.Lock()
					defer mu.Unlock()
					conn := &closing{closed: func(c *closing) {
						mu.Lock()
						defer mu.Unlock()
						delete(open, c)
					}}
					open[conn] = true
					return conn, nil
				})
				ctx, cancel := context.WithTimeout(t.Context(), c.within)
				defer cancel()
				began := time.Now()
				conn, err := dial(ctx, "tcp", "there:443")
				if took := time.Since(began); took != c.took || !errors.Is(err, c.err) || (conn == nil) != (c.err != nil) {
					t.Errorf("%v, %v after %v", conn, err, took)
				}
				time.Sleep(5 * time.Second)
				mu.Lock()
				defer mu.Unlock()
				if tried != c.tried {
					t.Errorf("%d attempts, want %d", tried, c.tried)
				}
				if c.err == nil && (len(open) != 1 || !open[conn.(*closing)]) || c.err != nil && len(open) != 0 {
					t.Errorf("%d connections stay open", len(open))
				}
			})
		})
	}
}

type closing struct {
	net.Conn
	closed func(*closing)
}

func (c *closing) Close() error {
	c.closed(c)
	return nil
}
