package tunneltls

import (
	"bytes"
	"encoding/binary"
	"errors"
	"testing"
)

func TestRecordsAreReadWhole(t *testing.T) {
	whole := appendRecord(appendRecord(nil, 7, []byte("one")), 65535, nil)
	for cut := range len(whole) + 1 {
		var got [][]byte
		b := whole[:cut]
		for {
			_, datagram, n, err := nextRecord(b)
			if err != nil {
				t.Fatal(err)
			}
			if n == 0 {
				break
			}
			got, b = append(got, datagram), b[n:]
		}
		want := 0
		if cut >= recordHeader+3 {
			want++
		}
		if cut == len(whole) {
			want++
		}
		if len(got) != want || want > 0 && string(got[0]) != "one" {
			t.Errorf("%d of %d bytes hold records %q; want %d", cut, len(whole), got, want)
		}
	}
	sent, _, _, _ := nextRecord(whole[recordHeader+3:])
	if sent != 65535 {
		t.Errorf("send time %d; want 65535", sent)
	}
}

func TestRecordWithoutSendTimeIsRefused(t *testing.T) {
	for _, length := range []byte{0, 1} {
		if _, _, _, err := nextRecord([]byte{0, length, 0, 0}); !errors.Is(err, errRecord) {
			t.Errorf("length %d: %v", length, err)
		}
	}
}

func FuzzLaneRecords(f *testing.F) {
	f.Add(appendRecord(nil, 1000, []byte("datagram")))
	f.Fuzz(func(t *testing.T, b []byte) {
		rest := b
		for {
			sent, datagram, n, err := nextRecord(rest)
			if err != nil || n == 0 {
				return
			}
			if again := appendRecord(nil, sent, datagram); !bytes.Equal(again, rest[:n]) {
				t.Fatalf("% x reads as %d, % x, which writes as % x", rest[:n], sent, datagram, again)
			}
			rest = rest[n:]
		}
	})
}

func FuzzControlMessages(f *testing.F) {
	f.Add(message{what: saysAbort, stream: 3, total: 1 << 40, code: "policy_denied"}.append(nil))
	f.Fuzz(func(t *testing.T, b []byte) {
		r := bytes.NewReader(b)
		for at := 0; ; {
			m, err := readMessage(r)
			if err != nil {
				return
			}
			next := len(b) - r.Len()
			if again := m.append(nil); !bytes.Equal(again, b[at:next]) {
				t.Fatalf("% x reads as %+v, which writes as % x", b[at:next], m, again)
			}
			at = next
		}
	})
}

func FuzzHello(f *testing.F) {
	f.Add([]byte{22, 3, 1, 0, 2, 1, 0})
	f.Fuzz(func(t *testing.T, b []byte) {
		r := bytes.NewReader(b)
		hello, err := readHello(r)
		if err != nil {
			return
		}
		if used := len(b) - r.Len(); !bytes.Equal(hello, b[:used]) || used != 5+int(binary.BigEndian.Uint16(b[3:])) {
			t.Fatalf("read % x of % x, and %d bytes were used", hello, b, used)
		}
	})
}
