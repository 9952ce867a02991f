package tunnel_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"

	"culvert/tunnel"
	"culvert/tunnel/tunneltest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// noted counts how a stream was ended and remembers the largest Read.
type noted struct {
	tunnel.Stream
	closes, aborts atomic.Int32
	asked          atomic.Int64 // the room that the Read under way was given
}

func (n *noted) Read(p []byte) (int, error) {
	n.asked.Store(int64(len(p)))
	return n.Stream.Read(p)
}
func (n *noted) Close() error    { n.closes.Add(1); return n.Stream.Close() }
func (n *noted) Abort(err error) { n.aborts.Add(1); n.Stream.Abort(err) }

// pipe returns both ends of a stream in memory.
func pipe(t *testing.T) (near tunnel.Stream, far *noted) {
	t.Helper()
	cc, sc := tunneltest.Pair(t, tunneltest.Config{}, nil)
	client, err := cc.Carrier()
	if err != nil {
		t.Fatal(err)
	}
	server, err := sc.Carrier()
	if err != nil {
		t.Fatal(err)
	}
	a, err := client.OpenStream(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	a.Write([]byte{0}) // shows the stream to its peer
	b, err := server.AcceptStream(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	io.ReadFull(b, make([]byte, 1))
	return a, &noted{Stream: b}
}

// spliced is an app and a destination joined by Splice.
type spliced struct {
	app, dest   tunnel.Stream // what the two speak on
	left, right *noted        // what Splice has
	done        chan error    // its result
}

func splice(t *testing.T) *spliced {
	s := &spliced{done: make(chan error, 1)}
	s.app, s.left = pipe(t)
	s.dest, s.right = pipe(t)
	go func() { s.done <- tunnel.Splice(s.left, s.right) }()
	return s
}

func (s *spliced) bothWays() map[string][2]tunnel.Stream {
	return map[string][2]tunnel.Stream{"from the app": {s.app, s.dest}, "from the destination": {s.dest, s.app}}
}

// sendRandomly writes b in pieces of random length and ends its direction.
func sendRandomly(w tunnel.Stream, b []byte, r *rand.Rand) error {
	for len(b) > 0 {
		n := min(1+r.IntN(100_000), len(b))
		if r.IntN(4) == 0 {
			n = min(n, 1+r.IntN(100))
		}
		if _, err := w.Write(b[:n]); err != nil {
			return err
		}
		b = b[n:]
	}
	return w.CloseWrite()
}

func TestSpliceCarriesEveryByteBothWaysAtOnce(t *testing.T) {
	s := splice(t)
	sent := map[string][]byte{}
	ended := make(chan error, 2)
	for way, ends := range s.bothWays() {
		b := make([]byte, 10<<20)
		r := rand.New(rand.NewPCG(1, uint64(len(way))))
		for i := range b {
			b[i] = byte(r.Uint32())
		}
		sent[way] = b
		go func() { ended <- sendRandomly(ends[0], b, r) }()
	}
	got := map[string]chan []byte{}
	for way, ends := range s.bothWays() {
		c := make(chan []byte, 1)
		got[way] = c
		go func() { b, _ := io.ReadAll(ends[1]); c <- b }()
	}
	for way, c := range got {
		if b := <-c; !bytes.Equal(b, sent[way]) {
			t.Errorf("%s: %d bytes arrived that are not the %d sent", way, len(b), len(sent[way]))
		}
	}
	for range 2 {
		if err := <-ended; err != nil {
			t.Error(err)
		}
	}
	if err := <-s.done; err != nil {
		t.Errorf("Splice returned %v", err)
	}
	if s.left.closes.Load() == 0 || s.right.closes.Load() == 0 || s.left.aborts.Load()+s.right.aborts.Load() != 0 {
		t.Errorf("closed %d and %d times, aborted %d and %d times; want closed and never aborted",
			s.left.closes.Load(), s.right.closes.Load(), s.left.aborts.Load(), s.right.aborts.Load())
	}
}

func TestSpliceLeavesTheOtherDirectionOpenAtAHalfClose(t *testing.T) {
	for _, way := range []string{"from the app", "from the destination"} {
		t.Run(way, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := splice(t)
				first, second := s.bothWays()[way][0], s.bothWays()[way][1]
				first.Write([]byte("question"))
				first.CloseWrite()
				if b, err := io.ReadAll(second); string(b) != "question" || err != nil {
					t.Fatalf("read %q, %v", b, err)
				}
				time.Sleep(time.Hour)
				select {
				case err := <-s.done:
					t.Fatalf("Splice ended with %v while one direction is open", err)
				default:
				}
				second.Write([]byte("answer"))
				second.CloseWrite()
				if b, err := io.ReadAll(first); string(b) != "answer" || err != nil {
					t.Fatalf("read %q, %v", b, err)
				}
				if err := <-s.done; err != nil {
					t.Errorf("Splice returned %v", err)
				}
				first.Close()
				second.Close()
			})
		})
	}
}

func TestSplicePassesAnAbortOn(t *testing.T) {
	for _, way := range []string{"from the app", "from the destination"} {
		for _, busy := range []bool{false, true} {
			name := way + " that is idle"
			if busy {
				name = way + " whose peer does not read"
			}
			t.Run(name, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					s := splice(t)
					first, second := s.bothWays()[way][0], s.bothWays()[way][1]
					wrote := make(chan error, 1)
					if busy { // the splice stands in a Write to second
						go func() { _, err := first.Write(make([]byte, 1<<20)); wrote <- err }()
					} else {
						first.Write([]byte("x"))
						io.ReadFull(second, make([]byte, 1))
					}
					synctest.Wait()
					if busy {
						second.Abort(errors.New("gone"))
						if err := <-wrote; err == nil {
							t.Error("a Write went on after the abort")
						}
						second = first
					} else {
						first.Abort(errors.New("gone"))
					}
					if _, err := second.Read(make([]byte, 1)); err == nil || err == io.EOF {
						t.Errorf("the other side's Read gives %v; want a failure that is no orderly end", err)
					}
					if err := <-s.done; err == nil {
						t.Error("Splice returned nil")
					}
					if s.left.aborts.Load() == 0 || s.right.aborts.Load() == 0 {
						t.Error("a side was not aborted")
					}
				})
			})
		}
	}
}

// broken fails its Reads with an error of its own, and slowly.
type broken struct{ tunnel.Stream }

var errBroken = errors.New("broken")

func (b broken) Read([]byte) (int, error) { return 0, errBroken }

func TestSpliceReturnsTheFirstFailureNotWhatFollowedFromIt(t *testing.T) {
	for _, swap := range []bool{false, true} {
		_, a := pipe(t)
		_, b := pipe(t)
		left, right := tunnel.Stream(broken{a}), tunnel.Stream(b)
		if swap {
			left, right = right, left
		}
		if err := tunnel.Splice(left, right); err != errBroken {
			t.Errorf("Splice returned %v", err)
		}
	}
}

func TestSpliceHoldsLittleWhileItWaits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const little = 4 << 10
		s := splice(t)
		synctest.Wait()
		if n := s.left.asked.Load(); n > little {
			t.Errorf("a direction that has not begun waits with %d bytes", n)
		}
		go io.Copy(io.Discard, s.dest)
		bulk := make([]byte, 300<<10) // no multiple of what a Read takes
		if _, err := s.app.Write(bulk[:len(bulk)-1]); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		if n := s.left.asked.Load(); n > little {
			t.Errorf("after bulk a direction waits with %d bytes", n)
		}
		s.app.Close()
		s.dest.Close()
		<-s.done
	})
}

func TestSpliceReadsBulkInLargePieces(t *testing.T) {
	// The pipe holds 64 KiB; Splice begins when it is full.
	app, left := pipe(t)
	dest, right := pipe(t)
	app.Write(make([]byte, 64<<10))
	app.CloseWrite()
	most := int64(0)
	watched := &watchedStream{noted: left, after: func(n int) { most = max(most, int64(n)) }}
	go io.Copy(io.Discard, dest)
	dest.CloseWrite()
	if err := tunnel.Splice(watched, right); err != nil {
		t.Fatal(err)
	}
	if most != 60<<10 {
		t.Errorf("the largest piece had %d bytes; want 4 KiB first and all of the rest then", most)
	}
	app.Close()
	dest.Close()
}

type watchedStream struct {
	*noted
	after func(n int)
}

func (w *watchedStream) Read(p []byte) (int, error) {
	n, err := w.noted.Read(p)
	w.after(n)
	return n, err
}

// tcp is a Stream over a TCP connection.
type tcp struct{ *net.TCPConn }

func (c tcp) Abort(error) { c.SetLinger(0); c.Close() }

// loopback returns both ends of a TCP connection.
func loopback(tb testing.TB) (a, b tcp) {
	tb.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		tb.Fatal(err)
	}
	defer l.Close()
	c, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		tb.Fatal(err)
	}
	d, err := l.Accept()
	if err != nil {
		tb.Fatal(err)
	}
	return tcp{c.(*net.TCPConn)}, tcp{d.(*net.TCPConn)}
}

func BenchmarkSpliceBulkOverLoopback(b *testing.B) {
	app, left := loopback(b)
	right, dest := loopback(b)
	done := make(chan error, 1)
	go func() { done <- tunnel.Splice(left, right) }()
	piece := make([]byte, 256<<10)
	b.SetBytes(int64(len(piece)))
	read := make(chan int64, 1)
	go func() {
		n, _ := io.CopyBuffer(struct{ io.Writer }{io.Discard}, struct{ io.Reader }{dest}, make([]byte, 256<<10))
		dest.Close()
		read <- n
	}()
	for b.Loop() {
		if _, err := app.Write(piece); err != nil {
			b.Fatal(err)
		}
	}
	app.CloseWrite()
	if n := <-read; n%int64(len(piece)) != 0 {
		b.Errorf("%d bytes arrived", n)
	}
	app.Close()
	if err := <-done; err != nil {
		b.Log(err)
	}
}

func BenchmarkSpliceRoundTripOverLoopback(b *testing.B) {
	app, left := loopback(b)
	right, dest := loopback(b)
	done := make(chan error, 1)
	go func() { done <- tunnel.Splice(left, right) }()
	go func() { io.Copy(struct{ io.Writer }{dest}, dest); dest.Close() }()
	ping := make([]byte, 200)
	for b.Loop() {
		app.Write(ping)
		if _, err := io.ReadFull(app, ping); err != nil {
			b.Fatal(err)
		}
	}
	app.Close()
	<-done
}
