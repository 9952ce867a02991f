//go:build linux && (amd64 || arm64 || arm || riscv64)

package tunnelquic

import (
	"bytes"
	"encoding/binary"
	"errors"
	"net"
	"net/netip"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/net/ipv4"
	"golang.org/x/sys/unix"

	"culvert/tunnel"
	"culvert/tunnel/netio"
)

// shared is a socket as QUIC would read it, a flow on it, and a peer to send to it.
func shared(t testing.TB) (*socket, *flow, *net.UDPConn) {
	t.Helper()
	s, err := newSocket(udp(t), Config{}, true)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	peer, err := net.DialUDP("udp4", nil, s.LocalAddr().(*net.UDPAddr))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { peer.Close() })
	return s, newFlow(&link{sock: s}), peer
}

// messages is room for n packets, as quic-go makes it.
func messages(n int) []ipv4.Message {
	ms := make([]ipv4.Message, n)
	for i := range ms {
		ms[i] = ipv4.Message{Buffers: [][]byte{make([]byte, 1452)}, OOB: make([]byte, 128)}
	}
	return ms
}

// quicReads reads up to room packets at a time, until one with the last byte 0xff has come.
func quicReads(t *testing.T, s *socket, room int, each func(ipv4.Message)) {
	t.Helper()
	s.SetReadDeadline(time.Now().Add(testPatience))
	ms := messages(room)
	for {
		n, err := s.ReadBatch(ms, 0)
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range ms[:n] {
			if m.N > 0 && m.Buffers[0][m.N-1] == 0xff {
				return
			}
			each(m)
		}
	}
}

func write(t *testing.T, to *net.UDPConn, p []byte) {
	t.Helper()
	if _, err := to.Write(p); err != nil {
		t.Fatal(err)
	}
}

func TestQUICGetsWhatNobodyTakes(t *testing.T) {
	s, f, peer := shared(t)
	mine, shy := [8]byte{1, 1}, [8]byte{1, 2} // in one shard of the table
	taken := claimed(t, f, mine)
	refused := 0
	if err := f.Claim(shy, func([]byte, tunnel.Path) bool { refused++; return false }); err != nil {
		t.Fatal(err)
	}
	third := claimed(t, f, [8]byte{7})

	long := sealed(mine, 60)
	long[0] = 0xc0
	zeros := sealed(mine, 61)
	zeros[0] = 0x3f
	var want []int // the lengths that QUIC gets, in order
	for _, p := range []struct {
		p    []byte
		quic bool
	}{
		{sealed(mine, 100), false},
		{sealed(shy, 101), true},
		{sealed([8]byte{1, 3}, 102), true}, // nobody's
		{sealed([8]byte{7}, 103), false},
		{long, true},
		{zeros, true},
		{sealed(mine, 9), false},
		{sealed(mine, 9)[:8], true},
		{[]byte{0x40}, true},
		{nil, true},
		{sealed(mine, 1452), false},
		{sealed(mine, maxPacket+1), false}, // its end is lost
		{sealed(shy, maxPacket+1), false},
		{sealed([8]byte{1, 3}, maxPacket+1), true},
		{sealed(shy, 104), true},
	} {
		write(t, peer, p.p)
		if p.quic {
			want = append(want, min(len(p.p), 1452))
		}
	}
	write(t, peer, []byte{0xff})
	var got []int
	from := peer.LocalAddr().(*net.UDPAddr).AddrPort()
	quicReads(t, s, 8, func(m ipv4.Message) {
		got = append(got, m.N)
		if m.Addr.(*net.UDPAddr).AddrPort() != from {
			t.Errorf("a packet of %d bytes comes from %v", m.N, m.Addr)
		}
		if cut := m.Flags&unix.MSG_TRUNC != 0; cut != (m.N == 1452) {
			t.Errorf("a packet of %d bytes: truncated is %v", m.N, cut)
		}
	})
	if !slices.Equal(got, want) {
		t.Errorf("QUIC got packets of %v bytes; want %v", got, want)
	}
	for _, n := range []int{100, 9, 1452, 9} {
		if a := came(t, "a claimed packet", taken); len(a.p) != n || a.from != (tunnel.Path{Remote: from}) {
			t.Errorf("the claim got %d bytes from %v; want %d", len(a.p), a.from, n)
		}
	}
	if len(taken) != 0 || len(third) != 1 || refused != 3 {
		t.Errorf("%d more for the first claim, %d for the third, %d refused by the second; want 0, 1, 3", len(taken), len(third), refused)
	}
}

// quic-go takes fewer packets at a time than are read.
func TestPacketsForQUICWaitForItsNextCall(t *testing.T) {
	s, f, peer := shared(t)
	id := [8]byte{5}
	taken := claimed(t, f, id)
	const sent = 50
	for i := range sent {
		write(t, peer, []byte{0x80, byte(i)})
		write(t, peer, sealed(id, 100+i))
	}
	write(t, peer, []byte{0xff})
	got := 0
	quicReads(t, s, 3, func(m ipv4.Message) {
		if m.N != 2 || int(m.Buffers[0][1]) != got {
			t.Fatalf("packet %d is another: % x", got, m.Buffers[0][:m.N])
		}
		got++
	})
	if got != sent || len(taken) != sent {
		t.Errorf("QUIC got %d, the claim %d; want %d each", got, len(taken), sent)
	}
}

// quic-go ends its reading goroutine by a deadline.
func TestAFloodOfClaimedPacketsDoesNotOutlastTheDeadline(t *testing.T) {
	s, f, peer := shared(t)
	id := [8]byte{5}
	got := 0
	if err := f.Claim(id, func([]byte, tunnel.Path) bool {
		if got++; got == 1 {
			s.SetReadDeadline(time.Unix(1, 0))
		}
		return true
	}); err != nil {
		t.Fatal(err)
	}
	for range 4 * batch {
		write(t, peer, sealed(id, 60))
	}
	if _, err := s.ReadBatch(messages(8), 0); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("ReadBatch: %v; want the deadline", err)
	}
	if got == 0 || got > batch {
		t.Errorf("%d packets were dealt with after the deadline; want no more than one batch of %d", got, batch)
	}
	write(t, peer, []byte{0xff})
	quicReads(t, s, 8, func(m ipv4.Message) { t.Errorf("QUIC got %d bytes", m.N) })
}

func TestDealingOutAllocatesNothing(t *testing.T) {
	s, f, _ := shared(t)
	id := [8]byte{5}
	if err := f.Claim(id, func([]byte, tunnel.Path) bool { return true }); err != nil {
		t.Fatal(err)
	}
	for i := range 4 {
		f.WatchReset([16]byte{byte(i)}, func() {})
	}
	from := netip.MustParseAddrPort("192.0.2.1:4000")
	for name, p := range map[string][]byte{"claimed": sealed(id, 200), "nobody's": sealed([8]byte{6}, 200), "long header": bytes.Repeat([]byte{0xc0}, 200)} {
		d := netio.Datagram{P: p, From: from}
		if n := testing.AllocsPerRun(100, func() { s.take(&d) }); n > 0 {
			t.Errorf("a packet, %s: %v allocations", name, n)
		}
	}
}

func TestClaimsComeAndGoWhilePacketsCome(t *testing.T) {
	s, c, _ := configs(t)
	key := [32]byte{7}
	l := listen(t, Config{TLS: s, StatelessResetKey: &key})
	client, server := carriers(t, l, dialer(t, c))
	id := func(i int) [8]byte { return [8]byte{byte(i)} }
	const ids = 4
	var over atomic.Bool
	var senders, claimers sync.WaitGroup
	senders.Go(func() {
		path := client.Flow().Path()
		for i := 0; !over.Load(); i++ {
			if err := client.Flow().Send(sealed(id(i%ids), 100), path); err != nil && err != tunnel.ErrBlocked {
				t.Error(err)
				return
			}
		}
	})
	for i := range ids {
		claimers.Go(func() {
			for round := range 50 {
				got := make(chan struct{}, 1)
				if err := server.Flow().Claim(id(i), func([]byte, tunnel.Path) bool {
					if round%2 == 0 {
						server.Flow().Release(id(i)) // within recv
					}
					select {
					case got <- struct{}{}:
					default:
					}
					return round%3 != 0
				}); err != nil {
					t.Error(err)
					return
				}
				select {
				case <-got:
				case <-time.After(testPatience):
					t.Error("a claim gets nothing")
					return
				}
				server.Flow().Release(id(i))
			}
		})
	}
	claimers.Wait()
	over.Store(true)
	senders.Wait()
	if err := works(client, server); err != nil {
		t.Error(err)
	}
	if f := &l.sock.flows; f.claims != (table[*claim]{}) || f.live != (table[int]{}) {
		t.Error("released claims are left")
	}
}

func TestAnErrorOfOneSendEndsNothing(t *testing.T) {
	s, c, _ := configs(t)
	l := listen(t, Config{TLS: s})
	client, server := carriers(t, l, dialer(t, c))
	f := client.Flow()
	id := [8]byte{3}
	got := claimed(t, server.Flow(), id)
	for to, want := range map[string]error{
		"127.0.0.1:0":       syscall.EINVAL,
		"[2001:db8::1]:443": syscall.EAFNOSUPPORT, // the socket is IPv4's
	} {
		if err := f.Send(sealed(id, 100), tunnel.Path{Remote: netip.MustParseAddrPort(to)}); !errors.Is(err, want) {
			t.Errorf("to %s: %v; want %v", to, err, want)
		}
	}
	if n := client.(*carrier).sock.failed.Load(); n != 0 {
		t.Errorf("%d packets were counted as refused for a while", n)
	}
	soon(t, "a sealed packet arrives", func() bool {
		if err := f.Send(sealed(id, 100), f.Path()); err != nil {
			t.Fatal(err)
		}
		return len(got) > 0
	})
	if err := works(client, server); err != nil {
		t.Error(err)
	}
}

func TestErrorsThatPassCountAsSent(t *testing.T) {
	s, c, _ := configs(t)
	l := listen(t, Config{TLS: s})
	client, _ := carriers(t, l, dialer(t, c))
	closed := udp(t)
	to := closed.LocalAddr().(*net.UDPAddr)
	closed.Close()
	// On a connected socket the ICMP error of one packet is the next one's errno.
	conn, err := net.DialUDP("udp4", nil, to)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	connected, err := newSocket(conn, Config{}, false)
	if err != nil {
		t.Fatal(err)
	}
	link := client.(*carrier).link
	f := &flow{link: link, all: &connected.flows}
	soon(t, "an errno is counted", func() bool {
		if err := f.Send(sealed([8]byte{3}, 100), tunnel.Path{Remote: to.AddrPort()}); err != nil {
			t.Fatal(err)
		}
		return link.sock.failed.Load() > 0
	})
}

// control makes one control message with a value of 1, 2 or 4 bytes.
func control(level, kind int32, value []byte) []byte {
	b := make([]byte, unix.CmsgSpace(len(value)))
	binary.NativeEndian.PutUint64(b, uint64(unix.CmsgLen(len(value))))
	head := unix.CmsgLen(0)
	binary.NativeEndian.PutUint32(b[head-8:], uint32(level))
	binary.NativeEndian.PutUint32(b[head-4:], uint32(kind))
	copy(b[head:], value)
	return b
}

// marks returns the ECN bits that control messages tell; -1: they do not.
func marks(t *testing.T, oob []byte) int {
	t.Helper()
	all, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range all {
		if m.Header.Level == unix.IPPROTO_IP && m.Header.Type == unix.IP_TOS {
			return int(m.Data[0] & 3)
		}
	}
	return -1
}

func option(t *testing.T, conn interface {
	SyscallConn() (syscall.RawConn, error)
}, level, name int) (value int) {
	t.Helper()
	raw, err := conn.SyscallConn()
	if err == nil {
		var failed error
		err = raw.Control(func(fd uintptr) { value, failed = unix.GetsockoptInt(int(fd), level, name) })
		err = errors.Join(err, failed)
	}
	if err != nil {
		t.Fatal(err)
	}
	return value
}

func setOption(t *testing.T, conn *net.UDPConn, level, name, value int) {
	t.Helper()
	raw, err := conn.SyscallConn()
	if err == nil {
		var failed error
		err = raw.Control(func(fd uintptr) { failed = unix.SetsockoptInt(int(fd), level, name, value) })
		err = errors.Join(err, failed)
	}
	if err != nil {
		t.Fatal(err)
	}
}

func TestQUICSetsItsOptionsOnTheSocketItself(t *testing.T) {
	s, _, _ := configs(t)
	l := listenAt(t, "udp4", "0.0.0.0:0", Config{TLS: s})
	for _, o := range []struct {
		what        string
		level, name int
		want        int
	}{
		{"packets are not fragmented", unix.IPPROTO_IP, unix.IP_MTU_DISCOVER, unix.IP_PMTUDISC_PROBE},
		{"ECN is read", unix.IPPROTO_IP, unix.IP_RECVTOS, 1},
		{"the address that was asked is read", unix.IPPROTO_IP, unix.IP_PKTINFO, 1},
	} {
		if got := option(t, l.sock, o.level, o.name); got != o.want {
			t.Errorf("%s: the option is %d; want %d", o.what, got, o.want)
		}
	}
}

func TestSegmentsArePassedToTheKernel(t *testing.T) {
	s, _, _ := shared(t)
	option(t, s, unix.IPPROTO_UDP, unix.UDP_SEGMENT) // fails before Linux 4.18
	sender, _, _ := shared(t)
	size := binary.NativeEndian.AppendUint16(nil, 500)
	p := bytes.Repeat([]byte{0x80}, 1400)
	p[len(p)-1] = 0xff
	n, _, err := sender.WriteMsgUDP(p, control(unix.IPPROTO_UDP, unix.UDP_SEGMENT, size), s.LocalAddr().(*net.UDPAddr))
	if n != len(p) || err != nil {
		t.Fatalf("%d, %v", n, err)
	}
	var got []int
	quicReads(t, s, 8, func(m ipv4.Message) { got = append(got, m.N) })
	if !slices.Equal(got, []int{500, 500}) {
		t.Errorf("before the last one came packets of %v bytes; want 500, 500", got)
	}
}

// A relay carries packets between two sockets and keeps their ECN bits. It
// counts the packets with a short header that come from the client, marked ECT(0) and not.
type relay struct {
	front, back  *net.UDPConn
	client       atomic.Pointer[net.UDPAddr]
	marked, bare atomic.Int64
	running      sync.WaitGroup
}

func newRelay(t *testing.T, server net.Addr) *relay {
	t.Helper()
	r := &relay{front: udp(t), back: udp(t)}
	for _, conn := range []*net.UDPConn{r.front, r.back} {
		setOption(t, conn, unix.IPPROTO_IP, unix.IP_RECVTOS, 1)
	}
	carry := func(from, to *net.UDPConn, where func(*net.UDPAddr) *net.UDPAddr, see func([]byte, int)) {
		p, oob := make([]byte, maxPacket), make([]byte, 128)
		for {
			n, oobn, _, addr, err := from.ReadMsgUDP(p, oob)
			if err != nil {
				return
			}
			ecn := marks(t, oob[:oobn])
			see(p[:n], ecn)
			if at := where(addr); at != nil {
				to.WriteMsgUDP(p[:n], control(unix.IPPROTO_IP, unix.IP_TOS, []byte{byte(max(ecn, 0))}), at)
			}
		}
	}
	r.running.Go(func() {
		carry(r.front, r.back, func(from *net.UDPAddr) *net.UDPAddr { r.client.Store(from); return server.(*net.UDPAddr) }, func(p []byte, ecn int) {
			switch {
			case len(p) == 0 || p[0]>>6 != 1:
			case ecn == 2: // ECT(0)
				r.marked.Add(1)
			default:
				r.bare.Add(1)
			}
		})
	})
	r.running.Go(func() {
		carry(r.back, r.front, func(*net.UDPAddr) *net.UDPAddr { return r.client.Load() }, func([]byte, int) {})
	})
	t.Cleanup(func() {
		r.front.Close()
		r.back.Close()
		r.running.Wait()
	})
	return r
}

// quic-go marks its first ten packets and goes on only when the other end has
// reported the marks: so both ends write and read them through our socket.
func TestECNWorksThroughTheSharedSocket(t *testing.T) {
	s, c, _ := configs(t)
	l := listen(t, Config{TLS: s})
	r := newRelay(t, l.Addr())
	cc, err := dialer(t, c).Dial(t.Context(), r.front.LocalAddr().String())
	if err != nil {
		t.Fatal(err)
	}
	client, err := cc.Carrier()
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close(nil)
	sc, err := l.Accept(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	server, err := sc.Carrier()
	if err != nil {
		t.Fatal(err)
	}
	defer server.Close(nil)
	soon(t, "packets are still marked after the ten of the test", func() bool {
		if err := works(client, server); err != nil {
			t.Fatal(err)
		}
		return r.marked.Load() > 40
	})
	t.Logf("%d marked, %d not", r.marked.Load(), r.bare.Load())
}

// A process that stood still finds sealed packets that are of no use any more.
// What QUIC does with its own is up to QUIC.
func TestClaimedPacketsThatHaveWaitedAreDropped(t *testing.T) {
	s, f, peer := shared(t)
	s.flows.age = 50 * time.Millisecond
	id := [8]byte{5}
	taken := claimed(t, f, id)
	for end := time.Now().Add(testPatience); f.Late() == 0; {
		write(t, peer, sealed(id, 100))
		write(t, peer, []byte{0x80, 1})
		time.Sleep(2 * s.flows.age) // nobody reads meanwhile
		write(t, peer, []byte{0xff})
		quic := 0
		quicReads(t, s, 3, func(ipv4.Message) { quic++ })
		if quic != 1 {
			t.Fatalf("QUIC got %d packets, want 1", quic)
		}
		// The kernel begins to note when packets come a while after it was asked to.
		if len(taken) > 0 {
			<-taken
			if time.Now().After(end) {
				t.Skip("this kernel does not note when packets come")
			}
		}
	}
	if len(taken) != 0 || f.Late() != 1 {
		t.Errorf("the claim got %d as well, %d were counted", len(taken), f.Late())
	}
}
