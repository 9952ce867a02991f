package netcall

import (
	"encoding/binary"
	"net"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"time"

	"culvert/cmd/internal/netpair"
)

// Far is the far end of calls: it stamps packets and sends them back.
type Far struct {
	Addr netip.AddrPort // on the loopback of its namespace
	udp  *net.UDPConn

	mu    sync.Mutex // guards the fields below
	ids   uint32
	heard map[uint32]*heard // by flow
}

// heard is what has come of one flow.
type heard struct {
	from []netip.AddrPort
	came []Arrival
	seen map[uint32]bool
	more int // came a second time
}

// NewFar begins to answer in a namespace, until the test ends.
func NewFar(t testing.TB, at *netpair.Space) *Far {
	t.Helper()
	f := &Far{heard: map[uint32]*heard{}}
	err := at.Do(func() (err error) {
		f.udp, err = net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	f.Addr = f.udp.LocalAddr().(*net.UDPAddr).AddrPort()
	done := make(chan struct{})
	go func() {
		defer close(done)
		f.echo()
	}()
	t.Cleanup(func() { f.udp.Close(); <-done })
	return f
}

func (f *Far) echo() {
	for b := make([]byte, 65536); ; {
		n, from, err := f.udp.ReadFromUDPAddrPort(b)
		if err != nil {
			return
		}
		if n < least {
			continue
		}
		now := time.Now()
		f.take(b[:n], from, now)
		binary.BigEndian.PutUint64(b[28:], uint64(now.UnixNano()))
		f.udp.WriteToUDPAddrPort(b[:n], from) // what can not leave is lost like the rest
	}
}

func (f *Far) take(p []byte, from netip.AddrPort, now time.Time) {
	f.mu.Lock()
	defer f.mu.Unlock()
	h := f.heard[binary.BigEndian.Uint32(p[12:])]
	if h == nil {
		return // of no call of ours
	}
	if !slices.Contains(h.from, from) {
		h.from = append(h.from, from)
	}
	n := binary.BigEndian.Uint32(p[16:])
	if h.seen[n] {
		h.more++
	}
	h.seen[n] = true
	h.came = append(h.came, Arrival{n, now, now.Sub(time.Unix(0, int64(binary.BigEndian.Uint64(p[20:]))))})
}

// next is a number for a new flow.
func (f *Far) next() uint32 {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.ids++
	f.heard[f.ids] = &heard{seen: map[uint32]bool{}}
	return f.ids
}

func (f *Far) of(flow uint32) heard {
	f.mu.Lock()
	defer f.mu.Unlock()
	return *f.heard[flow]
}

func (f *Far) arrivals(flow uint32) []Arrival     { return f.of(flow).came }
func (f *Far) repeated(flow uint32) int           { return f.of(flow).more }
func (f *Far) ports(flow uint32) []netip.AddrPort { return slices.Clone(f.of(flow).from) }
