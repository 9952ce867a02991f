package sidecar

import (
	"context"
	"errors"
	"net/netip"
	"time"

	"culvert/sidecar/channel"
	"culvert/tunnel"
)

// NewWatch returns the stage that tells w about the traffic on its way to next.
// It changes nothing on the way. who says whose a request is; it is called once
// for each association and stream and must not wait (what takes time belongs in
// Owner.Resolve).
func NewWatch(next tunnel.Opener, w *channel.Watcher, who func(by tunnel.Peer) channel.Owner) tunnel.Opener {
	return &watch{next, w, who}
}

// OwnerOf is the plain answer to whose a request is: its user, and the process
// that find names for its source address. A nil find names none.
func OwnerOf(by tunnel.Peer, find func(client netip.AddrPort) (app string, pid int)) channel.Owner {
	o := channel.Owner{User: by.User, Addr: by.Addr.Addr().Unmap()}
	if find != nil && by.Addr.IsValid() {
		o.Resolve = func() (string, int) { return find(by.Addr) }
	}
	return o
}

// TickWatch keeps a watcher up to date until ctx ends.
func TickWatch(ctx context.Context, w *channel.Watcher) {
	t := time.NewTicker(time.Second)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case now := <-t.C:
			w.Tick(now)
		}
	}
}

type watch struct {
	next tunnel.Opener
	w    *channel.Watcher
	who  func(by tunnel.Peer) channel.Owner
}

func (o *watch) OpenStream(ctx context.Context, by tunnel.Peer, to tunnel.Target) (tunnel.Stream, error) {
	s, err := o.next.OpenStream(ctx, by, to)
	if err != nil {
		return nil, err
	}
	return &watchedStream{s, o.w.OpenStream(o.who(by), channel.Target(to))}, nil
}

func (o *watch) OpenPackets(by tunnel.Peer, r tunnel.Receiver) (tunnel.Packets, error) {
	// The socket comes first: packets may arrive before OpenPackets returns.
	s := o.w.OpenSocket(o.who(by))
	p, err := o.next.OpenPackets(by, &watchedReceiver{r, s})
	if err != nil {
		s.Close(time.Now())
		return nil, err
	}
	return &watchedPackets{p, s}, nil
}

type watchedPackets struct {
	tunnel.Packets
	socket *channel.Socket
}

func (p *watchedPackets) Send(b []byte, to tunnel.Target) error {
	// Told first: the answer to a request may come before Send returns.
	p.socket.Packet(true, channel.Target(to), b, time.Now())
	err := p.Packets.Send(b, to)
	if err != nil && errors.Is(err, tunnel.PolicyDenied) {
		p.socket.Refused(channel.Target(to))
	}
	return err
}

func (p *watchedPackets) Close() error {
	p.socket.Close(time.Now())
	return p.Packets.Close()
}

type watchedReceiver struct {
	tunnel.Receiver
	socket *channel.Socket
}

func (r *watchedReceiver) Deliver(b []byte, from netip.AddrPort) {
	r.socket.Packet(false, channel.Target{Addr: from.Addr().Unmap(), Port: from.Port()}, b, time.Now())
	r.Receiver.Deliver(b, from)
}

func (r *watchedReceiver) Closed(err error) {
	r.socket.Close(time.Now())
	r.Receiver.Closed(err)
}

type watchedStream struct {
	tunnel.Stream
	flow *channel.StreamFlow
}

func (s *watchedStream) Read(b []byte) (int, error) {
	n, err := s.Stream.Read(b)
	s.flow.Data(false, b[:n], time.Now())
	return n, err
}

func (s *watchedStream) Write(b []byte) (int, error) {
	n, err := s.Stream.Write(b)
	s.flow.Data(true, b[:n], time.Now())
	return n, err
}

func (s *watchedStream) Close() error {
	s.flow.Close(time.Now())
	return s.Stream.Close()
}

func (s *watchedStream) Abort(err error) {
	s.flow.Close(time.Now())
	s.Stream.Abort(err)
}
