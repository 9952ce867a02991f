package tunnelquic

import (
	"context"
	"fmt"
	"io"
	"net"
	"testing"

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
