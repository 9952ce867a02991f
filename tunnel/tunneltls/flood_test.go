package tunneltls

import (
	"encoding/binary"
	"errors"
	"io"
	"math/rand/v2"
	"testing"
	"time"

	"culvert/tunnel"
)

// yamuxFrame is a frame as it travels.
func yamuxFrame(kind byte, flags uint16, stream, length uint32, body ...byte) []byte {
	b := append([]byte{0, kind}, make([]byte, 10)...)
	binary.BigEndian.PutUint16(b[2:], flags)
	binary.BigEndian.PutUint32(b[4:], stream)
	binary.BigEndian.PutUint32(b[8:], length)
	return append(b, body...)
}

// A peer that keeps this end busy with frames that carry nothing is cut within a
// second.
func TestFloodsOfFramesEndTheConnection(t *testing.T) {
	const syn, rst = 1, 8
	stream := uint32(1)
	for name, frame := range map[string]func() []byte{
		"pings":                  func() []byte { return yamuxFrame(yamuxPing, syn, 0, rand.Uint32()) },
		"answers without a ping": func() []byte { return yamuxFrame(yamuxPing, 2, 0, rand.Uint32()) },
		"windows":                func() []byte { return yamuxFrame(1, 0, 1, 0) },
		"empty data":             func() []byte { return yamuxFrame(yamuxData, 0, 1, 0) },
		"streams opened and reset": func() []byte {
			stream += 2
			return append(yamuxFrame(1, syn, stream, 0), yamuxFrame(1, rst, stream, 0)...)
		},
	} {
		t.Run(name, func(t *testing.T) {
			if name == "streams opened and reset" && testing.Short() {
				t.Skip("each takes goroutines of yamux")
			}
			stream = 1
			cc, sc := both(t)
			a, b := meet(t, dialer(t, cc), listen(t, sc))
			c := carry(t, b)
			raw := a.(*candidate).link
			t.Cleanup(func() { raw.shut() })
			go io.Copy(io.Discard, raw) // answers are read, so that nothing else ends it
			raw.Write(yamuxFrame(1, syn, 1, 0))
			began := time.Now()
			go func() {
				for {
					var many []byte
					for range 200 {
						many = append(many, frame()...)
					}
					if _, err := raw.Write(many); err != nil {
						return
					}
				}
			}()
			receive(t, "the carrier's end", c.Done())
			if !errors.Is(c.Err(), tunnel.LimitExceeded) {
				t.Error(c.Err())
			}
			t.Logf("ended after %v: %v", time.Since(began), c.Err())
		})
	}
}

func TestTheMeterKeepsWithTheFramesHoweverTheyAreRead(t *testing.T) {
	m := newFloodMeter()
	var all []byte
	frames := 0
	for n := range 500 {
		body := make([]byte, n)
		for i := range body {
			body[i] = yamuxPing // looks like what it must not be taken for
		}
		all = append(all, yamuxFrame(yamuxData, 0, 1, uint32(n), body...)...)
		all = append(all, yamuxFrame(1, 0, 1, 7)...)
		frames += 2
	}
	rest := all
	for len(rest) > 0 {
		n := min(len(rest), 1+rand.IntN(40))
		if err := m.read(rest[:n]); err != nil {
			t.Fatal(err)
		}
		rest = rest[n:]
	}
	if m.have != 0 || m.skip != 0 {
		t.Errorf("at the end of %d frames it waits for %d bytes of a header and %d of data", frames, m.have, m.skip)
	}
	if used := frameBurst - m.other.Tokens(); used < 1 || used > 502 { // one empty data frame, 500 windows; some have come back
		t.Errorf("%v frames were counted", used)
	}
	if m.pings.Tokens() < pingBurst {
		t.Error("data was taken for pings")
	}
}

func FuzzFloodMeter(f *testing.F) {
	f.Add(yamuxFrame(yamuxData, 0, 1, 3, 1, 2, 3), 5)
	f.Add(yamuxFrame(yamuxPing, 1, 0, 9), 1)
	f.Add(yamuxFrame(yamuxData, 0, 1, 1<<32-1, 1, 2, 3), 13)
	f.Fuzz(func(t *testing.T, p []byte, cut int) {
		whole, parts := newFloodMeter(), newFloodMeter()
		if whole.read(p) != nil {
			return // the connection ends: nothing more is read
		}
		cut = max(1, cut%64)
		for rest := p; len(rest) > 0; {
			n := min(cut, len(rest))
			if parts.read(rest[:n]) != nil {
				return
			}
			rest = rest[n:]
		}
		if whole.have != parts.have || whole.skip != parts.skip {
			t.Fatalf("in one piece %d and %d, in pieces of %d %d and %d", whole.have, whole.skip, cut, parts.have, parts.skip)
		}
	})
}
