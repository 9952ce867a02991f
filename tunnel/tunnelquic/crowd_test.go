package tunnelquic

import (
	"context"
	"fmt"
	"io"
	"net"
	"testing"
	"time"

	"github.com/quic-go/quic-go"

	"culvert/tunnel"
)

// One address whose connections all wait to be answered keeps no other out: the
// oldest of them is cut.
func TestUnansweredConnectionsOfOneAddressKeepNoOtherOut(t *testing.T) {
	s, c, _ := configs(t)
	l := listenAt(t, "udp", "[::]:0", Config{TLS: s, Limits: Limits{Unanswered: 3}})
	port := l.Addr().(*net.UDPAddr).Port
	d := dialer(t, c)
	ctx, cancel := context.WithTimeout(t.Context(), testPatience)
	defer cancel()
	connect := func(address string) (client, server tunnel.Candidate) {
		t.Helper()
		client, err := d.Dial(ctx, address)
		if err != nil {
			t.Skip(err) // there may be no IPv6 here
		}
		t.Cleanup(func() { client.Close() })
		if server, err = l.Accept(ctx); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { server.Close() })
		return client, server
	}
	oldest, _ := connect(fmt.Sprintf("127.0.0.1:%d", port))
	for range 2 {
		connect(fmt.Sprintf("127.0.0.1:%d", port))
	}
	other, server := connect(fmt.Sprintf("[::1]:%d", port))
	if _, err := oldest.Read(make([]byte, 1)); err == nil {
		t.Error("the oldest connection was answered")
	}
	if _, err := other.Write([]byte("hello")); err != nil {
		t.Fatal(err)
	}
	var b [5]byte
	if _, err := io.ReadFull(server, b[:]); err != nil || string(b[:]) != "hello" {
		t.Errorf("%q, %v", b, err)
	}
	if n := l.Stats().Unanswered; n != 3 {
		t.Errorf("%d connections wait to be answered", n)
	}
}

// Nor does one whose handshakes all stop halfway.
func TestOpenHandshakesOfOneAddressKeepNoOtherOut(t *testing.T) {
	s, _, _ := configs(t)
	const limit = 100
	l := listen(t, Config{TLS: s, Limits: Limits{Handshakes: limit}})
	ctx, cancel := context.WithCancel(t.Context())
	open := func(ip string, n int) (begun int) {
		for port := range n {
			from := &net.UDPAddr{IP: net.ParseIP(ip), Port: 1000 + port}
			if _, err := l.countHandshake(ctx, &quic.ClientInfo{RemoteAddr: from, AddrVerified: true}); err == nil {
				begun++
			}
		}
		return begun
	}
	if n := open("203.0.113.1", 2*limit); n != limit-limit/4 {
		t.Errorf("one address has begun %d handshakes", n)
	}
	if n := open("203.0.113.2", limit); n != fewOpen {
		t.Errorf("another has begun %d, want %d", n, fewOpen)
	}
	if n := open("2001:db8::1", 3) + open("2001:db8::2", limit); n != limit/4-fewOpen {
		t.Errorf("a network of IPv6 has begun %d, want what is left: %d", n, limit/4-fewOpen)
	}
	if n := open("203.0.113.3", 1); n != 0 {
		t.Error("there is no limit")
	}
	cancel()
	for end := time.Now().Add(testPatience); l.handshakes.Load() > 0; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%d handshakes are open", l.handshakes.Load())
		}
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.opening) != 0 {
		t.Errorf("left: %v", l.opening)
	}
}
