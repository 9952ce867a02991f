package tunnelquic

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"os"
	"reflect"
	"testing"
	"time"
	_ "unsafe" // linkname: quic-go sends none of this when it is asked to

	"github.com/quic-go/quic-go"

	"culvert/tunnel"
)

// bytesFrame is any frame, as quic-go's packets take it.
type bytesFrame []byte

func (f bytesFrame) Append(b []byte, _ quic.Version) ([]byte, error) { return append(b, f...), nil }
func (f bytesFrame) Length(quic.Version) int64                       { return int64(len(f)) }

// The linker must keep methods that quic-go calls by another type's name.
var _ = reflect.TypeFor[bytesFrame]().Method(len(os.Args) % 2)

//go:linkname queueFrame github.com/quic-go/quic-go.(*Conn).queueControlFrame
func queueFrame(c *quic.Conn, f interface {
	Append([]byte, quic.Version) ([]byte, error)
	Length(quic.Version) int64
})

//go:linkname setKeyUpdateInterval github.com/quic-go/quic-go/internal/handshake.SetKeyUpdateInterval
func setKeyUpdateInterval(packets uint64) (reset func())

// varint is a number in eight bytes (RFC 9000 §16).
func varint(b []byte, n uint64) []byte { return binary.BigEndian.AppendUint64(b, n|3<<62) }

// echoed makes a stream of a connection whose server sends back what comes.
func echoed(t *testing.T, from, to tunnel.Carrier) tunnel.Stream {
	t.Helper()
	a, err := from.OpenStream(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	a.SetDeadline(time.Now().Add(testPatience))
	a.Write([]byte("x"))
	b, err := to.AcceptStream(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	go func() { io.Copy(b, b); b.Close() }()
	if _, err := io.ReadFull(a, make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	return a
}

// RFC 9000 lets a peer send frames without data as often as it likes. They cost
// what data would: who floods with them is cut, and another connection goes on.
func TestAPeerThatFloodsWithFramesIsCut(t *testing.T) {
	s, c, _ := configs(t)
	l := listen(t, Config{TLS: s})
	d := dialer(t, c)
	near, far := carriers(t, l, d)
	other := echoed(t, near, far)
	for name, frame := range map[string]bytesFrame{
		"PING":               bytes.Repeat([]byte{1}, 1000),
		"MAX_DATA":           bytes.Repeat(varint([]byte{0x10}, 1<<20), 100),
		"DATA_BLOCKED":       bytes.Repeat(varint([]byte{0x14}, 1<<20), 100),
		"PATH_CHALLENGE":     bytes.Repeat([]byte{0x1a, 1, 2, 3, 4, 5, 6, 7, 8}, 100),
		"PING beside a byte": bytes.Repeat([]byte{1}, 1000),
	} {
		t.Run(name, func(t *testing.T) {
			client, server := carriers(t, l, d)
			own := echoed(t, client, server)
			own.SetDeadline(time.Time{})
			began := time.Now()
			rounds := 0
			buf := make([]byte, 160)
			conn := client.(*carrier).conn
			sent := conn.ConnectionStats().PacketsSent
			for ; server.Err() == nil; rounds++ {
				if time.Since(began) > testPatience {
					t.Fatalf("the peer still floods: %d packets", server.(*carrier).conn.ConnectionStats().PacketsReceived)
				}
				for range 20 {
					queueFrame(conn, frame)
				}
				// quic-go ends connections that queue too many.
				for sent += 20; sent > conn.ConnectionStats().PacketsSent+1000 && server.Err() == nil; {
					time.Sleep(100 * time.Microsecond)
				}
				if name == "PING beside a byte" && rounds%8 == 0 {
					own.Write([]byte{0})
				}
				if rounds%100 == 0 {
					other.SetDeadline(time.Now().Add(testPatience)) // of each exchange
					other.Write(buf)
					if _, err := io.ReadFull(other, buf); err != nil {
						t.Fatalf("another connection: %v", err)
					}
				}
			}
			if err := server.Err(); !errors.Is(err, errIdle) {
				t.Fatalf("the connection ended with %v", err)
			}
			t.Logf("cut after %v and %d packets", time.Since(began), server.(*carrier).conn.ConnectionStats().PacketsReceived)
			<-client.Done()
		})
	}
	if far.Err() != nil {
		t.Error(far.Err())
	}
}

// Keys may change with each round trip (RFC 9001 §6). Without data that takes
// packets which bring nothing; with data it may go on, and disturbs nobody.
func TestKeysThatChangeAllTheTimeDisturbNoOtherConnection(t *testing.T) {
	s, c, _ := configs(t)
	l := listen(t, Config{TLS: s})
	d := dialer(t, c)
	near, far := carriers(t, l, d)
	other := echoed(t, near, far)
	client, server := carriers(t, l, d)
	own := echoed(t, client, server)
	defer setKeyUpdateInterval(1)()
	stop, ended := make(chan struct{}), make(chan int)
	go func() {
		n := 0
		defer func() { ended <- n }()
		for buf := make([]byte, 1); ; n++ {
			select {
			case <-stop:
				return
			default:
			}
			own.Write(buf)
			if _, err := io.ReadFull(own, buf); err != nil {
				return
			}
		}
	}()
	buf := make([]byte, 160)
	for range 100 {
		other.Write(buf)
		if _, err := io.ReadFull(other, buf); err != nil {
			t.Fatal(err)
		}
	}
	close(stop)
	if n := <-ended; n == 0 || server.Err() != nil {
		t.Errorf("%d rounds under new keys, then %v", n, server.Err())
	}
}

func TestTrafficIsNoFlood(t *testing.T) {
	second := func(m *idleMeter, packets int64, each func()) bool {
		now, seen, over := m.last, m.seen, false
		for range 4 { // looks
			for range 1000 {
				each()
			}
			now, seen = now.Add(time.Second/4), seen+packets/4
			over = m.over(seen, now) || over
		}
		return over
	}
	for name, tt := range map[string]struct {
		packets int64 // that come in a second
		each    func(*idleMeter)
		cut     bool
	}{
		"nothing":                                {packets: 100},
		"some PINGs":                             {packets: 3_900},
		"PINGs":                                  {packets: 8_000, cut: true},
		"an upload of 4,000 x 32 KiB":            {packets: 120_000, each: func(m *idleMeter) { m.read(32 << 10) }},
		"the same with PINGs":                    {packets: 1_200_000, each: func(m *idleMeter) { m.read(32 << 10) }, cut: true},
		"a download, each packet acknowledged":   {packets: 120_000, each: func(m *idleMeter) { m.wrote(32 << 10) }},
		"single bytes, two of them read at once": {packets: 7_900, each: func(m *idleMeter) { m.read(1) }},
		"datagrams, of which quic-go drops half": {packets: 8_000, each: func(m *idleMeter) { m.datagram() }},
		"one byte in 25 PINGs":                   {packets: 100_000, each: func(m *idleMeter) { m.read(1) }, cut: true},
	} {
		t.Run(name, func(t *testing.T) {
			m, over := newIdleMeter(time.Now()), false
			for range 20 {
				over = second(m, tt.packets, func() {
					if tt.each != nil {
						tt.each(m)
					}
				}) || over
			}
			if over != tt.cut {
				t.Errorf("cut: %v", over)
			}
		})
	}
}

// What is written last is acknowledged when nothing is written any more.
func TestLateAcknowledgementsAreNoFlood(t *testing.T) {
	m := newIdleMeter(time.Now())
	now := m.last
	m.wrote(12 << 20)
	for _, seen := range []int64{0, 0, 5_000, 10_000, 10_000} {
		if now = now.Add(lookEvery); m.over(seen, now) {
			t.Fatalf("cut after %d acknowledgements", seen)
		}
	}
}
