package socks5

import (
	"bytes"
	"io"
	"net"
	"net/netip"
	"testing"
	"time"
)

// proxy is a SOCKS5 server for one request: it answers with reply and gives
// what the app asked to asked.
func proxy(t *testing.T, reply []byte) (at netip.AddrPort, asked <-chan []byte) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	requests := make(chan []byte, 1)
	go func() {
		c, err := l.Accept()
		if err != nil {
			return
		}
		defer c.Close()
		b := make([]byte, 3+10)
		if _, err := io.ReadFull(c, b[:3]); err != nil {
			return
		}
		c.Write([]byte{5, 0})
		if _, err := io.ReadFull(c, b[3:]); err != nil {
			return
		}
		requests <- b
		c.Write(reply)
		io.Copy(c, c) // what follows comes back
	}()
	return l.Addr().(*net.TCPAddr).AddrPort(), requests
}

func TestConnectAsksForTheTargetAndCarriesBytes(t *testing.T) {
	at, asked := proxy(t, []byte{5, 0, 0, 1, 0, 0, 0, 0, 0, 0})
	c, err := Connect(at, netip.MustParseAddrPort("192.0.2.7:443"))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	want := []byte{5, 1, 0, 5, 1, 0, 1, 192, 0, 2, 7, 1, 187}
	if got := <-asked; !bytes.Equal(got, want) {
		t.Errorf("the proxy read % x, want % x", got, want)
	}
	b := make([]byte, 5)
	c.Write([]byte("hello"))
	if _, err := io.ReadFull(c, b); err != nil || string(b) != "hello" {
		t.Errorf("came back: %q, %v", b, err)
	}
}

func TestRefusalIsAnError(t *testing.T) {
	at, _ := proxy(t, []byte{5, 2, 0, 1, 0, 0, 0, 0, 0, 0})
	if c, err := Connect(at, netip.MustParseAddrPort("192.0.2.7:443")); err == nil {
		c.Close()
		t.Error("a refused request gave a connection")
	}
}

func TestFlowWrapsAndUnwrapsDatagrams(t *testing.T) {
	relay, err := net.ListenUDP("udp", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	defer relay.Close()
	port := relay.LocalAddr().(*net.UDPAddr).Port
	at, _ := proxy(t, []byte{5, 0, 0, 1, 0, 0, 0, 0, byte(port >> 8), byte(port)}) // 0.0.0.0: the proxy's own address
	f, err := Open(at, netip.MustParseAddrPort("192.0.2.7:5004"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	datagram, body := f.Buffer(5)
	copy(body, "hello")
	if err := f.Write(datagram); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 100)
	n, from, err := relay.ReadFromUDPAddrPort(b)
	if err != nil {
		t.Fatal(err)
	}
	want := append([]byte{0, 0, 0, 1, 192, 0, 2, 7, 5004 >> 8, 5004 & 255}, "hello"...)
	if !bytes.Equal(b[:n], want) {
		t.Fatalf("the relay read % x, want % x", b[:n], want)
	}
	if _, err := relay.WriteToUDPAddrPort(b[:n], from); err != nil {
		t.Fatal(err)
	}
	got, err := f.Read(b, time.Now().Add(time.Minute))
	if err != nil || string(got) != "hello" {
		t.Errorf("came back: %q, %v", got, err)
	}
}

func TestDatagramHeaders(t *testing.T) {
	tests := map[string]struct {
		in   []byte
		want string
		bad  bool
	}{
		"IPv4":       {in: append([]byte{0, 0, 0, 1, 1, 2, 3, 4, 0, 9}, "x"...), want: "x"},
		"IPv6":       {in: append(append([]byte{0, 0, 0, 4}, make([]byte, 18)...), "x"...), want: "x"},
		"name":       {in: append([]byte{0, 0, 0, 3, 2, 'a', 'b', 0, 9}, "x"...), want: "x"},
		"no payload": {in: []byte{0, 0, 0, 1, 1, 2, 3, 4, 0, 9}},
		"fragment":   {in: []byte{0, 0, 1, 1, 1, 2, 3, 4, 0, 9}, bad: true},
		"type":       {in: []byte{0, 0, 0, 9, 1, 2, 3, 4, 0, 9}, bad: true},
		"cut":        {in: []byte{0, 0, 0, 1, 1, 2, 3}, bad: true},
		"cut name":   {in: []byte{0, 0, 0, 3}, bad: true},
		"empty":      {bad: true},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			got, err := payload(test.in)
			if (err != nil) != test.bad || string(got) != test.want {
				t.Errorf("got %q, %v", got, err)
			}
		})
	}
}
