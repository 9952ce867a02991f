package tunnel_test

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"slices"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"culvert/tunnel"
)

// scripted is a listener that accepts, or fails, as it was told.
type scripted struct {
	script []error // nil: a connection
	tried  []time.Duration
	began  time.Time
	made   net.Conn // the last
	last   func()   // is called at the end of the script; then nothing comes any more
	closed chan struct{}
}

func (s *scripted) Accept() (net.Conn, error) {
	s.tried = append(s.tried, time.Since(s.began))
	if len(s.tried) > len(s.script) {
		s.last()
		<-s.closed
		return nil, net.ErrClosed
	}
	if err := s.script[len(s.tried)-1]; err != nil {
		return nil, err
	}
	var far net.Conn
	s.made, far = net.Pipe()
	far.Close()
	return s.made, nil
}

func (s *scripted) Addr() net.Addr { return &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 443} }
func (s *scripted) Close() error   { close(s.closed); return nil }

func TestAcceptingGoesOnAfterFailuresThatPass(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		l := &scripted{began: time.Now(), closed: make(chan struct{})}
		for range 10 {
			l.script = append(l.script, syscall.EMFILE)
		}
		l.script = append(l.script, nil, syscall.ENOBUFS, nil)
		l.last = func() { cancel(); l.Close() }
		served := 0
		if err := tunnel.AcceptConns(ctx, l, slog.New(slog.DiscardHandler), func(c net.Conn) { served++; c.Close() }); err != nil || served != 2 {
			t.Errorf("%d served, %v", served, err)
		}
		ms := func(all ...time.Duration) (sum []time.Duration) {
			at := time.Duration(0)
			for _, d := range all {
				at += d * time.Millisecond
				sum = append(sum, at)
			}
			return sum
		}
		// A connection between two failures has the pauses begin anew.
		if want := ms(0, 5, 10, 20, 40, 80, 160, 320, 640, 1000, 1000, 0, 5, 0); !slices.Equal(l.tried, want) {
			t.Errorf("it tried at %v\nwant          %v", l.tried, want)
		}
	})
}

func TestAcceptingEndsWithItsContextOrTheListener(t *testing.T) {
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	for name, c := range map[string]struct {
		ctx  context.Context
		what error // of Accept
		code tunnel.Code
	}{
		"the context has ended and a connection came":  {ended, nil, ""},
		"the context has ended and nothing came":       {ended, syscall.EMFILE, ""},
		"the context has ended and the listener too":   {ended, net.ErrClosed, ""},
		"the listener was closed and the context runs": {t.Context(), &net.OpError{Op: "accept", Err: net.ErrClosed}, tunnel.Internal},
	} {
		t.Run(name, func(t *testing.T) {
			l := &scripted{script: []error{c.what}, began: time.Now()}
			err := tunnel.AcceptConns(c.ctx, l, slog.New(slog.DiscardHandler), func(net.Conn) { t.Error("it was served") })
			if tunnel.CodeOf(err) != c.code || err != nil && !errors.Is(err, net.ErrClosed) {
				t.Error(err)
			}
			if l.made != nil {
				if _, err := l.made.Write([]byte{0}); !errors.Is(err, io.ErrClosedPipe) {
					t.Errorf("the connection is open: %v", err)
				}
			}
		})
	}
}
