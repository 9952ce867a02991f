package uplink

import (
	"context"
	"io"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"culvert/tunnel"
	"culvert/tunnel/session"
	"culvert/tunnel/tunneltest"
	"culvert/tunnel/wire"
)

// sessionAt waits until the nth session has been opened, from 1.
func (f *far) sessionAt(n int) *session.Far {
	f.t.Helper()
	for range 100_000 {
		f.mu.Lock()
		if len(f.sessions) >= n {
			defer f.mu.Unlock()
			return f.sessions[n-1]
		}
		f.mu.Unlock()
		time.Sleep(time.Millisecond)
	}
	f.t.Fatalf("no session %d after 100 s", n)
	return nil
}

func both(c *Config) { c.Proxies = []string{first, second} }

func TestACallMovesBeforeItsCloudProxyGoes(t *testing.T) {
	for _, mode := range []tunnel.Mode{tunnel.ModeAuto, tunnel.ModeTCP} {
		t.Run(string(mode), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := newFar(t, first, second)
				defer f.end()
				f.real(0)
				r := f.run(mode, both)
				r.up()
				ctx, cancel := context.WithCancel(context.Background())
				ended := r.call(ctx)
				stream, err := r.OpenStream(ctx, tunnel.Peer{}, mediaAt)
				if err != nil {
					t.Fatal(err)
				}
				time.Sleep(3 * time.Second)
				old := f.sessionAt(1)
				old.Drain(30 * time.Second)
				c := r.told(tunnel.ChangedCloudProxy, tunnel.CloudProxyGone)
				if c.From != first || c.To != second || !strings.Contains(c.Why, "1 associations go on with new ports") {
					t.Errorf("told: %v", c)
				}
				if c.Gap > 200*time.Millisecond || c.Lost > 0 {
					t.Errorf("it cost %s", c.Cost())
				}
				time.Sleep(lateFor)
				// What was open goes on where it is, what is new goes to the next.
				echo(t, stream)
				if n := old.Live(); n != 1 {
					t.Errorf("the cloud proxy that goes has %d associations and streams, want the stream", n)
				}
				other, err := r.OpenStream(ctx, tunnel.Peer{}, mediaAt)
				if err != nil {
					t.Fatal(err)
				}
				echo(t, other)
				if n := f.sessionAt(2).Live(); n != 2 {
					t.Errorf("the next cloud proxy has %d associations and streams, want one of each", n)
				}
				stream.Close()
				time.Sleep(5 * time.Second)
				select {
				case <-old.Done():
				default:
					t.Error("the session at the cloud proxy that goes has not ended when nothing was open in it")
				}
				other.Close()
				cancel()
				<-ended
				if err := r.stop(); err != nil {
					t.Error(err)
				}
			})
		})
	}
}

func echo(t *testing.T, s tunnel.Stream) {
	t.Helper()
	s.SetDeadline(time.Now().Add(10 * time.Second))
	var b [5]byte
	if _, err := s.Write([]byte("hello")); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(s, b[:]); err != nil || string(b[:]) != "hello" {
		t.Fatalf("%q came back (%v)", b, err)
	}
}

func TestAStreamThatCanNotMoveEndsWithItsCloudProxyByName(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFar(t, first, second)
		defer f.end()
		f.real(0)
		r := f.run(tunnel.ModeAuto, both)
		r.up()
		stream, err := r.OpenStream(context.Background(), tunnel.Peer{}, mediaAt)
		if err != nil {
			t.Fatal(err)
		}
		f.sessionAt(1).Drain(time.Second)
		f.sessionAt(2)
		time.Sleep(time.Second)
		f.sessionAt(1).Close(tunnel.Errorf(tunnel.CloudUnreachable, "the cloud proxy has stopped"))
		stream.SetDeadline(time.Now().Add(10 * time.Second))
		if _, err := stream.Read(make([]byte, 1)); err == nil || err == io.EOF || tunnel.CodeOf(err) == tunnel.TimedOut {
			t.Errorf("the stream ends with %v, want a reset with its reason", err)
		}
		stream.Close()
		r.stop()
	})
}

func TestWithoutAnotherCloudProxyACallStaysToTheEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFar(t, first)
		defer f.end()
		f.real(0)
		r := f.run(tunnel.ModeAuto, nil)
		r.up()
		ctx, cancel := context.WithCancel(context.Background())
		ended := r.call(ctx)
		time.Sleep(time.Second)
		f.sessionAt(1).Drain(30 * time.Second)
		time.Sleep(20 * time.Second)
		if n := len(r.changes()); n != 0 {
			t.Errorf("changes: %v", r.changes())
		}
		cancel()
		<-ended
		r.stop()
	})
}

func TestTheNextCloudProxyIsUsedWhenOneIsDead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFar(t, first, second)
		defer f.end()
		f.real(0)
		dead := false
		r := f.run(tunnel.ModeAuto, both)
		r.up()
		ctx, cancel := context.WithCancel(context.Background())
		ended := r.call(ctx)
		time.Sleep(3 * time.Second)
		f.dialNow(func(ctx context.Context, _, address string, _ int) error {
			if dead && address == first {
				return silent(ctx)
			}
			return nil
		})
		dead = true
		f.nets["quic"].Cut()
		f.nets["tls"].Cut()
		began := time.Now()
		c := r.told(tunnel.ChangedCloudProxy, tunnel.CloudProxyGone)
		if took := time.Since(began); c.To != second || took > lonely+2*time.Second {
			t.Errorf("after %v told: %v", took, c)
		}
		if c := r.toldTo(tunnel.ChangedSession, "", "*", tunnel.CloudUnreachable); c.Gap == 0 || !strings.Contains(c.Why, "1 associations go on with new ports") {
			t.Errorf("told: %v", c)
		}
		cancel()
		<-ended
		r.stop()
	})
}

func TestACloudProxyThatIsSilentIsLeftForTheNext(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var dead atomic.Bool
		drop := func(bool, []byte) tunneltest.Fate {
			return tunneltest.Fate{Delay: 20 * time.Millisecond, Drop: dead.Load()}
		}
		f := newFarOn(t, tunneltest.Config{Flow: true, Packet: drop, Datagram: drop}, first, second)
		defer f.end()
		f.real(0)
		r := f.run(tunnel.ModeUDP, both) // whose connection lives on
		r.up()
		r.by(wire.WaySealed)
		ctx, cancel := context.WithCancel(context.Background())
		ended := r.call(ctx)
		time.Sleep(3 * time.Second)
		// A short silence is none.
		dead.Store(true)
		time.Sleep(1500 * time.Millisecond)
		dead.Store(false)
		time.Sleep(3 * time.Second)
		if n := len(f.askedFor()); n != 1 {
			t.Fatalf("asked for %v", f.askedFor())
		}
		dead.Store(true)
		began := time.Now()
		f.sessionAt(2)
		if took := time.Since(began); took > silentFor+time.Second {
			t.Errorf("the next was asked after %v", took)
		}
		dead.Store(false)
		if c := r.told(tunnel.ChangedCloudProxy, tunnel.CloudProxyGone); c.To != second || !strings.Contains(c.Why, "nothing came from it") {
			t.Errorf("told: %v", c)
		}
		cancel()
		<-ended
		r.stop()
	})
}

func TestAnIdleSidecarGoesBackToTheCloudProxyThatItPrefers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFar(t, first, second)
		defer f.end()
		f.real(0)
		var away atomic.Bool
		away.Store(true)
		f.dial = func(ctx context.Context, _, address string, _ int) error {
			if away.Load() && address == first {
				return silent(ctx)
			}
			return nil
		}
		r := f.run(tunnel.ModeAuto, both)
		r.up()
		ctx, cancel := context.WithCancel(context.Background())
		ended := r.call(ctx)
		away.Store(false)
		time.Sleep(5 * time.Minute)
		if n := len(r.changes()); n != 0 {
			t.Errorf("during a call it moved: %v", r.changes())
		}
		cancel()
		<-ended
		if c := r.told(tunnel.ChangedCloudProxy, tunnel.CloudProxyGone); c.To != first {
			t.Errorf("told: %v", c)
		}
		r.stop()
	})
}

func TestWhatCloudProxiesTellOfOthersIsBelievedWithinReason(t *testing.T) {
	for name, c := range map[string]struct {
		told []tunnel.ProxyAddr
		want []string
	}{
		"another":              {[]tunnel.ProxyAddr{{Address: second}}, []string{first, second}},
		"itself":               {[]tunnel.ProxyAddr{{Address: first}}, []string{first}},
		"one twice":            {[]tunnel.ProxyAddr{{Address: second}, {Address: second}}, []string{first, second}},
		"loopback":             {[]tunnel.ProxyAddr{{Address: "127.0.0.1:443"}, {Address: "[::1]:443"}, {Address: "localhost:443"}, {Address: "[::ffff:127.0.0.1]:443"}}, []string{first}},
		"loopback by name":     {[]tunnel.ProxyAddr{{Address: "LocalHost:443"}, {Address: "localhost.:443"}, {Address: "a.localhost:443"}}, []string{first}},
		"unspecified":          {[]tunnel.ProxyAddr{{Address: "0.0.0.0:443"}}, []string{first}},
		"the link":             {[]tunnel.ProxyAddr{{Address: "169.254.169.254:443"}}, []string{first}},
		"everybody":            {[]tunnel.ProxyAddr{{Address: "224.0.0.1:443"}}, []string{first}},
		"no address":           {[]tunnel.ProxyAddr{{Address: "x"}, {Address: ""}}, []string{first}},
		"one that has expired": {[]tunnel.ProxyAddr{{Address: second, Expires: time.Unix(1, 0)}}, []string{first}},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := newFar(t, first)
				defer f.end()
				f.answer = func(_, _ string, m wire.Message) *wire.Message {
					w := welcome(m)
					w.Welcome.Proxies = c.told
					return w
				}
				r := f.run(tunnel.ModeAuto, nil)
				r.up()
				if got := r.candidates(""); strings.Join(got, " ") != strings.Join(c.want, " ") {
					t.Errorf("it would try %v, want %v", got, c.want)
				}
				r.stop()
			})
		})
	}
}

func TestARedirectToThisMachineIsRefused(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFar(t, first)
		defer f.end()
		f.answer = func(string, string, wire.Message) *wire.Message { return redirect("127.0.0.1:443") }
		r := f.run(tunnel.ModeAuto, nil)
		if s := r.failed(1); s.Code != tunnel.NotPermitted || !strings.Contains(s.Why, "an address of this machine") {
			t.Errorf("%+v", s)
		}
		r.stop()
	})
}
