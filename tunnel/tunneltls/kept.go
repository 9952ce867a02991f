package tunneltls

import "time"

const (
	// maxKept is how many bytes of datagrams a lane keeps until they are
	// acknowledged: 25 Mbit/s on four lanes at a round trip of 40 ms. What is
	// older is forgotten.
	maxKept = 32 << 10
	// A lane asks for one byte to go again on others for spareShare bytes that
	// it takes, and saves up to maxSpare.
	spareShare = 4
	maxSpare   = 32 << 10
	// grace is what an acknowledgement may take beside a round trip: the peer
	// waits for a second packet before it sends one, and a thin lane has one
	// each 10 ms. A repetition within the lane takes half a round trip more, so
	// this is early enough to be of use when that is lost too.
	grace = 15 * time.Millisecond
)

// kept is the datagrams that a lane has taken and the peer's TCP has not
// acknowledged, oldest first, and how many bytes of them may go again.
//
// The buffer is twice as large as what it may hold, so that no more is ever
// moved to its front than was appended.
type kept struct {
	buf   []byte
	recs  []keptRecord
	head  int    // the oldest in recs
	last  uint64 // the number of the newest
	spare int
}

// A keptRecord is one datagram.
type keptRecord struct {
	at, end int       // in buf
	number  uint64    // counts from 1
	upto    uint64    // bytes that TCP was given with it, in all; 0: it waits for the writer
	since   time.Time // when it was taken
	again   bool      // it went on another lane too
}

// push keeps a copy of p.
func (k *kept) push(p []byte, since time.Time) {
	k.last++
	k.spare = min(k.spare+len(p)/spareShare, maxSpare)
	if len(p) > maxKept {
		return
	}
	for k.head < len(k.recs) && len(k.buf)-k.recs[k.head].at+len(p) > maxKept {
		k.head++
	}
	switch {
	case k.head == len(k.recs):
		k.buf, k.recs, k.head = k.buf[:0], k.recs[:0], 0
	case len(k.buf)+len(p) > 2*maxKept:
		k.compact()
	}
	k.buf = append(k.buf, p...)
	k.recs = append(k.recs, keptRecord{at: len(k.buf) - len(p), end: len(k.buf), number: k.last, since: since})
}

// compact moves what is kept to the front.
func (k *kept) compact() {
	first := k.recs[k.head].at
	k.buf = k.buf[:copy(k.buf, k.buf[first:])]
	k.recs = k.recs[:copy(k.recs, k.recs[k.head:])]
	k.head = 0
	for i := range k.recs {
		k.recs[i].at -= first
		k.recs[i].end -= first
	}
}

// wrote notes that TCP has been given all up to a number, and how many bytes
// since the connection began.
func (k *kept) wrote(number, upto uint64) {
	for i := len(k.recs) - 1; i >= k.head && k.recs[i].upto == 0; i-- {
		if k.recs[i].number <= number {
			k.recs[i].upto = upto
		}
	}
}

// acked forgets what the peer has.
func (k *kept) acked(upto uint64) {
	for k.head < len(k.recs) && k.recs[k.head].upto != 0 && k.recs[k.head].upto <= upto {
		k.head++
	}
}

// overdue offers again, oldest first, what was taken before due and is younger
// than limit, each until it has been accepted once. It stops at the first that
// is refused or that spare does not cover, and returns whether anything was
// taken before due.
func (k *kept) overdue(due, limit time.Time, again func(p []byte, since time.Time) bool) (late bool) {
	for i := k.head; i < len(k.recs); i++ {
		rec := &k.recs[i]
		if rec.upto == 0 || rec.since.After(due) {
			break
		}
		late = true
		if rec.again || rec.since.Before(limit) {
			continue
		}
		if n := rec.end - rec.at; n > k.spare || !again(k.buf[rec.at:rec.end:rec.end], rec.since) {
			break
		} else {
			rec.again = true
			k.spare -= n
		}
	}
	return late
}

// free gives the memory back.
func (k *kept) free() { *k = kept{last: k.last, spare: k.spare} }
