package bulk

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"
)

func inFrame(p []byte) []byte {
	return append(binary.BigEndian.AppendUint16(nil, uint16(len(p))), p...)
}

func rtp(n, i int) []byte {
	p := make([]byte, n)
	p[0], p[1] = 0x80, 111
	binary.BigEndian.PutUint16(p[2:], uint16(i))
	return p
}

func rtcp() []byte { return []byte{0x81, 201, 0, 7, 31: 0} }

func stun(method uint16, attrs int) []byte {
	p := make([]byte, stunHeader+attrs)
	binary.BigEndian.PutUint16(p, method)
	binary.BigEndian.PutUint16(p[2:], uint16(attrs))
	binary.BigEndian.PutUint32(p[4:], stunCookie)
	return p
}

// inChannel is padded as on TCP (RFC 8656 §12.5).
func inChannel(p []byte) []byte {
	h := append([]byte{0x40, 0}, inFrame(p)...)
	return append(h, make([]byte, -len(p)&3)...)
}

func tlsRecord(n int) []byte {
	p := bytes.Repeat([]byte{0x9c}, 5+n)
	copy(p, []byte{23, 3, 3, byte(n >> 8), byte(n)})
	return p
}

func join(all ...[]byte) []byte { return bytes.Join(all, nil) }

func TestFramingIsKnownByTheFirstBytesAndFollowed(t *testing.T) {
	call := inFrame(stun(1, 60))
	for i := range 50 {
		call = append(call, inFrame(rtp(172+i, i))...)
	}
	turn := join(stun(0x0003, 16), stun(0x0003, 84), stun(0x0008, 88), stun(0x0016, 136), stun(0x0009, 96))
	for i := range 50 {
		turn = append(turn, inChannel(rtp(100+i, i))...)
	}
	for _, c := range []struct {
		name string
		in   []byte
		want framing
	}{
		{"nothing", nil, unsure},
		{"too little", []byte{0, 60, 0, 1}, unsure},
		{"ICE on TCP: checks and RTP", call, rfc4571},
		{"RTP at once", inFrame(rtp(172, 0)), rfc4571},
		{"RTCP at once", inFrame(rtcp()), rfc4571},
		{"the shortest RTCP", inFrame([]byte{0x80, 201, 0, 1, 0, 0, 0, 9}), rfc4571},
		{"DTLS at once", inFrame(append([]byte{22, 0xfe, 0xff}, make([]byte, 100)...)), rfc4571},
		{"empty frames between", join(call, []byte{0, 0, 0, 0}, inFrame(rtp(50, 1))), rfc4571},
		{"the largest frame", join(inFrame(rtp(65535, 0)), inFrame(rtcp())), rfc4571},
		{"a frame with text", join(call, inFrame([]byte("\x09text"))), unframed},
		{"TURN: Allocate, permission, Send, ChannelBind, ChannelData", turn, turnTCP},
		{"TURN, then bytes without frames", join(turn, []byte("\x16\x03\x01\x02\x00")), unframed},
		{"TURN, then a STUN length that is no multiple of four", join(turn, []byte{0, 1, 0, 3}), unframed},
		{"ChannelData before anything else", inChannel(rtp(100, 0)), unframed},
		{"TLS client", append([]byte{22, 3, 1, 2, 0, 1, 0, 1, 0xfc, 3, 3}, make([]byte, 500)...), unframed},
		{"TLS data", tlsRecord(1000), unframed},
		{"HTTP", []byte("GET /large.iso HTTP/1.1\r\n"), unframed},
		{"HTTP/2", []byte("PRI * HTTP/2.0\r\n\r\n"), unframed},
		{"SSH", []byte("SSH-2.0-OpenSSH_9.6\r\n"), unframed},
		{"zeros", make([]byte, 100), unframed},
	} {
		t.Run(c.name, func(t *testing.T) {
			for _, step := range []int{1, 3, 7, 1460, 1 << 20} {
				var d deframer
				for p := c.in; len(p) > 0; {
					k := min(step, len(p))
					d.feed(p[:k])
					p = p[k:]
				}
				if d.framing != c.want {
					t.Errorf("in pieces of %d: %d, want %d", step, d.framing, c.want)
				}
			}
		})
	}
}

// The recording is of a browser's kind of TURN on TCP: Allocate, permissions,
// Send indications, ChannelBind, then media in ChannelData.
func TestTURNOnTCPAsRecordedIsFramedBothWays(t *testing.T) {
	f, err := os.Open("../../sidecar/channel/testdata/pion-turn-tcp.txt")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var m meter
	messages := 0
	for lines := bufio.NewScanner(f); lines.Scan(); {
		var words = strings.Fields(lines.Text())
		if len(words) != 4 || words[0] == "#" {
			continue
		}
		at, _ := strconv.Atoi(words[0])
		n, _ := strconv.Atoi(words[2])
		b, err := hex.DecodeString(words[3])
		if err != nil {
			continue
		}
		p := make([]byte, max(n, len(b)))
		copy(p, b)
		now := time.Duration(at) * time.Millisecond
		if words[1] == "up" {
			m.wrote(p, now)
		} else {
			m.got(p, now)
		}
		messages++
	}
	if messages < 100 || !framed(&m.toOut, &m.toIn) || m.bulk {
		t.Errorf("after %d messages: out %d, in %d, bulk %v", messages, m.toOut.framing, m.toIn.framing, m.bulk)
	}
}

func FuzzFraming(f *testing.F) {
	f.Add(inFrame(rtp(40, 1)), 3)
	f.Fuzz(func(t *testing.T, b []byte, step int) {
		var whole, pieces deframer
		whole.feed(b)
		step = max(1, min(step, 1<<16))
		for p := b; len(p) > 0; {
			k := min(step, len(p))
			pieces.feed(p[:k])
			p = p[k:]
		}
		if whole.framing != pieces.framing || whole.skip != pieces.skip || whole.n != pieces.n {
			t.Errorf("whole %+v, in pieces of %d %+v", whole, step, pieces)
		}
		if whole.skip < 0 || whole.skip > stunHeader+1<<16 || (len(b) < firstBytes) != (whole.framing == unsure) {
			t.Errorf("%+v after %d bytes", whole, len(b))
		}
	})
}

func TestFramingNeverAllocates(t *testing.T) {
	frame := inFrame(rtp(1200, 1))
	var d deframer
	if n := testing.AllocsPerRun(100, func() { d.feed(frame) }); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

// A life is what a stream does, event by event.
type life struct {
	m       meter
	at      time.Duration
	changes string // the judgement, and the second of each change
}

func (l *life) note() *life {
	word := " free"
	if l.m.bulk {
		word = " bulk"
	}
	if !strings.HasSuffix(l.changes, word) {
		l.changes += " " + strconv.Itoa(int(l.at/time.Second)) + word
	}
	return l
}

// out and in spread n calls of size bytes each over every second, each way,
// for some seconds.
func (l *life) run(seconds, outs, outSize, ins, inSize int) *life {
	return l.held(0, seconds, outs, outSize, ins, inSize)
}

// held is run with each write waiting for some of the time.
func (l *life) held(wait time.Duration, seconds, outs, outSize, ins, inSize int) *life {
	out, in := tlsRecord(max(outSize-5, 0)), tlsRecord(max(inSize-5, 0))
	for range seconds {
		begin := l.at
		for i := range max(outs, ins) {
			l.at = begin + time.Duration(i)*time.Second/time.Duration(max(outs, ins))
			if i < outs {
				if wait > 0 {
					l.m.wait(l.at)
					l.at += wait
					l.m.goOn(l.at)
				}
				l.m.wrote(out, l.at)
				l.note()
			}
			if i < ins {
				l.m.got(in, l.at)
				l.note()
			}
		}
		l.at = begin + time.Second
		l.m.roll(l.at)
		l.note()
	}
	return l
}

func TestWhatCountsAsBulk(t *testing.T) {
	for _, c := range []struct {
		name string
		l    *life
		want string
	}{
		{"HTTPS download, 16 Mbit/s", new(life).run(5, 125, 16000, 1, 100), " 0 free 0 bulk"},
		{"download, 4 Mbit/s", new(life).run(5, 32, 16000, 1, 100), " 0 free 2 bulk"},
		{"download, 300 kbit/s", new(life).run(5, 10, 4000, 1, 100), " 0 free 2 bulk"},
		{"download, 240 kbit/s", new(life).run(30, 10, 3000, 1, 100), " 0 free"},
		{"what the other side sends is its matter", new(life).run(5, 3, 100, 125, 16000), " 0 free"},
		{"one loud second", new(life).run(1, 10, 16000, 1, 100).run(5, 1, 100, 1, 100), " 0 free"},
		{"a page now and then", new(life).run(1, 10, 16000, 1, 100).run(3, 1, 100, 1, 100).run(1, 10, 16000, 1, 100).run(3, 1, 100, 1, 100), " 0 free"},
		{"bulk, then little for nine seconds, then bulk", new(life).run(3, 40, 8000, 1, 50).run(9, 1, 50, 1, 50).run(3, 40, 8000, 1, 50), " 0 free 2 bulk"},
		{"bulk, then little", new(life).run(3, 40, 8000, 1, 50).run(12, 1, 50, 1, 50), " 0 free 2 bulk 13 free"},
		{"TURN in TLS: audio and 2 Mbit/s of video", new(life).run(60, 250, 1000, 100, 400), " 0 free"},
		{"TURN in TLS, a viewer: 2 Mbit/s and feedback", new(life).run(60, 250, 1000, 10, 100), " 0 free"},
		{"TURN in TLS: one second in twelve is a burst", new(life).run(12, 250, 1000, 50, 200).run(1, 700, 1000, 50, 200).run(11, 250, 1000, 50, 200).run(1, 700, 1000, 50, 200).run(5, 250, 1000, 50, 200), " 0 free"},
		{"feedback that is too rare", new(life).run(20, 250, 1000, 4, 100), " 0 free 2 bulk"},
		{"media taken for bulk comes back", new(life).run(1, 700, 1000, 50, 200).run(15, 250, 1000, 50, 200), " 0 free 0 bulk 11 free"},
		{"a download held down does not become media", new(life).run(2, 200, 8000, 20, 50).held(40*time.Millisecond, 60, 20, 16000, 20, 50), " 0 free 0 bulk"},
		{"a download held down to the floor stays bulk", new(life).run(2, 200, 8000, 1, 50).held(900*time.Millisecond, 60, 1, 1200, 1, 50), " 0 free 0 bulk"},
	} {
		t.Run(c.name, func(t *testing.T) {
			if c.l.changes != c.want {
				t.Errorf("got%s, want%s", c.l.changes, c.want)
			}
		})
	}
}

func TestFramedMediaIsNeverBulk(t *testing.T) {
	for name, message := range map[string]func(i int) []byte{
		"RFC 4571": func(i int) []byte { return inFrame(rtp(1201, i)) },
		"TURN": func(i int) []byte {
			if i == 0 {
				return stun(0x0003, 16)
			}
			return inChannel(rtp(1201, i))
		},
	} {
		t.Run(name, func(t *testing.T) {
			var m meter
			for i := range 10_000 { // 9.6 Mbit/s, one way only
				if m.wrote(message(i), time.Duration(i)*time.Millisecond); m.bulk {
					t.Fatalf("message %d makes it bulk", i)
				}
			}
			m.got([]byte("HTTP/1.1 200 OK\r\n"), 10*time.Second) // so it was no framing after all
			for i := range 3000 {
				m.wrote(message(i+1), 10*time.Second+time.Duration(i)*time.Millisecond)
			}
			if !m.bulk {
				t.Error("it is not bulk although the other direction has no frames")
			}
		})
	}
}

func TestALongWaitIsCountedInItsSeconds(t *testing.T) {
	m := meter{bulk: true}
	m.wait(200 * time.Millisecond)
	m.got([]byte("seen while it waits"), 20*time.Second)
	m.goOn(20*time.Second + 100*time.Millisecond)
	if !m.bulk || m.loud != loudNeed || m.waited != 100*time.Millisecond {
		t.Errorf("%+v", m)
	}
}
