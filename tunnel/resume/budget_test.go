package resume

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"culvert/tunnel"
)

// settled waits until all that was taken of a budget has been given back.
func settled(t *testing.T, b *Budget) {
	t.Helper()
	for end := time.Now().Add(10 * time.Second); b.Used() != 0; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%d bytes of the budget are still taken", b.Used())
		}
	}
}

// memory is what Conns keep, in bytes of capacity.
func memory(all []*Conn) (held int) {
	for _, c := range all {
		c.mu.Lock()
		held += c.sentMemory.held + c.keptMemory.held
		c.mu.Unlock()
	}
	return held
}

// A dead carrier takes everything, and nothing comes back.
type dead struct {
	said
	ended chan struct{}
	once  sync.Once
}

func newDead() *dead                     { return &dead{ended: make(chan struct{})} }
func (d *dead) Read([]byte) (int, error) { <-d.ended; return 0, io.EOF }
func (d *dead) Abort(error)              { d.once.Do(func() { close(d.ended) }) }
func (d *dead) Close() error             { d.Abort(nil); return nil }

func TestStreamsOfADeadCarrierStayWithinTheBudget(t *testing.T) {
	const (
		streams = 100
		each    = 1 << 20
		budget  = 4 << 20
		// most is what a stream can keep beyond the budget: two of the largest chunks.
		most = 2 * grant
	)
	synctest.Test(t, func(t *testing.T) {
		b := NewBudget(budget)
		share := b.Share(0)
		var all, peers []*Conn
		var writers sync.WaitGroup
		for i := range streams {
			c := New(Config{Share: share, Limit: time.Hour})
			c.Attach(newDead(), 0)
			all = append(all, c)
			writers.Go(func() {
				if n, err := c.Write(noise(byte(i), each)); n != each || err != nil {
					t.Errorf("stream %d wrote %d, %v", i, n, err)
				}
				c.CloseWrite()
			})
		}
		synctest.Wait() // all that can be written has been
		held := memory(all)
		if held < budget || held > budget+streams*most || b.Used() > budget {
			t.Errorf("%d streams keep %d bytes, %d of them from the budget of %d", streams, held, b.Used(), budget)
		}
		for i, c := range all {
			c.mu.Lock()
			written := c.end
			c.mu.Unlock()
			if written < floor {
				t.Errorf("stream %d could write only %d bytes", i, written)
			}
		}
		// They go on elsewhere.
		var readers sync.WaitGroup
		for i, c := range all {
			peer := New(Config{Limit: time.Hour})
			peers = append(peers, peer)
			a, z := net.Pipe()
			received := c.Detach()
			peer.Attach(piped{z}, received)
			c.Attach(piped{a}, 0)
			readers.Go(func() {
				if got, err := io.ReadAll(peer); !bytes.Equal(got, noise(byte(i), each)) || err != nil {
					t.Errorf("stream %d: %d bytes came, or others, %v", i, len(got), err)
				}
			})
		}
		writers.Wait()
		readers.Wait()
		for _, c := range append(all, peers...) {
			c.Abort(nil)
			c.Expire(net.ErrClosed)
		}
		synctest.Wait()
		if held := memory(all); held != 0 || b.Used() != 0 {
			t.Errorf("at the end they keep %d bytes, and %d are taken", held, b.Used())
		}
	})
}

// piped is one end of net.Pipe as a carrier stream.
type piped struct{ net.Conn }

func (p piped) CloseWrite() error { return p.Close() }
func (p piped) Abort(error)       { p.Close() }

func TestASessionTakesNoMoreThanItsShare(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := NewBudget(64 * grant)
		greedy, modest := b.Share(16*grant), b.Share(16*grant)
		fill := func(s *Share) *Conn {
			c := New(Config{Share: s, Limit: time.Hour})
			c.SetWriteDeadline(time.Now().Add(time.Second))
			if n, err := c.Write(make([]byte, 2*Window)); n < floor || !errors.Is(err, os.ErrDeadlineExceeded) {
				t.Errorf("wrote %d, %v", n, err)
			}
			return c
		}
		var all []*Conn
		for range 20 {
			all = append(all, fill(greedy))
		}
		if greedy.used > 16*grant+20*grant || memory(all) > 16*grant+20*2*grant {
			t.Errorf("a share of %d: %d are taken, %d kept", 16*grant, greedy.used, memory(all))
		}
		before := memory(all)
		c := fill(modest)
		if c.end < 16*grant {
			t.Errorf("another session's stream could write only %d bytes", c.end)
		}
		// What one gives back goes to those of its session that wait.
		c.Expire(net.ErrClosed)
		all[0].Expire(net.ErrClosed)
		synctest.Wait()
		if modest.used != 0 || memory(all) >= before {
			t.Errorf("after the end %d are taken, %d kept; before it %d", modest.used, memory(all), before)
		}
		for _, c := range all {
			c.Expire(net.ErrClosed)
		}
		synctest.Wait()
		if b.Used() != 0 || greedy.queue.Len() != 0 {
			t.Errorf("%d are taken when all is over, %d wait", b.Used(), greedy.queue.Len())
		}
	})
}

func TestSessionsThatWaitTakeTurns(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := NewBudget(4 * grant)
		var holders [4]*Share
		for i := range holders {
			holders[i] = b.Share(0)
			holders[i].take(new(account), false)
		}
		// Ten streams of one session wait before one of another.
		many, one := b.Share(0), b.Share(0)
		begin := func(s *Share) *Conn {
			c := New(Config{Share: s, Limit: time.Hour})
			go c.Write(make([]byte, 4*grant))
			synctest.Wait()
			return c
		}
		var all []*Conn
		for range 10 {
			all = append(all, begin(many))
		}
		last := begin(one)
		all = append(all, last)
		written := last.end
		for _, s := range holders[:2] {
			s.give(new(account), grant, true)
		}
		synctest.Wait()
		if last.mu.Lock(); last.end <= written {
			t.Error("the second grant goes to the first session again")
		}
		last.mu.Unlock()
		for _, s := range holders[2:] {
			s.give(new(account), grant, true)
		}
		for _, c := range all {
			c.Expire(net.ErrClosed)
		}
		synctest.Wait()
		if b.Used() != 0 {
			t.Errorf("%d are taken when all is over", b.Used())
		}
	})
}

// What is taken byte by byte and never acknowledged costs no chunk each.
func TestSmallWritesAreKeptInLittleMemory(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := NewBudget(0)
		c := New(Config{Share: b.Share(0), Limit: time.Hour})
		c.Attach(newDead(), 0)
		want := noise(1, 20_000)
		for i := range want {
			if _, err := c.Write(want[i : i+1]); err != nil {
				t.Fatal(err)
			}
			synctest.Wait() // it has been sent, in a frame of its own
		}
		if held := memory([]*Conn{c}); held > 4*grant {
			t.Errorf("%d bytes are kept in %d", len(want), held)
		}
		// From any offset it is the same.
		peer := New(Config{Limit: time.Hour})
		for _, received := range []uint64{1, 777, 12_345} {
			c.Detach()
			c.Attach(newDead(), received)
			synctest.Wait()
		}
		peer.got, peer.taken = 12_345, 12_345
		a, z := net.Pipe()
		peer.Attach(piped{z}, 0)
		c.Attach(piped{a}, c.base)
		c.CloseWrite()
		if got, err := io.ReadAll(peer); !bytes.Equal(got, want[12_345:]) || err != nil {
			t.Errorf("%d bytes came, %v", len(got), err)
		}
		c.Expire(net.ErrClosed)
		peer.Expire(net.ErrClosed)
		synctest.Wait()
	})
}

// A peer that sends what nobody reads, and acknowledges nothing, fills no more than the budget.
func TestWhatNobodyReadsStaysWithinTheBudget(t *testing.T) {
	const streams, budget = 50, 2 << 20
	synctest.Test(t, func(t *testing.T) {
		b := NewBudget(budget)
		share := b.Share(0)
		var all, peers []*Conn
		var work sync.WaitGroup
		for i := range streams {
			p := newPathOf(t, nil, share)
			peer, c := p.near, p.far
			c.Write([]byte("never acknowledged")) // so c reads on for an acknowledgement
			all, peers = append(all, c), append(peers, peer)
			work.Go(func() { peer.Write(noise(byte(i), 1<<20)); peer.CloseWrite() })
		}
		time.Sleep(time.Minute)
		if held := memory(all); held < budget || held > budget+streams*2*grant {
			t.Errorf("%d streams keep %d bytes; the budget is %d", streams, held, budget)
		}
		for i, c := range all {
			work.Go(func() {
				if got, err := io.ReadAll(c); !bytes.Equal(got, noise(byte(i), 1<<20)) || err != nil {
					t.Errorf("stream %d: %d bytes came, or others, %v", i, len(got), err)
				}
			})
		}
		work.Wait()
		for _, c := range append(all, peers...) {
			c.Expire(net.ErrClosed)
		}
		synctest.Wait()
		if b.Used() != 0 {
			t.Errorf("%d are taken when all is over", b.Used())
		}
	})
}

// What has come leaves the carrier stream though nobody reads it, and is there for
// those who read later.
func TestWhatNobodyReadsIsKept(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := NewBudget(0)
		p := newPathWith(t, Config{}, Config{Kept: b.Share(0)})
		want := noise(1, Window+1)
		var work sync.WaitGroup
		work.Go(func() { p.near.Write(want); p.near.CloseWrite() })
		time.Sleep(time.Minute)
		if p.far.mu.Lock(); p.far.got != Window || b.Used() < Window-grant {
			t.Errorf("%d bytes have left the carrier stream, %d are paid for", p.far.got, b.Used())
		}
		p.far.mu.Unlock()
		if got, err := io.ReadAll(p.far); !bytes.Equal(got, want) || err != nil {
			t.Errorf("%d bytes came, or others, %v", len(got), err)
		}
		work.Wait()
		p.near.Close()
		p.far.Close()
		<-p.near.Done()
		<-p.far.Done()
		if b.Used() != 0 {
			t.Errorf("%d are taken when all is over", b.Used())
		}
	})
}

// Where a session has no memory left for what nobody takes, those streams end of
// which nothing is taken, and those that are read go on, however slowly.
func TestStreamsThatNobodyTakesAreCutWhereNothingIsLeft(t *testing.T) {
	const streams = 20
	synctest.Test(t, func(t *testing.T) {
		b := NewBudget(0)
		kept := b.Share(2 * Window)
		var all []*path
		var work sync.WaitGroup
		for i := range streams {
			p := newPathWith(t, Config{}, Config{Kept: kept})
			all = append(all, p)
			work.Go(func() { p.near.Write(noise(byte(i), 2*Window)); p.near.CloseWrite() })
		}
		slow := all[streams-1]
		var got bytes.Buffer
		work.Go(func() {
			for p := make([]byte, 64<<10); ; time.Sleep(time.Second) {
				n, err := slow.far.Read(p)
				got.Write(p[:n])
				if err != nil {
					return
				}
			}
		})
		time.Sleep(10 * time.Second)
		cut := 0
		for _, p := range all {
			p.far.mu.Lock()
			if p.far.err == errUntaken {
				cut++
			}
			p.far.mu.Unlock()
		}
		if cut < streams-3 || cut > streams-2 {
			t.Errorf("%d of %d streams were cut; there is memory for two or three", cut, streams)
		}
		if b.Used() > 2*Window+streams*2*grant {
			t.Errorf("%d are taken", b.Used())
		}
		for _, p := range all {
			if p != slow {
				p.far.Close()
				p.near.Close()
			}
		}
		work.Wait()
		if !bytes.Equal(got.Bytes(), noise(streams-1, 2*Window)) {
			t.Errorf("of the one that is read slowly %d bytes came, or others", got.Len())
		}
		slow.near.Close()
		slow.far.Close()
		<-slow.far.Done()
		if b.Used() != 0 {
			t.Errorf("%d are taken when all is over", b.Used())
		}
	})
}

// Where other sessions hold everything, a stream of the one that holds most ends,
// also where all that it brings has come.
func TestTheSessionThatHoldsMostGivesWay(t *testing.T) {
	for _, ended := range []bool{false, true} {
		t.Run(fmt.Sprint("ended: ", ended), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				b := NewBudget(3 * Window)
				greedy, modest := b.Share(0), b.Share(0)
				begin := func(s *Share, i byte, n int) *path {
					p := newPathWith(t, Config{}, Config{Kept: s})
					go func() {
						p.near.Write(noise(i, n))
						if ended {
							p.near.CloseWrite()
						}
					}()
					time.Sleep(5 * time.Second)
					return p
				}
				var all []*path
				for i := range byte(3) {
					all = append(all, begin(greedy, i, Window))
				}
				one := begin(modest, 3, Window)
				var cut *path
				for _, p := range all {
					if p.far.mu.Lock(); p.far.err != nil {
						cut = p
					}
					p.far.mu.Unlock()
				}
				if cut == nil {
					t.Fatal("no stream of the greedy session was cut")
				}
				if n, err := cut.far.Read(make([]byte, 10)); n != 0 || !errors.Is(err, tunnel.LimitExceeded) {
					t.Errorf("what was cut still gives %d bytes, %v", n, err)
				}
				one.far.mu.Lock()
				if one.far.err != nil || one.far.got != Window {
					t.Errorf("of the other session's stream %d bytes came, then %v", one.far.got, one.far.err)
				}
				one.far.mu.Unlock()
			})
		})
	}
}

// With nothing left streams go on at their floor, both ways at once, and end in every way.
func TestWithNothingLeftStreamsGoOn(t *testing.T) {
	for _, how := range []string{"close", "abort", "expire"} {
		t.Run(how, func(t *testing.T) {
			b := NewBudget(1)
			near, far := b.Share(0), b.Share(0)
			var ends sync.WaitGroup
			for i := range 8 {
				p := newPathOf(t, near, far)
				ends.Go(func() {
					var work sync.WaitGroup
					for _, c := range []*Conn{p.near, p.far} {
						work.Go(func() { c.Write(noise(byte(i), 1<<20)); c.CloseWrite() })
						work.Go(func() {
							if got, err := io.ReadAll(c); !bytes.Equal(got, noise(byte(i), 1<<20)) || err != nil {
								t.Error(fmt.Errorf("stream %d: %d bytes came, or others, %w", i, len(got), err))
							}
						})
					}
					work.Wait()
					switch how {
					case "close":
						p.near.Close()
						p.far.Close()
					case "abort":
						p.near.Abort(io.EOF)
					default:
						p.near.Expire(io.EOF)
						p.far.Expire(io.EOF)
					}
				})
			}
			ends.Wait()
			settled(t, b)
		})
	}
}

// An echo reads when its Write is done, and the acknowledgements that the Write
// waits for come behind what it has not read.
func TestAnEchoIsNotStuckWhereNothingIsLeft(t *testing.T) {
	for name, shares := range map[string][2]*Share{
		"far":  {nil, NewBudget(1).Share(0)},
		"near": {NewBudget(1).Share(0), nil},
		"both": {NewBudget(1).Share(0), NewBudget(1).Share(0)},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				p := newPathOf(t, shares[0], shares[1])
				echo, app := p.far, p.near
				if name == "near" {
					echo, app = p.near, p.far
				}
				var work sync.WaitGroup
				work.Go(func() {
					buf := make([]byte, 256<<10)
					for {
						n, err := io.ReadAtLeast(echo, buf, 1)
						if err == nil {
							n2, _ := io.ReadFull(echo, buf[n:]) // so that it reads much, and writes as much
							n += n2
						}
						if n == 0 {
							break
						}
						echo.Write(buf[:n])
					}
					echo.CloseWrite()
				})
				want := noise(1, 4<<20)
				work.Go(func() { app.Write(want); app.CloseWrite() })
				if got, err := io.ReadAll(app); !bytes.Equal(got, want) || err != nil {
					t.Errorf("%d bytes came back, or others, %v", len(got), err)
				}
				work.Wait()
				p.near.Close()
				p.far.Close()
				<-p.near.Done()
				<-p.far.Done()
				for _, s := range shares {
					if s != nil && s.used != 0 {
						t.Errorf("%d are taken when all is over", s.used)
					}
				}
			})
		})
	}
}
