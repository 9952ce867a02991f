package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"sync"
	"time"
)

// association is the app's side of a SOCKS5 UDP ASSOCIATE (RFC 1928 §7), as a
// net.PacketConn: what an app that knows SOCKS5 has inside.
type association struct {
	*net.UDPConn // connected to the relay
	control      net.Conn

	mu  sync.Mutex // guards buf
	buf []byte
}

// associate asks the proxy for an association.
func associate(proxy string) (*association, error) {
	control, err := net.DialTimeout("tcp", proxy, 5*time.Second)
	if err != nil {
		return nil, err
	}
	relay, err := request(control)
	if err != nil {
		control.Close()
		return nil, fmt.Errorf("UDP ASSOCIATE at %s: %w", proxy, err)
	}
	udp, err := net.DialUDP("udp", nil, net.UDPAddrFromAddrPort(relay))
	if err != nil {
		control.Close()
		return nil, err
	}
	return &association{UDPConn: udp, control: control, buf: make([]byte, 65536)}, nil
}

func request(c net.Conn) (relay netip.AddrPort, err error) {
	c.SetDeadline(time.Now().Add(10 * time.Second))
	defer c.SetDeadline(time.Time{})
	var r [10]byte
	if _, err = c.Write([]byte{5, 1, 0}); err != nil {
		return relay, err
	}
	if _, err = io.ReadFull(c, r[:2]); err != nil {
		return relay, err
	}
	if r[1] != 0 {
		return relay, errors.New("the proxy wants authentication")
	}
	if _, err = c.Write([]byte{5, 3, 0, 1, 0, 0, 0, 0, 0, 0}); err != nil {
		return relay, err
	}
	if _, err = io.ReadFull(c, r[:]); err != nil {
		return relay, err
	}
	if r[1] != 0 || r[3] != 1 {
		return relay, fmt.Errorf("refused with reply %d", r[1])
	}
	return netip.AddrPortFrom(netip.AddrFrom4([4]byte(r[4:8])), binary.BigEndian.Uint16(r[8:])), nil
}

// WriteTo implements net.PacketConn.
func (a *association) WriteTo(p []byte, to net.Addr) (int, error) {
	at := to.(*net.UDPAddr).AddrPort()
	ip := at.Addr().Unmap()
	a.mu.Lock()
	defer a.mu.Unlock()
	b := append(a.buf[:0], 0, 0, 0)
	if ip.Is4() {
		b = append(append(b, 1), ip.AsSlice()...)
	} else {
		b = append(append(b, 4), ip.AsSlice()...)
	}
	b = append(binary.BigEndian.AppendUint16(b, at.Port()), p...)
	if _, err := a.UDPConn.Write(b); err != nil {
		return 0, err
	}
	return len(p), nil
}

// ReadFrom implements net.PacketConn.
func (a *association) ReadFrom(p []byte) (int, net.Addr, error) {
	b := make([]byte, len(p)+22)
	for {
		n, err := a.UDPConn.Read(b)
		if err != nil {
			return 0, nil, err
		}
		length := map[byte]int{1: 4, 4: 16}[b[3]]
		if n < 4+length+2 || length == 0 {
			continue
		}
		ip, _ := netip.AddrFromSlice(b[4 : 4+length])
		from := netip.AddrPortFrom(ip, binary.BigEndian.Uint16(b[4+length:]))
		return copy(p, b[4+length+2:n]), net.UDPAddrFromAddrPort(from), nil
	}
}

// Close ends the association: the proxy ends it with the control connection.
func (a *association) Close() error {
	return errors.Join(a.control.Close(), a.UDPConn.Close())
}
