package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"culvert/cmd/internal/cmdtest"
)

// starved is a call through two processes that will be given too little.
type starved struct {
	cloud, sidecar int // pids
	gone           chan struct{}
	proxy          string
	call           *runCall
	far            netip.AddrPort // an echo on UDP
	farTCP         netip.AddrPort
	disk           string // where the sidecar writes its audit
}

func newStarved(t *testing.T) *starved {
	t.Helper()
	dir := t.TempDir()
	bin, err := programs()
	if err != nil {
		t.Fatal(err)
	}
	program, conf := filepath.Join(bin, "culvert-cloudproxy"), filepath.Join(dir, "conf")
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	at := l.Addr().String()
	l.Close()
	if out, err := exec.Command(program, "init", "--host", at, "--dir", conf, "--allow", "127.0.0.0/8").CombinedOutput(); err != nil {
		t.Fatalf("init: %v\n%s", err, out)
	}
	s := &starved{disk: filepath.Join(dir, "disk"), gone: make(chan struct{}), far: runEcho(t), farTCP: cmdtest.StreamEcho(t)}
	if err := os.Mkdir(s.disk, 0o700); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(conf, "culvert.yaml")
	text, err := os.ReadFile(file)
	if err == nil {
		err = os.WriteFile(file, append(text, "\nlog:\n  audit_file: "+filepath.Join(s.disk, "audit.log")+"\n"...), 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
	little := []string{"GOMEMLIMIT=20MiB"}
	cloud := exec.Command(program, "run", "-c", filepath.Join(conf, "cloudproxy.yaml"))
	cloud.Env = append(os.Environ(), little...)
	log := &cmdtest.Text{}
	cloud.Stdout, cloud.Stderr = log, log
	if err := cloud.Start(); err != nil {
		t.Fatal(err)
	}
	go func() { cloud.Wait(); close(s.gone) }()
	t.Cleanup(func() {
		cloud.Process.Kill()
		<-s.gone
		if t.Failed() {
			t.Logf("the cloud proxy's log:\n%s", log)
		}
	})
	p := startRunProcess(t, nil, little, "-c", file)
	runReady(t, p.socket)
	s.cloud, s.sidecar = cloud.Process.Pid, p.cmd.Process.Pid
	s.proxy = runStatus(t, p.socket).Listen
	s.call = newRunCall(t, s.proxy, s.far)
	runInChannel(t, p.socket)
	go func() {
		which := ""
		select {
		case <-p.exited:
			which = "sidecar"
		case <-s.gone:
			which = "cloud proxy"
		case <-t.Context().Done():
		}
		if t.Context().Err() == nil {
			t.Errorf("the %s has ended", which)
		}
	}()
	return s
}

// ask sends a SOCKS5 request.
func (s *starved) ask(command byte, to netip.AddrPort, within time.Duration) (net.Conn, netip.AddrPort, error) {
	c, err := net.DialTimeout("tcp", s.proxy, within)
	if err != nil {
		return nil, netip.AddrPort{}, err
	}
	c.SetDeadline(time.Now().Add(within))
	b := append([]byte{5, 1, 0, 5, command, 0, 1}, to.Addr().AsSlice()...)
	c.Write(binary.BigEndian.AppendUint16(b, to.Port()))
	var r [12]byte
	if _, err = io.ReadFull(c, r[:]); err == nil && r[3] != 0 {
		err = fmt.Errorf("reply %d", r[3])
	}
	if err != nil {
		c.Close()
		return nil, netip.AddrPort{}, err
	}
	return c, netip.AddrPortFrom(netip.AddrFrom4([4]byte(r[6:10])), binary.BigEndian.Uint16(r[10:])), nil
}

// fresh says why a new stream or a new association does not work.
func (s *starved) fresh(within time.Duration) error {
	c, _, err := s.ask(1, s.farTCP, within)
	if err != nil {
		return fmt.Errorf("CONNECT: %w", err)
	}
	defer c.Close()
	c.Write([]byte("x"))
	if _, err := io.ReadFull(c, make([]byte, 1)); err != nil {
		return fmt.Errorf("the stream: %w", err)
	}
	a, relay, err := s.ask(3, netip.AddrPortFrom(netip.IPv4Unspecified(), 0), within)
	if err != nil {
		return fmt.Errorf("UDP ASSOCIATE: %w", err)
	}
	defer a.Close()
	u, err := net.DialUDP("udp4", nil, net.UDPAddrFromAddrPort(relay))
	if err != nil {
		return err
	}
	defer u.Close()
	u.SetDeadline(time.Now().Add(within))
	u.Write(binary.BigEndian.AppendUint16(append([]byte{0, 0, 0, 1}, s.far.Addr().AsSlice()...), s.far.Port()))
	if _, err := u.Read(make([]byte, 100)); err != nil {
		return fmt.Errorf("the association: %w", err)
	}
	return nil
}

// crowd has many apps come at once, of whom any may be refused.
func (s *starved) crowd(n int) {
	var wg sync.WaitGroup
	for range n {
		wg.Go(func() { s.fresh(500 * time.Millisecond) })
	}
	s.denied()
	wg.Wait()
}

// denied asks for what the policy forbids, which is a line of the audit.
func (s *starved) denied() {
	if c, _, err := s.ask(1, netip.MustParseAddrPort("192.0.2.1:80"), 500*time.Millisecond); err == nil {
		c.Close()
	}
}

// noFiles lets a process open no further file.
func noFiles(t *testing.T, pid int) (end func()) {
	t.Helper()
	open, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
	if err != nil {
		t.Fatal(err)
	}
	var was unix.Rlimit
	if err := unix.Prlimit(pid, unix.RLIMIT_NOFILE, nil, &was); err != nil {
		t.Fatal(err)
	}
	set := func(cur uint64) {
		if err := unix.Prlimit(pid, unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: cur, Max: was.Max}, nil); err != nil {
			t.Fatal(err)
		}
	}
	set(uint64(len(open)))
	return func() { set(was.Cur) }
}

// tenth gives a process a tenth of one CPU, in a control group of its own.
func tenth(t *testing.T, pid int) (end func()) {
	t.Helper()
	for _, v := range []struct{ root, set string }{
		{"/sys/fs/cgroup", "cpu.max=10000 100000"}, {"/sys/fs/cgroup/cpu", "cpu.cfs_quota_us=10000"},
	} {
		dir := filepath.Join(v.root, fmt.Sprintf("culvert-test-%d", pid))
		if os.Mkdir(dir, 0o755) != nil {
			continue
		}
		name, value, _ := strings.Cut(v.set, "=")
		put := func(dir, name, value string) error {
			f, err := os.OpenFile(filepath.Join(dir, name), os.O_WRONLY, 0)
			if err != nil {
				return err
			}
			_, err = f.WriteString(value)
			return errors.Join(err, f.Close())
		}
		end := func() {
			put(v.root, "cgroup.procs", strconv.Itoa(pid))
			runEventually(t, "the control group is empty", func() bool { return os.Remove(dir) == nil })
		}
		if errors.Join(put(dir, name, value), put(dir, "cgroup.procs", strconv.Itoa(pid))) == nil {
			return end
		}
		os.Remove(dir)
	}
	t.Skip("no control group with a share of the CPU can be made here")
	return nil
}

// fullDisk has the audit file on a file system that holds nothing more.
func (s *starved) fullDisk(t *testing.T) (end func()) {
	t.Helper()
	if err := unix.Mount("tmpfs", s.disk, "tmpfs", 0, "size=64k"); err != nil {
		t.Skipf("no small file system can be made here: %v", err)
	}
	unmount := sync.OnceFunc(func() { unix.Unmount(s.disk, unix.MNT_DETACH) })
	t.Cleanup(unmount)
	filler := filepath.Join(s.disk, "filler")
	err := os.WriteFile(filler, make([]byte, 1<<20), 0o600)
	if !errors.Is(err, unix.ENOSPC) {
		t.Fatalf("the disk is not full: %v", err)
	}
	return func() {
		os.Remove(filler)
		runEventually(t, "the audit goes on", func() bool {
			s.denied()
			st, err := os.Stat(filepath.Join(s.disk, "audit.log"))
			return err == nil && st.Size() > 0
		})
	}
}

// A call that is under way outlives the want of anything; nothing crashes; and when
// there is enough again, all is well.
func TestACallOutlivesTheWantOfAnything(t *testing.T) {
	if testing.Short() {
		t.Skip("fifteen seconds")
	}
	s := newStarved(t)
	for _, c := range []struct {
		what  string
		begin func(t *testing.T) func()
	}{
		{"descriptors at the cloud proxy", func(t *testing.T) func() { return noFiles(t, s.cloud) }},
		{"descriptors at the sidecar", func(t *testing.T) func() { return noFiles(t, s.sidecar) }},
		{"all but a tenth of a CPU at the cloud proxy", func(t *testing.T) func() { return tenth(t, s.cloud) }},
		{"all but a tenth of a CPU at the sidecar", func(t *testing.T) func() { return tenth(t, s.sidecar) }},
		{"room on the disk", s.fullDisk},
		{"nothing but memory", func(t *testing.T) func() { return func() {} }},
	} {
		t.Run(c.what, func(t *testing.T) {
			// Again and again: a single datagram may be lost behind the crowd before.
			runEventually(t, "all works before", func() bool { return s.fresh(5*time.Second) == nil })
			end := c.begin(t)
			before, began := s.call.returned.Load(), time.Now()
			for time.Since(began) < time.Second {
				s.crowd(100)
			}
			took := time.Since(began)
			during := s.call.returned.Load() - before
			end()
			again := time.Now()
			var why error
			runEventually(t, "all works again", func() bool { why = s.fresh(5 * time.Second); return why == nil })
			recovered := time.Since(again)
			before = s.call.returned.Load()
			runEventually(t, "the call goes on", func() bool { return s.call.returned.Load() > before+10 })
			if during == 0 {
				t.Error("nothing of the call came back meanwhile")
			}
			t.Logf("%d packets of the call came back in %v, which is %.0f %%; all worked %v after", during, took.Round(time.Millisecond), float64(during)/took.Seconds(), recovered.Round(time.Millisecond))
		})
	}
	if text, err := os.ReadFile(filepath.Join(s.disk, "audit.log")); err == nil {
		for line := range strings.Lines(string(text)) {
			if !strings.HasPrefix(line, "{") || !strings.HasSuffix(line, "}\n") {
				t.Errorf("in the audit file: %q", line)
			}
		}
	}
}
