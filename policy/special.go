package policy

import (
	"net/netip"

	"github.com/gaissmai/bart"
)

// A block is a part of the address space that is not the public Internet.
type block struct {
	prefix netip.Prefix
	class  string
	// exact blocks are lifted only by listing their own prefix.
	exact bool
	// inner finds the IPv4 address inside the IPv6 form; nil: there is none.
	inner func(netip.Addr) netip.Addr
	// translates says that a packet really goes to that IPv4 address, so that
	// allow rules for it count too. Deny rules for it count in any case.
	translates bool

	refusal, innerRefusal string // whole reasons, made once
}

// blocks follows the IANA special-purpose registries (RFC 6890 and its
// updates), and adds the metadata services of clouds. The longest prefix
// counts. A block without a class is public.
var blocks = []block{
	{prefix: netip.MustParsePrefix("0.0.0.0/8"), class: "this network (0.0.0.0/8)"},
	{prefix: netip.MustParsePrefix("10.0.0.0/8"), class: "private (RFC 1918)"},
	{prefix: netip.MustParsePrefix("100.64.0.0/10"), class: "carrier NAT (RFC 6598)"},
	{prefix: netip.MustParsePrefix("100.100.100.200/32"), class: "metadata service", exact: true}, // Alibaba Cloud
	{prefix: netip.MustParsePrefix("127.0.0.0/8"), class: "loopback"},
	{prefix: netip.MustParsePrefix("168.63.129.16/32"), class: "metadata service", exact: true}, // Azure
	{prefix: netip.MustParsePrefix("169.254.0.0/16"), class: "link-local"},
	{prefix: netip.MustParsePrefix("169.254.169.254/32"), class: "metadata service", exact: true},
	{prefix: netip.MustParsePrefix("169.254.170.2/32"), class: "metadata service", exact: true},  // AWS ECS
	{prefix: netip.MustParsePrefix("169.254.170.23/32"), class: "metadata service", exact: true}, // AWS EKS
	{prefix: netip.MustParsePrefix("172.16.0.0/12"), class: "private (RFC 1918)"},
	{prefix: netip.MustParsePrefix("192.0.0.0/24"), class: "protocol assignments (RFC 6890)"},
	{prefix: netip.MustParsePrefix("192.0.0.192/32"), class: "metadata service", exact: true}, // Oracle Cloud
	{prefix: netip.MustParsePrefix("192.0.2.0/24"), class: "documentation (TEST-NET-1)"},
	{prefix: netip.MustParsePrefix("192.88.99.0/24"), class: "6to4 relay (RFC 7526)"},
	{prefix: netip.MustParsePrefix("192.168.0.0/16"), class: "private (RFC 1918)"},
	{prefix: netip.MustParsePrefix("198.18.0.0/15"), class: "benchmarks (RFC 2544)"},
	{prefix: netip.MustParsePrefix("198.51.100.0/24"), class: "documentation (TEST-NET-2)"},
	{prefix: netip.MustParsePrefix("203.0.113.0/24"), class: "documentation (TEST-NET-3)"},
	{prefix: netip.MustParsePrefix("224.0.0.0/4"), class: "multicast"},
	{prefix: netip.MustParsePrefix("240.0.0.0/4"), class: "reserved (240.0.0.0/4)"},
	{prefix: netip.MustParsePrefix("255.255.255.255/32"), class: "broadcast"},

	// All public IPv6 unicast is inside 2000::/3.
	{prefix: netip.MustParsePrefix("::/0"), class: "reserved (not in 2000::/3)"},
	{prefix: netip.MustParsePrefix("2000::/3")},
	{prefix: netip.MustParsePrefix("::/96"), class: "IPv4-compatible", inner: bytesAt(12)},
	{prefix: netip.MustParsePrefix("::/128"), class: "unspecified"},
	{prefix: netip.MustParsePrefix("::1/128"), class: "loopback"},
	{prefix: netip.MustParsePrefix("::ffff:0:0/96"), class: "IPv4-mapped", inner: bytesAt(12), translates: true},
	{prefix: netip.MustParsePrefix("::ffff:0:0:0/96"), class: "IPv4-translated (RFC 2765)", inner: bytesAt(12), translates: true},
	{prefix: netip.MustParsePrefix("64:ff9b::/96"), class: "NAT64 (RFC 6052)", inner: bytesAt(12), translates: true},
	// Where the IPv4 address is in this one depends on the network's own
	// prefix length (RFC 8215), so it is judged only as it stands.
	{prefix: netip.MustParsePrefix("64:ff9b:1::/48"), class: "local NAT64 (RFC 8215)"},
	{prefix: netip.MustParsePrefix("100::/64"), class: "discard (RFC 6666)"},
	{prefix: netip.MustParsePrefix("2001::/23"), class: "protocol assignments (RFC 2928)"},
	{prefix: netip.MustParsePrefix("2001::/32"), class: "Teredo", inner: teredoClient},
	{prefix: netip.MustParsePrefix("2001:db8::/32"), class: "documentation (RFC 3849)"},
	{prefix: netip.MustParsePrefix("2002::/16"), class: "6to4", inner: bytesAt(2)},
	{prefix: netip.MustParsePrefix("3fff::/20"), class: "documentation (RFC 9637)"},
	{prefix: netip.MustParsePrefix("5f00::/16"), class: "segment routing (RFC 9602)"},
	{prefix: netip.MustParsePrefix("fc00::/7"), class: "private (unique local)"},
	{prefix: netip.MustParsePrefix("fd00:ec2::254/128"), class: "metadata service", exact: true}, // AWS
	{prefix: netip.MustParsePrefix("fd20:ce::254/128"), class: "metadata service", exact: true},  // Google Cloud
	{prefix: netip.MustParsePrefix("fe80::/10"), class: "link-local"},
	{prefix: netip.MustParsePrefix("fec0::/10"), class: "site-local (RFC 3879)"},
	{prefix: netip.MustParsePrefix("ff00::/8"), class: "multicast"},
}

// zoned is for addresses with a zone: it means an interface of one machine
// and so nothing at the other end of a tunnel. It can not be listed.
var zoned = &block{
	class:   "address with a zone",
	refusal: "an address with a zone means an interface of one machine",
}

// classes finds the block of an address. It is written once and then only read.
var classes = classTable()

func classTable() *bart.Table[*block] {
	t := new(bart.Table[*block])
	for i := range blocks {
		b := &blocks[i]
		b.refusal = "it is a special address, " + b.class + ", that the policy does not list under special"
		b.innerRefusal = "the IPv4 address inside it is special, " + b.class + ", and the policy does not list that under special"
		t.Insert(b.prefix, b)
	}
	return t
}

// Special reports whether an address is not part of the public Internet, and
// which kind it is: "loopback", "private (RFC 1918)", ... An IPv6 form that
// holds an IPv4 address (mapped, NAT64, ...) is special by its form, whatever
// it holds. The zero Addr is not special.
func Special(a netip.Addr) (class string, special bool) {
	b := classify(a)
	if b == nil {
		return "", false
	}
	return b.class, true
}

// classify returns nil for public addresses.
func classify(a netip.Addr) *block {
	if a.Zone() != "" {
		return zoned
	}
	b, ok := classes.Lookup(a)
	if !ok || b.class == "" {
		return nil
	}
	return b
}

// overlapsSpecial reports whether some special address is in the prefix.
func overlapsSpecial(p netip.Prefix) bool {
	if classify(p.Addr()) != nil {
		return true
	}
	for i := range blocks {
		if blocks[i].class != "" && p.Bits() <= blocks[i].prefix.Bits() && p.Contains(blocks[i].prefix.Addr()) {
			return true
		}
	}
	return false
}

func bytesAt(i int) func(netip.Addr) netip.Addr {
	return func(a netip.Addr) netip.Addr {
		b := a.As16()
		return netip.AddrFrom4([4]byte(b[i : i+4]))
	}
}

// teredoClient returns the client's address, which is stored inverted (RFC 4380 §4).
func teredoClient(a netip.Addr) netip.Addr {
	b := a.As16()
	return netip.AddrFrom4([4]byte{^b[12], ^b[13], ^b[14], ^b[15]})
}
