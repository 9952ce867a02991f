package media

// windowBits is how far back a datagram may come and still be told from a
// duplicate: two thirds of a second at 1,500 packets a second.
const windowBits = 1024

// A Window removes duplicates by the 16-bit number that each datagram carries
// in its association. It is not safe for concurrent use. The zero value takes
// whatever number comes first.
type Window struct {
	bits    [windowBits / 64]uint64 // bit n%windowBits: n has been seen
	highest uint16
	started bool
	due     uint64 // numbers up to highest, the first included
}

// Due returns how many datagrams should have come by now, counted from the first
// to the one with the highest number.
func (w *Window) Due() uint64 { return w.due }

// Fresh reports whether the number n is new, and remembers it. A number that
// lies behind the window can not be told from a duplicate and is not fresh.
func (w *Window) Fresh(n uint16) bool {
	if !w.started {
		w.started, w.highest, w.due = true, n, 1
		w.set(n)
		return true
	}
	ahead := int(int16(n - w.highest)) // RFC 1982 order
	switch {
	case ahead > 0:
		if ahead >= windowBits {
			clear(w.bits[:])
		} else {
			for i := 1; i <= ahead; i++ {
				w.clear(w.highest + uint16(i))
			}
		}
		w.highest = n
		w.due += uint64(ahead)
	case -ahead >= windowBits || w.has(n):
		return false
	}
	w.set(n)
	return true
}

func (w *Window) set(n uint16)      { w.bits[n%windowBits/64] |= 1 << (n % 64) }
func (w *Window) clear(n uint16)    { w.bits[n%windowBits/64] &^= 1 << (n % 64) }
func (w *Window) has(n uint16) bool { return w.bits[n%windowBits/64]&(1<<(n%64)) != 0 }
