package main

import (
	"time"

	"culvert/scripts/bench/internal/measure"
)

// row is one line of the table: a load, on a link, and what must come out.
type row struct {
	id, title string
	link      string   // settings of the link; "": the loopback, without namespaces
	cubic     bool     // the kernel's CUBIC, and no program may choose another
	load      []string // arguments of the load program
	dur       time.Duration
	events    []event // changes of the link after the start
	subjects  []string
	columns   []column
	bars      []bar
}

// event is a change of the link.
type event struct {
	at, until time.Duration // until 0: to the end
	set, back string        // what the link is told at the start, and at the end
	what      string
}

// column is a figure of a result.
type column struct {
	head   string
	digits int
	of     func(entry) (value float64, known bool)
}

// bar is what a subject must reach: a fixed figure, or one that is a multiple
// of, or a distance from, the best of some others in the same row.
type bar struct {
	subject string
	column  column
	most    bool // the figure may be at most that; else at least
	times   float64
	plus    float64
	others  []string // none: plus alone is the bar
}

var (
	cpu      = column{"CPU, µs a packet", 0, figure(func(r measure.Result) float64 { return r.CPUPerPacket })}
	echoes   = column{"echoes/s", 0, figure(func(r measure.Result) float64 { return r.Echoes })}
	memory   = column{"KB an association", 1, figure(func(r measure.Result) float64 { return r.PerFlowKB })}
	onTime   = column{"on time, %", 2, paced(func(r measure.Result) float64 { return r.OnTime })}
	median   = column{"median, ms", 2, paced(func(r measure.Result) float64 { return max(r.Up.P50, r.Down.P50) })}
	downward = column{"median down, ms", 1, paced(func(r measure.Result) float64 { return r.Down.P50 })}
	p99      = column{"p99, ms", 2, paced(func(r measure.Result) float64 { return max(r.Up.P99, r.Down.P99) })}
	oldest   = column{"oldest, ms", 0, paced(func(r measure.Result) float64 { return r.Oldest })}
	silence  = column{"longest gap, ms", 0, paced(func(r measure.Result) float64 { return r.Gap })}
	bulk     = column{"bulk, Mbit/s", 1, figure(func(r measure.Result) float64 { return r.Bulk })}
	perGB    = column{"CPU, s a GB", 1, figure(func(r measure.Result) float64 { return r.CPUPerGB })}
	audio    = column{"audio on time, %", 1, kind("audio")}
	video    = column{"video on time, %", 1, kind("video")}
	first    = column{"first echo, median ms", 1, func(e entry) (float64, bool) {
		if e.Result == nil || e.Result.First == nil {
			return 0, false
		}
		return e.Result.First.P50, true
	}}
	// own is what the oldest packet waited elsewhere than on the link.
	own = column{"own queues, ms", 0, func(e entry) (float64, bool) { return e.OwnMs, e.Result != nil && e.Result.Up != nil }}
)

func figure(of func(measure.Result) float64) func(entry) (float64, bool) {
	return func(e entry) (float64, bool) {
		if e.Result == nil || of(*e.Result) == 0 {
			return 0, false
		}
		return of(*e.Result), true
	}
}

func paced(of func(measure.Result) float64) func(entry) (float64, bool) {
	return func(e entry) (float64, bool) {
		if e.Result == nil || e.Result.Up == nil {
			return 0, false
		}
		return of(*e.Result), true
	}
}

func kind(name string) func(entry) (float64, bool) {
	return func(e entry) (float64, bool) {
		if e.Result == nil {
			return 0, false
		}
		k, ok := e.Result.Kinds[name]
		return k.OnTime, ok
	}
}

// Groups of subjects. Those whose program is not on PATH are left out.
var (
	quicPeers = []string{"hysteria", "hy2", "tuic"}
	peers     = append(quicPeers[:3:3], "yamux", "xray")
	modes     = []string{"culvert auto", "culvert udp", "culvert tcp"}
	udpModes  = modes[:2]
	everyone  = append(append([]string{"direct"}, modes...), peers...)
)

func atLeast(c column, x float64, of ...string) []bar {
	return each(of, bar{column: c, plus: x})
}

func atMost(c column, x float64, of ...string) []bar {
	return each(of, bar{column: c, plus: x, most: true})
}

// asDirect: not more than x below what direct reaches.
func asDirect(c column, x float64, of ...string) []bar {
	return each(of, bar{column: c, times: 1, plus: -x, others: []string{"direct"}})
}

// overDirect: not more than x above direct.
func overDirect(c column, x float64, of ...string) []bar {
	return each(of, bar{column: c, times: 1, plus: x, others: []string{"direct"}, most: true})
}

func atLeastTimes(c column, of string, x float64, others ...string) []bar {
	return each([]string{of}, bar{column: c, times: x, others: others})
}

func atMostTimes(c column, of string, x float64, others ...string) []bar {
	return each([]string{of}, bar{column: c, times: x, others: others, most: true})
}

func each(subjects []string, b bar) (bars []bar) {
	for _, s := range subjects {
		b.subject = s
		bars = append(bars, b)
	}
	return bars
}

func join(bars ...[]bar) (all []bar) {
	for _, b := range bars {
		all = append(all, b...)
	}
	return all
}

// rows is the table, in its order.
var rows = []row{
	{
		id: "cpu", title: "CPU a packet, both ends: 10 flows × 200 packets/s × 800 B",
		load: []string{"paced", "-kind", "video=10x200x800"}, dur: 10 * time.Second,
		subjects: append(append([]string{"relay"}, modes...), peers...),
		columns:  []column{cpu, onTime, median, p99},
		bars:     join(atMostTimes(cpu, "culvert auto", 0.6, quicPeers...), atMostTimes(cpu, "culvert auto", 1.9, "relay")),
	},
	{
		id: "closed", title: "4 flows with 64 packets of 1000 B under way, as fast as they come back",
		load: []string{"closed", "-flows", "4", "-window", "64", "-size", "1000"}, dur: 5 * time.Second,
		subjects: everyone,
		columns:  []column{echoes, cpu},
		bars:     atLeast(echoes, 45_000, "culvert auto"),
	},
	{
		id: "delay", title: "100 flows × 50 packets/s × 200 B, nothing in the way",
		load: []string{"paced", "-kind", "audio=100x50x200"}, dur: 10 * time.Second,
		subjects: everyone,
		columns:  []column{median, p99, onTime, cpu},
		bars:     join(overDirect(median, 0.3, "culvert auto"), overDirect(p99, 2, "culvert auto")),
	},
	{
		id: "idle", title: "memory of an idle association, both ends, 1000 of them",
		load: []string{"idle", "-flows", "1000", "-size", "200"}, dur: 5 * time.Second,
		subjects: append(modes[:3:3], peers...),
		columns:  []column{memory},
		bars:     atMost(memory, 24, modes...),
	},
	{
		id: "bulk", title: "bulk down, one connection",
		load: []string{"bulk"}, dur: 5 * time.Second,
		subjects: append(append([]string{"bare quic", "bare tls", "relay quic", "relay tls"}, modes...), peers...),
		columns:  []column{bulk, perGB},
		bars: join(atLeastTimes(bulk, "culvert udp", 0.8, "bare quic"), atLeastTimes(bulk, "culvert tcp", 0.8, "bare tls"),
			atLeastTimes(bulk, "culvert udp", 0.8, "relay quic"), atLeastTimes(bulk, "culvert tcp", 0.8, "relay tls"),
			atLeastTimes(bulk, "culvert auto", 1, "hysteria", "hy2"), atLeastTimes(bulk, "culvert auto", 0.8, "xray")),
	},
	{
		id: "first", title: "first echo of a new association, 20 ms each way", link: "delay=20ms",
		load: []string{"first", "-times", "20", "-size", "200"}, dur: time.Second,
		subjects: everyone,
		columns:  []column{first},
	},
	{
		id: "loss1", title: "loss 1 % each way, 20 ms: 4 flows × 100 packets/s × 800 B", link: "delay=20ms loss=1",
		load: []string{"paced", "-kind", "video=4x100x800"}, dur: 30 * time.Second,
		subjects: everyone,
		columns:  []column{onTime, median, p99, oldest},
		bars:     join(asDirect(onTime, 0.5, udpModes...), atLeast(onTime, 99.5, "culvert tcp")),
	},
	{
		id: "loss3", title: "loss 3 % each way, 20 ms: 4 flows × 100 packets/s × 800 B", link: "delay=20ms loss=3",
		load: []string{"paced", "-kind", "video=4x100x800"}, dur: 30 * time.Second,
		subjects: everyone,
		columns:  []column{onTime, median, p99, oldest},
		bars:     join(asDirect(onTime, 0.5, udpModes...), atLeast(onTime, 99, "culvert tcp")),
	},
	{
		id: "cubic3", title: "the same where the kernel has CUBIC alone", link: "delay=20ms loss=3", cubic: true,
		load: []string{"paced", "-kind", "video=4x100x800"}, dur: 20 * time.Second,
		subjects: []string{"direct", "culvert tcp", "yamux", "xray"},
		columns:  []column{onTime, median, p99, oldest},
		bars:     atLeast(onTime, 97, "culvert tcp"),
	},
	{
		id: "loss5", title: "loss 5 % each way, 40 ms: 2 × 2 Mbit/s of video", link: "delay=40ms loss=5",
		load: []string{"paced", "-kind", "video=2x210x1190"}, dur: 30 * time.Second,
		subjects: everyone,
		columns:  []column{onTime, median, p99, oldest},
		bars:     asDirect(onTime, 0.5, udpModes...),
	},
	{
		id: "beside", title: "20 Mbit/s, 0.5 % loss, 200 ms of queue, two downloads beside: 4 flows × 100 packets/s × 800 B",
		link: "delay=20ms rate=20 loss=0.5 queue=200ms",
		load: []string{"paced", "-kind", "video=4x100x800", "-bulk", "2"}, dur: 20 * time.Second,
		subjects: everyone,
		columns:  []column{onTime, downward, p99, bulk},
		bars: join(atLeast(onTime, 98.5, udpModes...), atLeast(onTime, 97, "culvert tcp"),
			atMost(downward, 45, modes...), atLeast(bulk, 12, modes...)),
	},
	{
		id: "outage", title: "link down for 3 s, 20 ms: 2 flows × 100 packets/s × 800 B", link: "delay=20ms",
		load: []string{"paced", "-kind", "video=2x100x800", "-linger", "5s"}, dur: 15 * time.Second,
		events:   []event{{at: 4 * time.Second, until: 7 * time.Second, set: "down=on", back: "down=off", what: "down"}},
		subjects: everyone,
		columns:  []column{oldest, silence, onTime},
		bars:     atMost(oldest, 150, modes...),
	},
	{
		id: "fall", title: "rate falls from 10 Mbit/s to 300 kbit/s, 200 ms of queue, 20 ms: 2 Mbit/s of video, 50 kbit/s of audio",
		link: "delay=20ms rate=10 queue=200ms",
		load: []string{"paced", "-kind", "video=1x210x1190", "-kind", "audio=1x50x125", "-linger", "5s"}, dur: 30 * time.Second,
		events:   []event{{at: 5 * time.Second, set: "rate=0.3", what: "300 kbit/s"}},
		subjects: everyone,
		columns:  []column{audio, video, own, oldest},
		bars:     join(atLeast(audio, 95, modes...), atMost(own, 150, modes...)),
	},
	{
		id: "captured", title: "captured against SOCKS, the app's own CPU included: 10 flows × 200 packets/s × 800 B", link: "delay=1ms",
		load: []string{"paced", "-kind", "video=10x200x800", "-self"}, dur: 20 * time.Second,
		subjects: []string{"direct", "culvert udp", "culvert captured"},
		columns:  []column{cpu, onTime, median, p99},
		bars:     join(atMostTimes(cpu, "culvert captured", 1.15, "culvert udp"), atLeast(onTime, 100, "culvert captured")),
	},
	{
		id: "captured1000", title: "1,000 captured flows, 10,000 datagrams a second of 200 B", link: "delay=1ms",
		load: []string{"paced", "-kind", "audio=1000x10x200", "-self"}, dur: 15 * time.Second,
		subjects: []string{"direct", "culvert udp", "culvert captured"},
		columns:  []column{onTime, cpu, median, p99},
		bars:     atLeast(onTime, 100, "culvert captured"),
	},
	{
		id: "bulkloss", title: "bulk down, one connection, 20 ms, loss 1 % each way", link: "delay=20ms loss=1",
		load: []string{"bulk", "-warm", "3s"}, dur: 10 * time.Second,
		subjects: everyone,
		columns:  []column{bulk, perGB},
		bars:     atLeast(bulk, 250, "culvert auto"),
	},
}
