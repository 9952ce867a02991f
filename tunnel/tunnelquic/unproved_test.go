package tunnelquic

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/tls"
	"net"
	"net/netip"
	"sync/atomic"
	"testing"
	"time"
)

// A source sends what somebody sends who need not be there to read the answer.
type source struct {
	conn    *net.UDPConn
	in, out atomic.Int64 // bytes that the listener was sent, and that it sent
	answers atomic.Int64
	retries atomic.Int64
}

func newSource(t *testing.T, l *Listener) *source {
	t.Helper()
	conn, err := net.DialUDP("udp4", nil, l.Addr().(*net.UDPAddr))
	if err != nil {
		t.Fatal(err)
	}
	s := &source{conn: conn}
	done := make(chan struct{})
	go func() {
		defer close(done)
		b := make([]byte, 65536)
		for {
			n, err := conn.Read(b)
			if err != nil {
				return
			}
			s.out.Add(int64(n))
			s.answers.Add(1)
			if b[0]&0xf0 == 0xf0 { // a long header of type Retry (RFC 9000 §17.2.5)
				s.retries.Add(1)
			}
		}
	}()
	t.Cleanup(func() { conn.Close(); <-done })
	return s
}

func (s *source) send(p []byte) {
	s.in.Add(int64(len(p)))
	s.conn.Write(p)
}

// flight is the first datagrams of a connection that is dialled: its ClientHello
// takes two.
func flight(t *testing.T, c *tls.Config) [2][]byte {
	t.Helper()
	silent := udp(t)
	defer silent.Close()
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		dialer(t, c).Dial(ctx, silent.LocalAddr().String())
	}()
	var f [2][]byte
	for i := range f {
		b := make([]byte, 2000)
		silent.SetReadDeadline(time.Now().Add(testPatience))
		n, err := silent.Read(b)
		if err != nil {
			t.Fatal(err)
		}
		f[i] = b[:n]
	}
	cancel()
	<-ended
	return f
}

// RFC 9000 §8.1: who has not proved its address gets three times what it has
// sent at most, over the whole time that a handshake is open; and with many open
// it gets a Retry, which is shorter than what asked for it.
func TestAnAddressThatIsNotProvedGetsThreeTimesItsBytesAtMost(t *testing.T) {
	if testing.Short() {
		t.Skip("six seconds, in which handshakes time out")
	}
	s, c, _ := configs(t)
	reset := [32]byte{1}
	const limit, over = 64, 16
	l := listen(t, Config{TLS: s, StatelessResetKey: &reset}) // the defaults
	all := map[string][]*source{}
	from := func(kind string, packets ...[]byte) *source {
		one := newSource(t, l)
		all[kind] = append(all[kind], one)
		for _, p := range packets {
			one.send(p)
		}
		return one
	}
	unknown := append([]byte{0xc0, 0x1a, 0x2a, 0x3a, 0x4a, 8, 1, 2, 3, 4, 5, 6, 7, 8, 8, 1, 2, 3, 4, 5, 6, 7, 8}, make([]byte, 1200)...)
	short := func(n int) []byte {
		p := make([]byte, n)
		rand.Read(p)
		p[0] = 0x40 | p[0]&0x3f
		return p
	}
	first := flight(t, c)
	for range 50 {
		from("Version Negotiation", unknown[:1200])
		from("a version that is too short to be answered", unknown[:1199])
		for _, n := range []int{21, 41, 43, 100, 1200} {
			from("short headers of nobody", short(n))
		}
		from("an Initial that is too short", first[0][:1199])
		from("noise", func() []byte { p := make([]byte, 1200); rand.Read(p); return p }())
	}
	garbled := bytes.Clone(first[1])
	garbled[1000] ^= 1
	from("an Initial that is not authentic", garbled, garbled, garbled)

	for n := 0; l.handshakes.Load() < limit; n++ {
		f := flight(t, c)
		switch before := l.handshakes.Load(); {
		case n%3 == 0:
			from("half a ClientHello", f[0])
			soon(t, "it is counted", func() bool { return l.handshakes.Load() > before })
		case n%3 == 1:
			from("a whole ClientHello", f[0], f[1])
			soon(t, "it is counted", func() bool { return l.handshakes.Load() > before })
		default:
			from("a ClientHello twice", f[0], f[1], f[0], f[1])
			soon(t, "it is counted", func() bool { return l.handshakes.Load() > before })
		}
	}
	for range over {
		f := flight(t, c)
		one := from("with 64 handshakes open", f[0], f[1])
		soon(t, "a Retry", func() bool { return one.retries.Load() > 0 })
	}
	if n := l.handshakes.Load(); n < limit {
		t.Errorf("%d handshakes are open", n)
	}
	if n := l.Stats().Proved; n != 0 {
		t.Errorf("%d have proved their address", n)
	}
	soon(t, "every handshake has been given up", func() bool { return l.handshakes.Load() == 0 })
	for kind, sources := range all {
		var in, out, worst float64
		for _, one := range sources {
			i, o := float64(one.in.Load()), float64(one.out.Load())
			in, out, worst = in+i, out+o, max(worst, o/i)
			if o > 3*i {
				t.Errorf("%s: %v bytes were answered with %v in %d packets", kind, i, o, one.answers.Load())
			}
			if kind == "with 64 handshakes open" && (one.answers.Load() != one.retries.Load() || o > i/2) {
				t.Errorf("%s: %v bytes were answered with %v, %d packets, %d of them a Retry", kind, i, o, one.answers.Load(), one.retries.Load())
			}
		}
		t.Logf("%s: %d sources sent %.0f bytes and got %.0f, %.2f times as many, at most %.2f", kind, len(sources), in, out, out/in, worst)
	}
}

// Many addresses that only pretend to begin take no more memory than there is for
// them, and none of what is there for those that have begun.
func TestAddressesThatAreNotProvedAreBounded(t *testing.T) {
	u := &unproved{wanted: func() bool { return true }}
	at := func(n int) netip.AddrPort {
		return netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 0, byte(n >> 8), byte(n)}), 443)
	}
	p := make([]byte, minInitial)
	p[0] = 0xc0
	u.came(p, at(0))
	u.begun(at(0))
	u.tidied = time.Now()
	for n := 1; n < 3*maxUnproved; n++ {
		u.came(p, at(n))
	}
	if len(u.by) != maxUnproved {
		t.Errorf("%d addresses are remembered", len(u.by))
	}
	for _, e := range u.by {
		e.since = e.since.Add(-time.Minute)
	}
	u.tidied = time.Time{}
	u.came(p, at(3*maxUnproved)) // which tidies up
	if u.n.Load() != 2 || len(u.by) != 2 || u.by[at(0)] == nil {
		t.Errorf("%d addresses are left", len(u.by))
	}
	for _, c := range []struct {
		first byte
		bytes int
		to    netip.AddrPort
		want  bool
	}{
		{0xc0, 3*minInitial - 1, at(0), true}, {0xc0, 2, at(0), false}, {0xe0, 1, at(0), true}, {0xe0, 1, at(0), false},
		{0x40, 1 << 20, at(0), true}, // of a connection that has been proved
		{0xc0, 1 << 20, at(1), true}, // of whom nothing is known
	} {
		p := make([]byte, c.bytes)
		p[0] = c.first
		if got := u.may(p, c.to); got != c.want {
			t.Errorf("%d bytes that begin with %#x to %s: %v", c.bytes, c.first, c.to, got)
		}
	}
	u.over(at(0))
	if u.over(at(3 * maxUnproved)); len(u.by) != 0 || u.n.Load() != 0 {
		t.Errorf("%d addresses are left", len(u.by))
	}
}
