package resume

import (
	"io"
	"net"
	"testing"

	"culvert/tunnel"
)

// tcpStream is a TCP connection as a carrier stream.
type tcpStream struct{ *net.TCPConn }

func (s tcpStream) Abort(error) { s.SetLinger(0); s.Close() }

func tcpPair(b *testing.B) (a, z tunnel.Stream) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	defer l.Close()
	c, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		b.Fatal(err)
	}
	s, err := l.Accept()
	if err != nil {
		b.Fatal(err)
	}
	return tcpStream{c.(*net.TCPConn)}, tcpStream{s.(*net.TCPConn)}
}

func BenchmarkBulk(b *testing.B) {
	share := NewBudget(0).Share(0)
	for name, cfg := range map[string]*Config{"bare": nil, "resumable": {}, "of a budget": {Share: share}} {
		b.Run(name, func(b *testing.B) {
			var from, to tunnel.Stream
			under, over := tcpPair(b)
			from, to = under, over
			if cfg != nil {
				x, y := New(*cfg), New(*cfg)
				x.Attach(under, 0)
				y.Attach(over, 0)
				go x.Read(make([]byte, 1))
				from, to = x, y
			}
			p := make([]byte, 32<<10)
			b.SetBytes(int64(len(p)))
			b.ReportAllocs()
			done := make(chan struct{})
			go func() {
				defer close(done)
				buf := make([]byte, 32<<10)
				for {
					if _, err := to.Read(buf); err != nil {
						return
					}
				}
			}()
			b.ResetTimer()
			for range b.N {
				if _, err := from.Write(p); err != nil {
					b.Fatal(err)
				}
			}
			from.CloseWrite()
			<-done
			b.StopTimer()
			from.Abort(io.EOF)
			to.Abort(io.EOF)
		})
	}
}
