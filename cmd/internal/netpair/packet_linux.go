package netpair

import (
	"encoding/binary"
	"net/netip"

	"golang.org/x/sys/unix"
)

// header is what an IP packet says of itself.
type header struct {
	protocol int // -1: it has no segment's beginning
	src, dst netip.Addr
	segment  []byte // of which the end may be missing
}

// read reads the packet of an Ethernet type, of which the end may be missing.
// Without a source it was none of IP.
func read(kind uint16, p []byte) header {
	h := header{protocol: -1}
	switch {
	case kind == unix.ETH_P_IP && len(p) >= 20 && len(p) >= int(p[0]&15)*4:
		h.src, h.dst = netip.AddrFrom4([4]byte(p[12:])), netip.AddrFrom4([4]byte(p[16:]))
		h.protocol, h.segment = int(p[9]), p[int(p[0]&15)*4:]
		if binary.BigEndian.Uint16(p[6:])&0x1fff != 0 { // RFC 791 §3.1: not the first fragment
			h.protocol = -1
		}
	case kind == unix.ETH_P_IPV6 && len(p) >= 40:
		h.src, h.dst = netip.AddrFrom16([16]byte(p[8:])), netip.AddrFrom16([16]byte(p[24:]))
		h.protocol, h.segment = int(p[6]), p[40:]
		// Multicast listener reports have a hop-by-hop header (RFC 3810 §5).
		if s := h.segment; h.protocol == 0 && len(s) >= 8 && len(s) >= 8+8*int(s[1]) {
			h.protocol, h.segment = int(s[0]), s[8+8*int(s[1]):]
		}
	}
	return h
}
