package packet

import (
	"testing"
	"time"
)

func TestPacketComesBackAsItWasPut(t *testing.T) {
	b := make([]byte, 100)
	sent, turned := time.Unix(0, 1_700_000_000_123_456_789), time.Unix(0, 1_700_000_000_223_456_789)
	want := Packet{Run: 7, Flow: 3, Counts: true, Sequence: 70_000, Sent: sent}
	Put(b, want, Video)
	if got, ok := Get(b); !ok || got != want {
		t.Fatalf("got %+v, %v; want %+v", got, ok, want)
	}
	Turn(b, turned)
	want.Turned = turned
	if got, ok := Get(b); !ok || got != want {
		t.Fatalf("turned: got %+v, %v; want %+v", got, ok, want)
	}
	if b[0]>>6 != 2 || b[1] != Video {
		t.Errorf("not RTP: % x", b[:2])
	}
}

func TestOtherBytesAreNoPacket(t *testing.T) {
	if _, ok := Get(make([]byte, Min)); ok {
		t.Error("zeroes were taken for a packet")
	}
	if _, ok := Get([]byte{0x80}); ok {
		t.Error("one byte was taken for a packet")
	}
}
