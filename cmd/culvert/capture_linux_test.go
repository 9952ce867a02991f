package main

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"culvert/cmd/internal/cmdtest"
	"culvert/cmd/internal/netpair"
	"culvert/sidecar/capture/rules"
	"culvert/tunnel"
)

// captured is a sidecar that takes captured traffic on a network of which only
// 443 to the cloud proxy passes, and an outside world behind the cloud proxy.
type captured struct {
	*only443
	sidecar *exec.Cmd
}

// captureUser is the app's, who has no name on the machine.
const captureUser = 54321

// The outside world: an address of each family that only the cloud proxy reaches.
const (
	outside4 = "203.0.113.9"
	outside6 = "2001:db8:113::9"
)

// captureFirewall stands behind the link, so that the link shows what it stops.
const captureFirewall = `iifname "link" meta l4proto { tcp, udp } th dport != 443 drop`

func newCaptured(t *testing.T, bin, config string) *captured {
	t.Helper()
	pair := netpair.New(t)
	o := &captured{only443: newOnly443On(t, bin, pair, func(dir string) {
		for file, more := range map[string]string{"cloudproxy.yaml": "", "culvert.yaml": "\n" + config} {
			b, err := os.ReadFile(filepath.Join(dir, file))
			allowed := "127.0.0.0/8, 203.0.113.0/24, 2001:db8:113::/48"
			if more != "" { // the cloud proxy itself, but not by the tunnel
				allowed += ", " + netpair.FarAddr.String() + "/32"
			}
			if err == nil {
				err = os.WriteFile(filepath.Join(dir, file), []byte(strings.ReplaceAll(string(b), "127.0.0.0/8", allowed)+more), 0o600)
			}
			if err != nil {
				t.Fatal(err)
			}
		}
	})}
	for at, commands := range map[*netpair.Space][]string{
		pair.Far:  {"ip addr add " + outside4 + "/32 dev lo", "ip addr add " + outside6 + "/128 dev lo nodad"},
		pair.Near: {"ip link add away type veth peer name nowhere", "ip link set away up", "ip link set nowhere up", "ip -6 addr add fd00:80::1/64 dev away nodad", "ip -6 route add default dev away"},
	} {
		for _, c := range commands {
			if out, err := o.in(at, 0, strings.Fields(c)...); err != nil {
				t.Fatalf("%s: %v\n%s", c, err, out)
			}
		}
	}
	callFilter(t, pair.Far, captureFirewall)
	o.run()
	return o
}

// run starts the sidecar.
func (o *captured) run() {
	o.t.Helper()
	o.sidecar = o.start(o.pair.Near, o.culvert, "run", "-c", filepath.Join(o.dir, "culvert.yaml"), "--listen", "127.0.0.1:0", "--control", o.socket)
	runReady(o.t, o.socket)
}

// in runs a program in a namespace as a user.
func (o *captured) in(at *netpair.Space, uid uint32, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(o.t.Context(), runPatience)
	defer cancel()
	cmd := exec.CommandContext(ctx, args[0], args[1:]...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid, NoSetGroups: true}}
	cmd.Dir = "/"
	var out []byte
	err := at.Do(func() (err error) { out, err = cmd.CombinedOutput(); return err })
	return string(out), err
}

// app runs a program as the captured user.
func (o *captured) app(args ...string) (string, error) {
	return o.in(o.pair.Near, captureUser, args...)
}

// capture is a command of culvert in the sidecar's namespace.
func (o *captured) capture(uid uint32, args ...string) (string, error) {
	return o.in(o.pair.Near, uid, append([]string{o.culvert, "capture"}, args...)...)
}

// web serves HTTP in the outside world, and returns its URL for each address.
func (o *captured) web() (urls []string) {
	o.t.Helper()
	for _, host := range []string{outside4, outside6} {
		var l net.Listener
		if err := o.pair.Far.Do(func() (err error) { l, err = net.Listen("tcp", net.JoinHostPort(host, "0")); return err }); err != nil {
			o.t.Fatal(err)
		}
		s := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, "the outside world") })}
		done := make(chan struct{})
		go func() { defer close(done); s.Serve(l) }()
		o.t.Cleanup(func() { s.Close(); <-done })
		urls = append(urls, "http://"+l.Addr().String()+"/")
	}
	return urls
}

// echoOutside sends datagrams back in the outside world, and returns the port of each address.
func (o *captured) echoOutside() (ports map[string]string) {
	o.t.Helper()
	ports = map[string]string{}
	for _, host := range []string{outside4, outside6} {
		ports[host] = o.answerOutside(host, "0", func(b []byte) []byte { return b })
	}
	return ports
}

// answerOutside answers datagrams in the outside world, and returns the port.
func (o *captured) answerOutside(host, port string, answer func([]byte) []byte) string {
	o.t.Helper()
	var c net.PacketConn
	if err := o.pair.Far.Do(func() (err error) { c, err = net.ListenPacket("udp", net.JoinHostPort(host, port)); return err }); err != nil {
		o.t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		b := make([]byte, 1<<16)
		for {
			n, from, err := c.ReadFrom(b)
			if err != nil {
				return
			}
			c.WriteTo(answer(b[:n]), from)
		}
	}()
	o.t.Cleanup(func() { c.Close(); <-done })
	_, port, _ = net.SplitHostPort(c.LocalAddr().String())
	return port
}

// get fetches with curl, which knows of no proxy.
func (o *captured) get(url string) (string, error) {
	return o.app("curl", "-sS", "--max-time", "10", "--noproxy", "*", url)
}

func captureBuild(t *testing.T) (bin string) {
	t.Helper()
	netpair.New(t) // skips before anything is built
	for _, tool := range []string{"nft", "curl", "nc", "ip"} {
		if _, err := exec.LookPath(tool); err != nil {
			if os.Getenv("CI") == "true" {
				t.Fatalf("CI=true says that nothing may be left out: %v", err)
			}
			t.Skip(err)
		}
	}
	return buildBoth(t)
}

// Apps that know of no proxy reach the outside world, and nothing but 443 leaves.
func TestAnAppThatKnowsNoProxyIsCarried(t *testing.T) {
	o := newCaptured(t, captureBuild(t), "capture: {}\n")
	urls, ports := o.web(), o.echoOutside()
	if out, err := o.in(o.pair.Near, captureUser, "curl", "-sS", "--max-time", "1", urls[0]); err == nil {
		t.Fatalf("the outside world is reached without capture: %s", out)
	}
	if out, err := o.capture(0, "status", "--control", o.socket); err != nil || !strings.Contains(out, "Capture is off") {
		t.Errorf("%v\n%s", err, out)
	}
	user := fmt.Sprint(captureUser)
	if out, err := o.capture(captureUser, "on", "--user", user, "--control", o.socket); err == nil || !strings.Contains(out, "not_permitted") && !strings.Contains(out, "permi") {
		t.Errorf("somebody else turns it on: %v\n%s", err, out)
	}
	if out, err := o.capture(0, "on", "--user", user, "--dns", "--control", o.socket); err == nil || !strings.Contains(out, "capture.dns") {
		t.Errorf("DNS is captured, and has nowhere to go: %v\n%s", err, out)
	}
	if out, err := o.capture(0, "on", "--user", user, "--control", o.socket); err != nil || !strings.Contains(out, "Capture is on") {
		t.Fatalf("%v\n%s", err, out)
	}

	w := o.pair.Watch(t, 443)
	for _, url := range urls {
		if out, err := o.get(url); err != nil || out != "the outside world" {
			t.Errorf("%s: %v\n%s", url, err, out)
		}
	}
	for host, port := range ports {
		if out, err := o.app("sh", "-c", "printf hello | nc -u -w 2 -W 1 "+host+" "+port); err != nil || out != "hello" {
			t.Errorf("UDP to %s: %v, %q", host, err, out)
		}
	}
	// Others are not captured; root, as which the sidecar runs, neither.
	if out, err := o.in(o.pair.Near, 0, "curl", "-sS", "--max-time", "1", urls[0]); err == nil {
		t.Errorf("another user is captured: %s", out)
	}
	seen := w.Stop()
	if seen.UDP == 0 {
		t.Errorf("seen %+v", seen)
	}
	for what := range seen.Stray {
		if !strings.Contains(what, outside4) || !strings.HasPrefix(what, "TCP") { // that of root
			t.Errorf("the link saw %s", what)
		}
	}

	out, err := o.capture(0, "status", "--control", o.socket)
	for _, want := range []string{"Capture is on, to the sidecar at port 1443", "of user " + user, "the sidecar's own packets", "to this machine itself", "2 UDP sockets, 2 TCP connections"} {
		if err != nil || !strings.Contains(out, want) {
			t.Errorf("%v: %q is not in\n%s", err, want, out)
		}
	}
	if n := len(strings.Split(out, "\n")); n > 24 {
		t.Errorf("status is more than a screen:\n%s", out)
	}

	// Stopped means the same here: refused, and at once.
	if out, err := o.in(o.pair.Near, 0, o.culvert, "stop", "--force", "--control", o.socket); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	began := time.Now()
	if out, err := o.get(urls[0]); err == nil || !strings.Contains(out, "reset") && !strings.Contains(out, "connect to") {
		t.Errorf("TCP while stopped: %v\n%s", err, out)
	}
	if out, err := o.app("sh", "-c", "printf hello | nc -u -w 5 "+outside4+" "+ports[outside4]); strings.Contains(out, "hello") {
		t.Errorf("UDP while stopped: %v\n%s", err, out)
	}
	if d := time.Since(began); d > 4*time.Second {
		t.Errorf("refusing took %v", d)
	}
	if s := o.status().Capture; s.Refused[string(tunnel.ProxyStopped)] < 2 || s.Unreachable == 0 {
		t.Errorf("%+v", s)
	}
	if out, err := o.in(o.pair.Near, 0, o.culvert, "start", "--control", o.socket); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	if out, err := o.get(urls[0]); err != nil || out != "the outside world" {
		t.Errorf("started again: %v\n%s", err, out)
	}

	// The rules end with the sidecar.
	o.sidecar.Process.Signal(syscall.SIGTERM)
	o.sidecar.Wait()
	if out, _ := o.in(o.pair.Near, 0, "nft", "list", "tables"); strings.Contains(out, "culvert") {
		t.Errorf("after the end of the sidecar there is\n%s", out)
	}
}

// What the configuration says is set at the start, and what a killed sidecar has
// left is swept by the next.
func TestRulesOfTheConfigurationComeAndGoWithTheSidecar(t *testing.T) {
	o := newCaptured(t, captureBuild(t), fmt.Sprintf("capture: {users: %d, except: 198.18.0.0/15, dns: %s}\n", captureUser, outside4))
	urls := o.web()
	if out, err := o.get(urls[0]); err != nil || out != "the outside world" {
		t.Errorf("%v\n%s", err, out)
	}
	if out, err := o.capture(0, "status", "--control", o.socket); err != nil || !strings.Contains(out, "through the tunnel to "+outside4+":53") {
		t.Errorf("%v\n%s", err, out)
	}
	// Others remove routes that they do not know, or all rules.
	for _, c := range []string{"ip rule del priority 4430", "nft flush ruleset"} {
		if out, err := o.in(o.pair.Near, 0, strings.Fields(c)...); err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		runEventually(t, "after "+c+" it is captured again", func() bool {
			out, err := o.in(o.pair.Near, captureUser, "curl", "-sS", "--max-time", "1", urls[0])
			return err == nil && out == "the outside world"
		})
	}
	tables := func() string {
		out, _ := o.in(o.pair.Near, 0, "nft", "list", "tables")
		return out
	}
	o.sidecar.Process.Kill()
	o.sidecar.Wait()
	if !strings.Contains(tables(), "culvert") {
		t.Error("the rules of a killed sidecar are gone: this proves nothing")
	}
	began := time.Now()
	if out, err := o.get(urls[0]); err == nil || !strings.Contains(out, "refused") && !strings.Contains(out, "connect") {
		t.Errorf("captured without a sidecar: %v %s", err, out)
	}
	if d := time.Since(began); d > 4*time.Second {
		t.Errorf("to be refused without a sidecar took %v", d)
	}
	// The next one takes over what they capture; nothing leaves in between.
	w := o.pair.Watch(t, 443)
	app := exec.Command("bash", "-c", "exec 3>/dev/udp/"+outside4+"/9; while sleep 0.005; do printf x >&3; done")
	app.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: captureUser, Gid: captureUser, NoSetGroups: true}}
	o.pair.Near.Start(t, app)
	o.run()
	runEventually(t, "the app's datagrams are taken", func() bool { return runStatus(t, o.socket).Capture.Up > 10 })
	for what, n := range w.Stop().Stray {
		t.Errorf("the link saw %s, %d times", what, n)
	}
	app.Process.Kill()
	o.sidecar.Process.Kill()
	o.sidecar.Wait()
	// Another one, which captures nobody, sweeps.
	if err := os.WriteFile(filepath.Join(o.dir, "culvert.yaml"), []byte(strings.Replace(o.read("culvert.yaml"), fmt.Sprintf("users: %d, ", captureUser), "", 1)), 0o600); err != nil {
		t.Fatal(err)
	}
	o.run()
	if list := tables(); strings.Contains(list, "culvert") {
		t.Errorf("not swept: %s", list)
	}
	// Rules for an init container stay.
	if out, err := o.capture(0, "on", "--user", fmt.Sprint(captureUser), "--without-sidecar"); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	o.sidecar.Process.Signal(syscall.SIGTERM)
	o.sidecar.Wait()
	if list := tables(); !strings.Contains(list, "culvert") {
		t.Errorf("lasting rules are gone: %s", list)
	}
	o.run()
	if out, err := o.get(urls[1]); err != nil || out != "the outside world" {
		t.Errorf("%v\n%s", err, out)
	}
	if out, err := o.capture(0, "off"); err != nil || !strings.Contains(out, "Capture is off") {
		t.Errorf("%v\n%s", err, out)
	}
	if out, err := o.capture(0, "off"); err != nil || !strings.Contains(out, "already off") {
		t.Errorf("%v\n%s", err, out)
	}
}

func TestStatusSaysWhenTheRoutesAreMissing(t *testing.T) {
	for _, missing := range []bool{false, true} {
		var b strings.Builder
		if err := capturePrint(&b, captureState{On: true, Port: 1443, NoRoute: missing}); err != nil || strings.Contains(b.String(), "what is captured is dropped") != missing {
			t.Errorf("missing %v: %v\n%s", missing, err, b.String())
		}
	}
}

// As in a pod: the rules are there first, for all but the sidecar's user, who has
// one capability. Stopped, captured traffic goes its own way, as configured.
func TestTheSidecarOfAPodNeedsOneCapability(t *testing.T) {
	const sidecarUser = 1337
	bin := captureBuild(t)
	o := newCaptured(t, bin, "capture: {}\nwhen_stopped: direct\n")
	urls, ports := o.web(), o.echoOutside()
	o.sidecar.Process.Signal(syscall.SIGTERM)
	o.sidecar.Wait()
	if out, err := o.capture(0, "on", "--all", "--without-sidecar", "--sidecar-user", fmt.Sprint(sidecarUser)); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	if out, err := o.in(o.pair.Near, 0, "sh", "-c", "chown -R 1337 "+o.dir+" && chmod o+x "+o.dir+" "+filepath.Dir(o.dir)+" && chmod 777 "+filepath.Dir(o.socket)); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	cmd := exec.Command(o.culvert, "run", "-c", filepath.Join(o.dir, "culvert.yaml"), "--listen", "127.0.0.1:0", "--control", o.socket)
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Credential:  &syscall.Credential{Uid: sidecarUser, Gid: sidecarUser, NoSetGroups: true},
		AmbientCaps: []uintptr{unix.CAP_NET_RAW},
	}
	log := &cmdtest.Text{}
	cmd.Stdout, cmd.Stderr = log, log
	o.pair.Near.Start(t, cmd)
	t.Cleanup(func() {
		if t.Failed() {
			t.Log(log)
		}
	})
	runReady(t, o.socket)
	for _, url := range urls {
		if out, err := o.get(url); err != nil || out != "the outside world" {
			t.Errorf("%v\n%s", err, out)
		}
	}
	// Root is captured as well; the sidecar, of which all depends, is not.
	if out, err := o.in(o.pair.Near, 0, "sh", "-c", "printf hello | nc -u -w 2 -W 1 "+outside4+" "+ports[outside4]); err != nil || out != "hello" {
		t.Errorf("UDP of root: %v, %q", err, out)
	}
	if s := o.status(); s.Capture.Streams < 2 || s.Capture.Associations < 1 || s.Link.Phase != tunnel.LinkUp {
		t.Errorf("%+v", s.Capture)
	}
	// The cloud proxy itself can be reached directly, and does not speak HTTP.
	direct := "http://" + netpair.FarAddr.String() + ":443/"
	o.get(direct)
	before := o.status().Capture
	if before.Refused[string(tunnel.PolicyDenied)] != 1 {
		t.Errorf("the tunnel carries to the cloud proxy itself: %+v", before)
	}
	if out, err := o.in(o.pair.Near, 0, o.culvert, "stop", "--force", "--control", o.socket); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	w := o.pair.Watch(t, 80) // 443 is what is looked for
	out, _ := o.get(direct)
	if seen := w.Stop(); len(seen.Stray) == 0 {
		t.Errorf("stopped, nothing goes its own way: %s", out)
	}
	if after := o.status().Capture; len(after.Refused) != 1 || after.Refused[string(tunnel.PolicyDenied)] != 1 || after.Streams != before.Streams+1 {
		t.Errorf("stopped, it does not go its own way: %+v, %s", after, out)
	}
}

// What a check sends, and what a PAC file has looked up, goes its own way where all
// is captured: else the check would be of the tunnel that is there already.
func TestTheSidecarsOtherProgramsAreNotCaptured(t *testing.T) {
	if testing.Short() {
		t.Skip("a check and lookups that fail take 8 s")
	}
	bin := captureBuild(t)
	o := newCaptured(t, bin, "capture: {}\n")
	callFilter(t, o.pair.Far, strings.Replace(captureFirewall, "443", "{ 53, 443 }", 1))
	o.answerOutside(outside4, "53", func(query []byte) []byte { // RFC 1035 §4.1.1: a response, and there is no such name
		query[2], query[3] = query[2]|0x80, 3
		return query
	})
	for name, text := range map[string]string{
		"check.yaml":  strings.ReplaceAll(o.read("culvert.yaml"), ", "+netpair.FarAddr.String()+"/32", "") + "proxy: {pac: all.pac}\n",
		"all.pac":     `function FindProxyForURL() { dnsResolve("inside.clinic.test."); return "DIRECT"; }`,
		"resolv.conf": "nameserver " + outside4 + "\n",
	} {
		if err := os.WriteFile(filepath.Join(o.dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if out, err := o.capture(0, "on", "--all", "--control", o.socket); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	// root runs a line of the shell with that name server.
	root := func(line string) {
		t.Helper()
		if out, err := o.in(o.pair.Near, 0, "unshare", "--mount", "sh", "-c", "cd "+o.dir+" && mount --bind resolv.conf /etc/resolv.conf && "+line); err != nil {
			t.Errorf("%s: %v\n%s", line, err, out)
		}
	}
	pac := filepath.Join(bin, "culvert-pac")
	for _, c := range []struct {
		line     string
		captured bool
	}{
		{o.culvert + " check -c check.yaml --media 500ms --control none", false},
		{fmt.Sprintf("%s --mark %d cloud.test < all.pac", pac, rules.OwnMark), false},
		{pac + " cloud.test < all.pac", true},
		{fmt.Sprintf("setpriv --bounding-set=-net_raw,-net_admin %s --mark %d cloud.test < all.pac", pac, rules.OwnMark), true}, // it may not
	} {
		before, w := o.status().Capture, o.pair.Watch(t, 443)
		root(c.line)
		seen, after := w.Stop(), o.status().Capture
		left := false
		for what := range seen.Stray {
			left = left || strings.HasPrefix(what, "UDP") && strings.HasSuffix(what, " to "+outside4+":53")
		}
		captured := after.Streams+after.Associations > before.Streams+before.Associations
		if captured != c.captured || left == c.captured {
			t.Errorf("%s: captured %v, and lookups seen on the link %v", c.line, captured, left)
		}
	}
}

func (o *captured) read(file string) string {
	o.t.Helper()
	b, err := os.ReadFile(filepath.Join(o.dir, file))
	if err != nil {
		o.t.Fatal(err)
	}
	return string(b)
}
