package channel

import (
	"encoding/binary"
	"testing"
	"time"
)

// FuzzPacket reads its input as packets, each behind a byte of flags and 16
// bits of length, and gives them to a socket and, joined, to a stream.
func FuzzPacket(f *testing.F) {
	f.Fuzz(func(t *testing.T, data []byte) {
		w := newWatcher(Config{MediaRule: func(Target) bool { return true }, MaxFlows: 16})
		s, tcp := w.OpenSocket(me), w.OpenStream(me, far)
		now := epoch
		for len(data) >= 3 {
			flags := data[0]
			n := min(int(binary.BigEndian.Uint16(data[1:])), len(data)-3)
			p := data[3 : 3+n]
			data = data[3+n:]
			now = now.Add(time.Duration(flags>>2) * 20 * time.Millisecond)
			s.Packet(flags&1 != 0, Target{Addr: far.Addr, Port: uint16(flags & 2)}, p, now)
			tcp.Data(flags&1 != 0, p, now)
			switch k := kindOf(p, len(p)); {
			case k == stun && len(p) < stunHeader, k == dtls && len(p) < dtlsHeader, k == rtp && len(p) < rtpHeader,
				k == rtcp && len(p) < 8, k == channelData && len(p) < channelHeader:
				t.Fatalf("%d bytes are of kind %d", len(p), k)
			}
		}
		for _, c := range w.Channels(now) {
			if len(c.Evidence) == 0 || c.State == "" || c.Since.After(c.Last) {
				t.Fatalf("a verdict without its reason: %+v", c)
			}
		}
		s.Close(now)
		tcp.Close(now)
		if c := w.Channels(now); len(c) != 0 || w.flows.Load() != 0 {
			t.Fatalf("left behind: %+v, %d flows", c, w.flows.Load())
		}
	})
}
