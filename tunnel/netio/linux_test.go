//go:build linux && (amd64 || arm64 || arm || riscv64)

package netio

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"culvert/tunnel"
)

func raw(t testing.TB, c *net.UDPConn) syscall.RawConn {
	t.Helper()
	r, err := c.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// info asks for packet info on a socket.
func info(t testing.TB, c *net.UDPConn) {
	t.Helper()
	raw(t, c).Control(func(fd uintptr) {
		unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_PKTINFO, 1)
		unix.SetsockoptInt(int(fd), unix.IPPROTO_IPV6, unix.IPV6_RECVPKTINFO, 1)
	})
}

func TestErrnosBecomeTheContractsErrors(t *testing.T) {
	for errno, want := range map[syscall.Errno]error{
		unix.EAGAIN: tunnel.ErrBlocked, unix.EMSGSIZE: tunnel.ErrTooLarge, unix.EPERM: unix.EPERM, unix.ENOBUFS: unix.ENOBUFS,
	} {
		if got := explain(errno); got != want {
			t.Errorf("%v became %v", errno, got)
		}
	}
}

func TestABatchTellsWhatCameAndWhereFrom(t *testing.T) {
	for name, c := range pairs {
		t.Run(name, func(t *testing.T) {
			from, to := bind(t, c.from, c.fromAt), bind(t, c.to, c.toAt)
			info(t, to)
			s, b, r := sender(t, from), NewBatch(4, 2048), raw(t, to)
			for i := range 10 {
				if err := s.Send([]byte{1, 2, byte(i)}, at(to, c.dial)); err != nil {
					t.Fatal(err)
				}
			}
			dial := netip.MustParseAddr(c.dial).Unmap().WithZone("")
			want := netip.AddrPortFrom(dial, port(from))
			for i := 0; i < 10; {
				n, err := b.Read(r)
				if err != nil || n == 0 {
					t.Fatalf("%d, %v", n, err)
				}
				for k := range n {
					d := b.At(k)
					if len(d.P) != 3 || d.P[2] != byte(i) || d.From != want || d.Truncated {
						t.Errorf("datagram %d: %v from %v; want it from %v", i, d.P, d.From, want)
					}
					if got := Local(d.OOB); got != dial {
						t.Errorf("datagram %d was sent to %v; want %v", i, got, dial)
					}
					i++
				}
			}
			r.Control(func(fd uintptr) {
				if n, err := b.TryRead(fd); n != 0 || err != tunnel.ErrBlocked {
					t.Errorf("an empty socket: %d, %v", n, err)
				}
			})
		})
	}
}

func TestABatchTakesAsMuchAsItHasRoomFor(t *testing.T) {
	from, to := bind(t, "udp4", "127.0.0.1:0"), bind(t, "udp4", "127.0.0.1:0")
	s, b, r := sender(t, from), NewBatch(4, 100), raw(t, to)
	for i := range 6 {
		if err := s.Send(make([]byte, 98+i), at(to, "127.0.0.1")); err != nil {
			t.Fatal(err)
		}
	}
	for _, want := range [][]int{{98, 99, 100, 101}, {102, 103}} {
		n, err := b.Read(r)
		if err != nil || n != len(want) || b.Cap() != 4 {
			t.Fatalf("%d of %d, %v", n, b.Cap(), err)
		}
		for i, sent := range want {
			if d := b.At(i); len(d.P) != min(sent, 100) || d.Truncated != (sent > 100) {
				t.Errorf("%d bytes came as %d, truncated: %v", sent, len(d.P), d.Truncated)
			}
		}
	}
}

func TestTheSourceAddressCanBeChosen(t *testing.T) {
	for name, c := range map[string]struct{ network, bound, to, toAt, dial, local string }{
		"IPv4":               {"udp4", "0.0.0.0:0", "udp4", "127.0.0.1:0", "127.0.0.1", "127.0.0.77"},
		"IPv4 on dual stack": {"udp", "[::]:0", "udp4", "127.0.0.1:0", "127.0.0.1", "127.0.0.77"},
		"mapped":             {"udp", "[::]:0", "udp4", "127.0.0.1:0", "::ffff:127.0.0.1", "::ffff:127.0.0.77"},
		"IPv6":               {"udp", "[::]:0", "udp6", "[::1]:0", "::1", "::1"},
	} {
		t.Run(name, func(t *testing.T) {
			from, to := bind(t, c.network, c.bound), bind(t, c.to, c.toAt)
			s, local := sender(t, from), netip.MustParseAddr(c.local)
			if err := s.SendFrom([]byte("x"), at(to, c.dial), local); err != nil {
				t.Fatal(err)
			}
			_, src, err := to.ReadFromUDPAddrPort(make([]byte, 10))
			if want := netip.AddrPortFrom(local.Unmap(), port(from)); err != nil || src != want {
				t.Errorf("it came from %v, %v; want %v", src, err, want)
			}
			if err := s.SendFrom([]byte("x"), at(to, c.dial), netip.MustParseAddr("192.0.2.1")); err == nil && c.local != "::1" {
				t.Error("it went out from an address that is not this host's")
			}
		})
	}
}

func TestReadEndsAtADeadlineAndAtClose(t *testing.T) {
	for name, c := range map[string]struct {
		end  func(*net.UDPConn)
		want error
	}{
		"deadline": {func(c *net.UDPConn) { c.SetReadDeadline(time.Now()) }, os.ErrDeadlineExceeded},
		"close":    {func(c *net.UDPConn) { c.Close() }, net.ErrClosed},
	} {
		t.Run(name, func(t *testing.T) {
			conn := bind(t, "udp4", "127.0.0.1:0")
			r, read := raw(t, conn), make(chan error)
			go func() {
				_, err := NewBatch(2, 100).Read(r)
				read <- err
			}()
			c.end(conn)
			if err := <-read; !errors.Is(err, c.want) {
				t.Errorf("Read ended with %v", err)
			}
		})
	}
}

func TestAPendingErrorIsReturnedOnceAndReadingGoesOn(t *testing.T) {
	gone := bind(t, "udp4", "127.0.0.1:0")
	to := at(gone, "127.0.0.1")
	gone.Close()
	c, peer := bind(t, "udp4", "127.0.0.1:0"), bind(t, "udp4", "127.0.0.1:0")
	r := raw(t, c)
	r.Control(func(fd uintptr) { unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_RECVERR, 1) })
	if err := sender(t, c).Send([]byte("x"), to); err != nil {
		t.Fatal(err)
	}
	b := NewBatch(2, 100)
	if _, err := b.Read(r); err != unix.ECONNREFUSED { // loopback answers within sendmmsg
		t.Errorf("after an ICMP error: %v", err)
	}
	if err := sender(t, peer).Send([]byte("y"), at(c, "127.0.0.1")); err != nil {
		t.Fatal(err)
	}
	if n, err := b.Read(r); n != 1 || err != nil {
		t.Errorf("after the error: %d, %v", n, err)
	}
}

func TestNothingIsAllocated(t *testing.T) {
	if raceEnabled {
		t.Skip("the race detector makes sync.Pool drop at random")
	}
	for name, c := range pairs {
		if c.dial == "::1%lo" {
			continue // looked up each time
		}
		t.Run(name, func(t *testing.T) {
			from, to := bind(t, c.from, c.fromAt), bind(t, c.to, c.toAt)
			info(t, to)
			s, b, r := sender(t, from), NewBatch(4, 2048), raw(t, to)
			p, addr := make([]byte, 1200), at(to, c.dial)
			ms := []Message{{P: p, To: addr}, {P: p, To: addr}}
			held := 0
			trip := func() {
				if s.Send(p, addr) != nil || s.SendFrom(p, addr, netip.Addr{}) != nil {
					t.Fatal("send failed")
				}
				if n, err := s.SendBatch(ms); n != 2 || err != nil {
					t.Fatal(n, err)
				}
				for got := 0; got < 4; {
					n, err := b.Read(r)
					if err != nil {
						t.Fatal(err)
					}
					for i := range n {
						if d := b.At(i); Local(d.OOB).IsValid() && d.From.IsValid() {
							held++
						}
					}
					got += n
				}
			}
			trip()
			if n := testing.AllocsPerRun(500, trip); n != 0 {
				t.Errorf("%v allocations for four datagrams", n)
			}
			if held < 2000 {
				t.Errorf("%d datagrams told their addresses", held)
			}
		})
	}
}

func TestManySendAtOnceBesideABlockedReader(t *testing.T) {
	from, to := bind(t, "udp4", "127.0.0.1:0"), bind(t, "udp4", "127.0.0.1:0")
	s, r := sender(t, from), raw(t, to)
	to.SetReadBuffer(4 << 20)
	const senders, each = 8, 20
	var all sync.WaitGroup
	for i := range senders {
		all.Go(func() {
			for k := range each {
				if err := s.Send([]byte{byte(i), byte(k)}, at(to, "127.0.0.1")); err != nil {
					t.Error(err)
				}
			}
		})
	}
	b, next := NewBatch(8, 100), [senders]byte{}
	for got := 0; got < senders*each; {
		n, err := b.Read(r)
		if err != nil {
			t.Fatal(err)
		}
		for i := range n {
			p := b.At(i).P
			if len(p) != 2 || p[1] != next[p[0]] {
				t.Fatalf("sender %d: %d came where %d was next", p[0], p[1], next[p[0]])
			}
			next[p[0]]++
		}
		got += n
	}
	all.Wait()
}

func TestLocalReadsOnlyWhatIsThere(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	b := make([]byte, sizeOOB)
	for range 100_000 {
		for i := range b {
			b[i] = byte(r.Uint32())
			if r.IntN(2) == 0 {
				b[i] = byte(r.IntN(64) * r.IntN(2))
			}
		}
		Local(b[:r.IntN(len(b)+1)])
	}
	if a := Local(nil); a.IsValid() {
		t.Errorf("nothing says %v", a)
	}
}

func BenchmarkLoopback(b *testing.B) {
	for _, n := range []int{1, 16} {
		b.Run(fmt.Sprintf("batch of %d", n), func(b *testing.B) {
			from, to := bind(b, "udp4", "127.0.0.1:0"), bind(b, "udp4", "127.0.0.1:0")
			to.SetDeadline(time.Time{})
			s, batch, r := sender(b, from), NewBatch(16, 2048), raw(b, to)
			ms := make([]Message, n)
			for i := range ms {
				ms[i] = Message{P: make([]byte, 1000), To: at(to, "127.0.0.1")}
			}
			b.SetBytes(int64(1000 * n))
			b.ReportAllocs()
			for b.Loop() {
				if _, err := s.SendBatch(ms); err != nil {
					b.Fatal(err)
				}
				for got := 0; got < n; {
					k, err := batch.Read(r)
					if err != nil {
						b.Fatal(err)
					}
					got += k
				}
			}
		})
	}
}
