package main

import (
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"culvert/cmd/internal/config"
	"culvert/cmd/internal/netpair"
)

// tenants is a pair whose sidecar runs, with an app that is measured.
type tenants struct {
	*only443
	listen string
	app    net.Conn // of an association
	near   *exec.Cmd
}

func newTenants(t *testing.T, bin string, mode string, change ...func(dir string)) *tenants {
	t.Helper()
	o := &tenants{only443: newOnly443On(t, bin, netpair.New(t), change...)}
	o.near = o.start(o.pair.Near, o.culvert, "run", "-c", filepath.Join(o.dir, "culvert.yaml"), "--listen", "127.0.0.1:0", "--control", o.socket, "--mode", mode)
	runReady(t, o.socket)
	o.listen = runStatus(t, o.socket).Listen
	o.app = o.associate(o.listen)
	o.app.SetDeadline(time.Time{})
	return o
}

// measure does what apps do, until ctx ends: datagrams that come back, and new
// streams of which a byte does. It returns how long each took, sorted.
func (o *tenants) measure(ctx context.Context) (datagrams, streams []time.Duration) {
	o.t.Helper()
	packet := append(append([]byte{0, 0, 0}, socksRequest(0, "127.0.0.1", o.udp)[3:]...), make([]byte, 8)...)
	b := make([]byte, 2048)
	for n := uint64(1); ctx.Err() == nil; n++ {
		began := time.Now()
		binary.BigEndian.PutUint64(packet[len(packet)-8:], uint64(began.UnixNano()))
		o.app.Write(packet)
		o.app.SetReadDeadline(began.Add(time.Second)) // then it counts as lost, which is worse than any limit
		for {
			size, err := o.app.Read(b)
			if err != nil || size >= 8 && string(b[size-8:size]) == string(packet[len(packet)-8:]) {
				break
			}
		}
		datagrams = append(datagrams, time.Since(began))
		if n%5 == 0 {
			began = time.Now()
			c, reply := o.ask(o.listen, 1, "127.0.0.1", o.tcp)
			if reply[1] != 0 {
				o.t.Fatalf("CONNECT: reply %d", reply[1])
			}
			c.Write([]byte{1})
			if _, err := io.ReadFull(c, make([]byte, 1)); err != nil {
				o.t.Fatal(err)
			}
			streams = append(streams, time.Since(began))
			c.Close()
		}
		time.Sleep(5 * time.Millisecond) // the pace of an app
	}
	slices.Sort(datagrams)
	slices.Sort(streams)
	return datagrams, streams
}

func p99(sorted []time.Duration) time.Duration { return sorted[len(sorted)*99/100] }

// undisturbed compares what others met with what they had met before. A machine on
// which that was slow already may be slow.
func undisturbed(t *testing.T, what string, before, meanwhile []time.Duration) {
	t.Helper()
	if len(before) < 5 || len(meanwhile) < 5 {
		t.Fatalf("%s: measured %d times and %d times", what, len(before), len(meanwhile))
	}
	if most := max(100*time.Millisecond, 3*p99(before)); p99(meanwhile) > most {
		t.Errorf("%s: p99 %s, before %s", what, p99(meanwhile), p99(before))
	}
	t.Logf("%s: p50 %s, p99 %s of %d; before p50 %s, p99 %s of %d", what, meanwhile[len(meanwhile)/2].Round(time.Microsecond), p99(meanwhile).Round(time.Microsecond), len(meanwhile),
		before[len(before)/2].Round(time.Microsecond), p99(before).Round(time.Microsecond), len(before))
}

// A thousand connections that say nothing, or begin and say no more, are closed at
// the front and at port 443, and nobody else notices.
func TestAThousandSilentConnectionsAreClosedAndDisturbNobody(t *testing.T) {
	if testing.Short() {
		t.Skip("lasts for as long as silence is borne")
	}
	o := newTenants(t, buildBoth(t), "auto")
	conf, err := config.ReadSidecar(filepath.Join(o.dir, "culvert.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	client := sidecarTLS(t, conf)
	span := func(d time.Duration) context.Context {
		ctx, cancel := context.WithTimeout(t.Context(), d)
		t.Cleanup(cancel)
		return ctx
	}
	datagrams, streams := o.measure(span(1500 * time.Millisecond))

	const each = 1000
	var waiting sync.WaitGroup
	var mu sync.Mutex
	lasted := map[string][]time.Duration{} // guarded by mu
	wait := func(where string, c net.Conn, silentFrom time.Time) {
		c.SetReadDeadline(time.Now().Add(runPatience))
		_, err := io.Copy(io.Discard, c)
		took := time.Since(silentFrom)
		c.Close()
		if errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("%s: one is still open", where)
		}
		mu.Lock()
		defer mu.Unlock()
		lasted[where] = append(lasted[where], took)
	}
	err = o.pair.Near.Do(func() error {
		for i := range each {
			for where, to := range map[string]string{"the front": o.listen, "port 443": netip.AddrPortFrom(netpair.FarAddr, 443).String()} {
				c, err := net.Dial("tcp4", to)
				if err != nil {
					return err
				}
				switch {
				case where == "the front" && i%4 == 1:
					c.Write([]byte{5}) // half a greeting
				case where == "port 443" && i%4 == 1:
					c.Write([]byte{22, 3, 1, 2, 0, 1, 0, 1}) // half a ClientHello
				case where == "port 443" && i%10 == 2:
					secured := tls.Client(c, client.Clone())
					waiting.Go(func() {
						secured.SetDeadline(time.Now().Add(runPatience))
						if secured.Handshake() == nil {
							wait("port 443 after TLS", secured, time.Now())
						}
					})
					continue
				}
				at := time.Now()
				waiting.Go(func() { wait(where, c, at) })
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	during, streamsDuring := o.measure(span(4 * time.Second))
	waiting.Wait()
	undisturbed(t, "datagrams", datagrams, during)
	undisturbed(t, "new streams", streams, streamsDuring)
	for where, all := range lasted {
		slices.Sort(all)
		// The median, because a busy machine may be late with any one of them.
		if median := all[len(all)/2]; median > 5*time.Second {
			t.Errorf("%s: half of %d last longer than %s", where, len(all), median)
		}
		t.Logf("%s: %d, closed within %s (median), %s (all)", where, len(all), all[len(all)/2].Round(time.Millisecond), all[len(all)-1].Round(time.Millisecond))
	}
}

// Streams that nobody reads wait where they are: they hold up nobody else, take no
// more memory than they may, and go on once they are read.
func TestStreamsThatNobodyReadHoldUpThemselvesAlone(t *testing.T) {
	if testing.Short() {
		t.Skip("builds the programs and runs them between namespaces")
	}
	bin := buildBoth(t)
	for _, mode := range []string{"udp", "tcp"} {
		t.Run(mode, func(t *testing.T) {
			const streamMemory = 16 // MiB
			o := newTenants(t, bin, mode, func(dir string) {
				rewrite(t, dir, nil, func(text string) string { return text + fmt.Sprintf("limits: {stream_memory: %d}\n", streamMemory) })
			})
			source, sent := o.endless()
			span := func(d time.Duration) context.Context {
				ctx, cancel := context.WithTimeout(t.Context(), d)
				t.Cleanup(cancel)
				return ctx
			}
			datagrams, streams := o.measure(span(1500 * time.Millisecond))
			download := func() time.Duration {
				began := time.Now()
				c, reply := o.ask(o.listen, 1, "127.0.0.1", source)
				defer c.Close()
				if n, err := io.CopyN(io.Discard, c, 8<<20); reply[1] != 0 || err != nil {
					t.Errorf("a download: reply %d, %d bytes after %s, %v", reply[1], n, time.Since(began), err)
				}
				return time.Since(began)
			}
			alone := download()
			before := o.residents(t)

			const slow = 24 // each of which takes 512 KiB of the window that a QUIC connection has for all
			var unread []net.Conn
			for range slow {
				c, reply := o.ask(o.listen, 1, "127.0.0.1", source)
				if reply[1] != 0 {
					t.Fatalf("CONNECT: reply %d", reply[1])
				}
				unread = append(unread, c)
			}
			last, since := sent(), time.Now()
			filling := since
			runEventually(t, "the source is held up", func() bool {
				if now := sent(); now != last {
					last, since = now, time.Now()
				}
				return time.Since(since) > time.Second
			})
			t.Logf("held up after %s", time.Since(filling).Round(time.Millisecond))
			during, streamsDuring := o.measure(span(2 * time.Second))
			undisturbed(t, "datagrams", datagrams, during)
			undisturbed(t, "new streams", streams, streamsDuring)
			beside := download()
			t.Logf("a download of 8 MiB takes %s, before %s", beside.Round(time.Millisecond), alone.Round(time.Millisecond))
			if beside > 10*alone+2*time.Second {
				t.Error("others' downloads are held up")
			}
			o.grownBy(t, before, streamMemory)
			// What was not read is all there, and more comes.
			t.Logf("the source has sent %d MiB, and waits", last>>20)
			again := time.Now()
			for i, c := range unread[:10] {
				c.SetReadDeadline(time.Now().Add(runPatience))
				if n, err := io.CopyN(io.Discard, c, 1<<20); err != nil {
					t.Errorf("stream %d ends after %d bytes: %v", i, n, err)
				}
			}
			t.Logf("ten of them give a MiB each in %s", time.Since(again).Round(time.Millisecond))
			for _, c := range unread {
				c.Close()
			}
		})
	}
}

// So do uploads whose destination takes nothing, though that has no bound but the
// session's memory at the cloud proxy.
func TestUploadsThatNobodyTakesHoldUpThemselvesAlone(t *testing.T) {
	if testing.Short() {
		t.Skip("builds the programs and runs them between namespaces")
	}
	bin := buildBoth(t)
	for _, tt := range []struct {
		mode   string
		memory int // MiB
	}{{"udp", 64}, {"tcp", 16}} {
		t.Run(fmt.Sprintf("%s, %d MiB", tt.mode, tt.memory), func(t *testing.T) {
			o := newTenants(t, bin, tt.mode, func(dir string) {
				rewrite(t, dir, nil, func(text string) string { return text + fmt.Sprintf("limits: {stream_memory: %d}\n", tt.memory) })
			})
			sink, open := o.sink()
			span := func(d time.Duration) context.Context {
				ctx, cancel := context.WithTimeout(t.Context(), d)
				t.Cleanup(cancel)
				return ctx
			}
			datagrams, streams := o.measure(span(1500 * time.Millisecond))
			upload := func() time.Duration {
				began := time.Now()
				c, reply := o.ask(o.listen, 1, "127.0.0.1", o.tcp)
				defer c.Close()
				c.SetDeadline(began.Add(runPatience))
				go c.Write(make([]byte, 8<<20))
				if n, err := io.CopyN(io.Discard, c, 8<<20); reply[1] != 0 || err != nil {
					t.Errorf("an upload and its echo: reply %d, %d bytes after %s, %v", reply[1], n, time.Since(began), err)
				}
				return time.Since(began)
			}
			alone := upload()
			before := o.residents(t)

			const slow = 40
			var taken, cut atomic.Int64
			var writing sync.WaitGroup
			var stuck []net.Conn
			for i := range slow {
				c, reply := o.ask(o.listen, 1, "127.0.0.1", sink)
				if reply[1] != 0 {
					t.Fatalf("CONNECT: reply %d", reply[1])
				}
				c.SetDeadline(time.Time{})
				stuck = append(stuck, c)
				writing.Go(func() {
					b := make([]byte, 64<<10)
					for at := byte(0); ; at++ {
						for j := range b {
							b[j] = at ^ byte(i)
						}
						n, err := c.Write(b)
						taken.Add(int64(n))
						if errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE) {
							cut.Add(1)
						}
						if err != nil {
							return
						}
					}
				})
			}
			last, since := taken.Load(), time.Now()
			filling := since
			runEventually(t, "the uploads are held up", func() bool {
				if now := taken.Load() + cut.Load(); now != last {
					last, since = now, time.Now()
				}
				return time.Since(since) > 3*time.Second
			})
			t.Logf("held up after %s, %d MiB, %d of %d cut", time.Since(filling).Round(time.Millisecond), taken.Load()>>20, cut.Load(), slow)
			if cut.Load() > 0 {
				t.Errorf("%d of %d uploads were cut", cut.Load(), slow)
			}
			during, streamsDuring := o.measure(span(2 * time.Second))
			undisturbed(t, "datagrams", datagrams, during)
			undisturbed(t, "new streams", streams, streamsDuring)
			beside := upload()
			t.Logf("8 MiB there and back take %s, before %s", beside.Round(time.Millisecond), alone.Round(time.Millisecond))
			if beside > 10*alone+2*time.Second {
				t.Error("others' uploads are held up")
			}
			o.grownBy(t, before, tt.memory)
			// They go on where they were once somebody takes what they bring.
			for _, c := range stuck {
				c.SetWriteDeadline(time.Now())
			}
			writing.Wait()
			for _, c := range stuck {
				c.(*net.TCPConn).CloseWrite()
			}
			arrived, whole := open()
			if whole != slow || arrived != taken.Load() {
				t.Errorf("%d of %d uploads arrived, %d bytes of %d", whole, slow, arrived, taken.Load())
			}
			t.Logf("%d MiB arrived", arrived>>20)
			for _, c := range stuck {
				c.Close()
			}
		})
	}
}

// sink takes connections at the far end and reads nothing of them until open. That
// returns how many bytes arrived and how many of the connections ended in peace.
func (o *tenants) sink() (port uint16, open func() (arrived int64, whole int)) {
	o.t.Helper()
	var l net.Listener
	small := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) (err error) {
		c.Control(func(fd uintptr) { err = syscall.SetsockoptInt(int(fd), syscall.SOL_SOCKET, syscall.SO_RCVBUF, 64<<10) })
		return err
	}}
	if err := o.pair.Far.Do(func() (err error) { l, err = small.Listen(context.Background(), "tcp4", "127.0.0.1:0"); return err }); err != nil {
		o.t.Fatal(err)
	}
	var all, whole atomic.Int64
	var serving sync.WaitGroup
	begin := make(chan struct{})
	serving.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			serving.Go(func() {
				defer c.Close()
				<-begin
				c.SetDeadline(time.Now().Add(runPatience))
				n, err := io.Copy(io.Discard, c)
				all.Add(n)
				if err == nil {
					whole.Add(1)
				}
			})
		}
	})
	once := sync.OnceFunc(func() {
		l.Close()
		close(begin)
		serving.Wait()
	})
	o.t.Cleanup(once)
	return uint16(l.Addr().(*net.TCPAddr).Port), func() (int64, int) { once(); return all.Load(), int(whole.Load()) }
}

// endless is a source at the far end that never ends. sent is what it has.
func (o *tenants) endless() (port uint16, sent func() int64) {
	o.t.Helper()
	var l net.Listener
	if err := o.pair.Far.Do(func() (err error) { l, err = net.Listen("tcp4", "127.0.0.1:0"); return err }); err != nil {
		o.t.Fatal(err)
	}
	var all atomic.Int64
	var serving sync.WaitGroup
	var mu sync.Mutex
	open := map[net.Conn]bool{} // guarded by mu
	serving.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			mu.Lock()
			open[c] = true
			mu.Unlock()
			serving.Go(func() {
				defer c.Close()
				for b := make([]byte, 64<<10); ; {
					n, err := c.Write(b)
					all.Add(int64(n))
					if err != nil {
						return
					}
				}
			})
		}
	})
	o.t.Cleanup(func() {
		l.Close()
		mu.Lock()
		for c := range open {
			c.Close()
		}
		mu.Unlock()
		serving.Wait()
	})
	return uint16(l.Addr().(*net.TCPAddr).Port), all.Load
}

// residents is the memory that both ends have now, in bytes.
func (o *tenants) residents(t *testing.T) map[string]int {
	t.Helper()
	return map[string]int{"the sidecar": resident(t, o.near.Process.Pid), "the cloud proxy": resident(t, o.clouds[0].Process.Pid)}
}

// grownBy checks what both ends have taken since then, where a session may have so
// many MiB for its streams: twice that, as Go collects garbage, and what the
// connection and the kernel's sockets are read by.
func (o *tenants) grownBy(t *testing.T, before map[string]int, share int) {
	t.Helper()
	for what, now := range o.residents(t) {
		more := now - before[what]
		t.Logf("%s: %d MiB more", what, more>>20)
		if more > (2*share+64)<<20 {
			t.Errorf("%s takes %d MiB more", what, more>>20)
		}
	}
}

// resident is the memory that a process has now, in bytes.
func resident(t *testing.T, pid int) int {
	t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/statm", pid))
	var size, pages int
	if err == nil {
		_, err = fmt.Sscan(string(text), &size, &pages)
	}
	if err != nil {
		t.Fatal(err)
	}
	return pages * os.Getpagesize()
}
