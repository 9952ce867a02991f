package netcall

import (
	"encoding/binary"
	"io"
	"net"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"time"

	"culvert/cmd/internal/netpair"
)

// A packet, all numbers big-endian:
//
//	 0  RTP header (RFC 3550 §5.1): version 2, payload type, sequence, timestamp, SSRC
//	12  flow        4 bytes
//	16  sequence    4 bytes, in full
//	20  sent        8 bytes, ns since 1970
//	28  turned      8 bytes, when the far end sent it back; 0: it did not yet
//	36  padding
const least = 36

// Flow is one association with one stream of RTP.
type Flow struct {
	Rate int // packets/s
	Size int // bytes of a packet
	kind byte
}

// Sound is a flow of audio, by its payload type.
func Sound(rate, size int) Flow { return Flow{rate, size, 111} }

// Picture is a flow of video.
func Picture(rate, size int) Flow { return Flow{rate, size, 96} }

// Arrival is a packet that has come to one of the ends.
type Arrival struct {
	Sequence uint32
	At       time.Time
	Age      time.Duration // one-way, since this end's peer has sent it
}

// patience bounds each wait for something that must happen.
const patience = time.Minute

// Call is some flows that run.
type Call struct {
	t     testing.TB
	far   *Far
	flows []*flow
	end   chan struct{}
	stop  sync.Once
	wg    sync.WaitGroup
}

type flow struct {
	Flow
	id   uint32
	call *Call
	udp  net.Conn

	mu   sync.Mutex // guards the fields below
	back []Arrival
	seen map[uint32]bool
	more int // came a second time
	sent uint32
}

// Begin opens an association for each flow at the proxy, which listens in the
// near end, and begins to send. It returns when something has come back on each.
func Begin(t testing.TB, near *netpair.Space, proxy netip.AddrPort, far *Far, flows ...Flow) *Call {
	t.Helper()
	c := &Call{t: t, far: far, end: make(chan struct{})}
	t.Cleanup(c.close)
	for _, f := range flows {
		c.flows = append(c.flows, c.open(near, proxy, f))
	}
	for _, f := range c.flows {
		c.wg.Go(f.receive)
		c.wg.Go(f.send)
	}
	for i, f := range c.flows {
		for end := time.Now().Add(patience); f.count() == 0; time.Sleep(time.Millisecond) {
			if time.Now().After(end) {
				t.Fatalf("nothing comes back on flow %d", i)
			}
		}
	}
	return c
}

// open makes an association (RFC 1928 §4, §7) whose TCP connection stays open.
func (c *Call) open(near *netpair.Space, proxy netip.AddrPort, what Flow) *flow {
	c.t.Helper()
	f := &flow{Flow: what, call: c, id: c.far.next(), seen: map[uint32]bool{}}
	err := near.Do(func() error {
		control, err := net.Dial("tcp", proxy.String())
		if err != nil {
			return err
		}
		c.t.Cleanup(func() { control.Close() })
		control.SetDeadline(time.Now().Add(patience))
		if _, err := control.Write([]byte{5, 1, 0, 5, 3, 0, 1, 0, 0, 0, 0, 0, 0}); err != nil {
			return err
		}
		var answer [12]byte
		if _, err := io.ReadFull(control, answer[:]); err != nil {
			return err
		}
		if answer[3] != 0 {
			c.t.Fatalf("UDP ASSOCIATE: reply %d", answer[3])
		}
		relay := netip.AddrPortFrom(netip.AddrFrom4([4]byte(answer[6:10])), binary.BigEndian.Uint16(answer[10:]))
		f.udp, err = net.Dial("udp4", relay.String())
		return err
	})
	if err != nil {
		c.t.Fatalf("an association: %v", err)
	}
	return f
}

// head is before each datagram to and from the proxy: an IPv4 address.
const head = 10

func (f *flow) send() {
	to := f.call.far.Addr
	b := make([]byte, head+max(f.Size, least))
	b[3] = 1
	copy(b[4:], to.Addr().AsSlice())
	binary.BigEndian.PutUint16(b[8:], to.Port())
	p := b[head:]
	p[0], p[1] = 2<<6, f.kind
	binary.BigEndian.PutUint32(p[8:], f.id)
	binary.BigEndian.PutUint32(p[12:], f.id)
	began, every := time.Now(), time.Second/time.Duration(f.Rate)
	for n := uint32(0); ; n++ {
		select {
		case <-f.call.end:
			return
		case <-time.After(time.Until(began.Add(time.Duration(n) * every))):
		}
		binary.BigEndian.PutUint16(p[2:], uint16(n))
		binary.BigEndian.PutUint32(p[4:], n*uint32(48000/f.Rate))
		binary.BigEndian.PutUint32(p[16:], n)
		binary.BigEndian.PutUint64(p[20:], uint64(time.Now().UnixNano()))
		f.mu.Lock()
		f.sent = n + 1
		f.mu.Unlock()
		f.udp.Write(b) // what can not leave is lost like the rest
	}
}

func (f *flow) receive() {
	for b := make([]byte, 65536); ; {
		n, err := f.udp.Read(b)
		if err != nil {
			return
		}
		now := time.Now()
		if n < head+least {
			continue
		}
		p := b[head:n]
		if binary.BigEndian.Uint32(p[12:]) != f.id {
			f.call.t.Errorf("a packet of flow %d came back on flow %d", binary.BigEndian.Uint32(p[12:]), f.id)
			continue
		}
		n32 := binary.BigEndian.Uint32(p[16:])
		age := now.Sub(time.Unix(0, int64(binary.BigEndian.Uint64(p[28:]))))
		f.mu.Lock()
		if f.seen[n32] {
			f.more++
		}
		f.seen[n32] = true
		f.back = append(f.back, Arrival{n32, now, age})
		f.mu.Unlock()
	}
}

func (f *flow) count() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return len(f.back)
}

// arrivals are those that came back, and those that came to the far end.
func (f *flow) arrivals() (back, there []Arrival) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.back[:len(f.back):len(f.back)], f.call.far.arrivals(f.id)
}

// End ends the sending. What is under way may still come back.
func (c *Call) End() { c.stop.Do(func() { close(c.end) }) }

func (c *Call) close() {
	c.End()
	for _, f := range c.flows {
		f.udp.Close()
	}
	c.wg.Wait()
}

// Gap is the longest time between from and to for which a flow had nothing
// come back.
func (c *Call) Gap(from, to time.Time) (longest time.Duration) {
	for i := range c.flows {
		longest = max(longest, c.GapOf(i, from, to))
	}
	return longest
}

// GapOf is Gap of one flow.
func (c *Call) GapOf(flow int, from, to time.Time) (longest time.Duration) {
	back, _ := c.flows[flow].arrivals()
	last := from
	for _, a := range back {
		if a.At.After(from) && a.At.Before(to) {
			longest, last = max(longest, a.At.Sub(last)), a.At
		}
	}
	return max(longest, to.Sub(last))
}

// After is how long it took from a moment until something had come back on each
// flow; false: it has not on all.
func (c *Call) After(from time.Time) (took time.Duration, ok bool) {
	for _, f := range c.flows {
		back, _ := f.arrivals()
		found := false
		for _, a := range back {
			if a.At.After(from) {
				took, found = max(took, a.At.Sub(from)), true
				break
			}
		}
		if !found {
			return 0, false
		}
	}
	return took, true
}

// Oldest is the age of the oldest packet that came to either end between from
// and to.
func (c *Call) Oldest(from, to time.Time) time.Duration { return c.OldestBut(0, from, to) }

// OldestBut is Oldest when the few oldest do not count.
func (c *Call) OldestBut(few int, from, to time.Time) time.Duration {
	oldest := make([]time.Duration, few+1) // of those so far, in ascending order
	for _, f := range c.flows {
		back, there := f.arrivals()
		for _, all := range [][]Arrival{back, there} {
			for _, a := range all {
				if a.At.After(from) && a.At.Before(to) && a.Age > oldest[0] {
					oldest[0] = a.Age
					slices.Sort(oldest)
				}
			}
		}
	}
	return oldest[0]
}

// Lost is how many packets did not come back of those that were sent between
// the two, which are numbers that Sent returned.
func (c *Call) Lost(flow int, from, to uint32) (lost int) {
	f := c.flows[flow]
	f.mu.Lock()
	defer f.mu.Unlock()
	for n := from; n < to; n++ {
		if !f.seen[n] {
			lost++
		}
	}
	return lost
}

// Sent is how many packets a flow has sent so far.
func (c *Call) Sent(flow int) uint32 {
	f := c.flows[flow]
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.sent
}

// Repeated is how many packets came to either end a second time.
func (c *Call) Repeated() (n int) {
	for _, f := range c.flows {
		f.mu.Lock()
		n += f.more
		f.mu.Unlock()
		n += c.far.repeated(f.id)
	}
	return n
}

// Ports are the addresses that the far end has heard each flow from, in order.
func (c *Call) Ports() (ports [][]netip.AddrPort) {
	for _, f := range c.flows {
		ports = append(ports, c.far.ports(f.id))
	}
	return ports
}
