package tunneltls

import (
	"encoding/binary"
	"errors"
	"sync"
	"sync/atomic"
	"time"
)

// yamuxHeader is the length of a yamux frame's header.
//
//	+-------------+----------+------------+-------------+-------------+
//	| version (8) | type (8) | flags (16) | stream (32) | length (32) |
//	+-------------+----------+------------+-------------+-------------+
const yamuxHeader = 12

// How many bytes of a stream go into one yamux frame. A small one fills one TLS
// record with its header (RFC 8446 §5.1: 2^14 bytes); a large one fills four
// and leaves with one system call.
const (
	maxPlaintext = 1 << 14
	smallFrame   = maxPlaintext - yamuxHeader
	largeFrame   = 4*maxPlaintext - yamuxHeader
)

// frames is the connection as yamux sees it. yamux writes a data frame with two
// Writes, header and body, which would be two TLS records and, with
// TCP_NODELAY, two segments; here the header waits for its body. It also gives
// a write that makes no progress an end, and remembers why the connection
// ended, which yamux does not tell.
//
// Writes come from yamux's one sending goroutine.
type frames struct {
	*link
	buf    []byte // a header that waits; otherwise empty
	flood  *floodMeter
	unsent unsentSize
	unread *unread
	done   <-chan struct{} // the carrier has ended

	heard atomic.Int64 // bytes read so far

	mu  sync.Mutex
	err error // the first failure
}

func (f *frames) Write(p []byte) (int, error) {
	if len(f.buf) == 0 && len(p) == yamuxHeader && p[1] == 0 && binary.BigEndian.Uint32(p[8:]) > 0 {
		f.buf = append(f.buf, p...)
		return len(p), nil
	}
	first, rest := p, p[len(p):]
	if len(f.buf) > 0 {
		n := min(len(p), maxPlaintext-len(f.buf))
		f.buf = append(f.buf, p[:n]...)
		first, rest = f.buf, p[n:]
	}
	err := f.send(first, rest)
	if n := f.unsent.wrote(len(first)+len(rest), time.Now()); n > 0 {
		keepUnsent(f.raw, n)
	}
	f.buf = f.buf[:0]
	if err != nil {
		f.failed(err)
		return 0, err
	}
	return len(p), nil
}

func (f *frames) send(first, rest []byte) error {
	f.gather.expect()
	if len(rest) == 0 {
		_, err := f.link.Write(first)
		return err
	}
	f.gather.hold()
	_, err := f.link.Write(first)
	if err == nil {
		_, err = f.link.Write(rest)
	}
	return errors.Join(err, f.gather.release())
}

func (f *frames) Read(p []byte) (int, error) {
	n, err := f.link.Read(p[:f.unread.admit(len(p), f.done)])
	f.unread.came(p[:n])
	f.heard.Add(int64(n))
	if flood := f.flood.read(p[:n]); flood != nil && err == nil {
		n, err = 0, flood // none of it is answered
	}
	if err != nil {
		f.failed(err)
	}
	return n, err
}

func (f *frames) failed(err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.err == nil {
		f.err = err
	}
}

func (f *frames) why() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.err
}

func (f *frames) Close() error { return f.shut() }
