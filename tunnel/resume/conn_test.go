package resume

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"

	"culvert/tunnel"
	"culvert/tunnel/tunneltest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// path joins two Conns by streams of a carrier in memory, one after another.
type path struct {
	t         *testing.T
	near, far *Conn
	cc, sc    tunnel.Carrier
	mu        sync.Mutex
	under     []tunnel.Stream // of this moment, both ends'
	ends      []*cutting      // around them
	cuts      int
	lossy     *rand.Rand
	ended     bool
	wg        sync.WaitGroup
}

func newPath(t *testing.T) *path { return newPathOf(t, nil, nil) }

// newPathOf is newPath for Conns with shares.
func newPathOf(t *testing.T, near, far *Share) *path {
	return newPathWith(t, Config{Share: near}, Config{Share: far})
}

func newPathWith(t *testing.T, near, far Config) *path {
	p := &path{t: t}
	client, server := tunneltest.Pair(t, tunneltest.Config{}, nil)
	var err error
	if p.cc, err = client.Carrier(); err != nil {
		t.Fatal(err)
	}
	if p.sc, err = server.Carrier(); err != nil {
		t.Fatal(err)
	}
	near.Detached = func(error) {
		p.mu.Lock()
		defer p.mu.Unlock()
		if !p.ended {
			p.wg.Go(p.join)
		}
	}
	p.near, p.far = New(near), New(far)
	t.Cleanup(func() {
		p.mu.Lock()
		p.ended = true
		p.mu.Unlock()
		p.near.Expire(net.ErrClosed)
		p.far.Expire(net.ErrClosed)
		p.cc.Close(nil)
		p.sc.Close(nil)
		p.wg.Wait()
	})
	p.join()
	return p
}

// cutting is a carrier stream that breaks after so many bytes, in the middle of
// a frame or not.
type cutting struct {
	tunnel.Stream
	mu   sync.Mutex
	left int  // -1: it does not break
	dead bool // it takes everything, and nothing arrives
}

func (s *cutting) Write(b []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.dead {
		return len(b), nil
	}
	if s.left >= 0 && len(b) > s.left {
		n, _ := s.Stream.Write(b[:s.left])
		s.left = 0
		s.Stream.Abort(errCut)
		return n, errCut
	}
	if s.left >= 0 {
		s.left -= len(b)
	}
	return s.Stream.Write(b)
}

var errCut = errors.New("cut")

// join brings both Conns to fresh carrier streams.
func (p *path) join() {
	select {
	case <-p.near.Done():
		return
	default:
	}
	s, err := p.cc.OpenStream(p.t.Context())
	if err != nil {
		return
	}
	s.Write([]byte{1}) // so that it is seen
	r, err := p.sc.AcceptStream(p.t.Context())
	if err != nil {
		return
	}
	io.ReadFull(r, make([]byte, 1))
	p.mu.Lock()
	p.cuts++
	near, far := &cutting{Stream: s, left: -1}, &cutting{Stream: r, left: -1}
	if p.lossy != nil {
		near.left, far.left = p.lossy.IntN(200_000), p.lossy.IntN(200_000)
		if p.lossy.IntN(4) == 0 {
			near.left = p.lossy.IntN(10)
		}
	}
	p.under, p.ends = []tunnel.Stream{s, r}, []*cutting{near, far}
	p.mu.Unlock()
	a, b := p.near.Detach(), p.far.Detach()
	p.far.Attach(far, a)
	p.near.Attach(near, b)
}

// cut breaks what joins the two.
func (p *path) cut() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.under[0].Abort(errCut)
}

// noise is n bytes that do not repeat.
func noise(seed byte, n int) []byte {
	b := make([]byte, n)
	rand.NewChaCha8([32]byte{seed}).Read(b)
	return b
}

func TestBytesCrossAThousandCutsBothWays(t *testing.T) {
	t.Run("with room", func(t *testing.T) { crossCuts(t, nil, nil) })
	t.Run("with a floor", func(t *testing.T) {
		b := NewBudget(1)
		crossCuts(t, b.Share(0), b.Share(0))
		settled(t, b)
	})
	t.Run("with little room", func(t *testing.T) {
		b := NewBudget(8 * grant)
		s := b.Share(0)
		crossCuts(t, s, s)
		settled(t, b)
	})
}

func crossCuts(t *testing.T, nearShare, farShare *Share) {
	p := newPathOf(t, nearShare, farShare)
	p.mu.Lock()
	p.lossy = rand.New(rand.NewPCG(1, 2))
	p.mu.Unlock()
	p.cut()
	const size = 30 << 20
	up, down := noise(1, size), noise(2, size)
	var wg sync.WaitGroup
	send := func(c *Conn, b []byte) {
		wg.Go(func() {
			sizes := rand.New(rand.NewPCG(3, 4))
			for len(b) > 0 {
				n := min(len(b), 1+sizes.IntN(40_000))
				if _, err := c.Write(b[:n]); err != nil {
					t.Error(err)
					return
				}
				b = b[n:]
			}
			c.CloseWrite()
		})
	}
	receive := func(c *Conn, want []byte) {
		wg.Go(func() {
			h := sha256.New()
			n, err := io.Copy(h, c)
			if sum := sha256.Sum256(want); err != nil || int(n) != len(want) || !bytes.Equal(h.Sum(nil), sum[:]) {
				t.Errorf("%d bytes of %d came, %v; the same: %v", n, len(want), err, bytes.Equal(h.Sum(nil), sum[:]))
			}
		})
	}
	send(p.near, up)
	send(p.far, down)
	receive(p.far, up)
	receive(p.near, down)
	wg.Wait()
	p.mu.Lock()
	cuts := p.cuts
	p.mu.Unlock()
	if cuts < 200 {
		t.Errorf("only %d cuts", cuts)
	}
	p.near.Close()
	p.far.Close()
	<-p.near.Done()
	<-p.far.Done()
}

func TestAnEndThatWasSaidWhileDetachedArrives(t *testing.T) {
	p := newPath(t)
	p.near.Write([]byte("hello"))
	p.near.CloseWrite()
	p.cut()
	if b, err := io.ReadAll(p.far); string(b) != "hello" || err != nil {
		t.Fatalf("%q, %v", b, err)
	}
	p.far.Write([]byte("bye"))
	p.cut()
	p.far.Close()
	if b, err := io.ReadAll(p.near); string(b) != "bye" || err != nil {
		t.Fatalf("%q, %v", b, err)
	}
	p.near.Close()
	<-p.near.Done()
	<-p.far.Done()
}

func TestAnAbortCrossesACut(t *testing.T) {
	p := newPath(t)
	p.cut()
	p.near.Abort(tunnel.Errorf(tunnel.PolicyDenied, "no"))
	if _, err := p.far.Read(make([]byte, 1)); tunnel.CodeOf(err) != tunnel.PolicyDenied {
		t.Errorf("%v", err)
	}
	if _, err := p.far.Write([]byte("x")); tunnel.CodeOf(err) != tunnel.PolicyDenied {
		t.Errorf("%v", err)
	}
	<-p.far.Done()
}

// A dead path takes what is written for some seconds.
func TestAnAbortIntoADeadPathIsSaidAgain(t *testing.T) {
	for name, ends := range map[string]func(p *path) (aborts, hears *Conn, dead int){
		"near": func(p *path) (*Conn, *Conn, int) { return p.near, p.far, 0 },
		"far":  func(p *path) (*Conn, *Conn, int) { return p.far, p.near, 1 },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				p := newPath(t)
				aborts, hears, dead := ends(p)
				p.mu.Lock()
				p.ends[dead].mu.Lock()
				p.ends[dead].dead = true
				p.ends[dead].mu.Unlock()
				p.mu.Unlock()
				aborts.Abort(tunnel.Errorf(tunnel.PolicyDenied, "no"))
				began := time.Now()
				time.Sleep(5 * time.Second)
				p.cut()
				if _, err := hears.Read(make([]byte, 1)); tunnel.CodeOf(err) != tunnel.PolicyDenied {
					t.Errorf("%v after %v", err, time.Since(began))
				}
				<-hears.Done()
				<-aborts.Done()
				if took := time.Since(began); took > 6*time.Second {
					t.Errorf("it took %v", took)
				}
			})
		})
	}
}

func TestACloseEndsThePeersWrites(t *testing.T) {
	p := newPath(t)
	p.near.Close()
	for {
		if _, err := p.far.Write(make([]byte, 1<<10)); err != nil {
			break
		}
	}
	if b, err := io.ReadAll(p.far); len(b) != 0 || err != nil {
		t.Errorf("%q, %v", b, err)
	}
	p.far.Close()
	<-p.near.Done()
	<-p.far.Done()
}

func TestAWriteGoesOnWhileNobodyReadsTheOtherDirection(t *testing.T) {
	p := newPath(t)
	// The far end sends as much as it may; the near end does not read it.
	var wg sync.WaitGroup
	wg.Go(func() { p.far.Write(make([]byte, Window)) })
	wg.Go(func() { io.CopyN(io.Discard, p.far, 3*Window) })
	if n, err := p.near.Write(make([]byte, 3*Window)); n != 3*Window || err != nil {
		t.Errorf("%d, %v", n, err)
	}
	if n, err := io.CopyN(io.Discard, p.near, Window); n != Window || err != nil {
		t.Errorf("%d, %v", n, err)
	}
	wg.Wait()
}

func TestNoMoreThanAWindowIsHeld(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := New(Config{Limit: time.Hour})
		for _, want := range []int{Window, 0} {
			c.SetWriteDeadline(time.Now().Add(time.Minute))
			if n, err := c.Write(make([]byte, 2*Window)); n != want || !errors.Is(err, os.ErrDeadlineExceeded) {
				t.Errorf("%d bytes, %v; want %d", n, err, want)
			}
		}
		c.Expire(net.ErrClosed)
	})
}

func TestDeadlinesEndAReadAndCanBeMoved(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPath(t)
		for range 2 {
			p.near.SetReadDeadline(time.Now().Add(time.Second))
			began := time.Now()
			if _, err := p.near.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) || time.Since(began) != time.Second {
				t.Errorf("%v after %v", err, time.Since(began))
			}
			p.near.Detach()
		}
		p.join()
		p.near.SetReadDeadline(time.Time{})
		p.far.Write([]byte("x"))
		if n, err := p.near.Read(make([]byte, 1)); n != 1 || err != nil {
			t.Errorf("%d, %v", n, err)
		}
	})
}

func TestAConnThatIsNotAttachedAgainExpires(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPath(t)
		p.far.Detach()
		began := time.Now()
		if _, err := p.far.Read(make([]byte, 1)); tunnel.CodeOf(err) != tunnel.SessionExpired || time.Since(began) != DefaultLimit {
			t.Errorf("%v after %v", err, time.Since(began))
		}
		<-p.far.Done()
	})
}

func TestWhatHadArrivedIsReadAfterTheEnd(t *testing.T) {
	p := newPath(t)
	p.far.Write([]byte("last words"))
	p.far.CloseWrite()
	b := make([]byte, 4)
	io.ReadFull(p.near, b)
	p.near.CloseWrite()
	rest, err := io.ReadAll(p.near)
	if string(b)+string(rest) != "last words" || err != nil {
		t.Errorf("%q, %v", rest, err)
	}
}

func TestPeersThatBreakTheRules(t *testing.T) {
	ack := func(n uint64) []byte { return appendAck(nil, n) }
	for name, said := range map[string][]byte{
		"acknowledges what was never sent": ack(6),
		"acknowledges backwards":           append(ack(3), ack(2)...),
		"ends twice":                       {frameEnd, 0, 0, frameEnd, 0, 0},
		"goes on after its end":            {frameEnd, 0, 0, frameData, 0, 1, 'x'},
		"sends a frame of another kind":    {9, 0, 0},
		"sends data of no length":          {frameData, 0, 0},
		"sends a long acknowledgement":     {frameAck, 0, 9, 0, 0, 0, 0, 0, 0, 0, 0, 0},
		"sends a long reset":               append([]byte{frameReset, 0, 41}, make([]byte, 41)...),
	} {
		t.Run(name, func(t *testing.T) {
			p := newPath(t)
			p.near.Write([]byte("hello"))
			io.ReadFull(p.far, make([]byte, 5))
			p.far.Detach()
			s, _ := p.cc.OpenStream(t.Context())
			s.Write(said)
			r, err := p.sc.AcceptStream(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			c := New(Config{})
			c.Write([]byte("hello"))
			if err := c.Attach(r, 0); err != nil {
				t.Fatal(err)
			}
			io.ReadFull(s, make([]byte, headBytes+5))
			for err = nil; err == nil; {
				_, err = c.Read(make([]byte, 10))
				if err == io.EOF { // the rest is heard by whoever writes or closes
					c.Close()
					<-c.Done()
					c.mu.Lock()
					err = c.err
					c.mu.Unlock()
				}
			}
			if err != errFrame {
				t.Errorf("it reads %v", err)
			}
			s.Abort(nil)
			<-c.Done()
		})
	}
}

func TestAPeerThatResumesWithALieEndsItsStream(t *testing.T) {
	for name, received := range map[string]uint64{"more than was sent": 100, "less than it had": 0} {
		t.Run(name, func(t *testing.T) {
			p := newPath(t)
			p.near.Write([]byte("hello"))
			io.ReadFull(p.far, make([]byte, 5))
			p.near.mu.Lock()
			p.near.ackLocked(5)
			p.near.mu.Unlock()
			s, err := p.cc.OpenStream(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			if err := p.near.Attach(s, received); err == nil {
				t.Error("it was taken")
			}
			if _, err := p.near.Write([]byte("x")); err != errFrame {
				t.Errorf("%v", err)
			}
		})
	}
}
