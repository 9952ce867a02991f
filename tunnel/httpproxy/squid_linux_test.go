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

// needed returns the path of a program that CI must have.
func needed(t *testing.T, program string) string {
	t.Helper()
	path, err := exec.LookPath(program)
	if err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatal(err)
		}
		t.Skip(err)
	}
	return path
}

// free returns an address on loopback that nobody listens at.
func free(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

// openDir makes a folder for programs that become another user, who can not enter
// what t.TempDir makes.
func openDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "proxy")
	if err == nil {
		err = os.Chmod(dir, 0o777)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// squid starts Debian's squid on loopback, with the lines of auth.
func squid(t *testing.T, dir, auth string) *url.URL {
	t.Helper()
	program, at := needed(t, "squid"), free(t)
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

// echo listens, and answers with what it hears.
func echo(t *testing.T) (address string) {
	t.Helper()
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
	return ln.Addr().String()
}

// passes connects through a proxy to an echo, some times.
func passes(t *testing.T, d *Dialer, to string) {
	t.Helper()
	for range 3 {
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
		c, err := d.Dial(ctx, "tcp", to)
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
}

func TestSquidLetsIn(t *testing.T) {
	at := echo(t)
	for scheme, auth := range map[string]string{
		"Digest": "auth_param digest program /usr/lib/squid/digest_file_auth DIR/users\nauth_param digest realm clinic",
		"NTLM":   "auth_param ntlm program DIR/helper " + ntlmHelper,
	} {
		t.Run(scheme, func(t *testing.T) {
			u := squid(t, openDir(t), auth)
			d := dialer(t, Config{Choose: to(u), Credentials: knownAs(goodUser, goodPassword)})
			passes(t, d, at)
			d.learn(u, func(k *known) {
				if k.method == nil || k.method.scheme != scheme {
					t.Errorf("squid was answered by %+v", k.method)
				}
			})
			d = dialer(t, Config{Choose: to(u), Credentials: knownAs(goodUser, "wrong")})
			if _, err := d.Dial(t.Context(), "tcp", at); tunnel.CodeOf(err) != tunnel.ProxyAuthRequired {
				t.Errorf("with a wrong password: %v", err)
			}
		})
	}
}
