package resume

import (
	"bytes"
	"io"
	"net"
	"testing"
	"time"

	"culvert/tunnel"
)

// said is a carrier stream that says what it was made with, and takes anything.
type said struct{ *bytes.Reader }

func (said) Write(p []byte) (int, error)      { return len(p), nil }
func (said) Close() error                     { return nil }
func (said) CloseWrite() error                { return nil }
func (said) Abort(error)                      {}
func (said) LocalAddr() net.Addr              { return &net.TCPAddr{} }
func (said) RemoteAddr() net.Addr             { return &net.TCPAddr{} }
func (said) SetDeadline(time.Time) error      { return nil }
func (said) SetReadDeadline(time.Time) error  { return nil }
func (said) SetWriteDeadline(time.Time) error { return nil }

var _ tunnel.Stream = said{}

// Whatever a peer says, only the data in it is read, no more is held than it
// sent, and the Conn can be ended.
func FuzzPeer(f *testing.F) {
	f.Add([]byte{frameData, 0, 2, 'h', 'i', frameEnd, 0, 0}, uint64(0))
	f.Add(append(appendAck(nil, 5), frameStop, 0, 0), uint64(3))
	f.Add(appendReset([]byte{frameData, 0, 1, 'x'}, tunnel.PolicyDenied), uint64(5))
	f.Add([]byte{frameData, 0xff, 0xff, 'h'}, uint64(6))
	f.Fuzz(func(t *testing.T, says []byte, received uint64) {
		b := NewBudget(1)
		c := New(Config{Share: b.Share(0)})
		c.Write([]byte("hello"))
		c.Attach(said{bytes.NewReader(nil)}, 0)
		c.Attach(said{bytes.NewReader(says)}, received)
		c.SetReadDeadline(time.Now().Add(time.Minute))
		time.AfterFunc(0, func() { c.Detach(); c.Expire(net.ErrClosed) })
		if n, _ := io.Copy(io.Discard, c); int(n) > len(says) {
			t.Errorf("%d bytes out of %d", n, len(says))
		}
		<-c.Done()
		c.Close()
		settled(t, b)
	})
}
