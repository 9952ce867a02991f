package main

import (
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"culvert/cmd/internal/netpair"
	"culvert/tunnel"
)

// secondPort is where another cloud proxy of the same operator listens.
const secondPort = 444

// cloud starts a cloud proxy by its configuration.
func (o *only443) cloud(config string) *exec.Cmd {
	o.t.Helper()
	return o.start(o.pair.Far, filepath.Join(filepath.Dir(o.culvert), "culvert-cloudproxy"), "run", "-c", filepath.Join(o.dir, config))
}

// listens waits until the cloud proxy at a port accepts, and returns when it did.
func (o *only443) listens(port uint16) time.Time {
	o.t.Helper()
	at := netip.AddrPortFrom(netpair.FarAddr, port).String()
	for began := time.Now(); time.Since(began) < 10*time.Second; time.Sleep(5 * time.Millisecond) {
		if o.pair.Far.Do(func() error {
			c, err := net.Dial("tcp4", at)
			if err == nil {
				c.Close()
			}
			return err
		}) == nil {
			return time.Now()
		}
	}
	o.t.Fatalf("nothing listens at %s", at)
	return time.Time{}
}

// twoClouds makes a second configuration with the same keys, and has the first tell
// of both.
func twoClouds(t *testing.T, dir string) {
	t.Helper()
	first := filepath.Join(dir, "cloudproxy.yaml")
	text, err := os.ReadFile(first)
	if err != nil {
		t.Fatal(err)
	}
	one := netpair.FarAddr.String() + ":443"
	two := netip.AddrPortFrom(netpair.FarAddr, secondPort).String()
	list := "cloud_proxies:\n  - address: " + one + "\n  - address: " + two + "\n"
	var second []string
	for line := range strings.Lines(string(text)) {
		switch {
		case strings.HasPrefix(line, "listen:"):
		case strings.HasPrefix(line, "address:"):
			second = append(second, "address: "+two+"\nlisten: :444\n")
		default:
			second = append(second, line)
		}
	}
	for name, text := range map[string]string{first: string(text) + list, filepath.Join(dir, "second.yaml"): strings.Join(second, "") + list} {
		if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

// changed returns the last change of a kind.
func (o *outlive) changed(what string) (last tunnel.Change) {
	for _, c := range runStatus(o.t, o.socket).Changes {
		if c.What == what {
			last = c
		}
	}
	return last
}

// A call goes on when its cloud proxy does not.
func TestACallOutlivesItsCloudProxy(t *testing.T) {
	if testing.Short() {
		t.Skip("the calls last some minutes")
	}
	bin := buildBoth(t)
	t.Run("killed, and listening again after half a second", func(t *testing.T) {
		o := newOutlive(t, bin)
		o.talk()
		o.goesBy("sealed")
		stream := o.connect(o.streams(nil), outliveEcho, 'x')
		if _, err := io.ReadFull(stream, make([]byte, 1)); err != nil {
			t.Fatal(err)
		}
		ended := make(chan error, 1)
		var end time.Time // of the stream, before ended
		go func() {
			_, err := stream.Read(make([]byte, 1))
			end = time.Now()
			ended <- err
		}()
		settle()
		killed := time.Now()
		kill(t, o.clouds[0])
		time.Sleep(500 * time.Millisecond)
		o.cloud("cloudproxy.yaml")
		again := o.listens(443)
		time.Sleep(4 * time.Second)
		now := time.Now()
		if err := <-ended; !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("a TCP stream ends with %v, want a reset", err)
		}
		o.within("after it listens a TCP stream is reset in", max(0, end.Sub(again)), time.Second, killed, now)
		took, ok := o.call.After(again)
		if !ok {
			t.Fatal("media does not come again")
		}
		o.mostly("after it listens media comes again in", took, time.Second, 2*time.Second, killed, now)
		o.within("the oldest packet", o.call.Oldest(killed, now), 150*time.Millisecond, killed, now)
		if c := o.changed(tunnel.ChangedSession); !strings.Contains(c.Why, "associations go on with new ports, streams were reset") {
			t.Errorf("told: %v", c)
		}
	})
	t.Run("drained, with a second one", func(t *testing.T) {
		o := newOutliveWith(t, bin, func(dir string) { twoClouds(t, dir) })
		o.cloud("second.yaml")
		o.listens(secondPort)
		o.talk()
		o.goesBy("sealed")
		settle()
		drained := time.Now()
		if err := o.clouds[0].Process.Signal(syscall.SIGTERM); err != nil {
			t.Fatal(err)
		}
		o.clouds[0].Wait()
		ended := time.Now()
		time.Sleep(2 * time.Second)
		now := time.Now()
		o.mostly("the gap", o.call.Gap(drained, now), 200*time.Millisecond, 500*time.Millisecond, drained, now)
		o.within("the cloud proxy ends after", ended.Sub(drained), 10*time.Second, drained, ended)
		c := o.changed(tunnel.ChangedCloudProxy)
		t.Logf("told: %v", c)
		if c.Cause != tunnel.CloudProxyGone || !strings.HasSuffix(c.To, ":444") {
			t.Errorf("told: %v", c)
		}
		for i, ports := range o.call.Ports() {
			if len(ports) != 2 {
				t.Errorf("flow %d came to the far end from %v, want another egress port at the second", i, ports)
			}
		}
	})
	t.Run("killed, with a second one", func(t *testing.T) {
		o := newOutliveWith(t, bin, func(dir string) { twoClouds(t, dir) })
		o.cloud("second.yaml")
		o.listens(secondPort)
		o.talk()
		o.goesBy("sealed")
		settle()
		killed := time.Now()
		kill(t, o.clouds[0])
		time.Sleep(12 * time.Second)
		now := time.Now()
		o.within("the gap", o.call.Gap(killed, now), 5*time.Second, killed, now)
		if c := o.changed(tunnel.ChangedCloudProxy); !strings.HasSuffix(c.To, ":444") {
			t.Errorf("told: %v", c)
		}
	})
}

func kill(t *testing.T, cmd *exec.Cmd) {
	t.Helper()
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	cmd.Wait()
}
