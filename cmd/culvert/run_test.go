package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
	"go.yaml.in/yaml/v3"

	"culvert/cmd/internal/assemble"
	"culvert/cmd/internal/cmdtest"
	"culvert/cmd/internal/config"
	"culvert/sidecar/control"
)

// runAsCulvert makes the test binary be culvert, for tests that need a process.
const runAsCulvert = "CULVERT_TEST_RUN_AS_CULVERT"

// checkTestClock says how far the clock of 'culvert check' is off.
const checkTestClock = "CULVERT_TEST_CHECK_CLOCK"

func TestMain(m *testing.M) {
	if os.Getenv(runAsCulvert) != "" {
		if off, err := time.ParseDuration(os.Getenv(checkTestClock)); err == nil {
			checkClock = func() time.Time { return time.Now().Add(off) }
		}
		main()
	}
	if os.Getenv(stampedeConfig) != "" {
		os.Exit(stampede(os.Args))
	}
	// Those of the machine are not meant for the networks that tests make.
	for _, name := range []string{"HTTPS_PROXY", "https_proxy"} {
		os.Unsetenv(name)
	}
	goleak.VerifyTestMain(m, goleak.Cleanup(func(code int) {
		for _, f := range atTheEnd {
			f()
		}
		os.Exit(code)
	}))
}

// atTheEnd is done when all tests have ended.
var atTheEnd []func()

// runPatience bounds every wait for something that must happen. It is far more
// than that takes on a busy machine.
const runPatience = time.Minute

// runSocket is a path for a control socket; t.TempDir can be too long for one.
func runSocket(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "culvert")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return filepath.Join(dir, "c.sock")
}

// runCLI is one culvert command from its arguments to its exit code.
func runCLI(t *testing.T, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 3*runPatience)
	defer cancel()
	var out, bad bytes.Buffer
	code = run(ctx, append([]string{"culvert"}, args...), &out, &bad)
	return code, out.String(), bad.String()
}

// runWant runs a command that must end with a code, and returns what it wrote.
func runWant(t *testing.T, code int, args ...string) (stdout, stderr string) {
	t.Helper()
	got, stdout, stderr := runCLI(t, args...)
	if got != code {
		t.Fatalf("culvert %s: exit %d, want %d\n%s%s", strings.Join(args, " "), got, code, stdout, stderr)
	}
	return stdout, stderr
}

// runStatus asks over the control socket itself. The cli package keeps flags in
// a global, so in one process only one command at a time may read its arguments.
func runStatus(t *testing.T, socket string) control.Status {
	t.Helper()
	st, err := control.NewClient(socket).Status(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return st
}

func runEventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(runPatience); !ok(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("in vain: %s", what)
		}
	}
}

// runReady waits until a sidecar has decided its first start and runs.
func runReady(t *testing.T, socket string) {
	t.Helper()
	runEventually(t, "the sidecar is ready", func() bool {
		st, err := control.NewClient(socket).Status(t.Context())
		return err == nil && st.Ready && st.State == "running"
	})
}

// runEmbedded runs 'culvert run --embedded' until the test ends or stop is
// called, which returns its exit code.
func runEmbedded(t *testing.T, more ...string) (socket string, log *cmdtest.Text, stop func() int) {
	t.Helper()
	socket, log = runSocket(t), &cmdtest.Text{}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan int, 1)
	args := append([]string{"culvert", "run", "--embedded", "--listen", "127.0.0.1:0", "--control", socket}, more...)
	go func() { done <- run(ctx, args, io.Discard, log) }()
	stop = sync.OnceValue(func() int {
		cancel()
		select {
		case code := <-done:
			return code
		case <-time.After(runPatience):
			t.Error("culvert run does not end")
			return -1
		}
	})
	t.Cleanup(func() {
		stop()
		if t.Failed() {
			t.Logf("the log:\n%s", log)
		}
	})
	runReady(t, socket)
	return socket, log, stop
}

// runRequest sends one SOCKS5 request for an IPv4 target and returns the reply.
func runRequest(t *testing.T, proxy string, command byte, to netip.AddrPort) (net.Conn, [10]byte) {
	t.Helper()
	c, err := net.Dial("tcp", proxy)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(runPatience))
	b := append([]byte{5, 1, 0, 5, command, 0, 1}, to.Addr().AsSlice()...)
	c.Write(binary.BigEndian.AppendUint16(b, to.Port()))
	var answer [12]byte
	if _, err := io.ReadFull(c, answer[:]); err != nil {
		t.Fatalf("the proxy's answer: %v", err)
	}
	c.SetDeadline(time.Time{})
	return c, [10]byte(answer[2:])
}

// runEcho is a UDP echo at the far end.
func runEcho(t *testing.T) netip.AddrPort {
	t.Helper()
	c, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		b := make([]byte, 2048)
		for {
			n, from, err := c.ReadFromUDPAddrPort(b)
			if err != nil {
				return
			}
			c.WriteToUDPAddrPort(b[:n], from)
		}
	})
	t.Cleanup(func() { c.Close(); wg.Wait() })
	return c.LocalAddr().(*net.UDPAddr).AddrPort()
}

// runCall is an app that sends RTP (RFC 3550 §5.1) through a SOCKS5
// association, 100 packets a second, and counts what comes back. What does not
// is not counted: a machine that stands still for a moment makes media too old
// to be carried.
type runCall struct {
	control  net.Conn
	udp      *net.UDPConn
	returned atomic.Int64
	quiet    chan struct{} // closed: send no more
	hangUp   func()        // ends the association
}

func newRunCall(t *testing.T, proxy string, to netip.AddrPort) *runCall {
	t.Helper()
	c, reply := runRequest(t, proxy, 3, netip.AddrPortFrom(netip.IPv4Unspecified(), 0))
	if reply[1] != 0 {
		t.Fatalf("UDP ASSOCIATE: reply %d", reply[1])
	}
	relay := netip.AddrPortFrom(netip.AddrFrom4([4]byte(reply[4:8])), binary.BigEndian.Uint16(reply[8:]))
	u, err := net.DialUDP("udp4", nil, net.UDPAddrFromAddrPort(relay))
	if err != nil {
		t.Fatal(err)
	}
	call := &runCall{control: c, udp: u, quiet: make(chan struct{})}
	var wg sync.WaitGroup
	wg.Go(func() { call.send(to) })
	wg.Go(func() {
		b := make([]byte, 2048)
		for {
			if _, err := u.Read(b); errors.Is(err, net.ErrClosed) {
				return
			} else if err == nil {
				call.returned.Add(1)
			}
		}
	})
	call.hangUp = sync.OnceFunc(func() {
		close(call.quiet)
		c.Close()
		u.Close()
		wg.Wait()
	})
	t.Cleanup(call.hangUp)
	return call
}

func (c *runCall) send(to netip.AddrPort) {
	head := append([]byte{0, 0, 0, 1}, to.Addr().AsSlice()...)
	head = binary.BigEndian.AppendUint16(head, to.Port())
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for n := uint16(0); ; n++ {
		p := append(bytes.Clone(head), 0x80, 96) // version 2, a dynamic payload type
		p = binary.BigEndian.AppendUint16(p, n)
		p = binary.BigEndian.AppendUint32(p, uint32(n)*480)
		p = binary.BigEndian.AppendUint32(p, 0xc0ffee) // SSRC
		c.udp.Write(append(p, make([]byte, 160)...))
		select {
		case <-tick.C:
		case <-c.quiet:
			return
		}
	}
}

// runInChannel waits until the sidecar has seen the call.
func runInChannel(t *testing.T, socket string) control.Channel {
	t.Helper()
	var st control.Status
	runEventually(t, "a live channel", func() bool {
		st = runStatus(t, socket)
		return len(st.Channels) == 1 && st.Channels[0].State == "live"
	})
	return st.Channels[0]
}

func TestStopWaitsForTheCallAndStartBringsTheProxyBack(t *testing.T) {
	far := runEcho(t)
	socket, log, stop := runEmbedded(t)
	ctl := func(args ...string) []string { return append(args, "--control", socket) }
	runWant(t, 0, ctl("status", "--ready")...)
	var st control.Status
	if out, _ := runWant(t, 0, ctl("status", "--json")...); json.Unmarshal([]byte(out), &st) != nil || st.State != "running" {
		t.Fatalf("status --json: %s", out)
	}
	proxy := st.Listen

	call := newRunCall(t, proxy, far)
	ch := runInChannel(t, socket)
	if ch.PID != os.Getpid() || len(ch.Evidence) == 0 {
		t.Errorf("the channel is %+v, want one of process %d with its evidence", ch, os.Getpid())
	}
	_, bad := runWant(t, 3, ctl("stop")...)
	for _, want := range []string{ch.Name, "RTP ssrc 0x00c0ffee", "channel_active", "--wait"} {
		if !strings.Contains(bad, want) {
			t.Errorf("a refused stop does not mention %q: %s", want, bad)
		}
	}
	runWant(t, 3, ctl("stop", "--wait", "300ms")...)
	if out, _ := runWant(t, 0, ctl("start")...); !strings.Contains(out, "already running") {
		t.Errorf("start while it runs: %s", out)
	}
	if out, _ := runWant(t, 0, ctl("channel", "list")...); !strings.Contains(out, ch.Name) {
		t.Errorf("channel list: %s", out)
	}

	// A stop that waits refuses what is new and leaves the call alone.
	type result struct {
		code int
		text string
	}
	stopped := make(chan result, 1)
	go func() {
		code, out, bad := runCLI(t, ctl("stop", "--wait", "10m")...)
		stopped <- result{code, out + bad}
	}()
	runEventually(t, "the stop waits", func() bool { return runStatus(t, socket).Draining })
	before := call.returned.Load()
	runEventually(t, "media while a stop waits", func() bool { return call.returned.Load() > before+20 })
	if _, reply := runRequest(t, proxy, 1, far); reply[1] != 2 {
		t.Errorf("a request while a stop waits: reply %d, want 2", reply[1])
	}
	call.hangUp()
	select {
	case r := <-stopped:
		if r.code != 0 || !strings.Contains(r.text, "stopped") {
			t.Fatalf("stop --wait 10m: exit %d, %s", r.code, r.text)
		}
	case <-time.After(runPatience):
		t.Fatal("stop --wait 10m does not notice the end of the call")
	}

	if out, _ := runWant(t, 0, ctl("status")...); !strings.Contains(out, "stopped since") {
		t.Errorf("status: %s", out)
	}
	if _, reply := runRequest(t, proxy, 1, far); reply[1] != 2 {
		t.Errorf("a CONNECT while stopped: reply %d, want 2", reply[1])
	}
	if _, reply := runRequest(t, proxy, 3, netip.AddrPortFrom(netip.IPv4Unspecified(), 0)); reply[1] != 2 {
		t.Errorf("a UDP ASSOCIATE while stopped: reply %d, want 2", reply[1])
	}
	if status, body := runHTTPConnect(t, proxy, far.String()); status != 503 || !strings.Contains(body, "proxy_stopped") {
		t.Errorf("an HTTP CONNECT while stopped: %d %s", status, body)
	}
	runEventually(t, "proxy_stopped in the log", func() bool { return strings.Contains(log.String(), "proxy_stopped") })
	if out, _ := runWant(t, 0, ctl("stop")...); !strings.Contains(out, "already stopped") {
		t.Errorf("stop while stopped: %s", out)
	}

	runWant(t, 0, ctl("start", "--mode", "tcp")...)
	if st := runStatus(t, socket); st.State != "running" || st.Link.Carrier != "tls" {
		t.Errorf("after start --mode tcp: %+v", st)
	}
	again := newRunCall(t, proxy, far)
	runEventually(t, "media after the start", func() bool { return again.returned.Load() > 5 })
	runInChannel(t, socket)
	runWant(t, 0, ctl("stop", "--force")...)

	if code := stop(); code != 0 {
		t.Errorf("culvert run: exit %d", code)
	}
	if _, err := os.Lstat(socket); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the control socket is still there: %v", err)
	}
	runWant(t, 4, ctl("status")...)
}

// runHTTPConnect asks for a tunnel and returns the status and the body.
func runHTTPConnect(t *testing.T, proxy, to string) (int, string) {
	t.Helper()
	c, err := net.Dial("tcp", proxy)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(runPatience))
	fmt.Fprintf(c, "CONNECT %s HTTP/1.1\r\nHost: %s\r\n\r\n", to, to)
	res, err := http.ReadResponse(bufio.NewReader(c), &http.Request{Method: http.MethodGet}) // a refusal has a body
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	body, _ := io.ReadAll(res.Body)
	return res.StatusCode, string(body)
}

// runGood is a configuration that is understood; %s: the front's address.
const runGood = `cloud_proxy:
  address: 127.0.0.1:9
  server_name: cloudproxy.culvert
identity: {app: test, token: none}
front: {listen: "%s"}
start: manual
`

func runFile(t *testing.T, text string) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "culvert.yaml")
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}

// What can not work ends with one sentence, before anything has been started.
func TestRunRefusesWhatCanNotWork(t *testing.T) {
	busy, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer busy.Close()
	plain := runFile(t, "not a socket")
	good := runFile(t, fmt.Sprintf(runGood, "127.0.0.1:0"))
	socket := runSocket(t)
	for name, c := range map[string]struct {
		args []string
		want []string
	}{
		"an unknown key":                {[]string{"-c", runFile(t, fmt.Sprintf(runGood, "127.0.0.1:0")+"frunt: {}\n"), "--control", socket}, []string{"culvert.yaml", "line 7", `"frunt"`, "front", "config_invalid"}},
		"a bad value":                   {[]string{"-c", runFile(t, fmt.Sprintf(runGood, "127.0.0.1:0")+"stop_wait: soon\n"), "--control", socket}, []string{"line 7", `"soon"`, "30s", "config_invalid"}},
		"a user that there is not":      {[]string{"-c", runFile(t, strings.Replace(fmt.Sprintf(runGood, "127.0.0.1:0"), "front: {", "front: {users: nobody-of-that-name, ", 1)), "--control", socket}, []string{"culvert.yaml: line ", "front.users", "nobody-of-that-name", "config_invalid"}},
		"a group that there is not":     {[]string{"-c", runFile(t, fmt.Sprintf(runGood, "127.0.0.1:0")+"control: {group: none-of-that-name}\n"), "--control", socket}, []string{"culvert.yaml: line 7", "control.group", "config_invalid"}},
		"an audit in no folder":         {[]string{"-c", runFile(t, fmt.Sprintf(runGood, "127.0.0.1:0")+"log: {audit_file: /nowhere/audit}\n"), "--control", socket}, []string{"culvert.yaml: line 7", "log.audit_file", "config_invalid"}},
		"a missing file":                {[]string{"-c", "/nowhere/culvert.yaml", "--control", socket}, []string{"/nowhere/culvert.yaml", "no such file", "config_invalid"}},
		"a bad flag":                    {[]string{"-c", good, "--mode", "sctp", "--control", socket}, []string{"sctp", "tcp"}},
		"a port in use":                 {[]string{"-c", good, "--listen", busy.Addr().String(), "--control", socket}, []string{busy.Addr().String(), "in use", "config_invalid"}},
		"a port in use, embedded":       {[]string{"--embedded", "--listen", busy.Addr().String(), "--control", socket}, []string{busy.Addr().String(), "in use", "config_invalid"}},
		"a public front without a user": {[]string{"-c", good, "--listen", "0.0.0.0:0", "--control", socket}, []string{"config_invalid"}},
		"a socket in a file":            {[]string{"-c", good, "--control", filepath.Join(plain, "c.sock")}, []string{plain, "--control", "config_invalid"}},
		"a socket in place of a file":   {[]string{"-c", good, "--control", plain}, []string{plain, "something else", "config_invalid"}},
		"a socket with a long name":     {[]string{"--embedded", "--listen", "127.0.0.1:0", "--control", "/tmp/" + strings.Repeat("x", 200)}, []string{"bytes", "config_invalid"}},
		"neither file nor embedded":     {[]string{"--control", socket}, []string{"-c culvert.yaml", "--embedded"}},
		"both":                          {[]string{"-c", good, "--embedded", "--control", socket}, []string{"--embedded"}},
	} {
		t.Run(name, func(t *testing.T) {
			already := goleak.IgnoreCurrent()
			code, out, bad := runCLI(t, append([]string{"run"}, c.args...)...)
			if code != 2 || out != "" {
				t.Errorf("exit %d, want 2: %s%s", code, out, bad)
			}
			for _, want := range c.want {
				if !strings.Contains(bad, want) {
					t.Errorf("%q does not mention %q", bad, want)
				}
			}
			if strings.Count(strings.TrimSpace(bad), "\n") != 0 {
				t.Errorf("more than a line:\n%s", bad)
			}
			cmdtest.NothingRuns(t, already)
			if _, err := os.Lstat(socket); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("there is a control socket: %v", err)
			}
		})
	}
	if text, err := os.ReadFile(plain); string(text) != "not a socket" {
		t.Errorf("the file in the socket's place is now %q, %v", text, err)
	}
}

func TestASecondSidecarLeavesTheFirstItsSocket(t *testing.T) {
	socket, _, _ := runEmbedded(t)
	_, bad := runWant(t, 2, "run", "--embedded", "--listen", "127.0.0.1:0", "--control", socket)
	if !strings.Contains(bad, socket) || !strings.Contains(bad, "already") {
		t.Errorf("the error: %s", bad)
	}
	if st := runStatus(t, socket); st.State != "running" {
		t.Errorf("the first is %s", st.State)
	}
}

// runProcess is culvert as a process of its own.
type runProcess struct {
	cmd    *exec.Cmd
	socket string
	log    *cmdtest.Text
	exited chan struct{}
}

// startRunProcess does not wait until the sidecar is ready. stderr nil: p.log.
func startRunProcess(t *testing.T, stderr *os.File, env []string, args ...string) *runProcess {
	t.Helper()
	p := &runProcess{socket: runSocket(t), log: &cmdtest.Text{}, exited: make(chan struct{})}
	p.cmd = exec.Command(os.Args[0], append([]string{"run", "--listen", "127.0.0.1:0", "--control", p.socket}, args...)...)
	p.cmd.Env = append(append(os.Environ(), runAsCulvert+"=1"), env...)
	p.cmd.Stderr = p.log
	if stderr != nil {
		p.cmd.Stderr = stderr
	}
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() { p.cmd.Wait(); close(p.exited) }()
	t.Cleanup(func() {
		p.cmd.Process.Kill()
		<-p.exited
		if t.Failed() {
			t.Logf("the log:\n%s", p.log)
		}
	})
	return p
}

// terminate sends a SIGTERM.
func (p *runProcess) terminate(t *testing.T) {
	t.Helper()
	if err := p.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
}

// ends checks that the process ends by itself, in good order.
func (p *runProcess) ends(t *testing.T) {
	t.Helper()
	select {
	case <-p.exited:
	case <-time.After(runPatience):
		t.Fatalf("it still runs after %s", runPatience)
	}
	if code := p.cmd.ProcessState.ExitCode(); code != 0 {
		t.Errorf("exit %d", code)
	}
	if _, err := os.Lstat(p.socket); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the control socket is still there: %v", err)
	}
}

// broke is what a process logs when it ends in spite of a call.
const broke = "stopping in spite of this"

// runConfigured writes the configuration of a sidecar with a cloud proxy that
// is not embedded, which it runs until the test ends. With a stopWait far above
// runPatience, a process that ends has not waited to the end of it.
func runConfigured(t *testing.T, stopWait time.Duration) (file string, conf *config.Sidecar, cloud *assemble.CloudProxy) {
	t.Helper()
	conf = &config.Sidecar{
		CloudProxy: config.CloudProxyRef{Address: config.List{"127.0.0.1:443"}, ServerName: assemble.DefaultServerName},
		Identity:   config.Identity{App: "embedded", Token: "embedded"},
		Front:      config.Front{Listen: "127.0.0.1:0"},
		StopWait:   config.Duration(stopWait),
	}
	cloud, err := assemble.Embedded(conf, slog.New(slog.DiscardHandler)) // points conf at it
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- cloud.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	text, err := yaml.Marshal(conf)
	if err != nil {
		t.Fatal(err)
	}
	return runFile(t, string(text)), conf, cloud
}

// runInCall is a process in whose channel an app speaks.
func runInCall(t *testing.T, stderr *os.File, file string) (*runProcess, *runCall) {
	t.Helper()
	p := startRunProcess(t, stderr, nil, "-c", file)
	runReady(t, p.socket)
	call := newRunCall(t, runStatus(t, p.socket).Listen, runEcho(t))
	runInChannel(t, p.socket)
	return p, call
}

func TestSIGTERMEndsAnIdleSidecarAtOnce(t *testing.T) {
	p := startRunProcess(t, nil, nil, "--embedded")
	runReady(t, p.socket)
	p.terminate(t)
	p.ends(t)
	if strings.Contains(p.log.String(), broke) {
		t.Errorf("it waited for a call that was not there:\n%s", p.log)
	}
}

func TestSIGTERMWaitsForTheEndOfACall(t *testing.T) {
	file, _, _ := runConfigured(t, 10*runPatience)
	p, call := runInCall(t, nil, file)
	p.terminate(t)
	runEventually(t, "the process waits", func() bool { return runStatus(t, p.socket).Draining })
	before := call.returned.Load()
	runEventually(t, "media after the signal", func() bool { return call.returned.Load() > before+20 })
	call.hangUp()
	p.ends(t)
	if strings.Contains(p.log.String(), broke) {
		t.Errorf("it did not see the end of the call:\n%s", p.log)
	}
}

func TestASecondSIGTERMDoesNotWait(t *testing.T) {
	file, _, _ := runConfigured(t, 10*runPatience)
	p, _ := runInCall(t, nil, file)
	p.terminate(t)
	runEventually(t, "the process waits", func() bool { return runStatus(t, p.socket).Draining })
	p.terminate(t)
	p.ends(t)
	if !strings.Contains(p.log.String(), broke) {
		t.Errorf("the log does not say that a call was broken:\n%s", p.log)
	}
}

func TestSIGTERMBreaksACallThatOutlastsStopWait(t *testing.T) {
	file, conf, cloud := runConfigured(t, 300*time.Millisecond)
	p, _ := runInCall(t, nil, file)
	p.terminate(t)
	p.ends(t)
	if log := p.log.String(); !strings.Contains(log, broke) || strings.Contains(log, conf.Identity.Token) {
		t.Errorf("the log should say that a call was broken, and not hold the token:\n%s", log)
	}
	runEventually(t, "the session ends at the cloud proxy", func() bool { return cloud.Sessions() == 0 })
}

// Here it is the log that hangs: nobody reads it.
func TestAThirdSIGTERMEndsAProcessThatHangs(t *testing.T) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	defer w.Close()
	file, _, _ := runConfigured(t, 10*runPatience)
	p, _ := runInCall(t, w, file)
	p.terminate(t)
	runEventually(t, "the process waits", func() bool { return runStatus(t, p.socket).Draining })
	fd := int(w.Fd())
	if err := syscall.SetNonblock(fd, true); err != nil {
		t.Fatal(err)
	}
	for _, size := range []int{4096, 1} {
		for err = nil; err == nil; {
			_, err = syscall.Write(fd, make([]byte, size))
		}
		if !errors.Is(err, syscall.EAGAIN) {
			t.Fatal(err)
		}
	}
	if err := syscall.SetNonblock(fd, false); err != nil {
		t.Fatal(err)
	}
	runEventually(t, "the process ends", func() bool {
		p.cmd.Process.Signal(syscall.SIGTERM) // fails once it has ended
		select {
		case <-p.exited:
			return true
		case <-time.After(50 * time.Millisecond):
			return false
		}
	})
	if st := p.cmd.ProcessState.Sys().(syscall.WaitStatus); !st.Signaled() || st.Signal() != syscall.SIGTERM {
		t.Errorf("it ended with %s, so it did not hang", p.cmd.ProcessState)
	}
}

func TestSystemdIsNotToldReadyAfterStopping(t *testing.T) {
	// A cloud proxy that never answers: the start is not decided before the signal.
	silent, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	path := runSocket(t)
	notify, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer notify.Close()
	conf := strings.Replace(fmt.Sprintf(runGood, "127.0.0.1:0"), "127.0.0.1:9", silent.LocalAddr().String(), 1)
	conf = strings.Replace(conf, "start: manual", "start: auto", 1)
	p := startRunProcess(t, nil, []string{"NOTIFY_SOCKET=" + path}, "-c", runFile(t, conf), "--mode", "udp")
	runEventually(t, "the start begins", func() bool {
		st, err := control.NewClient(p.socket).Status(t.Context())
		return err == nil && st.State == "starting"
	})
	p.terminate(t)
	p.ends(t)
	// Everything that it said is in the socket's queue.
	queue, err := notify.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	var said []string
	b := make([]byte, 256)
	for more := true; more; {
		queue.Read(func(fd uintptr) bool {
			n, _, err := syscall.Recvfrom(int(fd), b, syscall.MSG_DONTWAIT)
			if more = err == nil; more {
				said = append(said, string(b[:n]))
			}
			return true
		})
	}
	if len(said) != 1 || said[0] != "STOPPING=1" {
		t.Errorf("systemd was told %q, want only STOPPING=1", said)
	}
}
