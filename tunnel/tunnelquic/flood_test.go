package tunnelquic

import (
	"bytes"
	"encoding/binary"
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

// RFC 9000 lets a peer send frames without data as often as it likes, and new
// keys with each round trip (RFC 9001 §6). They cost what data would: another
// connection goes on meanwhile.
func TestFloodsOfFramesDisturbNoOtherConnection(t *testing.T) {
	if testing.Short() {
		t.Skip("four seconds")
	}
	s, c, _ := configs(t)
	l := listen(t, Config{TLS: s})
	d := dialer(t, c)
	near, far := carriers(t, l, d)
	other := echoed(t, near, far)
	rounds := func(over time.Duration) (n int, longest time.Duration) {
		buf := make([]byte, 160)
		tick := time.NewTicker(5 * time.Millisecond)
		defer tick.Stop()
		for end := time.Now().Add(over); time.Now().Before(end); n++ {
			<-tick.C
			began := time.Now()
			other.Write(buf)
			if _, err := io.ReadFull(other, buf); err != nil {
				t.Fatal(err)
			}
			longest = max(longest, time.Since(began))
		}
		return n, longest
	}
	const over = 400 * time.Millisecond
	for name, frame := range map[string]bytesFrame{
		"PING":                 {1},
		"PING, many at once":   bytes.Repeat([]byte{1}, 1000),
		"MAX_DATA":             bytes.Repeat(varint([]byte{0x10}, 1<<20), 100),
		"DATA_BLOCKED":         bytes.Repeat(varint([]byte{0x14}, 1<<20), 100),
		"PATH_CHALLENGE":       bytes.Repeat([]byte{0x1a, 1, 2, 3, 4, 5, 6, 7, 8}, 100),
		"new keys, again soon": nil,
	} {
		t.Run(name, func(t *testing.T) {
			client, server := carriers(t, l, d)
			own := echoed(t, client, server)
			before, longBefore := rounds(over)
			stop, ended := make(chan struct{}), make(chan struct{})
			if frame == nil {
				defer setKeyUpdateInterval(1)()
			}
			go func() {
				defer close(ended)
				for conn := client.(*carrier).conn; conn.Context().Err() == nil; {
					select {
					case <-stop:
						return
					default:
					}
					if frame == nil { // each round trip may be under new keys
						own.Write([]byte{0})
						io.ReadFull(own, make([]byte, 1))
						continue
					}
					for range 20 { // quic-go ends connections that queue too many
						queueFrame(conn, frame)
					}
					time.Sleep(100 * time.Microsecond)
				}
			}()
			during, longDuring := rounds(over)
			close(stop)
			<-ended
			if during == 0 || near.Err() != nil {
				t.Errorf("another connection did %d rounds in %v, before %d: %v", during, over, before, near.Err())
			}
			st := server.(*carrier).conn.ConnectionStats()
			t.Logf("another did %d rounds in %v (at most %v each), before %d (%v); %d packets came and %d were sent; %v", during, over, longDuring, before, longBefore, st.PacketsReceived, st.PacketsSent, server.Err())
		})
	}
}
