package link

import (
	"io"
	"sync"
	"time"
)

// Settings are what the link does. The zero value passes everything at once.
type Settings struct {
	Delay   time.Duration // one-way
	UDPRate float64       // bits/s of UDP in each direction; 0: no limit
	Queue   time.Duration // longest that UDPRate may hold a packet; what would wait longer is dropped
	MaxUDP  int           // longest UDP packet that passes, in bytes with its IP header; 0: any
	NoUDP   bool
	NoTCP   bool
	Down    bool // nothing passes
}

// Counts is what came from the near end since the link was made, whether or
// not it was let through.
type Counts struct {
	UDP, TCP int
	// QUICLong is of those UDP packets that have a long header (RFC 9000
	// §17.2): a handshake sends some, an established connection none.
	QUICLong int
	SYN      int // of TCP, first packets of a connection
}

// most bounds the packets on the way in one direction.
const most = 1 << 14

// Link carries packets between two devices until they are closed.
type Link struct {
	wg sync.WaitGroup

	mu       sync.Mutex // guards all below
	settings Settings
	count    Counts
	nat      nat
	free     [2]time.Time // by direction: when the UDP rate has sent all that it took
}

// Directions.
const (
	toFar = iota
	toNear
)

// lines are the packets on the way in one direction: UDP, which its rate may
// hold, and all else, which does not wait for it.
type lines [2]chan travelling

// of is the line for a packet.
func (s lines) of(p []byte) chan<- travelling {
	if protocol(p) == udp {
		return s[0]
	}
	return s[1]
}

type travelling struct {
	due    time.Time
	packet []byte
}

// New begins to carry IP packets, one a read and one a write, between two
// devices.
func New(near, far io.ReadWriter, s Settings) *Link {
	l := &Link{settings: s, nat: newNAT()}
	for direction, ends := range [][2]io.ReadWriter{toFar: {near, far}, toNear: {far, near}} {
		var lines lines
		for i := range lines {
			lines[i] = make(chan travelling, most)
			l.wg.Go(func() { write(ends[1], lines[i]) })
		}
		l.wg.Go(func() { l.read(ends[0], direction, lines) })
	}
	return l
}

// Close waits until the link has noticed that its devices are closed.
func (l *Link) Close() { l.wg.Wait() }

// Change changes what the link does with all packets that come from now on.
func (l *Link) Change(f func(*Settings)) {
	l.mu.Lock()
	defer l.mu.Unlock()
	f(&l.settings)
}

// Rebind makes the NAT forget all UDP flows of the near end: each has another
// source port from its next packet on, and what is sent to the old one is lost.
func (l *Link) Rebind() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.nat.rebind()
}

// Counts returns what came from the near end so far.
func (l *Link) Counts() Counts {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.count
}

// read takes packets until the device is closed.
func (l *Link) read(in io.Reader, direction int, to lines) {
	defer func() {
		for _, line := range to {
			close(line)
		}
	}()
	b := make([]byte, 65536)
	for {
		n, err := in.Read(b)
		if err != nil {
			return
		}
		p := append([]byte(nil), b[:n]...)
		due, passes := l.take(p, direction, time.Now())
		if !passes {
			continue
		}
		select {
		case to.of(p) <- travelling{due, p}:
		default: // more on the way than a link holds
		}
	}
}

// write puts packets out when they are due, until there are no more. A packet
// that the device refuses is lost alone: it may be down for a while.
func write(out io.Writer, line <-chan travelling) {
	for t := range line {
		time.Sleep(time.Until(t.due))
		_, _ = out.Write(t.packet)
	}
}

// take says whether a packet passes, and when it is due. It may change it.
func (l *Link) take(p []byte, direction int, now time.Time) (due time.Time, passes bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	s, what := &l.settings, protocol(p)
	if direction == toFar {
		l.count.add(p, what)
	}
	switch {
	case s.Down, s.NoUDP && what == udp, s.NoTCP && what == tcp, what == udp && s.MaxUDP > 0 && len(p) > s.MaxUDP:
		return due, false
	case what == udp && !l.nat.translate(p, direction):
		return due, false
	}
	due = now
	if what == udp && s.UDPRate > 0 {
		if l.free[direction].After(now) {
			due = l.free[direction]
		}
		if due.Sub(now) > s.Queue {
			return due, false
		}
		due = due.Add(time.Duration(float64(len(p)*8) / s.UDPRate * float64(time.Second)))
		l.free[direction] = due
	}
	return due.Add(s.Delay), true
}

// Protocol numbers of IP.
const (
	tcp = 6
	udp = 17
)

// protocol is the protocol number of an IP packet; 0 where it is none.
func protocol(p []byte) byte {
	switch {
	case len(p) >= 20 && p[0]>>4 == 4:
		return p[9]
	case len(p) >= 40 && p[0]>>4 == 6:
		return p[6]
	}
	return 0
}

// segment is what is inside an IPv4 packet that is no later fragment and holds
// a UDP header at least; nil: it is none.
func segment(p []byte) []byte {
	if len(p) < 20 || p[0]>>4 != 4 || p[6]&0x1f != 0 || p[7] != 0 {
		return nil
	}
	if head := int(p[0]&15) * 4; head >= 20 && len(p) >= head+8 {
		return p[head:]
	}
	return nil
}

func (c *Counts) add(p []byte, what byte) {
	s := segment(p)
	switch what {
	case udp:
		c.UDP++
		if len(s) > 8 && s[8]&0x80 != 0 {
			c.QUICLong++
		}
	case tcp:
		c.TCP++
		if len(s) >= 20 && s[13]&0x12 == 0x02 { // SYN without ACK
			c.SYN++
		}
	}
}
