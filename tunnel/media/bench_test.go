package media

import (
	"fmt"
	"sync/atomic"
	"testing"

	"culvert/tunnel"
)

// An open way takes everything.
type open struct{ gate }

func (*open) Send([]byte) error { return nil }
func (*open) Max() int          { return 1400 }

// A tap lets n datagrams through at a time.
type tap struct {
	open
	n atomic.Int64
}

func (w *tap) Send([]byte) error {
	if w.n.Add(-1) < 0 {
		return tunnel.ErrBlocked
	}
	return nil
}

func (w *tap) let(n int) {
	w.n.Store(int64(n))
	w.writable()
}

func TestTheStraightPathDoesNotAllocate(t *testing.T) {
	for _, outlets := range []int{1, 4} {
		r := NewRoom(0, &Drops{})
		for range outlets {
			r.Add(&open{}, nil)
		}
		var l Line
		s := &source{ssrc: 1}
		p := s.next(800, true)
		r.Send(&l, p, p)
		if n := testing.AllocsPerRun(1000, func() { r.Send(&l, p, p) }); n != 0 {
			t.Errorf("%d outlets: %v allocations for each packet", outlets, n)
		}
	}
}

func BenchmarkStraight(b *testing.B) {
	for _, outlets := range []int{1, 4} {
		b.Run(fmt.Sprintf("outlets=%d", outlets), func(b *testing.B) {
			r := NewRoom(0, &Drops{})
			for range outlets {
				r.Add(&open{}, nil)
			}
			b.ReportAllocs()
			b.RunParallel(func(pb *testing.PB) {
				var l Line
				p := (&source{ssrc: 1}).next(800, true)
				for n := uint16(0); pb.Next(); n++ {
					p[2], p[3] = byte(n>>8), byte(n)
					r.Send(&l, p, p)
				}
			})
		})
	}
}

func BenchmarkRoundRobin(b *testing.B) {
	for _, n := range []int{1, 100} {
		b.Run(fmt.Sprintf("lines=%d", n), func(b *testing.B) {
			w := &tap{}
			r := NewRoom(0, &Drops{})
			r.Add(w, nil)
			lines := make([]Line, n)
			p := (&source{ssrc: 1}).next(800, true)
			b.ReportAllocs()
			for i := 0; b.Loop(); i++ {
				r.Send(&lines[i%n], p, p)
				if i%1000 == 999 {
					w.let(1000)
					w.n.Store(0)
				}
			}
		})
	}
}
