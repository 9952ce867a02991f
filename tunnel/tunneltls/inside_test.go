package tunneltls

import (
	"context"
	"crypto/ed25519"
	"crypto/tls"
	"slices"
	"testing"
	"time"

	"culvert/tunnel"
	"culvert/tunnel/tunneltest"
	"culvert/tunnel/websocket"
)

// inside makes both ends of carriers inside WebSockets, which come by the port of
// those that are not.
func inside(t testing.TB) (Config, func(t testing.TB) (client, server tunnel.Candidate)) {
	client, server := both(t)
	web, err := websocket.NewListener(websocket.ListenConfig{Timeout: patience})
	if err != nil {
		t.Fatal(err)
	}
	within, err := Listen(web, server)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { within.Close() })
	outer := server
	outer.Other = web.Take
	outer.TLS = server.TLS.Clone()
	outer.TLS.GetConfigForClient = func(hello *tls.ClientHelloInfo) (*tls.Config, error) {
		if slices.Contains(hello.SupportedProtos, server.TLS.NextProtos[0]) {
			return nil, nil
		}
		return &tls.Config{Certificates: server.TLS.Certificates, NextProtos: []string{"http/1.1"}}, nil
	}
	around := listen(t, outer)
	wd, err := websocket.NewDialer(websocket.DialConfig{TLS: &tls.Config{RootCAs: client.TLS.RootCAs, ServerName: "cloud.test"}})
	if err != nil {
		t.Fatal(err)
	}
	client.Dial = wd.Dial
	d := dialer(t, client)
	return client, func(t testing.TB) (tunnel.Candidate, tunnel.Candidate) {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		near, err := d.Dial(ctx, "wss://"+around.Addr().String()+websocket.DefaultPath)
		if err != nil {
			t.Fatal(err)
		}
		far, err := within.Accept(ctx)
		if err != nil {
			t.Fatal(err)
		}
		return near, far
	}
}

func TestTLSInsideAWebSocketPassesTheExam(t *testing.T) {
	tunneltest.Exam(t, func(t *testing.T) tunneltest.Setup {
		client, pair := inside(t)
		return tunneltest.Setup{Pair: func(t *testing.T) (tunnel.Candidate, tunnel.Candidate) { return pair(t) }, Key: client.TLS.Certificates[0].Leaf.PublicKey.(ed25519.PublicKey), Lanes: true}
	})
}

// A lane learns from the kernel what arrives, by what TCP was given, whatever is
// between.
func TestALaneInsideAWebSocketFollowsTCP(t *testing.T) {
	_, pair := inside(t)
	near, far := pair(t)
	a, err := near.Lane()
	if err != nil {
		t.Fatal(err)
	}
	b, err := far.Lane()
	if err != nil {
		t.Fatal(err)
	}
	got := make(chan struct{}, 1000)
	b.Start(func([]byte) { got <- struct{}{} }, func() {})
	room := make(chan struct{}, 1000)
	a.Start(func([]byte) {}, func() { room <- struct{}{} })
	l := a.(*lane)
	if !l.keeps {
		t.Skip("this kernel tells nothing")
	}
	for range 100 {
		err := a.Send(make([]byte, 1000))
		for ; err == tunnel.ErrBlocked; err = a.Send(make([]byte, 1000)) {
			<-room
		}
		if err != nil {
			t.Fatal(err)
		}
		select {
		case <-got:
		case <-time.After(patience):
			t.Fatal("nothing comes")
		}
	}
	for end := time.Now().Add(patience); ; time.Sleep(time.Millisecond) {
		l.mu.Lock()
		l.lookLocked(time.Now())
		written, acked, flight := l.written, l.pulse.last.acked, l.flightLocked()
		l.mu.Unlock()
		if written >= 100_000 && flight == 0 && acked >= written {
			break
		}
		if time.Now().After(end) {
			t.Fatalf("TCP was given %d bytes, of which %d are acknowledged; %d are taken to be on their way", written, acked, flight)
		}
	}
	a.Close(nil)
	b.Close(nil)
}
