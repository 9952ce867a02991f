package main

import (
	"errors"
	"math/rand/v2"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// Counts is what one direction has done so far.
type Counts struct {
	Passed  int `json:"passed"`
	Blocked int `json:"blocked"`
	Lost    int `json:"lost"`
	Full    int `json:"full"`
	// QueuedMs is the longest that the rate held a packet, since the last answer.
	QueuedMs float64 `json:"queued_ms"`
}

// held bounds the packets on the way in one direction: what 100 ms at 6 Gbit/s hold.
const held = 1 << 16

// direction carries packets one way: read decides about each as it comes, write
// puts it out when it is due.
type direction struct {
	in, out  *os.File
	settings *atomic.Pointer[settings]
	line     chan travelling
	spare    sync.Pool // of *[]byte, for packets of any size

	mu     sync.Mutex // guards all below
	shaper shaper
	count  Counts
}

type travelling struct {
	due    time.Time
	packet *[]byte
}

func newDirection(in, out *os.File, s *atomic.Pointer[settings]) *direction {
	return &direction{
		in: in, out: out, settings: s, line: make(chan travelling, held),
		spare:  sync.Pool{New: func() any { return new([]byte) }},
		shaper: shaper{random: rand.New(rand.NewPCG(rand.Uint64(), rand.Uint64()))},
	}
}

func (d *direction) counts() Counts {
	d.mu.Lock()
	defer d.mu.Unlock()
	c := d.count
	c.QueuedMs = float64(d.shaper.queued.Microseconds()) / 1e3
	d.shaper.queued = 0
	return c
}

func (d *direction) read() error {
	b := make([]byte, 65536)
	for {
		n, err := d.in.Read(b)
		if err != nil {
			return err
		}
		d.take(b[:n], time.Now())
	}
}

// take is one packet from the device; b is borrowed.
func (d *direction) take(b []byte, now time.Time) {
	d.mu.Lock()
	defer d.mu.Unlock()
	fate, due := d.shaper.decide(d.settings.Load(), b, now)
	switch fate {
	case blocked:
		d.count.Blocked++
	case lost:
		d.count.Lost++
	case full:
		d.count.Full++
	case passes:
		p := d.spare.Get().(*[]byte)
		*p = append((*p)[:0], b...)
		select {
		case d.line <- travelling{due, p}:
			d.count.Passed++
		default: // more on the way than held
			d.spare.Put(p)
			d.count.Full++
		}
	}
}

func (d *direction) write() error {
	for t := range d.line {
		sleepUntil(t.due)
		_, err := d.out.Write(*t.packet)
		// EINVAL: the kernel refuses what is no IP packet; EIO: the device is down. Both lose the packet alone.
		if err != nil && !errors.Is(err, syscall.EINVAL) && !errors.Is(err, syscall.EIO) {
			return err
		}
		d.spare.Put(t.packet)
	}
	return nil
}

// sleepUntil is time.Sleep without the runtime's timers, which an idle program
// serves to the millisecond only.
func sleepUntil(t time.Time) {
	if d := time.Until(t); d > 0 {
		pause := syscall.NsecToTimespec(int64(d))
		// Cut short by a signal, it lets a packet go too early; the runtime sends such signals only to busy threads.
		_ = syscall.Nanosleep(&pause, nil)
	}
}
