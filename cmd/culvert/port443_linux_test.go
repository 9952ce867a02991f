package main

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"encoding/json"
	"io"
	"net"
	"net/netip"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"culvert/cmd/internal/cmdtest"
	"culvert/cmd/internal/netpair"
	"culvert/sidecar/control"
)

// socksRequest is a SOCKS5 request (RFC 1928 §4) for a name or an address. What
// follows a = is a name, whatever it looks like.
func socksRequest(command byte, host string, port uint16) []byte {
	name := strings.TrimPrefix(host, "=")
	b := []byte{5, command, 0, 3, byte(len(name))}
	if a, err := netip.ParseAddr(host); err == nil && a.Is4() {
		b = append([]byte{5, command, 0, 1}, a.AsSlice()...)
	} else if err == nil {
		b = append([]byte{5, command, 0, 4}, a.AsSlice()...)
	} else {
		b = append(b, name...)
	}
	return binary.BigEndian.AppendUint16(b, port)
}

// only443 is a pair with a cloud proxy and an echo at its far end.
type only443 struct {
	t        *testing.T
	pair     *netpair.Pair
	dir      string // of the configuration
	culvert  string // the program
	udp, tcp uint16 // ports of the echo, on the far end's loopback
	socket   string
	clouds   []*exec.Cmd
	logs     []*cmdtest.Text // of all that was started
}

func newOnly443(t *testing.T, bin string) *only443 { return newOnly443On(t, bin, netpair.New(t)) }

// newOnly443On is newOnly443 on a pair that is there already; change may alter the
// configuration before it is used.
func newOnly443On(t *testing.T, bin string, pair *netpair.Pair, change ...func(dir string)) *only443 {
	t.Helper()
	return newOnly443Named(t, bin, pair, netpair.FarAddr.String(), change...)
}

// newOnly443Named is newOnly443On with a cloud proxy that goes by host.
func newOnly443Named(t *testing.T, bin string, pair *netpair.Pair, host string, change ...func(dir string)) *only443 {
	t.Helper()
	o := &only443{t: t, pair: pair, dir: t.TempDir(), culvert: filepath.Join(bin, "culvert"), socket: runSocket(t)}
	cloud := filepath.Join(bin, "culvert-cloudproxy")
	if out, err := exec.Command(cloud, "init", "--host", host, "--dir", o.dir, "--allow", "127.0.0.0/8").CombinedOutput(); err != nil {
		t.Fatalf("init: %v\n%s", err, out)
	}
	for _, f := range change {
		f(o.dir)
	}
	o.echo()
	o.clouds = append(o.clouds, o.start(o.pair.Far, cloud, "run", "-c", filepath.Join(o.dir, "cloudproxy.yaml")))
	farAnswers(t, pair, netip.MustParseAddrPort("127.0.0.1:443"))
	return o
}

// farAnswers waits until something listens at the far end.
func farAnswers(t *testing.T, pair *netpair.Pair, at netip.AddrPort) {
	t.Helper()
	runEventually(t, at.String()+" answers", func() bool {
		return pair.Far.Do(func() error {
			c, err := net.Dial("tcp4", at.String())
			if err == nil {
				c.Close()
			}
			return err
		}) == nil
	})
}

// start starts a program whose log is shown when the test has failed.
func (o *only443) start(at *netpair.Space, args ...string) *exec.Cmd {
	cmd := exec.Command(args[0], args[1:]...)
	o.launch(at, cmd)
	return cmd
}

// launch is start of what has been prepared.
func (o *only443) launch(at *netpair.Space, cmd *exec.Cmd) {
	log := &cmdtest.Text{}
	o.logs = append(o.logs, log)
	cmd.Stdout, cmd.Stderr = log, log
	o.t.Cleanup(func() {
		if o.t.Failed() {
			o.t.Logf("%s:\n%s", filepath.Base(cmd.Args[0]), log)
		}
	})
	at.Start(o.t, cmd)
}

// echo answers datagrams and streams, where only the cloud proxy comes to.
func (o *only443) echo() {
	o.t.Helper()
	var u *net.UDPConn
	var l net.Listener
	err := o.pair.Far.Do(func() (err error) {
		if u, err = net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)}); err != nil {
			return err
		}
		l, err = net.Listen("tcp4", "127.0.0.1:0")
		return err
	})
	if err != nil {
		o.t.Fatal(err)
	}
	o.udp, o.tcp = uint16(u.LocalAddr().(*net.UDPAddr).Port), uint16(l.Addr().(*net.TCPAddr).Port)
	done := make(chan struct{}, 2)
	go func() {
		defer func() { done <- struct{}{} }()
		b := make([]byte, 2048)
		for {
			n, from, err := u.ReadFromUDPAddrPort(b)
			if err != nil {
				return
			}
			u.WriteToUDPAddrPort(b[:n], from)
		}
	}()
	go func() {
		defer func() { done <- struct{}{} }()
		for { // one after another is enough here
			c, err := l.Accept()
			if err != nil {
				return
			}
			c.SetDeadline(time.Now().Add(runPatience))
			io.Copy(c, c)
			c.Close()
		}
	}()
	o.t.Cleanup(func() { u.Close(); l.Close(); <-done; <-done })
}

// dial connects from the near end.
func (o *only443) dial(network, to string) net.Conn {
	o.t.Helper()
	var c net.Conn
	if err := o.pair.Near.Do(func() (err error) { c, err = net.Dial(network, to); return err }); err != nil {
		o.t.Fatal(err)
	}
	o.t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(runPatience))
	return c
}

// ask sends one request to the sidecar, and returns the connection and the reply.
func (o *only443) ask(proxy string, command byte, host string, port uint16) (net.Conn, [10]byte) {
	o.t.Helper()
	c := o.dial("tcp4", proxy)
	c.Write(append([]byte{5, 1, 0}, socksRequest(command, host, port)...))
	var answer [12]byte
	if _, err := io.ReadFull(c, answer[:]); err != nil {
		o.t.Fatalf("the proxy's answer: %v", err)
	}
	return c, [10]byte(answer[2:])
}

// associate opens an association, and returns a socket that sends to it.
func (o *only443) associate(proxy string) net.Conn {
	o.t.Helper()
	_, reply := o.ask(proxy, 3, "0.0.0.0", 0)
	if reply[1] != 0 {
		o.t.Fatalf("UDP ASSOCIATE: reply %d", reply[1])
	}
	return o.dial("udp4", netip.AddrPortFrom(netip.AddrFrom4([4]byte(reply[4:8])), binary.BigEndian.Uint16(reply[8:])).String())
}

// media sends datagrams until 50 have come back, each target's own number too.
func (o *only443) media(proxy string) {
	o.t.Helper()
	u := o.associate(proxy)
	packets := [][]byte{}
	for i, host := range []string{"127.0.0.1", "localhost"} {
		head := append([]byte{0, 0, 0}, socksRequest(0, host, o.udp)[3:]...)
		packets = append(packets, append(append(head, byte(i)), make([]byte, 800)...))
	}
	var got [2]int
	b := make([]byte, 2048)
	for end := time.Now().Add(runPatience); min(got[0], got[1]) < 25; {
		if time.Now().After(end) {
			o.t.Fatalf("of the datagrams to an address %d came back, to a name %d", got[0], got[1])
		}
		for _, p := range packets {
			u.Write(p)
		}
		u.SetReadDeadline(time.Now().Add(20 * time.Millisecond))
		for {
			n, err := u.Read(b)
			if err != nil {
				break
			}
			if n > 800 && b[n-801] < 2 {
				got[b[n-801]]++
			}
		}
	}
}

// stream sends bytes to a name and reads them back.
func (o *only443) stream(proxy, host string) {
	o.t.Helper()
	c, reply := o.ask(proxy, 1, host, o.tcp)
	if reply[1] != 0 {
		o.t.Fatalf("CONNECT to %s: reply %d", host, reply[1])
	}
	sent := bytes.Repeat([]byte("0123456789abcdef"), 16<<10)
	go func() {
		c.Write(sent)
		c.(*net.TCPConn).CloseWrite()
	}()
	if got, err := io.ReadAll(c); err != nil || !bytes.Equal(got, sent) {
		o.t.Fatalf("%d of %d bytes came back, %v", len(got), len(sent), err)
	}
}

// stray sends a datagram beside the tunnel.
func (o *only443) stray() {
	o.dial("udp4", netip.AddrPortFrom(netpair.FarAddr, 9).String()).Write([]byte("stray"))
}

// What a strict firewall lets through is all that passes between the two ends:
// UDP 443 and TCP 443, and in the modes udp and tcp one of the two.
func TestOnlyPort443PassesBetweenTheTwoEnds(t *testing.T) {
	bin := buildBoth(t)
	for mode, want := range map[string]struct {
		carrier, way []string
		only         string // the one protocol that may be seen; "": both may
	}{
		"auto": {[]string{"quic", "tls"}, []string{"sealed", "quic-datagram", "lanes"}, ""},
		"udp":  {[]string{"quic"}, []string{"sealed", "quic-datagram"}, "UDP"},
		"tcp":  {[]string{"tls"}, []string{"lanes"}, "TCP"},
	} {
		t.Run(mode, func(t *testing.T) {
			o := newOnly443(t, bin)
			w := o.pair.Watch(t, 443)
			o.start(o.pair.Near, o.culvert, "run", "-c", filepath.Join(o.dir, "culvert.yaml"), "--listen", "127.0.0.1:0", "--control", o.socket, "--mode", mode)
			runReady(t, o.socket)
			st := o.status()
			if !slices.Contains(want.carrier, st.Link.Carrier) || !slices.Contains(want.way, st.Link.Way) || st.Link.WayWhy == "" {
				t.Errorf("the link is %+v", st.Link)
			}
			o.media(st.Listen)
			o.stream(st.Listen, "127.0.0.1")
			o.stream(st.Listen, "localhost") // looked up by the cloud proxy: only there the echo is
			if _, reply := o.ask(st.Listen, 1, "nobody.culvert.test", 80); reply[1] == 0 {
				t.Error("a name that nobody knows was connected to")
			}
			if exec.Command(o.culvert, "stop", "--force", "--control", o.socket).Run() != nil {
				t.Error("stop fails")
			}
			o.stray()
			s := w.Stop()
			if s.UDP+s.TCP < 100 || want.only == "UDP" && s.TCP > 0 || want.only == "TCP" && s.UDP > 0 {
				t.Errorf("seen %+v, want a hundred packets at least, %s only", s, cmp.Or(want.only, "UDP and TCP"))
			}
			const stray = "UDP from 198.18.80.1:"
			for what := range s.Stray {
				if !strings.HasPrefix(what, stray) || !strings.HasSuffix(what, "198.18.80.2:9") {
					t.Errorf("the link saw %s", what)
				}
			}
			if len(s.Stray) != 1 {
				t.Errorf("the test's own stray packet was not told from the rest: %v", s.Stray)
			}
		})
	}
}

func (o *only443) status() (st control.Status) {
	o.t.Helper()
	out, err := exec.Command(o.culvert, "status", "--json", "--control", o.socket).Output()
	if err == nil {
		err = json.Unmarshal(out, &st)
	}
	if err != nil {
		o.t.Fatalf("status: %v\n%s", err, out)
	}
	return st
}
