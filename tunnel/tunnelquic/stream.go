package tunnelquic

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"syscall"
	"time"

	"github.com/quic-go/quic-go"
)

// A stream is a QUIC stream with the manners of a TCP connection.
type stream struct {
	qs   *quic.Stream
	link *link

	// writing is held by Write and by whoever sends the FIN: quic-go does not
	// allow both at once.
	writing sync.Mutex

	mu     sync.Mutex // guards closed, and write deadlines against it
	closed bool       // Close or Abort was called: nothing works any more at this end
}

func (s *stream) LocalAddr() net.Addr  { return s.link.conn.LocalAddr() }
func (s *stream) RemoteAddr() net.Addr { return s.link.conn.RemoteAddr() }

func (s *stream) Read(p []byte) (int, error) {
	n, err := s.qs.Read(p)
	s.link.idle.read(n)
	return n, s.says(err)
}

func (s *stream) Write(p []byte) (int, error) {
	s.writing.Lock()
	defer s.writing.Unlock()
	if s.isClosed() {
		return 0, net.ErrClosed
	}
	n, err := s.qs.Write(p)
	s.link.idle.wrote(n)
	return n, s.says(err)
}

func (s *stream) isClosed() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.closed
}

// says puts an error into the words that net.Conn uses.
func (s *stream) says(err error) error {
	var reset *quic.StreamError
	switch {
	case err == nil || err == io.EOF:
		return err
	case s.isClosed():
		return net.ErrClosed
	case errors.As(err, &reset):
		return fmt.Errorf("the peer ended the stream: %w", syscall.ECONNRESET)
	case errors.Is(err, quic.ErrStreamClosed):
		return net.ErrClosed
	case errors.Is(err, os.ErrDeadlineExceeded):
		return err
	}
	return s.link.because(err)
}

// CloseWrite sends the FIN. It waits for a Write that is under way.
func (s *stream) CloseWrite() error {
	s.writing.Lock()
	defer s.writing.Unlock()
	if s.isClosed() {
		return net.ErrClosed
	}
	return s.says(s.qs.Close())
}

// Close sends the FIN after all bytes that Write has taken, and has the peer
// stop sending (STOP_SENDING, RFC 9000 §19.5).
func (s *stream) Close() error {
	if !s.close() {
		return nil
	}
	// A Write that is blocked ends by this deadline. It must be gone before the FIN.
	s.qs.SetWriteDeadline(time.Unix(1, 0))
	s.writing.Lock()
	s.qs.Close() // fails when the peer does not want our bytes: then none are owed
	s.writing.Unlock()
	s.qs.CancelRead(codeDone)
	return nil
}

// Abort resets both directions.
func (s *stream) Abort(error) {
	s.close()
	s.qs.CancelWrite(codeFailed)
	s.qs.CancelRead(codeFailed)
}

// close marks the stream closed and reports whether it was open.
func (s *stream) close() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	was := s.closed
	s.closed = true
	return !was
}

func (s *stream) SetDeadline(t time.Time) error {
	if err := s.SetReadDeadline(t); err != nil {
		return err
	}
	return s.SetWriteDeadline(t)
}

func (s *stream) SetReadDeadline(t time.Time) error { return s.qs.SetReadDeadline(t) }

func (s *stream) SetWriteDeadline(t time.Time) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed { // Close's own deadline must stay
		return net.ErrClosed
	}
	return s.qs.SetWriteDeadline(t)
}
