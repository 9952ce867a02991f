package egress

import (
	"net/netip"
	"syscall"
	"testing"

	"culvert/tunnel"
)

// The broadcast address of a network of this host looks like that of any host.
func TestSocketsDoNotBroadcast(t *testing.T) {
	e := newEgress(t, Config{})
	p, _ := associate(t, e, tunnel.Peer{})
	send(t, p, "", netip.MustParseAddrPort("127.0.0.1:9")) // makes the socket
	var on int
	var err error
	cerr := p.(*association).sockets[0].Load().conn.Control(func(fd uintptr) {
		on, err = syscall.GetsockoptInt(int(fd), syscall.SOL_SOCKET, syscall.SO_BROADCAST)
	})
	if err != nil || cerr != nil || on != 0 {
		t.Errorf("SO_BROADCAST is %d, %v, %v", on, err, cerr)
	}
}
