package sidecar

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"culvert/tunnel"
)

// Clients that were not written for this test.

func frontCommand(t *testing.T, name string, args ...string) *exec.Cmd {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 4*frontPatience)
	t.Cleanup(cancel)
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.WaitDelay = frontPatience
	// No proxy variables and no .curlrc of whoever runs the tests.
	cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "HOME=/nonexistent"}
	return cmd
}

func TestCurl(t *testing.T) {
	curl := frontWant(t, "curl")
	blob := make([]byte, 10<<20)
	rand.Read(blob)
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodPut {
			h := sha256.New()
			io.Copy(h, r.Body)
			fmt.Fprintf(w, "%x", h.Sum(nil))
			return
		}
		w.Write(blob)
	}))
	defer server.Close()
	addr := netip.MustParseAddrPort(strings.TrimPrefix(server.URL, "http://"))
	url := fmt.Sprintf("http://blob.example:%d/", addr.Port())
	sum := fmt.Sprintf("%x", sha256.Sum256(blob))
	file := filepath.Join(t.TempDir(), "blob")
	if err := os.WriteFile(file, blob, 0o600); err != nil {
		t.Fatal(err)
	}
	for name, tc := range map[string]struct {
		auth func(user, password string) bool
		args func(front string) []string
		fail bool
	}{
		"SOCKS":                    {nil, func(f string) []string { return []string{"--socks5-hostname", f} }, false},
		"HTTP CONNECT":             {nil, func(f string) []string { return []string{"-p", "-x", "http://" + f} }, false},
		"SOCKS with a user":        {StaticAuth("u", "p"), func(f string) []string { return []string{"--socks5-hostname", f, "--proxy-user", "u:p"} }, false},
		"HTTP CONNECT with a user": {StaticAuth("u", "p"), func(f string) []string { return []string{"-p", "-x", "http://" + f, "--proxy-user", "u:p"} }, false},
		"HTTP, asked for the method": {StaticAuth("u", "p"), func(f string) []string {
			return []string{"-p", "-x", "http://" + f, "--proxy-anyauth", "--proxy-user", "u:p"}
		}, false},
		"SOCKS, wrong password": {StaticAuth("u", "p"), func(f string) []string { return []string{"--socks5-hostname", f, "--proxy-user", "u:q"} }, true},
		"HTTP, wrong password":  {StaticAuth("u", "p"), func(f string) []string { return []string{"-p", "-x", "http://" + f, "--proxy-user", "u:q"} }, true},
		"HTTP without CONNECT":  {nil, func(f string) []string { return []string{"-f", "-x", "http://" + f} }, true},
	} {
		t.Run(name, func(t *testing.T) {
			f := frontStart(t, &frontDirect{hosts: map[string]netip.Addr{"blob.example": addr.Addr()}}, func(c *FrontConfig) { c.Auth = tc.auth })
			args := append([]string{"-sS"}, tc.args(f.Addr().String())...)
			down, err := frontCommand(t, curl, append(args, url)...).Output()
			if tc.fail {
				if err == nil || bytes.Equal(down, blob) {
					t.Fatal("it went through")
				}
				return
			}
			if err != nil || !bytes.Equal(down, blob) {
				t.Fatalf("down: %d bytes, %v", len(down), err)
			}
			up, err := frontCommand(t, curl, append(args, "-T", file, url)...).Output()
			if err != nil || string(up) != sum {
				t.Fatalf("up: %q, %v", up, err)
			}
		})
	}
}

func TestCurlNamesTheRefusal(t *testing.T) {
	curl := frontWant(t, "curl")
	f := frontStart(t, &frontDirect{fail: tunnel.PolicyDenied}, nil)
	out, err := frontCommand(t, curl, "-sS", "--socks5-hostname", f.Addr().String(), "http://a.example/").CombinedOutput()
	if err == nil || !strings.Contains(string(out), "(2)") {
		t.Errorf("SOCKS: %v, %s", err, out)
	}
	out, err = frontCommand(t, curl, "-sS", "-p", "-x", "http://"+f.Addr().String(), "http://a.example/").CombinedOutput()
	if err == nil || !strings.Contains(string(out), "403") {
		t.Errorf("HTTP: %v, %s", err, out)
	}
}

// frontInsisting is an input that says the same again and again, since a
// datagram may be lost. The program that reads it must end by itself.
type frontInsisting string

func (i frontInsisting) Read(p []byte) (int, error) {
	time.Sleep(100 * time.Millisecond)
	return copy(p, i), nil
}

func TestSocksify(t *testing.T) {
	socksify, nc := frontWant(t, "socksify"), frontWant(t, "nc")
	echo := frontUDPEcho(t)
	// Dante goes around the proxy to addresses of this machine and its networks.
	far := netip.MustParseAddr("198.51.100.10")
	f := frontStart(t, &frontDirect{alias: far}, nil)
	listen := f.Addr().String()
	_, port, _ := strings.Cut(listen, ":")
	config := filepath.Join(t.TempDir(), "socks.conf")
	if err := os.WriteFile(config, fmt.Appendf(nil, `route {
  from: 0.0.0.0/0 to: 0.0.0.0/0 via: 127.0.0.1 port = %s
  command: connect udpassociate
  protocol: tcp udp
  proxyprotocol: socks_v5
  method: none
}
`, port), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := frontCommand(t, socksify, nc, "-u", "-W", "1", far.String(), fmt.Sprint(echo.Port())) // ends with the first answer
	cmd.Env = append(cmd.Env, "SOCKS_CONF="+config)
	cmd.Stdin = frontInsisting("through the relay\n")
	out, err := cmd.CombinedOutput()
	if !strings.Contains(string(out), "through the relay") {
		t.Fatalf("%v: %s; %+v", err, out, f.Stats())
	}
	if s := f.Stats(); s.Associations != 1 || s.Up == 0 {
		t.Fatalf("it went around: %+v", s)
	}
}
