package httpproxy

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"culvert/tunnel"
)

// squid starts Debian's squid on loopback, with the lines of auth.
func squid(t *testing.T, auth string) *url.URL {
	t.Helper()
	program, err := exec.LookPath("squid")
	if err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatal(err)
		}
		t.Skip(err)
	}
	free, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	at := free.Addr().String()
	free.Close()
	// Not t.TempDir: squid becomes another user, who can not enter that.
	dir, err := os.MkdirTemp("", "squid")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o777); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "users"), []byte(goodUser+":"+goodPassword+"\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	self, err := os.Executable()
	if err == nil {
		err = exec.Command("install", "-m", "755", self, filepath.Join(dir, "helper")).Run()
	}
	if err != nil {
		t.Fatal(err)
	}
	conf := filepath.Join(dir, "squid.conf")
	err = os.WriteFile(conf, fmt.Appendf(nil, `http_port %s
%s
acl users proxy_auth REQUIRED
http_access allow users
http_access deny all
cache deny all
access_log none
cache_log %[3]s/cache.log
pid_filename %[3]s/pid
coredump_dir %[3]s
netdb_filename none
pinger_enable off
shutdown_lifetime 0 seconds
`, at, strings.ReplaceAll(auth, "DIR", dir), dir), 0o644)
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(program, "-N", "-f", conf)
	out, err := os.Create(filepath.Join(dir, "out"))
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stdout, cmd.Stderr = out, out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
		out.Close()
		if t.Failed() {
			for _, name := range []string{"out", "cache.log"} {
				text, _ := os.ReadFile(filepath.Join(dir, name))
				t.Logf("%s:\n%s", name, text)
			}
		}
	})
	for end := time.Now().Add(30 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		if c, err := net.Dial("tcp", at); err == nil {
			c.Close()
			return &url.URL{Scheme: "http", Host: at}
		}
		if time.Now().After(end) {
			t.Fatal("squid does not listen")
		}
	}
}

func TestSquidLetsIn(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			io.Copy(c, c)
			c.Close()
		}
	}()
	t.Cleanup(func() { ln.Close(); <-done })
	for scheme, auth := range map[string]string{
		"Digest": "auth_param digest program /usr/lib/squid/digest_file_auth DIR/users\nauth_param digest realm clinic",
		"NTLM":   "auth_param ntlm program DIR/helper " + ntlmHelper,
	} {
		t.Run(scheme, func(t *testing.T) {
			u := squid(t, auth)
			d := dialer(t, Config{Choose: to(u), Credentials: knownAs(goodUser, goodPassword)})
			for range 3 {
				ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
				c, err := d.Dial(ctx, "tcp", ln.Addr().String())
				cancel()
				if err != nil {
					t.Fatal(err)
				}
				c.SetDeadline(time.Now().Add(20 * time.Second))
				io.WriteString(c, "hello")
				got := make([]byte, 5)
				if _, err := io.ReadFull(c, got); err != nil || string(got) != "hello" {
					t.Errorf("%q came back, %v", got, err)
				}
				c.Close()
			}
			d.learn(u, func(k *known) {
				if k.method == nil || k.method.scheme != scheme {
					t.Errorf("squid was answered by %+v", k.method)
				}
			})
			d = dialer(t, Config{Choose: to(u), Credentials: knownAs(goodUser, "wrong")})
			if _, err := d.Dial(t.Context(), "tcp", ln.Addr().String()); tunnel.CodeOf(err) != tunnel.ProxyAuthRequired {
				t.Errorf("with a wrong password: %v", err)
			}
		})
	}
}
