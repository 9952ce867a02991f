package main

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"

	"culvert/cloudproxy/identity"
	"culvert/cmd/internal/assemble"
	"culvert/cmd/internal/cmdtest"
	"culvert/cmd/internal/config"
	"culvert/policy"
	"culvert/sidecar"
	"culvert/tunnel"
)

// runAsCloudProxy makes the test binary be culvert-cloudproxy, for tests that
// need a process.
const runAsCloudProxy = "CULVERT_TEST_RUN_AS_CLOUDPROXY"

func TestMain(m *testing.M) {
	if os.Getenv(runAsCloudProxy) != "" {
		main()
	}
	goleak.VerifyTestMain(m)
}

// initPatience bounds every wait for something that must happen. It is far more
// than that takes on a busy machine.
const initPatience = time.Minute

// initHost is where cloud proxies listen. No other program binds this address,
// so a port of it that is free stays free.
const initHost = "127.0.0.4"

// initFreePort is a port of initHost that nothing uses, for UDP and TCP.
func initFreePort(t *testing.T) string {
	t.Helper()
	for range 20 {
		l, err := net.Listen("tcp", initHost+":0")
		if err != nil {
			t.Fatal(err)
		}
		u, err := net.ListenPacket("udp", l.Addr().String())
		l.Close()
		if err != nil {
			continue
		}
		u.Close()
		_, port, _ := net.SplitHostPort(l.Addr().String())
		return port
	}
	t.Fatal("no port is free for both")
	return ""
}

// initRun is one command from its arguments to its exit code.
func initRun(args ...string) (code int, text string) {
	ctx, cancel := context.WithTimeout(context.Background(), initPatience)
	defer cancel()
	var out bytes.Buffer
	code = run(ctx, append([]string{"culvert-cloudproxy"}, args...), &out, &out)
	return code, out.String()
}

// initMake runs init and returns the folder and the cloud proxy's address.
func initMake(t *testing.T, more ...string) (dir, address string) {
	t.Helper()
	dir, address = filepath.Join(t.TempDir(), "culvert"), net.JoinHostPort(initHost, initFreePort(t))
	if code, text := initRun(append([]string{"init", "--host", address, "--dir", dir, "--allow", "127.0.0.0/8", "--app", "clinic"}, more...)...); code != 0 {
		t.Fatalf("init: exit %d: %s", code, text)
	}
	return dir, address
}

// initCloud runs 'culvert-cloudproxy run' from the files that init wrote.
func initCloud(t *testing.T, dir, address string) *cmdtest.Text {
	t.Helper()
	log := &cmdtest.Text{}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan int, 1)
	go func() {
		done <- run(ctx, []string{"culvert-cloudproxy", "run", "-c", filepath.Join(dir, "cloudproxy.yaml"), "--listen", address}, io.Discard, log)
	}()
	t.Cleanup(func() {
		cancel()
		select {
		case code := <-done:
			if code != 0 {
				t.Errorf("culvert-cloudproxy run: exit %d", code)
			}
		case <-time.After(initPatience):
			t.Error("culvert-cloudproxy run does not end")
		}
		if t.Failed() {
			t.Logf("the cloud proxy's log:\n%s", log)
		}
	})
	for deadline := time.Now().Add(initPatience); !strings.Contains(log.String(), "listens"); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("the cloud proxy does not listen:\n%s", log)
		}
	}
	return log
}

// initSidecar runs a sidecar from the file that init wrote, after a change to
// what was read. It is not started.
func initSidecar(t *testing.T, dir string, change func(*config.Sidecar)) *assemble.Sidecar {
	t.Helper()
	conf, err := config.ReadSidecar(filepath.Join(dir, "culvert.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	conf.Front.Listen = "127.0.0.1:0"
	if change != nil {
		change(conf)
	}
	s, err := assemble.NewSidecar(conf, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return s
}

// initStart starts a sidecar, again where the handshakes took too long.
func initStart(t *testing.T, s *assemble.Sidecar) error {
	t.Helper()
	for end := time.Now().Add(initPatience); ; {
		_, err := s.Switch.Start(t.Context(), sidecar.StartOptions{})
		switch tunnel.CodeOf(err) {
		case tunnel.CloudUnreachable, tunnel.UDPBlocked, tunnel.TimedOut:
			if time.Now().Before(end) {
				continue
			}
		}
		return err
	}
}

// initSOCKS asks for a stream by name (RFC 1928 §4) and returns the reply.
func initSOCKS(t *testing.T, proxy net.Addr, host string, port uint16) byte {
	t.Helper()
	c, err := net.Dial("tcp", proxy.String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(initPatience))
	b := append([]byte{5, 1, 0, 5, 1, 0, 3, byte(len(host))}, host...)
	c.Write(binary.BigEndian.AppendUint16(b, port))
	var answer [4]byte
	if _, err := io.ReadFull(c, answer[:]); err != nil {
		t.Fatal(err)
	}
	return answer[3]
}

// initHTTP asks for a tunnel and returns the status and the body.
func initHTTP(t *testing.T, proxy net.Addr, to string) (int, string) {
	t.Helper()
	c, err := net.Dial("tcp", proxy.String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(initPatience))
	fmt.Fprintf(c, "CONNECT %s HTTP/1.1\r\nHost: %s\r\n\r\n", to, to)
	head := make([]byte, 4096)
	n, err := io.ReadAtLeast(c, head, len("HTTP/1.1 200"))
	if err != nil {
		t.Fatal(err)
	}
	text := string(head[:n])
	var status int
	fmt.Sscanf(text, "HTTP/1.1 %d", &status)
	if status != http.StatusOK {
		rest, _ := io.ReadAll(c)
		text += string(rest)
	}
	return status, text
}

func TestTheFilesThatInitWritesCarryCurl(t *testing.T) {
	curl, err := exec.LookPath("curl")
	if err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatal("curl is missing")
		}
		t.Skip("curl is missing")
	}
	dir, address := initMake(t, "--region", "eu")
	initCloud(t, dir, address)
	far := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, "from behind the cloud proxy") }))
	defer far.Close()
	for _, mode := range []string{"auto", "udp", "tcp"} {
		s := initSidecar(t, dir, func(c *config.Sidecar) { c.Mode = mode })
		if err := initStart(t, s); err != nil {
			t.Fatalf("mode %s: %v", mode, err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), initPatience)
		defer cancel()
		cmd := exec.CommandContext(ctx, curl, "-sS", "--socks5-hostname", s.Front.Addr().String(), far.URL)
		cmd.WaitDelay = initPatience
		cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "HOME=/nonexistent"}
		if out, err := cmd.CombinedOutput(); err != nil || string(out) != "from behind the cloud proxy" {
			t.Errorf("mode %s: %v: %s", mode, err, out)
		}
		link := s.Switch.Status().Link
		if p := link.Info.Proxies; len(p) != 1 || p[0].Address != address || p[0].Region != "eu" {
			t.Errorf("mode %s: the proxy information is %+v", mode, p)
		}
	}
}

func TestInitKeepsSecretsToTheUserAndOverwritesNothing(t *testing.T) {
	dir, address := initMake(t)
	before := map[string][]byte{}
	for name, mode := range map[string]fs.FileMode{
		"key.pem": 0o600, "reset.key": 0o600, "token.key": 0o600, "culvert.yaml": 0o600,
		"token.issued": 0o600, "cert.pem": 0o644, "token.pub": 0o644, "token.revoked": 0o644, "cloudproxy.yaml": 0o644,
	} {
		st, err := os.Stat(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		if st.Mode().Perm()&^mode != 0 || mode == 0o600 && st.Mode().Perm() != mode {
			t.Errorf("%s has mode %o, want %o", name, st.Mode().Perm(), mode)
		}
		if before[name], err = os.ReadFile(filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	if files, err := os.ReadDir(dir); err != nil || len(files) != len(before) {
		t.Errorf("%d files, %v", len(files), err)
	}
	again := []string{"init", "--host", address, "--dir", dir, "--allow", "127.0.0.0/8"}
	if code, text := initRun(again...); code != 2 || !strings.Contains(text, "not overwritten") {
		t.Errorf("init in the same folder: exit %d, %s", code, text)
	}
	// One file that is left is enough to refuse, and then none is made.
	for name := range before {
		if name != "culvert.yaml" {
			os.Remove(filepath.Join(dir, name))
		}
	}
	if code, text := initRun(again...); code != 2 || !strings.Contains(text, "culvert.yaml") {
		t.Errorf("init beside one file: exit %d, %s", code, text)
	}
	if files, _ := os.ReadDir(dir); len(files) != 1 {
		t.Errorf("it made %v", files)
	}
	if now, _ := os.ReadFile(filepath.Join(dir, "culvert.yaml")); !bytes.Equal(now, before["culvert.yaml"]) {
		t.Error("culvert.yaml has changed")
	}
}

func TestInitRefusesWhatMakesNoSense(t *testing.T) {
	for name, c := range map[string]struct{ args, want string }{
		"no host":             {"--allow 127.0.0.0/8", "--host"},
		"nothing allowed":     {"--host a.example", "--profile"},
		"an unknown profile":  {"--host a.example --profile everything", "everything"},
		"a CIDR that is none": {"--host a.example --allow 10.0.0.0", "CIDR"},
		"a key alone":         {"--host a.example --profile public --key k.pem", "--cert"},
		"no certificate":      {"--host a.example --profile public --cert c.pem --key k.pem", "c.pem"},
		"no sidecars":         {"--host a.example --profile public --concurrency 0", "--concurrency"},
	} {
		dir := filepath.Join(t.TempDir(), "new")
		code, text := initRun(append([]string{"init", "--dir", dir}, strings.Fields(c.args)...)...)
		if code != 2 || !strings.Contains(text, c.want) {
			t.Errorf("%s: exit %d, %s", name, code, text)
		}
		if _, err := os.Stat(dir); err == nil {
			t.Errorf("%s: the folder was made", name)
		}
	}
}

// Each sidecar that is refused says why: from start, in its status, and to apps.
func TestARefusedSidecarSaysWhy(t *testing.T) {
	dir, address := initMake(t)
	log := initCloud(t, dir, address)
	token := func(args ...string) string {
		code, text := initRun(append([]string{"token", "new", "--dir", dir}, args...)...)
		if code != 0 {
			t.Fatalf("token new: exit %d: %s", code, text)
		}
		return strings.TrimSpace(text)
	}
	// Another cloud proxy's files: its tokens and pin are good, but not here.
	other, _ := initMake(t)
	foreign, err := config.ReadSidecar(filepath.Join(other, "culvert.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	key, err := identity.LoadKey(filepath.Join(dir, "token.key"))
	if err != nil {
		t.Fatal(err)
	}
	now := time.Now()
	expired, err := identity.Issue(key, identity.Claims{App: "clinic", Concurrency: 1, Issued: now.Add(-48 * time.Hour), Expires: now.Add(-24 * time.Hour)})
	if err != nil {
		t.Fatal(err)
	}
	wrong, elsewhere := token("--app", "bank"), token("--app", "clinic", "--region", "eu")
	for name, c := range map[string]struct {
		change func(*config.Sidecar)
		code   tunnel.Code
	}{
		"an expired token":           {func(c *config.Sidecar) { c.Identity.Token = expired }, tunnel.TokenExpired},
		"a token of another App ID":  {func(c *config.Sidecar) { c.Identity.Token = wrong }, tunnel.TokenRejected},
		"an App ID of another token": {func(c *config.Sidecar) { c.Identity.App = "bank" }, tunnel.TokenRejected},
		"a token of another signer":  {func(c *config.Sidecar) { c.Identity.Token = foreign.Identity.Token }, tunnel.TokenRejected},
		"a token of another region":  {func(c *config.Sidecar) { c.Identity.Token = elsewhere }, tunnel.TokenRejected},
		"no token at all":            {func(c *config.Sidecar) { c.Identity.Token = "nonsense" }, tunnel.TokenRejected},
		"the wrong pin":              {func(c *config.Sidecar) { c.CloudProxy.Pin = foreign.CloudProxy.Pin }, tunnel.CertificateUntrusted},
		"no pin":                     {func(c *config.Sidecar) { c.CloudProxy.Pin = nil }, tunnel.CertificateUntrusted},
	} {
		for _, mode := range []string{"auto", "udp", "tcp"} {
			t.Run(name+", "+mode, func(t *testing.T) {
				s := initSidecar(t, dir, func(conf *config.Sidecar) { conf.Mode = mode; c.change(conf) })
				initRefused(t, s, c.code, 3, http.StatusBadGateway)
			})
		}
	}
	for _, secret := range []string{expired, wrong, elsewhere, foreign.Identity.Token} {
		if strings.Contains(log.String(), secret) {
			t.Error("the log holds a token")
		}
	}
}

func TestAFullAppIDTakesNoOtherSidecarUntilOneLeaves(t *testing.T) {
	dir, address := initMake(t, "--concurrency", "1")
	initCloud(t, dir, address)
	first, second := initSidecar(t, dir, nil), initSidecar(t, dir, nil) // each with a key of its own
	if err := initStart(t, first); err != nil {
		t.Fatal(err)
	}
	initRefused(t, second, tunnel.QuotaExceeded, 1, http.StatusServiceUnavailable)
	if st := first.Switch.Status(); st.State != sidecar.Running {
		t.Errorf("the first is %s", st.State)
	}
	if _, err := first.Switch.Stop(t.Context(), sidecar.StopOptions{}); err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(initPatience); ; time.Sleep(10 * time.Millisecond) {
		err := initStart(t, second)
		if err == nil {
			break
		}
		if tunnel.CodeOf(err) != tunnel.QuotaExceeded || time.Now().After(deadline) {
			t.Fatal(err)
		}
	}
}

// initDNS makes the cloud proxy's names: inside.culvert.test is 10.0.0.1, and
// there is no other.
func initDNS(t *testing.T) {
	t.Helper()
	server, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		const header = 12
		b := make([]byte, 1500)
		for {
			n, from, err := server.ReadFrom(b)
			if err != nil {
				return
			}
			end := header + bytes.IndexByte(b[header:n], 0) + 5 // the question, RFC 1035 §4.1.2
			a := bytes.Clone(b[:end])
			a[2] |= 0x80 // QR
			copy(a[6:], make([]byte, 6))
			switch name := b[header : end-4]; {
			case !bytes.EqualFold(name, []byte("\x06inside\x07culvert\x04test\x00")):
				a[3] = a[3]&0xf0 | 3 // NXDOMAIN
			case b[end-3] == 1: // A
				a[7] = 1 // ANCOUNT
				a = append(a, 0xc0, header, 0, 1, 0, 1, 0, 0, 0, 0, 0, 4, 10, 0, 0, 1)
			}
			server.WriteTo(a, from)
		}
	})
	before := net.DefaultResolver
	net.DefaultResolver = &net.Resolver{PreferGo: true, Dial: func(ctx context.Context, _, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "udp", server.LocalAddr().String())
	}}
	t.Cleanup(func() {
		net.DefaultResolver = before
		server.Close()
		wg.Wait()
	})
}

func TestAppsAreToldWhyADestinationCanNotBeReached(t *testing.T) {
	initDNS(t)
	dir, address := initMake(t)
	initCloud(t, dir, address)
	const nobody = 1 // reserved, and none that is given to whoever asks for any port
	for end, change := range map[string]func(*config.Sidecar){
		"asked at both ends":           nil,
		"asked at the cloud proxy":     func(c *config.Sidecar) { c.Policy = policy.Config{} },
		"asked at both ends, over TLS": func(c *config.Sidecar) { c.Mode = "tcp" },
	} {
		s := initSidecar(t, dir, change)
		if err := initStart(t, s); err != nil {
			t.Fatal(err)
		}
		for name, c := range map[string]struct {
			host   string
			code   tunnel.Code
			reply  byte
			status int
		}{
			"an address that is not allowed":         {"10.0.0.1", tunnel.PolicyDenied, 2, 403},
			"a metadata service":                     {"169.254.169.254", tunnel.PolicyDenied, 2, 403},
			"a name of what is not allowed":          {"inside.culvert.test", tunnel.PolicyDenied, 2, 403},
			"a name that does not exist":             {"nowhere.culvert.test", tunnel.NameUnresolved, 4, 502},
			"a port that nobody listens on":          {"127.0.0.1", tunnel.ConnectionRefused, 5, 502},
			"a port that nobody listens on, by name": {"localhost", tunnel.ConnectionRefused, 5, 502},
		} {
			t.Run(end+"/"+name, func(t *testing.T) {
				if got := initSOCKS(t, s.Front.Addr(), c.host, nobody); got != c.reply {
					t.Errorf("SOCKS reply %d, want %d", got, c.reply)
				}
				got, body := initHTTP(t, s.Front.Addr(), net.JoinHostPort(c.host, fmt.Sprint(nobody)))
				if got != c.status || !strings.Contains(body, string(c.code)) {
					t.Errorf("HTTP %d, want %d with %s: %s", got, c.status, c.code, body)
				}
			})
		}
	}
}

// initRefused checks that a sidecar can not be started, and what it says.
func initRefused(t *testing.T, s *assemble.Sidecar, code tunnel.Code, reply byte, status int) {
	t.Helper()
	err := initStart(t, s)
	if tunnel.CodeOf(err) != code {
		t.Fatalf("start: %v, want %s", err, code)
	}
	b := assemble.Backend{Sidecar: s}
	if st := b.Status(); st.State != string(sidecar.Failed) || st.Code != code || st.Cause != tunnel.Sentence(err) {
		t.Errorf("status: %+v", st)
	}
	if got := initSOCKS(t, s.Front.Addr(), "127.0.0.1", 9); got != reply {
		t.Errorf("SOCKS reply %d, want %d", got, reply)
	}
	if got, body := initHTTP(t, s.Front.Addr(), "127.0.0.1:9"); got != status || !strings.Contains(body, string(code)) {
		t.Errorf("HTTP %d, want %d with %s: %s", got, status, code, body)
	}
}

// What can not work ends with one sentence, before anything has been started.
func TestRunRefusesWhatCanNotWork(t *testing.T) {
	dir, address := initMake(t)
	text, err := os.ReadFile(filepath.Join(dir, "cloudproxy.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	file := func(name, more string) string { // in the same folder, for the files that it names
		file := filepath.Join(dir, name)
		if err := os.WriteFile(file, []byte(more), 0o600); err != nil {
			t.Fatal(err)
		}
		return file
	}
	busyTCP, err := net.Listen("tcp", initHost+":0")
	if err != nil {
		t.Fatal(err)
	}
	defer busyTCP.Close()
	busyUDP, err := net.ListenPacket("udp", initHost+":0")
	if err != nil {
		t.Fatal(err)
	}
	defer busyUDP.Close()
	good := string(text)
	for name, c := range map[string]struct {
		args []string
		want []string
	}{
		"an unknown key":      {[]string{"-c", file("a.yaml", good+"quota: 3\n")}, []string{"a.yaml", "line", `"quota"`, "tokens", "config_invalid"}},
		"a bad value":         {[]string{"-c", file("b.yaml", good+"drain: soon\n")}, []string{"b.yaml", "line", `"soon"`, "30s", "config_invalid"}},
		"a missing file":      {[]string{"-c", "/nowhere/c.yaml"}, []string{"/nowhere/c.yaml", "no such file", "config_invalid"}},
		"a missing key":       {[]string{"-c", file("d.yaml", strings.Replace(good, "key.pem", "gone.pem", 1))}, []string{"gone.pem", "config_invalid"}},
		"a wrong key":         {[]string{"-c", file("e.yaml", strings.Replace(good, "key.pem", "token.key", 1))}, []string{"token.key", "config_invalid"}},
		"no key for tokens":   {[]string{"-c", file("f.yaml", strings.Replace(good, "token.pub", "gone.pub", 1))}, []string{"gone.pub", "config_invalid"}},
		"a short reset key":   {[]string{"-c", file("g.yaml", strings.Replace(good, "reset.key", "short", 1))}, []string{"short", "32", "config_invalid"}},
		"a TCP port in use":   {[]string{"-c", file("h.yaml", good), "--listen", busyTCP.Addr().String()}, []string{"TCP", busyTCP.Addr().String(), "in use"}},
		"a UDP port in use":   {[]string{"-c", file("i.yaml", good), "--listen", busyUDP.LocalAddr().String()}, []string{"UDP", busyUDP.LocalAddr().String(), "in use"}},
		"an address not here": {[]string{"-c", file("j.yaml", good), "--listen", "192.0.2.1:443"}, []string{"192.0.2.1:443"}},
		"no file":             {nil, []string{"cloudproxy.yaml"}},
	} {
		t.Run(name, func(t *testing.T) {
			file("short", "too short")
			already := goleak.IgnoreCurrent()
			args := append([]string{"run"}, c.args...)
			if !slices.Contains(args, "--listen") {
				args = append(args, "--listen", address)
			}
			code, text := initRun(args...)
			if code != 2 || strings.Count(strings.TrimSpace(text), "\n") != 0 {
				t.Errorf("exit %d, want 2 and one line: %s", code, text)
			}
			for _, want := range c.want {
				if !strings.Contains(text, want) {
					t.Errorf("%q does not mention %q", text, want)
				}
			}
			cmdtest.NothingRuns(t, already)
		})
	}
}

func TestSIGTERMLetsWhatIsOpenFinishAndTakesNothingNew(t *testing.T) {
	dir, address := initMake(t)
	file := filepath.Join(dir, "cloudproxy.yaml")
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	// Longer than everything here may take: it must be the end of what is open that ends it.
	if err := os.WriteFile(file, fmt.Appendf(text, "drain: %s\n", 10*initPatience), 0o600); err != nil {
		t.Fatal(err)
	}
	log := &cmdtest.Text{}
	cmd := exec.Command(os.Args[0], "run", "-c", file, "--listen", address)
	cmd.Env = append(os.Environ(), runAsCloudProxy+"=1")
	cmd.Stderr = log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	exited := make(chan struct{})
	go func() { cmd.Wait(); close(exited) }()
	t.Cleanup(func() {
		cmd.Process.Kill()
		<-exited
		if t.Failed() {
			t.Logf("the cloud proxy's log:\n%s", log)
		}
	})
	far, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer far.Close()
	first, second := initSidecar(t, dir, nil), initSidecar(t, dir, nil)
	if err := initStart(t, first); err != nil { // waits for the process to listen
		t.Fatal(err)
	}
	app, err := net.Dial("tcp", first.Front.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer app.Close()
	app.SetDeadline(time.Now().Add(2 * initPatience))
	fmt.Fprintf(app, "CONNECT %s HTTP/1.1\r\nHost: %s\r\n\r\n", far.Addr(), far.Addr())
	there, err := far.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer there.Close()
	there.SetDeadline(time.Now().Add(2 * initPatience))
	answer := make([]byte, 1024)
	if n, err := app.Read(answer); err != nil || !strings.HasPrefix(string(answer[:n]), "HTTP/1.1 200") {
		t.Fatalf("%q, %v", answer[:n], err)
	}

	if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	// Until the signal has been heard a start may still succeed. A start that is
	// refused tries on, so it is given a time, and more of it on a slow machine.
	deadline := time.Now().Add(initPatience)
	for patience := time.Second; ; patience += time.Second {
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		_, err := second.Switch.Start(ctx, sidecar.StartOptions{})
		cancel()
		if tunnel.CodeOf(err) == tunnel.CloudUnreachable && strings.Contains(err.Error(), "about to stop") {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("a start during the stop: %v", err)
		}
		if err == nil {
			second.Switch.Stop(t.Context(), sidecar.StopOptions{Force: true})
		}
	}
	for range 10 { // what is open goes on, both ways
		for _, c := range [][2]net.Conn{{app, there}, {there, app}} {
			if _, err := c[0].Write([]byte("still here")); err != nil {
				t.Fatal(err)
			}
			if _, err := io.ReadFull(c[1], answer[:len("still here")]); err != nil {
				t.Fatal(err)
			}
		}
	}
	app.Close()
	there.Close()
	select {
	case <-exited:
	case <-time.After(initPatience):
		t.Fatal("it still runs when nothing is open any more")
	}
	if code := cmd.ProcessState.ExitCode(); code != 0 {
		t.Errorf("exit %d", code)
	}
}
