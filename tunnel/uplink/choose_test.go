package uplink

import (
	"testing"
	"time"

	"culvert/tunnel"
	"culvert/tunnel/session"
	"culvert/tunnel/wire"
)

// world is a network as a chooser sees it, in steps of 10 ms.
type world struct {
	t       *testing.T
	c       chooser
	now     time.Time
	at      time.Time // when the chooser wants to look again
	began   time.Time
	joined  [wire.WaysEnd]bool
	passes  [wire.WaysEnd]func(size int) bool // nil: nothing
	ways    [wire.WaysEnd]session.WayState
	idle    bool
	most    [wire.WaysEnd]int // probes of a load at once that pass; 0: all
	last    orders
	moves   []move
	answers []answer                    // under way
	slower  [wire.WaysEnd]time.Duration // than 40 ms answers to probes are
	hears   bool                        // what is cut is cut in our direction only
	loads   int                         // that began
	loaded  int                         // probes of them
}

type answer struct {
	at   time.Time
	way  wire.Way
	long bool
}

// move is a change of the way in use.
type move struct {
	at    time.Duration
	to    wire.Way
	cause tunnel.Code
}

func newWorld(t *testing.T, ways ...wire.Way) *world {
	w := &world{t: t, now: time.Unix(1000, 0)}
	w.began = w.now
	w.cut(wire.WaySealed, wire.WayDatagram, wire.WayLanes, wire.NoWay)
	for _, k := range ways {
		w.joined[k], w.passes[k] = true, all
	}
	return w
}

func all(int) bool     { return true }
func none(int) bool    { return false }
func small(n int) bool { return n < 1000 }
func (w *world) cut(ways ...wire.Way) {
	for _, k := range ways {
		w.passes[k] = none
	}
}

// pass lets time go by: media and reports flow on the way in use, probes take
// 40 ms.
func (w *world) pass(d time.Duration) {
	for end := w.now.Add(d); w.now.Before(end); w.now = w.now.Add(10 * time.Millisecond) {
		for _, a := range w.answers {
			if a.at.Equal(w.now) {
				s := &w.ways[a.way]
				s.Heard, s.Small = w.now, w.now
				if a.long {
					s.Large = w.now
				}
				w.at = w.now // news
			}
		}
		for k := range w.ways {
			s := &w.ways[k]
			s.Present = w.joined[k]
			if s.Present && !w.idle && (w.passes[k](100) || w.hears) {
				s.Heard, s.Reported = w.now, w.now
			}
		}
		if w.now.Before(w.at) {
			continue
		}
		was := w.c.way
		o := w.c.step(view{now: w.now, live: !w.idle, flowing: !w.idle, ways: w.ways})
		w.last, w.at = o, w.now.Add(o.next)
		if o.first != was {
			w.moves = append(w.moves, move{w.now.Sub(w.began), o.first, o.cause})
		}
		for k := range w.ways {
			if o.short[k] && w.passes[k](100) {
				w.answers = append(w.answers, answer{w.now.Add(40*time.Millisecond + w.slower[k]), wire.Way(k), false})
			}
			if o.long[k] && w.passes[k](1200) {
				w.answers = append(w.answers, answer{w.now.Add(40*time.Millisecond + w.slower[k]), wire.Way(k), true})
			}
		}
		if t := w.c.trial.way; o.load > 0 {
			s := &w.ways[t]
			if o.begin {
				s.Carried, w.loads = 0, w.loads+1
			}
			w.loaded += o.load
			s.Carried += o.load // a round trip early, which judges the same
			if m := w.most[t]; m > 0 {
				s.Carried -= max(0, o.load-m)
			}
		}
	}
}

func (w *world) uses(way, also wire.Way) {
	w.t.Helper()
	if w.last.first != way || w.last.also != also {
		w.t.Fatalf("after %v datagrams go by %v and %v, want %v and %v; moves %+v", w.now.Sub(w.began), w.last.first, w.last.also, way, also, w.moves)
	}
}

func TestTheChooser(t *testing.T) {
	const (
		sealed, datagram, lanes = wire.WaySealed, wire.WayDatagram, wire.WayLanes
		second                  = time.Second
	)
	for name, test := range map[string]func(w *world){
		"sealed packets that are answered are used within two round trips": func(w *world) {
			w.pass(90 * time.Millisecond)
			w.uses(sealed, wire.NoWay)
		},
		"sealed packets that do not arrive are not used, and tried again": func(w *world) {
			w.cut(sealed)
			w.pass(2 * second)
			w.uses(datagram, wire.NoWay)
			w.passes[sealed] = all
			w.pass(2 * second)
			w.uses(sealed, wire.NoWay)
		},
		"sealed packets of which only long ones vanish are used: they make themselves smaller": func(w *world) {
			w.passes[sealed] = small
			w.pass(2 * second)
			w.uses(sealed, wire.NoWay)
		},
		"UDP that is shut is left for lanes within 700 ms": func(w *world) {
			w.pass(second)
			w.cut(sealed, datagram)
			w.pass(700 * time.Millisecond)
			w.uses(lanes, sealed)
			if m := w.moves[len(w.moves)-1]; m.cause != tunnel.UDPBlocked {
				w.t.Errorf("the cause is %q", m.cause)
			}
			w.pass(2 * second)
			w.uses(lanes, wire.NoWay)
		},
		"UDP that is open again is used again within 30 s": func(w *world) {
			w.pass(second)
			w.cut(sealed, datagram)
			w.pass(10 * second)
			w.passes[sealed], w.passes[datagram] = all, all
			w.pass(20 * second)
			w.uses(sealed, wire.NoWay)
		},
		"sealed packets alone that are shut are left for DATAGRAM": func(w *world) {
			w.pass(second)
			w.cut(sealed)
			w.pass(second)
			if w.last.first != datagram {
				w.t.Fatalf("datagrams go by %v", w.last.first)
			}
		},
		"where delay had risen before the silence nothing is sent twice": func(w *world) {
			w.pass(second)
			w.ways[sealed].Delay = 60 * time.Millisecond
			w.pass(100 * time.Millisecond)
			w.cut(sealed, datagram, lanes)
			for range 20 {
				w.pass(100 * time.Millisecond)
				w.uses(sealed, wire.NoWay)
			}
			w.passes[lanes] = all
			w.pass(200 * time.Millisecond)
			w.uses(lanes, wire.NoWay)
		},
		"in doubt small datagrams go by two ways, for two seconds": func(w *world) {
			w.pass(second)
			w.cut(sealed, datagram, lanes)
			w.pass(750 * time.Millisecond)
			w.uses(sealed, lanes)
			w.pass(2 * second)
			w.uses(sealed, wire.NoWay)
		},
		"a link that is down altogether keeps its way": func(w *world) {
			w.pass(second)
			w.cut(sealed, datagram, lanes)
			w.pass(5 * second)
			if w.last.first != sealed {
				w.t.Fatalf("datagrams go by %v", w.last.first)
			}
			w.passes = [wire.WaysEnd]func(int) bool{sealed: all, datagram: all, lanes: all}
			w.pass(3 * second)
			w.uses(sealed, wire.NoWay)
		},
		"lanes that fall silent are left for UDP at once": func(w *world) {
			w.cut(sealed, datagram)
			w.joined[sealed], w.joined[datagram] = false, false
			w.pass(second)
			w.uses(lanes, wire.NoWay)
			w.cut(lanes)
			w.joined[sealed], w.joined[datagram] = true, true
			w.passes[sealed], w.passes[datagram] = all, all
			w.pass(700 * time.Millisecond)
			if w.last.first == lanes {
				w.t.Fatal("datagrams still go by lanes")
			}
		},
		"lanes that come back while UDP is shut are used at once": func(w *world) {
			w.pass(second)
			w.cut(sealed, datagram)
			w.pass(2 * second)
			w.uses(lanes, sealed)
			w.joined[lanes], w.passes[lanes] = false, none
			w.pass(200 * time.Millisecond)
			w.joined[lanes], w.passes[lanes] = true, all
			w.pass(150 * time.Millisecond)
			if w.last.first != lanes {
				w.t.Fatalf("datagrams go by %v", w.last.first)
			}
		},
		"after an outage of all the way in use is kept though another answers a little sooner": func(w *world) {
			w.pass(second)
			w.slower[sealed] = 50 * time.Millisecond
			w.cut(sealed, datagram, lanes)
			w.pass(3 * second)
			w.ways[sealed].Lost = 1 // in the time of the outage
			w.passes[sealed], w.passes[datagram], w.passes[lanes] = all, all, all
			w.pass(200 * time.Millisecond)
			w.ways[sealed].Lost = 0
			w.pass(second)
			if w.last.first != sealed || len(w.moves) != 2 { // those at the start
				w.t.Fatalf("datagrams go by %v, moves %+v", w.last.first, w.moves)
			}
		},
		"UDP that is throttled is left for lanes": func(w *world) {
			w.pass(second)
			w.ways[sealed].Bad, w.ways[sealed].Lost = true, 0.8
			w.pass(second)
			w.uses(lanes, wire.NoWay)
		},
		"UDP that is throttled is left for lanes also where the breaker soon has it under control": func(w *world) {
			w.pass(second)
			for range 4 { // it tries more again and again
				w.ways[sealed].Bad, w.ways[sealed].Delay = true, 100*time.Millisecond
				w.pass(200 * time.Millisecond)
				w.ways[sealed].Delay = 0
				w.pass(second)
			}
			w.uses(lanes, wire.NoWay)
		},
		"a link that is too slow for both is not left for lanes, though they are often looked at when its queue is empty": func(w *world) {
			w.ways[lanes].RTT = 40 * time.Millisecond
			w.pass(second)
			for range 30 {
				w.ways[sealed].Bad, w.ways[sealed].Delay, w.ways[lanes].RTT = true, 100*time.Millisecond, 140*time.Millisecond
				w.pass(100 * time.Millisecond)
				w.ways[lanes].RTT = 42 * time.Millisecond
				w.pass(100 * time.Millisecond)
				w.ways[sealed].Delay = 0
				w.pass(800 * time.Millisecond)
			}
			w.uses(sealed, wire.NoWay)
			// Until lanes have not waited for a while: then UDP alone is slow.
			w.ways[sealed].Delay = 100 * time.Millisecond
			w.pass(sharedFor + second)
			w.uses(lanes, wire.NoWay)
		},
		"UDP that is throttled is not used again while it does not carry as much": func(w *world) {
			w.pass(second)
			w.ways[sealed].Lost = 0.8
			w.ways[sealed].Bad, w.ways[lanes].Rate, w.most[sealed], w.most[datagram] = true, 1e6, 1, 1
			w.pass(2 * second)
			w.uses(lanes, wire.NoWay)
			w.ways[sealed].Bad, w.ways[sealed].Lost = false, 0
			w.pass(5 * 60 * second)
			w.uses(lanes, wire.NoWay)
			if w.loads < 3 || w.loads > 6 {
				w.t.Errorf("in five minutes it was asked %d times, want after 20 s, then 1 min, 2 min", w.loads)
			}
		},
		"UDP that is throttled no more is used again": func(w *world) {
			w.pass(second)
			w.ways[sealed].Lost = 0.8
			w.ways[sealed].Bad, w.ways[lanes].Rate = true, 1e6
			w.pass(2 * second)
			w.uses(lanes, wire.NoWay)
			w.ways[sealed].Bad, w.ways[sealed].Lost = false, 0
			w.pass(25 * second)
			if w.last.first != sealed {
				w.t.Fatalf("datagrams go by %v", w.last.first)
			}
			// 1.2 Mbit/s for a second, in probes of 1,400 bytes.
			if w.loads != 1 || w.loaded < 95 || w.loaded > 120 {
				w.t.Errorf("%d loads, %d probes", w.loads, w.loaded)
			}
		},
		"a load that makes the call wait is given up": func(w *world) {
			w.pass(second)
			w.ways[sealed].Lost = 0.8
			w.ways[sealed].Bad, w.ways[lanes].Rate = true, 1e6
			w.pass(2 * second)
			w.ways[sealed].Bad, w.ways[sealed].Lost, w.ways[lanes].Delay = false, 0, 50*time.Millisecond
			w.pass(30 * second)
			w.uses(lanes, wire.NoWay)
			if w.loaded > 10 {
				w.t.Errorf("%d probes", w.loaded)
			}
		},
		"a way that loses nearly all is left at once": func(w *world) {
			w.pass(second)
			w.cut(sealed)
			w.ways[sealed].Lost = 1
			w.hears = true
			w.pass(300 * time.Millisecond)
			if w.last.first != datagram {
				w.t.Fatalf("datagrams go by %v", w.last.first)
			}
		},
		"but not where short packets pass, which it can make of long ones": func(w *world) {
			w.pass(second)
			w.passes[sealed] = small
			w.ways[sealed].Lost = 1
			w.pass(1500 * time.Millisecond)
			w.uses(sealed, wire.NoWay)
			w.pass(second)
			if w.last.first == sealed {
				w.t.Fatal("they can not")
			}
		},
		"UDP that is shut for long is used again within 30 s where it has worked": func(w *world) {
			w.pass(second)
			w.cut(sealed, datagram)
			w.pass(10 * 60 * second)
			w.passes[sealed], w.passes[datagram] = all, all
			w.pass(30 * second)
			w.uses(sealed, wire.NoWay)
		},
		"UDP that never worked is tried after minutes": func(w *world) {
			w.cut(sealed, datagram)
			w.joined[sealed], w.joined[datagram] = false, false
			w.pass(second)
			w.uses(lanes, wire.NoWay)
			w.joined[sealed], w.joined[datagram] = true, true
			w.pass(20 * 60 * second)
			if rest := w.c.again[sealed].wait; rest != maxUDPAgain {
				w.t.Errorf("it rests for %v", rest)
			}
		},
		"UDP that was used again and left soon rests for a minute, then for two": func(w *world) {
			w.pass(second)
			for i := range 3 {
				w.cut(sealed, datagram)
				w.pass(2 * second)
				left := w.now
				w.passes[sealed], w.passes[datagram] = all, all
				for w.last.first == lanes {
					w.pass(100 * time.Millisecond)
				}
				want := []time.Duration{udpAgain, udpRest, 2 * udpRest}[i]
				if rest := w.now.Sub(left); rest < want-3*second || rest > want+3*second {
					w.t.Errorf("time %d it is used again after %v, want %v", i+1, rest, want)
				}
				w.pass(10 * second)
			}
		},
		"on a link that is slow for all the way stays": func(w *world) {
			w.pass(second)
			s, l := &w.ways[sealed], &w.ways[lanes]
			s.Bad = true
			for range 10 { // it tries more again and again
				s.Lost, s.Delay = 0.9, 200*time.Millisecond
				w.pass(100 * time.Millisecond) // what lanes' reports tell is older
				l.Delay = 100 * time.Millisecond
				w.pass(300 * time.Millisecond)
				s.Lost, s.Delay, l.Delay = 0, 0, 0
				w.pass(second)
			}
			w.uses(sealed, wire.NoWay)
		},
		"a full queue behind which most is lost is no shut way": func(w *world) {
			w.pass(second)
			w.ways[sealed].Lost, w.ways[sealed].Delay = 0.95, 200*time.Millisecond
			w.pass(2 * second)
			w.uses(sealed, wire.NoWay)
		},
		"an idle session is not asked about": func(w *world) {
			w.pass(second)
			w.idle = true
			w.cut(sealed, datagram)
			w.pass(60 * second)
			w.uses(sealed, wire.NoWay)
		},
		"UDP that comes and goes is tried more and more rarely": func(w *world) {
			w.pass(second)
			for range 10 * 60 {
				w.passes[sealed], w.passes[datagram] = all, all
				if w.last.first != lanes {
					w.cut(sealed, datagram)
				}
				w.pass(second)
			}
			if n := len(w.moves); n > 20 {
				w.t.Errorf("%d moves in ten minutes", n)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			test(newWorld(t, sealed, datagram, lanes))
		})
	}
}
