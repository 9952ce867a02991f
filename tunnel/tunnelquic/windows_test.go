package tunnelquic

import (
	"context"
	"io"
	"testing"
	"time"

	"culvert/tunnel"
)

// grown is what the windows have grown by.
func (w *windows) grown() uint64 {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.total
}

func TestTheWindowsOfAllConnectionsAreBounded(t *testing.T) {
	s, c, _ := configs(t)
	for name, limit := range map[string]uint64{"enough": maxWindows, "little": 3 << 20, "none": 0} {
		t.Run(name, func(t *testing.T) {
			l := listen(t, Config{TLS: s})
			l.windows.limit = limit
			d := dialer(t, c)
			var ends []tunnel.Carrier
			for range 2 {
				a, b := connect(t, l, d)
				near, err := a.Carrier()
				if err != nil {
					t.Fatal(err)
				}
				far, err := b.Carrier()
				if err != nil {
					t.Fatal(err)
				}
				ends = append(ends, near, far)
				const much = 16 << 20
				bulk := func() {
					out, err := near.OpenStream(t.Context())
					if err != nil {
						t.Fatal(err)
					}
					go func() { out.Write(make([]byte, much)); out.CloseWrite() }()
					ctx, cancel := context.WithTimeout(t.Context(), testPatience)
					defer cancel()
					in, err := far.AcceptStream(ctx)
					if err != nil {
						t.Fatal(err)
					}
					if n, err := io.Copy(io.Discard, in); n != much || err != nil {
						t.Errorf("%d bytes came, %v", n, err)
					}
				}
				bulk()
				// quic-go lets a window grow where it is used up within two round trips: a
				// machine that stands still meanwhile is too slow for that.
				for end := time.Now().Add(testPatience); limit == maxWindows && l.windows.grown() == 0; bulk() {
					if time.Now().After(end) {
						t.Fatal("the windows do not grow")
					}
				}
				if got := l.windows.grown(); got > limit {
					t.Errorf("the windows have grown by %d bytes, the limit is %d", got, limit)
				}
			}
			for _, c := range ends {
				c.Close(nil)
			}
			for end := time.Now().Add(testPatience); l.windows.grown() > 0; time.Sleep(time.Millisecond) {
				if time.Now().After(end) {
					t.Fatalf("%d bytes are still counted", l.windows.grown())
				}
			}
		})
	}
}
