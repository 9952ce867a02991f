package session

import (
	"bytes"
	"context"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"testing"

	"culvert/tunnel"
	"culvert/tunnel/resume"
	"culvert/tunnel/tunneltest"
)

// source is an Opener whose every target sends the same, and then ends; where that
// is nothing it stays, and takes nothing either.
type source struct {
	tunneltest.Echo
	body []byte
}

func (s *source) OpenStream(context.Context, tunnel.Peer, tunnel.Target) (tunnel.Stream, error) {
	here, there := net.Pipe()
	if s.body == nil {
		return piped{here}, nil
	}
	go func() {
		defer there.Close()
		there.Write(s.body)
	}()
	return piped{here}, nil
}

type piped struct{ net.Conn }

func (p piped) CloseWrite() error { return nil }
func (p piped) Abort(error)       { p.Close() }

func TestTheStreamsOfASessionShareItsMemory(t *testing.T) {
	const streams, limit = 20, 1 << 20
	all := resume.NewBudget(10 * limit)
	want := bytes.Repeat([]byte("0123456789abcdef"), 1<<16)
	p := join(t, NewNear(0), tunneltest.Config{}, FarConfig{Next: &source{body: want}, Memory: all, Limits: Limits{StreamMemory: limit}})
	var open []tunnel.Stream
	var work sync.WaitGroup
	for range streams {
		s, err := p.near.OpenStream(t.Context(), tunnel.Peer{}, alpha)
		if err != nil {
			t.Fatal(err)
		}
		open = append(open, s)
	}
	// Nobody reads what comes.
	eventually(t, "the session's memory is used up", func() bool { return all.Used() > limit-128<<10 })
	const floor = 64 << 10 // what a stream may take beyond it, to go on
	if used := all.Used(); used > limit+streams*floor {
		t.Errorf("%d bytes are used; the session's limit is %d", used, limit)
	}
	for i, s := range open {
		work.Go(func() {
			if got, err := io.ReadAll(s); !bytes.Equal(got, want) || err != nil {
				t.Errorf("stream %d: %d bytes of %d came, or others, %v", i, len(got), len(want), err)
			}
			s.Close()
		})
	}
	work.Wait()
	eventually(t, "all has been given back", func() bool { return all.Used() == 0 })
}

// A sidecar that has more under way than it was told it may loses what nobody
// takes, and nothing else.
func TestUploadsBeyondTheSessionsMemoryEnd(t *testing.T) {
	const streams, limit = 12, 8 << 20
	p := join(t, NewNear(0), tunneltest.Config{}, FarConfig{Next: &source{}, Limits: Limits{StreamMemory: limit}})
	if p.at.underWay() != limit/2 {
		t.Fatalf("the sidecar has %d bytes under way, of %d", p.at.underWay(), limit)
	}
	p.at.share = resume.NewBudget(0).Share(0) // and takes no heed
	var ended atomic.Int64
	var work sync.WaitGroup
	open := make([]tunnel.Stream, streams)
	for i := range open {
		s, err := p.near.OpenStream(t.Context(), tunnel.Peer{}, alpha)
		if err != nil {
			t.Fatal(err)
		}
		open[i] = s
		work.Go(func() {
			if _, err := s.Write(make([]byte, 2*resume.Window)); err != nil {
				ended.Add(1)
			}
		})
	}
	eventually(t, "those for which there is no memory end", func() bool { return ended.Load() >= streams-limit/resume.Window-1 })
	if n := ended.Load(); n > streams-limit/resume.Window {
		t.Errorf("%d of %d have ended, though there is memory for %d", n, streams, limit/resume.Window)
	}
	for _, s := range open {
		s.Close()
	}
	work.Wait()
}
