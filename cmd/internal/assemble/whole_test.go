package assemble_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"

	"culvert/cmd/internal/assemble"
	"culvert/cmd/internal/cmdtest"
	"culvert/cmd/internal/config"
	"culvert/sidecar"
	"culvert/sidecar/control"
	"culvert/tunnel"
	"culvert/tunnel/session"
)

func TestAssociationOutlivesARestartOfTheCloudProxy(t *testing.T) {
	for _, mode := range bothCarriers {
		t.Run(string(mode), func(t *testing.T) {
			far := newEcho(t)
			s := newSite(t)
			_, stop := s.cloud(t)
			sc := s.sidecar(t, mode)
			a := associate(t, sc.Front.Addr())
			eventually(t, "the first echo", func() bool { return a.echoes(t, "before", far.addr) })
			before := far.sources()
			session := sc.Switch.Status().Link.Session
			stop()
			cloud, _ := s.cloud(t)
			eventually(t, "an echo on the same association after the restart", func() bool { return a.echoes(t, "after", far.addr) })
			if st := sc.Switch.Status(); st.State != sidecar.Running || st.Link.Session == session || sc.Link.Stats().Connects != 2 || cloud.Sessions() != 1 {
				t.Errorf("switch %+v, %d connects, %d sessions", st, sc.Link.Stats().Connects, cloud.Sessions())
			}
			if after := far.sources(); len(before) != 1 || len(after) != 2 {
				t.Errorf("the far end saw %v before and %v after, want one port of the cloud proxy more", before, after)
			}
		})
	}
}

// Whoever reads the event stream learns why a session was lost, that another has
// been opened, and that associations have new ports, in the words of status.
func TestTheEventStreamTellsOfARestart(t *testing.T) {
	far := newEcho(t)
	s := newSite(t)
	_, stop := s.cloud(t)
	sc := s.sidecar(t, tunnel.ModeAuto)
	socket := filepath.Join(t.TempDir(), "c.sock")
	l, err := control.Listen(socket, "")
	if err != nil {
		t.Fatal(err)
	}
	backend := &assemble.Backend{Sidecar: sc}
	server, err := control.NewServer(control.Config{Backend: backend})
	if err != nil {
		t.Fatal(err)
	}
	background(t, func(ctx context.Context) error { return server.Serve(ctx, l) })
	a := associate(t, sc.Front.Addr())
	eventually(t, "the first echo", func() bool { return a.echoes(t, "before", far.addr) })
	old := sc.Switch.Status().Link.Session

	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	ready, read := make(chan struct{}), make(chan error, 1)
	var lost, opened control.Event
	go func() {
		first := sync.OnceFunc(func() { close(ready) })
		read <- control.NewClient(socket).Events(ctx, func(e control.Event) error {
			first() // the state now
			switch {
			case e.Kind != "change" || e.Name != tunnel.ChangedSession:
			case e.From == old:
				lost = e
			default:
				opened = e
				return io.EOF
			}
			return nil
		})
	}()
	<-ready
	stop()
	s.cloud(t)
	if err := <-read; err != io.EOF {
		t.Fatalf("the stream ended before a session was opened again: %v", err)
	}
	if lost.To != "" || lost.Code == "" || lost.Cause == "" {
		t.Errorf("of the lost session it says %+v", lost)
	}
	if c := opened.Change; opened.From != "" || opened.To == old || opened.Code != lost.Code || c == nil || !c.NewPorts {
		t.Errorf("of the session opened again it says %+v (%+v)", opened, opened.Change)
	}
	var again []string
	for _, c := range backend.Status().Changes {
		again = append(again, c.String())
	}
	for _, e := range []control.Event{lost, opened} {
		if e.Change != nil && !slices.Contains(again, e.Change.String()) {
			t.Errorf("status does not have %q:\n%s", e.Change, strings.Join(again, "\n"))
		}
	}
	t.Log(strings.Join(again, "\n"))
}

func TestSidecarThatWasThereFirstConnectsOnceTheCloudProxyIsThere(t *testing.T) {
	far := cmdtest.StreamEcho(t)
	s := newSite(t)
	_, stop := s.cloud(t) // only to have an address
	stop()
	sc := s.stopped(t, tunnel.ModeTCP) // a TCP port that is closed says so at once
	if _, reply := request(t, sc.Front.Addr(), 1, far); reply[1] != 2 {
		t.Errorf("before the start: reply %d, want 2", reply[1])
	}
	started := make(chan error, 1)
	go func() {
		_, err := sc.Switch.Start(t.Context(), sidecar.StartOptions{Keep: true})
		started <- err
	}()
	eventually(t, "the first failure", func() bool {
		st := sc.Switch.Status()
		return st.State == sidecar.Starting && st.Code == tunnel.CloudUnreachable && st.Cause != ""
	})
	s.cloud(t)
	select {
	case err := <-started:
		if err != nil {
			t.Fatal(err)
		}
	case <-time.After(patience):
		t.Fatalf("it does not connect: %+v", sc.Switch.Status())
	}
	returns(t, connect(t, sc.Front.Addr(), far), "hello")
}

// Neither carrier has a lower limit of its own.
func TestASessionHasAsManyStreamsAsItsLimit(t *testing.T) {
	const streams = 1100
	for _, mode := range bothCarriers {
		t.Run(string(mode), func(t *testing.T) {
			far := cmdtest.StreamEcho(t)
			s := newSite(t)
			s.limits = session.Limits{Streams: streams, OpensPerSecond: 10 * streams}
			s.cloud(t)
			link := s.sidecar(t, mode).Link
			var open []tunnel.Stream
			defer func() {
				for _, st := range open {
					st.Abort(nil)
				}
			}()
			ctx, cancel := context.WithTimeout(t.Context(), patience)
			defer cancel()
			for range streams {
				st, err := link.OpenStream(ctx, tunnel.Peer{}, tunnel.TargetOf(far))
				if err != nil {
					t.Fatalf("after %d: %v", len(open), err)
				}
				open = append(open, st)
			}
			if st, err := link.OpenStream(ctx, tunnel.Peer{}, tunnel.TargetOf(far)); !errors.Is(err, tunnel.LimitExceeded) {
				t.Errorf("one more: %v", err)
				if err == nil {
					st.Abort(nil)
				}
			}
		})
	}
}

func TestGarbageDisturbsNobody(t *testing.T) {
	const each = 24 // pieces of garbage in each place
	farUDP, farTCP := newEcho(t), cmdtest.StreamEcho(t)
	s := newSite(t)
	cloud, _ := s.cloud(t)
	sc := s.sidecar(t, tunnel.ModeAuto)
	socket := filepath.Join(t.TempDir(), "c.sock")
	l, err := control.Listen(socket, "")
	if err != nil {
		t.Fatal(err)
	}
	server, err := control.NewServer(control.Config{Backend: &assemble.Backend{Sidecar: sc}, Log: slog.New(slog.NewTextHandler(s.log, nil))})
	if err != nil {
		t.Fatal(err)
	}
	background(t, func(ctx context.Context) error { return server.Serve(ctx, l) })

	stream, a := connect(t, sc.Front.Addr(), farTCP), associate(t, sc.Front.Addr())
	returns(t, stream, "before")
	eventually(t, "the first echo", func() bool { return a.echoes(t, "before", farUDP.addr) })

	var wg sync.WaitGroup
	for i, where := range []struct{ network, address string }{
		{"tcp", sc.Front.Addr().String()}, {"tcp", cloud.Addr.String()}, {"udp", cloud.Addr.String()}, {"unix", socket},
	} {
		for n := range each {
			wg.Go(func() {
				if err := throw(where.network, where.address, garbage(i, n)); err != nil {
					t.Errorf("garbage %d on %s %s: %v", n, where.network, where.address, err)
				}
			})
		}
	}
	over := make(chan struct{})
	go func() { wg.Wait(); close(over) }()
	rounds := 0
	for going := true; going; rounds++ {
		select {
		case <-over:
			going = false
		default:
		}
		text := fmt.Sprint("round ", rounds)
		returns(t, stream, text)
		eventually(t, text, func() bool { return a.echoes(t, text, farUDP.addr) })
	}
	if st := sc.Switch.Status(); st.State != sidecar.Running || sc.Link.Stats().Connects != 1 || cloud.Sessions() != 1 || len(farUDP.sources()) != 1 {
		t.Errorf("after %d rounds: %+v, %d connects, %d sessions, %v", rounds, st, sc.Link.Stats().Connects, cloud.Sessions(), farUDP.sources())
	}
	if _, err := control.NewClient(socket).Status(t.Context()); err != nil {
		t.Errorf("the control socket: %v", err)
	}
}

// garbage is noise that begins, now and then, like something that belongs here.
func garbage(seed, n int) []byte {
	r := rand.New(rand.NewPCG(uint64(seed), uint64(n)))
	b := make([]byte, 1+r.IntN(1400))
	for i := range b {
		b[i] = byte(r.Uint32())
	}
	heads := []string{"", "\x05\x01\x00", "\x05\xff", "CONNECT ", "GET / HTTP/1.1\r\n", "\x16\x03\x01", "\xc0\x00\x00\x00\x01\x08", "POST /v1/stop HTTP/1.1\r\nHost: culvert\r\n"}
	return append([]byte(heads[n%len(heads)]), b...)
}

// throw sends b and, where there is a connection, waits for its end.
func throw(network, address string, b []byte) error {
	c, err := net.Dial(network, address)
	if err != nil {
		return err
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(patience))
	_, err = c.Write(b)
	end, ok := c.(interface{ CloseWrite() error })
	if !ok {
		return err // a datagram
	}
	end.CloseWrite()
	_, err = io.Copy(io.Discard, c)
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return errors.New("it is still open")
	}
	if err != nil && !errors.Is(err, syscall.ECONNRESET) && !errors.Is(err, syscall.EPIPE) {
		return err
	}
	return nil
}

func TestNothingIsLeftOfAPathThatWasInUse(t *testing.T) {
	farUDP, farTCP := newEcho(t), cmdtest.StreamEcho(t)
	for _, mode := range bothCarriers {
		t.Run(string(mode), func(t *testing.T) {
			already := goleak.IgnoreCurrent()
			conf := &config.Sidecar{
				CloudProxy: config.CloudProxyRef{Address: config.List{"127.0.0.1:443"}, ServerName: assemble.DefaultServerName},
				Identity:   config.Identity{App: "embedded", Token: "embedded"},
				Front:      config.Front{Listen: "127.0.0.1:0"}, Mode: string(mode),
			}
			if err := conf.Check(); err != nil {
				t.Fatal(err)
			}
			log := slog.New(slog.DiscardHandler)
			cloud, err := assemble.Embedded(conf, log)
			if err != nil {
				t.Fatal(err)
			}
			stopCloud := background(t, cloud.Run)
			sc, err := assemble.NewSidecar(conf, log)
			if err != nil {
				t.Fatal(err)
			}
			stop := background(t, sc.Run)
			start(t, sc)
			stream, a := connect(t, sc.Front.Addr(), farTCP), associate(t, sc.Front.Addr())
			returns(t, stream, "hello")
			eventually(t, "an echo", func() bool { return a.echoes(t, "hello", farUDP.addr) })
			idle, err := net.Dial("tcp", sc.Front.Addr().String()) // says nothing
			if err != nil {
				t.Fatal(err)
			}
			defer idle.Close()

			stop()
			stopCloud()
			stream.SetDeadline(time.Now().Add(patience))
			if n, err := stream.Read(make([]byte, 1)); n != 0 || err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
				t.Errorf("the stream is still open: %d bytes, %v", n, err)
			}
			cmdtest.NothingRuns(t, already)
			for _, network := range []string{"tcp", "udp"} {
				// Another program may have the port for a moment.
				eventually(t, "the "+network+" port is free again", func() bool { return bindable(network, cloud.Addr) == nil })
			}
		})
	}
}

// bindable says why an address can not be bound.
func bindable(network string, at netip.AddrPort) error {
	if network == "udp" {
		c, err := net.ListenPacket(network, at.String())
		if err != nil {
			return err
		}
		return c.Close()
	}
	l, err := net.Listen(network, at.String())
	if err != nil {
		return err
	}
	return l.Close()
}
