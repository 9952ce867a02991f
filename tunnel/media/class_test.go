package media

import (
	"encoding/binary"
	"encoding/hex"
	"math/rand/v2"
	"testing"
	"testing/synctest"
	"time"
)

func TestWhatTheFirstBytesSay(t *testing.T) {
	x := func(s string) []byte {
		b, err := hex.DecodeString(s)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	rtp := "80600102" + "00000bb8" + "0a0b0c0d" + "ffff"
	for name, c := range map[string]struct {
		p    []byte
		want head
	}{
		"nothing":                 {nil, head{}},
		"RTP":                     {x(rtp), head{stream, 0x0102, 3000, 0x0a0b0c0d}},
		"RTP with the marker":     {x("80e00102" + "00000bb8" + "0a0b0c0d"), head{stream, 0x0102, 3000, 0x0a0b0c0d}},
		"RTP cut short":           {x(rtp)[:11], head{}},
		"RTP in ChannelData":      {x("4001000e" + rtp), head{stream, 0x0102, 3000, 0x0a0b0c0d}},
		"padded ChannelData":      {x("4001000e" + rtp + "0000"), head{stream, 0x0102, 3000, 0x0a0b0c0d}},
		"ChannelData cut short":   {x("4001000f" + rtp), head{}},
		"ChannelData and more":    {x("4001000e" + rtp + "00000000"), head{}},
		"ChannelData twice":       {x("40010012" + "4001000e" + rtp), head{}},
		"a STUN request":          {x("000100002112a442" + "000102030405060708090a0b"), head{kind: control}},
		"STUN without a cookie":   {x("000100002112a443" + "000102030405060708090a0b"), head{}},
		"STUN, another length":    {x("000100042112a442" + "000102030405060708090a0b"), head{}},
		"an RTCP receiver report": {x("80c90001" + "0a0b0c0d"), head{kind: control}},
		"SRTCP":                   {x("80c90001" + "0a0b0c0d" + "80000001" + "00112233445566778899"), head{kind: control}},
		"RTCP, too long":          {x("80c90002" + "0a0b0c0d"), head{}},
		"DTLS":                    {x("16fefd0000000000000000" + "0004deadbeef"), head{}},
		"QUIC":                    {x("c300000001080102030405060708"), head{}},
	} {
		if got := read(c.p); got != c.want {
			t.Errorf("%s is %+v, want %+v", name, got, c.want)
		}
	}
}

func FuzzRead(f *testing.F) {
	f.Add([]byte{})
	f.Add((&source{ssrc: 1}).next(40, true))
	f.Add([]byte{0x40, 1, 0, 12, 0x80, 96, 0, 1, 0, 0, 0, 1, 0, 0, 0, 1})
	f.Add([]byte{0, 1, 0, 0, 0x21, 0x12, 0xa4, 0x42, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12})
	f.Add([]byte{0x81, 200, 0, 1, 1, 2, 3, 4})
	f.Fuzz(func(t *testing.T, p []byte) {
		h := read(p)
		if h.kind != stream && h != (head{kind: h.kind}) {
			t.Errorf("no RTP, but %+v", h)
		}
		if h.kind == stream && (len(p) < rtpHeader || !contains32(p, h.ssrc)) {
			t.Errorf("%x is %+v", p, h)
		}
		var l Line
		r := &Room{id: 1}
		for range 8 {
			if m := l.look(r, p); m.flow == nil && !m.high || m.rtp {
				t.Errorf("what does not advance is marked %+v", m)
			}
		}
	})
}

func contains32(p []byte, v uint32) bool {
	for i := range len(p) - 3 {
		if binary.BigEndian.Uint32(p[i:]) == v {
			return true
		}
	}
	return false
}

func TestTheClassOfAFlow(t *testing.T) {
	for name, c := range map[string]struct {
		size  int
		every time.Duration
		high  bool
	}{
		"sound":               {125, 20 * time.Millisecond, true},
		"sound, 10 ms":        {80, 11 * time.Millisecond, true},
		"pictures":            {1100, 5 * time.Millisecond, false},
		"few large packets":   {1100, 100 * time.Millisecond, false},
		"many small packets":  {100, 5 * time.Millisecond, false},
		"a very slow trickle": {100, 5 * time.Second, true},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := NewRoom(0, &Drops{})
				var rtp, other Line
				s := &source{ssrc: 9}
				var m, o mark
				for range 200 {
					m = rtp.look(r, s.next(c.size, true))
					o = other.look(r, make([]byte, c.size))
					time.Sleep(c.every)
				}
				if m.high != c.high || !m.rtp {
					t.Errorf("as RTP it is %+v", m)
				}
				if o.high != c.high || o.rtp {
					t.Errorf("as another association it is %+v", o)
				}
			})
		})
	}
}

func TestCiphertextIsOneOpaqueFlow(t *testing.T) {
	r := NewRoom(0, &Drops{})
	var l Line
	random := rand.New(rand.NewPCG(1, 2))
	for range 20_000 {
		p := make([]byte, 50+random.IntN(1000))
		for i := range min(16, len(p)) {
			p[i] = byte(random.Uint32())
		}
		if m := l.look(r, p); m.rtp {
			t.Fatalf("%x is taken for RTP", p[:12])
		}
	}
	if len(l.flows) > maxProbation {
		t.Errorf("%d SSRCs are remembered", len(l.flows))
	}
}

func TestSSRCsAreBounded(t *testing.T) {
	r := NewRoom(0, &Drops{})
	var l Line
	for ssrc := range uint32(200) {
		s := &source{ssrc: ssrc + 1}
		for range 10 {
			l.look(r, s.next(100, true))
		}
		if m := l.look(r, s.next(100, true)); !m.rtp {
			t.Fatalf("SSRC %d is not recognised", ssrc)
		}
	}
	if len(l.flows) > maxFlows {
		t.Errorf("%d SSRCs are remembered", len(l.flows))
	}
}

// A call that begins while its way is shaped already, so that there is always
// something that waits, must be recognised too.
func TestAClassChangeTakesWhatWaitsAlong(t *testing.T) {
	r, g, _ := newTestRoom(time.Hour)
	g.close()
	var l Line
	audio, video := &source{ssrc: 1}, &source{ssrc: 2}
	for i := range 100 {
		v := video.next(1100, true)
		r.Send(&l, v, v)
		if i%4 == 0 {
			a := audio.next(125, true)
			r.Send(&l, a, a)
		}
	}
	g.open()
	var order []byte
	last := map[byte]uint16{}
	for _, p := range g.take() {
		order = append(order, p[11])
		n := binary.BigEndian.Uint16([]byte(p)[2:])
		if n != last[p[11]]+1 {
			t.Fatalf("SSRC %d: number %d after %d", p[11], n, last[p[11]])
		}
		last[p[11]] = n
	}
	if len(order) != 125 || order[24] != 1 || order[25] != 2 {
		t.Errorf("sent %v", order)
	}
}
