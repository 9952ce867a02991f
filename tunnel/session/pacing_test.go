package session

import (
	"encoding/binary"
	"io"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"culvert/tunnel"
	"culvert/tunnel/tunneltest"
)

// offered is what the streams below would write, in bytes per second.
const offered = 1_000_000

// frames is offered x 10 ms in frames of RFC 4571 with RTP in them.
func frames() []byte {
	var b []byte
	for range 10 {
		b = binary.BigEndian.AppendUint16(b, 998)
		p := make([]byte, 998)
		p[0], p[1] = 0x80, 96
		b = append(b, p...)
	}
	return b
}

// A stream beside live media over a path whose queue fills: what the near end
// writes to it, and what the far end writes back, with the pacers of both.
func TestStreamsGiveWayToACall(t *testing.T) {
	for name, c := range map[string]struct {
		live, full bool
		piece      []byte
		least      int64 // bytes that come back in 10 s
		most       int64
	}{
		"a download beside a call on a full path":   {true, true, make([]byte, offered/100), 100_000, offered},
		"a download without a call":                 {false, true, make([]byte, offered/100), 9 * offered, 11 * offered},
		"a download beside a call on an empty path": {true, false, make([]byte, offered/100), 4 * offered, 11 * offered},
		"framed media on a full path":               {true, true, frames(), 9 * offered, 11 * offered},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var queue atomic.Int64
				p := join(t, NewNear(0), tunneltest.Config{Queue: 1000, Datagram: func(bool, []byte) tunneltest.Fate {
					return tunneltest.Fate{Delay: 20*time.Millisecond + time.Duration(queue.Load())}
				}}, FarConfig{})
				a, err := p.near.OpenPackets(tunnel.Peer{}, &closings{})
				if err != nil {
					t.Fatal(err)
				}
				s, err := p.near.OpenStream(t.Context(), tunnel.Peer{}, tunnel.Target{Host: "files.example", Port: 443})
				if err != nil {
					t.Fatal(err)
				}
				p.near.SetLive(c.live)
				var back atomic.Int64
				var wg sync.WaitGroup
				ended := make(chan struct{})
				wg.Go(func() {
					for {
						select {
						case <-ended:
							return
						case <-time.After(20 * time.Millisecond):
							a.Send(make([]byte, 200), alpha)
						}
					}
				})
				wg.Go(func() {
					for {
						if _, err := s.Write(c.piece); err != nil {
							return
						}
						time.Sleep(10 * time.Millisecond)
					}
				})
				wg.Go(func() {
					b := make([]byte, 64<<10)
					for {
						n, err := s.Read(b)
						back.Add(int64(n))
						if err != nil {
							return
						}
					}
				})
				time.Sleep(4 * time.Second)
				if c.full {
					queue.Store(int64(150 * time.Millisecond))
				}
				time.Sleep(4 * time.Second)
				before := back.Load()
				time.Sleep(10 * time.Second)
				got := back.Load() - before
				t.Logf("%d bytes in 10 s", got)
				if got < c.least || got > c.most {
					t.Errorf("%d bytes came back in 10 s, want %d to %d", got, c.least, c.most)
				}
				close(ended)
				s.Abort(io.EOF)
				wg.Wait()
				a.Close()
				p.end()
			})
		})
	}
}
