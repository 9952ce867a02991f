package tunnel

import (
	"io"
	"sync"
)

// A direction waits with a small buffer and moves bulk with a large one: most
// streams are idle most of the time and two directions each, so what they hold
// while they wait is what they cost. A large read saves system calls.
const (
	spliceWait = 4 << 10
	spliceBulk = 63 << 10 // with the heads of frames, four TLS records (RFC 8446 §5.1)
)

var (
	spliceWaits = sync.Pool{New: func() any { b := make([]byte, spliceWait); return &b }}
	spliceBulks = sync.Pool{New: func() any { b := make([]byte, spliceBulk); return &b }}
)

// Splice carries bytes between two streams until both directions have ended,
// then closes both. The end of one direction (FIN) is passed on and leaves the
// other running; a failure on either side aborts both (RST). It returns the
// first failure; nil when both directions ended in order. A direction holds
// 4 KiB while it waits, and 63 KiB while reads fill what they are given.
func Splice(a, b Stream) error {
	var first error
	var once sync.Once
	fail := func(err error) {
		once.Do(func() {
			first = err
			a.Abort(err)
			b.Abort(err)
		})
	}
	var back sync.WaitGroup
	back.Go(func() { pump(a, b, fail) })
	pump(b, a, fail)
	back.Wait()
	a.Close()
	b.Close()
	return first
}

// pump carries one direction.
func pump(to, from Stream, fail func(error)) {
	pool := &spliceWaits
	buf := pool.Get().(*[]byte)
	defer func() { pool.Put(buf) }()
	for {
		n, rerr := from.Read(*buf)
		if n > 0 {
			if _, err := to.Write((*buf)[:n]); err != nil {
				fail(err)
				return
			}
		}
		switch {
		case rerr == io.EOF:
			// Failing here means that the other side has gone: its own
			// direction reports that.
			to.CloseWrite()
			return
		case rerr != nil:
			fail(rerr)
			return
		}
		// A read that left room has taken all there was, so the next will
		// wait. One that did not may have left much.
		next := &spliceWaits
		if n == len(*buf) {
			next = &spliceBulks
		}
		if next != pool {
			pool.Put(buf)
			pool, buf = next, next.Get().(*[]byte)
		}
	}
}
