package control

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"culvert/sidecar/check"
	"culvert/tunnel"
)

// asOtherUser makes the test binary ask the socket that it names, and print the
// answer's status.
const asOtherUser = "CULVERT_TEST_ASK_CONTROL_AT"

func TestMain(m *testing.M) {
	if path := os.Getenv(asOtherUser); path != "" {
		_, err := NewClient(path).Status(context.Background())
		if err != nil {
			os.Stdout.WriteString(err.Error())
		}
		os.Exit(0)
	}
	goleak.VerifyTestMain(m)
}

// fake is a backend that remembers what it was asked.
type fake struct {
	mu    sync.Mutex
	calls []string
	err   error
	hold  chan struct{} // nil: answer at once

	entered, left chan struct{} // with hold: closed when Stop waits, and when ctx has ended it
}

func (f *fake) did(what string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.calls = append(f.calls, what)
}

func (f *fake) Status() Status {
	return Status{State: "running", Mode: tunnel.ModeAuto, Link: tunnel.LinkState{Phase: tunnel.LinkUp, Carrier: "quic"}}
}

func (f *fake) Start(_ context.Context, m tunnel.Mode) (bool, error) {
	f.did("start " + string(m))
	return m == "", f.err
}

func (f *fake) Stop(ctx context.Context, wait time.Duration, force bool) (bool, error) {
	f.did("stop " + wait.String())
	if f.hold != nil {
		close(f.entered)
		select {
		case <-f.hold:
		case <-ctx.Done():
			close(f.left)
			return false, ctx.Err()
		}
	}
	return force, f.err
}

func (f *fake) Media(_ context.Context, d time.Duration) (check.Way, error) {
	if d == 2*time.Second {
		return check.Way{}, tunnel.Errorf(tunnel.LimitExceeded, "another one runs")
	}
	return check.Way{Carrier: "quic", Way: "sealed", Audio: check.Kind{Grade: check.GradeGood, Up: check.Figures{Sent: int(d / time.Second), Loss: 0.25}}}, nil
}
func (f *fake) Channels() []Channel { return []Channel{{Name: "zoom/7", App: "zoom"}} }
func (f *fake) Join(name string, pid int) error {
	f.did("join " + name)
	return f.err
}
func (f *fake) Leave(name string) bool { f.did("leave " + name); return name == "a/b c" }

func (f *fake) Events(ctx context.Context) <-chan Event {
	c := make(chan Event, 2)
	c <- Event{Kind: "switch", To: "running"}
	c <- Event{Kind: "switch", From: "running", To: "stopping", Cause: "stop"}
	return c
}

func newServer(t testing.TB, b Backend) *Server {
	t.Helper()
	s, err := NewServer(Config{Backend: b})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// serve runs a server on a socket and returns a client for it.
func serve(t *testing.T, b Backend) (*Client, string) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "run", "control.sock")
	l, err := Listen(path, "")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error)
	go func() { done <- newServer(t, b).Serve(ctx, l) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
		if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
			t.Error("the socket was left behind:", err)
		}
	})
	return NewClient(path), path
}

// The scorecard's row "control API called as a web page would".
func TestServerRefusesWhatAWebPageSends(t *testing.T) {
	for name, c := range map[string]struct {
		method, path, body string
		change             func(*http.Request)
	}{
		"origin":              {"POST", "/v1/stop", `{}`, func(r *http.Request) { r.Header.Set("Origin", "http://evil.example") }},
		"origin null":         {"POST", "/v1/stop", `{}`, func(r *http.Request) { r.Header.Set("Origin", "null") }},
		"origin on a reading": {"GET", "/v1/status", ``, func(r *http.Request) { r.Header.Set("Origin", "http://culvert") }},
		"referer":             {"POST", "/v1/stop", `{}`, func(r *http.Request) { r.Header.Set("Referer", "http://evil.example/x") }},
		"fetch metadata":      {"GET", "/v1/events", ``, func(r *http.Request) { r.Header.Set("Sec-Fetch-Site", "cross-site") }},
		"fetch mode":          {"POST", "/v1/start", `{}`, func(r *http.Request) { r.Header.Set("Sec-Fetch-Mode", "no-cors") }},
		"rebound host":        {"POST", "/v1/stop", `{}`, func(r *http.Request) { r.Host = "evil.example" }},
		"numeric host":        {"POST", "/v1/stop", `{}`, func(r *http.Request) { r.Host = "127.0.0.1:1080" }},
		"no host":             {"POST", "/v1/stop", `{}`, func(r *http.Request) { r.Host = "" }},
		"simple form":         {"POST", "/v1/stop", `force=true`, func(r *http.Request) { r.Header.Set("Content-Type", "application/x-www-form-urlencoded") }},
		"simple text":         {"POST", "/v1/stop", `{"force":true}`, func(r *http.Request) { r.Header.Set("Content-Type", "text/plain") }},
		"multipart":           {"POST", "/v1/stop", `{}`, func(r *http.Request) { r.Header.Set("Content-Type", "multipart/form-data; boundary=x") }},
		"untyped body":        {"POST", "/v1/stop", `{"force":true}`, func(r *http.Request) { r.Header.Del("Content-Type") }},
		"typed empty":         {"POST", "/v1/stop", ``, func(r *http.Request) { r.Header.Set("Content-Type", "text/plain") }},
		"chunked untyped":     {"POST", "/v1/stop", `{}`, func(r *http.Request) { r.ContentLength = -1; r.Header.Del("Content-Type") }},
		"get that stops":      {"GET", "/v1/stop", ``, nil},
		"get that starts":     {"GET", "/v1/start?mode=tcp", ``, nil},
		"get that joins":      {"GET", "/v1/channels/x/join", ``, nil},
		"preflight":           {"OPTIONS", "/v1/stop", ``, func(r *http.Request) { r.Header.Set("Access-Control-Request-Method", "POST") }},
		"bare options":        {"OPTIONS", "/v1/stop", ``, nil},
		"put":                 {"PUT", "/v1/stop", `{}`, nil},
		"head":                {"HEAD", "/v1/stop", ``, nil},
		"override":            {"GET", "/v1/stop", ``, func(r *http.Request) { r.Header.Set("X-HTTP-Method-Override", "POST") }},
	} {
		t.Run(name, func(t *testing.T) {
			f := &fake{}
			r := httptest.NewRequest(c.method, "http://culvert"+c.path, strings.NewReader(c.body))
			r.Header.Set("Content-Type", contentJSON)
			if c.change != nil {
				c.change(r)
			}
			w := httptest.NewRecorder()
			newServer(t, f).ServeHTTP(w, r)
			if w.Code < 400 || len(f.calls) != 0 || w.Header().Get("Access-Control-Allow-Origin") != "" {
				t.Errorf("status %d, calls %v, headers %v", w.Code, f.calls, w.Header())
			}
			if !strings.Contains(w.Body.String(), `"code":`) {
				t.Errorf("no code in %q", w.Body)
			}
		})
	}
}

func TestServerReadsBodiesStrictly(t *testing.T) {
	for _, c := range []struct {
		path, body string
		status     int
		want       string // in the answer, or the call
	}{
		{"/v1/stop", ``, 200, "stop 0s"},
		{"/v1/stop", `{"wait":"30s","force":true}`, 200, "stop 30s"},
		{"/v1/start", `{"mode":"tcp"}`, 200, "start tcp"},
		{"/v1/channels/x/leave", `{}`, 200, "leave x"},
		{"/v1/stop", `{"Wait_":"30s"}`, 400, "unknown field"},
		{"/v1/stop", `{"wait":"-3s"}`, 400, "such as 30s"},
		{"/v1/stop", `{"wait":30}`, 400, "wait"},
		{"/v1/stop", `{} {}`, 400, "one object"},
		{"/v1/stop", `{`, 400, "not what this call takes"},
		{"/v1/start", `{"mode":"sctp"}`, 400, "use auto, udp or tcp"},
		{"/v1/stop", `{"wait":"` + strings.Repeat("x", maxBody) + `"}`, 400, "longer than"},
		{"/v1/media", `{"for":"4s"}`, 200, `"way":"sealed"`},
		{"/v1/media", `{"for":"2s"}`, 429, "limit_exceeded"},
		{"/v1/media", `{"for":"2m"}`, 400, "such as 10s"},
		{"/v1/media", `{}`, 400, "such as 10s"},
		{"/v2/stop", `{}`, 404, "no such request"},
	} {
		f := &fake{}
		r := httptest.NewRequest("POST", "http://culvert"+c.path, strings.NewReader(c.body))
		r.Header.Set("Content-Type", contentJSON)
		w := httptest.NewRecorder()
		newServer(t, f).ServeHTTP(w, r)
		got := w.Body.String() + strings.Join(f.calls, ",")
		if w.Code != c.status || !strings.Contains(got, c.want) || c.status != 200 && len(f.calls) != 0 {
			t.Errorf("%s %.60s: %d %s", c.path, c.body, w.Code, got)
		}
	}
}

func TestClientSpeaksWithServer(t *testing.T) {
	f := &fake{}
	c, _ := serve(t, f)
	ctx := t.Context()
	if w, err := c.Media(ctx, 4*time.Second); err != nil || w.Way != "sealed" || w.Audio.Up.Sent != 4 || w.Audio.Up.Loss != 0.25 {
		t.Errorf("media: %+v, %v", w, err)
	}
	if st, err := c.Status(ctx); err != nil || st.State != "running" || st.Link.Carrier != "quic" || st.Channels == nil {
		t.Fatal(st, err)
	}
	if d, err := c.Start(ctx, ""); err != nil || !d.Already {
		t.Fatal(d, err)
	}
	if d, err := c.Stop(ctx, 30*time.Second, true); err != nil || !d.Already || d.State != "running" {
		t.Fatal(d, err)
	}
	if l, err := c.Channels(ctx); err != nil || len(l) != 1 || l[0].App != "zoom" {
		t.Fatal(l, err)
	}
	if err := c.Join(ctx, "a/b c", 7); err != nil {
		t.Fatal(err)
	}
	if d, err := c.Leave(ctx, "a/b c"); err != nil || d.Already {
		t.Fatal(d, err)
	}
	var to []string
	enough := errors.New("enough")
	err := c.Events(ctx, func(e Event) error {
		if to = append(to, e.To); len(to) == 2 {
			return enough
		}
		return nil
	})
	if err != enough || to[0] != "running" || to[1] != "stopping" {
		t.Fatal(to, err)
	}
	f.err = &ActiveError{[]Channel{{Name: "zoom/7", Evidence: []string{"RTP"}}}, tunnel.Errorf(tunnel.ChannelActive, "zoom is in a channel")}
	_, err = c.Stop(ctx, 0, false)
	var active *ActiveError
	if !errors.As(err, &active) || active.Channels[0].Evidence[0] != "RTP" || !errors.Is(err, tunnel.ChannelActive) {
		t.Fatal(err)
	}
	if got := strings.Join(f.calls, ","); got != "start ,stop 30s,join a/b c,leave a/b c,stop 0s" {
		t.Error(got)
	}
}

func TestNothingAnswers(t *testing.T) {
	missing := filepath.Join(t.TempDir(), "none.sock")
	if _, err := NewClient(missing).Status(t.Context()); !errors.Is(err, ErrNoSidecar) || !strings.Contains(err.Error(), missing) {
		t.Error(err)
	}
}

func TestGarbageIsClosed(t *testing.T) {
	c, path := serve(t, &fake{})
	conn, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(time.Minute))
	conn.Write(bytes.Repeat([]byte{0x16, 0x03, 0x01, '\n', '\n'}, 100))
	if _, err := io.Copy(io.Discard, conn); errors.Is(err, os.ErrDeadlineExceeded) {
		t.Error("garbage was kept open")
	}
	if _, err := c.Status(t.Context()); err != nil {
		t.Error("others were disturbed:", err)
	}
}

func TestListenReplacesOnlyADeadSocket(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "sub", "c.sock")
	l, err := Listen(path, "")
	if err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]os.FileMode{path: 0o600, filepath.Dir(path): 0o700} {
		if st, err := os.Stat(name); err != nil || st.Mode().Perm() != want {
			t.Errorf("%s: %v %v", name, st.Mode(), err)
		}
	}
	if _, err := Listen(path, ""); tunnel.CodeOf(err) != tunnel.ConfigInvalid || !strings.Contains(err.Error(), "already answers") {
		t.Error(err)
	}
	// Die without cleaning up.
	l.(*listener).UnixListener.Close()
	l, err = Listen(path, "")
	if err != nil {
		t.Fatal("a dead socket was not replaced:", err)
	}
	l.Close()
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, []byte("keep"), 0o600); err != nil {
		t.Fatal(err)
	}
	for path, group := range map[string]string{file: "", filepath.Join(file, "x.sock"): "", dir + strings.Repeat("x", 200): "", "": "", filepath.Join(dir, "g"): "no-such-group-here"} {
		if l, err := Listen(path, group); tunnel.CodeOf(err) != tunnel.ConfigInvalid {
			t.Errorf("%s: %v %v", path, l, err)
		}
	}
	if b, _ := os.ReadFile(file); string(b) != "keep" {
		t.Error("a file was removed")
	}
}

func TestPaths(t *testing.T) {
	t.Setenv("RUNTIME_DIRECTORY", "/run/a:/run/b")
	t.Setenv("XDG_RUNTIME_DIR", "/run/user/7")
	if got := strings.Join(Paths(), " "); got != "/run/a/control.sock /run/user/7/culvert/control.sock /run/culvert/control.sock" {
		t.Error(got)
	}
}

func FuzzControl(f *testing.F) {
	f.Add("POST", "/v1/stop", `{"wait":"30s","force":true}`)
	f.Add("POST", "/v1/channels/a%2Fb/join", `{"pid":1}`)
	f.Add("GET", "/v1/status", ``)
	f.Fuzz(func(t *testing.T, method, path, body string) {
		r, err := http.NewRequest(method, "http://culvert"+path, strings.NewReader(body))
		if err != nil || r.Host != Host {
			return
		}
		// Streams of events end at once.
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		r = r.WithContext(ctx)
		r.Header.Set("Content-Type", contentJSON)
		b := &fake{}
		w := httptest.NewRecorder()
		newServer(t, b).ServeHTTP(w, r)
		if len(b.calls) > 0 && method != http.MethodPost {
			t.Fatalf("%s %s did %v", method, path, b.calls)
		}
		if len(b.calls) > 0 && w.Code != http.StatusOK {
			t.Fatalf("%d after %v", w.Code, b.calls)
		}
	})
}

// Who may write to the socket's folder can put a link in its place.
func TestRightsAreNotSetBehindALink(t *testing.T) {
	if runtime.GOOS == "windows" {
		t.Skip("files have no such rights there")
	}
	other := filepath.Join(t.TempDir(), "other")
	if err := os.WriteFile(other, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	link := filepath.Join(t.TempDir(), "c.sock")
	if err := os.Symlink(other, link); err != nil {
		t.Fatal(err)
	}
	if err := setRights(link, 0o660, os.Getgid()); err == nil {
		t.Error("a link was followed")
	}
	if st, err := os.Stat(other); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("the file behind it has %v, %v", st.Mode(), err)
	}
	own := filepath.Join(t.TempDir(), "c.sock")
	if err := os.WriteFile(own, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := setRights(own, 0o660, os.Getgid()); err != nil {
		t.Error(err)
	}
	if st, err := os.Stat(own); err != nil || st.Mode().Perm() != 0o660 {
		t.Errorf("the socket has %v, %v", st.Mode(), err)
	}
}

// A container has no /etc/group.
func TestTheGroupMayBeANumber(t *testing.T) {
	path := filepath.Join(t.TempDir(), "c.sock")
	l, err := Listen(path, strconv.Itoa(os.Getgid()))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	info, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	if info.Mode().Perm() != 0o660 {
		t.Errorf("the socket's mode is %v, want 0660", info.Mode())
	}
}
