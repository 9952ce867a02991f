package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/net/dns/dnsmessage"
	"golang.org/x/sys/unix"

	"culvert/cmd/internal/netpair"
	"culvert/sidecar"
	"culvert/sidecar/control"
)

// notPublic are addresses of every range that no cloud proxy may send to unless
// its operator lists it: edges, and those that somebody would try.
var notPublic = []string{
	// IPv4: loopback, this network, private, carrier NAT, link-local, assignments,
	// documentation, 6to4 relays, benchmarks, metadata services.
	"127.0.0.1", "127.0.0.53", "127.255.255.254", "0.0.0.0", "0.0.0.1", "0.255.255.255",
	"10.0.0.0", "10.0.0.1", "10.255.255.255", "172.16.0.1", "172.31.255.255", "192.168.0.1", "192.168.255.255",
	"100.64.0.0", "100.127.255.255", "169.254.0.1", "169.254.255.255", "192.0.0.1", "192.0.0.255",
	"192.0.2.1", "198.51.100.1", "203.0.113.255", "192.88.99.1", "198.18.0.1", "198.19.255.255",
	netpair.NearAddr.String(), netpair.FarAddr.String(),
	netpair.OutsideAddr4.Addr().String(), netpair.OutsideAddr6.Addr().String(), // public, and the cloud proxy's own
	routedHere, netpair.OutsideAddr6.Masked().Addr().String(), // the same, though no interface has them: the second is its routers' (RFC 4291 §2.6.1)
	"169.254.169.254", "169.254.170.2", "168.63.129.16", "100.100.100.200", "192.0.0.192",
	// Multicast, reserved, broadcast, and the broadcast of a network of the cloud proxy.
	"224.0.0.1", "224.0.0.251", "239.255.255.250", "240.0.0.1", "255.255.255.254", "255.255.255.255", directedBroadcast,
	// IPv6: loopback, unspecified, those that hold an IPv4 address.
	"::1", "::", "::127.0.0.1", "::10.0.0.1", "::8.8.8.8", "::ffff:0:127.0.0.1",
	"64:ff9b::127.0.0.1", "64:ff9b::169.254.169.254", "64:ff9b::8.8.8.8", "64:ff9b:1::10.0.0.1", "64:ff9b:1:ffff::1",
	"2002:7f00:1::1", "2002:a00:1::1", "2002:808:808::1",
	"2001:0:808:808::80ff:fffe", "2001:0:4136:e378:8000:63bf:f7f7:f7f7",
	// Unique local, metadata services, link-local, site-local, multicast, documentation, reserved.
	"fc00::1", "fdff:ffff:ffff::1", "fd00:ec2::254", "fd20:ce::254", "fe80::1", "febf::1", "fec0::1",
	"ff01::1", "ff02::1", "ff02::fb", "ff05::2", "ff0e::1", "ffff::1", "2001:db8::1", "3fff::1", "5f00::1", "100::1", "4000::1",
	// IPv4 in the form of IPv6. What a name has of these is used as IPv4, and so are they.
	"::ffff:127.0.0.1", "::ffff:0.0.0.0", "::ffff:10.0.0.1", "::ffff:172.16.0.1", "::ffff:192.168.0.1", "::ffff:169.254.169.254",
	"::ffff:168.63.129.16", "::ffff:224.0.0.1", "::ffff:255.255.255.255", mappedPublic,
}

const (
	directedBroadcast = "198.51.101.255" // of netpair.OutsideAddr4: only the cloud proxy can know
	mappedPublic      = "::ffff:8.8.8.8" // denied by its form alone
	routedHere        = "198.51.102.7"   // its network is routed to the cloud proxy's machine, as a balancer's is in some clouds
)

// spelled are further ways to write such addresses, or names that every machine has.
var spelled = []string{
	"127.0.0.1", "::1", "::ffff:127.0.0.1", "169.254.169.254", "[::1]", "fe80::1%lo", "::1%1", "127.0.0.1.",
	"127.1", "0", "2130706433", "0x7f000001", "0x7f.1", "0177.0.0.1", "017700000001", "127.0.0.1%lo",
	"localhost", "LOCALHOST", "localhost.", "localhost.localdomain", "ip6-localhost", "ip6-allnodes", "*", "..", "xn--",
}

// public are allowed: were nothing of them seen, the capture would prove nothing.
var public = []string{"8.8.8.8", "2606:4700::1111"}

// mixed is a name that stands for a public and a private address.
const (
	mixed       = "mixed.culvert.test"
	mixedPublic = "8.8.4.4"
)

// A cloud proxy whose rules allow all there is sends nothing to what is not
// public, by TCP and UDP, to literals and to names, whoever asks. It is proved by
// all that its machine sends, on every device: replies may lie.
func TestNothingIsSentToWhatIsNotPublic(t *testing.T) {
	if testing.Short() {
		t.Skip("builds the programs and runs them between namespaces")
	}
	o := newForbidding(t, buildBoth(t))
	capture := o.pair.Far.Capture(t)
	o.capture = capture
	cases := 0
	began := time.Now()
	refused := func(how string, reply [10]byte) {
		if cases++; reply[1] == 0 {
			t.Errorf("%s was connected to", how)
		}
	}
	for i, a := range notPublic {
		port := uint16(7000 + i)
		_, reply := o.ask(o.listen, 1, a, port)
		refused("TCP, "+a, reply)
		o.refusedDatagram(a, port)
		cases++
		if status := o.httpConnect(netip.AddrPortFrom(netip.MustParseAddr(a), port).String()); status == http.StatusOK {
			t.Errorf("HTTP, %s was connected to", a)
		}
		cases++
		if a != mappedPublic {
			_, reply = o.ask(o.listen, 1, nameOf(i), port)
			refused("TCP, a name that has "+a, reply)
			o.refusedDatagram(nameOf(i), port)
			cases++
		}
	}
	for i, name := range spelled {
		port := uint16(8000 + i)
		_, reply := o.ask(o.listen, 1, "="+name, port)
		refused("TCP, "+name+" as a name", reply)
		o.refusedDatagram("="+name, port)
		cases++
	}

	// The same ways, to what is allowed: these are seen, and so would the others be.
	allowed := map[netip.AddrPort]int{}
	for i, a := range public {
		for j, host := range []string{a, publicName(i)} {
			o.sent(capture, host, netip.AddrPortFrom(netip.MustParseAddr(a), uint16(9000+2*i+j)), allowed)
		}
	}
	o.sent(capture, mixed, netip.AddrPortFrom(netip.MustParseAddr(mixedPublic), 9100), allowed)

	controls := 0
	for _, p := range capture.Stop() {
		switch {
		case allowed[p.To] > 0 && p.Device == "outside":
			controls++
		case !o.expected(p):
			t.Errorf("the cloud proxy's machine sent a packet: %s", p)
		}
	}
	t.Logf("%d cases of what is not public: no packet; %d that are allowed: %d packets; in %s", cases, 2*len(allowed), controls, time.Since(began).Round(time.Millisecond))
}

// routeHere makes this namespace a router, and one to which a further network leads.
func routeHere() error {
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return err
	}
	network := netlink.NewIPNet(net.ParseIP(routedHere))
	network.Mask = net.CIDRMask(24, 32)
	network.IP = network.IP.Mask(network.Mask)
	err = netlink.RouteAdd(&netlink.Route{LinkIndex: lo.Attrs().Index, Dst: network, Type: unix.RTN_LOCAL, Table: unix.RT_TABLE_LOCAL, Scope: netlink.SCOPE_HOST})
	return errors.Join(err, os.WriteFile("/proc/sys/net/ipv6/conf/all/forwarding", []byte("1"), 0))
}

func nameOf(i int) string     { return fmt.Sprintf("n%d.culvert.test", i) }
func publicName(i int) string { return fmt.Sprintf("public%d.culvert.test", i) }

// forbidding is a pair with a cloud proxy whose machine has a way to every address
// and a name server, and a sidecar that leaves every decision to it.
type forbidding struct {
	*only443
	listen  string
	app     net.Conn // the socket of an association
	capture *netpair.Capture
}

func newForbidding(t *testing.T, bin string) *forbidding {
	t.Helper()
	o := &forbidding{only443: &only443{t: t, pair: netpair.New(t), dir: t.TempDir(), culvert: filepath.Join(bin, "culvert"), socket: runSocket(t)}}
	o.pair.Far.Outside(t)
	if err := o.pair.Far.Do(routeHere); err != nil {
		t.Fatal(err)
	}
	names := map[string][]netip.Addr{mixed: {netip.MustParseAddr("10.0.0.9"), netip.MustParseAddr(mixedPublic)}}
	for i, a := range notPublic {
		names[nameOf(i)] = []netip.Addr{netip.MustParseAddr(a)}
	}
	for i, a := range public {
		names[publicName(i)] = []netip.Addr{netip.MustParseAddr(a)}
	}
	nameServer(t, o.pair.Far, names)

	cloud := filepath.Join(bin, "culvert-cloudproxy")
	if out, err := exec.Command(cloud, "init", "--host", netpair.FarAddr.String(), "--dir", o.dir, "--profile", "public").CombinedOutput(); err != nil {
		t.Fatalf("init: %v\n%s", err, out)
	}
	policy := regexp.MustCompile(`(?m)^policy:\n(  .*\n)+`)
	rewrite(t, o.dir, func(text string) string { return policy.ReplaceAllString(text, "") },
		func(text string) string {
			return policy.ReplaceAllString(text, "policy:\n  rules: [{allow: any, to: any}]\n")
		})
	resolv := filepath.Join(o.dir, "resolv.conf")
	if err := os.WriteFile(resolv, []byte("nameserver 127.0.0.1\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	// In a mount namespace of its own, where another file says who resolves names.
	cmd := exec.Command("sh", "-c", `mount --bind "$0" /etc/resolv.conf && exec "$@"`, resolv, cloud, "run", "-c", filepath.Join(o.dir, "cloudproxy.yaml"))
	cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS}
	o.launch(o.pair.Far, cmd)
	farAnswers(t, o.pair, netip.MustParseAddrPort("127.0.0.1:443"))
	o.start(o.pair.Near, o.culvert, "run", "-c", filepath.Join(o.dir, "culvert.yaml"), "--listen", "127.0.0.1:0", "--control", o.socket)
	runReady(t, o.socket)
	o.listen = runStatus(t, o.socket).Listen
	o.app = o.associate(o.listen)
	o.app.SetDeadline(time.Time{})
	return o
}

// datagram sends one.
func (o *forbidding) datagram(host string, port uint16) {
	o.app.Write(append(append([]byte{0, 0, 0}, socksRequest(0, host, port)[3:]...), "payload"...))
}

// refusedDatagram sends one and waits until it is known to have been refused.
func (o *forbidding) refusedDatagram(host string, port uint16) {
	o.t.Helper()
	counted := func() uint64 {
		st, err := control.NewClient(o.socket).Status(o.t.Context())
		if err != nil {
			o.t.Fatal(err)
		}
		var front sidecar.FrontStats
		if text, err := json.Marshal(st.Front); err != nil || json.Unmarshal(text, &front) != nil {
			o.t.Fatalf("the front's counters: %v", st.Front)
		}
		n := front.Unreachable
		for _, m := range []map[string]uint64{front.Dropped, st.Tunnel.Dropped} {
			for _, d := range m {
				n += d
			}
		}
		return n
	}
	before := counted()
	o.datagram(host, port)
	again := time.Now().Add(3 * time.Second) // a word of it may be lost, and is said once a second at most
	runEventually(o.t, "a datagram to "+host+" is refused", func() bool {
		if i := slices.IndexFunc(o.capture.Sent(), func(p netpair.Packet) bool { return !o.expected(p) }); i >= 0 {
			o.t.Fatalf("the cloud proxy's machine sent a packet: %s", o.capture.Sent()[i])
		}
		if time.Now().After(again) {
			o.datagram(host, port)
			again = time.Now().Add(3 * time.Second)
		}
		return counted() > before
	})
}

// httpConnect asks the sidecar as an HTTP proxy, and returns the status.
func (o *forbidding) httpConnect(to string) int {
	o.t.Helper()
	c := o.dial("tcp4", o.listen)
	defer c.Close()
	fmt.Fprintf(c, "CONNECT %s HTTP/1.1\r\nHost: %s\r\n\r\n", to, to)
	res, err := http.ReadResponse(bufio.NewReader(c), nil)
	if err != nil {
		o.t.Fatal(err)
	}
	res.Body.Close()
	return res.StatusCode
}

// sent asks for what is allowed by TCP and UDP, and waits until both are seen.
func (o *forbidding) sent(capture *netpair.Capture, host string, to netip.AddrPort, allowed map[netip.AddrPort]int) {
	o.t.Helper()
	allowed[to]++
	c := o.dial("tcp4", o.listen)
	defer c.Close() // nobody answers there
	c.Write(append([]byte{5, 1, 0}, socksRequest(1, host, to.Port())...))
	for _, protocol := range []int{syscall.IPPROTO_TCP, syscall.IPPROTO_UDP} {
		runEventually(o.t, fmt.Sprintf("protocol %d to %s is seen", protocol, to), func() bool {
			if protocol == syscall.IPPROTO_UDP {
				o.datagram(host, to.Port())
			}
			for _, p := range capture.Sent() {
				if p.Protocol == protocol && p.To == to && p.Device == "outside" {
					return true
				}
			}
			return false
		})
	}
}

// expected reports whether a packet of the cloud proxy's machine is of the tunnel,
// or of the name server that stands there.
func (o *forbidding) expected(p netpair.Packet) bool {
	cloud, loopback := netip.AddrPortFrom(netpair.FarAddr, 443), netip.MustParseAddr("127.0.0.1")
	return p.Device == "link" && p.From == cloud && p.To.Addr() == netpair.NearAddr ||
		p.Device == "lo" && p.From.Addr() == loopback && p.To.Addr() == loopback && (p.From.Port() == 53 || p.To.Port() == 53)
}

// nameServer answers at 127.0.0.1 for these names, and for no others.
func nameServer(t *testing.T, at *netpair.Space, names map[string][]netip.Addr) {
	t.Helper()
	var c net.PacketConn
	if err := at.Do(func() (err error) { c, err = net.ListenPacket("udp4", "127.0.0.1:53"); return err }); err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		b := make([]byte, 1500)
		for {
			n, from, err := c.ReadFrom(b)
			if err != nil {
				return
			}
			if answer, err := nameAnswer(b[:n], names); err == nil {
				c.WriteTo(answer, from)
			}
		}
	}()
	t.Cleanup(func() { c.Close(); <-done })
}

func nameAnswer(query []byte, names map[string][]netip.Addr) ([]byte, error) {
	var p dnsmessage.Parser
	head, err := p.Start(query)
	if err != nil {
		return nil, err
	}
	q, err := p.Question()
	if err != nil {
		return nil, err
	}
	addrs, known := names[strings.ToLower(strings.TrimSuffix(q.Name.String(), "."))]
	h := dnsmessage.Header{ID: head.ID, Response: true, RecursionDesired: true, RecursionAvailable: true}
	if !known {
		h.RCode = dnsmessage.RCodeNameError
	}
	m := dnsmessage.Message{Header: h, Questions: []dnsmessage.Question{q}}
	for _, a := range addrs {
		r := dnsmessage.Resource{Header: dnsmessage.ResourceHeader{Name: q.Name, Type: q.Type, Class: q.Class}}
		switch {
		case q.Type == dnsmessage.TypeA && a.Is4():
			r.Body = &dnsmessage.AResource{A: a.As4()}
		case q.Type == dnsmessage.TypeAAAA && a.Is6():
			r.Body = &dnsmessage.AAAAResource{AAAA: a.As16()}
		default:
			continue
		}
		m.Answers = append(m.Answers, r)
	}
	return m.Pack()
}
