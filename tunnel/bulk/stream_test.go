package bulk

import (
	"bytes"
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"culvert/tunnel"
	"culvert/tunnel/tunneltest"
)

// pipe returns both ends of a stream in memory, the near one wrapped.
func pipe(t *testing.T, p *Pacer) (near, far tunnel.Stream) {
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
	far, err = server.AcceptStream(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	io.ReadFull(far, make([]byte, 1))
	return p.Wrap(a), far
}

// held returns a stream that has become bulk, and whose next Writes wait long:
// the pacer is at its floor.
func held(t *testing.T, p *Pacer) (near, far tunnel.Stream) {
	t.Helper()
	near, far = pipe(t, p)
	go io.Copy(io.Discard, far)
	if _, err := near.Write(make([]byte, rhythmBytes)); err != nil {
		t.Fatal(err)
	}
	p.Live(true)
	p.Delay(time.Now(), 200*time.Millisecond, false)
	for p.Stats().Rate != floor { // no report comes any more
		if _, err := near.Write(make([]byte, 10_000)); err != nil {
			t.Fatal(err)
		}
	}
	return near, far
}

func TestAPacedWriteEndsWhenItsStreamDoes(t *testing.T) {
	aborted := errors.New("the test aborts")
	for name, c := range map[string]struct {
		end  func(tunnel.Stream)
		want error // nil: any
	}{
		"CloseWrite":       {func(s tunnel.Stream) { s.CloseWrite() }, net.ErrClosed},
		"Close":            {func(s tunnel.Stream) { s.Close() }, net.ErrClosed},
		"Abort":            {func(s tunnel.Stream) { s.Abort(aborted) }, nil},
		"SetDeadline":      {func(s tunnel.Stream) { s.SetDeadline(time.Unix(1, 0)) }, os.ErrDeadlineExceeded},
		"SetWriteDeadline": {func(s tunnel.Stream) { s.SetWriteDeadline(time.Now()) }, os.ErrDeadlineExceeded},
		"a deadline later": {func(s tunnel.Stream) { s.SetWriteDeadline(time.Now().Add(time.Second)) }, os.ErrDeadlineExceeded},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				p := New()
				s, _ := held(t, p)
				type result struct {
					n   int
					err error
				}
				first, second := make(chan result), make(chan result)
				go func() {
					n, err := s.Write(make([]byte, 1<<20)) // half a minute at the floor
					first <- result{n, err}
				}()
				synctest.Wait()
				go func() {
					n, err := s.Write(make([]byte, 10)) // waits for the other
					second <- result{n, err}
				}()
				time.Sleep(100 * time.Millisecond)
				begin := time.Now()
				c.end(s)
				r := <-first
				if r.err == nil || c.want != nil && !errors.Is(r.err, c.want) || r.n == 0 || r.n > 50_000 {
					t.Errorf("the Write returned %d, %v; want some bytes and %v", r.n, r.err, c.want)
				}
				if r = <-second; r.err == nil || r.n != 0 {
					t.Errorf("the Write behind it returned %d, %v", r.n, r.err)
				}
				if took := time.Since(begin); took > time.Second {
					t.Errorf("it took %v", took)
				}
				if len(p.waiting) != 0 {
					t.Error("it still waits for its turn")
				}
				s.Close()
				if len(p.bulk) != 0 {
					t.Error("the pacer keeps a closed stream")
				}
			})
		})
	}
}

func TestAWriteGoesOnAfterItsDeadline(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := New()
		s, _ := held(t, p)
		s.SetWriteDeadline(time.Now().Add(time.Second))
		if _, err := s.Write(make([]byte, 1<<20)); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Fatal(err)
		}
		s.SetWriteDeadline(time.Time{})
		if n, err := s.Write(make([]byte, 5000)); n != 5000 || err != nil {
			t.Errorf("%d, %v", n, err)
		}
		s.Close()
	})
}

func TestTheEndOfTheCallFreesAWriteAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := New()
		s, _ := held(t, p)
		done := make(chan time.Time)
		go func() {
			s.Write(make([]byte, 1<<20))
			done <- time.Now()
		}()
		time.Sleep(time.Second)
		p.Live(false)
		if took := time.Since(<-done); took != 0 {
			t.Errorf("it took %v", took)
		}
		s.Close()
	})
}

func TestOthersAreNotHeldBesideBulk(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := New()
		s, _ := held(t, p)
		stop := make(chan struct{})
		go func() {
			s.Write(make([]byte, 1<<20))
			close(stop)
		}()
		media, far := pipe(t, p)
		go io.Copy(io.Discard, far)
		for i := range 500 {
			begin := time.Now()
			media.Write(inFrame(rtp(1200, i)))
			if time.Since(begin) != 0 {
				t.Fatalf("packet %d waited for %v", i, time.Since(begin))
			}
			time.Sleep(4 * time.Millisecond)
		}
		s.Close()
		<-stop
		media.Close()
	})
}

// Both streams that Splice joins are the tunnel's business on one side: what
// passes must be the same bytes, whatever the pacer does meanwhile.
func TestBytesPassWholeThroughSpliceWhilePacingComesAndGoes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := New()
		app, left := pipe(t, New())
		right, dest := pipe(t, p)
		done := make(chan error, 1)
		go func() { done <- tunnel.Splice(left, right) }()

		want := make([]byte, 20<<20)
		rand.NewChaCha8([32]byte{1}).Read(want)
		go func() {
			for b := want; len(b) > 0; {
				n := min(len(b), 1+rand.IntN(200_000))
				app.Write(b[:n])
				b = b[n:]
			}
			app.CloseWrite()
		}()
		var got bytes.Buffer
		answered := make(chan struct{})
		go func() {
			io.Copy(&got, dest)
			dest.Write([]byte("thanks")) // the other direction lives on
			dest.CloseWrite()
			close(answered)
		}()
		paced := false
		for range 100 {
			p.Live(true)
			for range 8 {
				time.Sleep(50 * time.Millisecond)
				p.Delay(time.Now(), 0, false)
				paced = paced || p.Stats().Rate > 0
			}
			p.Live(false)
			time.Sleep(time.Millisecond)
		}
		<-answered
		if !paced {
			t.Error("nothing was paced")
		}
		if back, err := io.ReadAll(app); string(back) != "thanks" || err != nil {
			t.Errorf("the answer is %q, %v", back, err)
		}
		if err := <-done; err != nil {
			t.Error(err)
		}
		if !bytes.Equal(got.Bytes(), want) {
			t.Errorf("%d bytes arrived, not the same as the %d sent", got.Len(), len(want))
		}
		app.Close()
		dest.Close()
		if len(p.bulk) != 0 {
			t.Error("the pacer keeps a closed stream")
		}
	})
}

func TestConcurrentWritesAreNotMixed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := New()
		s, far := pipe(t, p)
		const size, writes = 300_000, 6 // the whole makes the stream bulk on the way
		p.Live(true)
		var wg sync.WaitGroup
		for i := range writes {
			wg.Go(func() { s.Write(bytes.Repeat([]byte{byte(0xc0 + i)}, size)) })
		}
		go func() {
			wg.Wait()
			s.CloseWrite()
		}()
		all, err := io.ReadAll(far)
		if err != nil || len(all) != size*writes {
			t.Fatalf("%d bytes, %v", len(all), err)
		}
		for i := range writes {
			if b := all[i*size:][:size]; bytes.Count(b, b[:1]) != size {
				t.Errorf("write %d is mixed with another", i)
			}
		}
		s.Close()
		far.Close()
	})
}

// sink takes everything at once.
type sink struct{ tunnel.Stream }

func (sink) Write(p []byte) (int, error) { return len(p), nil }
func (sink) Read(p []byte) (int, error)  { return len(p), nil }
func (sink) Close() error                { return nil }

func TestAFreeWriteNeverAllocates(t *testing.T) {
	p := New()
	s := p.Wrap(sink{})
	defer s.Close()
	b := make([]byte, 4096)
	for _, live := range []bool{false, true} {
		p.Live(live)
		if n := testing.AllocsPerRun(100, func() { s.Write(b[:100]); s.Read(b[:100]) }); n != 0 {
			t.Errorf("live %v: %v allocations", live, n)
		}
	}
}

func BenchmarkWrite(b *testing.B) {
	for name, c := range map[string]struct {
		live bool
		s    func(*Pacer) tunnel.Stream
	}{
		"bare":            {false, func(*Pacer) tunnel.Stream { return sink{} }},
		"no call":         {false, func(p *Pacer) tunnel.Stream { return p.Wrap(sink{}) }},
		"media in a call": {true, func(p *Pacer) tunnel.Stream { return p.Wrap(sink{}) }},
	} {
		b.Run(name, func(b *testing.B) {
			p := New()
			p.Live(c.live)
			s := c.s(p)
			defer s.Close()
			packet := inFrame(rtp(1200, 1))
			for b.Loop() {
				s.Write(packet)
			}
		})
	}
}
