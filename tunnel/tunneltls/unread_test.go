package tunneltls

import (
	"bytes"
	"encoding/binary"
	"io"
	"slices"
	"sync"
	"testing"
	"time"

	"culvert/tunnel"
)

// held is how much a carrier holds that nobody has read, and of how many streams.
func (u *unread) held() (bytes, streams int) {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.total, len(u.piles)
}

// unreadStreams opens streams on which each writes n bytes, which the peer accepts and does
// not read.
func unreadStreams(t *testing.T, from, to *carrier, streams, n int) (sent, took []tunnel.Stream, wait func()) {
	t.Helper()
	var writers sync.WaitGroup
	for range streams {
		s, err := from.OpenStream(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		sent = append(sent, s)
		took = append(took, accept(t, to))
	}
	for _, s := range sent { // later: what is full takes no streams either
		writers.Go(func() { s.Write(make([]byte, n)); s.CloseWrite() })
	}
	return sent, took, writers.Wait
}

// rests waits until a carrier holds no more from one look to the next, and
// returns how much.
func rests(t *testing.T, c *carrier, least int) (bytes int) {
	t.Helper()
	for range 1000 {
		before := bytes
		if bytes, _ = c.frames.unread.held(); bytes == before && bytes >= least {
			return bytes
		}
		time.Sleep(20 * time.Millisecond)
	}
	t.Fatalf("the carrier holds %d bytes, want %d at least", bytes, least)
	return 0
}

func TestWhatNobodyReadsIsBoundedForACarrier(t *testing.T) {
	const limit, streams, each = 1 << 20, 20, 200 << 10
	near, far := carriers(t, func(_, server *Config) { server.Unread = limit })
	sent, took, wait := unreadStreams(t, near, far, streams, each)
	if held := rests(t, far, limit); held > limit+largeFrame {
		t.Errorf("%d bytes wait to be read, the limit is %d", held, limit)
	}
	var readers sync.WaitGroup
	for _, s := range took {
		readers.Go(func() {
			if n, err := io.Copy(io.Discard, s); n != each || err != nil {
				t.Errorf("%d bytes came, %v; want %d", n, err, each)
			}
			s.Close()
		})
	}
	wait()
	readers.Wait()
	for _, s := range sent {
		s.Close()
	}
	for end := time.Now().Add(patience); ; time.Sleep(time.Millisecond) {
		bytes, n := far.frames.unread.held()
		if bytes == 0 && n == 0 && far.cfg.unread.Load() == 0 {
			break
		}
		if time.Now().After(end) {
			t.Fatalf("when all has been read %d bytes of %d streams are still counted, %d of all carriers", bytes, n, far.cfg.unread.Load())
		}
	}
}

func TestWhatNobodyReadsIsBoundedForAllCarriers(t *testing.T) {
	const all, each = 4 << 20, 200 << 10
	cc, sc := both(t)
	sc.AllUnread = all
	d, l := dialer(t, cc), listen(t, sc)
	join := func() (near, far *carrier) {
		a, b := meet(t, d, l)
		return carry(t, a), carry(t, b)
	}
	near, far := join()
	_, _, wait := unreadStreams(t, near, far, 40, each)
	held := rests(t, far, all)
	if held > all+largeFrame {
		t.Errorf("%d bytes wait to be read, the limit is %d for all", held, all)
	}
	// Another carrier has its least.
	near2, far2 := join()
	_, took, wait2 := unreadStreams(t, near2, far2, 4, each)
	wait2()
	for _, s := range took {
		if n, err := io.Copy(io.Discard, s); n != each || err != nil {
			t.Errorf("on another carrier %d bytes came, %v; want %d", n, err, each)
		}
	}
	far.Close(nil) // and when the first ends what it holds is given back
	wait()
	if got := far.cfg.unread.Load(); got > leastUnread {
		t.Errorf("%d bytes are still counted", got)
	}
}

func TestAnAbortedStreamIsCountedUntilBothEndsAreDone(t *testing.T) {
	near, far := carriers(t, nil)
	_, took, wait := unreadStreams(t, near, far, 1, 100<<10)
	wait()
	rests(t, far, 100<<10)
	took[0].Abort(nil)
	for end := time.Now().Add(patience); ; time.Sleep(time.Millisecond) {
		if bytes, n := far.frames.unread.held(); bytes == 0 && n == 0 {
			return
		}
		if time.Now().After(end) {
			bytes, n := far.frames.unread.held()
			t.Fatalf("%d bytes of %d streams are still counted", bytes, n)
		}
	}
}

func TestWhatIsUnreadFollowsTheFrames(t *testing.T) {
	frame := func(kind, flags byte, id uint32, n int) []byte {
		b := append([]byte{0, kind, 0, flags}, make([]byte, 8)...)
		binary.BigEndian.PutUint32(b[4:], id)
		binary.BigEndian.PutUint32(b[8:], uint32(n))
		if kind == 0 {
			b = append(b, bytes.Repeat([]byte{4}, n)...) // that looks like FIN
		}
		return b
	}
	cc, _ := both(t)
	cfg, err := cc.validated()
	if err != nil {
		t.Fatal(err)
	}
	for name, cut := range map[string]int{"at once": 1 << 20, "byte by byte": 1, "by 7": 7} {
		t.Run(name, func(t *testing.T) {
			var shrunk []uint32
			u := newUnread(&cfg, func(id uint32) { shrunk = append(shrunk, id) })
			says := func(bytes, streams int) {
				t.Helper()
				if b, s := u.held(); b != bytes || s != streams {
					t.Errorf("%d bytes of %d streams, want %d of %d", b, s, bytes, streams)
				}
			}
			come := func(p ...[]byte) {
				all := bytes.Join(p, nil)
				for len(all) > 0 {
					n := min(cut, len(all))
					u.came(all[:n])
					all = all[n:]
				}
			}
			come(frame(0, 0, 1, 50), frame(1, 1, 3, 9), frame(0, 0, 3, 100)) // the control stream, and one that is not known yet
			says(100, 1)
			u.open(3)
			come(frame(0, 0, 3, 5), frame(0, 1, 7, 20), frame(2, 0, 0, 77))
			u.open(9) // so 7 has been refused
			says(105, 2)
			u.took(3, 40)
			come(frame(0, 0, 3, 30)) // its buffer holds that
			says(105, 2)
			come(frame(1, 4, 3, 0)) // the peer ends it first
			says(105, 2)
			u.leave(3)
			says(0, 1)
			come(frame(0, 0, 3, 100), frame(0, 0, 5, 100)) // of what is over, and was never there
			says(0, 1)
			come(frame(0, 0, 9, mostIdle), frame(0, 0, 9, 1))
			u.took(9, mostIdle)
			if u.admit(5, nil) != 5 || len(shrunk) > 0 {
				t.Error("a buffer is given back that holds something")
			}
			u.took(9, 1)
			says(mostIdle+1, 1)
			if u.admit(5, nil) != 5 || !slices.Equal(shrunk, []uint32{9}) {
				t.Errorf("the buffers of %v are given back, want the one that was large and is empty", shrunk)
			}
			says(0, 1)
			u.leave(9)
			come(frame(0, 0, 9, 10)) // yamux keeps it until the peer ends it too
			says(10, 1)
			come(frame(1, 8, 9, 0))
			says(0, 0)
			u.open(11)
			come(frame(0, 0, 11, 10))
			u.took(11, 10)
			says(10, 1)
			u.leave(11)
			says(0, 1)
			come(frame(1, 4, 11, 0))
			says(0, 0)
			if u.idle != 0 {
				t.Errorf("%d bytes of empty buffers are counted, and there are none", u.idle)
			}
		})
	}
	if got := cfg.unread.Load(); got != 0 {
		t.Errorf("%d bytes of all are still counted", got)
	}
}
