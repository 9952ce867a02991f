package link

import (
	"encoding/binary"
	"net"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// packet is an IPv4 packet of n bytes from one port to another.
func packet(protocol byte, from, to uint16, n int) []byte {
	p := make([]byte, n)
	p[0], p[9] = 0x45, protocol
	binary.BigEndian.PutUint16(p[20:], from)
	binary.BigEndian.PutUint16(p[22:], to)
	p[26], p[27] = 1, 2 // a checksum
	return p
}

func TestWhatPasses(t *testing.T) {
	for name, test := range map[string]struct {
		settings  Settings
		short     bool // a short UDP packet passes
		long, tcp bool
	}{
		"all":           {Settings{}, true, true, true},
		"no UDP":        {Settings{NoUDP: true}, false, false, true},
		"no TCP":        {Settings{NoTCP: true}, true, true, false},
		"nothing":       {Settings{Down: true}, false, false, false},
		"short UDP":     {Settings{MaxUDP: 1000}, true, false, true},
		"a rate's room": {Settings{UDPRate: 1e6, Queue: time.Millisecond}, true, false, true}, // the first fills it
	} {
		t.Run(name, func(t *testing.T) {
			l, now := &Link{settings: test.settings, nat: newNAT()}, time.Unix(1, 0)
			if _, passes := l.take(packet(tcp, 1, 2, 1400), toFar, now); passes != test.tcp {
				t.Errorf("TCP passes: %v", passes)
			}
			if _, passes := l.take(packet(udp, 1, 2, 1000), toFar, now); passes != test.short {
				t.Errorf("a short one passes: %v", passes)
			}
			if _, passes := l.take(packet(udp, 1, 2, 1001), toFar, now); passes != test.long {
				t.Errorf("a long one passes: %v", passes)
			}
		})
	}
}

func TestARateHoldsUDPAlone(t *testing.T) {
	// 1,000 bytes at 8 Mbit/s take 1 ms.
	l, now := &Link{settings: Settings{Delay: 20 * time.Millisecond, UDPRate: 8e6, Queue: time.Second}, nat: newNAT()}, time.Unix(1, 0)
	for i := range 3 {
		if due, _ := l.take(packet(udp, 1, 2, 1000), toFar, now); due.Sub(now) != time.Duration(21+i)*time.Millisecond {
			t.Errorf("packet %d is due after %v", i, due.Sub(now))
		}
	}
	for _, direction := range []int{toFar, toNear} {
		if due, _ := l.take(packet(tcp, 1, 2, 1000), direction, now); due.Sub(now) != 20*time.Millisecond {
			t.Errorf("TCP is due after %v", due.Sub(now))
		}
	}
}

func TestANATThatForgets(t *testing.T) {
	l, now := &Link{nat: newNAT()}, time.Unix(1, 0)
	send := func() uint16 {
		p := packet(udp, 5000, 443, 100)
		if _, passes := l.take(p, toFar, now); !passes {
			t.Fatal("a packet outwards is dropped")
		}
		return binary.BigEndian.Uint16(p[20:])
	}
	answer := func(port uint16) bool {
		p := packet(udp, 443, port, 100)
		_, passes := l.take(p, toNear, now)
		if to := binary.BigEndian.Uint16(p[22:]); passes && to != 5000 {
			t.Errorf("an answer goes to port %d", to)
		}
		return passes
	}
	if p := send(); p != 5000 || !answer(p) {
		t.Errorf("before it is rebound the port is %d", p)
	}
	l.Rebind()
	if answer(5000) {
		t.Error("what is sent to the port from before arrives")
	}
	first := send()
	if first == 5000 || send() != first || !answer(first) {
		t.Errorf("the port is %d, then another", first)
	}
	l.Rebind()
	if second := send(); second == first || answer(first) || !answer(second) {
		t.Errorf("the port is %d, then %d", first, second)
	}
}

func TestCounts(t *testing.T) {
	l, now := &Link{settings: Settings{Down: true}, nat: newNAT()}, time.Unix(1, 0)
	long, syn, answer := packet(udp, 1, 2, 100), packet(tcp, 1, 2, 60), packet(tcp, 1, 2, 60)
	long[28], syn[33], answer[33] = 0xc0, 0x02, 0x12
	for _, p := range [][]byte{long, syn, answer, packet(udp, 1, 2, 100), nil, {0x45}, make([]byte, 20)} {
		l.take(p, toFar, now)
		l.take(p, toNear, now)
	}
	if got, want := l.Counts(), (Counts{UDP: 2, TCP: 2, QUICLong: 1, SYN: 1}); got != want {
		t.Errorf("counted %+v, want %+v", got, want)
	}
}

func TestALinkCarriesBothWaysUntilItsDevicesAreClosed(t *testing.T) {
	near, a := net.Pipe()
	far, b := net.Pipe()
	l := New(a, b, Settings{})
	for _, ends := range [][2]net.Conn{{near, far}, {far, near}} {
		if _, err := ends[0].Write(packet(udp, 1, 2, 100)); err != nil {
			t.Fatal(err)
		}
		if n, err := ends[1].Read(make([]byte, 200)); n != 100 || err != nil {
			t.Fatalf("%d bytes, %v", n, err)
		}
	}
	for _, c := range []net.Conn{near, far, a, b} {
		c.Close()
	}
	l.Close()
}

func TestWhatTheRateHoldsHoldsNothingElse(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		near, a := net.Pipe()
		far, b := net.Pipe()
		// One packet of UDP takes a minute.
		l := New(a, b, Settings{UDPRate: 800 / time.Minute.Seconds(), Queue: time.Minute})
		began := time.Now()
		for _, p := range [][]byte{packet(udp, 1, 2, 100), packet(tcp, 1, 2, 100)} {
			if _, err := near.Write(p); err != nil {
				t.Fatal(err)
			}
		}
		for _, want := range []struct {
			protocol byte
			after    time.Duration
		}{{tcp, 0}, {udp, time.Minute}} {
			got := make([]byte, 200)
			n, err := far.Read(got)
			if took := time.Since(began); n != 100 || err != nil || protocol(got) != want.protocol || took != want.after {
				t.Errorf("%d bytes of protocol %d after %v, %v; want %+v", n, protocol(got), took, err, want)
			}
		}
		for _, c := range []net.Conn{near, far, a, b} {
			c.Close()
		}
		l.Close()
	})
}
