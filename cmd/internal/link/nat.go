package link

import "encoding/binary"

// A nat gives the near end's UDP flows other source ports. Until it has been
// rebound for the first time it leaves all as it is.
type nat struct {
	began bool
	next  uint16            // the port for the next flow
	out   map[uint16]uint16 // the near end's port to the one that the far end sees
	back  map[uint16]uint16
}

// Ports that are given, of the range for dynamic ones (RFC 6335 §6); they come
// round again after sixteen thousand flows.
const firstPort = 49152

func newNAT() nat {
	return nat{next: firstPort, out: map[uint16]uint16{}, back: map[uint16]uint16{}}
}

func (n *nat) rebind() {
	n.began = true
	clear(n.out)
	clear(n.back)
}

// translate changes a UDP packet's ports, or says that it belongs to no flow.
func (n *nat) translate(p []byte, direction int) bool {
	s := segment(p)
	if !n.began || s == nil {
		return true
	}
	if direction == toNear {
		port, known := n.back[binary.BigEndian.Uint16(s[2:])]
		binary.BigEndian.PutUint16(s[2:], port)
		s[6], s[7] = 0, 0
		return known
	}
	inside := binary.BigEndian.Uint16(s)
	port, known := n.out[inside]
	if !known {
		port = n.next
		if n.next++; n.next < firstPort { // it has wrapped
			n.next = firstPort
		}
		n.out[inside], n.back[port] = port, inside
	}
	binary.BigEndian.PutUint16(s, port)
	s[6], s[7] = 0, 0 // RFC 768: no checksum
	return true
}
