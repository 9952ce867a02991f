package tunnel_test

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"slices"
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
					if network != "tcp" || address != "192.0.2.1:443" {
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
				}, nil)
				ctx, cancel := context.WithTimeout(t.Context(), c.within)
				defer cancel()
				began := time.Now()
				conn, err := dial(ctx, "tcp", "192.0.2.1:443")
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

// answers is a Resolver that knows every name.
type answers []string

func (a answers) LookupNetIP(_ context.Context, network, _ string) (all []netip.Addr, err error) {
	if len(a) == 0 {
		return nil, &net.DNSError{Err: "no such host", IsNotFound: true}
	}
	for _, s := range a {
		all = append(all, netip.MustParseAddr(s))
	}
	return all, nil
}

func TestAddressesTakeTheFamiliesInTurn(t *testing.T) {
	for name, c := range map[string]struct{ found, want []string }{
		"one":            {answers{"192.0.2.1"}, answers{"192.0.2.1"}},
		"of both":        {answers{"2001:db8::1", "2001:db8::2", "192.0.2.1", "192.0.2.2"}, answers{"2001:db8::1", "192.0.2.1", "2001:db8::2", "192.0.2.2"}},
		"more of one":    {answers{"192.0.2.1", "192.0.2.2", "2001:db8::1", "192.0.2.3"}, answers{"192.0.2.1", "2001:db8::1", "192.0.2.2", "192.0.2.3"}},
		"in a long form": {answers{"::ffff:192.0.2.1", "2001:db8::1"}, answers{"192.0.2.1", "2001:db8::1"}},
		"too many": {answers{"192.0.2.1", "192.0.2.2", "192.0.2.3", "192.0.2.4", "192.0.2.5", "192.0.2.6", "192.0.2.7", "2001:db8::1"},
			answers{"192.0.2.1", "2001:db8::1", "192.0.2.2", "192.0.2.3", "192.0.2.4", "192.0.2.5"}},
	} {
		got, err := tunnel.Addresses(t.Context(), answers(c.found), "cloud.example.net")
		want, _ := answers(c.want).LookupNetIP(t.Context(), "", "")
		if err != nil || !slices.Equal(got, want) {
			t.Errorf("%s: %v, %v; want %v", name, got, err, want)
		}
	}
}

// An address that does not answer, or refuses, takes no time that another needs.
func TestDialingTriesOneAddressAfterTheOther(t *testing.T) {
	const ms = time.Millisecond
	refused, down := errors.New("refused"), errors.New("down")
	there := answers{"192.0.2.1", "192.0.2.2", "192.0.2.3"}
	type how struct {
		after time.Duration // 0: never
		err   error
	}
	for name, c := range map[string]struct {
		to    map[string]how
		took  time.Duration
		tried string
		err   error
	}{
		"the first answers":          {map[string]how{"192.0.2.1": {40 * ms, nil}}, 40 * ms, "1", nil},
		"the first does not":         {map[string]how{"192.0.2.2": {40 * ms, nil}}, 290 * ms, "12", nil},
		"the first refuses":          {map[string]how{"192.0.2.1": {40 * ms, refused}, "192.0.2.2": {40 * ms, nil}}, 80 * ms, "12", nil},
		"only the last answers":      {map[string]how{"192.0.2.3": {40 * ms, nil}}, 540 * ms, "123", nil},
		"the last, a packet is lost": {map[string]how{"192.0.2.1": {40 * ms, refused}, "192.0.2.2": {40 * ms, down}}, time.Second, "1233", context.DeadlineExceeded},
		"all refuse":                 {map[string]how{"192.0.2.1": {40 * ms, refused}, "192.0.2.2": {40 * ms, down}, "192.0.2.3": {40 * ms, down}}, 120 * ms, "123", refused},
		"nobody answers":             {nil, time.Second, "1231", context.DeadlineExceeded},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var mu sync.Mutex
				tried := ""
				dial := tunnel.DialAgain(func(ctx context.Context, _, address string) (net.Conn, error) {
					host, port, _ := net.SplitHostPort(address)
					mu.Lock()
					tried += host[len(host)-1:]
					mu.Unlock()
					a := c.to[host]
					if a.after == 0 || port != "443" {
						<-ctx.Done()
						return nil, ctx.Err()
					}
					time.Sleep(a.after)
					if a.err != nil {
						return nil, a.err
					}
					return &closing{closed: func(*closing) {}}, nil
				}, there)
				ctx, cancel := context.WithTimeout(t.Context(), time.Second)
				defer cancel()
				began := time.Now()
				conn, err := dial(ctx, "tcp", "cloud.example.net:443")
				if took := time.Since(began); took != c.took || (conn == nil) != (c.err != nil) {
					t.Errorf("%v, %v after %v", conn, err, took)
				}
				if c.err == refused && err != refused || c.err == context.DeadlineExceeded && err == nil {
					t.Errorf("error %v", err)
				}
				synctest.Wait()
				mu.Lock()
				defer mu.Unlock()
				if tried != c.tried {
					t.Errorf("tried %s, want %s", tried, c.tried)
				}
			})
		})
	}
	_, err := tunnel.DialAgain(nil, answers{})(t.Context(), "tcp", "no.example:443")
	if _, ok := errors.AsType[*net.DNSError](err); !ok {
		t.Errorf("a name that there is not: %v", err)
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
