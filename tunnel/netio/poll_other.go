//go:build !linux || !(amd64 || arm64 || arm || riscv64)

package netio

import (
	"errors"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"
)

// A Poller reads many sockets, here with a goroutine and a buffer for each. The
// zero value is ready. Its methods may be called concurrently.
type Poller struct {
	// MaxAge is not heeded here: the system does not tell when a datagram came.
	MaxAge time.Duration

	mu      sync.Mutex
	closed  bool
	sockets map[*Socket]struct{}
	wg      sync.WaitGroup
}

// A Socket is one that a Poller reads. Send and the like are for datagrams.
type Socket struct {
	Sender
	poller *Poller
	stream *net.TCPConn // nil: datagrams
	r      Reader
	closed atomic.Bool
}

// Packet takes over a socket that is not connected; conn is not to be used any
// more, also when it fails. Reading begins with Start.
func (p *Poller) Packet(conn *net.UDPConn, r Reader) (*Socket, error) {
	sender, err := NewSender(conn)
	if err != nil {
		conn.Close()
		return nil, err
	}
	return &Socket{Sender: *sender, poller: p, r: r}, nil
}

// Stream takes over a connection; conn is not to be used any more, also when it
// fails. Reading begins with Start.
func (p *Poller) Stream(conn *net.TCPConn, r Reader) (*Socket, error) {
	return &Socket{poller: p, stream: conn, r: r}, nil
}

// Late is how many datagrams were dropped for their age.
func (p *Poller) Late() uint64 { return 0 }

// Start begins to read. It is called once.
func (s *Socket) Start() error {
	p := s.poller
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed || s.closed.Load() {
		return net.ErrClosed
	}
	if p.sockets == nil {
		p.sockets = map[*Socket]struct{}{}
	}
	p.sockets[s] = struct{}{}
	p.wg.Go(s.read)
	return nil
}

// Close ends all reading and waits for that. Sockets that are still open have
// to be closed as well. It must not be called by a Reader.
func (p *Poller) Close() {
	p.mu.Lock()
	p.closed = true
	for s := range p.sockets {
		s.close()
	}
	p.mu.Unlock()
	p.wg.Wait()
}

func (s *Socket) read() {
	b := make([]byte, 1<<16)
	for !s.closed.Load() {
		if s.stream != nil {
			n, err := s.stream.Read(b[:512])
			if n > 0 {
				s.r.Take(b[:n], netip.AddrPort{})
				s.r.Flush()
			}
			if err != nil {
				if !s.closed.Load() {
					s.r.Failed()
				}
				return
			}
			continue
		}
		n, from, err := s.conn.ReadFromUDPAddrPort(b)
		switch {
		case errors.Is(err, net.ErrClosed):
			return
		case err != nil:
			s.r.Failed()
		default:
			s.r.Take(b[:n], netip.AddrPortFrom(from.Addr().Unmap(), from.Port()))
			s.r.Flush()
		}
	}
}

// Close ends the socket. It never waits and may be called by its Reader, which
// is called no more except for a batch that has begun.
func (s *Socket) Close() error {
	s.poller.mu.Lock()
	delete(s.poller.sockets, s)
	s.poller.mu.Unlock()
	return s.close()
}

func (s *Socket) close() error {
	if !s.closed.CompareAndSwap(false, true) {
		return net.ErrClosed
	}
	if s.stream != nil {
		return s.stream.Close()
	}
	return s.conn.Close()
}

// Reset closes a stream with RST.
func (s *Socket) Reset() error {
	s.stream.SetLinger(0)
	return s.Close()
}
