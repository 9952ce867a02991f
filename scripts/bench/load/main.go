// Load uses a SOCKS5 proxy the way calls do and prints what arrived, when, and
// what it cost. It knows nothing of the proxy under test.
//
//	load serve  -addr 127.0.0.1:9000,192.0.2.2:9000      the far end
//	load paced  -socks … -target … -kind audio=1x50x160 -kind video=2x210x1190
//	                                                     packets at a steady rate, one association for each flow
//	load closed -socks … -target … -flows 4 -window 64   as many packets as there is room for
//	load bulk   -socks … -target … [-up]                 TCP, as fast as it goes
//	load idle   -socks … -target … -flows 1000           many associations at once: what one costs in memory
//	load first  -socks … -target … -times 20             from nothing to the first packet back
//
// Without -socks it sends straight to the target, which is the baseline. -pids
// adds the CPU time and memory of those processes. A line "begin" is printed
// when warm-up is over, and one line of JSON (internal/measure.Result) at the end.
//
// One-way delays are taken from one machine's clock: both ends must be on the
// same machine. The far end answers on UDP and TCP, and is asked by TCP at -far
// how old the oldest packet was that it received, also of those whose echo is lost.
package main

import (
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"log"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"time"

	"culvert/scripts/bench/internal/measure"
	"culvert/scripts/bench/internal/packet"
	"culvert/scripts/bench/internal/proc"
	"culvert/scripts/bench/internal/socks5"
)

// options are what all modes share.
type options struct {
	socks, target, far netip.AddrPort
	kinds              []kind
	flows, size        int
	window             int
	bulk, times        int
	up                 bool
	warm, dur          time.Duration
	linger, budget     time.Duration
	pids               []int
	series             bool
}

// kind is some flows that send alike.
type kind struct {
	name        string
	flows       int
	rate        int // packets a second
	size        int // bytes
	payloadType byte
}

// parseKind reads NAME=FLOWSxRATExSIZE, as in video=2x210x1190.
func parseKind(s string) (kind, error) {
	name, spec, ok := strings.Cut(s, "=")
	parts := strings.Split(spec, "x")
	if !ok || name == "" || len(parts) != 3 {
		return kind{}, fmt.Errorf("%q is not NAME=FLOWSxRATExSIZE", s)
	}
	var n [3]int
	for i, p := range parts {
		v, err := strconv.Atoi(p)
		if err != nil || v < 1 {
			return kind{}, fmt.Errorf("%q: %q is not a number from 1", s, p)
		}
		n[i] = v
	}
	if n[2] < packet.Min || n[2] > 65507 {
		return kind{}, fmt.Errorf("%q: packets have %d to 65507 bytes", s, packet.Min)
	}
	k := kind{name: name, flows: n[0], rate: n[1], size: n[2], payloadType: packet.Video}
	if strings.HasPrefix(name, "audio") {
		k.payloadType = packet.Audio
	}
	return k, nil
}

func parsePids(s string) ([]int, error) {
	var pids []int
	for _, w := range strings.FieldsFunc(s, func(r rune) bool { return r == ',' || r == ' ' }) {
		pid, err := strconv.Atoi(w)
		if err != nil {
			return nil, fmt.Errorf("%q is not a process id", w)
		}
		pids = append(pids, pid)
	}
	return pids, nil
}

func main() {
	log.SetFlags(0)
	log.SetPrefix("load: ")
	modes := map[string]func(*options) (measure.Result, error){
		"paced": paced, "closed": closed, "bulk": bulk, "idle": idle, "first": first,
	}
	if len(os.Args) < 2 {
		log.Fatal("usage: load serve|paced|closed|bulk|idle|first [flags]")
	}
	mode := os.Args[1]
	run := modes[mode]
	if run == nil && mode != "serve" {
		log.Fatalf("there is no mode %q", mode)
	}
	o := &options{}
	fs := flag.NewFlagSet("load "+mode, flag.ExitOnError)
	addr := fs.String("addr", "127.0.0.1:9000", "serve: where to listen, separated by commas")
	addrPort := func(to *netip.AddrPort) func(string) error {
		return func(s string) (err error) { *to, err = netip.ParseAddrPort(s); return err }
	}
	fs.Func("socks", "the SOCKS5 proxy's `address:port`", addrPort(&o.socks))
	fs.Func("target", "the far end's `address:port`, as the proxy reaches it", addrPort(&o.target))
	fs.Func("far", "the far end's `address:port` reached without the proxy (default: the target)", addrPort(&o.far))
	fs.Func("kind", "paced: flows as `NAME=FLOWSxRATExSIZE`; can be repeated", func(s string) error {
		k, err := parseKind(s)
		o.kinds = append(o.kinds, k)
		return err
	})
	fs.Func("pids", "processes whose cost to report, separated by commas", func(s string) (err error) { o.pids, err = parsePids(s); return err })
	self := fs.Bool("self", false, "count this program's own cost to that of -pids: what the kernel does on the way of captured traffic is done in its name")
	fs.IntVar(&o.flows, "flows", 1, "closed, idle: associations; bulk: connections")
	fs.IntVar(&o.size, "size", 1000, "closed, idle, first: bytes of a packet")
	fs.IntVar(&o.window, "window", 64, "closed: packets under way on each flow")
	fs.IntVar(&o.bulk, "bulk", 0, "paced: downloads that run beside")
	fs.IntVar(&o.times, "times", 20, "first: how often")
	fs.BoolVar(&o.up, "up", false, "bulk: upload")
	fs.DurationVar(&o.warm, "warm", time.Second, "time before it counts")
	fs.DurationVar(&o.dur, "dur", 5*time.Second, "time that counts; idle: how long the associations are held")
	fs.DurationVar(&o.linger, "linger", time.Second, "paced: how long to wait for the last packets")
	fs.DurationVar(&o.budget, "budget", 100*time.Millisecond, "paced: one-way delay past which a packet is late")
	fs.BoolVar(&o.series, "series", false, "paced: delays over time as well")
	fs.Parse(os.Args[2:])
	if *self {
		o.pids = append(o.pids, os.Getpid())
	}
	if mode == "serve" {
		log.Fatal(serve(strings.Split(*addr, ",")))
	}
	if !o.target.IsValid() {
		log.Fatal("-target is needed")
	}
	if !o.far.IsValid() {
		o.far = o.target
	}
	if o.size < packet.Min {
		log.Fatalf("-size: packets have at least %d bytes", packet.Min)
	}
	r, err := run(o)
	if err != nil {
		log.Fatal(err)
	}
	r.Mode, r.Duration = mode, o.dur.Seconds()
	if err := json.NewEncoder(os.Stdout).Encode(r); err != nil {
		log.Fatal(err)
	}
}

// begin waits until warm-up is over, says so, and starts the meter.
func (o *options) begin(at time.Time) (meter, error) {
	time.Sleep(time.Until(at))
	fmt.Println("begin")
	u, err := proc.Of(o.pids)
	return meter{o: o, start: time.Now(), before: u}, err
}

// meter reads what the processes cost from begin on.
type meter struct {
	o      *options
	start  time.Time
	before proc.Usage
}

// end returns the CPU time since begin, the time itself, and the memory now.
func (m meter) end() (cpu, elapsed time.Duration, rss int64, err error) {
	after, err := proc.Of(m.o.pids)
	return after.CPU - m.before.CPU, time.Since(m.start), after.RSS, err
}

// open makes n flows; it gives up at the first that fails.
func (o *options) open(n int) ([]*socks5.Flow, error) {
	flows := make([]*socks5.Flow, 0, n)
	for range n {
		f, err := socks5.Open(o.socks, o.target)
		if err != nil {
			closeAll(flows)
			return nil, fmt.Errorf("association %d: %w", len(flows)+1, err)
		}
		flows = append(flows, f)
	}
	return flows, nil
}

func closeAll(flows []*socks5.Flow) {
	for _, f := range flows {
		f.Close()
	}
}

// kernelBuffer of a flow's socket, so that the load program itself loses nothing.
const kernelBuffer = 4 << 20

var errNothing = errors.New("nothing came back")
