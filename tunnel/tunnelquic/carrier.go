package tunnelquic

import (
	"context"
	"sync"

	"github.com/quic-go/quic-go"

	"culvert/tunnel"
)

// A carrier is a connection past its greeting.
type carrier struct {
	*link
	way *way

	mu    sync.Mutex
	early []*stream // accepted while the candidate was being turned
}

func newCarrier(l *link, early []*stream) *carrier {
	return &carrier{link: l, way: newWay(l), early: early}
}

func (c *carrier) OpenStream(ctx context.Context) (tunnel.Stream, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	qs, err := c.conn.OpenStreamSync(ctx)
	if err != nil {
		return nil, c.ended(ctx, err)
	}
	return &stream{qs: qs, link: c.link}, nil
}

func (c *carrier) AcceptStream(ctx context.Context) (tunnel.Stream, error) {
	c.mu.Lock()
	if len(c.early) > 0 {
		s := c.early[0]
		c.early = c.early[1:]
		c.mu.Unlock()
		return s, nil
	}
	c.mu.Unlock()
	for {
		qs, err := c.conn.AcceptStream(ctx)
		if err != nil {
			return nil, c.ended(ctx, err)
		}
		s := &stream{qs: qs, link: c.link}
		if c.server && qs.StreamID() == 0 { // a greeting that nobody waited for
			s.Close()
			continue
		}
		return s, nil
	}
}

// ended chooses the better words for a failed open or accept.
func (c *carrier) ended(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return ctx.Err()
	}
	return c.because(err)
}

func (c *carrier) Datagrams() tunnel.Way {
	if !c.conn.ConnectionState().SupportsDatagrams.Remote {
		return nil
	}
	return c.way
}

func (c *carrier) Done() <-chan struct{} { return c.conn.Context().Done() }
func (c *carrier) Err() error            { return c.reason() }

func (c *carrier) Close(err error) error {
	var code quic.ApplicationErrorCode = codeDone
	if err != nil {
		code = codeFailed
	}
	c.close(code, err)
	c.way.wait()
	return nil
}

func (c *carrier) Stats() tunnel.CarrierStats {
	return tunnel.CarrierStats{
		Kind:   "quic",
		Local:  tunnel.AddrPortOf(c.conn.LocalAddr()),
		Remote: c.RemoteAddr(),
		RTT:    c.conn.ConnectionStats().SmoothedRTT,
	}
}
