package main

import (
	"sync"
	"sync/atomic"
	"time"

	"culvert/scripts/bench/internal/measure"
	"culvert/scripts/bench/internal/packet"
	"culvert/scripts/bench/internal/socks5"
)

// closed keeps o.window packets under way on each flow: one that comes back
// lets another go. What does not come back for stall is taken for lost and
// sent anew, so that lost packets don't end the flow.
func closed(o *options) (measure.Result, error) {
	var r measure.Result
	flows, err := o.open(o.flows)
	if err != nil {
		return r, err
	}
	defer closeAll(flows)
	var echoes atomic.Int64
	var stop atomic.Bool
	var running sync.WaitGroup
	for i, f := range flows {
		f.SetBuffers(kernelBuffer)
		running.Go(func() { pingPong(f, uint16(i), o, &echoes, &stop) })
	}
	defer running.Wait()
	defer stop.Store(true)
	m, err := o.begin(time.Now().Add(o.warm))
	if err != nil {
		return r, err
	}
	before := echoes.Load()
	time.Sleep(o.dur)
	n := echoes.Load() - before
	cpu, elapsed, rss, err := m.end()
	if err != nil {
		return r, err
	}
	if n == 0 {
		return r, errNothing
	}
	r.Flows, r.Back, r.Echoes = o.flows, int(n), float64(n)/elapsed.Seconds()
	if len(o.pids) > 0 {
		r.CPUPerPacket = float64(cpu.Microseconds()) / float64(2*n)
		r.RSS = float64(rss) / 1e6
	}
	return r, nil
}

// stall is how long nothing may come back before the window is sent anew.
const stall = 100 * time.Millisecond

// pingPong is one flow: it fills the window, then answers each packet that
// comes back with the next one.
func pingPong(f *socks5.Flow, id uint16, o *options, echoes *atomic.Int64, stop *atomic.Bool) {
	datagram, payload := f.Buffer(o.size)
	b := make([]byte, 65536)
	next := uint32(0)
	send := func(n int) {
		for range n {
			packet.Put(payload, packet.Packet{Flow: id, Sequence: next, Sent: time.Now()}, packet.Video)
			next++
			// A refused packet is a lost one.
			_ = f.Write(datagram)
		}
	}
	send(o.window)
	for !stop.Load() {
		body, err := f.Read(b, time.Now().Add(stall))
		if err != nil {
			send(o.window)
			continue
		}
		if _, ok := packet.Get(body); ok {
			echoes.Add(1)
			send(1)
		}
	}
}
