package tunneltls

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math"
	"net"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/hashicorp/yamux"

	"culvert/tunnel"
)

func carriers(t *testing.T, change func(client, server *Config)) (client, server *carrier) {
	t.Helper()
	cc, sc := both(t)
	if change != nil {
		change(&cc, &sc)
	}
	a, b := meet(t, dialer(t, cc), listen(t, sc))
	return carry(t, a), carry(t, b)
}

// rogue makes a carrier whose peer is yamux as it is, without our rules.
func rogue(t *testing.T) (*carrier, *yamux.Session) {
	t.Helper()
	cc, sc := both(t)
	a, b := meet(t, dialer(t, cc), listen(t, sc))
	conf := yamux.DefaultConfig()
	conf.LogOutput, conf.Logger = nil, &yamuxLog{to: slog.New(slog.DiscardHandler)}
	session, err := yamux.Client(a.(*candidate).link, conf)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { session.Close() })
	return carry(t, b), session
}

func open(t *testing.T, session *yamux.Session) *yamux.Stream {
	t.Helper()
	y, err := session.OpenStream()
	if err != nil {
		t.Fatal(err)
	}
	return y
}

func accept(t *testing.T, c tunnel.Carrier) tunnel.Stream {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	s, err := c.AcceptStream(ctx)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestStreamsLeaveNothingInYamux(t *testing.T) {
	client, server := carriers(t, nil)
	for i := range 200 {
		a, b := join(t, client, server)
		switch i % 5 {
		case 0:
			a.Close()
			b.Close()
		case 1:
			a.Abort(errors.New("no more"))
		case 2:
			b.Write([]byte("unread"))
			a.Close()
			b.Abort(errors.New("no more"))
		case 3:
			a.CloseWrite()
			b.CloseWrite()
			io.Copy(io.Discard, a)
			io.Copy(io.Discard, b) // both have read the end: neither needs Close
		default:
			a.Close()
			a.Abort(errors.New("both"))
			b.Abort(errors.New("at once"))
		}
	}
	soon(t, "no stream is left at either end", func() bool {
		for _, c := range []*carrier{client, server} {
			c.mu.Lock()
			left := len(c.streams) + len(c.early) + c.count()
			c.mu.Unlock()
			if left > 0 {
				return false
			}
		}
		return true
	})
}

func TestAbortTellsItsCode(t *testing.T) {
	client, server := carriers(t, nil)
	a, b := join(t, client, server)
	a.Abort(tunnel.Errorf(tunnel.ConnectionRefused, "nobody there"))
	_, err := b.Read(make([]byte, 1))
	if !errors.Is(err, tunnel.ConnectionRefused) || !errors.Is(err, syscall.ECONNRESET) {
		t.Error(err)
	}
}

func TestStreamsBeyondTheLimitAreRefused(t *testing.T) {
	t.Run("own", func(t *testing.T) {
		client, server := carriers(t, func(c, s *Config) { c.MaxStreams = 3 })
		a, b := join(t, client, server)
		join(t, client, server)
		join(t, server, client)
		if _, err := client.OpenStream(t.Context()); !errors.Is(err, tunnel.LimitExceeded) {
			t.Error(err)
		}
		a.Close()
		b.Close()
		soon(t, "a closed stream makes room", func() bool {
			s, err := client.OpenStream(t.Context())
			if err == nil {
				s.Close()
			}
			return err == nil
		})
	})
	t.Run("the peer's", func(t *testing.T) {
		client, server := carriers(t, func(c, s *Config) { s.MaxStreams = 2 })
		join(t, client, server)
		join(t, client, server)
		for range 50 { // the refusal may come before OpenStream has returned
			s, err := client.OpenStream(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			s.SetDeadline(time.Now().Add(patience))
			if _, err := s.Read(make([]byte, 1)); !errors.Is(err, tunnel.LimitExceeded) {
				t.Fatal(err)
			}
		}
	})
	t.Run("waiting to be accepted", func(t *testing.T) {
		client, server := carriers(t, nil)
		for range backlog {
			if _, err := client.OpenStream(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
		s, err := client.OpenStream(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		s.SetDeadline(time.Now().Add(patience))
		if _, err := s.Read(make([]byte, 1)); !errors.Is(err, tunnel.LimitExceeded) {
			t.Error(err)
		}
		for range backlog {
			accept(t, server)
		}
	})
}

func TestPeersThatBreakTheRules(t *testing.T) {
	ends := func(t *testing.T, c *carrier, code tunnel.Code) {
		t.Helper()
		receive(t, "the carrier's end", c.Done())
		if !errors.Is(c.Err(), code) {
			t.Error(c.Err())
		}
	}
	t.Run("garbage on the control stream", func(t *testing.T) {
		c, peer := rogue(t)
		open(t, peer).Write(make([]byte, 100))
		ends(t, c, tunnel.Internal)
	})
	t.Run("ends of streams that were never opened", func(t *testing.T) {
		c, peer := rogue(t)
		control := open(t, peer)
		for id := uint32(3); id < 3+8*backlog; id += 2 {
			if _, err := control.Write(message{what: saysFinish, stream: id}.append(nil)); err != nil {
				break
			}
		}
		ends(t, c, tunnel.Internal)
	})
	t.Run("more streams than allowed, never closed", func(t *testing.T) {
		c, peer := rogue(t)
		for {
			if _, err := peer.OpenStream(); err != nil {
				break
			}
		}
		ends(t, c, tunnel.LimitExceeded)
	})
	t.Run("a stream that yamux closes without a word", func(t *testing.T) {
		c, peer := rogue(t)
		open(t, peer)
		y := open(t, peer)
		y.Write([]byte("x"))
		y.Close()
		s := accept(t, c)
		if n, err := io.Copy(io.Discard, s); n != 1 || !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("read %d bytes, %v; want one byte and no regular end", n, err)
		}
	})
	t.Run("more bytes than announced", func(t *testing.T) {
		c, peer := rogue(t)
		control, y := open(t, peer), open(t, peer)
		y.Write([]byte("12345"))
		control.Write(message{what: saysFinish, stream: y.StreamID(), total: 3}.append(nil))
		s := accept(t, c)
		soon(t, "the end is known", func() bool {
			s.(*stream).mu.Lock()
			defer s.(*stream).mu.Unlock()
			return s.(*stream).heard != saysNothing
		})
		if got, err := io.ReadAll(s); string(got) != "123" || err != nil {
			t.Errorf("read %q, %v", got, err)
		}
	})
	t.Run("fewer bytes than announced", func(t *testing.T) {
		c, peer := rogue(t)
		control, y := open(t, peer), open(t, peer)
		y.Write([]byte("12345"))
		control.Write(message{what: saysFinish, stream: y.StreamID(), total: math.MaxUint64}.append(nil))
		y.Close()
		s := accept(t, c)
		if got, err := io.ReadAll(s); string(got) != "12345" || !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("read %q, %v", got, err)
		}
	})
}

// stalled makes a carrier whose peer never reads its TCP connection, with
// writers that have filled it.
func stalled(t *testing.T, change func(*Config)) (*carrier, chan error) {
	t.Helper()
	cc, sc := both(t)
	change(&sc)
	a, b := meet(t, dialer(t, cc), listen(t, sc))
	t.Cleanup(func() { a.Close() })
	c := carry(t, b)
	close(c.ready) // the peer will never open the control stream
	ended := make(chan error, 10)
	var taken atomic.Int64
	for range cap(ended) / 2 {
		go func() {
			s, err := c.OpenStream(context.Background())
			for err == nil {
				var n int
				n, err = s.Write(make([]byte, 64<<10))
				taken.Add(int64(n))
			}
			ended <- err
		}()
	}
	return c, ended
}

// fill fills TCP. The peer grants no window beyond the first 256 KiB for each
// stream, so it takes many of them: together more than what kernels let a
// receive and a send buffer grow to.
func fill(c *carrier) {
	for range 400 {
		go func() {
			s, err := c.OpenStream(context.Background())
			if err == nil {
				s.Write(make([]byte, 256<<10))
			}
		}()
	}
}

func TestStalledTCPEndsACarrier(t *testing.T) {
	c, ended := stalled(t, func(c *Config) {
		c.WriteTimeout = 300 * time.Millisecond
		c.Window = 16 << 20
	})
	fill(c)
	receive(t, "the carrier's end", c.Done())
	if !errors.Is(c.Err(), tunnel.CloudUnreachable) {
		t.Error(c.Err())
	}
	for range cap(ended) / 2 {
		if err := receive(t, "a writer's end", ended); err == nil {
			t.Error("a Write went on")
		}
	}
	closes(t, c)
}

// closes sees to it that Close returns.
func closes(t *testing.T, c *carrier) {
	t.Helper()
	closed := make(chan struct{})
	go func() {
		c.Close(nil)
		close(closed)
	}()
	receive(t, "Close returns", closed)
}

func TestCloseIsBoundedWhileTCPIsStalled(t *testing.T) {
	c, ended := stalled(t, func(c *Config) { c.WriteTimeout = 60 * patience })
	fill(c)
	// One frame is enough: it also holds up the frames that open streams. What
	// TCP still takes, it takes in less than this.
	since := time.Now()
	soon(t, "a frame is stuck", func() bool {
		if len(c.slots) == 0 {
			since = time.Now()
		}
		return time.Since(since) > 700*time.Millisecond
	})
	closes(t, c)
	for range cap(ended) / 2 {
		receive(t, "a writer's end", ended)
	}
}

func TestWriteDeadlineHoldsWhileOthersStallTCP(t *testing.T) {
	client, server := carriers(t, nil)
	a, _ := join(t, client, server)
	for range cap(client.slots) { // as frames hold them that TCP does not take
		client.slots <- struct{}{}
	}
	done := make(chan error, 1)
	a.SetWriteDeadline(time.Now().Add(30 * time.Millisecond))
	go func() {
		_, err := a.Write([]byte("x"))
		done <- err
	}()
	var n net.Error
	if err := receive(t, "the deadline", done); !errors.As(err, &n) || !n.Timeout() {
		t.Error(err)
	}
	go func() {
		a.SetWriteDeadline(time.Time{})
		_, err := a.Write([]byte("x"))
		done <- err
	}()
	a.Close()
	if err := receive(t, "Close ends the Write", done); err == nil {
		t.Error("Write went on after Close")
	}
}

func TestSilentPeerIsNoticed(t *testing.T) {
	cc, sc := both(t)
	sc.KeepAlive, sc.WriteTimeout = 20*time.Millisecond, 50*time.Millisecond
	a, b := meet(t, dialer(t, cc), listen(t, sc))
	t.Cleanup(func() { a.Close() })
	c := carry(t, b) // the peer never begins
	receive(t, "the carrier's end", c.Done())
	if !errors.Is(c.Err(), tunnel.CloudUnreachable) {
		t.Error(c.Err())
	}
}

func TestIdleCarrierIsKeptAlive(t *testing.T) {
	client, server := carriers(t, func(c, s *Config) {
		c.KeepAlive, s.KeepAlive = 5*time.Millisecond, 5*time.Millisecond
		c.WriteTimeout, s.WriteTimeout = patience, patience // for an answer
	})
	before := client.frames.heard.Load()
	soon(t, "twenty pings have been answered", func() bool { return client.frames.heard.Load() > before+20*yamuxHeader })
	if client.Err() != nil || server.Err() != nil {
		t.Error(client.Err(), server.Err())
	}
}

// counted counts what leaves in one system call.
type counted struct {
	net.Conn
	writes atomic.Int64
}

func (c *counted) Write(p []byte) (int, error) {
	c.writes.Add(1)
	return c.Conn.Write(p)
}

func TestAFrameIsOneWriteToTCP(t *testing.T) {
	for _, size := range []int{1, 200, smallFrame, 4 * largeFrame} {
		var tcp *counted
		client, server := carriers(t, func(c, s *Config) {
			c.Dial = func(ctx context.Context, network, address string) (net.Conn, error) {
				conn, err := new(net.Dialer).DialContext(ctx, network, address)
				tcp = &counted{Conn: conn}
				return tcp, err
			}
		})
		client.frame.Store(largeFrame)
		a, b := join(t, client, server)
		p := make([]byte, size)
		// A busy machine makes some frames small, and what the opening says is
		// written too: so only some message must be as it should.
		want := int64(max(1, size/largeFrame))
		soon(t, fmt.Sprintf("a message of %d bytes makes %d writes", size, want), func() bool {
			before := tcp.writes.Load()
			if _, err := a.Write(p); err != nil {
				t.Fatal(err)
			}
			if _, err := io.ReadFull(b, p); err != nil {
				t.Fatal(err)
			}
			return tcp.writes.Load()-before == want
		})
	}
}

func TestCarrierStatsKnowTheRoundTrip(t *testing.T) {
	client, server := carriers(t, nil)
	join(t, client, server)
	if s := client.Stats(); s.Kind != "tls" || s.RTT < 0 || s.RTT > patience || s.Remote.Port() == 0 {
		t.Errorf("%+v", s)
	}
}
