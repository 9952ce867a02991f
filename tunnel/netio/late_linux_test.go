//go:build linux && (amd64 || arm64 || arm || riscv64)

package netio

import (
	"testing"
	"time"
)

// A process that stood still finds in its sockets what is of no use any more.
func TestWhatHasWaitedTooLongIsDropped(t *testing.T) {
	for name, c := range pairs {
		t.Run(name, func(t *testing.T) {
			const age = 50 * time.Millisecond
			p, r := newPoller(t), newTook()
			p.MaxAge = age
			from, to := bind(t, c.from, c.fromAt), bind(t, c.to, c.toAt)
			out, dial := sender(t, from), at(to, c.dial)
			s, err := p.Packet(to, r)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { s.Close() })
			for range 3 {
				if err := out.Send([]byte("old"), dial); err != nil {
					t.Fatal(err)
				}
			}
			time.Sleep(2 * age) // nobody reads meanwhile
			if err := s.Start(); err != nil {
				t.Fatal(err)
			}
			for end := time.Now().Add(30 * time.Second); p.Late() < 3 && time.Now().Before(end); {
				time.Sleep(time.Millisecond)
			}
			// On a machine that is busy for longer than that a new one is late, too.
			for got := ""; got != "new"; {
				if err := out.Send([]byte("new"), dial); err != nil {
					t.Fatal(err)
				}
				select {
				case got = <-r.got:
				case <-time.After(10 * age):
				}
				if got == "old" {
					t.Fatal("what was old has been delivered")
				}
			}
			if n := p.Late(); n < 3 {
				t.Errorf("%d datagrams counted, want 3", n)
			}
		})
	}
}
