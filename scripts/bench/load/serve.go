package main

import (
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/netip"
	"sync"
	"time"

	"culvert/scripts/bench/internal/packet"
)

// What a TCP connection asks the far end for, with its first byte.
const (
	wantBytes = 'd' // send me all you can
	takeBytes = 'u' // take all that I send
	wantTally = 't' // and four bytes, a run: what has come of it
)

// tally is what the far end has received of one run.
type tally struct {
	Received int     `json:"received"`
	OldestMs float64 `json:"oldest_ms"`
}

// farEnd sends packets back and keeps a tally of each run.
type farEnd struct {
	mu   sync.Mutex // guards all below
	runs map[uint32]*tally
}

// maxRuns bounds the tallies; past it the old ones are forgotten.
const maxRuns = 4096

func (f *farEnd) count(p packet.Packet, now time.Time) {
	if !p.Counts {
		return
	}
	age := float64(now.Sub(p.Sent).Microseconds()) / 1e3
	f.mu.Lock()
	defer f.mu.Unlock()
	t := f.runs[p.Run]
	if t == nil {
		if len(f.runs) >= maxRuns {
			clear(f.runs)
		}
		t = &tally{}
		f.runs[p.Run] = t
	}
	t.Received++
	t.OldestMs = max(t.OldestMs, age)
}

func (f *farEnd) tally(run uint32) tally {
	f.mu.Lock()
	defer f.mu.Unlock()
	if t := f.runs[run]; t != nil {
		return *t
	}
	return tally{}
}

// serve is the far end on UDP and TCP at each address; it returns only with an error.
func serve(addrs []string) error {
	far := &farEnd{runs: map[uint32]*tally{}}
	failed := make(chan error)
	for _, addr := range addrs {
		a, err := netip.ParseAddrPort(addr)
		if err != nil {
			return err
		}
		udp, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(a))
		if err != nil {
			return err
		}
		// What the kernel gives is its own decision (net.core.rmem_max).
		_ = udp.SetReadBuffer(8 << 20)
		_ = udp.SetWriteBuffer(8 << 20)
		tcp, err := net.Listen("tcp", addr)
		if err != nil {
			return err
		}
		for range 2 { // as many as the machine that the figures are from has cores
			go func() { failed <- far.echo(udp) }()
		}
		go func() { failed <- far.accept(tcp) }()
	}
	fmt.Println("ready")
	return <-failed
}

func (f *farEnd) echo(c *net.UDPConn) error {
	b := make([]byte, 65536)
	for {
		n, from, err := c.ReadFromUDPAddrPort(b)
		if err != nil {
			return err
		}
		if p, ok := packet.Get(b[:n]); ok {
			now := time.Now()
			packet.Turn(b, now)
			f.count(p, now)
		}
		// A packet that can't be sent back is a lost one, and is counted as that.
		_, _ = c.WriteToUDPAddrPort(b[:n], from)
	}
}

func (f *farEnd) accept(l net.Listener) error {
	for {
		c, err := l.Accept()
		if err != nil {
			return err
		}
		go func() {
			defer c.Close()
			f.serveTCP(c)
		}()
	}
}

// serveTCP does what the first byte asks for, until the other side leaves.
func (f *farEnd) serveTCP(c net.Conn) {
	var want [1]byte
	if _, err := io.ReadFull(c, want[:]); err != nil {
		return
	}
	switch want[0] {
	case wantBytes:
		b := make([]byte, 256<<10)
		for {
			if _, err := c.Write(b); err != nil {
				return
			}
		}
	case takeBytes:
		// Its error is the other side's leaving.
		_, _ = io.Copy(io.Discard, c)
	case wantTally:
		var run [4]byte
		if _, err := io.ReadFull(c, run[:]); err == nil {
			// The asker sees a failed write as a cut answer.
			_ = json.NewEncoder(c).Encode(f.tally(binary.BigEndian.Uint32(run[:])))
		}
	}
}

// askTally asks the far end what it has received of a run.
func askTally(far netip.AddrPort, run uint32) (tally, error) {
	var t tally
	c, err := net.DialTimeout("tcp", far.String(), 5*time.Second)
	if err != nil {
		return t, err
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
		return t, err
	}
	if _, err := c.Write(binary.BigEndian.AppendUint32([]byte{wantTally}, run)); err != nil {
		return t, err
	}
	err = json.NewDecoder(c).Decode(&t)
	return t, err
}
