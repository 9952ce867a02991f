package rules

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"strings"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// A part is one condition or action: what nft calls it and what the kernel is
// given for it. Registers 1 and 2 hold 16 bytes each.
type part struct {
	text string
	expr func() ([]expr.Any, error)
}

func is(text string, e ...expr.Any) part {
	return part{text, func() ([]expr.Any, error) { return e, nil }}
}

// equal compares register 1.
func equal(b []byte) expr.Any { return &expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: b} }

// host writes a number as this machine has it in registers.
func host(n uint32) []byte { return binary.NativeEndian.AppendUint32(nil, n) }

func wire(n uint16) []byte { return binary.BigEndian.AppendUint16(nil, n) }

func counted() part { return is("counter", &expr.Counter{}) }

func verdict(v string) part {
	kinds := map[string]expr.VerdictKind{"accept": expr.VerdictAccept, "drop": expr.VerdictDrop, "return": expr.VerdictReturn, "jump": expr.VerdictJump, "goto": expr.VerdictGoto}
	kind, chain, _ := strings.Cut(v, " ")
	return is(v, &expr.Verdict{Kind: kinds[kind], Chain: chain})
}

func reset() part {
	return is("reject with tcp reset", &expr.Reject{Type: unix.NFT_REJECT_TCP_RST})
}

func onLoopback() part {
	return is(`iif "lo"`, &expr.Meta{Key: expr.MetaKeyIIF, Register: 1}, equal(host(1))) // lo is 1 in every namespace
}

func notLoopback() part {
	return is(`oif != "lo"`, &expr.Meta{Key: expr.MetaKeyOIF, Register: 1}, &expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: host(1)})
}

// ofThisMachine is a packet of a socket here: one that is passed on has no user.
func ofThisMachine() part {
	return is("meta skuid != "+number(uint32(nobody)), &expr.Meta{Key: expr.MetaKeySKUID, Register: 1}, &expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: host(nobody)})
}

// withBit is register 1, loaded by load, with a bit set.
func withBit(text string, load expr.Any, bit uint32) part {
	return is(fmt.Sprintf("%s & 0x%08x == 0x%08x", text, bit, bit), load,
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 4, Mask: host(bit), Xor: host(0)}, equal(host(bit)))
}

// plusBit is the same number with the bit set, for the mark that load names.
func plusBit(text string, load, store expr.Any, bit uint32) part {
	return is(fmt.Sprintf("%s set %s | 0x%08x", text, text, bit), load,
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 4, Mask: host(^bit), Xor: host(bit)}, store)
}

func marked(bit uint32) part {
	return withBit("meta mark", &expr.Meta{Key: expr.MetaKeyMARK, Register: 1}, bit)
}

func ctMarked(bit uint32) part {
	return withBit("ct mark", &expr.Ct{Key: expr.CtKeyMARK, Register: 1}, bit)
}

// ctUnmarked is a connection without the bit.
func ctUnmarked(bit uint32) part {
	return is(fmt.Sprintf("ct mark & 0x%08x == 0x00000000", bit), &expr.Ct{Key: expr.CtKeyMARK, Register: 1},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 4, Mask: host(bit), Xor: host(0)}, equal(host(0)))
}

func setMark(bit uint32) part {
	return plusBit("meta mark", &expr.Meta{Key: expr.MetaKeyMARK, Register: 1}, &expr.Meta{Key: expr.MetaKeyMARK, SourceRegister: true, Register: 1}, bit)
}

func setCTMark(bit uint32) part {
	return plusBit("ct mark", &expr.Ct{Key: expr.CtKeyMARK, Register: 1}, &expr.Ct{Key: expr.CtKeyMARK, SourceRegister: true, Register: 1}, bit)
}

func ctDirection(d string) part {
	n := map[string]byte{"original": 0, "reply": 1}[d]
	return is("ct direction "+d, &expr.Ct{Key: expr.CtKeyDIRECTION, Register: 1}, equal([]byte{n}))
}

func ofFamily(a netip.Addr) part {
	if a.Is4() {
		return is("meta nfproto ipv4", &expr.Meta{Key: expr.MetaKeyNFPROTO, Register: 1}, equal([]byte{unix.NFPROTO_IPV4}))
	}
	return is("meta nfproto ipv6", &expr.Meta{Key: expr.MetaKeyNFPROTO, Register: 1}, equal([]byte{unix.NFPROTO_IPV6}))
}

func l4(proto string) part {
	n := map[string]byte{"tcp": unix.IPPROTO_TCP, "udp": unix.IPPROTO_UDP, "icmp": unix.IPPROTO_ICMP, "ipv6-icmp": unix.IPPROTO_ICMPV6}[proto]
	return is("meta l4proto "+proto, &expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1}, equal([]byte{n}))
}

func userIs(uid uint32) part {
	return is("meta skuid "+number(uid), &expr.Meta{Key: expr.MetaKeySKUID, Register: 1}, equal(host(uid)))
}

func fibType(kind string) part {
	n := map[string]uint32{"local": unix.RTN_LOCAL, "broadcast": unix.RTN_BROADCAST, "multicast": unix.RTN_MULTICAST}[kind]
	return is("fib daddr type "+kind, &expr.Fib{Register: 1, FlagDADDR: true, ResultADDRTYPE: true}, equal(host(n)))
}

// to is a destination network, in the form that nft itself gives it: whole bytes
// where the length allows it.
func to(p netip.Prefix) []part {
	p = p.Masked()
	name, offset, size := "ip", uint32(16), 4
	if p.Addr().Is6() {
		name, offset, size = "ip6", 24, 16
	}
	family := ofFamily(p.Addr())
	if p.Bits() == 0 {
		return []part{family}
	}
	addr := p.Addr().AsSlice()
	var e []expr.Any
	if p.Bits()%8 == 0 {
		n := p.Bits() / 8
		e = []expr.Any{&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: uint32(n)}, equal(addr[:n])}
	} else {
		mask := make([]byte, size)
		for i := range p.Bits() {
			mask[i/8] |= 0x80 >> (i % 8)
		}
		e = []expr.Any{&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: uint32(size)},
			&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: uint32(size), Mask: mask, Xor: make([]byte, size)}, equal(addr)}
	}
	text := p.String()
	if p.IsSingleIP() {
		text = p.Addr().String()
	}
	family.text = "" // nft adds it itself to what follows
	return []part{family, is(name+" daddr "+text, e...)}
}

// port is the destination's port, of TCP or UDP.
func port(low, high uint16) part {
	load := &expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2}
	if low == high {
		return is("th dport "+number(low), load, equal(wire(low)))
	}
	return is(fmt.Sprintf("th dport %d-%d", low, high), load, &expr.Range{Op: expr.CmpOpEq, Register: 1, FromData: wire(low), ToData: wire(high)})
}

// notSYN is a TCP packet that does not open a connection.
func notSYN() part {
	const fin, syn, rst, ack = 1, 2, 4, 16
	return is("tcp flags & (fin | syn | rst | ack) != syn",
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: 13, Len: 1},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 1, Mask: []byte{fin | syn | rst | ack}, Xor: []byte{0}},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: []byte{syn}})
}

func tproxy(family netip.Addr, port uint16) part {
	text, f := fmt.Sprintf("tproxy ip to %s:%d", family, port), byte(unix.NFPROTO_IPV4)
	if family.Is6() {
		text, f = fmt.Sprintf("tproxy ip6 to [%s]:%d", family, port), unix.NFPROTO_IPV6
	}
	return is(text,
		&expr.Immediate{Register: 1, Data: family.AsSlice()}, &expr.Immediate{Register: 2, Data: wire(port)},
		&expr.TProxy{Family: f, TableFamily: byte(nftables.TableFamilyINet), RegAddr: 1, RegPort: 2})
}

// cgroupIs matches the socket's cgroup or one below it. The kernel compares
// numbers, so the cgroup must exist, and one that is made anew is another.
func cgroupIs(path string) part {
	level := strings.Count(path, "/") + 1
	return part{fmt.Sprintf(`socket cgroupv2 level %d "%s"`, level, path), func() ([]expr.Any, error) {
		id, err := CgroupID(path)
		if err != nil {
			return nil, err
		}
		return []expr.Any{&expr.Socket{Key: expr.SocketKeyCgroupv2, Level: uint32(level), Register: 1}, equal(binary.NativeEndian.AppendUint64(nil, id))}, nil
	}}
}
