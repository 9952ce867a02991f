package browser

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/pion/logging"
	"github.com/pion/turn/v5"

	"culvert/tunnel"
)

// patience is how long Chromium may take for one step.
const patience = 30 * time.Second

// A real Chromium that knows of Culvert by the policy file alone holds a call
// from a machine on which everything but the proxy is a dead end.
func TestChromiumCallsThroughTheProxyByPolicy(t *testing.T) {
	for _, file := range []string{"chromium.json", "chromium-pac.json"} {
		t.Run(file, func(t *testing.T) {
			policy := read(t, file)
			far := newFar(t)
			m := newMachine(t, policy, far)
			c := m.chromium(t)

			c.takes(t, policy)
			c.open(t, "http://page.test/")
			got := far.await(t)
			if want := (result{Heard: "heard: hello", Type: "relay", By: "tcp"}); got != want {
				t.Errorf("the call ended with %+v, want %+v", got, want)
			}
			for _, want := range []string{"tcp page.test:80", "tcp turn.test:3478"} {
				if opened := far.opened(); !slices.Contains(opened, want) {
					t.Errorf("the proxy was not asked for %s, only for %q", want, opened)
				}
			}
			if sent := m.sent(t); len(sent) > 0 {
				t.Errorf("Chromium sent past the proxy: %q", sent)
			}
		})
	}
}

// Without the key for WebRTC the same browser sends UDP past the proxy: the key
// does something, and the test above would see it if it did not.
func TestChromiumSendsUDPPastTheProxyWithoutThePolicy(t *testing.T) {
	var policy map[string]any
	if err := json.Unmarshal(read(t, "chromium.json"), &policy); err != nil {
		t.Fatal(err)
	}
	delete(policy, "WebRtcIPHandling")
	rest, err := json.Marshal(policy)
	if err != nil {
		t.Fatal(err)
	}
	far := newFar(t)
	m := newMachine(t, rest, far)
	m.chromium(t).open(t, "http://page.test/")
	far.await(t)
	if sent := m.sent(t); !slices.Contains(sent, "udp 192.0.2.1:3478") {
		t.Errorf("Chromium sent %q past the proxy, which should hold a request to the TURN server", sent)
	}
}

// result is what call.html tells.
type result struct{ Heard, Type, By, Error string }

// far is what only the proxy reaches: a page and a TURN server.
type far struct {
	at      map[string]string // their addresses, by HOST:PORT
	results chan result

	mu   sync.Mutex
	seen []string // guarded by mu; what the proxy was asked for
}

func newFar(t *testing.T) *far {
	t.Helper()
	f := &far{results: make(chan result, 1)}
	page := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/result" {
			http.ServeFile(w, r, filepath.Join("testdata", "call.html"))
			return
		}
		var got result
		if err := json.NewDecoder(r.Body).Decode(&got); err != nil {
			got.Error = err.Error()
		}
		f.results <- got
	}))
	t.Cleanup(page.Close)

	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	server, err := turn.NewServer(turn.ServerConfig{
		Realm:         "turn.test",
		LoggerFactory: &logging.DefaultLoggerFactory{Writer: io.Discard},
		AuthHandler: func(a *turn.RequestAttributes) (string, []byte, bool) {
			return a.Username, turn.GenerateAuthKey(a.Username, a.Realm, "secret"), true
		},
		ListenerConfigs: []turn.ListenerConfig{{
			Listener:              l,
			RelayAddressGenerator: &turn.RelayAddressGeneratorStatic{RelayAddress: net.IPv4(127, 0, 0, 1), Address: "127.0.0.1"},
		}},
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { server.Close() })
	f.at = map[string]string{"page.test:80": page.Listener.Addr().String(), "turn.test:3478": l.Addr().String()}
	return f
}

// await returns what the page tells of its call.
func (f *far) await(t *testing.T) result {
	t.Helper()
	select {
	case got := <-f.results:
		return got
	case <-time.After(patience):
		t.Fatalf("the page told nothing; the proxy was asked for %q", f.opened())
		return result{}
	}
}

func (f *far) opened() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.seen)
}

func (f *far) saw(what string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.seen = append(f.seen, what)
}

// OpenStream connects to the page and the TURN server; Chromium's own business
// is refused.
func (f *far) OpenStream(ctx context.Context, _ tunnel.Peer, to tunnel.Target) (tunnel.Stream, error) {
	f.saw("tcp " + to.String())
	at, ok := f.at[to.String()]
	if !ok {
		return nil, tunnel.Errorf(tunnel.PolicyDenied, "%s is no part of this test", to)
	}
	c, err := new(net.Dialer).DialContext(ctx, "tcp", at)
	if err != nil {
		return nil, err
	}
	return stream{c.(*net.TCPConn)}, nil
}

func (f *far) OpenPackets(tunnel.Peer, tunnel.Receiver) (tunnel.Packets, error) {
	f.saw("udp")
	return nil, tunnel.Errorf(tunnel.Unsupported, "no datagrams in this test")
}

type stream struct{ *net.TCPConn }

func (s stream) Abort(error) { s.SetLinger(0); s.Close() }

// chromium is one that is told what to do by the DevTools protocol: JSON with a
// zero byte after each message, on file descriptors 3 and 4.
type chromium struct {
	to   io.Writer
	from *bufio.Reader
	id   int
}

// chromium starts Chromium on the machine, until the test ends.
func (m *machine) chromium(t *testing.T) *chromium {
	t.Helper()
	program, err := exec.LookPath("chromium")
	if err != nil {
		missing(t, "chromium is missing; install it to run this test")
	}
	read, toIt, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	fromIt, write, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	// Not t.TempDir: what the last of Chromium's processes still writes is of no interest.
	home, err := os.MkdirTemp("", "chromium")
	if err != nil {
		t.Fatal(err)
	}
	var stderr bytes.Buffer
	cmd := exec.Command(program, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
		"--remote-debugging-pipe", "--user-data-dir="+home)
	cmd.Env = append(os.Environ(), "HOME="+home)
	cmd.ExtraFiles = []*os.File{read, write}
	cmd.Stderr = &stderr
	cmd.WaitDelay = time.Second
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // its helpers end with it
	err = m.do(cmd.Start)
	read.Close()
	write.Close()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		// It may have ended by itself; how it ended is of no interest.
		_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL)
		_ = cmd.Wait()
		toIt.Close()
		fromIt.Close()
		_ = os.RemoveAll(home)
		if t.Failed() {
			t.Logf("Chromium said:\n%s", stderr.Bytes())
		}
	})
	fromIt.SetReadDeadline(time.Now().Add(2 * patience))
	return &chromium{to: toIt, from: bufio.NewReader(fromIt)}
}

// call has Chromium do one thing. What it tells unasked is passed over.
func (c *chromium) call(t *testing.T, session, method string, params map[string]any, result any) {
	t.Helper()
	c.id++
	message := map[string]any{"id": c.id, "method": method, "params": params}
	if session != "" { // else it is for the browser itself
		message["sessionId"] = session
	}
	request, err := json.Marshal(message)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.to.Write(append(request, 0)); err != nil {
		t.Fatalf("%s: %v", method, err)
	}
	for {
		line, err := c.from.ReadBytes(0)
		if err != nil {
			t.Fatalf("%s: %v", method, err)
		}
		var answer struct {
			ID            int
			Result, Error json.RawMessage
		}
		if err := json.Unmarshal(line[:len(line)-1], &answer); err != nil {
			t.Fatalf("%s: %v", method, err)
		}
		if answer.ID != c.id {
			continue
		}
		if answer.Error != nil {
			t.Fatalf("%s: %s", method, answer.Error)
		}
		if err := json.Unmarshal(answer.Result, result); err != nil {
			t.Fatalf("%s: %v", method, err)
		}
		return
	}
}

// open loads a page and returns the session with it.
func (c *chromium) open(t *testing.T, url string) (session string) {
	t.Helper()
	var target struct{ TargetID string }
	c.call(t, "", "Target.createTarget", map[string]any{"url": url}, &target)
	var attached struct{ SessionID string }
	c.call(t, "", "Target.attachToTarget", map[string]any{"targetId": target.TargetID, "flatten": true}, &attached)
	return attached.SessionID
}

// shownPolicies waits until chrome://policy has its table and returns the rows that are set.
const shownPolicies = `new Promise(done => {
  const rows = under => [...under.querySelectorAll("*")].flatMap(e => [e.policy ?? [], e.shadowRoot ? rows(e.shadowRoot) : []].flat());
  const look = () => {
    const all = rows(document);
    all.length ? done(all.filter(p => p.status != "Not set.")) : setTimeout(look, 50);
  };
  look();
})`

// takes checks that Chromium has taken every policy of the file, with its
// value, and finds nothing wrong with it: an unknown name or a bad value has
// another status.
func (c *chromium) takes(t *testing.T, policy []byte) {
	t.Helper()
	var want map[string]any
	if err := json.Unmarshal(policy, &want); err != nil {
		t.Fatal(err)
	}
	var shown struct {
		Result struct {
			Value []struct {
				Name, Level, Scope, Status string
				Value                      any
			}
		}
	}
	c.call(t, c.open(t, "chrome://policy"), "Runtime.evaluate",
		map[string]any{"expression": shownPolicies, "awaitPromise": true, "returnByValue": true}, &shown)
	got := map[string]any{}
	for _, p := range shown.Result.Value {
		got[p.Name] = p.Value
		if p.Status != "OK" || p.Level != "mandatory" || p.Scope != "machine" {
			t.Errorf("Chromium says of %s: %s, %s, %s", p.Name, p.Status, p.Level, p.Scope)
		}
	}
	if fmt.Sprint(got) != fmt.Sprint(want) { // maps are printed in order
		t.Errorf("Chromium has taken %v, want %v", got, want)
	}
}

// missing skips the test, or fails it in CI, which must have everything.
func missing(t *testing.T, why string) {
	t.Helper()
	if os.Getenv("CI") == "true" {
		t.Fatal(why, " (CI=true says that nothing may be left out)")
	}
	t.Skip(why)
}
