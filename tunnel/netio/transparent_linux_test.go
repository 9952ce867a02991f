//go:build linux && (amd64 || arm64 || arm || riscv64)

package netio

import (
	"errors"
	"net"
	"net/netip"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// sentTo tells where each datagram was sent to.
type sentTo chan [2]netip.AddrPort

func (s sentTo) Take([]byte, netip.AddrPort)               {}
func (s sentTo) TakeFor(_ []byte, from, to netip.AddrPort) { s <- [2]netip.AddrPort{from, to} }
func (s sentTo) Flush()                                    {}
func (s sentTo) Failed()                                   {}

func TestATransparentSocketTellsWhereADatagramWasSentTo(t *testing.T) {
	for name, c := range map[string]struct{ network, at, to string }{
		"IPv4": {"udp4", "0.0.0.0:0", "127.0.0.9"},
		"IPv6": {"udp6", "[::]:0", "::1"},
	} {
		t.Run(name, func(t *testing.T) {
			conn, from := bind(t, c.network, c.at), bind(t, c.network, c.at)
			var err error
			raw(t, conn).Control(func(fd uintptr) { err = Transparent(fd, c.network == "udp6") })
			if errors.Is(err, unix.EPERM) && os.Getenv("CI") != "true" {
				t.Skip("needs CAP_NET_RAW")
			}
			if err != nil {
				t.Fatal(err)
			}
			want := at(conn, c.to)
			p, got := newPoller(t), make(sentTo, 1)
			s, err := p.Packet(conn, got)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { s.Close() })
			if err := s.Start(); err != nil {
				t.Fatal(err)
			}
			if _, err := from.WriteTo([]byte("x"), net.UDPAddrFromAddrPort(want)); err != nil {
				t.Fatal(err)
			}
			select {
			case g := <-got:
				if g[1] != want || g[0].Port() != port(from) {
					t.Errorf("from %v to %v, want to %v", g[0], g[1], want)
				}
			case <-time.After(30 * time.Second):
				t.Error("nothing came")
			}
		})
	}
}

func TestARawSocketSendsWholePackets(t *testing.T) {
	c, err := net.ListenPacket("ip4:255", "0.0.0.0")
	if errors.Is(err, unix.EPERM) && os.Getenv("CI") != "true" {
		t.Skip("needs CAP_NET_RAW")
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	s, err := NewRawSender(c.(*net.IPConn))
	if err != nil {
		t.Fatal(err)
	}
	to := bind(t, "udp4", "127.0.0.1:0")
	p := []byte{0x45, 0, 0, 29, 0, 0, 0, 0, 64, 17, 0, 0, 192, 0, 2, 9, 127, 0, 0, 1, 0x0d, 0x96, byte(port(to) >> 8), byte(port(to)), 0, 9, 0, 0, 'x'}
	if err := s.Send(p, netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), 0)); err != nil {
		t.Fatal(err)
	}
	to.SetReadDeadline(time.Now().Add(30 * time.Second))
	b := make([]byte, 9)
	n, from, err := to.ReadFromUDPAddrPort(b)
	if err != nil || string(b[:n]) != "x" || from != netip.MustParseAddrPort("192.0.2.9:3478") {
		t.Errorf("%q from %v, %v", b[:n], from, err)
	}
}
