package sidecar

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"net"
	"testing"
	"time"

	"culvert/tunnel"
)

func TestClientThatLeavesCancelsItsDial(t *testing.T) {
	for name, tc := range map[string]struct {
		leave  func(*net.TCPConn)
		cancel bool
	}{
		"close":      {func(c *net.TCPConn) { c.Close() }, true},
		"reset":      {func(c *net.TCPConn) { c.SetLinger(0); c.Close() }, true},
		"half-close": {func(c *net.TCPConn) { c.CloseWrite() }, false},
		"data":       {func(c *net.TCPConn) { c.Write([]byte("early")) }, false},
		"half-close, then close": {func(c *net.TCPConn) {
			c.CloseWrite()
			time.AfterFunc(2*orphanPause, func() { c.Close() })
		}, true},
	} {
		t.Run(name, func(t *testing.T) {
			asked, finish := make(chan struct{}), make(chan struct{})
			ended := make(chan error, 1)
			next := &frontDirect{open: func(ctx context.Context, _ tunnel.Target) (tunnel.Stream, error) {
				close(asked)
				select {
				case <-ctx.Done():
				case <-finish:
				}
				ended <- ctx.Err()
				return nil, cmp.Or(ctx.Err(), error(tunnel.TimedOut))
			}}
			f := frontStart(t, next, nil)
			c := frontDial(t, f)
			c.Write(append(bytes.Clone(frontGreet), frontRequestBytes(1, tunnel.Target{Host: "a.example", Port: 1})...))
			<-asked
			tc.leave(c)
			if tc.cancel {
				select {
				case err := <-ended:
					if !errors.Is(err, context.Canceled) {
						t.Fatalf("ended with %v", err)
					}
				case <-time.After(frontPatience):
					close(finish)
					t.Fatal("the dial went on")
				}
				frontEventually(t, "the refusal is counted", func() bool { return f.Stats().Refused["client_left"] == 1 })
				return
			}
			select {
			case <-ended:
				t.Fatal("the dial was cancelled")
			case <-time.After(2 * orphanPause): // nothing is to happen
			}
			close(finish)
			if got := frontRead(t, c, 12); got[3] != socksHostUnreachable {
				t.Fatalf("reply %x", got)
			}
		})
	}
}
