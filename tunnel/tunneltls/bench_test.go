package tunneltls

import (
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"testing"
	"time"

	"culvert/tunnel"
)

// BenchmarkBulk moves 64 KiB writes over one stream, and, as the measure to
// hold it against, over a TLS connection with nothing on it.
func BenchmarkBulk(b *testing.B) {
	const chunk = 64 << 10
	move := func(b *testing.B, w io.Writer, r io.Reader, end func()) {
		read := make(chan int64, 1)
		go func() {
			n, _ := io.CopyBuffer(struct{ io.Writer }{io.Discard}, struct{ io.Reader }{r}, make([]byte, chunk))
			read <- n
		}()
		b.SetBytes(chunk)
		b.ReportAllocs()
		p := make([]byte, chunk)
		b.ResetTimer()
		for range b.N {
			if _, err := w.Write(p); err != nil {
				b.Fatal(err)
			}
		}
		end()
		if n := <-read; n != int64(b.N)*chunk {
			b.Fatalf("%d of %d bytes arrived", n, int64(b.N)*chunk)
		}
	}
	b.Run("stream", func(b *testing.B) {
		s, r := benchStream(b)
		move(b, s, r, func() { s.CloseWrite() })
	})
	b.Run("stream inside a WebSocket", func(b *testing.B) {
		_, pair := inside(b)
		near, far := pair(b)
		s, r := streamOf(b, near, far)
		move(b, s, r, func() { s.CloseWrite() })
	})
	b.Run("bare", func(b *testing.B) {
		w, r := bareTLS(b)
		move(b, w, r, func() { w.CloseWrite() })
	})
}

func benchStream(b *testing.B) (near, far tunnel.Stream) {
	client, server := both(b)
	cc, sc := meet(b, dialer(b, client), listen(b, server))
	return streamOf(b, cc, sc)
}

func streamOf(b *testing.B, cc, sc tunnel.Candidate) (near, far tunnel.Stream) {
	c, err := cc.Carrier()
	if err != nil {
		b.Fatal(err)
	}
	s, err := sc.Carrier()
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { c.Close(nil); s.Close(nil) })
	near, err = c.OpenStream(context.Background())
	if err != nil {
		b.Fatal(err)
	}
	far, err = s.AcceptStream(context.Background())
	if err != nil {
		b.Fatal(err)
	}
	return near, far
}

func bareTLS(b *testing.B) (near, far *tls.Conn) {
	client, server := both(b)
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	defer ln.Close()
	raw, err := net.Dial("tcp", ln.Addr().String())
	if err != nil {
		b.Fatal(err)
	}
	accepted, err := ln.Accept()
	if err != nil {
		b.Fatal(err)
	}
	near, far = tls.Client(raw, client.TLS), tls.Server(accepted, server.TLS)
	b.Cleanup(func() { near.Close(); far.Close() })
	done := make(chan error, 1)
	go func() { done <- far.Handshake() }()
	if err := errors.Join(near.Handshake(), <-done); err != nil {
		b.Fatal(err)
	}
	return near, far
}

// BenchmarkSmallWrites shows what it is worth that a frame's header waits for
// its body: 200 bytes at a time, as signalling and media streams write.
func BenchmarkSmallWrites(b *testing.B) {
	for _, q := range []struct {
		name string
		wrap func(*frames) io.ReadWriteCloser
	}{
		{"coalesced", func(f *frames) io.ReadWriteCloser { return f }},
		{"as yamux writes", func(f *frames) io.ReadWriteCloser { return &uncoalesced{f} }},
	} {
		b.Run(q.name, func(b *testing.B) {
			near, far := bareTLS(b)
			a, z := benchSession(b, q.wrap(linkFrames(near)), true), benchSession(b, q.wrap(linkFrames(far)), false)
			s, err := a.OpenStream()
			if err != nil {
				b.Fatal(err)
			}
			r, err := z.AcceptStream()
			if err != nil {
				b.Fatal(err)
			}
			go io.Copy(io.Discard, r)
			p := make([]byte, 200)
			b.ResetTimer()
			for range b.N {
				if _, err := s.Write(p); err != nil {
					b.Fatal(err)
				}
			}
			b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "writes/s")
		})
	}
}

// BenchmarkLane sends 1000-byte datagrams as fast as a lane takes them.
func BenchmarkLane(b *testing.B) {
	client, server := both(b)
	cc, sc := meet(b, dialer(b, client), listen(b, server))
	near, err := cc.Lane()
	if err != nil {
		b.Fatal(err)
	}
	far, err := sc.Lane()
	if err != nil {
		b.Fatal(err)
	}
	defer near.Close(nil)
	defer far.Close(nil)
	writable := make(chan struct{}, 1)
	arrived := make(chan struct{})
	near.Start(func([]byte) {}, func() {
		select {
		case writable <- struct{}{}:
		default:
		}
	})
	last := uint64(b.N)
	far.Start(func(p []byte) {
		if binary.BigEndian.Uint64(p) == last {
			close(arrived)
		}
	}, func() {})
	p := make([]byte, 1000)
	b.ReportAllocs()
	b.ResetTimer()
	for i := range b.N {
		binary.BigEndian.PutUint64(p, uint64(i+1))
		for {
			err := near.Send(p)
			if err == nil {
				break
			}
			if !errors.Is(err, tunnel.ErrBlocked) {
				b.Fatal(err)
			}
			<-writable
		}
	}
	select {
	case <-arrived:
	case <-time.After(5 * time.Second):
		b.Fatal("the last datagram did not arrive")
	}
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "datagrams/s")
	b.ReportMetric(float64(far.Lost()["late"]), "late")
}
