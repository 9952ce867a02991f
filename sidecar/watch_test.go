package sidecar

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"net/netip"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"culvert/sidecar/channel"
	"culvert/tunnel"
)

// watchFar is an opener whose streams end in pipes and whose packets go nowhere.
type watchFar struct {
	err    error
	sends  error
	far    net.Conn
	packs  tunnel.Receiver
	sent   int
	closed bool
}

type watchPipe struct {
	net.Conn
	said []string
}

func (p *watchPipe) CloseWrite() error { p.said = append(p.said, "closewrite"); return nil }
func (p *watchPipe) Abort(err error)   { p.said = append(p.said, "abort: "+err.Error()); p.Conn.Close() }

func (o *watchFar) OpenStream(context.Context, tunnel.Peer, tunnel.Target) (tunnel.Stream, error) {
	if o.err != nil {
		return nil, o.err
	}
	a, b := net.Pipe()
	o.far = b
	return &watchPipe{Conn: a}, nil
}

func (o *watchFar) OpenPackets(_ tunnel.Peer, r tunnel.Receiver) (tunnel.Packets, error) {
	if o.err != nil {
		return nil, o.err
	}
	o.packs = r
	return o, nil
}

func (o *watchFar) Send([]byte, tunnel.Target) error { o.sent++; return o.sends }
func (o *watchFar) Flush()                           {}
func (o *watchFar) Close() error                     { o.closed = true; return nil }

type watchApp struct {
	got    int
	closed error
}

func (a *watchApp) Deliver([]byte, netip.AddrPort)    { a.got++ }
func (a *watchApp) Unreachable(netip.AddrPort, error) {}
func (a *watchApp) Closed(err error)                  { a.closed = err }

var (
	watchPeer   = tunnel.Peer{User: "alice", Addr: netip.MustParseAddrPort("127.0.0.1:40000")}
	watchRemote = netip.MustParseAddrPort("203.0.113.5:4000")
)

func watchRTP(seq int) []byte {
	p := make([]byte, 100)
	p[0], p[1] = 0x80, 111
	binary.BigEndian.PutUint16(p[2:], uint16(seq))
	binary.BigEndian.PutUint32(p[8:], 0x1a2b3c4d)
	return p
}

func watchUser(by tunnel.Peer) channel.Owner { return OwnerOf(by, nil) }

func TestWatchedPacketsShowACallUntilTheyEnd(t *testing.T) {
	up := func(o tunnel.Packets, _ *watchFar, i int) { o.Send(watchRTP(i), tunnel.TargetOf(watchRemote)) }
	// A dual-stack socket reports IPv4 mapped: it is the same remote.
	mapped := netip.AddrPortFrom(netip.AddrFrom16(watchRemote.Addr().As16()), watchRemote.Port())
	down := func(_ tunnel.Packets, f *watchFar, i int) { f.packs.Deliver(watchRTP(i), mapped) }
	for _, c := range []struct {
		name  string
		sends error
		move  func(tunnel.Packets, *watchFar, int)
		end   func(tunnel.Packets, *watchFar)
		want  string
	}{
		{"sent, closed by the app", nil, up, func(o tunnel.Packets, _ *watchFar) { o.Close() }, "packets up in 0.6 s to 203.0.113.5:4000"},
		{"received, closed by the tunnel", nil, down, func(_ tunnel.Packets, f *watchFar) { f.packs.Closed(net.ErrClosed) }, "packets down in 0.6 s from 203.0.113.5:4000"},
		{"too large now and then", tunnel.ErrTooLarge, up, func(o tunnel.Packets, _ *watchFar) { o.Close() }, "packets up"},
		{"without a carrier", tunnel.CloudUnreachable, up, func(o tunnel.Packets, _ *watchFar) { o.Close() }, "packets up"},
		{"refused by the policy", tunnel.PolicyDenied, up, nil, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := channel.New(channel.Config{})
				far, app := &watchFar{sends: c.sends}, &watchApp{}
				p, err := NewWatch(far, w, watchUser).OpenPackets(watchPeer, app)
				if err != nil {
					t.Fatal(err)
				}
				for i := range 30 {
					c.move(p, far, i)
					time.Sleep(20 * time.Millisecond)
				}
				if far.sent+app.got != 30 {
					t.Errorf("%d sent and %d received went through", far.sent, app.got)
				}
				got := w.Channels(time.Now())
				if c.want == "" {
					if len(got) != 0 {
						t.Errorf("%+v", got)
					}
					return
				}
				if len(got) != 1 || got[0].Name != "alice" || !strings.Contains(got[0].Evidence[0], c.want) {
					t.Fatalf("%+v", got)
				}
				if c.end(p, far); len(w.Channels(time.Now())) != 0 {
					t.Error("the channel outlived its association")
				}
				if !far.closed && app.closed == nil {
					t.Error("the end was not passed on")
				}
			})
		})
	}
}

func TestWatchedStreamsCarryEverything(t *testing.T) {
	w := channel.New(channel.Config{})
	far := &watchFar{}
	s, err := NewWatch(far, w, watchUser).OpenStream(t.Context(), watchPeer, tunnel.Target{Host: "media.example", Port: 443})
	if err != nil {
		t.Fatal(err)
	}
	go func() {
		for i := range 30 { // RFC 4571
			far.far.Write(append([]byte{0, 100}, watchRTP(i)...))
		}
		far.far.Close()
	}()
	got, err := io.ReadAll(s)
	if err != nil || len(got) != 30*102 || !bytes.Equal(got[102*29+2:], watchRTP(29)) {
		t.Fatalf("%d bytes, %v", len(got), err)
	}
	c := w.Channels(time.Now())
	if len(c) != 1 || !strings.Contains(c[0].Evidence[0], "RTP ssrc 0x1a2b3c4d: 30 packets down") || !strings.Contains(c[0].Evidence[0], "media.example:443 on TCP") {
		t.Fatalf("%+v", c)
	}
	s.CloseWrite()
	if len(w.Channels(time.Now())) != 1 {
		t.Error("half a close ended the channel")
	}
	s.Abort(errors.New("stop"))
	if len(w.Channels(time.Now())) != 0 {
		t.Error("the channel outlived its stream")
	}
	if said := strings.Join(s.(*watchedStream).Stream.(*watchPipe).said, ", "); said != "closewrite, abort: stop" {
		t.Errorf("passed on: %s", said)
	}
}

func TestWhatCouldNotBeOpenedIsNotWatched(t *testing.T) {
	w := channel.New(channel.Config{})
	o := NewWatch(&watchFar{err: tunnel.CloudUnreachable}, w, watchUser)
	if _, err := o.OpenStream(t.Context(), watchPeer, tunnel.Target{}); !errors.Is(err, tunnel.CloudUnreachable) {
		t.Error(err)
	}
	if _, err := o.OpenPackets(watchPeer, &watchApp{}); !errors.Is(err, tunnel.CloudUnreachable) {
		t.Error(err)
	}
}

func TestTickWatchTellsOfChanges(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		said := make(chan channel.Event, 4)
		w := channel.New(channel.Config{Changed: func(e channel.Event) { said <- e }})
		ctx, stop := context.WithCancel(t.Context())
		ended := make(chan struct{})
		go func() { TickWatch(ctx, w); close(ended) }()
		find := func(netip.AddrPort) (string, int) { return "baresip", 42 }
		s := w.OpenSocket(OwnerOf(watchPeer, find))
		for i := range 20 {
			s.Packet(true, channel.Target(tunnel.TargetOf(watchRemote)), watchRTP(i), time.Now())
		}
		if e := <-said; e.Is != "live" || e.Channel.Name != "baresip/42" || e.Channel.User != "alice" {
			t.Errorf("%+v", e)
		}
		s.Close(time.Now())
		if e := <-said; e.Was != "live" || e.Is != "" {
			t.Errorf("%+v", e)
		}
		stop()
		<-ended
	})
}

func BenchmarkWatchedSend(b *testing.B) {
	p, err := NewWatch(&watchFar{}, channel.New(channel.Config{}), watchUser).OpenPackets(watchPeer, &watchApp{})
	if err != nil {
		b.Fatal(err)
	}
	pkt, to := watchRTP(0), tunnel.TargetOf(watchRemote)
	b.ReportAllocs()
	i := 0
	for b.Loop() {
		binary.BigEndian.PutUint16(pkt[2:], uint16(i))
		p.Send(pkt, to)
		i++
	}
}
