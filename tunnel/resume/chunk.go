package resume

import (
	"sync"
	"time"
)

// A chunk is a piece of what has been written, with room for the head of the
// frame that it travels in, so that it leaves in one Write. It is filled, sent,
// perhaps sent again, and freed when it has been acknowledged and nobody is
// writing it.
type chunk struct {
	start uint64 // offset of its first byte
	buf   []byte // headBytes, then the bytes
	class *class
	of    *account // where it is counted; nil when freed
	shut  bool     // it has been sent, so nothing is added any more
	users int      // Writes to a carrier stream that use it
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

// keptClass is for a piece that pull reads.
var keptClass = newClass(headBytes + 16<<10)

// A class keeps chunks of one size.
type class struct {
	size int
	pool sync.Pool
}

func newClass(size int) *class {
	return &class{size: size, pool: sync.Pool{New: func() any { return &chunk{buf: make([]byte, headBytes, size)} }}}
}

// classFor returns the smallest class that takes n bytes, or the largest.
func classFor(n int) *class {
	for _, class := range classes {
		if headBytes+n <= class.size {
			return class
		}
	}
	return classes[len(classes)-1]
}

// freshLocked makes a chunk, which has been paid for.
func (c *Conn) freshLocked(of *account, class *class, start uint64) *chunk {
	k := class.pool.Get().(*chunk)
	*k = chunk{start: start, buf: k.buf[:headBytes], class: class, of: of}
	of.held += class.size
	return k
}

// dropLocked frees chunks.
func (c *Conn) dropLocked(chunks *[]*chunk) {
	for i, k := range *chunks {
		k.of.held -= k.class.size
		k.free()
		(*chunks)[i] = nil
	}
	*chunks = nil
	c.thriftLocked()
}

// tailLocked returns a chunk with room, for n more bytes; nil: there is no
// memory left for one.
func (c *Conn) tailLocked(n int) *chunk {
	if last := len(c.chunks) - 1; last >= 0 {
		if k := c.chunks[last]; !k.shut && len(k.buf) < cap(k.buf) {
			return k
		}
	}
	class := classFor(n)
	if c.sentMemory.mustPay(class.size) > c.sentMemory.paid {
		c.squeezeLocked()
	}
	if !c.sentMemory.fits(class.size, false) {
		if n = min(n, floor-int(c.end-c.base)); n <= 0 {
			return nil
		}
		class = classFor(n)
		c.sentMemory.fits(class.size, true)
	}
	k := c.freshLocked(&c.sentMemory, class, c.end)
	c.chunks = append(c.chunks, k)
	return k
}

// squeezeLocked joins chunks that have been sent. A chunk is as large as its
// class, however little was written: a peer that takes bytes one by one and
// acknowledges none would make a thousand times as much be kept. What is still
// to be sent stays apart: its frame's head goes over the bytes before it, which
// the peer need not have.
func (c *Conn) squeezeLocked() {
	if c.end <= c.base {
		return
	}
	if c.sentMemory.held <= 2*int(c.end-c.base)+2*classes[len(classes)-1].size {
		return // each byte is moved no more than a few times
	}
	var joined []*chunk
	idle := func(k *chunk) bool { return k.users == 0 && k.end() <= c.sent }
	for rest := c.chunks; len(rest) > 0; {
		n, bytes := 0, 0
		for n < len(rest) && idle(rest[n]) {
			bytes += len(rest[n].buf) - headBytes
			n++
		}
		if n < 2 {
			n = max(n, 1)
			joined = append(joined, rest[:n]...)
			rest = rest[n:]
			continue
		}
		var into *chunk
		for i, k := range rest[:n] {
			for p := k.buf[headBytes:]; len(p) > 0; {
				if into == nil || len(into.buf) == cap(into.buf) {
					into = c.freshLocked(&c.sentMemory, classFor(bytes), k.end()-uint64(len(p)))
					into.shut = true
					joined = append(joined, into)
				}
				took := into.add(p)
				p, bytes = p[took:], bytes-took
			}
			k.of.held -= k.class.size
			k.free()
			rest[i] = nil
		}
		rest = rest[n:]
	}
	c.chunks = joined
	c.thriftLocked()
}

// mayKeepLocked reports whether another piece that nobody has read may be kept.
func (c *Conn) mayKeepLocked() bool {
	if c.closed || c.err != nil || int(c.got-c.taken) < keptFloor {
		return true
	}
	return c.keptMemory.fits(keptClass.size, false)
}

// keepLocked keeps what has come for Reads to come.
func (c *Conn) keepLocked(p []byte) {
	if len(c.kept) == 0 {
		c.lastTaken = time.Now()
	}
	for len(p) > 0 {
		last := len(c.kept) - 1
		if last < 0 || len(c.kept[last].buf) == cap(c.kept[last].buf) {
			class := classFor(len(p))
			if class.size > keptClass.size {
				class = keptClass
			}
			c.keptMemory.fits(class.size, true)
			c.kept = append(c.kept, c.freshLocked(&c.keptMemory, class, 0))
			last++
		}
		p = p[c.kept[last].add(p):]
	}
}

// readKeptLocked reads what was kept.
func (c *Conn) readKeptLocked(p []byte) int {
	k := c.kept[0]
	n := copy(p, k.buf[headBytes+c.keptAt:])
	c.lastTaken = time.Now()
	if c.keptAt += n; headBytes+c.keptAt == len(k.buf) {
		read := c.kept[:1]
		c.kept, c.keptAt = c.kept[1:], 0
		c.dropLocked(&read)
	}
	if c.full { // perhaps no more
		if c.full = false; c.waiting > 0 {
			c.readOnLocked()
		} else {
			c.readOnSoonLocked()
		}
	}
	return n
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
	k.freed, k.of = true, nil
	if k.users == 0 {
		k.class.pool.Put(k)
	}
}
