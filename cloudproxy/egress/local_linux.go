package egress

import (
	"net/netip"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// localPrefixes are what the kernel takes for this host's beside the addresses of
// its interfaces: anycast addresses of its networks (RFC 4291 §2.6.1), where it is a
// router, and what a cloud's agent has routed here. Where the kernel does not tell,
// there are none.
func localPrefixes() []netip.Prefix {
	var all []netip.Prefix
	for _, family := range []int{unix.AF_INET, unix.AF_INET6} {
		routes, _ := netlink.RouteListFiltered(family, &netlink.Route{Table: unix.RT_TABLE_LOCAL}, netlink.RT_FILTER_TABLE)
		for _, r := range routes {
			if (r.Type != unix.RTN_LOCAL && r.Type != unix.RTN_ANYCAST) || r.Dst == nil {
				continue
			}
			a, ok := netip.AddrFromSlice(r.Dst.IP)
			bits, most := r.Dst.Mask.Size()
			if ok && most > 0 {
				if family == unix.AF_INET {
					a = a.Unmap()
				}
				all = append(all, netip.PrefixFrom(a, bits).Masked())
			}
		}
	}
	return all
}
