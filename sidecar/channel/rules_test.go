package channel

import (
	"encoding/binary"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// Packets written by their RFCs.

func rtpPacket(ssrc uint32, seq uint16) []byte {
	p := make([]byte, 172)
	p[0], p[1] = 0x80, 111
	binary.BigEndian.PutUint16(p[2:], seq)
	binary.BigEndian.PutUint32(p[4:], 960*uint32(seq))
	binary.BigEndian.PutUint32(p[8:], ssrc)
	return p
}

// byePacket is a receiver report and a goodbye (RFC 3550 §6.1 wants both).
func byePacket(ssrc uint32) []byte {
	p := []byte{0x80, 201, 0, 1, 0, 0, 0, 0, 0x81, 203, 0, 1, 0, 0, 0, 0}
	binary.BigEndian.PutUint32(p[4:], ssrc)
	binary.BigEndian.PutUint32(p[12:], ssrc)
	return p
}

func stunPacket(method uint16, id byte, attrs ...byte) []byte {
	p := make([]byte, stunHeader, stunHeader+len(attrs))
	binary.BigEndian.PutUint16(p, method)
	binary.BigEndian.PutUint16(p[2:], uint16(len(attrs)))
	binary.BigEndian.PutUint32(p[4:], stunCookie)
	p[19] = id
	return append(p, attrs...)
}

func dtlsPacket(content byte) []byte {
	p := make([]byte, 39)
	p[0], p[1], p[2], p[12] = content, 0xfe, 0xfd, 26
	return p
}

func inChannel(p []byte) []byte {
	h := []byte{0x40, 0, 0, 0}
	binary.BigEndian.PutUint16(h[2:], uint16(len(p)))
	return append(h, p...)
}

func ntpPacket(server bool, n uint32) []byte {
	p := make([]byte, 48)
	p[0] = 0x23
	if server {
		p[0], p[1] = 0xa4, 2 // leap second ahead: the first byte of RTP
	}
	binary.BigEndian.PutUint32(p[40:], n)
	return p
}

// A script writes facts one after the other.
type script struct {
	at    time.Duration
	facts []fact
}

func (s *script) send(up bool, p []byte) *script {
	s.facts = append(s.facts, fact{s.at, up, p})
	return s
}

func (s *script) wait(d time.Duration) *script { s.at += d; return s }

// every sends n packets, one each d.
func (s *script) every(d time.Duration, n int, up bool, p func(i int) []byte) *script {
	for i := range n {
		s.send(up, p(i)).wait(d)
	}
	return s
}

func call(ssrc uint32) func(int) []byte {
	return func(i int) []byte { return rtpPacket(ssrc, uint16(65530+i)) }
}

func junk(int) []byte { return []byte("\x05 is not any header that we know") }

const ms = time.Millisecond

func TestRules(t *testing.T) {
	lifetime0 := []byte{0, attrLifetime, 0, 4, 0, 0, 0, 0}
	allocate := func() *script {
		return new(script).send(true, stunPacket(allocateRequest, 1)).wait(20*ms).send(false, stunPacket(allocateSuccess, 1))
	}
	ice := func(s *script) *script {
		return s.send(true, stunPacket(bindingRequest, 9)).wait(20*ms).send(false, stunPacket(bindingSuccess, 9))
	}
	quic := append([]byte{0xc3, 0, 0, 0, 1, 8}, make([]byte, 1200)...)
	rng := rand.New(rand.NewPCG(1, 2))
	for _, c := range []struct {
		name   string
		tagged bool
		s      *script
		want   string
	}{
		// Enter.
		{"twenty RTP packets one way", false, new(script).every(100*ms, 20, false, call(7)), "0.0 - | 2.0 live | 32.0 quiet | 602.0 -"},
		{"nineteen are not enough", false, new(script).every(100*ms, 19, false, call(7)), "0.0 -"},
		{"RTP too slow", false, new(script).every(200*ms, 200, false, call(7)), "0.0 -"},
		{"ten each way are not one source", false, new(script).every(50*ms, 10, true, call(7)).every(50*ms, 10, false, call(7)), "0.0 -"},
		{"RTP with loss and reordering", false, new(script).every(20*ms, 60, true, func(i int) []byte {
			return rtpPacket(7, uint16(1000+2*i-3*(i%2)))
		}), "0.0 - | 0.8 live | 31.2 quiet | 602.0 -"},
		{"a sequence that stands", false, new(script).every(20*ms, 500, true, func(int) []byte { return rtpPacket(7, 9) }), "0.0 -"},
		{"a sequence without order", false, new(script).every(20*ms, 500, true, func(int) []byte { return rtpPacket(7, uint16(rng.Uint32())) }), "0.0 -"},
		{"a new source each time", false, new(script).every(20*ms, 500, true, func(i int) []byte { return rtpPacket(uint32(i), uint16(i)) }), "0.0 -"},
		{"a call among noise in every source", false, new(script).every(5*ms, 400, false, func(i int) []byte {
			if i%4 == 0 {
				return rtpPacket(7, uint16(i/4))
			}
			return rtpPacket(rng.Uint32(), uint16(rng.Uint32()))
		}), "0.0 - | 0.4 live | 32.0 quiet | 602.0 -"},
		{"consent after DTLS", false, ice(new(script).send(true, dtlsPacket(dtlsHandshake)).wait(80 * ms)), "0.0 - | 0.2 live | 30.2 -"},
		{"consent without DTLS", false, ice(new(script)), "0.0 -"},
		{"DTLS without consent", false, new(script).every(100*ms, 100, true, func(int) []byte { return dtlsPacket(23) }), "0.0 -"},
		{"checks that nobody answers", false, new(script).send(true, dtlsPacket(dtlsHandshake)).every(500*ms, 40, true, func(i int) []byte { return stunPacket(bindingRequest, byte(i)) }), "0.0 -"},
		{"an answer to another check", false, new(script).send(true, dtlsPacket(dtlsHandshake)).send(true, stunPacket(bindingRequest, 1)).send(false, stunPacket(bindingSuccess, 2)), "0.0 -"},
		{"an answer from the side that asked", false, new(script).send(true, dtlsPacket(dtlsHandshake)).send(true, stunPacket(bindingRequest, 1)).send(true, stunPacket(bindingSuccess, 1)), "0.0 -"},
		{"opaque both ways to a media destination", true, new(script).every(50*ms, 160, true, junk).s2(50*ms, 160, false, junk), "0.0 - | 5.1 live | 38.0 -"},
		{"opaque one way to a media destination", true, new(script).every(40*ms, 200, false, junk), "0.0 - | 5.1 live | 38.0 -"},
		{"opaque one way, too slow", true, new(script).every(50*ms, 200, false, junk), "0.0 -"},
		{"opaque for four seconds", true, new(script).every(40*ms, 100, false, junk), "0.0 -"},
		{"opaque with a silent second", true, new(script).every(40*ms, 100, false, junk).wait(time.Second).every(40*ms, 100, false, junk), "0.0 -"},
		{"opaque to any other destination", false, new(script).every(10*ms, 2000, true, junk), "0.0 -"},
		{"QUIC to a media destination", true, new(script).send(true, quic).every(10*ms, 2000, true, junk), "0.0 -"},
		{"RTP on a flow that QUIC opened", false, new(script).send(true, quic).every(10*ms, 200, true, call(7)), "0.0 -"},
		{"NTP", false, new(script).every(20*ms, 500, false, func(i int) []byte { return ntpPacket(true, uint32(i)) }).every(20*ms, 500, true, func(i int) []byte { return ntpPacket(false, uint32(i)) }), "0.0 -"},
		// TURN.
		{"RTP in ChannelData after an Allocate", false, allocate().every(20*ms, 50, false, func(i int) []byte { return inChannel(call(7)(i)) }), "0.0 - | 0.5 live | 31.1 quiet | 602.0 -"},
		{"RTP in ChannelData without an Allocate", false, new(script).every(20*ms, 50, false, func(i int) []byte { return inChannel(call(7)(i)) }), "0.0 -"},
		{"RTP in indications after an Allocate", false, allocate().every(20*ms, 50, true, func(i int) []byte {
			return stunPacket(sendIndication, byte(i), append([]byte{0, attrData, 0, 172}, call(7)(i)...)...)
		}), "0.0 - | 0.5 live | 31.1 quiet | 602.0 -"},
		{"Refresh 0", false, allocate().every(20*ms, 50, false, func(i int) []byte { return inChannel(call(7)(i)) }).send(true, stunPacket(refreshRequest, 3, lifetime0...)), "0.0 - | 0.5 live | 6.1 -"},
		// Keep and end.
		{"one packet in thirty seconds", false, new(script).every(20*ms, 20, false, call(7)).every(29*time.Second, 3, false, func(i int) []byte { return rtpPacket(7, uint16(1000+i)) }), "0.0 - | 0.4 live | 89.0 quiet | 659.0 -"},
		{"hold and back", false, new(script).every(20*ms, 20, false, call(7)).wait(5*time.Minute).send(false, rtpPacket(7, 1000)), "0.0 - | 0.4 live | 30.4 quiet | 301.0 live | 331.0 quiet | 901.0 -"},
		{"no hold with ICE", false, ice(new(script).every(20*ms, 20, false, call(7))), "0.0 - | 0.4 live | 30.4 -"},
		{"BYE", false, new(script).every(20*ms, 50, false, call(7)).send(false, byePacket(7)).every(20*ms, 10, false, func(i int) []byte { return call(7)(50 + i) }), "0.0 - | 0.4 live | 6.1 -"},
		{"BYE from a source that nobody knows", false, new(script).every(20*ms, 50, false, call(7)).send(false, byePacket(8)), "0.0 - | 0.4 live | 31.0 quiet | 601.0 -"},
		{"BYE of one source while another goes on", false, new(script).every(20*ms, 50, false, call(7)).send(false, byePacket(7)).every(20*ms, 100, false, call(8)), "0.0 - | 0.4 live | 33.0 quiet | 603.0 -"},
		{"DTLS alert", false, new(script).send(true, dtlsPacket(dtlsHandshake)).every(20*ms, 50, false, call(7)).send(false, dtlsPacket(dtlsAlert)), "0.0 - | 0.4 live | 6.1 -"},
		{"a new call after a goodbye", false, new(script).every(20*ms, 50, false, call(7)).send(false, byePacket(7)).wait(10*time.Second).every(20*ms, 50, false, call(8)), "0.0 - | 0.4 live | 6.1 - | 11.4 live | 42.0 quiet | 612.0 -"},
	} {
		t.Run(c.name, func(t *testing.T) {
			w := newWatcher(Config{MediaRule: func(Target) bool { return c.tagged }})
			s := w.OpenSocket(me)
			if got := play(w, c.s.facts, 11*time.Minute, func(f fact, now time.Time) { s.Packet(f.up, far, f.p, now) }); got.String() != c.want {
				t.Errorf("%s\nwant %s\n%s", got, c.want, strings.Join(got.seen, "\n"))
			}
		})
	}
}

// s2 lays further packets beside those already there.
func (s *script) s2(d time.Duration, n int, up bool, p func(i int) []byte) *script {
	for i := range n {
		s.facts = append(s.facts, fact{time.Duration(i) * d, up, p(i)})
	}
	slices.SortStableFunc(s.facts, func(a, b fact) int { return int(a.at - b.at) })
	return s
}

func TestStreams(t *testing.T) {
	framed := func(i int) []byte {
		p := call(7)(i)
		return append([]byte{0, byte(len(p))}, p...)
	}
	for _, c := range []struct {
		name string
		s    *script
		want string
	}{
		{"RFC 4571 with RTP", new(script).every(20*ms, 100, false, framed), "0.0 - | 0.4 live | 32.0 -"},
		{"the rhythm of media", new(script).every(100*ms, 150, true, junk).s2(100*ms, 150, false, junk), "0.0 - | 10.1 live | 44.1 -"},
		{"nine seconds of it", new(script).every(100*ms, 90, true, junk).s2(100*ms, 90, false, junk).wait(10*time.Second).send(true, junk(0)), "0.0 -"},
		{"one way only", new(script).every(100*ms, 300, false, junk), "0.0 -"},
		{"too much for media", new(script).every(100*ms, 300, true, junk).s2(50*ms, 600, false, func(int) []byte { return make([]byte, 64<<10) }), "0.0 -"},
		{"too few writes", new(script).every(250*ms, 100, true, junk).s2(250*ms, 100, false, junk), "0.0 -"},
	} {
		t.Run(c.name, func(t *testing.T) {
			w := newWatcher(Config{})
			s := w.OpenStream(me, far)
			got := play(w, c.s.facts, time.Minute, func(f fact, now time.Time) { s.Data(f.up, f.p, now) })
			if got.String() != c.want {
				t.Errorf("%s\nwant %s\n%s", got, c.want, strings.Join(got.seen, "\n"))
			}
		})
	}
}

func TestFramingDoesNotDependOnHowBytesArrive(t *testing.T) {
	rec := recording(t, "pion-turn-tcp")
	for _, size := range []int{1, 3, 7, 100, 1000, 1 << 20} {
		w := newWatcher(Config{})
		s := w.OpenStream(me, far)
		var buf [2][]byte
		for i, f := range rec {
			d := 0
			if f.up {
				d = 1
			}
			// The large sizes gather several messages in one write.
			if buf[d] = append(buf[d], f.p...); len(buf[d]) < min(size, 5000) && i < len(rec)-2 {
				continue
			}
			for c := range slices.Chunk(buf[d], size) {
				s.Data(f.up, c, epoch.Add(f.at))
			}
			buf[d] = nil
		}
		c := w.Channels(epoch.Add(6 * time.Second))
		if len(c) != 1 || !strings.Contains(strings.Join(c[0].Evidence, " "), "inside TURN on TCP") {
			t.Errorf("in pieces of %d: %+v", size, c)
		}
	}
}

func TestANamesAnswersComeFromAnAddress(t *testing.T) {
	w := newWatcher(Config{})
	s := w.OpenSocket(me)
	name, numeric := Target{Host: "turn.example\x1b[2J", Port: 3478}, far
	s.Packet(true, name, dtlsPacket(dtlsHandshake), epoch)
	s.Packet(true, name, stunPacket(bindingRequest, 1), epoch)
	s.Packet(false, numeric, stunPacket(bindingSuccess, 1), epoch)
	c := w.Channels(epoch)
	if len(c) != 1 || c[0].Flows != 1 || !strings.Contains(c[0].Evidence[0], "turn.example?[2J:3478 (203.0.113.5:3478)") {
		t.Fatalf("%+v", c)
	}
}

func TestAClosedSocketEndsItsFlowsAtOnce(t *testing.T) {
	var events []string
	w := newWatcher(Config{Changed: func(e Event) { events = append(events, e.Was+">"+e.Is+": "+e.Why) }})
	s := w.OpenSocket(me)
	for i := range 30 {
		s.Packet(false, far, call(7)(i), epoch.Add(time.Duration(i)*20*ms))
	}
	now := epoch.Add(time.Second)
	w.Tick(now)
	s.Close(now)
	s.Packet(false, far, call(7)(31), now)
	if c := w.Channels(now); len(c) != 0 {
		t.Errorf("still %+v", c)
	}
	w.Tick(now)
	if len(events) != 2 || !strings.HasPrefix(events[0], ">live: RTP ssrc 0x00000007: 30 packets down in 0.6 s from 203.0.113.5:3478") || events[1] != "live>: its socket was closed" {
		t.Errorf("events %q", events)
	}
	if n := w.flows.Load(); n != 0 {
		t.Errorf("%d flows are left", n)
	}
}

func TestAGoodbyeOnTheRTCPSocketEndsTheRTPSocketsCall(t *testing.T) {
	w := newWatcher(Config{})
	a, b, other := w.OpenSocket(me), w.OpenSocket(me), w.OpenSocket(Owner{Addr: netip.MustParseAddr("10.0.0.9")})
	for i := range 30 {
		a.Packet(false, far, call(7)(i), epoch)
		other.Packet(false, far, call(7)(i), epoch)
	}
	b.Packet(false, target("203.0.113.5:3479"), byePacket(7), epoch)
	w.Channels(epoch)
	c := w.Channels(epoch.Add(6 * time.Second))
	if len(c) != 1 || c[0].Name != "10.0.0.9" {
		t.Errorf("%+v", c)
	}
}

func TestWhatIsRefusedIsNoEvidence(t *testing.T) {
	w := newWatcher(Config{})
	s := w.OpenSocket(me)
	for i := range 300 {
		s.Packet(true, far, call(7)(i), epoch.Add(time.Duration(i)*20*ms))
		s.Refused(far)
	}
	if c := w.Channels(epoch.Add(6 * time.Second)); len(c) != 0 {
		t.Errorf("%+v", c)
	}
}

func TestClocksStandStill(t *testing.T) {
	start := func() (*Watcher, *Socket) {
		w := newWatcher(Config{})
		s := w.OpenSocket(me)
		for i := range 30 {
			s.Packet(true, far, call(7)(i), epoch)
		}
		s.Packet(true, far, stunPacket(bindingRequest, 1), epoch)
		s.Packet(false, far, stunPacket(bindingSuccess, 1), epoch) // ICE: no hold
		return w, s
	}
	live := func(t *testing.T, w *Watcher, at time.Duration, want bool) {
		t.Helper()
		if got := len(w.Channels(epoch.Add(at))) == 1; got != want {
			t.Errorf("at %s live is %v", at, got)
		}
	}
	t.Run("without a carrier", func(t *testing.T) {
		w, _ := start()
		w.Pause(epoch.Add(10 * time.Second))
		w.Pause(epoch.Add(20 * time.Second))
		live(t, w, 10*time.Minute, true)
		w.Resume(epoch.Add(10 * time.Minute))
		w.Resume(epoch.Add(11 * time.Minute))
		live(t, w, 10*time.Minute+20*time.Second, true)
		live(t, w, 10*time.Minute+21*time.Second, false)
	})
	t.Run("nothing enters meanwhile", func(t *testing.T) {
		w := newWatcher(Config{})
		s := w.OpenSocket(me)
		w.Pause(epoch)
		for i := range 100 {
			s.Packet(true, far, call(7)(i), epoch.Add(time.Duration(i)*time.Second))
		}
		live(t, w, 100*time.Second, false)
	})
	t.Run("across suspend", func(t *testing.T) {
		w, s := start()
		for i := range 11 {
			w.Tick(epoch.Add(time.Duration(i) * time.Second))
		}
		woke := 10*time.Second + 5*time.Minute
		s.Packet(true, far, call(7)(40), epoch.Add(woke)) // before the first tick: must not count for five minutes
		w.Tick(epoch.Add(woke))
		for i := range 60 {
			at := woke + time.Duration(i)*time.Second
			w.Tick(epoch.Add(at))
			live(t, w, at, i <= 30)
		}
	})
}

func TestLeases(t *testing.T) {
	dead := map[int]bool{}
	w := newWatcher(Config{Alive: func(pid int) bool { return !dead[pid] }})
	names := func() string {
		var all []string
		for _, c := range w.Channels(epoch.Add(time.Second)) {
			if c.Lease {
				c.Name += "*"
			}
			all = append(all, c.Name)
		}
		return strings.Join(all, " ")
	}
	check := func(want string) {
		t.Helper()
		if got := names(); got != want {
			t.Errorf("channels %q, want %q", got, want)
		}
	}
	for _, bad := range []string{"", "a\nb", strings.Repeat("x", 65)} {
		if w.Join(bad, 0, epoch) == nil {
			t.Errorf("%q is a name", bad)
		}
	}
	for _, j := range []struct {
		name string
		pid  int
	}{{"standup", 0}, {"ward", 42}} {
		if err := w.Join(j.name, j.pid, epoch); err != nil {
			t.Fatal(err)
		}
	}
	check("standup* ward*")
	s := w.OpenSocket(Owner{App: "baresip", PID: 42})
	for i := range 30 {
		s.Packet(true, far, call(7)(i), epoch)
	}
	check("standup* ward*") // the process has a name now
	dead[42] = true
	check("baresip/42 standup*")
	if w.Join("late", 42, epoch) == nil {
		t.Error("a dead process holds a lease")
	}
	if !w.Leave("standup") || w.Leave("standup") {
		t.Error("left twice or never")
	}
	check("baresip/42")
}

func TestChannelsAreGroupedByWhoOwnsThem(t *testing.T) {
	w := newWatcher(Config{})
	asked := 0
	addr := netip.MustParseAddr("127.0.0.1")
	found := func(app string, pid int) func() (string, int) {
		return func() (string, int) { asked++; return app, pid }
	}
	for i, o := range []Owner{
		{Addr: addr, Resolve: found("chromium", 7)}, {Addr: addr, Resolve: found("chromium", 7)},
		{Addr: addr, Resolve: found("chromium", 8)}, {Addr: addr, User: "alice", Resolve: found("", 0)},
		{Addr: addr}, {Addr: addr},
	} {
		s := w.OpenSocket(o)
		for j := range 30 {
			s.Packet(true, far, rtpPacket(uint32(i), uint16(j)), epoch)
		}
	}
	w.OpenSocket(Owner{Resolve: found("idle", 9)})
	var got []string
	for range 2 {
		got = nil
		for _, c := range w.Channels(epoch) {
			got = append(got, c.Name+" "+strings.Repeat("+", c.Flows))
		}
	}
	if want := []string{"127.0.0.1 ++", "alice +", "chromium/7 ++", "chromium/8 +"}; !slices.Equal(got, want) {
		t.Errorf("%q, want %q", got, want)
	}
	if asked != 4 {
		t.Errorf("asked for the process %d times, want once for each of 4 sockets", asked)
	}
}

func TestMemoryIsBounded(t *testing.T) {
	w := newWatcher(Config{MaxFlows: 200})
	a, b := w.OpenSocket(me), w.OpenSocket(me)
	for i := range 30 {
		a.Packet(true, far, call(7)(i), epoch)
	}
	for i := range 10_000 {
		at := epoch.Add(time.Duration(i) * ms)
		peer := Target{Addr: netip.AddrFrom4([4]byte{10, byte(i >> 16), byte(i >> 8), byte(i)}), Port: 6881}
		a.Packet(true, peer, junk(0), at)
		b.Packet(true, peer, junk(0), at)
	}
	if len(a.flows) > maxRemotes || len(a.flows)+len(b.flows) > 200 || len(a.index) > 2*maxRemotes || int(w.flows.Load()) != len(a.flows)+len(b.flows) {
		t.Errorf("%d and %d flows, %d in the index, %d counted", len(a.flows), len(b.flows), len(a.index), w.flows.Load())
	}
	if c := w.Channels(epoch.Add(10 * time.Second)); len(c) != 1 {
		t.Errorf("the call was pushed out: %+v", c)
	}
	// A new call finds its place among many remotes.
	for i := range 30 {
		b.Packet(true, far, call(9)(i), epoch.Add(11*time.Second))
	}
	if c := w.Channels(epoch.Add(11 * time.Second)); len(c) != 1 || c[0].Flows != 2 {
		t.Errorf("%+v", c)
	}
}

func TestManySourcesDoNotHideACall(t *testing.T) {
	w := newWatcher(Config{})
	s := w.OpenSocket(me)
	for i := range 75 * 30 { // a conference: 75 sources in turn, in one flow
		s.Packet(false, far, rtpPacket(uint32(i%75), uint16(i/75)), epoch.Add(time.Duration(i)*ms))
	}
	if c := w.Channels(epoch.Add(3 * time.Second)); len(c) != 1 {
		t.Errorf("%+v", c)
	}
}

func TestItIsSafeForConcurrentUse(t *testing.T) {
	w := newWatcher(Config{Changed: func(Event) {}, MaxFlows: 50, Alive: func(pid int) bool { return pid%2 == 0 }})
	var wg sync.WaitGroup
	shared := w.OpenSocket(Owner{Resolve: func() (string, int) { return "app", 4 }})
	for g := range 4 {
		wg.Go(func() {
			s, tcp := w.OpenSocket(Owner{PID: 10 + g}), w.OpenStream(me, far)
			for i := range 2000 {
				now := epoch.Add(time.Duration(i) * 10 * ms)
				s.Packet(i%2 == 0, far, call(uint32(g))(i), now)
				shared.Packet(g%2 == 0, Target{Addr: far.Addr, Port: uint16(1 + i%100)}, call(9)(i), now)
				shared.Packet(true, far, byePacket(uint32(g)), now)
				tcp.Data(i%2 == 0, junk(i), now)
				switch i % 50 {
				case 10:
					w.Channels(now)
				case 20:
					w.Tick(now)
				case 30:
					w.Pause(now)
					w.Join("x", 2*g, now)
				case 40:
					w.Resume(now)
					w.Leave("x")
				}
			}
			s.Close(epoch)
			tcp.Close(epoch)
		})
	}
	wg.Wait()
	shared.Close(epoch)
	if c := w.Channels(epoch.Add(time.Minute)); len(c) != 0 || w.flows.Load() != 0 {
		t.Errorf("left behind: %+v, %d flows", c, w.flows.Load())
	}
}

func TestNoiseNeverEnters(t *testing.T) {
	rng := rand.New(rand.NewPCG(7, 7))
	w := newWatcher(Config{})
	random, dns := w.OpenSocket(me), w.OpenSocket(me)
	for i := range 100_000 {
		now := epoch.Add(time.Duration(i) * ms)
		p := make([]byte, rng.IntN(64))
		for j := range p {
			p[j] = byte(rng.Uint32())
		}
		random.Packet(i%2 == 0, far, p, now)
		// A DNS answer: ID, flags, four counts. The counts lie where RTP has its source.
		q := make([]byte, 60)
		binary.BigEndian.PutUint16(q, uint16(rng.Uint32()))
		binary.BigEndian.PutUint16(q[2:], []uint16{0x8180, 0x8183, 0x8580, 0x81a0, 0x8182, 0x8400}[rng.IntN(6)])
		q[5], q[7], q[9], q[11] = 1, byte(rng.IntN(4)), byte(rng.IntN(2)), 1
		dns.Packet(false, target("192.0.2.53:53"), q, now)
		if i%1000 == 0 {
			if c := w.Channels(now); len(c) != 0 {
				t.Fatalf("after %d: %+v", i, c)
			}
		}
	}
}

func TestAPacketCostsNoMemory(t *testing.T) {
	w := newWatcher(Config{})
	s := w.OpenSocket(me)
	n := 0
	p := rtpPacket(7, 0)
	bye := byePacket(99)
	at := func() time.Time { n++; return epoch.Add(time.Duration(n) * ms) }
	send := func() {
		binary.BigEndian.PutUint16(p[2:], uint16(n))
		s.Packet(n%2 == 0, far, p, at())
		s.Packet(true, far, stunPackets[n%2], at())
		s.Packet(false, far, bye, at())
	}
	for range 100 {
		send()
	}
	if c := w.Channels(at()); len(c) != 1 {
		t.Fatalf("%+v", c)
	}
	for range maxByes { // what waits for the next look is bounded
		send()
	}
	if a := testing.AllocsPerRun(1000, send); a != 0 {
		t.Errorf("%v allocations for three packets", a)
	}
}

var stunPackets = [2][]byte{stunPacket(bindingRequest, 1), stunPacket(bindingSuccess, 1)}

func BenchmarkPacket(b *testing.B) {
	rec := recording(b, "pion-call")
	for _, c := range []struct {
		name string
		next func(i int) ([]byte, Target)
	}{
		{"RTP", func(i int) ([]byte, Target) {
			p := rec[i%len(rec)].p
			return p, far
		}},
		{"sixteen remotes", func(i int) ([]byte, Target) {
			return rec[i%len(rec)].p, Target{Addr: far.Addr, Port: uint16(1 + i%16)}
		}},
	} {
		b.Run(c.name, func(b *testing.B) {
			s := newWatcher(Config{}).OpenSocket(me)
			i := 0
			for b.Loop() {
				p, to := c.next(i)
				s.Packet(i%2 == 0, to, p, epoch.Add(time.Duration(i)*10*ms))
				i++
			}
		})
	}
}

func BenchmarkStream(b *testing.B) {
	s := newWatcher(Config{}).OpenStream(me, far)
	p := make([]byte, 16<<10)
	i := 0
	for b.Loop() {
		s.Data(i%2 == 0, p, epoch.Add(time.Duration(i)*ms))
		i++
	}
}
