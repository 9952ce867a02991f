// Package socks5 is the app's side of SOCKS5 (RFC 1928), as far as the load
// program needs it: CONNECT, and UDP ASSOCIATE with its datagram header.
//
// It does no authentication, no fragments and no BIND.
package socks5

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"time"
)

const (
	version   = 5
	noAuth    = 0
	connect   = 1
	associate = 3
)

// patience is how long a proxy may take to answer.
const patience = 15 * time.Second

// Connect returns a connection to target through the proxy, or straight to it
// where proxy is the zero value.
func Connect(proxy, target netip.AddrPort) (net.Conn, error) {
	if !proxy.IsValid() {
		return net.DialTimeout("tcp", target.String(), patience)
	}
	c, _, err := request(proxy, connect, target)
	return c, err
}

// Flow is one UDP association, or a plain socket where there is no proxy.
// One goroutine may send while another receives.
type Flow struct {
	control net.Conn // nil without a proxy; the association ends with it
	udp     *net.UDPConn
	header  []byte // before each datagram that is sent
}

// Open makes an association at the proxy for datagrams to target, or a plain
// socket where proxy is the zero value.
func Open(proxy, target netip.AddrPort) (*Flow, error) {
	f := &Flow{}
	to := target
	if proxy.IsValid() {
		c, bound, err := request(proxy, associate, netip.AddrPortFrom(netip.IPv4Unspecified(), 0))
		if err != nil {
			return nil, err
		}
		if bound.Addr().IsUnspecified() { // RFC 1928 leaves it open; all take it as the proxy's own address
			bound = netip.AddrPortFrom(proxy.Addr(), bound.Port())
		}
		f.control, to = c, bound
		f.header = appendAddr([]byte{0, 0, 0}, target)
	}
	udp, err := net.DialUDP("udp", nil, net.UDPAddrFromAddrPort(to))
	if err != nil {
		f.Close()
		return nil, err
	}
	f.udp = udp
	return f, nil
}

// SetBuffers asks for n bytes of kernel buffer in each direction.
func (f *Flow) SetBuffers(n int) {
	// What the kernel gives is its own decision (net.core.rmem_max).
	_ = f.udp.SetReadBuffer(n)
	_ = f.udp.SetWriteBuffer(n)
}

// Buffer returns a datagram of the flow and the part of it that is the
// payload, size bytes long: fill that and Write the whole.
func (f *Flow) Buffer(size int) (datagram, payload []byte) {
	datagram = make([]byte, len(f.header)+size)
	n := copy(datagram, f.header)
	return datagram, datagram[n:]
}

// Write sends a datagram that Buffer made.
func (f *Flow) Write(datagram []byte) error {
	_, err := f.udp.Write(datagram)
	return err
}

// Read waits until the deadline for a datagram; the payload lies in b.
func (f *Flow) Read(b []byte, deadline time.Time) ([]byte, error) {
	if err := f.udp.SetReadDeadline(deadline); err != nil {
		return nil, err
	}
	n, err := f.udp.Read(b)
	if err != nil {
		return nil, err
	}
	if f.control == nil {
		return b[:n], nil
	}
	return payload(b[:n])
}

// Close ends the association.
func (f *Flow) Close() {
	if f.udp != nil {
		f.udp.Close()
	}
	if f.control != nil {
		f.control.Close()
	}
}

var errHeader = errors.New("socks5: a datagram with a bad header")

// payload takes off the header: two reserved bytes, the fragment number, the address.
func payload(b []byte) ([]byte, error) {
	if len(b) < 4 || b[2] != 0 {
		return nil, errHeader
	}
	var addr int
	switch b[3] {
	case 1:
		addr = 4
	case 4:
		addr = 16
	case 3:
		if len(b) < 5 {
			return nil, errHeader
		}
		addr = 1 + int(b[4])
	default:
		return nil, errHeader
	}
	head := 4 + addr + 2
	if len(b) < head {
		return nil, errHeader
	}
	return b[head:], nil
}

func appendAddr(b []byte, a netip.AddrPort) []byte {
	if ip := a.Addr().Unmap(); ip.Is4() {
		b = append(append(b, 1), ip.AsSlice()...)
	} else {
		b = append(append(b, 4), ip.AsSlice()...)
	}
	return binary.BigEndian.AppendUint16(b, a.Port())
}

// request does the greeting and one request; it returns what the proxy bound.
func request(proxy netip.AddrPort, command byte, target netip.AddrPort) (_ net.Conn, bound netip.AddrPort, err error) {
	c, err := net.DialTimeout("tcp", proxy.String(), patience)
	if err != nil {
		return nil, bound, err
	}
	defer func() {
		if err != nil {
			c.Close()
			err = fmt.Errorf("the proxy at %s: %w", proxy, err)
		}
	}()
	if err := c.SetDeadline(time.Now().Add(patience)); err != nil {
		return nil, bound, err
	}
	if _, err := c.Write([]byte{version, 1, noAuth}); err != nil {
		return nil, bound, err
	}
	var method [2]byte
	if _, err := io.ReadFull(c, method[:]); err != nil {
		return nil, bound, err
	}
	if method != [2]byte{version, noAuth} {
		return nil, bound, fmt.Errorf("it answered the greeting with % x", method)
	}
	if _, err := c.Write(appendAddr([]byte{version, command, 0}, target)); err != nil {
		return nil, bound, err
	}
	bound, err = reply(c)
	if err != nil {
		return nil, bound, err
	}
	return c, bound, c.SetDeadline(time.Time{})
}

// reply reads VER REP RSV ATYP BND.ADDR BND.PORT. A name as BND.ADDR is refused.
func reply(r io.Reader) (netip.AddrPort, error) {
	var head [4]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return netip.AddrPort{}, err
	}
	if head[0] != version || head[1] != 0 {
		return netip.AddrPort{}, fmt.Errorf("it refused: reply %d", head[1])
	}
	size := map[byte]int{1: 4, 4: 16}[head[3]]
	if size == 0 {
		return netip.AddrPort{}, fmt.Errorf("its reply has address type %d", head[3])
	}
	b := make([]byte, size+2)
	if _, err := io.ReadFull(r, b); err != nil {
		return netip.AddrPort{}, err
	}
	ip, _ := netip.AddrFromSlice(b[:size])
	return netip.AddrPortFrom(ip.Unmap(), binary.BigEndian.Uint16(b[size:])), nil
}
