package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/pion/ice/v4"
	"github.com/pion/interceptor"
	"github.com/pion/logging"
	"github.com/pion/rtp"
	"github.com/pion/webrtc/v4"
	"github.com/vishvananda/netlink"

	"culvert/cmd/internal/netpair"
	"culvert/tunnel"
)

// callSocket is a SOCKS5 association as a socket for ICE.
type callSocket struct{ net.Conn }

// ReadFrom leaves out what has no header for IPv4 (RFC 1928 §7).
func (c callSocket) ReadFrom(b []byte) (int, net.Addr, error) {
	var in [2048]byte
	for {
		n, err := c.Read(in[:])
		if err != nil {
			return 0, nil, err
		}
		if n >= 10 && in[2] == 0 && in[3] == 1 {
			from := &net.UDPAddr{IP: slices.Clone(in[4:8]), Port: int(binary.BigEndian.Uint16(in[8:]))}
			return copy(b, in[10:n]), from, nil
		}
	}
}

func (c callSocket) WriteTo(b []byte, to net.Addr) (int, error) {
	at := to.(*net.UDPAddr).AddrPort()
	head := append([]byte{0, 0, 0}, socksRequest(0, at.Addr().Unmap().String(), at.Port())[3:]...)
	if _, err := c.Write(append(head, b...)); err != nil {
		return 0, err
	}
	return len(b), nil
}

// callFar is the callee's socket. It keeps whom datagrams came from.
type callFar struct {
	net.PacketConn
	mu   sync.Mutex // guards from
	from map[string]bool
}

func (c *callFar) ReadFrom(b []byte) (int, net.Addr, error) {
	n, from, err := c.PacketConn.ReadFrom(b)
	if err == nil {
		c.mu.Lock()
		c.from[from.String()] = true
		c.mu.Unlock()
	}
	return n, from, err
}

// callParty is one side of a call.
type callParty struct {
	name   string
	pc     *webrtc.PeerConnection
	tracks []*webrtc.TrackLocalStaticRTP // audio, video
	wg     sync.WaitGroup

	mu      sync.Mutex // guards the fields below
	arrived map[webrtc.RTPCodecType][]time.Time
	states  []webrtc.ICEConnectionState
	pairs   int // selected
	renewed int // times that a negotiation was asked for
}

func newCallParty(t *testing.T, name string, conn net.PacketConn) *callParty {
	t.Helper()
	quiet := logging.NewDefaultLoggerFactory() // pion takes the end of a call for a fault
	quiet.DefaultLogLevel = logging.LogLevelDisabled
	s := webrtc.SettingEngine{LoggerFactory: quiet}
	s.SetIncludeLoopbackCandidate(true)
	s.SetNetworkTypes([]webrtc.NetworkType{webrtc.NetworkTypeUDP4})
	s.SetICEMulticastDNSMode(ice.MulticastDNSModeDisabled)
	s.SetICEUDPMux(ice.NewUDPMuxDefault(ice.UDPMuxParams{UDPConn: conn, Logger: quiet.NewLogger("ice")}))
	var m webrtc.MediaEngine
	var reg interceptor.Registry
	// Reports only: retransmissions would hide a gap.
	if err := errors.Join(m.RegisterDefaultCodecs(), webrtc.ConfigureRTCPReports(&reg)); err != nil {
		t.Fatal(err)
	}
	pc, err := webrtc.NewAPI(webrtc.WithSettingEngine(s), webrtc.WithMediaEngine(&m), webrtc.WithInterceptorRegistry(&reg)).NewPeerConnection(webrtc.Configuration{})
	if err != nil {
		t.Fatal(err)
	}
	p := &callParty{name: name, pc: pc, arrived: map[webrtc.RTPCodecType][]time.Time{}}
	t.Cleanup(func() {
		pc.GracefulClose()
		p.wg.Wait()
	})
	pc.OnICEConnectionStateChange(func(st webrtc.ICEConnectionState) {
		p.mu.Lock()
		defer p.mu.Unlock()
		p.states = append(p.states, st)
	})
	pc.OnTrack(func(r *webrtc.TrackRemote, _ *webrtc.RTPReceiver) { p.wg.Go(func() { p.receive(r) }) })
	for _, kind := range []webrtc.RTPCodecCapability{
		{MimeType: webrtc.MimeTypeOpus, ClockRate: 48000, Channels: 2},
		{MimeType: webrtc.MimeTypeVP8, ClockRate: 90000},
	} {
		track, err := webrtc.NewTrackLocalStaticRTP(kind, kind.MimeType[:5], "call")
		if err != nil {
			t.Fatal(err)
		}
		sender, err := pc.AddTrack(track)
		if err != nil {
			t.Fatal(err)
		}
		p.tracks = append(p.tracks, track)
		p.wg.Go(func() { // RTCP must be read for the reports to work
			for b := make([]byte, 1500); ; {
				if _, _, err := sender.Read(b); err != nil {
					return
				}
			}
		})
	}
	return p
}

func (p *callParty) receive(r *webrtc.TrackRemote) {
	for b := make([]byte, 1500); ; {
		if _, _, err := r.Read(b); err != nil {
			return
		}
		p.mu.Lock()
		p.arrived[r.Kind()] = append(p.arrived[r.Kind()], time.Now())
		p.mu.Unlock()
	}
}

// talk sends audio of 50 packets/s and video of 1 Mbit/s until end is closed.
func (p *callParty) talk(end <-chan struct{}) {
	for i, every := range []time.Duration{20 * time.Millisecond, 8 * time.Millisecond} {
		p.wg.Go(func() {
			tick := time.NewTicker(every)
			defer tick.Stop()
			pkt := rtp.Packet{Header: rtp.Header{Version: 2}, Payload: make([]byte, []int{120, 1000}[i])}
			for {
				select {
				case <-end:
					return
				case <-tick.C:
				}
				pkt.SequenceNumber++
				pkt.Timestamp += []uint32{960, 720}[i]
				p.tracks[i].WriteRTP(&pkt) // what can not leave is lost like the rest
			}
		})
	}
}

// gap is the longest time between from and to without a packet of a kind.
func (p *callParty) gap(kind webrtc.RTPCodecType, from, to time.Time) (longest time.Duration) {
	p.mu.Lock()
	defer p.mu.Unlock()
	last := from
	for _, at := range p.arrived[kind] {
		if at.After(from) && at.Before(to) {
			longest, last = max(longest, at.Sub(last)), at
		}
	}
	return max(longest, to.Sub(last))
}

func (p *callParty) ice() *webrtc.ICETransport { return p.pc.SCTP().Transport().ICETransport() }

// pair is the selected pair, by its addresses.
func (p *callParty) pair(t *testing.T) string {
	t.Helper()
	c, err := p.ice().GetSelectedCandidatePair()
	if err != nil || c == nil {
		t.Fatalf("%s has no selected pair: %v", p.name, err)
	}
	return fmt.Sprintf("%s %s:%d - %s %s:%d", c.Local.Typ, c.Local.Address, c.Local.Port, c.Remote.Typ, c.Remote.Address, c.Remote.Port)
}

// watch counts, from now on, what a call that keeps its path never does.
func (p *callParty) watch() {
	count := func(n *int) {
		p.mu.Lock()
		defer p.mu.Unlock()
		*n++
	}
	p.ice().OnSelectedCandidatePairChange(func(*webrtc.ICECandidatePair) { count(&p.pairs) })
	p.pc.OnNegotiationNeeded(func() { count(&p.renewed) })
}

// callNegotiate exchanges an offer and an answer with all candidates in them.
func callNegotiate(t *testing.T, a, b *callParty) {
	t.Helper()
	local := func(p *callParty, make func() (webrtc.SessionDescription, error)) webrtc.SessionDescription {
		d, err := make()
		if err != nil {
			t.Fatal(err)
		}
		gathered := webrtc.GatheringCompletePromise(p.pc)
		if err := p.pc.SetLocalDescription(d); err != nil {
			t.Fatal(err)
		}
		select {
		case <-gathered:
		case <-time.After(runPatience):
			t.Fatal("in vain: candidates are gathered")
		}
		return *p.pc.LocalDescription()
	}
	offer := local(a, func() (webrtc.SessionDescription, error) { return a.pc.CreateOffer(nil) })
	if err := b.pc.SetRemoteDescription(offer); err != nil {
		t.Fatal(err)
	}
	answer := local(b, func() (webrtc.SessionDescription, error) { return b.pc.CreateAnswer(nil) })
	if err := a.pc.SetRemoteDescription(answer); err != nil {
		t.Fatal(err)
	}
	for _, p := range []*callParty{a, b} {
		runEventually(t, p.name+" is connected", func() bool {
			return p.pc.ConnectionState() == webrtc.PeerConnectionStateConnected
		})
	}
}

// callParties makes an app, whose only way out is an association at the proxy, and
// a far end, which only the cloud proxy comes to.
func (o *only443) callParties(proxy string) (app, peer *callParty, far *callFar) {
	o.t.Helper()
	control, reply := o.ask(proxy, 3, "0.0.0.0", 0)
	if reply[1] != 0 {
		o.t.Fatalf("UDP ASSOCIATE: reply %d", reply[1])
	}
	control.SetDeadline(time.Time{}) // the association lasts as long as it
	relay := o.dial("udp4", netip.AddrPortFrom(netip.AddrFrom4([4]byte(reply[4:8])), binary.BigEndian.Uint16(reply[8:])).String())
	relay.SetDeadline(time.Time{})
	far = &callFar{from: map[string]bool{}}
	if err := o.pair.Far.Do(func() (err error) { far.PacketConn, err = net.ListenPacket("udp4", "127.0.0.1:0"); return err }); err != nil {
		o.t.Fatal(err)
	}
	o.t.Cleanup(func() { far.Close() })
	return newCallParty(o.t, "the app", callSocket{relay}), newCallParty(o.t, "the far end", far), far
}

// call holds a WebRTC call until two seconds of sound and pictures have arrived at
// both ends.
func (o *only443) call(proxy string) {
	o.t.Helper()
	app, peer, far := o.callParties(proxy)
	callNegotiate(o.t, app, peer)
	end := make(chan struct{})
	hangUp := sync.OnceFunc(func() { close(end) })
	o.t.Cleanup(hangUp)
	for _, p := range []*callParty{app, peer} {
		p.talk(end)
	}
	for _, p := range []*callParty{app, peer} {
		runEventually(o.t, "sound and pictures arrive at "+p.name, func() bool {
			p.mu.Lock()
			defer p.mu.Unlock()
			return len(p.arrived[webrtc.RTPCodecTypeAudio]) >= 100 && len(p.arrived[webrtc.RTPCodecTypeVideo]) >= 250
		})
	}
	hangUp()
	for _, p := range []*callParty{app, peer} {
		p.mu.Lock()
		o.t.Logf("at %s arrived %d packets of sound, %d of pictures; ICE states %v", p.name, len(p.arrived[webrtc.RTPCodecTypeAudio]), len(p.arrived[webrtc.RTPCodecTypeVideo]), p.states)
		p.mu.Unlock()
	}
	far.mu.Lock()
	defer far.mu.Unlock()
	if len(far.from) != 1 {
		o.t.Errorf("the far end heard from %v, want one egress port", far.from)
	}
}

// needNFT skips the test where callFilter can not work.
func needNFT(t *testing.T) {
	t.Helper()
	if _, err := exec.LookPath("nft"); err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatalf("CI=true says that nothing may be left out: %v", err)
		}
		t.Skipf("the path is changed by nft: %v", err)
	}
}

// callFilter replaces the packet filter of a namespace.
func callFilter(t *testing.T, at *netpair.Space, rules string) {
	t.Helper()
	cmd := exec.Command("nft", "-f", "-")
	cmd.Stdin = strings.NewReader("table inet call\ndelete table inet call\ntable inet call { chain in { type filter hook input priority 0;\n" + rules + "\n}\n}\n")
	var out []byte
	if err := at.Do(func() (err error) { out, err = cmd.CombinedOutput(); return err }); err != nil {
		t.Fatalf("nft: %v\n%s", err, out)
	}
}

// callMove gives the near end another address, and the route by it.
func callMove(t *testing.T, at *netpair.Space, to netip.Addr) {
	t.Helper()
	err := at.Do(func() error {
		l, err := netlink.LinkByName("link")
		if err != nil {
			return err
		}
		old, err := netlink.AddrList(l, netlink.FAMILY_V4)
		if err != nil {
			return err
		}
		for _, a := range old {
			if err := netlink.AddrDel(l, &a); err != nil {
				return err
			}
		}
		a, err := netlink.ParseAddr(to.String() + "/24")
		if err != nil {
			return err
		}
		if err := netlink.AddrAdd(l, a); err != nil {
			return err
		}
		return netlink.RouteReplace(&netlink.Route{Gw: netpair.FarAddr.AsSlice()})
	})
	if err != nil {
		t.Fatal(err)
	}
}

// callStalls measures how long this process is held up at a time. The returned
// function gives the longest between two times.
func callStalls(t *testing.T) func(from, to time.Time) time.Duration {
	type stall struct {
		at   time.Time
		took time.Duration
	}
	const every = 10 * time.Millisecond
	var mu sync.Mutex // guards seen
	var seen []stall
	var wg sync.WaitGroup
	end := make(chan struct{})
	t.Cleanup(func() { close(end); wg.Wait() })
	wg.Go(func() {
		for last := time.Now(); ; {
			select {
			case <-end:
				return
			case <-time.After(every):
			}
			now := time.Now()
			mu.Lock()
			seen = append(seen, stall{now, now.Sub(last) - every})
			mu.Unlock()
			last = now
		}
	})
	return func(from, to time.Time) (longest time.Duration) {
		mu.Lock()
		defer mu.Unlock()
		for _, s := range seen {
			if s.at.After(from) && s.at.Before(to) {
				longest = max(longest, s.took)
			}
		}
		return longest
	}
}

// A call does not notice what the network does below it: it keeps its pair of
// candidates, is not negotiated again, and has one port at the far end.
func TestACallKeepsItsPairWhileThePathChanges(t *testing.T) {
	if testing.Short() {
		t.Skip("the call lasts 20 s")
	}
	needNFT(t)
	bin := buildBoth(t)
	o := newOnly443(t, bin)
	o.start(o.pair.Near, o.culvert, "run", "-c", filepath.Join(o.dir, "culvert.yaml"), "--listen", "127.0.0.1:0", "--control", o.socket, "--mode", "auto")
	runReady(t, o.socket)

	app, peer, far := o.callParties(o.status().Listen)
	parties := []*callParty{app, peer}

	// The far end sends back each message of the data channel.
	peer.pc.OnDataChannel(func(d *webrtc.DataChannel) {
		d.OnMessage(func(m webrtc.DataChannelMessage) { d.Send(m.Data) })
	})
	channel, err := app.pc.CreateDataChannel("echo", nil)
	if err != nil {
		t.Fatal(err)
	}
	opened := make(chan struct{})
	channel.OnOpen(func() { close(opened) })
	var mu sync.Mutex // guards echoed
	var echoed []uint32
	channel.OnMessage(func(m webrtc.DataChannelMessage) {
		mu.Lock()
		defer mu.Unlock()
		echoed = append(echoed, binary.BigEndian.Uint32(m.Data))
	})
	callNegotiate(t, app, peer)
	select {
	case <-opened:
	case <-time.After(runPatience):
		t.Fatal("in vain: the data channel opens")
	}
	var before []string
	for _, p := range parties {
		before = append(before, p.pair(t))
		p.watch()
	}

	end := make(chan struct{})
	for _, p := range parties {
		p.talk(end)
	}
	sent := 0 // of the goroutine that asks, until it has ended
	var asked sync.WaitGroup
	asked.Go(func() {
		tick := time.NewTicker(100 * time.Millisecond)
		defer tick.Stop()
		for {
			select {
			case <-end:
				return
			case <-tick.C:
			}
			if channel.Send(binary.BigEndian.AppendUint32(nil, uint32(sent))) == nil {
				sent++
			}
		}
	})
	hangUp := sync.OnceFunc(func() { close(end) })
	t.Cleanup(hangUp)

	const noUDP = "iifname link meta l4proto udp drop"
	udp := func(rules string) {
		callFilter(t, o.pair.Near, rules)
		callFilter(t, o.pair.Far, rules)
	}
	// Each step lasts until datagrams go by the way that it leads to, and some
	// time more. The bounds are far above what is usual; what this process itself
	// was held up comes on top, thrice, since the two ends are as well.
	steps := []struct {
		name  string
		do    func()
		way   string // "": any
		more  time.Duration
		bound time.Duration
	}{
		{"nothing", func() {}, "sealed", time.Second, 500 * time.Millisecond},
		{"UDP off", func() { udp(noUDP) }, "lanes", 2 * time.Second, 2 * time.Second},
		{"UDP on", func() { udp("") }, "sealed", time.Second, 500 * time.Millisecond},
		{"another address", func() { callMove(t, o.pair.Near, netip.MustParseAddr("198.18.80.3")) }, "", 4 * time.Second, 2 * time.Second},
		{"UDP off again", func() { udp(noUDP) }, "lanes", time.Second, 2 * time.Second},
		{"lanes reset", func() {
			// A connection that carries anything in this time is refused it.
			callFilter(t, o.pair.Far, noUDP+"\niifname link tcp dport 443 tcp flags & rst == 0 reject with tcp reset")
			time.Sleep(200 * time.Millisecond)
			udp(noUDP)
		}, "lanes", 2 * time.Second, 1500 * time.Millisecond},
		{"UDP on again", func() { udp("") }, "sealed", time.Second, 500 * time.Millisecond},
	}
	length, slower := 20*time.Second, time.Duration(1)
	if os.Getenv("CI") == "true" {
		length, slower = time.Minute, 3
	}
	began := time.Now()
	stalls := callStalls(t)
	var starts []time.Time
	for i, s := range steps {
		starts = append(starts, time.Now())
		s.do()
		if s.way != "" {
			runEventually(t, s.name+": datagrams go by "+s.way, func() bool { return o.status().Link.Way == s.way })
		}
		time.Sleep(slower * s.more)
		if i == len(steps)-1 {
			time.Sleep(time.Until(began.Add(length)))
		}
		link := o.status().Link
		t.Logf("after %q the call is carried by %s as %s (%s)", s.name, link.Carrier, link.Way, link.WayWhy)
	}
	starts = append(starts, time.Now())
	hangUp()
	for i, s := range steps {
		held := stalls(starts[i], starts[i+1])
		for _, p := range parties {
			audio, video := p.gap(webrtc.RTPCodecTypeAudio, starts[i], starts[i+1]), p.gap(webrtc.RTPCodecTypeVideo, starts[i], starts[i+1])
			t.Logf("%-16s at %-11s longest gap: audio %v, video %v (the machine stood still for %v)", s.name, p.name, audio.Round(time.Millisecond), video.Round(time.Millisecond), held.Round(time.Millisecond))
			if bound := s.bound + 3*held; max(audio, video) > bound {
				t.Errorf("%s: a gap of %v at %s, want at most %v", s.name, max(audio, video), p.name, bound)
			}
		}
	}
	told := map[tunnel.Code]int{}
	for _, c := range o.status().Changes {
		t.Logf("told: %s  %v", c.At.Format("15:04:05.000"), c)
		if c.What == tunnel.ChangedDatagrams {
			told[c.Cause]++
		}
	}
	if told[tunnel.UDPBlocked] < 2 || told[tunnel.UDPReturned] < 2 {
		t.Errorf("of the changes there are told %v, want UDP blocked and back twice each", told)
	}
	for i, p := range parties {
		if now := p.pair(t); now != before[i] {
			t.Errorf("%s had the pair %s, has %s", p.name, before[i], now)
		}
		p.mu.Lock()
		t.Logf("%s: pair %s, ICE states %v", p.name, before[i], p.states)
		if !slices.Equal(p.states, []webrtc.ICEConnectionState{webrtc.ICEConnectionStateChecking, webrtc.ICEConnectionStateConnected}) || p.pairs > 0 || p.renewed > 0 {
			t.Errorf("%s: ICE states %v, %d other pairs, %d negotiations", p.name, p.states, p.pairs, p.renewed)
		}
		p.mu.Unlock()
	}
	far.mu.Lock()
	if len(far.from) != 1 {
		t.Errorf("the far end heard from %v, want one egress port", far.from)
	}
	far.mu.Unlock()
	asked.Wait()
	runEventually(t, "each message of the data channel comes back", func() bool {
		mu.Lock()
		defer mu.Unlock()
		return sent > 0 && len(echoed) >= sent
	})
	mu.Lock()
	defer mu.Unlock()
	for i, n := range echoed {
		if n != uint32(i) {
			t.Fatalf("message %d came back as number %d", n, i)
		}
	}
}
