package main

import (
	"fmt"
	"math/rand/v2"
	"sync"
	"time"

	"culvert/scripts/bench/internal/measure"
	"culvert/scripts/bench/internal/packet"
	"culvert/scripts/bench/internal/socks5"
)

// stream is one flow that sends at a steady rate.
type stream struct {
	kind  kind
	id    uint16
	flow  *socks5.Flow
	sent  []time.Duration  // after begin; written by the sender until it ends
	back  []measure.Sample // written by the receiver until it ends
	gap   time.Duration    // likewise: the longest time without a packet
	ended chan struct{}    // the last packets have had their time
}

// paced sends packets at a steady rate and reports on those sent in o.dur.
func paced(o *options) (measure.Result, error) {
	var r measure.Result
	n := 0
	for _, k := range o.kinds {
		n += k.flows
	}
	if n == 0 {
		return r, fmt.Errorf("-kind is needed")
	}
	flows, err := o.open(n)
	if err != nil {
		return r, err
	}
	defer closeAll(flows)
	downloads, err := o.transfers(o.bulk)
	if err != nil {
		return r, err
	}
	defer downloads.close()
	run := rand.Uint32()
	start := time.Now().Add(o.warm)
	var streams []*stream
	var senders, receivers sync.WaitGroup
	for _, k := range o.kinds {
		for range k.flows {
			i := len(streams)
			flows[i].SetBuffers(kernelBuffer)
			s := &stream{kind: k, id: uint16(i), flow: flows[i], ended: make(chan struct{})}
			// Room for all, so that no figure has a slice's growth in it.
			room := int(o.dur.Seconds()*float64(k.rate)) + 2
			s.sent, s.back = make([]time.Duration, 0, room), make([]measure.Sample, 0, room)
			streams = append(streams, s)
			// Spread over one interval: flows of real calls have nothing to do with one another.
			phase := time.Duration(float64(time.Second) / float64(k.rate) * float64(i) / float64(n))
			receivers.Go(func() { s.receive(run, start) })
			senders.Go(func() { s.send(run, start.Add(phase-o.warm), start, start.Add(o.dur)) })
		}
	}
	m, err := o.begin(start)
	if err != nil {
		return r, err
	}
	bytes := downloads.total()
	time.Sleep(time.Until(start.Add(o.dur)))
	cpu, elapsed, rss, err := m.end()
	if err != nil {
		return r, err
	}
	r.Bulk = mbits(downloads.total()-bytes, elapsed)
	senders.Wait()
	time.Sleep(o.linger)
	for _, s := range streams {
		close(s.ended)
	}
	receivers.Wait()
	summarize(&r, streams, o)
	far, err := askTally(o.far, run)
	if err != nil {
		return r, fmt.Errorf("the far end's tally: %w", err)
	}
	r.Oldest = max(far.OldestMs, r.Up.Max, r.Down.Max)
	if len(o.pids) > 0 {
		r.CPUPerPacket = float64(cpu.Microseconds()) / float64(r.Sent+r.Back)
		r.RSS = float64(rss) / 1e6
	}
	return r, nil
}

func (s *stream) send(run uint32, first, start, end time.Time) {
	datagram, payload := s.flow.Buffer(s.kind.size)
	interval := time.Second / time.Duration(s.kind.rate)
	for n := uint32(0); ; n++ {
		at := first.Add(time.Duration(n) * interval)
		if !at.Before(end) {
			return
		}
		time.Sleep(time.Until(at))
		now := time.Now()
		counts := !at.Before(start)
		packet.Put(payload, packet.Packet{Run: run, Flow: s.id, Counts: counts, Sequence: n, Sent: now}, s.kind.payloadType)
		if counts {
			s.sent = append(s.sent, now.Sub(start))
		}
		// A refused packet is a lost one: it has been counted as sent.
		_ = s.flow.Write(datagram)
	}
}

func (s *stream) receive(run uint32, start time.Time) {
	b := make([]byte, 65536)
	last := time.Time{}
	for {
		select {
		case <-s.ended:
			return
		default:
		}
		body, err := s.flow.Read(b, time.Now().Add(200*time.Millisecond))
		if err != nil {
			time.Sleep(time.Millisecond) // an ICMP error comes at once, and again and again
			continue
		}
		now := time.Now()
		p, ok := packet.Get(body)
		if !ok || p.Run != run || p.Flow != s.id || !p.Counts || p.Turned.IsZero() {
			continue
		}
		s.back = append(s.back, measure.Sample{Sent: p.Sent.Sub(start), Up: p.Turned.Sub(p.Sent), Down: now.Sub(p.Turned)})
		if !last.IsZero() {
			s.gap = max(s.gap, now.Sub(last))
		}
		last = now
	}
}
