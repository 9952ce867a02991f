package resume

import (
	"net"
	"sync"
	"time"

	"culvert/tunnel"
)

type Config struct {
	Detached func(error)
	Limit    time.Duration
}
type Conn struct {
	cfg  Config
	mu   sync.Mutex
	s    tunnel.Stream
	got  chan struct{}
	once sync.Once
	err  error
	done chan struct{}
	over sync.Once
}

func New(cfg Config) *Conn {
	return &Conn{cfg: cfg, got: make(chan struct{}), done: make(chan struct{})}
}
func (c *Conn) Attach(s tunnel.Stream, _ uint64) error {
	c.s = s
	c.once.Do(func() { close(c.got) })
	return nil
}
func (c *Conn) Detach() uint64        { return 0 }
func (c *Conn) Received() uint64      { return 0 }
func (c *Conn) Done() <-chan struct{} { return c.done }
func (c *Conn) Expire(err error)      { c.err = err; c.once.Do(func() { close(c.got) }) }
func (c *Conn) Read(p []byte) (int, error) {
	<-c.got
	if c.s == nil {
		return 0, c.err
	}
	return c.s.Read(p)
}
func (c *Conn) Write(p []byte) (int, error) {
	<-c.got
	if c.s == nil {
		return 0, c.err
	}
	return c.s.Write(p)
}
func (c *Conn) Close() error {
	c.over.Do(func() { close(c.done) })
	if c.s == nil {
		c.Expire(net.ErrClosed)
		return nil
	}
	return c.s.Close()
}
func (c *Conn) CloseWrite() error { return c.s.CloseWrite() }
func (c *Conn) Abort(err error) {
	c.over.Do(func() { close(c.done) })
	if c.s == nil {
		c.Expire(err)
		return
	}
	c.s.Abort(err)
}
func (c *Conn) LocalAddr() net.Addr                { return c.s.LocalAddr() }
func (c *Conn) RemoteAddr() net.Addr               { return c.s.RemoteAddr() }
func (c *Conn) SetDeadline(t time.Time) error      { return c.s.SetDeadline(t) }
func (c *Conn) SetReadDeadline(t time.Time) error  { return c.s.SetReadDeadline(t) }
func (c *Conn) SetWriteDeadline(t time.Time) error { return c.s.SetWriteDeadline(t) }
