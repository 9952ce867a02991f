package main

import (
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"culvert/scripts/bench/internal/measure"
	"culvert/scripts/bench/internal/socks5"
)

// transfers are TCP connections that move bytes as fast as they go until they are closed.
type transfers struct {
	conns   []net.Conn
	bytes   atomic.Int64
	running sync.WaitGroup
}

func (o *options) transfers(n int) (*transfers, error) {
	t := &transfers{}
	for range n {
		c, err := socks5.Connect(o.socks, o.target)
		if err != nil {
			t.close()
			return nil, fmt.Errorf("connection %d: %w", len(t.conns)+1, err)
		}
		t.conns = append(t.conns, c)
		want, move := byte(wantBytes), c.Read
		if o.up {
			want, move = takeBytes, c.Write
		}
		t.running.Go(func() {
			if _, err := c.Write([]byte{want}); err != nil {
				return
			}
			b := make([]byte, 256<<10)
			for {
				n, err := move(b)
				t.bytes.Add(int64(n))
				if err != nil {
					return // closed; a connection that broke shows in the rate
				}
			}
		})
	}
	return t, nil
}

func (t *transfers) total() int64 { return t.bytes.Load() }

func (t *transfers) close() {
	for _, c := range t.conns {
		c.Close()
	}
	t.running.Wait()
}

func mbits(bytes int64, d time.Duration) float64 { return float64(bytes) * 8 / d.Seconds() / 1e6 }

// bulk moves bytes over TCP connections, down unless o.up is set.
func bulk(o *options) (measure.Result, error) {
	var r measure.Result
	t, err := o.transfers(o.flows)
	if err != nil {
		return r, err
	}
	defer t.close()
	m, err := o.begin(time.Now().Add(o.warm))
	if err != nil {
		return r, err
	}
	before := t.total()
	time.Sleep(o.dur)
	moved := t.total() - before
	cpu, elapsed, rss, err := m.end()
	if err != nil {
		return r, err
	}
	if moved == 0 {
		return r, errNothing
	}
	r.Bulk = mbits(moved, elapsed)
	if len(o.pids) > 0 {
		r.CPUPerGB = cpu.Seconds() / (float64(moved) / 1e9)
		r.RSS = float64(rss) / 1e6
	}
	return r, nil
}
