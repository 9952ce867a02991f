package session

import (
	"errors"
	"net/netip"
	"testing"
	"time"

	"culvert/tunnel"
	"culvert/tunnel/bulk"
	"culvert/tunnel/media"
	"culvert/tunnel/wire"
)

// picky is a next stage that takes no datagram, or opens nothing.
type picky struct{ open, send error }

func (p *picky) OpenPackets(tunnel.Peer, tunnel.Receiver) (tunnel.Packets, error) { return p, p.open }
func (p *picky) Send([]byte, tunnel.Target) error                                 { return p.send }
func (p *picky) Flush()                                                           {}
func (p *picky) Close() error                                                     { return nil }

// picky is only asked for datagrams.
type pickyOpener struct {
	tunnel.Opener
	*picky
}

func (p pickyOpener) OpenPackets(by tunnel.Peer, r tunnel.Receiver) (tunnel.Packets, error) {
	return p.picky.OpenPackets(by, r)
}

func TestWhatGoesNoFurtherIsCountedOnceByItsReason(t *testing.T) {
	for name, c := range map[string]struct {
		next   *picky
		limits Limits
		before func(f *Far)
		want   media.Reason
	}{
		"refused":                   {next: &picky{send: errors.New("no")}, want: media.Refused},
		"too large":                 {next: &picky{send: tunnel.ErrTooLarge}, want: media.TooLarge},
		"beyond what may be open":   {next: &picky{open: tunnel.Errorf(tunnel.LimitExceeded, "no")}, want: media.OverLimit},
		"beyond the rate":           {next: &picky{}, limits: Limits{OpensPerSecond: 1}, before: func(f *Far) { f.opens.AllowN(time.Now(), 1) }, want: media.OverLimit},
		"of one that has ended":     {next: &picky{}, before: func(f *Far) { f.mu.Lock(); f.endLocked(1); f.mu.Unlock() }, want: media.Unknown},
		"of a session that is over": {next: &picky{}, before: func(f *Far) { f.mu.Lock(); f.assocs = nil; f.mu.Unlock() }, want: media.Unknown},
	} {
		t.Run(name, func(t *testing.T) {
			f := NewFar(FarConfig{Next: pickyOpener{picky: c.next}, Limits: c.limits})
			defer f.Close(nil)
			if c.before != nil {
				c.before(f)
			}
			h := wire.Header{Full: true, Association: 1, Target: tunnel.TargetOf(netip.MustParseAddrPort("203.0.113.9:9"))}
			f.plane.receive(newWay(f.plane, wire.WayDatagram), append(h.Append(nil), 'x'))
			got := map[string]uint64{}
			f.Drops(got)
			if len(got) != 1 || got[c.want.String()] != 1 {
				t.Errorf("counted %v; want one %s", got, c.want)
			}
		})
	}
}

func TestADatagramOfTooManyPiecesIsCounted(t *testing.T) {
	drops := &media.Drops{}
	p := newPlane(0, drops, bulk.New())
	defer p.close()
	p.addWay(wire.WayDatagram, &narrowWay{})
	l := p.add(&leg{plane: p, id: 1})
	if err := l.send(make([]byte, 60_000), alpha); !errors.Is(err, tunnel.ErrTooLarge) || drops.Get(media.TooLarge) != 1 {
		t.Errorf("%v, %d counted", err, drops.Get(media.TooLarge))
	}
}

// narrowWay takes 100 bytes at a time.
type narrowWay struct{ idleWay }

func (w *narrowWay) Max() int { return 100 }

func (w *narrowWay) Send(p []byte) error {
	if len(p) > w.Max() {
		return tunnel.ErrTooLarge
	}
	return nil
}
