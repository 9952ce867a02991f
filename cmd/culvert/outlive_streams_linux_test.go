package main

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"sync"
	"syscall"
	"testing"
	"time"

	"culvert/cmd/internal/link"
)

// What a connection asks the far end for, with its first byte.
const (
	outliveDownload = 'd' // so many bytes, which follow as 8 bytes, at a steady rate
	outliveEcho     = 'e' // each byte back
	outliveDigest   = 'h' // the SHA-256 of all until the end of what is sent, once that has come
	outliveReset    = 'r' // a reset after the next byte
	outliveWatch    = 'w' // nothing; how it ends is told to the test
)

// outliveRate is that of a download, in bytes/s: it is under way for as long as
// the path changes.
const outliveRate = 3 << 20

// outliveContent is what a download consists of.
func outliveContent() io.Reader { return rand.NewChaCha8([32]byte{1}) }

// streams answers TCP connections at the far end. ends receives how each that
// asks to be watched has ended.
func (o *outlive) streams(ends chan<- error) (at netip.AddrPort) {
	o.t.Helper()
	var l net.Listener
	if err := o.pair.Far.Do(func() (err error) { l, err = net.Listen("tcp4", "127.0.0.1:0"); return err }); err != nil {
		o.t.Fatal(err)
	}
	var mu sync.Mutex // guards open
	var open []net.Conn
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			mu.Lock()
			open = append(open, c)
			mu.Unlock()
			wg.Go(func() {
				defer c.Close()
				if err := outliveServe(c.(*net.TCPConn), ends); err != nil && !errors.Is(err, net.ErrClosed) {
					o.t.Logf("a connection at the far end: %v", err)
				}
			})
		}
	})
	o.t.Cleanup(func() {
		l.Close()
		mu.Lock()
		for _, c := range open {
			c.Close()
		}
		mu.Unlock()
		wg.Wait()
	})
	return l.Addr().(*net.TCPAddr).AddrPort()
}

func outliveServe(c *net.TCPConn, ends chan<- error) error {
	var want [1]byte
	if _, err := io.ReadFull(c, want[:]); err != nil {
		return err
	}
	switch want[0] {
	case outliveDownload:
		var size [8]byte
		if _, err := io.ReadFull(c, size[:]); err != nil {
			return err
		}
		content, left := outliveContent(), int64(binary.BigEndian.Uint64(size[:]))
		tick := time.NewTicker(20 * time.Millisecond)
		defer tick.Stop()
		for left > 0 {
			<-tick.C
			n, err := io.CopyN(c, content, min(left, outliveRate/50))
			if err != nil {
				return err
			}
			left -= n
		}
	case outliveEcho:
		_, err := io.Copy(c, c)
		return err
	case outliveDigest:
		h := sha256.New()
		if _, err := io.Copy(h, c); err != nil {
			return err
		}
		_, err := c.Write(h.Sum(nil))
		return err
	case outliveReset:
		if _, err := io.ReadFull(c, want[:]); err != nil {
			return err
		}
		return c.SetLinger(0) // the end is a reset
	case outliveWatch:
		_, err := io.Copy(io.Discard, c)
		ends <- err
	}
	return nil
}

// connect connects through the sidecar.
func (o *outlive) connect(to netip.AddrPort, first ...byte) *net.TCPConn {
	o.t.Helper()
	c, reply := o.ask(runStatus(o.t, o.socket).Listen, 1, to.Addr().String(), to.Port())
	if reply[1] != 0 {
		o.t.Fatalf("CONNECT: reply %d", reply[1])
	}
	c.SetDeadline(time.Now().Add(3 * runPatience))
	if _, err := c.Write(first); err != nil {
		o.t.Fatal(err)
	}
	return c.(*net.TCPConn)
}

// chat sends numbered messages of several lengths, as a WebSocket does, each
// of which comes back, until end is closed. It returns how many were sent.
func outliveChat(c net.Conn, end <-chan struct{}) (sent int, err error) {
	message := func(n int) []byte {
		return append(binary.BigEndian.AppendUint32(nil, uint32(n)), bytes.Repeat([]byte{byte(n)}, 20+n%500)...)
	}
	counted := make(chan int, 1)
	var wg sync.WaitGroup
	var failed error // of the goroutine that sends, until it has ended
	wg.Go(func() {
		tick := time.NewTicker(50 * time.Millisecond)
		defer tick.Stop()
		for n, last := 0, false; !last; n++ {
			select {
			case <-tick.C:
			case <-end: // the number is there before the last message comes back
				last = true
				counted <- n + 1
			}
			if _, failed = c.Write(message(n)); failed != nil {
				return
			}
		}
	})
	sent = -1
	for n := 0; sent < 0 || n < sent; n++ {
		want := message(n)
		got := make([]byte, len(want))
		if _, err = io.ReadFull(c, got); err != nil {
			break
		}
		if !bytes.Equal(got, want) {
			err = fmt.Errorf("message %d came back as number %d", n, binary.BigEndian.Uint32(got))
			break
		}
		select {
		case sent = <-counted:
		default:
		}
	}
	if err == nil { // no byte too many
		c.SetReadDeadline(time.Now().Add(300 * time.Millisecond))
		if n, err2 := c.Read(make([]byte, 1)); n != 0 || !errors.Is(err2, os.ErrDeadlineExceeded) {
			err = fmt.Errorf("after the last message %d bytes more came, %v", n, err2)
		}
	}
	if err != nil {
		c.Close()
	}
	wg.Wait()
	return sent, errors.Join(err, failed)
}

// TCP streams cross each change of what carries them: no byte is lost or comes
// twice, an end of what one side sends stays one, and a reset a reset.
func outliveSwitches(t *testing.T, bin string) {
	o := newOutlive(t, bin)
	ends := make(chan error, 1)
	far := o.streams(ends)
	o.talk()
	o.goesBy("sealed")
	carried := func(by string) {
		t.Helper()
		runEventually(t, "streams go by "+by, func() bool { return runStatus(t, o.socket).Link.Streams == by })
	}
	carried("tls")

	const size = 50 << 20
	began := time.Now()
	var wg sync.WaitGroup
	download := o.connect(far, binary.BigEndian.AppendUint64([]byte{outliveDownload}, size)...)
	var finished time.Time // of the goroutine below, as the following two
	var same bool
	var received int64
	wg.Go(func() {
		got, want := sha256.New(), sha256.New()
		io.CopyN(want, outliveContent(), size)
		var err error
		if received, err = io.Copy(got, download); err != nil {
			t.Errorf("the download: %v", err)
		}
		finished, same = time.Now(), bytes.Equal(got.Sum(nil), want.Sum(nil))
	})
	end := make(chan struct{})
	socket := o.connect(far, outliveEcho)
	wg.Go(func() {
		sent, err := outliveChat(socket, end)
		t.Logf("%d messages came back", sent)
		if err != nil {
			t.Errorf("the WebSocket: %v", err)
		}
	})
	half := o.connect(far, outliveDigest)
	resets, reset := o.connect(far, outliveReset), o.connect(far, outliveWatch)

	sum := sha256.New()
	say := func(n int) {
		b := make([]byte, n)
		rand.NewChaCha8([32]byte{2}).Read(b)
		sum.Write(b)
		if _, err := half.Write(b); err != nil {
			t.Errorf("before its half-close: %v", err)
		}
	}
	say(100_000)
	var stands time.Duration
	for i, s := range []struct {
		by           string
		noUDP, noTCP bool
	}{
		{"quic", false, true},
		{"tls", true, false},
		{"quic", false, true},
		{"tls", true, false},
		{"tls", false, false}, // datagrams go back to UDP
	} {
		at := time.Now()
		o.link.Change(func(l *link.Settings) { l.NoUDP, l.NoTCP = s.noUDP, s.noTCP })
		switch i { // nothing that passes has told either end yet
		case 0:
			say(100_000)
			half.CloseWrite()
		case 1:
			resets.Write([]byte("!"))
		case 2:
			reset.SetLinger(0)
			reset.Close()
		}
		carried(s.by)
		stands = max(stands, time.Since(at))
		t.Logf("switch %d: streams go by %s after %v", i+1, s.by, time.Since(at).Round(time.Millisecond))
		time.Sleep(2 * time.Second)
	}
	over := time.Now()
	o.within("the longest that streams stand still", stands, 5*time.Second, began, over)
	close(end)
	wg.Wait()
	if !same || received != size {
		t.Errorf("%d of %d bytes of the download, the right ones: %v", received, int64(size), same)
	}
	t.Logf("%d bytes took %v, the switches %v, the longest %v", received, finished.Sub(began).Round(time.Millisecond), over.Sub(began).Round(time.Millisecond), stands.Round(time.Millisecond))
	if got, err := io.ReadAll(half); err != nil || !bytes.Equal(got, sum.Sum(nil)) {
		t.Errorf("after a half-close %d bytes came, %v; want the digest of what was sent", len(got), err)
	}
	if n, err := io.ReadAll(resets); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("the far end's reset is %d bytes and %v here", len(n), err)
	}
	select {
	case err := <-ends:
		if !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("the app's reset is %v at the far end", err)
		}
	case <-time.After(runPatience):
		t.Error("the app's reset does not come to the far end")
	}
	o.onePort()
}
