package cloudproxy

import (
	"context"
	"io"
	"net"
	"net/netip"
	"os"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"culvert/tunnel"
	"culvert/tunnel/tunneltest"
)

func TestASourceThatIsRefusedAgainAndAgainIsNotHeardForAWhile(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var s strikes
		bad, good := netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("192.0.2.2")
		for range strikeBurst {
			if err := s.out(bad); err != nil {
				t.Fatal(err)
			}
			s.add(bad, 1)
		}
		if err := s.out(bad); tunnel.CodeOf(err) != tunnel.LimitExceeded {
			t.Errorf("after %d failures: %v", strikeBurst, err)
		}
		if err := s.out(good); err != nil {
			t.Errorf("another source: %v", err)
		}
		time.Sleep(2 * time.Second)
		if err := s.out(bad); err != nil {
			t.Errorf("two seconds later: %v", err)
		}
		local := netip.MustParseAddr("::ffff:127.0.0.1")
		if s.add(local, 2*strikeBurst); s.out(local) != nil {
			t.Error("what comes by a reverse proxy on this host is one source")
		}
		for n := range 3 * maxStrikers {
			s.add(netip.AddrFrom4([4]byte{10, byte(n >> 16), byte(n >> 8), byte(n)}), 1)
		}
		if len(s.by) > maxStrikers {
			t.Errorf("%d sources are remembered", len(s.by))
		}
	})
}

func TestOnlyWhatSomebodyGuessesCountsAsAFailure(t *testing.T) {
	for code, want := range map[tunnel.Code]int{
		tunnel.TokenRejected: 1, tunnel.NotPermitted: 1, tunnel.Internal: 1,
		tunnel.TokenExpired: 0, tunnel.QuotaExceeded: 0, tunnel.SessionUnknown: 0, tunnel.LimitExceeded: 0, tunnel.CloudUnreachable: 0,
	} {
		if got := strikesFor(tunnel.Errorf(code, "because")); got != want {
			t.Errorf("%s: %d", code, got)
		}
	}
	for _, gone := range []error{io.EOF, io.ErrUnexpectedEOF, net.ErrClosed, syscall.ECONNRESET, os.ErrDeadlineExceeded} {
		if got := strikesFor(gone); got != 0 {
			t.Errorf("%v: %d", gone, got)
		}
	}
}

type counting struct{ n int }

func (c *counting) Deliver(p []byte, _ netip.AddrPort) { c.n += len(p) }
func (c *counting) Unreachable(netip.AddrPort, error)  {}
func (c *counting) Closed(error)                       {}

func TestAThrottleKeepsToItsRate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const rate, seconds = 400_000, 10
		th := newThrottle(&tunneltest.Echo{}, rate)
		to := tunnel.TargetOf(netip.MustParseAddrPort("192.0.2.1:9"))
		in := &counting{}
		p, err := th.OpenPackets(tunnel.Peer{}, in)
		if err != nil {
			t.Fatal(err)
		}
		sent := 0
		for range seconds * 1000 { // 1 MB/s
			if err := p.Send(make([]byte, 1000), to); err != nil {
				t.Fatal(err)
			}
			sent += 1000
			time.Sleep(time.Millisecond)
		}
		synctest.Wait()
		if in.n < rate*seconds*9/10 || in.n > rate*seconds+2*rate || th.dropped.Load() == 0 {
			t.Errorf("%d of %d bytes came back in %d s, %d datagrams were dropped", in.n, sent, seconds, th.dropped.Load())
		}
		p.Close()

		s, err := th.OpenStream(t.Context(), tunnel.Peer{}, to)
		if err != nil {
			t.Fatal(err)
		}
		const size = 2_000_000
		go func() {
			s.Write(make([]byte, size))
			s.CloseWrite()
		}()
		began := time.Now()
		n, err := io.Copy(io.Discard, s)
		if took := time.Since(began); n != size || err != nil || took < 4*time.Second || took > 6*time.Second {
			t.Errorf("%d bytes in %v, %v; want 5 s", n, took, err)
		}
		s.Close()

		// The end of a stream ends its waiting.
		s, err = th.OpenStream(t.Context(), tunnel.Peer{}, to)
		if err != nil {
			t.Fatal(err)
		}
		done := make(chan struct{})
		go func() {
			defer close(done)
			s.Write(make([]byte, 100*size))
		}()
		time.Sleep(time.Second)
		began = time.Now()
		s.Abort(context.Canceled)
		<-done
		if took := time.Since(began); took > time.Second {
			t.Errorf("an aborted stream waited for %v", took)
		}
	})
}
