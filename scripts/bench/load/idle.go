package main

import (
	"time"

	"culvert/scripts/bench/internal/measure"
	"culvert/scripts/bench/internal/packet"
	"culvert/scripts/bench/internal/proc"
	"culvert/scripts/bench/internal/socks5"
)

// idle holds o.flows associations, each of which has carried one packet each
// way, and reports what one costs the processes in memory.
func idle(o *options) (measure.Result, error) {
	var r measure.Result
	// One flow first, so that what is paid once is not shared out among all.
	settled, err := o.open(1)
	if err != nil {
		return r, err
	}
	defer closeAll(settled)
	ping(settled, o)
	time.Sleep(o.warm)
	before, err := proc.Of(o.pids)
	if err != nil {
		return r, err
	}
	flows, err := o.open(o.flows)
	if err != nil {
		return r, err
	}
	defer closeAll(flows)
	ping(flows, o)
	time.Sleep(o.dur)
	back := ping(flows, o)
	if back == 0 {
		return r, errNothing
	}
	after, err := proc.Of(o.pids)
	if err != nil {
		return r, err
	}
	r.Flows, r.Failed, r.Back = o.flows, o.flows-back, back
	r.PerFlowKB = float64(after.RSS-before.RSS) / 1e3 / float64(o.flows)
	r.RSS = float64(after.RSS) / 1e6
	return r, nil
}

// ping sends one packet on each flow, one after the other, and counts the echoes.
func ping(flows []*socks5.Flow, o *options) (back int) {
	b := make([]byte, 65536)
	for i, f := range flows {
		datagram, payload := f.Buffer(o.size)
		packet.Put(payload, packet.Packet{Flow: uint16(i), Sent: time.Now()}, packet.Audio)
		if err := f.Write(datagram); err != nil {
			continue
		}
		if _, err := f.Read(b, time.Now().Add(2*time.Second)); err == nil {
			back++
		}
	}
	return back
}

// first opens an association and sends one packet, again and again, and
// reports how long the echo took from the very beginning.
func first(o *options) (measure.Result, error) {
	r := measure.Result{Flows: o.times}
	var took []time.Duration
	for range o.times {
		start := time.Now()
		flows, err := o.open(1)
		if err != nil {
			return r, err
		}
		if ping(flows, o) == 1 {
			took = append(took, time.Since(start))
		}
		closeAll(flows)
	}
	if len(took) == 0 {
		return r, errNothing
	}
	r.Failed, r.Back = o.times-len(took), len(took)
	d := measure.Quantiles(took)
	r.First = &d
	return r, nil
}
