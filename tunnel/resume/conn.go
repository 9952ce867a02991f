package resume

import (
	"io"
	"net"
	"os"
	"sync"
	"time"

	"culvert/tunnel"
)

const (
	// Window is how many bytes of a direction may be under way: sent and not
	// taken yet by the peer's application. Both ends use the same. It lets one
	// stream fill 330 Mbit/s at a round trip of 100 ms.
	Window = 4 << 20
	// unsentMax bounds what waits here for a carrier stream that is slow.
	unsentMax = 128 << 10
	// ackEvery is how much is taken between acknowledgements.
	ackEvery  = 64 << 10
	ackPieces = 32
	// readOnAfter is how long a Conn of which something is owed goes unread.
	readOnAfter = 100 * time.Millisecond
	// brokenFor is how long what has come is read from a carrier stream that
	// takes nothing more.
	brokenFor = time.Second
	// DefaultLimit is how long a Conn may be without a carrier stream.
	DefaultLimit = time.Minute
)

// Config is what a Conn needs.
type Config struct {
	// Limit is how long the Conn may be without a carrier stream, and how long
	// it goes on delivering after Close; 0: DefaultLimit.
	Limit time.Duration
	// Share is what the memory beyond Free is taken from; nil: it is not bounded
	// but by Window, for each Conn.
	Share *Share
	// Kept is, where it is not nil, what memory for data that has come is taken from
	// instead. Then what nobody reads is kept there and does not wait on the carrier,
	// where it could hold up other streams. Where no memory is left, Conns are
	// aborted with LimitExceeded of which nobody takes anything for two seconds.
	Kept *Share
	// Detached is called on a goroutine of its own when the carrier stream has
	// failed and another is needed. May be nil.
	Detached func(error)
	// Over is called on a goroutine of its own when Done has been closed. May be
	// nil.
	Over func()
}

// A Conn is a tunnel.Stream.
//
//	Write ──► unsent ──pump──► carrier stream ──► peer
//	             │ kept until acknowledged        │
//	             └──── said again ◄── Attach ◄────┘
//	Read  ◄── (kept, where a blocked Write had to read) ◄── carrier stream
//
// Whoever reads, reads the carrier stream itself. Only where a Write waits for
// acknowledgements and nobody reads does a goroutine read on, and keep the
// data: the peer can not send more than Window. Where its Share is used up a
// Conn keeps little, and waits: Writes for room, that goroutine for a Read.
type Conn struct {
	cfg  Config
	done chan struct{} // closed when nothing more will be sent or read

	mu   sync.Mutex // guards the fields below
	cond sync.Cond  // signalled when any of them changes
	over bool       // done is closed
	err  error      // why both directions are over; nil: they are not

	// The carrier stream. generation grows with each, and when one is left.
	under      tunnel.Stream // nil: detached
	in         *framer
	generation int
	broken     error       // why nothing can be written to it; what has come is still read
	left       int         // bytes of the current data frame that have not been read
	pulling    bool        // somebody reads in
	readers    int         // Reads that wait for another's reading
	watch      *time.Timer // until what was sent has to be read for; nil: never yet
	expiry     *time.Timer // while detached, or lingering
	local      net.Addr
	remote     net.Addr

	// Sending. Offsets count the stream's bytes, and its end as one.
	chunks  []*chunk // from base on
	base    uint64   // the peer has what is below
	credit  uint64   // its application has taken what is below: Window counts from here
	sent    uint64   // given to this carrier stream
	most    uint64   // the highest sent ever was
	end     uint64   // written
	endSaid bool     // no more is written: there is an end at offset end
	pumping bool
	waiting int // Writes that wait for room

	sentMemory account   // of chunks
	keptMemory account   // of kept
	full       bool      // nothing was left for pull to keep
	untaken    bool      // a timer runs that looks whether it stays so
	fullSince  time.Time // since when it is full again and again, and nobody takes anything
	fullAt     uint64    // taken then

	// While full, and a Write waits.
	watched  bool          // a timer runs that looks whether it is stuck
	stuckFor time.Duration // after which it is
	stuckAt  uint64        // base when it last was

	// Receiving.
	kept      []*chunk  // read by pull for Reads to come
	keptAt    int       // bytes of the first that have been read
	got       uint64    // received, kept included
	taken     uint64    // by the application
	lastTaken time.Time // or when the first that is kept came
	acked     uint64    // what the peer has been told
	ended     bool      // the peer's end has come
	pieces    int       // reads that were not empty since the last acknowledgement
	ackDue    bool

	closed    bool // by Close: nothing is read any more
	stopSaid  bool // on this carrier stream
	stopped   bool // the peer reads no more
	resetting bool // err has to be told to the peer, until it answers
	resetSaid bool // on this carrier stream
	lastWord  bool // and is not answered: it answers the peer's, or the peer breaks the rules

	readBy, writeBy deadline
}

// New makes a Conn without a carrier stream.
func New(cfg Config) *Conn {
	if cfg.Limit <= 0 {
		cfg.Limit = DefaultLimit
	}
	c := &Conn{cfg: cfg, done: make(chan struct{}), stuckFor: stuckAfter}
	c.sentMemory = account{of: c, share: cfg.Share, free: freeSent}
	c.keptMemory = account{of: c, share: cfg.Share, free: freeKept}
	if cfg.Kept != nil {
		c.keptMemory.share, c.keptMemory.keeps = cfg.Kept, true
	}
	c.cond.L = &c.mu
	c.readBy.cond, c.writeBy.cond = &c.cond, &c.cond
	c.expiry = time.AfterFunc(cfg.Limit, c.expire)
	return c
}

// Attach goes on over a fresh carrier stream, which is the Conn's from then on.
// received is how much the peer has, by its Detach. An error means that the
// Conn is over, or the peer lies, which it is told.
func (c *Conn) Attach(under tunnel.Stream, received uint64) error {
	c.mu.Lock()
	if c.err == nil && (received < c.base || received > c.most) {
		c.failLocked(errFrame, true)
	}
	if c.over || c.err != nil && !c.resetting {
		err := c.err
		c.mu.Unlock()
		if err == nil {
			err = net.ErrClosed
		}
		under.Abort(err)
		return err
	}
	old := c.leaveLocked()
	c.under, c.in = under, &framer{r: under}
	c.local, c.remote = under.LocalAddr(), under.RemoteAddr()
	if !c.closed {
		c.expiry.Stop()
	}
	if c.err == nil {
		c.ackLocked(received)
		c.sent = max(received, c.base)
		c.ackDue, c.stopSaid = c.taken > 0 || c.ended, false // what was said last may have been lost
		under.SetReadDeadline(c.readBy.at)
	}
	c.kickLocked()
	c.readOnSoonLocked()
	c.cond.Broadcast()
	err := c.err
	c.mu.Unlock()
	if old != nil {
		old.Abort(errLeft)
	}
	return err
}

// Detach leaves the carrier stream, if there is one, and returns how much has
// been received: what the peer is to be told. Detached is not called.
func (c *Conn) Detach() (received uint64) {
	c.mu.Lock()
	old := c.leaveLocked()
	if !c.over {
		c.expiry.Reset(c.cfg.Limit)
	}
	received = c.got
	if c.ended {
		received++
	}
	c.cond.Broadcast()
	c.mu.Unlock()
	if old != nil {
		old.Abort(errLeft)
	}
	return received
}

var errLeft = tunnel.Errorf(tunnel.PathLost, "the stream goes on elsewhere")

// leaveLocked gives the carrier stream up; the caller aborts it.
func (c *Conn) leaveLocked() (old tunnel.Stream) {
	old = c.under
	c.under, c.in, c.left, c.broken, c.resetSaid = nil, nil, 0, nil, false
	c.generation++
	return old
}

// lostLocked says that the carrier stream of a generation has failed.
func (c *Conn) lostLocked(generation int, err error) {
	if generation != c.generation || c.under == nil || c.over {
		return
	}
	old := c.leaveLocked()
	go old.Abort(errLeft)
	if c.lastWord { // where the peer still waits for it, it is told that there is no stream
		c.overLocked(false)
		return
	}
	if !c.closed && c.err == nil {
		c.expiry.Reset(c.cfg.Limit)
	}
	if c.cfg.Detached != nil {
		go c.cfg.Detached(err)
	}
	c.cond.Broadcast()
}

// breakLocked says that the carrier stream of a generation takes nothing more.
// The peer may have ended it, and said why before.
func (c *Conn) breakLocked(generation int, err error) {
	if generation != c.generation || c.under == nil || c.over {
		return
	}
	c.broken = err
	c.readOnLocked()
	time.AfterFunc(brokenFor, func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		c.lostLocked(generation, err)
	})
}

// Done is closed when the Conn is over: everything has been delivered both
// ways, or it has been aborted, or it has expired.
func (c *Conn) Done() <-chan struct{} { return c.done }

// Expire ends a Conn that will have no carrier stream any more.
func (c *Conn) Expire(why error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.failLocked(why, false)
	c.overLocked(false) // where the peer was still to be told
}

func (c *Conn) expire() {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case c.err != nil:
		c.overLocked(false)
	case c.under == nil || c.closed:
		c.failLocked(tunnel.Errorf(tunnel.SessionExpired, "there was no connection for the stream for %v", c.cfg.Limit), c.under != nil)
	}
}

// failLocked ends both directions; tell: the peer is told where it can be.
func (c *Conn) failLocked(why error, tell bool) {
	if c.over || c.err != nil {
		return
	}
	c.err, c.full = why, false
	c.lastWord = c.lastWord || why == errFrame
	c.dropLocked(&c.chunks)
	if !c.ended {
		c.dropLocked(&c.kept)
	}
	if c.resetting = tell && (c.under != nil || !c.lastWord); c.resetting {
		c.expiry.Reset(c.cfg.Limit)
		c.kickLocked()
	} else {
		c.overLocked(false)
	}
	c.cond.Broadcast()
}

// overLocked ends the Conn; told: the carrier stream may end in peace.
func (c *Conn) overLocked(told bool) {
	if c.over {
		return
	}
	c.over, c.resetting = true, false
	c.expiry.Stop()
	if c.watch != nil {
		c.watch.Stop()
	}
	if under := c.leaveLocked(); under != nil {
		if told {
			go under.Close()
		} else {
			go under.Abort(c.err)
		}
	}
	close(c.done)
	c.thriftLocked()
	if c.cfg.Over != nil {
		go c.cfg.Over()
	}
	c.cond.Broadcast()
}

// settleLocked ends the Conn if all has been delivered.
func (c *Conn) settleLocked() {
	delivered := c.endSaid && c.base > c.end
	heard := c.ended && c.acked > c.got || c.closed && c.stopSaid
	if c.err == nil && delivered && heard && !c.pumping {
		c.overLocked(true)
	}
}

// Read implements net.Conn.
func (c *Conn) Read(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for {
		switch {
		case c.closed:
			return 0, net.ErrClosed
		case len(c.kept) > 0:
			n := c.readKeptLocked(p)
			c.takenLocked(n)
			return n, nil
		case c.ended && c.err != errUntaken: // of that which is gone
			return 0, io.EOF
		case c.err != nil:
			return 0, c.err
		case c.readBy.over():
			return 0, os.ErrDeadlineExceeded
		case len(p) == 0:
			return 0, nil
		case c.pulling || c.under == nil:
			c.readers++
			c.cond.Wait()
			c.readers--
			continue
		}
		if n := c.pullLocked(p); n > 0 {
			c.takenLocked(n)
			return n, nil
		}
	}
}

// takenLocked counts what the application has taken, and tells the peer.
func (c *Conn) takenLocked(n int) {
	c.taken += uint64(n)
	c.pieces++
	if c.taken-min(c.acked, c.taken) >= ackEvery || c.pieces >= ackPieces || c.ended && c.taken == c.got {
		c.ackDue = true
		c.kickLocked()
	}
}

// pullLocked reads the carrier stream once: a frame that is not data, or data
// into p. The caller has seen that nobody else does. It unlocks meanwhile.
func (c *Conn) pullLocked(p []byte) (n int) {
	in, left, generation := c.in, c.left, c.generation
	c.pulling = true
	c.mu.Unlock()
	var f frame
	var err error
	if left == 0 {
		if f, err = in.next(); err == nil && f.kind == frameData {
			left = f.length
		}
	}
	if err == nil && left > 0 {
		n, err = in.r.Read(p[:min(len(p), left)])
	}
	c.mu.Lock()
	c.pulling = false
	c.readOnSoonLocked()
	c.cond.Broadcast()
	if generation != c.generation {
		return 0 // it will be said again
	}
	c.left = left - n
	c.got += uint64(n)
	switch {
	case n > 0 && (c.ended || c.got-c.taken > Window):
		c.failLocked(errFrame, true)
		return 0
	case n > 0:
		return n
	case err == errFrame:
		c.failLocked(errFrame, true)
	case err != nil && os.IsTimeout(err):
		if c.readBy.at.IsZero() || !c.readBy.over() {
			c.under.SetReadDeadline(c.readBy.at)
		}
	case err != nil:
		c.lostLocked(generation, err)
	case f.kind != frameData:
		c.heedLocked(f)
	}
	return 0
}

// heedLocked takes a frame that is not data.
func (c *Conn) heedLocked(f frame) {
	switch f.kind {
	case frameAck:
		if f.ack < c.credit || f.ack > c.sent {
			c.failLocked(errFrame, true)
			return
		}
		c.credit = f.ack
		c.ackLocked(f.ack)
	case frameEnd:
		if c.ended {
			c.failLocked(errFrame, true)
			return
		}
		c.ended, c.ackDue = true, true
		c.kickLocked()
	case frameStop:
		c.stopped = true
		if !c.endSaid {
			// What the peer does not want is not said.
			c.endSaid = true
		}
		c.failWritesLocked()
	case frameReset:
		if c.resetting { // this is its answer, or both say the same
			c.overLocked(true)
			return
		}
		c.lastWord = true
		c.failLocked(tunnel.Errorf(f.code, "the other end aborted the stream"), true)
	}
	c.settleLocked()
}

// failWritesLocked drops what has not been acknowledged: nobody reads it.
func (c *Conn) failWritesLocked() {
	c.dropLocked(&c.chunks)
	c.base, c.sent, c.most, c.credit = c.end+1, c.end+1, c.end+1, c.end+1
	c.cond.Broadcast()
}

// ackLocked forgets what the peer has.
func (c *Conn) ackLocked(offset uint64) {
	c.base = max(c.base, offset)
	n := 0
	for n < len(c.chunks) && c.chunks[n].end() <= c.base {
		n++
	}
	if n > 0 {
		freed := c.chunks[:n]
		c.chunks = c.chunks[n:]
		c.dropLocked(&freed)
	}
	c.cond.Broadcast()
	c.settleLocked()
}

// Write implements net.Conn. It returns when p is kept here, not when it has
// been sent.
func (c *Conn) Write(p []byte) (n int, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for {
		switch {
		case c.closed || c.endSaid && !c.stopped:
			return n, net.ErrClosed
		case c.err != nil:
			return n, c.err
		case c.stopped:
			return n, errStopped
		case c.writeBy.over():
			return n, os.ErrDeadlineExceeded
		case len(p) == 0:
			return n, nil
		}
		room := Window - int(c.end-c.credit)
		if room <= 0 {
			c.waitLocked()
			continue
		}
		if c.under != nil {
			if room = min(room, unsentMax-int(c.end-min(c.sent, c.end))); room <= 0 {
				c.cond.Wait()
				continue
			}
		}
		k := c.tailLocked(min(room, len(p)))
		if k == nil {
			c.sentMemory.queue()
			c.waitLocked()
			continue
		}
		took := k.add(p[:min(room, len(p))])
		p, n = p[took:], n+took
		c.end += uint64(took)
		c.kickLocked()
	}
}

var errStopped = tunnel.Errorf(tunnel.ConnectionRefused, "the other end reads no more")

// waitLocked waits for room.
func (c *Conn) waitLocked() {
	c.waiting++
	if c.readOnLocked(); c.full {
		c.watchFullLocked()
	}
	c.cond.Wait()
	c.waiting--
}

// owedLocked reports whether the peer has something to say that must be heard
// although nobody reads: acknowledgements, that the carrier stream is lost, or data
// that is to be kept here.
func (c *Conn) owedLocked() bool {
	return c.cfg.Kept != nil && !c.ended || c.waiting > 0 || c.closed || c.resetting || c.broken != nil || c.base < c.end || c.endSaid && c.base == c.end
}

// readOnLocked sees to it that somebody reads.
func (c *Conn) readOnLocked() {
	if !c.pulling && !c.full && c.under != nil && !c.over {
		c.pulling = true
		go c.pull()
	}
}

// readOnSoonLocked is readOnLocked if nobody reads for some time.
func (c *Conn) readOnSoonLocked() {
	switch {
	case c.pulling || c.full || c.under == nil || c.over || !c.owedLocked():
	case c.watch == nil:
		c.watch = time.AfterFunc(readOnAfter, func() {
			c.mu.Lock()
			defer c.mu.Unlock()
			if c.owedLocked() {
				c.readOnLocked()
			}
		})
	default:
		c.watch.Reset(readOnAfter)
	}
}

// pull reads on while that is owed and nobody reads. pulling has been set for
// it.
func (c *Conn) pull() {
	buf := make([]byte, keptClass.size-headBytes)
	c.mu.Lock()
	defer c.mu.Unlock()
	c.pulling = false
	for c.owedLocked() && c.under != nil && !c.over && !c.pulling {
		if c.readers > 0 && len(c.kept) == 0 && c.waiting == 0 {
			break // it reads itself
		}
		if c.full = !c.mayKeepLocked(); c.full {
			c.keptMemory.queue() // or until a Read makes room
			c.watchFullLocked()
			c.watchUntakenLocked()
			break
		}
		c.under.SetReadDeadline(time.Time{})
		n := c.pullLocked(buf)
		if c.closed || c.err != nil {
			c.taken += uint64(n) // nobody wants it
		} else {
			c.keepLocked(buf[:n])
		}
	}
	if c.under != nil && !c.over {
		c.under.SetReadDeadline(c.readBy.at)
	}
	c.cond.Broadcast()
}

// kickLocked sees to it that what can be sent is sent.
func (c *Conn) kickLocked() {
	if !c.pumping && c.under != nil && c.pendingLocked() {
		c.pumping = true
		go c.pump()
	}
}

func (c *Conn) pendingLocked() bool {
	if c.resetting {
		return c.broken == nil && !c.resetSaid
	}
	return c.broken == nil && (c.ackDue || c.sent < c.end || c.endSaid && c.sent == c.end || c.closed && !c.stopSaid)
}

// pump sends until there is nothing to send or the carrier stream is lost.
func (c *Conn) pump() {
	var small [headBytes + maxCode]byte
	c.mu.Lock()
	defer c.mu.Unlock()
	for c.under != nil && !c.over && c.pendingLocked() {
		under, generation := c.under, c.generation
		out, k := c.nextLocked(small[:0])
		c.mu.Unlock()
		_, err := under.Write(out)
		c.mu.Lock()
		if k != nil {
			k.release()
		}
		switch {
		case err != nil:
			c.breakLocked(generation, err)
		case c.resetSaid && c.lastWord && generation == c.generation:
			c.overLocked(true)
		}
		c.cond.Broadcast()
	}
	c.pumping = false
	c.readOnSoonLocked()
	c.settleLocked()
}

// nextLocked returns what to send next, and notes it as sent: an
// acknowledgement, a reset or a stop before data. The chunk is released when it
// has been written.
func (c *Conn) nextLocked(b []byte) (out []byte, of *chunk) {
	switch {
	case c.resetting:
		c.resetSaid = true
		return appendReset(b, tunnel.CodeOf(c.err)), nil
	case c.ackDue || c.sent < c.end && c.taken > c.acked:
		c.ackDue, c.acked, c.pieces = false, c.taken, 0
		if c.ended && c.taken == c.got {
			c.acked++
		}
		return appendAck(b, c.acked), nil
	case c.sent < c.end:
		for _, k := range c.chunks {
			if c.sent < k.end() {
				out = k.frame(c.sent)
				c.sent = k.end()
				c.most = max(c.most, c.sent)
				return out, k
			}
		}
	case c.endSaid && c.sent == c.end:
		c.sent++
		c.most = max(c.most, c.sent)
		return append(b, frameEnd, 0, 0), nil
	}
	c.stopSaid = true
	return append(b, frameStop, 0, 0), nil
}

// CloseWrite implements tunnel.Stream.
func (c *Conn) CloseWrite() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case c.err != nil:
		return c.err
	case c.closed:
		return net.ErrClosed
	}
	c.endSaid = true
	c.kickLocked()
	return nil
}

// Close implements net.Conn. What has been written is still delivered, for
// Limit at most.
func (c *Conn) Close() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return net.ErrClosed
	}
	c.closed, c.endSaid, c.full = true, true, false
	c.dropLocked(&c.kept)
	if c.over {
		return nil
	}
	c.expiry.Reset(c.cfg.Limit)
	c.kickLocked()
	c.readOnLocked()
	c.settleLocked()
	c.cond.Broadcast()
	return nil
}

// Abort implements tunnel.Stream.
func (c *Conn) Abort(err error) {
	if err == nil {
		err = net.ErrClosed
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.failLocked(err, true)
}

// LocalAddr implements net.Conn: the carrier stream's, of the last there was.
func (c *Conn) LocalAddr() net.Addr { return c.address(&c.local) }

// RemoteAddr implements net.Conn.
func (c *Conn) RemoteAddr() net.Addr { return c.address(&c.remote) }

func (c *Conn) address(a *net.Addr) net.Addr {
	c.mu.Lock()
	defer c.mu.Unlock()
	if *a == nil {
		return &net.TCPAddr{}
	}
	return *a
}

// SetDeadline implements net.Conn.
func (c *Conn) SetDeadline(t time.Time) error {
	c.SetReadDeadline(t)
	return c.SetWriteDeadline(t)
}

// SetReadDeadline implements net.Conn.
func (c *Conn) SetReadDeadline(t time.Time) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.readBy.set(t)
	if c.under != nil {
		c.under.SetReadDeadline(t)
	}
	return nil
}

// SetWriteDeadline implements net.Conn. It bounds the wait for room.
func (c *Conn) SetWriteDeadline(t time.Time) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.writeBy.set(t)
	return nil
}
