package tunnelquic

import (
	"context"
	"io"
	"testing"
	"time"

	"github.com/quic-go/quic-go"

	"culvert/tunnel"
)

// Both benchmarks move 64 MiB over one stream from the server to the client,
// so that their MB/s can be compared: the carrier's must be at least 0.8 × the bare one's.

const bulk = 64 << 20

func BenchmarkBulkCarrier(b *testing.B) {
	s, c, _ := configs(b)
	l := listen(b, Config{TLS: s})
	cc, sc := connect(b, l, dialer(b, c))
	client, err := cc.Carrier()
	if err != nil {
		b.Fatal(err)
	}
	defer client.Close(nil)
	server, err := sc.Carrier()
	if err != nil {
		b.Fatal(err)
	}
	transfer(b, func() (io.ReadCloser, error) {
		st, err := client.OpenStream(b.Context())
		if err != nil {
			return nil, err
		}
		_, err = st.Write([]byte("x"))
		return st, err
	}, func() (io.WriteCloser, error) { return server.AcceptStream(b.Context()) })
}

func BenchmarkBulkBare(b *testing.B) {
	s, c, _ := configs(b)
	// Windows as the carrier's, so that only our layers differ.
	conf := &quic.Config{MaxStreamReceiveWindow: maxStreamWindow, MaxConnectionReceiveWindow: maxConnWindow}
	l, err := quic.Listen(udp(b), s, conf)
	if err != nil {
		b.Fatal(err)
	}
	defer l.Close()
	client, err := quic.DialAddr(b.Context(), l.Addr().String(), c, conf)
	if err != nil {
		b.Fatal(err)
	}
	defer client.CloseWithError(0, "")
	server, err := l.Accept(b.Context())
	if err != nil {
		b.Fatal(err)
	}
	transfer(b, func() (io.ReadCloser, error) {
		st, err := client.OpenStreamSync(b.Context())
		if err != nil {
			return nil, err
		}
		_, err = st.Write([]byte("x"))
		return io.NopCloser(st), err
	}, func() (io.WriteCloser, error) { return server.AcceptStream(b.Context()) })
}

func transfer(b *testing.B, open func() (io.ReadCloser, error), accept func() (io.WriteCloser, error)) {
	b.SetBytes(bulk)
	chunk := make([]byte, 64<<10)
	for b.Loop() {
		sent := make(chan error, 1)
		go func() {
			w, err := accept()
			for n := 0; n < bulk && err == nil; n += len(chunk) {
				_, err = w.Write(chunk)
			}
			if err == nil {
				err = w.Close()
			}
			sent <- err
		}()
		r, err := open()
		if err != nil {
			b.Fatal(err)
		}
		n, err := io.CopyBuffer(struct{ io.Writer }{io.Discard}, r, make([]byte, 64<<10))
		if err != nil || n != bulk {
			b.Fatalf("%d bytes, %v", n, err)
		}
		if err := <-sent; err != nil {
			b.Fatal(err)
		}
		r.Close()
	}
}

// BenchmarkDatagram sends 1,100-byte datagrams as fast as the way takes them.
func BenchmarkDatagram(b *testing.B) {
	s, c, _ := configs(b)
	l := listen(b, Config{TLS: s})
	cc, sc := connect(b, l, dialer(b, c))
	client, err := cc.Carrier()
	if err != nil {
		b.Fatal(err)
	}
	defer client.Close(nil)
	server, err := sc.Carrier()
	if err != nil {
		b.Fatal(err)
	}
	defer server.Close(nil)
	writable := make(chan struct{}, 1)
	client.Datagrams().Start(func([]byte) {}, func() {
		select {
		case writable <- struct{}{}:
		default:
		}
	})
	server.Datagrams().Start(func([]byte) {}, func() {})
	p := make([]byte, 1100)
	b.SetBytes(int64(len(p)))
	b.ReportAllocs()
	ctx, cancel := context.WithTimeout(b.Context(), time.Minute)
	defer cancel()
	for b.Loop() {
		for client.Datagrams().Send(p) == tunnel.ErrBlocked {
			select {
			case <-writable:
			case <-ctx.Done():
				b.Fatal("blocked for ever")
			}
		}
	}
}
