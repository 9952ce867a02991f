package netpair_test

import (
	"net"
	"net/netip"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"culvert/cmd/internal/link"
	"culvert/cmd/internal/netpair"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// send sends a datagram from the near end, to the far one.
func send(t *testing.T, p *netpair.Pair, to netip.AddrPort) {
	t.Helper()
	err := p.Near.Do(func() error {
		c, err := net.DialUDP("udp", nil, net.UDPAddrFromAddrPort(to))
		if err != nil {
			return err
		}
		defer c.Close()
		_, err = c.Write(make([]byte, 100))
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}

func TestAWatchTellsWhatIsExpectedFromWhatIsNot(t *testing.T) {
	p := netpair.New(t)
	w := p.Watch(t, 443)
	send(t, p, netip.AddrPortFrom(netpair.FarAddr, 443))
	send(t, p, netip.AddrPortFrom(netpair.FarAddr, 53))
	send(t, p, netip.MustParseAddrPort("203.0.113.1:443")) // goes by the route for all else
	err := p.Near.Do(func() error {
		// Nobody listens there: it is refused, by a packet that is seen too.
		d := net.Dialer{Timeout: time.Minute}
		for _, port := range []string{":443", ":80"} {
			c, err := d.Dial("tcp4", netpair.FarAddr.String()+port)
			if err == nil {
				c.Close()
				t.Errorf("port %s answers", port)
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	// Who joins a group says so to the network, by IGMP.
	err = p.Near.Do(func() error {
		on, err := net.InterfaceByName("link")
		if err != nil {
			return err
		}
		c, err := net.ListenMulticastUDP("udp4", on, net.UDPAddrFromAddrPort(netip.MustParseAddrPort("224.0.0.251:5353")))
		if err == nil {
			err = c.Close()
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	// An error is told to somebody who is not on the link: a port that nobody has,
	// as a datagram found it that claims to come from there.
	err = p.Near.Do(func() error {
		c, err := net.ListenPacket("ip4:255", "0.0.0.0") // IPPROTO_RAW: whole packets
		if err != nil {
			return err
		}
		defer c.Close()
		packet := append([]byte{0x45, 0, 0, 28, 0, 0, 0, 0, 64, 17, 0, 0, 203, 0, 113, 1}, netpair.NearAddr.AsSlice()...)
		_, err = c.WriteTo(append(packet, 0x13, 0x88, 0x13, 0x88, 0, 8, 0, 0), &net.IPAddr{IP: netpair.NearAddr.AsSlice()})
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	s := w.Stop()
	if s.UDP != 1 || s.TCP < 2 || s.Link == 0 {
		t.Errorf("seen %+v, want 1 UDP, a SYN and its refusal, and ARP", s)
	}
	// UDP to port 53 and to another address, a SYN and its refusal, ICMP.
	if len(s.Stray) != 5 {
		t.Errorf("stray packets %v, want 5 kinds", s.Stray)
	}
}

func TestACaptureSeesWhatIsSentOnEveryDevice(t *testing.T) {
	p := netpair.New(t)
	p.Far.Outside(t)
	c := p.Far.Capture(t)
	want := map[string]string{ // and the devices
		"8.8.8.8:9": "outside", "[2606:4700::1111]:9": "outside", "198.51.101.255:9": "outside",
		"127.0.0.1:9": "lo", "[::1]:9": "lo", netip.AddrPortFrom(netpair.NearAddr, 9).String(): "link",
	}
	err := p.Far.Do(func() error {
		for to := range want {
			u, err := net.Dial("udp", to)
			if err != nil {
				return err
			}
			u.Write([]byte("x"))
			u.Close()
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	send(t, p, netip.AddrPortFrom(netpair.FarAddr, 10)) // is no packet of the far end, but its refusal
	got := map[string]int{}
	for _, one := range c.Stop() {
		if device := want[one.To.String()]; one.Protocol == unix.IPPROTO_UDP && (device != one.Device || one.To.Port() != 9) {
			t.Errorf("seen %s", one)
		} else if one.Protocol == unix.IPPROTO_UDP {
			got[one.To.String()]++
		}
	}
	for to := range want {
		if got[to] != 1 {
			t.Errorf("%d packets to %s were seen", got[to], to)
		}
	}
}

func TestAWatchEndsWhilePacketsPass(t *testing.T) {
	p := netpair.New(t)
	var c net.Conn
	err := p.Near.Do(func() (err error) {
		c, err = net.Dial("udp4", netip.AddrPortFrom(netpair.FarAddr, 443).String())
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	var sending sync.WaitGroup
	end := make(chan struct{})
	sending.Go(func() {
		for tick := time.Tick(5 * time.Millisecond); ; {
			select {
			case <-end:
				return
			case <-tick:
				c.Write(make([]byte, 100)) // fails when the one before was refused
			}
		}
	})
	defer func() { close(end); sending.Wait(); c.Close() }()
	w := p.Watch(t, 443)
	time.Sleep(100 * time.Millisecond) // is how long it watches
	ended := make(chan netpair.Seen)
	go func() { ended <- w.Stop() }()
	select {
	case s := <-ended:
		if s.UDP == 0 {
			t.Errorf("seen %+v, want UDP", s)
		}
	case <-time.After(time.Minute):
		t.Fatal("in vain: the capture ends")
	}
}

func TestTheTwoEndsAreApart(t *testing.T) {
	p := netpair.New(t)
	var far net.Listener
	if err := p.Far.Do(func() (err error) { far, err = net.Listen("tcp4", "127.0.0.1:0"); return err }); err != nil {
		t.Fatal(err)
	}
	defer far.Close()
	err := p.Near.Do(func() error {
		if c, err := net.Dial("tcp4", far.Addr().String()); err == nil {
			c.Close()
			t.Error("the near end reaches the far end's loopback")
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

func TestABadLinkCarriesAndStopsCarrying(t *testing.T) {
	p, l := netpair.NewBad(t, link.Settings{})
	var far net.PacketConn
	at := netip.AddrPortFrom(netpair.FarAddr, 443)
	if err := p.Far.Do(func() (err error) { far, err = net.ListenPacket("udp4", at.String()); return err }); err != nil {
		t.Fatal(err)
	}
	defer far.Close()
	send(t, p, at)
	b := make([]byte, 200)
	far.SetReadDeadline(time.Now().Add(time.Minute))
	n, first, err := far.ReadFrom(b)
	if n != 100 || err != nil {
		t.Fatalf("%d bytes, %v", n, err)
	}
	if got := l.Counts(); got.UDP != 1 {
		t.Errorf("counted %+v", got)
	}
	l.Change(func(s *link.Settings) { s.Down = true })
	send(t, p, at) // lost
	for l.Counts().UDP < 2 {
		time.Sleep(time.Millisecond) // the device hands it to the link
	}
	l.Change(func(s *link.Settings) { s.Down = false })
	l.Rebind()
	send(t, p, at)
	if _, second, err := far.ReadFrom(b); err != nil || second.String() == first.String() {
		t.Errorf("after a rebinding it comes from %v, before from %v, %v", second, first, err)
	}
	far.SetReadDeadline(time.Now())
	if n, from, err := far.ReadFrom(b); err == nil {
		t.Errorf("%d bytes from %v too many", n, from)
	}
}
