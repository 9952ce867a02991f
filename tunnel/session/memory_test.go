package session

import (
	"bytes"
	"io"
	"sync"
	"testing"

	"culvert/tunnel"
	"culvert/tunnel/resume"
	"culvert/tunnel/tunneltest"
)

func TestTheStreamsOfASessionShareItsMemory(t *testing.T) {
	const streams, limit = 20, 1 << 20
	all := resume.NewBudget(10 * limit)
	p := join(t, NewNear(0), tunneltest.Config{}, FarConfig{Memory: all, Limits: Limits{StreamMemory: limit}})
	want := bytes.Repeat([]byte("0123456789abcdef"), 1<<16)
	var open []tunnel.Stream
	var work sync.WaitGroup
	for range streams {
		s, err := p.near.OpenStream(t.Context(), tunnel.Peer{}, alpha)
		if err != nil {
			t.Fatal(err)
		}
		open = append(open, s)
		work.Go(func() { s.Write(want); s.CloseWrite() })
	}
	// The echoes come back, and nobody reads them.
	eventually(t, "the session's memory is used up", func() bool { return all.Used() > limit-128<<10 })
	const floor = 64 << 10 // what a stream may take beyond it, to go on
	if used := all.Used(); used > limit+streams*floor {
		t.Errorf("%d bytes are used; the session's limit is %d", used, limit)
	}
	for i, s := range open {
		work.Go(func() {
			if got, err := io.ReadAll(s); !bytes.Equal(got, want) || err != nil {
				t.Errorf("stream %d: %d bytes of %d came back, or others, %v", i, len(got), len(want), err)
			}
			s.Close()
		})
	}
	work.Wait()
	eventually(t, "all has been given back", func() bool { return all.Used() == 0 })
}
