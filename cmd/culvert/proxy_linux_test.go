package main

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"

	"culvert/cmd/internal/netpair"
	"culvert/sidecar/control"
	"culvert/tunnel"
)

// buildBoth builds the programs once for all tests, in a network that can be made.
func buildBoth(t *testing.T) (bin string) {
	t.Helper()
	netpair.New(t) // skips before anything is built
	bin, err := programs()
	if err != nil {
		t.Fatal(err)
	}
	return bin
}

var programs = sync.OnceValues(func() (bin string, err error) {
	if bin, err = os.MkdirTemp("", "culvert"); err != nil {
		return "", err
	}
	atTheEnd = append(atTheEnd, func() { os.RemoveAll(bin) })
	if err = os.Chmod(bin, 0o755); err != nil { // apps of other users start them, too
		return "", err
	}
	ctx, cancel := context.WithTimeout(context.Background(), 5*runPatience)
	defer cancel()
	if out, err := exec.CommandContext(ctx, "go", "build", "-o", bin, "culvert/cmd/culvert", "culvert/cmd/culvert-cloudproxy", "culvert/cmd/culvert-pac").CombinedOutput(); err != nil {
		return "", fmt.Errorf("go build: %w\n%s", err, out)
	}
	return bin, nil
})

// needed returns the path of a program that CI must have.
func needed(t *testing.T, program string) string {
	t.Helper()
	path, err := exec.LookPath(program)
	if err == nil {
		return path
	}
	if os.Getenv("CI") == "true" {
		t.Fatal(err)
	}
	t.Skip(err)
	return ""
}

// open777 makes a folder that a program can use which becomes another user.
func open777(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "culvert")
	if err == nil {
		err = os.Chmod(dir, 0o777)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// cloudName is a name that is known to the far end's proxies alone.
const cloudName = "cloud.culvert.test"

// squid starts Debian's squid at the far end, which lets alice CONNECT to port
// 443, and nobody anything else. It returns where it listens.
func squid(t *testing.T, pair *netpair.Pair) (at netip.AddrPort) {
	t.Helper()
	program, dir := needed(t, "squid"), open777(t)
	at = netip.AddrPortFrom(netpair.FarAddr, 3128)
	for name, text := range map[string]string{
		"hosts": "127.0.0.1 " + cloudName + "\n",
		"auth": `#!/bin/sh
while read -r who; do [ "$who" = "alice sesame" ] && echo OK || echo ERR; done
`,
		"squid.conf": strings.NewReplacer("DIR", dir, "AT", at.String()).Replace(`http_port AT
hosts_file DIR/hosts
auth_param basic program /bin/sh DIR/auth
auth_param basic realm clinic
acl users proxy_auth REQUIRED
acl https port 443
http_access deny !CONNECT
http_access deny CONNECT !https
http_access allow users
http_access deny all
cache deny all
access_log none
cache_log DIR/log
pid_filename DIR/pid
coredump_dir DIR
netdb_filename none
pinger_enable off
shutdown_lifetime 0 seconds
`),
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	t.Cleanup(func() {
		if log, err := os.ReadFile(filepath.Join(dir, "log")); t.Failed() && err == nil {
			t.Logf("squid:\n%s", log)
		}
	})
	pair.Far.Start(t, exec.Command(program, "-N", "-f", filepath.Join(dir, "squid.conf")))
	farAnswers(t, pair, at)
	return at
}

// rewrite changes the configurations that init has written.
func rewrite(t *testing.T, dir string, sidecar, cloud func(text string) string) {
	t.Helper()
	for name, change := range map[string]func(string) string{"culvert.yaml": sidecar, "cloudproxy.yaml": cloud} {
		if change == nil {
			continue
		}
		file := filepath.Join(dir, name)
		text, err := os.ReadFile(file)
		if err == nil {
			err = os.WriteFile(file, []byte(change(string(text))), 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

func TestCallsRunThroughWhatAClinicLetsOut(t *testing.T) {
	bin := buildBoth(t)
	for name, test := range map[string]func(*testing.T, string){
		"a squid that asks for a password": throughSquid,
		"a squid, and UDP beside it":       besideSquid,
		"an nginx that passes WebSockets":  throughNginx,
		"an nginx behind a squid":          throughSquidAndNginx,
		"an inspector":                     throughInspection,
	} {
		t.Run(name, func(t *testing.T) { test(t, bin) })
	}
}

// A clinic lets nothing out but what its proxy CONNECTs to port 443 for who knows
// the password. The cloud proxy can not be reached without it at all.
func throughSquid(t *testing.T, bin string) {
	pair := netpair.New(t)
	at := squid(t, pair)
	o := newOnly443Named(t, bin, pair, cloudName, func(dir string) {
		os.WriteFile(filepath.Join(dir, "password"), []byte("wrong\n"), 0o600)
		rewrite(t, dir, func(text string) string {
			return text + fmt.Sprintf("proxy:\n  url: http://%s\n  user: alice\n  password_file: password\n", at)
		}, func(text string) string {
			return regexp.MustCompile(`(?m)^listen: .*$`).ReplaceAllString(text, "listen: 127.0.0.1:443")
		})
	})
	w := pair.Watch(t, at.Port())
	cmd := o.start(pair.Near, o.culvert, "run", "-c", filepath.Join(o.dir, "culvert.yaml"), "--listen", "127.0.0.1:0", "--control", o.socket, "--mode", "tcp")
	runEventually(t, "the sidecar says that the password is wrong", func() bool {
		st, err := control.NewClient(o.socket).Status(t.Context())
		return err == nil && st.Link.Code == tunnel.ProxyAuthRequired && strings.Contains(st.Link.Why, "Basic")
	})
	if err := os.WriteFile(filepath.Join(o.dir, "password"), []byte("sesame\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	runEventually(t, "the sidecar is up", func() bool { return o.status().Link.Phase == tunnel.LinkUp })
	st := o.status()
	if st.Link.Carrier != "tls" || st.Link.Way != "lanes" || !strings.Contains(st.Link.Why, "through the proxy http://"+at.String()) {
		t.Errorf("the link is %+v", st.Link)
	}
	o.media(st.Listen)
	o.stream(st.Listen, "127.0.0.1")
	o.call(st.Listen)
	if exec.Command(o.culvert, "stop", "--force", "--control", o.socket).Run() != nil {
		t.Error("stop fails")
	}
	if s := w.Stop(); s.TCP < 100 || s.UDP > 0 || len(s.Stray) > 0 {
		t.Errorf("seen %+v, want TCP to the proxy alone", s)
	}
	args, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", cmd.Process.Pid))
	for _, log := range o.logs {
		if err != nil || strings.Contains(log.String()+string(args), "sesame") {
			t.Errorf("the password is in a log or the arguments (%v)", err)
		}
	}
}

// UDP that is open beside the proxy carries the call, and TCP goes through it, which
// here a PAC file names behind one that is not there.
func besideSquid(t *testing.T, bin string) {
	pair := netpair.New(t)
	at := squid(t, pair)
	o := newOnly443On(t, bin, pair, func(dir string) {
		os.WriteFile(filepath.Join(dir, "password"), []byte("sesame"), 0o600)
		os.WriteFile(filepath.Join(dir, "clinic.pac"), fmt.Appendf(nil, `function FindProxyForURL(url, host) {
			if (isInNet(host, "198.18.80.0", "255.255.255.0")) return "PROXY 127.0.0.1:9; PROXY %s; DIRECT";
		}`, at), 0o600)
		rewrite(t, dir, func(text string) string {
			return text + "proxy:\n  pac: clinic.pac\n  user: alice\n  password_file: password\n"
		}, nil)
	})
	w := pair.Watch(t, at.Port())
	o.start(pair.Near, o.culvert, "run", "-c", filepath.Join(o.dir, "culvert.yaml"), "--listen", "127.0.0.1:0", "--control", o.socket)
	runReady(t, o.socket)
	listen := o.status().Listen
	o.media(listen)
	runEventually(t, "streams go through the proxy, and datagrams beside it", func() bool {
		l := o.status().Link
		return l.Carrier == "quic" && l.Streams == "tls"
	})
	o.stream(listen, "127.0.0.1")
	s := w.Stop()
	if s.TCP == 0 {
		t.Errorf("nothing went to the proxy: %+v", s)
	}
	for what := range s.Stray {
		if !strings.HasPrefix(what, "UDP") || !strings.Contains(what, netpair.FarAddr.String()+":443") {
			t.Errorf("the link saw %s", what)
		}
	}
	if len(s.Stray) == 0 {
		t.Error("no UDP was seen")
	}
}
