package media

import (
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"culvert/tunnel"
	"culvert/tunnel/wire"
)

const (
	// maxRecord is the longest record, in bytes: a full header with a name of
	// 255 bytes, and the largest datagram that UDP has.
	maxRecord = wire.ShortHeader + 4 + 1 + 2 + 255 + 2 + 65507
	maxPieces = 255

	// What a Joiner holds at most: records of which not all has come, the bytes
	// for them, and how long it waits for the rest of one. The pieces of a
	// record leave together, so what is missing after so long was lost.
	maxJoining      = 16
	maxJoiningBytes = 1 << 20
	joinLife        = 500 * time.Millisecond
)

// A Cutter cuts records that are too long for a way into wire.Fragment notices.
// The zero value is ready. It may be used concurrently. All ways of one session
// and direction must share one: it gives the IDs.
type Cutter struct {
	id    atomic.Uint32
	spare sync.Pool // of *[]byte
}

// Cut gives record to send in pieces of at most max bytes, first to last; one
// that fits goes as it is. It borrows record, and send borrows piece, until it
// returns. The first error of send ends it and is returned. A record that would
// need more than 255 pieces, or is longer than any datagram makes it (65,507
// bytes and their header), is tunnel.ErrTooLarge.
func (c *Cutter) Cut(record []byte, max int, send func(piece []byte) error) error {
	if len(record) <= max {
		return send(record)
	}
	room := max - wire.FragmentHeader
	if room <= 0 || len(record) > maxRecord || len(record) > maxPieces*room {
		return tunnel.ErrTooLarge
	}
	buf, _ := c.spare.Get().(*[]byte)
	if buf == nil {
		buf = new([]byte)
	}
	defer c.spare.Put(buf)
	f := wire.Fragment{ID: uint16(c.id.Add(1)), Count: uint8((len(record) + room - 1) / room)}
	for ; f.Index < f.Count; f.Index++ {
		n := min(room, len(record))
		f.Piece, record = record[:n], record[n:]
		*buf = f.Append((*buf)[:0])
		if err := send(*buf); err != nil {
			return err
		}
	}
	return nil
}

// A Joiner puts records together again that a Cutter has cut. The zero value is
// ready. It may be used concurrently.
//
// What a peer can make it hold is bounded: 16 records, 1 MiB and what one
// buffer grows by, 500 ms; beyond that the oldest record is dropped. Memory is
// taken for bytes that have come, never for those that a piece announces.
type Joiner struct {
	// Drops takes FragmentLost for each record that was given up, FragmentBad
	// for each piece that contradicts itself or others, and Duplicate. It may
	// be nil and is set before the first use.
	Drops *Drops

	mu   sync.Mutex
	open []*joining            // oldest first
	over [2 * maxJoining]ended // a ring of those that are open no more
	next int                   // in over
}

// joining is a record of which a part has come. All pieces but the last are
// equally long, so body needs no gaps: it holds them as they came.
type joining struct {
	id    uint16
	count uint8
	since time.Time
	piece int              // the length of each piece but the last; 0: none has come
	body  []byte           // those pieces, in order of arrival
	slot  [maxPieces]uint8 // by index: the place in body, from 1 on; 0: has not come
	last  []byte           // the last piece; nil: has not come
}

// ended remembers a record's end as long as pieces of it may straggle in.
type ended struct {
	id    uint16
	whole bool
	at    time.Time // the zero time: nothing is remembered
}

// Take takes one piece, and returns the record that it completes, or nil. It
// borrows f.Piece; the record is the caller's. It is never a notice: those are
// not long enough to be cut, so no fragment lies within fragments.
func (j *Joiner) Take(f wire.Fragment, now time.Time) (record []byte) {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.expire(now)
	if f.Count < 2 || f.Index >= f.Count || len(f.Piece) == 0 {
		j.count(FragmentBad)
		return nil
	}
	for len(j.open) > 0 && j.held()+len(f.Piece) > maxJoiningBytes {
		j.giveUp(now)
	}
	for _, e := range j.over {
		if e.id == f.ID && now.Sub(e.at) <= joinLife {
			if e.whole {
				j.count(Duplicate)
			} // else the record has been counted
			return nil
		}
	}
	var r *joining
	at := slices.IndexFunc(j.open, func(r *joining) bool { return r.id == f.ID })
	if at >= 0 {
		r = j.open[at]
	} else {
		r = &joining{id: f.ID, count: f.Count, since: now}
	}
	switch {
	case !r.fits(f):
		j.count(FragmentBad)
		return nil
	case r.has(f.Index):
		j.count(Duplicate)
		return nil
	}
	if at < 0 {
		for len(j.open) >= maxJoining {
			j.giveUp(now)
		}
		at = len(j.open)
		j.open = append(j.open, r)
	}
	r.add(f)
	if !r.complete() {
		return nil
	}
	j.close(at, true, now)
	if record = r.join(); wire.IsNotice(record) {
		j.count(FragmentBad)
		return nil
	}
	return record
}

// Expire gives up the records whose rest has not come in time. Take does so
// too: Expire is for when no more pieces come.
func (j *Joiner) Expire(now time.Time) {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.expire(now)
}

func (j *Joiner) expire(now time.Time) {
	for len(j.open) > 0 && now.Sub(j.open[0].since) > joinLife {
		j.giveUp(now)
	}
}

// giveUp drops the oldest.
func (j *Joiner) giveUp(now time.Time) {
	j.close(0, false, now)
	j.count(FragmentLost)
}

func (j *Joiner) close(at int, whole bool, now time.Time) {
	j.over[j.next] = ended{j.open[at].id, whole, now}
	j.next = (j.next + 1) % len(j.over)
	j.open = slices.Delete(j.open, at, at+1)
}

func (j *Joiner) held() (n int) {
	for _, r := range j.open {
		n += cap(r.body) + cap(r.last)
	}
	return n
}

func (j *Joiner) count(r Reason) {
	if j.Drops != nil {
		j.Drops.Add(r)
	}
}

// fits reports whether a piece agrees with what has come, and with the longest
// record there can be.
func (r *joining) fits(f wire.Fragment) bool {
	n, others := len(f.Piece), int(f.Count)-1
	if f.Count != r.count {
		return false
	}
	if int(f.Index) == others {
		return (r.piece == 0 || n <= r.piece) && others*max(r.piece, n)+n <= maxRecord
	}
	return (r.piece == 0 || n == r.piece) && n >= len(r.last) && others*n+max(len(r.last), 1) <= maxRecord
}

func (r *joining) has(index uint8) bool {
	return r.slot[index] != 0 || index == r.count-1 && r.last != nil
}

func (r *joining) add(f wire.Fragment) {
	if f.Index == r.count-1 {
		r.last = slices.Clone(f.Piece)
		return
	}
	r.piece = len(f.Piece)
	r.body = append(r.body, f.Piece...)
	r.slot[f.Index] = uint8(len(r.body) / r.piece)
}

func (r *joining) complete() bool {
	return r.last != nil && len(r.body) == int(r.count-1)*r.piece && r.piece > 0
}

func (r *joining) join() []byte {
	whole := make([]byte, 0, len(r.body)+len(r.last))
	for _, s := range r.slot[:r.count-1] {
		whole = append(whole, r.body[int(s-1)*r.piece:][:r.piece]...)
	}
	return append(whole, r.last...)
}
