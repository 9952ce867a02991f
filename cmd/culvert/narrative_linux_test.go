package main

import (
	"context"
	"encoding/binary"
	"net/netip"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"culvert/sidecar/control"
	"culvert/tunnel"
)

// echoes counts what a peer that answers everything has answered.
type echoes struct {
	sent    int
	arrived map[uint32]bool
	gap     time.Duration // the longest time between two that arrived
	last    time.Time
}

// begin counts anew.
func (e *echoes) begin() { *e = echoes{arrived: map[uint32]bool{}, last: time.Now()} }

// numbered sends 100 datagrams a second through an association and counts what
// comes back, until the test ends. look calls its function while nothing counts.
func (o *only443) numbered(proxy string) (look func(func(*echoes))) {
	o.t.Helper()
	asked, reply := o.ask(proxy, 3, "0.0.0.0", 0)
	if reply[1] != 0 {
		o.t.Fatalf("UDP ASSOCIATE: reply %d", reply[1])
	}
	asked.SetDeadline(time.Time{})
	u := o.dial("udp4", netip.AddrPortFrom(netip.AddrFrom4([4]byte(reply[4:8])), binary.BigEndian.Uint16(reply[8:])).String())
	u.SetDeadline(time.Time{})
	var mu sync.Mutex // guards e
	var e echoes
	e.begin()
	var wg sync.WaitGroup
	end := make(chan struct{})
	wg.Go(func() {
		head := append([]byte{0, 0, 0}, socksRequest(0, "127.0.0.1", o.udp)[3:]...)
		tick := time.NewTicker(10 * time.Millisecond)
		defer tick.Stop()
		for n := uint32(0); ; n++ {
			select {
			case <-end:
				return
			case <-tick.C:
			}
			mu.Lock()
			e.sent++
			mu.Unlock()
			u.Write(append(binary.BigEndian.AppendUint32(head[:len(head):len(head)], n), make([]byte, 600)...))
		}
	})
	wg.Go(func() {
		b := make([]byte, 2048)
		for {
			n, err := u.Read(b)
			if err != nil {
				return
			}
			if n < 604 {
				continue
			}
			now, number := time.Now(), binary.BigEndian.Uint32(b[n-604:])
			mu.Lock()
			if e.arrived[number] {
				o.t.Errorf("datagram %d came back twice", number)
			}
			e.arrived[number] = true
			e.gap, e.last = max(e.gap, now.Sub(e.last)), now
			mu.Unlock()
		}
	})
	o.t.Cleanup(func() { close(end); u.Close(); wg.Wait() })
	return func(f func(*echoes)) {
		mu.Lock()
		defer mu.Unlock()
		f(&e)
	}
}

// What the sidecar tells of a call whose UDP is shut and opened again is what
// the app itself has met.
func TestWhatBefallsACallIsToldAsTheAppMeetsIt(t *testing.T) {
	needNFT(t)
	bin := buildBoth(t)
	o := newOnly443(t, bin)
	o.start(o.pair.Near, o.culvert, "run", "-c", filepath.Join(o.dir, "culvert.yaml"), "--listen", "127.0.0.1:0", "--control", o.socket, "--mode", "auto")
	runReady(t, o.socket)

	ctx, cancel := context.WithCancel(t.Context())
	told := make(chan tunnel.Change, 256)
	var reading sync.WaitGroup
	reading.Go(func() {
		control.NewClient(o.socket).Events(ctx, func(e control.Event) error {
			if e.Change != nil {
				told <- *e.Change
			}
			return nil
		})
	})
	defer reading.Wait()
	defer cancel()
	next := func(from, to string) tunnel.Change {
		t.Helper()
		for over := time.After(runPatience); ; {
			select {
			case c := <-told:
				t.Log(c)
				if c.What == tunnel.ChangedDatagrams && c.From == from && c.To == to {
					return c
				}
			case <-over:
				t.Fatalf("no change from %s to %s is told", from, to)
			}
		}
	}

	stalls := callStalls(t)
	look := o.numbered(o.status().Listen)
	runEventually(t, "datagrams go by sealed and come back, and TLS is joined beside it", func() bool {
		arrived := 0
		look(func(e *echoes) { arrived = len(e.arrived) })
		l := o.status().Link
		return arrived > 200 && l.Way == "sealed" && l.Streams == "tls"
	})

	const noUDP = "iifname link meta l4proto udp drop"
	for _, step := range []struct {
		rules, from, to string
		cause           tunnel.Code
		gap             [2]time.Duration
		lost            [2]uint64 // up and down together
	}{
		{noUDP, "sealed", "lanes", tunnel.UDPBlocked, [2]time.Duration{400 * time.Millisecond, 2 * time.Second}, [2]uint64{30, 250}},
		{"", "lanes", "sealed", tunnel.UDPReturned, [2]time.Duration{0, 500 * time.Millisecond}, [2]uint64{0, 40}},
	} {
		look((*echoes).begin)
		began := time.Now()
		callFilter(t, o.pair.Near, step.rules)
		callFilter(t, o.pair.Far, step.rules)
		c := next(step.from, step.to)
		held := 3 * stalls(began, time.Now())
		if c.Cause != step.cause {
			t.Errorf("%v: the cause is %s, want %s", c, c.Cause, step.cause)
		}
		var sent, arrived int
		var met time.Duration // the gap
		look(func(e *echoes) { sent, arrived, met = e.sent, len(e.arrived), e.gap })
		missing := max(0, sent-arrived) // some are still under way at both ends of the time
		t.Logf("the app met a gap of %v and missed %d of %d (the machine stood still for %v)", met.Round(time.Millisecond), missing, sent, (held / 3).Round(time.Millisecond))
		if c.Gap < step.gap[0] || c.Gap > step.gap[1]+held || (c.Gap-met).Abs() > 100*time.Millisecond+held {
			t.Errorf("%v: the gap is %v, the app met %v, want between %v and %v", c, c.Gap, met, step.gap[0], step.gap[1])
		}
		lost, slack := c.LostUp+c.Lost, uint64(held/(10*time.Millisecond))
		if lost < step.lost[0] || lost > step.lost[1]+slack || lost > uint64(missing)*3/2+20+slack || uint64(missing) > lost*2+20+slack {
			t.Errorf("%v: lost %d, the app missed %d, want between %d and %d", c, lost, missing, step.lost[0], step.lost[1])
		}

		// The same words everywhere.
		out, err := exec.Command(o.culvert, "status", "--control", o.socket).Output()
		if line := c.At.Local().Format("15:04:05.000") + "  " + c.String(); err != nil || !strings.Contains(string(out), line) {
			t.Errorf("status (%v) does not say %q:\n%s", err, line, out)
		}
		runEventually(t, "the log has the line", func() bool {
			n := 0
			for _, line := range strings.Split(o.logs[1].String(), "\n") {
				if strings.Contains(line, "msg=change") && strings.Contains(line, "name=datagrams from="+step.from+" to="+step.to+" code="+string(step.cause)) {
					n++
				}
			}
			return n == 1
		})
		if step.rules != "" {
			time.Sleep(2 * time.Second) // a while by lanes
		}
	}
}
