package session

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"maps"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"culvert/tunnel"
	"culvert/tunnel/bulk"
	"culvert/tunnel/media"
	"culvert/tunnel/tunneltest"
	"culvert/tunnel/wire"
)

// waysNet counts what passes by QUIC DATAGRAM and as sealed packets, each way.
type waysNet struct {
	datagrams, packets [2]atomic.Int64 // down, up
	dropPackets        atomic.Bool
}

func (n *waysNet) config() tunneltest.Config {
	i := func(up bool) int {
		if up {
			return 1
		}
		return 0
	}
	return tunneltest.Config{
		Flow: true, Queue: 1000,
		Datagram: func(up bool, p []byte) tunneltest.Fate {
			if !wire.IsNotice(p) {
				n.datagrams[i(up)].Add(1)
			}
			return tunneltest.Fate{}
		},
		Packet: func(up bool, p []byte) tunneltest.Fate {
			if len(p) > 300 { // the tests' datagrams; probes and reports are shorter
				n.packets[i(up)].Add(1)
			}
			return tunneltest.Fate{Drop: n.dropPackets.Load()}
		},
	}
}

// echoed sends a datagram of 500 bytes and waits until it has come back.
func echoed(t *testing.T, a tunnel.Packets, in *inbox) {
	t.Helper()
	if err := a.Send(make([]byte, 500), alpha); err != nil {
		t.Fatal(err)
	}
	next(t, in.got)
}

func TestDatagramsGoByTheWayThatTheNearEndNames(t *testing.T) {
	n := &waysNet{}
	p := join(t, NewNear(0), n.config(), FarConfig{})
	in := newInbox()
	a, _ := p.near.OpenPackets(tunnel.Peer{}, in)
	echoed(t, a, in)
	if n.datagrams[0].Load() != 1 || n.datagrams[1].Load() != 1 {
		t.Errorf("before anything is said QUIC DATAGRAM carried %d up and %d down, want 1 and 1", n.datagrams[1].Load(), n.datagrams[0].Load())
	}
	// Datagrams pass before the far end has claimed the IDs of sealed packets.
	eventually(t, "the far end takes sealed packets", func() bool { return p.far.plane.state(wire.WaySealed).Present })
	p.at.Probe(wire.WaySealed, false)
	p.at.Probe(wire.WaySealed, true)
	eventually(t, "both probes are answered", func() bool {
		s := p.at.Way(wire.WaySealed)
		return !s.Small.IsZero() && !s.Large.IsZero()
	})
	p.at.Use(wire.WaySealed, wire.NoWay)
	eventually(t, "the far end obeys", func() bool { u := p.far.plane.using.Load(); return u != nil && u.first.kind == wire.WaySealed })
	up, down := n.packets[1].Load(), n.packets[0].Load()
	for range 10 {
		echoed(t, a, in)
	}
	if up, down := n.packets[1].Load()-up, n.packets[0].Load()-down; up < 10 || down < 10 || n.datagrams[1].Load() != 1 {
		t.Errorf("sealed packets: %d up, %d down; DATAGRAM %d up", up, down, n.datagrams[1].Load())
	}
}

func TestACopyOnTheSecondWayIsDeliveredOnce(t *testing.T) {
	n := &waysNet{}
	p := join(t, NewNear(0), n.config(), FarConfig{})
	in := newInbox()
	a, _ := p.near.OpenPackets(tunnel.Peer{}, in)
	p.at.Use(wire.WayDatagram, wire.WaySealed)
	eventually(t, "the far end obeys", func() bool { u := p.far.plane.using.Load(); return u != nil && u.also != nil })
	small := func() {
		a.Send(make([]byte, 200), alpha)
		next(t, in.got)
	}
	for range 10 {
		small()
	}
	eventually(t, "all copies have come", func() bool {
		return p.near.drops.Get(media.Duplicate) == 10 && p.far.drops.Get(media.Duplicate) == 10
	})
	n.dropPackets.Store(true)
	small()
	if len(in.got) != 0 {
		t.Errorf("%d datagrams were delivered twice", len(in.got))
	}
}

// keptWay keeps what is sent by it.
type keptWay struct {
	idleWay
	sent [][]byte
}

func (w *keptWay) Send(p []byte) error {
	if !wire.IsNotice(p) {
		w.sent = append(w.sent, bytes.Clone(p))
	}
	return nil
}

func TestOfACallOnlySoundSTUNAndRTCPGoTwice(t *testing.T) {
	rtp := func(ssrc, seq, frame, size int) []byte {
		p := make([]byte, size)
		p[0], p[1] = 0x80, 96
		binary.BigEndian.PutUint16(p[2:], uint16(seq))
		binary.BigEndian.PutUint32(p[4:], uint32(frame))
		binary.BigEndian.PutUint32(p[8:], uint32(ssrc))
		return p
	}
	stun := make([]byte, 20)
	binary.BigEndian.PutUint32(stun[4:], 0x2112A442)
	rtcp := []byte{0x81, 201, 0, 7, 31: 0}
	synctest.Test(t, func(t *testing.T) {
		p := newPlane(0, &media.Drops{}, bulk.New())
		defer p.close()
		first, second := &keptWay{}, &keptWay{}
		p.addWay(wire.WayDatagram, first)
		p.addWay(wire.WayLanes, second)
		l := p.add(&leg{plane: p, id: 1})
		count := map[string]int{}
		send := func(what string, b []byte) {
			t.Helper()
			n, before := len(first.sent), len(second.sent)
			l.send(b, alpha)
			if len(first.sent) != n+1 {
				t.Errorf("%s did not go by the first way", what)
			}
			count[what] += len(second.sent) - before
		}
		call := func(from int) {
			for i := from; i < from+100; i++ { // 2 s
				send("sound", rtp(1, i, 960*i, 120))
				for k := range 3 { // a picture each 20 ms
					send("pictures", rtp(2, 3*i+k, 1800*i, 1100))
				}
				if i%50 == 0 {
					send("STUN", stun)
					send("RTCP", rtcp)
				}
				time.Sleep(20 * time.Millisecond)
			}
		}
		p.say(wire.WayDatagram, wire.NoWay)
		call(0)
		for what, n := range count {
			if n != 0 {
				t.Errorf("%d of %s went twice without doubt", n, what)
			}
		}
		p.say(wire.WayDatagram, wire.WayLanes)
		call(100)
		if want := map[string]int{"sound": 100, "pictures": 0, "STUN": 2, "RTCP": 2}; !maps.Equal(count, want) {
			t.Errorf("in doubt there went twice %v, want %v", count, want)
		}
	})
}

func TestTheFarEndObeysTheNewestWord(t *testing.T) {
	p := newPlane(0, &media.Drops{}, bulk.New())
	p.open = func(uint32, bool) *leg { return nil }
	p.addWay(wire.WayDatagram, sink{})
	p.addWay(wire.WaySealed, sink{})
	for _, c := range []struct {
		say         wire.Use
		first, also wire.Way
	}{
		{wire.Use{N: 5, Way: wire.WaySealed}, wire.WaySealed, wire.NoWay},
		{wire.Use{N: 4, Way: wire.WayDatagram}, wire.WaySealed, wire.NoWay},
		{wire.Use{N: 0, Way: wire.WayDatagram}, wire.WaySealed, wire.NoWay},
		{wire.Use{N: 6, Way: wire.WayDatagram, Also: wire.WaySealed}, wire.WayDatagram, wire.WaySealed},
		{wire.Use{N: 7, Way: wire.WayLanes}, wire.WayDatagram, wire.NoWay},      // there are no lanes
		{wire.Use{N: 8, Way: 200, Also: 200}, wire.WayDatagram, wire.NoWay},     // a newer minor version
		{wire.Use{N: 1 << 31, Way: wire.WaySealed}, wire.WaySealed, wire.NoWay}, // 2³¹ - 8 ahead
		{wire.Use{N: 3, Way: wire.WayDatagram}, wire.WaySealed, wire.NoWay},     // behind, by RFC 1982
		{wire.Use{N: 1<<31 + 1, Way: wire.WaySealed, Also: wire.WaySealed}, wire.WaySealed, wire.NoWay},
	} {
		p.obey(c.say)
		u := p.using.Load()
		also := wire.NoWay
		if u.also != nil {
			also = u.also.kind
		}
		if u.first.kind != c.first || also != c.also {
			t.Errorf("after %+v: %v and %v, want %v and %v", c.say, u.first.kind, also, c.first, c.also)
		}
	}
	p.close()
	if p.using.Load() != nil {
		t.Error("a closed plane still has a way")
	}
}

func TestLargeDatagramsPassInPieces(t *testing.T) {
	p := join(t, NewNear(0), tunneltest.Config{Queue: 1000}, FarConfig{})
	in := newInbox()
	a, _ := p.near.OpenPackets(tunnel.Peer{}, in)
	for _, size := range []int{1183, 1184, 1185, 1200, 5000, 65507} {
		sent := bytes.Repeat([]byte("0123456789abcdef"), size/16+1)[:size]
		if err := a.Send(sent, alpha); err != nil {
			t.Fatalf("%d bytes: %v", size, err)
		}
		if got, want := next(t, in.got), fmt.Sprintf("%s from %s", sent, alpha.AddrPort()); got != want {
			t.Errorf("%d bytes come back as %d", size, len(got)-len(want)+size)
		}
	}
}

// reporting joins two ends by sealed packets whose fate is given, sends 100
// datagrams a second for some seconds, and returns the near end's view. It runs
// in a synctest bubble.
func reporting(t *testing.T, fate func(up bool, n int64) tunneltest.Fate) (p *path, ended func()) {
	var count [2]atomic.Int64
	p = join(t, NewNear(0), tunneltest.Config{Flow: true, Queue: 1000, Packet: func(up bool, _ []byte) tunneltest.Fate {
		i := 0
		if up {
			i = 1
		}
		return fate(up, count[i].Add(1))
	}}, FarConfig{})
	in := newInbox()
	a, err := p.near.OpenPackets(tunnel.Peer{}, in)
	if err != nil {
		t.Fatal(err)
	}
	p.at.Use(wire.WaySealed, wire.NoWay)
	for range 500 {
		a.Send(make([]byte, 800), alpha)
		time.Sleep(10 * time.Millisecond)
	}
	return p, func() { a.Close(); p.end() }
}

func TestReportsTellLossDelayAndRoundTrip(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p, end := reporting(t, func(up bool, n int64) tunneltest.Fate {
			f := tunneltest.Fate{Delay: 20 * time.Millisecond}
			if up && n > 100 {
				f.Delay = 50 * time.Millisecond
				f.Drop = n%10 == 0
			}
			return f
		})
		defer end()
		s := p.at.Way(wire.WaySealed)
		if s.Lost < 0.03 || s.Lost > 0.16 { // of some 25 packets; a report may overtake one or two
			t.Errorf("the loss upwards is %.3f, want about 0.1", s.Lost)
		}
		if s.Delay < 29*time.Millisecond || s.Delay > 31*time.Millisecond {
			t.Errorf("the delay upwards has risen by %v, want 30 ms", s.Delay)
		}
		if s.RTT < 69*time.Millisecond || s.RTT > 72*time.Millisecond {
			t.Errorf("the round trip is %v, want 70 ms", s.RTT)
		}
		far := p.far.plane.state(wire.WaySealed)
		if far.Lost > 0.1 || far.Delay > time.Millisecond { // a report may overtake a packet or two of its 25
			t.Errorf("downwards: %+v", far)
		}
	})
}

func TestLossAndDelayAreKnownWhereOurReportsDoNotArrive(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var packets atomic.Int64
		var drop atomic.Bool
		p := join(t, NewNear(0), tunneltest.Config{Flow: true, Queue: 1000, Packet: func(up bool, b []byte) tunneltest.Fate {
			f := tunneltest.Fate{Delay: 20 * time.Millisecond}
			if up && drop.Load() {
				f.Delay = 120 * time.Millisecond
				// Reports and whatever else is short is lost, and half of the rest.
				f.Drop = len(b) < 300 || packets.Add(1)%2 == 0
			}
			return f
		}}, FarConfig{})
		a, err := p.near.OpenPackets(tunnel.Peer{}, newInbox())
		if err != nil {
			t.Fatal(err)
		}
		p.at.Use(wire.WaySealed, wire.NoWay)
		send := func(d time.Duration) {
			for range d / (10 * time.Millisecond) {
				a.Send(make([]byte, 800), alpha)
				time.Sleep(10 * time.Millisecond)
			}
		}
		send(2 * time.Second)
		drop.Store(true)
		send(400 * time.Millisecond)
		s := p.at.Way(wire.WaySealed)
		if s.Lost < 0.4 || s.Lost > 0.6 {
			t.Errorf("after 400 ms the loss is %.2f, want about half", s.Lost)
		}
		if s.Delay < 98*time.Millisecond || s.Delay > 102*time.Millisecond {
			t.Errorf("after 400 ms the delay has risen by %v, want 100 ms", s.Delay)
		}
		a.Close()
		p.end()
	})
}

// loadedWay is a lane whose TCP lets some of what is sent pass, with a queue.
type loadedWay struct {
	idleWay
	mu    sync.Mutex
	rate  float64
	queue time.Duration
}

func (w *loadedWay) Load() (float64, time.Duration, bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.rate, w.queue, true
}

func (w *loadedWay) becomes(rate float64, queue time.Duration) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.rate, w.queue = rate, queue
}

func TestLanesThatCarryLessThanTheCallSendsAreShapedToWhatTheyCarry(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPlane(0, &media.Drops{}, bulk.New())
		defer p.close()
		w := &loadedWay{rate: 2e6}
		p.addWay(wire.WayLanes, w)
		l := p.add(&leg{plane: p, id: 1})
		send := func(d time.Duration) { // 2 Mbit/s
			for range d / (4 * time.Millisecond) {
				l.send(make([]byte, 1000), alpha)
				time.Sleep(4 * time.Millisecond)
			}
		}
		send(2 * time.Second)
		if p.state(wire.WayLanes).Shaped {
			t.Error("lanes that carry all are shaped")
		}
		w.becomes(300e3, 200*time.Millisecond)
		send(500 * time.Millisecond)
		w.becomes(300e3, 0)
		send(500 * time.Millisecond)
		if !p.state(wire.WayLanes).Shaped {
			t.Fatal("lanes that carry a seventh of the call are not shaped")
		}
		before := p.ways[wire.WayLanes].sentBytes.Load()
		send(time.Second)
		if sent := 8 * (p.ways[wire.WayLanes].sentBytes.Load() - before); sent < 200_000 || sent > 310_000 {
			t.Errorf("%d bits were sent in a second, want somewhat less than 300,000", sent)
		}
		w.becomes(3e6, 0)
		send(20 * time.Second)
		if p.state(wire.WayLanes).Shaped {
			t.Error("lanes that carry all again are still shaped")
		}
	})
}

func TestLanesThatStoodStillAreFreeWhenSomethingArrivesAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPlane(0, &media.Drops{}, bulk.New())
		defer p.close()
		w := &loadedWay{rate: 2e6}
		p.addWay(wire.WayLanes, w)
		l := p.add(&leg{plane: p, id: 1})
		send := func(d time.Duration) { // 2 Mbit/s
			for range d / (4 * time.Millisecond) {
				l.send(make([]byte, 1000), alpha)
				time.Sleep(4 * time.Millisecond)
			}
		}
		send(2 * time.Second)
		w.becomes(0, 40*time.Millisecond) // the peer stands still: nothing is acknowledged
		send(10 * time.Second)
		w.becomes(2e6, 40*time.Millisecond)
		send(200 * time.Millisecond)
		before := p.ways[wire.WayLanes].sentBytes.Load()
		send(time.Second)
		if sent := 8 * (p.ways[wire.WayLanes].sentBytes.Load() - before); sent < 1_900_000 {
			t.Errorf("%d bits of 2,000,000 were sent in a second after the peer had stood still", sent)
		}
	})
}

func TestReportsEndWithTheDatagrams(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var packets atomic.Int64
		p, end := reporting(t, func(bool, int64) tunneltest.Fate { packets.Add(1); return tunneltest.Fate{} })
		defer end()
		if !p.at.Reporting() {
			t.Error("no reports flow while datagrams do")
		}
		time.Sleep(2 * mediaRest)
		before := packets.Load()
		time.Sleep(time.Minute)
		if n := packets.Load() - before; n != 0 || p.at.Reporting() {
			t.Errorf("%d packets in a minute without datagrams", n)
		}
	})
}

// promptWay brings a probe as soon as it is started.
type promptWay struct {
	idleWay
	sent chan []byte
}

func (w *promptWay) Start(recv func(p []byte), _ func()) {
	go recv((&wire.Probe{Nonce: 7}).Append(nil))
	for range 10 {
		runtime.Gosched()
	}
}

func (w *promptWay) Send(p []byte) error {
	w.sent <- bytes.Clone(p)
	return nil
}

func TestWhatComesAtOnceIsAnsweredByTheNewWay(t *testing.T) {
	for range 100 {
		drops := &media.Drops{}
		p := newPlane(0, drops, bulk.New())
		first, second := &promptWay{sent: make(chan []byte, 10)}, &promptWay{sent: make(chan []byte, 10)}
		p.addWay(wire.WayDatagram, first)
		p.addWay(wire.WaySealed, second)
		next(t, first.sent)
		next(t, second.sent)
		if n := drops.Get(media.NoWay); n != 0 {
			t.Fatalf("%d answers found no way", n)
		}
		p.close()
	}
}

// promptEcho brings a datagram as soon as it is started.
type promptEcho struct{ promptWay }

func (w *promptEcho) Start(recv func(p []byte), _ func()) {
	go recv(append((&wire.Header{Full: true, Association: 1, Target: alpha}).Append(nil), "x"...))
	for range 10 {
		runtime.Gosched()
	}
}

func TestADatagramThatComesAtOnceIsAnswered(t *testing.T) {
	for range 100 {
		p := newPlane(0, &media.Drops{}, bulk.New())
		p.open = func(id uint32, _ bool) *leg {
			l := &leg{plane: p, id: id}
			l.deliver = func(b []byte, at tunnel.Target) { l.send(b, at) }
			return p.add(l)
		}
		w := &promptEcho{promptWay{sent: make(chan []byte, 10)}}
		p.addWay(wire.WayDatagram, w)
		if got := next(t, w.sent); !bytes.HasSuffix(got, []byte("x")) {
			t.Fatalf("the answer is %x", got)
		}
		p.close()
	}
}

// idleWay takes everything and brings nothing.
type idleWay struct{ n int }

func (*idleWay) Start(func(p []byte), func()) {}
func (*idleWay) Send(p []byte) error          { return nil }
func (*idleWay) Max() int                     { return 1200 }
func (*idleWay) Name() string                 { return "lane" }
func (w *idleWay) Lost() map[string]uint64    { return map[string]uint64{"late": uint64(w.n)} }

func TestLanesThatEndWhileTheSessionEndsAreCountedOnce(t *testing.T) {
	for range 100 {
		p := newPlane(0, &media.Drops{}, nil)
		lanes := []*idleWay{{1}, {2}, {3}}
		var wg sync.WaitGroup
		for _, l := range lanes {
			p.addWay(wire.WayLanes, l)
			wg.Go(func() { p.removeWay(wire.WayLanes, l) })
		}
		wg.Go(p.close)
		wg.Wait()
		p.close()
		lost := map[string]uint64{}
		p.lostTo(lost)
		if lost["late"] != 6 || p.using.Load() != nil {
			t.Fatalf("lost %v in all, in use %v; each of the three lanes lost 1, 2 and 3", lost, p.using.Load())
		}
	}
}

func TestALoadIsAnsweredInFull(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p, end := reporting(t, func(bool, int64) tunneltest.Fate { return tunneltest.Fate{Delay: 20 * time.Millisecond} })
		defer end()
		before := p.far.plane.allWays()[wire.WaySealed].sentBytes.Load()
		size := min(p.at.Way(wire.WaySealed).Max, largeProbe)
		p.at.Load(wire.WaySealed, 10, true)
		p.at.Load(wire.WaySealed, 5, false)
		time.Sleep(45 * time.Millisecond)
		if n := p.at.Way(wire.WaySealed).Carried; n != 15 {
			t.Errorf("%d of 15 were answered", n)
		}
		if n := int(p.far.plane.allWays()[wire.WaySealed].sentBytes.Load() - before); n < 15*size || n > 20*size {
			t.Errorf("the far end has sent %d bytes, want 15 answers of %d", n, size)
		}
		p.at.Load(wire.WaySealed, 1, true)
		time.Sleep(45 * time.Millisecond)
		if n := p.at.Way(wire.WaySealed).Carried; n != 1 {
			t.Errorf("%d of another load were answered, want 1", n)
		}
		y := p.at.plane.allWays()[wire.WaySealed]
		y.answered(&wire.Answer{Nonce: y.loaded.nonce, Size: uint16(y.loaded.size)})     // again
		y.answered(&wire.Answer{Nonce: y.loaded.nonce + 1, Size: uint16(y.loaded.size)}) // was not asked
		y.answered(&wire.Answer{Nonce: y.loaded.nonce, Size: 20})
		if n := p.at.Way(wire.WaySealed).Carried; n != 1 {
			t.Errorf("%d after answers that lie", n)
		}
	})
}

// Where packets are lost in one direction, so are that end's reports: the other
// knows of few losses, and nobody else of them.
func TestAWayThatIsTooNarrowIsBad(t *testing.T) {
	for name, narrow := range map[string]func(up bool) bool{
		"upwards":   func(up bool) bool { return up },
		"downwards": func(up bool) bool { return !up },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				p, end := reporting(t, func(up bool, n int64) tunneltest.Fate {
					return tunneltest.Fate{Delay: 20 * time.Millisecond, Drop: narrow(up) && n > 100 && n%10 > 1}
				})
				defer end()
				if s := p.at.Way(wire.WaySealed); !s.Bad {
					t.Errorf("%+v", s)
				}
			})
		})
	}
}

func TestWhatWasHeardIsKnownAtEachLook(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var off atomic.Bool
		p, end := reporting(t, func(bool, int64) tunneltest.Fate {
			return tunneltest.Fate{Delay: 20 * time.Millisecond, Drop: off.Load()}
		})
		defer end()
		off.Store(true)
		time.Sleep(30 * time.Millisecond) // what was under way
		p.at.Way(wire.WaySealed)
		was := time.Now()
		time.Sleep(2 * reportEvery)
		if at := p.at.Way(wire.WaySealed).Heard; at.After(was) {
			t.Errorf("something was heard %v after the last packet", at.Sub(was))
		}
	})
}
