//go:build linux && (amd64 || arm64 || arm || riscv64)

package tunnelquic

import (
	"bytes"
	"errors"
	"net"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"culvert/tunnel"
	"culvert/tunnel/media"
	"culvert/tunnel/session"
	"culvert/tunnel/tunneltest"
	"culvert/tunnel/wire"
)

// stranger is a socket that asks a listener for stateless resets.
func stranger(t *testing.T, l *Listener) *net.UDPConn {
	t.Helper()
	conn, err := net.DialUDP("udp4", nil, l.Addr().(*net.UDPAddr))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

// isReset asks until a reset comes, since quic-go sends none while it is busy.
// It must end with the token.
func isReset(t *testing.T, from *net.UDPConn, p []byte, token [16]byte) {
	t.Helper()
	answer := make([]byte, 2000)
	soon(t, "a stateless reset", func() bool {
		write(t, from, p)
		from.SetReadDeadline(time.Now().Add(100 * time.Millisecond))
		n, err := from.Read(answer)
		if err != nil {
			return false
		}
		// The filter for resets of living IDs knows them by this length.
		if n != sizeReset || answer[0]>>6 != 1 {
			t.Fatalf("the answer has %d bytes and begins with %#x; a stateless reset has %d", n, answer[0], sizeReset)
		}
		if !bytes.Equal(answer[n-16:n], token[:]) {
			t.Fatal("the reset is another's")
		}
		return true
	})
}

// RFC 9000 §21.11: who has seen an ID must not get from us what ends its flow.
func TestNoResetTellsTheTokenOfALivingID(t *testing.T) {
	s, c, _ := configs(t)
	key := [32]byte{1, 2, 3}
	l := listen(t, Config{TLS: s, StatelessResetKey: &key})
	_, server := carriers(t, l, dialer(t, c))
	f := server.Flow()
	kept, shy, dead := [8]byte{1}, [8]byte{2}, [8]byte{3}
	got := claimed(t, f, kept)
	if err := f.Claim(shy, func([]byte, tunnel.Path) bool { return false }); err != nil {
		t.Fatal(err)
	}
	token := func(id [8]byte) (token [16]byte) {
		token, ok := f.ResetToken(id)
		if !ok {
			t.Fatal("the listener has no reset tokens")
		}
		return token
	}
	from := stranger(t, l)
	// What has a living ID goes first: answers come in order, and the first
	// must be to the last.
	write(t, from, sealed(kept, 100))
	write(t, from, sealed(shy, 100))
	write(t, from, sealed(shy, 1400))
	write(t, from, sealed(kept, maxPacket+1)) // cut off
	isReset(t, from, sealed(dead, 100), token(dead))
	came(t, "the packet of the claim", got)
	came(t, "the head of the packet that was cut off", got)

	from = stranger(t, l) // late answers go to the one before
	f.Release(shy)
	write(t, from, sealed(kept, 100))
	isReset(t, from, sealed(shy, 100), token(shy))
	server.Close(nil)
	from = stranger(t, l)
	isReset(t, from, sealed(kept, 100), token(kept))
}

func TestATokenOfTwoIDsIsSecretUntilBothAreOver(t *testing.T) {
	f := &flows{key: make([]byte, 32)}
	token := f.token([8]byte{1})
	reset := append(make([]byte, sizeReset-16), token[:]...)
	for i, step := range []struct {
		by     int
		secret bool
	}{{1, true}, {1, true}, {-1, true}, {-1, false}} {
		if f.count(token, step.by); f.secret(reset) != step.secret {
			t.Errorf("after step %d it is secret: %v", i, !step.secret)
		}
	}
	f.count(token, 1)
	if f.secret(reset[1:]) || f.secret(append([]byte{0}, reset...)) {
		t.Error("a packet of another length is kept back")
	}
}

func TestResetsAreSeenOnceByWhoWatches(t *testing.T) {
	s, c, _ := configs(t)
	l := listen(t, Config{TLS: s})
	client, server := carriers(t, l, dialer(t, c))
	f := client.Flow()
	first, second, gone := [16]byte{1}, [16]byte{2}, [16]byte{3}
	var seen atomic.Int64
	f.WatchReset(first, func() { seen.Add(1) })
	f.WatchReset(second, func() { seen.Add(100) })
	f.WatchReset(gone, func() { seen.Add(10_000) })
	f.WatchReset(gone, nil)
	id := [8]byte{9}
	got := claimed(t, f, id)
	send := func(id [8]byte, size int, token [16]byte) {
		t.Helper()
		p := sealed(id, size)
		copy(p[size-16:], token[:])
		if err := server.Flow().Send(p, server.Flow().Path()); err != nil {
			t.Fatal(err)
		}
	}
	// arrived returns when everything before has been dealt with.
	arrived := func() {
		t.Helper()
		for len(got) > 0 {
			<-got
		}
		send(id, 60, [16]byte{})
		came(t, "a packet behind the others", got)
	}
	other := [8]byte{8}
	send(other, minReset-1, first) // too short for a reset
	send(other, 60, gone)
	send(id, 60, first) // claimed
	came(t, "a claimed packet", got)
	arrived()
	if n := seen.Load(); n != 0 {
		t.Errorf("%d were seen where there was no reset", n)
	}
	for range 3 {
		send(other, minReset, first)
	}
	soon(t, "the reset is seen", func() bool { return seen.Load() > 0 })
	arrived()
	send(other, 60, second)
	soon(t, "the other reset is seen", func() bool { return seen.Load() > 1 })
	if n := seen.Load(); n != 101 {
		t.Errorf("seen: %d; want each once", n)
	}
	if f.(*flow).all.watches.Load() != nil {
		t.Error("watches are left")
	}
	if err := works(client, server); err != nil {
		t.Errorf("QUIC, whose own tokens these are not: %v", err)
	}
}

// echoes counts datagrams that came back.
type echoes struct{ n atomic.Int64 }

func (e *echoes) Deliver([]byte, netip.AddrPort)    { e.n.Add(1) }
func (e *echoes) Unreachable(netip.AddrPort, error) {}
func (e *echoes) Closed(error)                      {}

func TestASealedPacketFindsOutAboutARestart(t *testing.T) {
	s, c, _ := configs(t)
	key := [32]byte{1, 2, 3}
	first := listenAt(t, "udp4", "127.0.0.1:0", Config{TLS: s, StatelessResetKey: &key})
	client, server := carriers(t, first, dialer(t, c))
	const id = "0f5e9a6c2f6d4c0c8f0d3a4be1d2c3f4"
	offer := session.OfferSealed(media.PreferredAEADs())
	far := session.NewFar(session.FarConfig{Next: &tunneltest.Echo{}, Peered: wire.Current, ID: id})
	near := session.NewNear(0)
	at := near.Attach(wire.Welcome{Version: wire.Current, Session: id, Limits: far.Limits()})
	var running sync.WaitGroup
	defer running.Wait()
	defer far.Close(nil)
	defer at.End(nil)
	defer client.Close(nil)
	defer server.Close(nil)
	ready, err := session.ReadySealed(server, id, offer)
	if err != nil {
		t.Fatal(err)
	}
	running.Go(func() { far.Serve(server, ready) })
	if err := at.AddCarrier(client, offer); err != nil {
		t.Fatal(err)
	}
	defer at.RemoveCarrier(client)
	running.Go(func() { at.Run() })
	at.Use(wire.WaySealed, wire.NoWay)
	back := &echoes{}
	a, err := near.OpenPackets(tunnel.Peer{}, back)
	if err != nil {
		t.Fatal(err)
	}
	say := func() {
		t.Helper()
		if err := a.Send(make([]byte, 100), tunnel.TargetOf(netip.MustParseAddrPort("203.0.113.9:3478"))); err != nil {
			t.Fatal(err)
		}
	}
	soon(t, "datagrams come back, and the tokens are known", func() bool {
		say()
		watches := client.Flow().(*flow).all.watches.Load()
		return back.n.Load() > 0 && watches != nil && len(*watches) == 2
	})
	kill(first)
	listenAt(t, "udp4", first.Addr().String(), Config{TLS: s, StatelessResetKey: &key})
	// QUIC finds out by itself too, with its next packet.
	soon(t, "the end of the session", func() bool {
		say()
		return client.Err() != nil
	})
	if err := client.Err(); !errors.Is(err, tunnel.CloudUnreachable) || !strings.Contains(err.Error(), "restarted") {
		t.Errorf("the session has ended with %v", err)
	}
}

// The same without the rest of a session: QUIC has nothing to send by which it
// could find out earlier.
func TestTheWayItselfFindsOutAboutARestart(t *testing.T) {
	s, c, _ := configs(t)
	key := [32]byte{1, 2, 3}
	first := listenAt(t, "udp4", "127.0.0.1:0", Config{TLS: s, StatelessResetKey: &key})
	client, server := carriers(t, first, dialer(t, c))
	root := bytes.Repeat([]byte{5}, 32)
	reset := make(chan struct{}, 10)
	near, err := media.NewSealed(media.SealedConfig{Flow: client.Flow(), Root: root, AEAD: wire.AES128GCM, Near: true,
		OnReset: func() { reset <- struct{}{} }})
	if err != nil {
		t.Fatal(err)
	}
	defer near.Close()
	far, err := media.NewSealed(media.SealedConfig{Flow: server.Flow(), Root: root, AEAD: wire.AES128GCM})
	if err != nil {
		t.Fatal(err)
	}
	defer far.Close()
	none := func([]byte) {}
	near.Start(none, func() {})
	far.Start(none, func() {})
	record := append([]byte{0, 1, 0, 0}, make([]byte, 100)...)
	soon(t, "the tokens are known", func() bool {
		if err := far.Send(record); err != nil {
			t.Fatal(err)
		}
		far.Tick(time.Now())
		watches := client.Flow().(*flow).all.watches.Load()
		return watches != nil && len(*watches) == 2
	})
	kill(first)
	listenAt(t, "udp4", first.Addr().String(), Config{TLS: s, StatelessResetKey: &key})
	soon(t, "a reset", func() bool {
		if near.Send(record) != nil { // this machine has stood still, and QUIC was faster
			return client.Err() != nil
		}
		return len(reset) > 0
	})
	if n := len(reset); n > 1 {
		t.Errorf("OnReset was called %d times", n)
	}
}

// Whether this end sends resets or not: what is too short for a sealed packet,
// or too long to be read, is counted and answered by nobody.
func TestCutSealedPacketsAreDroppedAndCounted(t *testing.T) {
	const shortest = 9 // with the whole ID
	for name, key := range map[string]*[32]byte{"with resets": {1, 2, 3}, "without": nil} {
		t.Run(name, func(t *testing.T) {
			s, c, _ := configs(t)
			l := listen(t, Config{TLS: s, StatelessResetKey: key})
			client, server := carriers(t, l, dialer(t, c))
			root := bytes.Repeat([]byte{5}, 32)
			var came [2]atomic.Int64
			ends := []tunnel.Carrier{client, server}
			var ways []*media.Sealed
			for i, carrier := range ends {
				w, err := media.NewSealed(media.SealedConfig{Flow: carrier.Flow(), Root: root, AEAD: wire.AES128GCM, Near: i == 0})
				if err != nil {
					t.Fatal(err)
				}
				defer w.Close()
				w.Start(func([]byte) { came[i].Add(1) }, func() {})
				ways = append(ways, w)
			}
			stranger := udp(t)
			defer stranger.Close()
			record := append([]byte{0, 1, 0, 0}, make([]byte, 100)...)
			for i, carrier := range ends {
				peer, to := ends[1-i], carrier.Stats().Local
				to = netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), to.Port())
				want := uint64(0)
				cut := func(id [8]byte, size int) {
					t.Helper()
					if err := peer.Flow().Send(sealed(id, size), peer.Flow().Path()); err != nil {
						t.Fatal(err)
					}
					if _, err := stranger.WriteToUDPAddrPort(sealed(id, size), to); err != nil {
						t.Fatal(err)
					}
					want += 2
					soon(t, "it is counted", func() bool { return ways[i].Lost()["truncated"] == want })
				}
				for id := range carrier.Flow().(*flow).mine {
					for size := shortest; size < media.SealedOverhead; size++ {
						cut(id, size)
					}
					cut(id, maxPacket+1)
					cut(id, 9000)
				}
				if lost := ways[i].Lost(); len(lost) != 1 {
					t.Errorf("end %d: lost %v", i, lost)
				}
				before := came[i].Load()
				soon(t, "a sealed packet passes", func() bool {
					if err := ways[1-i].Send(record); err != nil {
						t.Fatal(err)
					}
					return came[i].Load() > before
				})
				if err := works(peer, carrier); err != nil {
					t.Errorf("end %d: %v", i, err)
				}
			}
			stranger.SetReadDeadline(time.Now().Add(50 * time.Millisecond)) // what was answered is here: QUIC has answered since
			if n, from, err := stranger.ReadFromUDPAddrPort(make([]byte, 2000)); err == nil {
				t.Errorf("%v answers with %d bytes", from, n)
			}
		})
	}
}

// garbage is a packet of each kind that a stranger can send.
func garbage(i int, living [8]byte) []byte {
	p := make([]byte, 1+(i*37)%1400)
	for k := range p {
		p[k] = byte(i*31 + k*k)
	}
	switch i % 5 {
	case 0: // a short header of nobody
		p[0] = 0x40 | p[0]&0x3f
	case 1: // forged
		p[0] = 0x40
		copy(p[1:], living[:])
	case 2: // an Initial of QUIC v1, or what claims to be one
		if len(p) > 5 {
			p[0] = 0xc0
			copy(p[1:], []byte{0, 0, 0, 1})
		}
	case 3: // of a version that nobody speaks
		p[0] = 0xc0
	}
	return p
}

func TestAFloodOfGarbageLeavesNothingBehind(t *testing.T) {
	s, c, _ := configs(t)
	key := [32]byte{1, 2, 3}
	l := listen(t, Config{TLS: s, StatelessResetKey: &key})
	client, server := carriers(t, l, dialer(t, c))
	root := bytes.Repeat([]byte{5}, 32)
	far, err := media.NewSealed(media.SealedConfig{Flow: server.Flow(), Root: root, AEAD: wire.AES128GCM})
	if err != nil {
		t.Fatal(err)
	}
	defer far.Close()
	near, err := media.NewSealed(media.SealedConfig{Flow: client.Flow(), Root: root, AEAD: wire.AES128GCM, Near: true})
	if err != nil {
		t.Fatal(err)
	}
	defer near.Close()
	var came atomic.Int64
	far.Start(func([]byte) { came.Add(1) }, func() {})
	near.Start(func([]byte) {}, func() {})
	var living [8]byte
	for id := range server.Flow().(*flow).mine {
		living = id
	}
	record := append([]byte{0, 1, 0, 0}, make([]byte, 100)...)
	const strangers, each = 20, 200
	for range strangers {
		from := stranger(t, l)
		for i := range each {
			from.Write(garbage(i, living)) // what the kernel refuses has been refused
		}
		before := came.Load()
		soon(t, "a sealed packet arrives amid garbage", func() bool {
			if err := near.Send(record); err != nil {
				t.Fatal(err)
			}
			return came.Load() > before
		})
	}
	if err := works(client, server); err != nil {
		t.Error(err)
	}
	if lost := far.Lost(); lost["not_authentic"] == 0 {
		t.Errorf("no forged packet was counted: %v", lost)
	}
	f := &l.sock.flows
	claims := 0
	for i := range f.claims.shards {
		if m := f.claims.shards[i].Load(); m != nil {
			claims += len(*m)
		}
	}
	if claims != 2 || f.watches.Load() != nil {
		t.Errorf("there are %d claims; want the way's 2", claims)
	}
	if stats := l.Stats(); stats.Connections != 1 || stats.Unanswered > 1 {
		t.Errorf("after the flood: %+v", stats)
	}
	soon(t, "no handshake is left open", func() bool { return l.Stats().Handshakes == 0 })
}
