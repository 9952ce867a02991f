package rules

import (
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"culvert/tunnel"
)

// inNamespace runs f in a network namespace of its own, in which programs that f
// starts are too.
func inNamespace(t *testing.T, f func()) {
	t.Helper()
	if _, err := exec.LookPath("nft"); err != nil {
		unable(t, err)
	}
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread ends with the goroutine
		err := unix.Unshare(unix.CLONE_NEWNET)
		if err == nil {
			err = exec.Command("ip", "link", "set", "lo", "up").Run()
		}
		if err == nil {
			f()
		}
		done <- err
	}()
	if err := <-done; err != nil {
		unable(t, err)
	}
}

func unable(t *testing.T, err error) {
	t.Helper()
	if os.Getenv("CI") == "true" {
		t.Fatalf("CI=true says that nothing may be left out: %v", err)
	}
	t.Skipf("needs root, network namespaces and nft: %v", err)
}

func sh(t *testing.T, stdin string, args ...string) string {
	t.Helper()
	c := exec.Command(args[0], args[1:]...)
	c.Stdin = strings.NewReader(stdin)
	out, err := c.CombinedOutput()
	if err != nil {
		t.Errorf("%s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return string(out)
}

// listing is everything that rules could leave behind.
func listing(t *testing.T) string {
	t.Helper()
	var b strings.Builder
	for _, c := range []string{"nft list ruleset", "ip -4 rule", "ip -6 rule", "ip -4 route show table all", "ip -6 route show table all"} {
		b.WriteString(c + "\n" + sh(t, "", strings.Fields(c)...))
	}
	return b.String()
}

var full = Rules{
	Port: 1443, Users: []User{{UID: 1000, Name: "alice"}, {UID: 70000}},
	Sidecars: []User{{UID: 990, Name: "culvert"}},
	Except:   []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8"), netip.MustParsePrefix("192.168.4.128/27"), netip.MustParsePrefix("fd00::/9"), netip.MustParsePrefix("198.51.100.7/32")},
	Only: []Destination{
		{Prefix: netip.MustParsePrefix("203.0.113.0/24"), UDP: true, Ports: []Ports{{3478, 3478}, {50000, 50100}}, Name: "media"},
		{Prefix: netip.MustParsePrefix("0.0.0.0/0"), TCP: true, Ports: []Ports{{443, 443}}},
		{Prefix: netip.MustParsePrefix("2001:db8::/32"), TCP: true, UDP: true},
	},
	DNS: true,
}

func TestWhatIsShownIsWhatIsSet(t *testing.T) {
	for name, r := range map[string]Rules{
		"users": {Port: 1443, Users: []User{{UID: 1000, Name: "alice"}}},
		"all":   {Port: 1, All: true, Lasting: true},
		"full":  full,
	} {
		t.Run(name, func(t *testing.T) {
			text, err := r.Text()
			if err != nil {
				t.Fatal(err)
			}
			var set, shown string
			inNamespace(t, func() {
				if err := On(r); err != nil {
					t.Error(err)
				}
				set = sh(t, "", "nft", "list", "table", "inet", Table)
			})
			inNamespace(t, func() {
				sh(t, text, "nft", "-f", "-")
				shown = sh(t, "", "nft", "list", "table", "inet", Table)
			})
			if set != shown {
				t.Errorf("set:\n%s\nshown as:\n%s\nwhich is:\n%s", set, text, shown)
			}
			if !strings.Contains(set, "tproxy ip6 to [::1]:") {
				t.Errorf("that is not a whole table:\n%s", set)
			}
		})
	}
}

func TestOnAndOffLeaveTheMachineAsItWas(t *testing.T) {
	inNamespace(t, func() {
		sh(t, "table inet other { chain c { type filter hook output priority 0; }; }", "nft", "-f", "-")
		before := listing(t)
		if was, err := Off(); was || err != nil {
			t.Errorf("off, where it was never on: %v, %v", was, err)
		}
		var on string
		for i := range 200 {
			if err := On(full); err != nil {
				t.Error(err)
				return
			}
			switch {
			case i == 0:
				on = listing(t)
			case i == 100: // repeated
				if err := On(full); err != nil {
					t.Error(err)
				}
				if again := listing(t); again != on {
					t.Errorf("set again:\n%s\nfirst:\n%s", again, on)
				}
			}
			if was, err := Off(); !was || err != nil {
				t.Errorf("off: %v, %v", was, err)
				return
			}
		}
		if after := listing(t); after != before {
			t.Errorf("after 200 times:\n%s\nbefore:\n%s", after, before)
		}
	})
}

// Two commands at once, or one while a sidecar stops: the rules and the routes
// that they need come and go together.
func TestOnAndOffAtOnceDoNotMix(t *testing.T) {
	inNamespace(t, func() {
		before := listing(t)
		space, err := os.Open("/proc/thread-self/ns/net")
		if err != nil {
			t.Error(err)
			return
		}
		defer space.Close()
		for range 20 {
			var all sync.WaitGroup
			for i := range 4 {
				all.Add(1)
				go func() {
					defer all.Done()
					runtime.LockOSThread() // and never unlocked
					err := unix.Setns(int(space.Fd()), unix.CLONE_NEWNET)
					switch {
					case err != nil:
					case i%2 == 0:
						err = On(full)
					default:
						_, err = Off()
					}
					if err != nil {
						t.Error(err)
					}
				}()
			}
			all.Wait()
			list := sh(t, "", "nft", "list", "tables")
			v4, v6 := sh(t, "", "ip", "-4", "rule"), sh(t, "", "ip", "-6", "rule")
			if on := strings.Contains(list, Table); on != strings.Contains(v4, "4430") || on != strings.Contains(v6, "4430") {
				t.Errorf("half of it is left:\n%s%s%s", list, v4, v6)
				return
			}
		}
		if _, err := Off(); err != nil {
			t.Error(err)
		}
		if after := listing(t); after != before {
			t.Errorf("after:\n%s\nbefore:\n%s", after, before)
		}
	})
}

func TestAMachineWithoutIPv6IsCaptured(t *testing.T) {
	inNamespace(t, func() {
		off := func(n string) {
			if err := os.WriteFile("/proc/sys/net/ipv6/conf/all/disable_ipv6", []byte(n), 0o644); err != nil {
				t.Error(err)
			}
		}
		before := listing(t)
		off("1")
		if err := On(full); err != nil {
			t.Error(err)
		}
		if list := sh(t, "", "ip", "-4", "rule"); !strings.Contains(list, "4430") {
			t.Errorf("no rule:\n%s", list)
		}
		off("0") // and on again: nothing may stay behind
		if err := On(full); err != nil {
			t.Error(err)
		}
		off("1")
		if _, err := Off(); err != nil {
			t.Error(err)
		}
		off("0")
		if after := listing(t); after != before {
			t.Errorf("after:\n%s\nbefore:\n%s", after, before)
		}
	})
}

func TestStateSaysWhatIsCaptured(t *testing.T) {
	inNamespace(t, func() {
		if s, err := Read(); err != nil || s.On {
			t.Errorf("%+v, %v", s, err)
		}
		if err := On(full); err != nil {
			t.Error(err)
			return
		}
		s, err := Read()
		if err != nil || !s.On || s.Port != 1443 || s.Lasting {
			t.Errorf("%+v, %v", s, err)
		}
		var captured, left []string
		for _, l := range s.Lines {
			if l.Captures {
				captured = append(captured, l.Text)
			} else {
				left = append(left, l.Text)
			}
		}
		if got := strings.Join(captured, "; "); got != "of user alice (1000); of user 70000; dropped: bound to a device, and so not to be captured" {
			t.Errorf("captured: %s", got)
		}
		for _, want := range []string{"the sidecar's own packets", "the sidecar's user culvert (990)", "to this machine itself", "excepted: to 192.168.4.128/27", "connections that were open before", "elsewhere than the policy allows"} {
			if !strings.Contains(strings.Join(left, "; "), want) {
				t.Errorf("%q is not told: %q", want, left)
			}
		}
		for _, c := range []string{"ip -4 rule del priority 4430", "ip -6 rule del priority 4430", "ip -4 route flush table 4430", "ip -6 route flush table 4430"} {
			sh(t, "", strings.Fields(c)...)
			if s, err := Read(); err != nil || s.Routed || !Halved() {
				t.Errorf("after %s: %+v, %v", c, s, err)
			}
			if err := On(full); err != nil {
				t.Error(err)
			}
			if s, err := Read(); err != nil || !s.Routed || Halved() {
				t.Errorf("after %s and on: %+v, %v", c, s, err)
			}
		}
		sh(t, "", "nft", "flush", "ruleset")
		if !Halved() {
			t.Error("flushed rules are not missed")
		}
		if _, err := Off(); err != nil || Halved() {
			t.Errorf("rules that were turned off are missed; %v", err)
		}
		lasting := Rules{Port: 1443, All: true, Lasting: true}
		if err := On(lasting); err != nil {
			t.Error(err)
		}
		if s, err := Read(); err != nil || !s.Lasting {
			t.Errorf("%+v, %v", s, err)
		}
	})
}

func TestAnotherSidecarsRulesStay(t *testing.T) {
	inNamespace(t, func() {
		if err := On(full); err != nil {
			t.Error(err)
			return
		}
		before := listing(t)
		other := Rules{Port: 1444, All: true}
		if err := On(other); tunnel.CodeOf(err) != tunnel.NotPermitted || !strings.Contains(err.Error(), "1443") {
			t.Errorf("another port: %v", err)
		}
		missing := Rules{Port: 1443, Cgroups: []string{"no/such.slice"}}
		if err := On(missing); err == nil {
			t.Error("a cgroup that does not exist was taken")
		}
		if after := listing(t); after != before {
			t.Errorf("a refusal changed\n%s\ninto\n%s", before, after)
		}
		sh(t, "flush ruleset; table inet "+Table+" { chain c { }; }", "nft", "-f", "-")
		if err := On(full); tunnel.CodeOf(err) != tunnel.NotPermitted || !strings.Contains(err.Error(), "names no port") {
			t.Errorf("somebody else's table: %v", err)
		}
	})
}

func TestACgroupIsKnownByItsNumber(t *testing.T) {
	root, err := cgroupRoot()
	if err != nil {
		root = t.TempDir()
		if err := unix.Mount("none", root, "cgroup2", 0, ""); err != nil {
			unable(t, err)
		}
		t.Cleanup(func() { unix.Unmount(root, unix.MNT_DETACH) })
	}
	dir := filepath.Join(root, "culvert-test.slice", `app-web\x2dphone.scope`) // as systemd names it
	if err := os.MkdirAll(dir, 0o755); err != nil {
		unable(t, err)
	}
	t.Cleanup(func() { os.Remove(dir); os.Remove(filepath.Dir(dir)) })
	inNamespace(t, func() {
		const scope = `culvert-test.slice/app-web\x2dphone.scope`
		for _, path := range []string{scope, "/" + scope + "/", "/sys/fs/cgroup/" + scope, "/sys/fs/cgroup/unified/" + scope} {
			if err := On(Rules{Port: 1443, Cgroups: []string{path}}); err != nil {
				t.Errorf("%s: %v", path, err)
			}
		}
		list := sh(t, "", "nft", "list", "table", "inet", Table)
		if !strings.Contains(list, `socket cgroupv2 level 2`) {
			t.Errorf("no such rule:\n%s", list)
		}
		r := Rules{Port: 1443, Cgroups: []string{scope}}
		text, err := r.Text()
		if err != nil || !strings.Contains(text, `level 2 "`+scope+`"`) {
			t.Errorf("%v:\n%s", err, text)
		}
		file := Rules{Port: 1443, Cgroups: []string{scope + "/cgroup.procs"}}
		if err := On(file); tunnel.CodeOf(err) != tunnel.ConfigInvalid {
			t.Errorf("a file in a cgroup is taken for one: %v", err)
		}
	})
}

func TestBadRulesAreRefused(t *testing.T) {
	for name, c := range map[string]struct {
		r    Rules
		want string
	}{
		"no port":         {Rules{All: true}, "port"},
		"nobody":          {Rules{Port: 1}, "whose"},
		"all and a user":  {Rules{Port: 1, All: true, Users: []User{{UID: 1}}}, "all"},
		"the sidecar":     {Rules{Port: 1, Users: []User{{UID: 7}}, Sidecars: []User{{UID: 7}}}, "user 7"},
		"nobody's number": {Rules{Port: 1, Users: []User{{UID: 1<<32 - 1}}}, "4294967295"},
		"the root cgroup": {Rules{Port: 1, Cgroups: []string{"/"}}, "cgroup"},
		"a quote":         {Rules{Port: 1, Cgroups: []string{`a" accept; "`}}, "cgroup"},
		"no network":      {Rules{Port: 1, All: true, Except: []netip.Prefix{{}}}, "network"},
		"no protocol":     {Rules{Port: 1, All: true, Only: []Destination{{Prefix: netip.MustParsePrefix("1.2.3.4/32")}}}, "protocol"},
	} {
		t.Run(name, func(t *testing.T) {
			if err := c.r.Check(); tunnel.CodeOf(err) != tunnel.ConfigInvalid || !strings.Contains(err.Error(), c.want) {
				t.Errorf("%v", err)
			}
		})
	}
}
