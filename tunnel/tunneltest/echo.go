package tunneltest

import (
	"context"
	"io"
	"net"
	"net/netip"
	"sync"

	"culvert/tunnel"
)

// Echo is an Opener whose every target sends back what it gets: bytes on
// streams, datagrams from the address they were sent to (a name answers from
// 192.0.2.53). It stands for the far side of a path in tests. The zero value
// is ready.
type Echo struct {
	// Stream, where set, is asked before a stream is opened; it may wait for
	// ctx, and its error is the result.
	Stream func(ctx context.Context, to tunnel.Target) error
	// Packets, where set, is asked before an association is opened.
	Packets func(by tunnel.Peer) error

	mu   sync.Mutex
	open []*EchoPackets
}

// OpenStream implements tunnel.Opener.
func (e *Echo) OpenStream(ctx context.Context, _ tunnel.Peer, to tunnel.Target) (tunnel.Stream, error) {
	if e.Stream != nil {
		if err := e.Stream(ctx, to); err != nil {
			return nil, err
		}
	}
	at := net.TCPAddrFromAddrPort(netip.MustParseAddrPort("192.0.2.9:9"))
	up, down := newHalf(64<<10), newHalf(64<<10)
	near := &stream{in: down, out: up, local: at, remote: at, closed: func() {}}
	far := &stream{in: up, out: down, local: at, remote: at, closed: func() {}}
	go func() {
		if _, err := io.Copy(far, far); err != nil {
			far.Abort(err)
			return
		}
		far.Close()
	}()
	return near, nil
}

// OpenPackets implements tunnel.Opener.
func (e *Echo) OpenPackets(by tunnel.Peer, r tunnel.Receiver) (tunnel.Packets, error) {
	if e.Packets != nil {
		if err := e.Packets(by); err != nil {
			return nil, err
		}
	}
	p := &EchoPackets{By: by, Receiver: r, echo: e}
	e.mu.Lock()
	defer e.mu.Unlock()
	e.open = append(e.open, p)
	return p, nil
}

// Open returns the associations that are open, oldest first.
func (e *Echo) Open() []*EchoPackets {
	e.mu.Lock()
	defer e.mu.Unlock()
	return append([]*EchoPackets(nil), e.open...)
}

// EchoPackets is an association of an Echo.
type EchoPackets struct {
	By       tunnel.Peer
	Receiver tunnel.Receiver // what comes back goes here; tests may call it too
	echo     *Echo
}

// Send implements tunnel.Packets.
func (p *EchoPackets) Send(b []byte, to tunnel.Target) error {
	from := to.AddrPort()
	if !from.IsValid() {
		from = netip.AddrPortFrom(netip.MustParseAddr("192.0.2.53"), to.Port)
	}
	p.Receiver.Deliver(b, from)
	return nil
}

// Flush implements tunnel.Packets.
func (p *EchoPackets) Flush() {}

// Close implements tunnel.Packets.
func (p *EchoPackets) Close() error {
	p.echo.mu.Lock()
	defer p.echo.mu.Unlock()
	for i, q := range p.echo.open {
		if q == p {
			p.echo.open = append(p.echo.open[:i], p.echo.open[i+1:]...)
			return nil
		}
	}
	return net.ErrClosed
}
