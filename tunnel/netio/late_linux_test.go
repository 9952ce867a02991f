//go:build linux && (amd64 || arm64 || arm || riscv64)

package netio

import (
	"net"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// stamping waits until the kernel notes when datagrams come: it begins a while
// after the first socket asks for it, and ends with the last.
func stamping(t *testing.T) {
	t.Helper()
	c, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	raw, err := c.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	if e := raw.Control(func(fd uintptr) { err = Stamp(fd) }); e != nil || err != nil {
		t.Fatal(e, err)
	}
	const waits = 20 * time.Millisecond
	for end := time.Now().Add(30 * time.Second); time.Now().Before(end); {
		if _, err := c.WriteTo([]byte("x"), c.LocalAddr()); err != nil {
			t.Fatal(err)
		}
		time.Sleep(waits)
		oob := make([]byte, unix.CmsgSpace(16))
		_, n, _, _, err := c.ReadMsgUDP(make([]byte, 10), oob)
		if err != nil {
			t.Fatal(err)
		}
		if at := Received(oob[:n]); at != 0 && time.Now().UnixNano()-at > int64(waits/2) {
			return
		}
	}
	t.Skip("this kernel does not note when datagrams come")
}

// A process that stood still finds in its sockets what is of no use any more.
func TestWhatHasWaitedTooLongIsDropped(t *testing.T) {
	stamping(t)
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
