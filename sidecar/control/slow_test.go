package control

import (
	"context"
	"io"
	"net"
	"strings"
	"testing"
	"time"
)

// busy is a backend to which something happens all the time.
type busy struct {
	fake
	taken, ended chan time.Time // when the last event was taken, and when nobody wanted more
}

func (b *busy) Events(ctx context.Context) <-chan Event {
	c := make(chan Event)
	go func() {
		defer close(c)
		last := time.Now()
		for {
			select {
			case c <- Event{Kind: "switch", To: "running", Cause: strings.Repeat("x", 4000)}:
				last = time.Now()
			case <-ctx.Done():
				b.taken <- last
				b.ended <- time.Now()
				return
			}
		}
	}()
	return c
}

// Who asks for events and does not read them is let go of, and others are answered
// meanwhile.
func TestAReaderThatStopsReadingEventsIsCut(t *testing.T) {
	b := &busy{taken: make(chan time.Time, 1), ended: make(chan time.Time, 1)}
	client, path := serve(t, b)
	c, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	io.WriteString(c, "GET /v1/events HTTP/1.1\r\nHost: culvert\r\n\r\n")
	var took time.Duration
	for waiting := true; waiting; {
		if _, err := client.Status(t.Context()); err != nil {
			t.Fatal(err)
		}
		select {
		case ended := <-b.ended:
			took, waiting = ended.Sub(<-b.taken), false
		case <-time.After(10 * time.Millisecond):
		}
	}
	if eventWrite > 2*time.Second {
		t.Errorf("it may take %s", eventWrite)
	}
	t.Logf("let go of %s after the last event that was taken", took.Round(time.Millisecond))
}
