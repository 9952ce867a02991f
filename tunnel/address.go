package tunnel

import (
	"net"
	"net/netip"
	"net/url"
	"strings"
)

// ParseAddress reads a cloud proxy's address: HOST:PORT, or wss://HOST[:PORT]/PATH
// where it is reached by WebSocket. It returns the host and port, and the URL; nil
// for HOST:PORT. The error's code is ConfigInvalid.
func ParseAddress(s string) (Target, *url.URL, error) {
	if !strings.Contains(s, "://") {
		t, err := ParseTarget(s)
		return t, nil, err
	}
	u, err := url.Parse(s)
	if err != nil || u.Scheme != "wss" || u.User != nil || u.Opaque != "" || u.RawQuery != "" || u.Fragment != "" || len(s) > 512 {
		return Target{}, nil, Errorf(ConfigInvalid, "%.60q is no address of a cloud proxy; write HOST:PORT, or wss://HOST/PATH for a WebSocket", s)
	}
	port := u.Port()
	if port == "" {
		port = "443"
	}
	t, err := ParseTarget(net.JoinHostPort(u.Hostname(), port))
	return t, u, err
}

// AddrPortOf returns an address of TCP or UDP as a value, IPv4 always as such; the
// zero AddrPort: it is of something else.
func AddrPortOf(a net.Addr) netip.AddrPort {
	at, ok := a.(interface{ AddrPort() netip.AddrPort }) // *net.TCPAddr, *net.UDPAddr
	if !ok {
		return netip.AddrPort{}
	}
	ap := at.AddrPort()
	return netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port())
}
