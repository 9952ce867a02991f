//go:build linux && (amd64 || arm64 || arm || riscv64)

package tunnelquic

import (
	"bytes"
	"errors"
	"io"
	"net"
	"net/netip"
	"sync"
	"testing"
	"time"

	"culvert/tunnel"
)

// sealed makes what looks like a short header packet.
func sealed(id [8]byte, size int) []byte {
	p := make([]byte, size)
	p[0] = 0x40
	copy(p[1:], id[:])
	return p
}

// came takes one value, of what must come though the machine is slow.
func came[T any](t *testing.T, what string, c <-chan T) (v T) {
	t.Helper()
	select {
	case v = <-c:
	case <-time.After(testPatience):
		t.Fatal("never: ", what)
	}
	return v
}

// arrival is what a claim got.
type arrival struct {
	p    []byte
	from tunnel.Path
}

func claimed(t *testing.T, f tunnel.Flow, id [8]byte) chan arrival {
	t.Helper()
	c := make(chan arrival, 1000)
	if err := f.Claim(id, func(p []byte, from tunnel.Path) bool {
		c <- arrival{bytes.Clone(p), from}
		return true
	}); err != nil {
		t.Fatal(err)
	}
	return c
}

func TestSealedPacketsShareTheSocketWithStreams(t *testing.T) {
	s, c, _ := configs(t)
	l := listen(t, Config{TLS: s})
	client, server := carriers(t, l, dialer(t, c))
	up, down := [8]byte{1, 2, 3}, [8]byte{4, 5, 6}
	atServer, atClient := claimed(t, server.Flow(), up), claimed(t, client.Flow(), down)

	// A bulk stream runs meanwhile.
	sent := make([]byte, 4<<20)
	for i := range sent {
		sent[i] = byte(i * i >> 8)
	}
	out, err := server.OpenStream(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	var stream sync.WaitGroup
	stream.Go(func() {
		out.Write(sent)
		out.CloseWrite()
	})
	in, err := client.AcceptStream(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	stream.Go(func() {
		if got, err := io.ReadAll(in); err != nil || !bytes.Equal(got, sent) {
			t.Errorf("%d bytes of the stream arrived, %v; they must be the %d sent", len(got), err, len(sent))
		}
	})
	for i := range 500 {
		for _, way := range []struct {
			from, to tunnel.Carrier
			id       [8]byte
			got      chan arrival
		}{{client, server, up, atServer}, {server, client, down, atClient}} {
			p := sealed(way.id, 100+2*i)
			p[99] = byte(i)
			// The bulk may push a packet out of a full receive buffer.
			soon(t, "a sealed packet arrives", func() bool {
				if err := way.from.Flow().Send(p, way.from.Flow().Path()); err != nil {
					t.Fatal(err)
				}
				for {
					select {
					case a := <-way.got:
						if len(a.p) < len(p) {
							continue // a copy of an earlier one
						}
						if !bytes.Equal(a.p, p) {
							t.Fatalf("packet %d is another: %d bytes", i, len(a.p))
						}
						if want := way.to.Flow().Path(); a.from != want {
							t.Fatalf("packet %d came by %v; the carrier sends to %v", i, a.from, want)
						}
						return true
					case <-time.After(100 * time.Millisecond):
						return false
					}
				}
			})
		}
	}
	stream.Wait()
	in.Close()
	out.Close()
}

func TestAnswersLeaveByTheAddressThatWasAsked(t *testing.T) {
	s, c, _ := configs(t)
	for name, at := range map[string]struct{ network, listen, dial string }{
		"IPv4":               {"udp4", "0.0.0.0:0", "127.0.0.77"},
		"IPv4 on dual stack": {"udp", "[::]:0", "127.0.0.77"},
		"IPv6":               {"udp6", "[::]:0", "::1"},
	} {
		t.Run(name, func(t *testing.T) {
			l := listenAt(t, at.network, at.listen, Config{TLS: s})
			to := netip.AddrPortFrom(netip.MustParseAddr(at.dial), uint16(l.Addr().(*net.UDPAddr).Port))
			cc, err := dialer(t, c).Dial(t.Context(), to.String())
			if err != nil {
				t.Fatal(err)
			}
			client, err := cc.Carrier()
			if err != nil {
				t.Fatal(err)
			}
			defer client.Close(nil)
			sc, err := l.Accept(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			server, err := sc.Carrier()
			if err != nil {
				t.Fatal(err)
			}
			defer server.Close(nil)
			id := [8]byte{9}
			asked, answered := claimed(t, server.Flow(), id), claimed(t, client.Flow(), id)
			if path := client.Flow().Path(); path != (tunnel.Path{Remote: to}) {
				t.Errorf("the client's path is %v", path)
			}
			if err := client.Flow().Send(sealed(id, 100), client.Flow().Path()); err != nil {
				t.Fatal(err)
			}
			a := came(t, "a sealed packet arrives", asked)
			if a.from != server.Flow().Path() || a.from.Local != to.Addr() {
				t.Errorf("it came by %v; the path is %v", a.from, server.Flow().Path())
			}
			if err := server.Flow().Send(sealed(id, 100), a.from); err != nil {
				t.Fatal(err)
			}
			if b := came(t, "an answer arrives", answered); b.from.Remote != to {
				t.Errorf("the answer came from %v, not from %v", b.from.Remote, to)
			}
		})
	}
}

func TestClaimsAreExclusiveAndEnd(t *testing.T) {
	s, c, _ := configs(t)
	key := [32]byte{7}
	l := listen(t, Config{TLS: s, StatelessResetKey: &key})
	client, server := carriers(t, l, dialer(t, c))
	_, other := carriers(t, l, dialer(t, c))
	id := [8]byte{1}
	none := func([]byte, tunnel.Path) bool { return true }
	claim := func(f tunnel.Flow, ok bool) {
		t.Helper()
		if err := f.Claim(id, none); (err == nil) != ok {
			t.Errorf("Claim: %v", err)
		}
	}
	claim(server.Flow(), true)
	claim(server.Flow(), false)
	claim(other.Flow(), false)
	claim(client.Flow(), true) // another socket
	other.Flow().Release(id)   // not its own
	claim(other.Flow(), false)
	server.Flow().Release(id)
	claim(other.Flow(), true)
	server.Flow().WatchReset([16]byte{1}, func() {})
	reason := errors.New("over")
	other.Close(reason)
	claim(server.Flow(), true)
	if err := other.Flow().Claim([8]byte{2}, none); !errors.Is(err, reason) {
		t.Errorf("Claim on an ended carrier: %v", err)
	}
	if err := other.Flow().Send(sealed(id, 100), server.Flow().Path()); !errors.Is(err, reason) {
		t.Errorf("Send on an ended carrier: %v", err)
	}
	server.Close(nil)
	f := &l.sock.flows
	if f.claims.get(id) != nil || f.live != (table[int]{}) || f.watches.Load() != nil {
		t.Error("something of an ended carrier is left")
	}
}

func TestSendSaysWhatDoesNotFit(t *testing.T) {
	s, c, _ := configs(t)
	l := listen(t, Config{TLS: s})
	client, _ := carriers(t, l, dialer(t, c))
	f := client.Flow()
	if err := f.Send(make([]byte, 65_600), f.Path()); err != tunnel.ErrTooLarge {
		t.Errorf("65,600 bytes: %v", err)
	}
}
