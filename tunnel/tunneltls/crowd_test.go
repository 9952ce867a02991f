package tunneltls

import (
	"context"
	"net"
	"testing"
	"time"
)

// One address that holds every place in silence keeps no other address out.
func TestSilentConnectionsOfOneAddressKeepNoOtherOut(t *testing.T) {
	client, server := both(t)
	server.Unauthenticated = 50
	l := listen(t, server)
	var silent []net.Conn
	for range 80 {
		c, err := net.Dial("tcp", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		silent = append(silent, c)
	}
	held := l.(*listener).held
	soon(t, "every place is taken", func() bool { return held.Len() == server.Unauthenticated })
	client.Dial = func(ctx context.Context, network, address string) (net.Conn, error) {
		d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, 77)}}
		return d.DialContext(ctx, network, address)
	}
	d := dialer(t, client)
	for range 10 {
		began := time.Now()
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		a, err := d.Dial(ctx, l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		b, err := l.Accept(ctx)
		if err != nil {
			t.Fatal(err)
		}
		t.Logf("after %v", time.Since(began))
		a.Close()
		b.Close()
		cancel()
	}
	for _, c := range silent {
		c.Close()
	}
	soon(t, "every place is free", func() bool { return held.Len() == 0 })
}
