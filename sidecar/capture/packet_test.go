package capture

import (
	"bytes"
	"encoding/binary"
	"net/netip"
	"testing"
)

// plainSum is RFC 1071 as its section 4.1 has it.
func plainSum(b []byte) uint16 {
	sum := uint32(0)
	for ; len(b) > 1; b = b[2:] {
		sum += uint32(b[0])<<8 | uint32(b[1])
	}
	if len(b) > 0 {
		sum += uint32(b[0]) << 8
	}
	for sum>>16 != 0 {
		sum = sum&0xffff + sum>>16
	}
	return ^uint16(sum)
}

// whole is what an IPv6 checksum is over.
func whole(p []byte) []byte {
	pseudo := append([]byte(nil), p[8:40]...)
	pseudo = binary.BigEndian.AppendUint32(pseudo, uint32(len(p)-40))
	return append(append(pseudo, 0, 0, 0, p[6]), p[40:]...)
}

func FuzzChecksum(f *testing.F) {
	f.Add([]byte(nil))
	f.Add([]byte{1})
	f.Add(bytes.Repeat([]byte{0xff}, 41))
	f.Add([]byte("\x00\x00\x00\x00\xff\xff\xff\xff\xff\xff\xff\xff\x00\x01\x02"))
	f.Fuzz(func(t *testing.T, b []byte) {
		if got, want := checksum(b, 0), plainSum(b); got != want && got|want != 0xffff {
			t.Errorf("%x, want %x", got, want)
		}
	})
}

func TestADatagramForAnAppIsAWholePacket(t *testing.T) {
	for name, c := range map[string]struct {
		from, to string
		size     int
		ok       bool
	}{
		"IPv4":              {"203.0.113.9:3478", "10.1.2.3:50000", 800, true},
		"IPv4, empty":       {"203.0.113.9:3478", "10.1.2.3:50000", 0, true},
		"IPv4, the longest": {"203.0.113.9:3478", "10.1.2.3:50000", 65507, true},
		"IPv4, too long":    {"203.0.113.9:3478", "10.1.2.3:50000", 65508, false},
		"IPv6":              {"[2001:db8::9]:3478", "[fd00::1]:50000", 801, true},
		"IPv6, the longest": {"[2001:db8::9]:3478", "[fd00::1]:50000", 65527, true},
		"IPv6, too long":    {"[2001:db8::9]:3478", "[fd00::1]:50000", 65528, false},
		"two families":      {"203.0.113.9:3478", "[fd00::1]:50000", 10, false},
	} {
		t.Run(name, func(t *testing.T) {
			from, to := netip.MustParseAddrPort(c.from), netip.MustParseAddrPort(c.to)
			payload := bytes.Repeat([]byte{0xa5, 3, 7}, c.size/3+1)[:c.size]
			p, ok := appendUDP(nil, from, to, payload)
			if ok != c.ok {
				t.Fatalf("made: %v", ok)
			}
			if !ok {
				return
			}
			if !bytes.HasSuffix(p, payload) {
				t.Error("the payload is not at its end")
			}
			if from.Addr().Is6() {
				if sum := plainSum(whole(p)); sum != 0 {
					t.Errorf("its checksum is wrong by %x", sum)
				}
			}
			udp := p[len(p)-len(payload)-8:]
			if binary.BigEndian.Uint16(udp) != from.Port() || binary.BigEndian.Uint16(udp[2:]) != to.Port() || int(binary.BigEndian.Uint16(udp[4:])) != 8+c.size {
				t.Errorf("UDP header % x", udp[:8])
			}
		})
	}
}

// An IPv6 datagram whose sum is 0 says 0xffff: 0 would be no checksum.
func TestAChecksumOfZeroIsNotLeftOut(t *testing.T) {
	from, to := netip.MustParseAddrPort("[2001:db8::9]:3478"), netip.MustParseAddrPort("[fd00::1]:50000")
	for i := range 1 << 16 {
		p, _ := appendUDP(nil, from, to, []byte{byte(i >> 8), byte(i)})
		if sum := binary.BigEndian.Uint16(p[46:]); sum == 0 {
			t.Fatalf("payload %x has none", i)
		}
	}
}

func TestUnreachableQuotesWhatWasSent(t *testing.T) {
	for name, c := range map[string]struct {
		app, to string
		code    byte
	}{
		"IPv4": {"10.1.2.3:50000", "203.0.113.9:3478", 3},
		"IPv6": {"[fd00::1]:50000", "[2001:db8::9]:3478", 4},
	} {
		t.Run(name, func(t *testing.T) {
			app, to := netip.MustParseAddrPort(c.app), netip.MustParseAddrPort(c.to)
			p, ok := appendUnreachable(nil, app, to, reasonPort)
			if !ok {
				t.Fatal("not made")
			}
			icmp, sum, quoted := p[20:], plainSum(p[20:]), p[48:]
			if app.Addr().Is6() {
				icmp, sum, quoted = p[40:], plainSum(whole(p)), p[88:]
			}
			if sum != 0 || icmp[1] != c.code {
				t.Errorf("code %d, the checksum is wrong by %x", icmp[1], sum)
			}
			if len(quoted) != 8 || binary.BigEndian.Uint16(quoted) != app.Port() || binary.BigEndian.Uint16(quoted[2:]) != to.Port() {
				t.Errorf("quoted % x", quoted)
			}
		})
	}
	if _, ok := appendUnreachable(nil, netip.MustParseAddrPort("10.1.2.3:5"), netip.AddrPort{}, reasonPort); ok {
		t.Error("made for no address at all")
	}
}
