package resume

import "sync"

// A chunk is a piece of what has been written, with room for the head of the
// frame that it travels in, so that it leaves in one Write. It is filled, sent,
// perhaps sent again, and freed when it has been acknowledged and nobody is
// writing it.
type chunk struct {
	start uint64 // offset of its first byte
	buf   []byte // headBytes, then the bytes
	class *class
	shut  bool // it has been sent, so nothing is added any more
	users int  // Writes to a carrier stream that use it
	freed bool
}

// The sizes of chunks, heads included: a message's, what a Splice reads while
// it waits, and bulk's. The largest holds a large read of Splice, so that bulk
// leaves in pieces of one size.
var classes = []*class{
	newClass(1 << 10),
	newClass(8 << 10),
	newClass(headBytes + 63<<10),
}

// A class keeps chunks of one size.
type class struct {
	size int
	pool sync.Pool
}

func newClass(size int) *class {
	return &class{size: size, pool: sync.Pool{New: func() any { return &chunk{buf: make([]byte, headBytes, size)} }}}
}

// tailLocked returns a chunk with room, for n more bytes.
func (c *Conn) tailLocked(n int) *chunk {
	if last := len(c.chunks) - 1; last >= 0 {
		if k := c.chunks[last]; !k.shut && len(k.buf) < cap(k.buf) {
			return k
		}
	}
	class := classes[len(classes)-1]
	for _, smaller := range classes {
		if headBytes+n <= smaller.size {
			class = smaller
			break
		}
	}
	k := class.pool.Get().(*chunk)
	*k = chunk{start: c.end, buf: k.buf[:headBytes], class: class}
	c.chunks = append(c.chunks, k)
	return k
}

func (k *chunk) end() uint64 { return k.start + uint64(len(k.buf)-headBytes) }

// add takes what fits.
func (k *chunk) add(p []byte) int {
	n := min(len(p), cap(k.buf)-len(k.buf))
	k.buf = append(k.buf, p[:n]...)
	return n
}

// frame returns a frame of the bytes from offset on, for one Write. The head
// overwrites bytes before offset, which the peer has.
func (k *chunk) frame(offset uint64) []byte {
	k.shut = true
	k.users++
	b := k.buf[offset-k.start:]
	putHead(b, frameData, len(b)-headBytes)
	return b
}

// release says that a Write has ended.
func (k *chunk) release() {
	k.users--
	if k.freed && k.users == 0 {
		k.class.pool.Put(k)
	}
}

// free says that the bytes are not needed again.
func (k *chunk) free() {
	k.freed = true
	if k.users == 0 {
		k.class.pool.Put(k)
	}
}
