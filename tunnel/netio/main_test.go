package netio

import (
	"bytes"
	"errors"
	"net"
	"net/netip"
	"testing"
	"time"

	"go.uber.org/goleak"

	"culvert/tunnel"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// bind opens a socket; the test is skipped where the host lacks its family.
func bind(t testing.TB, network, address string) *net.UDPConn {
	t.Helper()
	at := net.UDPAddrFromAddrPort(netip.MustParseAddrPort(address))
	c, err := net.ListenUDP(network, at)
	if err != nil {
		t.Skipf("no %s socket at %s: %v", network, address, err)
	}
	t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(30 * time.Second))
	return c
}

func sender(t testing.TB, c *net.UDPConn) *Sender {
	t.Helper()
	s, err := NewSender(c)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func port(c *net.UDPConn) uint16 { return uint16(c.LocalAddr().(*net.UDPAddr).Port) }

// at is where a socket is reached by ip.
func at(c *net.UDPConn, ip string) netip.AddrPort {
	return netip.AddrPortFrom(netip.MustParseAddr(ip), port(c))
}

// pairs are sockets that can send to each other, with the address to send to.
var pairs = map[string]struct{ from, fromAt, to, toAt, dial string }{
	"IPv4":                            {"udp4", "127.0.0.1:0", "udp4", "127.0.0.1:0", "127.0.0.1"},
	"IPv6":                            {"udp6", "[::1]:0", "udp6", "[::1]:0", "::1"},
	"dual stack to IPv4":              {"udp", "[::]:0", "udp4", "127.0.0.1:0", "127.0.0.1"},
	"dual stack to mapped IPv4":       {"udp", "[::]:0", "udp4", "127.0.0.1:0", "::ffff:127.0.0.1"},
	"dual stack to IPv6":              {"udp", "[::]:0", "udp6", "[::1]:0", "::1"},
	"IPv4 to dual stack":              {"udp4", "127.0.0.1:0", "udp", "[::]:0", "127.0.0.1"},
	"IPv4 by mapped address":          {"udp4", "127.0.0.1:0", "udp4", "127.0.0.1:0", "::ffff:127.0.0.1"},
	"IPv6 with a zone that is a name": {"udp6", "[::1]:0", "udp6", "[::1]:0", "::1%lo"},
}

func TestADatagramArrivesAsItIs(t *testing.T) {
	for name, c := range pairs {
		t.Run(name, func(t *testing.T) {
			from, to := bind(t, c.from, c.fromAt), bind(t, c.to, c.toAt)
			s := sender(t, from)
			for _, size := range []int{0, 1, 1200, 9000} {
				p := bytes.Repeat([]byte{byte(size), 7}, size)[:size]
				if err := s.Send(p, at(to, c.dial)); err != nil {
					t.Fatalf("%d bytes: %v", size, err)
				}
				got := make([]byte, 10_000)
				n, src, err := to.ReadFromUDPAddrPort(got)
				if err != nil || !bytes.Equal(got[:n], p) || src.Port() != port(from) {
					t.Errorf("%d bytes: got %d from %v, %v", size, n, src, err)
				}
			}
		})
	}
}

func TestABatchIsSentInOrder(t *testing.T) {
	from, one, two := bind(t, "udp4", "127.0.0.1:0"), bind(t, "udp4", "127.0.0.1:0"), bind(t, "udp4", "127.0.0.1:0")
	s := sender(t, from)
	var ms []Message
	for i := range 101 { // more than one system call takes
		to := at(one, "127.0.0.1")
		if i%3 == 0 {
			to = at(two, "127.0.0.1")
		}
		ms = append(ms, Message{P: []byte{byte(i)}, To: to})
	}
	if n, err := s.SendBatch(ms); n != len(ms) || err != nil {
		t.Fatalf("%d of %d, %v", n, len(ms), err)
	}
	b := make([]byte, 10)
	for i := range ms {
		c := one
		if i%3 == 0 {
			c = two
		}
		if n, _, err := c.ReadFromUDPAddrPort(b); err != nil || n != 1 || b[0] != byte(i) {
			t.Fatalf("datagram %d came as %v, %v", i, b[:n], err)
		}
	}
}

func TestABatchStopsAtTheMessageThatFails(t *testing.T) {
	from, to := bind(t, "udp4", "127.0.0.1:0"), bind(t, "udp4", "127.0.0.1:0")
	s, good := sender(t, from), at(to, "127.0.0.1")
	for name, c := range map[string]struct {
		bad  Message
		want error
	}{
		"too large":      {Message{P: make([]byte, 65_600), To: good}, tunnel.ErrTooLarge},
		"another family": {Message{P: []byte("x"), To: netip.MustParseAddrPort("[::1]:9")}, nil},
		"no address":     {Message{P: []byte("x")}, nil},
	} {
		for _, first := range []bool{true, false} {
			ms, want := []Message{{P: []byte("a"), To: good}, c.bad, {P: []byte("b"), To: good}}, 1
			if first {
				ms, want = ms[1:], 0
			}
			n, err := s.SendBatch(ms)
			if n != want || err == nil || c.want != nil && err != c.want {
				t.Errorf("%s: sent %d, %v; want %d and %v", name, n, err, want, c.want)
			}
			if n, err := s.SendBatch(ms[n+1:]); n != 1 || err != nil {
				t.Errorf("%s: the rest: sent %d, %v", name, n, err)
			}
		}
	}
	if n, err := s.SendBatch(nil); n != 0 || err != nil {
		t.Errorf("nothing: sent %d, %v", n, err)
	}
}

func TestSendSaysWhyItFailed(t *testing.T) {
	c := bind(t, "udp4", "127.0.0.1:0")
	s, to := sender(t, c), netip.MustParseAddrPort("127.0.0.1:9")
	if err := s.Send(make([]byte, 65_600), to); err != tunnel.ErrTooLarge {
		t.Errorf("65,600 bytes: %v", err)
	}
	if err := s.Send(nil, netip.AddrPort{}); err == nil {
		t.Error("a datagram to nowhere was sent")
	}
	c.Close()
	if err := s.Send([]byte("x"), to); !errors.Is(err, net.ErrClosed) {
		t.Errorf("on a closed socket: %v", err)
	}
}
