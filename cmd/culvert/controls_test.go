package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"path/filepath"
	"strings"
	"testing"
	"time"
	"unicode"

	"github.com/urfave/cli/v2"

	"culvert/sidecar/check"
	"culvert/sidecar/control"
	"culvert/tunnel"
)

// controlsFake is a sidecar in which an app is in a channel.
type controlsFake struct{ already bool }

var controlsCall = control.Channel{Name: "zoom/7", App: "zoom", PID: 7, State: "live", Evidence: []string{"20 RTP packets in 3 s"}}

func (f controlsFake) Status() control.Status {
	return control.Status{
		State: "running", Mode: tunnel.ModeAuto, Since: time.Now(), Associations: 3,
		Link:     tunnel.LinkState{Phase: tunnel.LinkUp, Carrier: "quic", Way: "quic-datagram", Why: "QUIC answered first", Info: tunnel.ProxyInfo{Proxies: []tunnel.ProxyAddr{{Address: "proxy.example:443", Region: "eu"}}}},
		Channels: []control.Channel{controlsCall}, Dropped: map[string]uint64{"too_old": 4, "none": 0},
		Changes: []tunnel.Change{{What: tunnel.ChangedDatagrams, From: "sealed", To: "lanes", Cause: tunnel.UDPBlocked, Why: "nothing came", Gap: 655 * time.Millisecond, Lost: 31}},
		Losers:  []control.Loser{{From: netip.MustParseAddrPort("127.0.0.1:4711"), User: "ward", Dropped: map[string]uint64{"queue_age": 3}}},
	}
}
func (f controlsFake) Start(context.Context, tunnel.Mode) (bool, error) { return f.already, nil }
func (f controlsFake) Stop(_ context.Context, _ time.Duration, force bool) (bool, error) {
	if force {
		return false, nil
	}
	return false, &control.ActiveError{Channels: f.Channels(), Err: tunnel.Errorf(tunnel.ChannelActive, "zoom is in a channel")}
}
func (f controlsFake) Channels() []control.Channel { return []control.Channel{controlsCall} }
func (f controlsFake) Join(string, int) error      { return nil }
func (f controlsFake) Leave(string) bool           { return false }
func (f controlsFake) Media(context.Context, time.Duration) (check.Way, error) {
	return check.Way{}, tunnel.Unsupported
}
func (f controlsFake) Events(context.Context) <-chan control.Event {
	c := make(chan control.Event, 1)
	c <- control.Event{Kind: "change", Change: &tunnel.Change{What: tunnel.ChangedCarrier, From: "quic", Cause: tunnel.CloudUnreachable}}
	close(c)
	return c
}

// runControls runs culvert ARGS against the fake.
func runControls(t *testing.T, path string, args ...string) (stdout, stderr string, err error) {
	t.Helper()
	t.Setenv("CULVERT_CONTROL", path)
	var out, bad bytes.Buffer
	app := &cli.App{Name: "culvert", Writer: &out, ErrWriter: &bad, Commands: controlCommands()}
	err = app.RunContext(t.Context(), append([]string{"culvert"}, args...))
	return out.String(), bad.String(), err
}

// controlsServe runs a control socket until the test ends, and returns its path.
func controlsServe(t *testing.T, b control.Backend) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "c.sock")
	l, err := control.Listen(path, "")
	if err != nil {
		t.Fatal(err)
	}
	s, err := control.NewServer(control.Config{Backend: b})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error)
	go func() { done <- s.Serve(ctx, l) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return path
}

func TestControlCommands(t *testing.T) {
	path := controlsServe(t, controlsFake{already: true})
	for _, c := range []struct {
		args        string
		code        int
		out, stderr string // parts
	}{
		{"start", 0, "Culvert is already running.", ""},
		{"start --mode sctp", 2, "", ""},
		{"stop", 3, "", "20 RTP packets in 3 s"},
		{"stop --wait 1s", 3, "", "channel zoom/7 (live): zoom, process 7"},
		{"stop --force", 0, "Culvert is running.", ""},
		{"stop --wait soon", 2, "", ""},
		{"stop --wait -1s", 2, "", ""},
		{"stop now", 2, "", ""},
		{"stop --no-such-flag", 2, "", ""},
		{"status", 0, "QUIC answered first", ""},
		{"status", 0, "too_old 4\n", ""},
		{"status", 0, "of the association of 127.0.0.1:4711, user ward: queue_age 3\n", ""},
		{"status", 0, "proxy.example:443, region eu", ""},
		{"status", 0, "3 associations", ""},
		{"status", 0, "datagrams sealed -> lanes: udp_blocked, nothing came; 655ms without a datagram, 31 lost on their way to the apps\n", ""},
		{"status --json", 0, `"cause": "udp_blocked"`, ""},
		{"events", 0, "carrier quic is gone: cloud_unreachable\n", ""},
		{"status --json", 0, `"carrier": "quic"`, ""},
		{"channel list", 0, "20 RTP packets in 3 s", ""},
		{"channel list --json", 0, `"name": "zoom/7"`, ""},
		{"channel join --pid 7 clinic", 0, "Joined channel clinic.", ""},
		{"channel join", 2, "", ""},
		{"status extra", 2, "", ""},
		{"channel leave clinic", 0, "nothing to leave", ""},
		{"events", 0, "", ""},
		{"status --control " + path + ".none", 4, "", ""},
	} {
		out, bad, err := runControls(t, path, strings.Fields(c.args)...)
		if exitCode(err) != c.code || !strings.Contains(out, c.out) || !strings.Contains(bad, c.stderr) {
			t.Errorf("culvert %s: exit %d (%v), want %d\n%s%s", c.args, exitCode(err), err, c.code, out, bad)
		}
	}
}

// controlsHostile is what calls itself something that a terminal would obey, or that looks
// like lines of ours.
type controlsHostile struct{ controlsFake }

const hostileText = "x\x1b[2J\u009b2J\r\nchannels  none\u202e\tzz"

func (controlsHostile) Status() control.Status {
	return control.Status{
		State: hostileText, Cause: hostileText, Code: hostileText, Listen: hostileText, Version: hostileText, Channels: controlsHostile{}.Channels(),
		Link:    tunnel.LinkState{Phase: tunnel.LinkUp, Why: hostileText, Info: tunnel.ProxyInfo{Proxies: []tunnel.ProxyAddr{{Address: hostileText, Region: hostileText}}}},
		Changes: []tunnel.Change{{From: hostileText, Why: hostileText}},
		Losers:  []control.Loser{{User: hostileText}},
	}
}
func (controlsHostile) Start(context.Context, tunnel.Mode) (bool, error) { return true, nil }
func (controlsHostile) Channels() []control.Channel {
	return []control.Channel{{Name: hostileText, App: hostileText, User: hostileText, State: hostileText, Evidence: []string{hostileText}}}
}
func (controlsHostile) Events(context.Context) <-chan control.Event {
	c := make(chan control.Event, 1)
	c <- control.Event{Kind: hostileText, Name: hostileText, From: hostileText, To: hostileText, Cause: hostileText, Code: hostileText}
	close(c)
	return c
}

func TestATerminalObeysNobodyElse(t *testing.T) {
	path := controlsServe(t, controlsHostile{})
	for _, args := range [][]string{{"status"}, {"events"}, {"start"}, {"channel", "list"}} {
		out, bad, err := runControls(t, path, args...)
		if err != nil || !strings.Contains(out, "zz") {
			t.Errorf("%q: %v\n%s", args, err, out)
		}
		for line := range strings.Lines(out + bad) {
			if line = strings.TrimSuffix(line, "\n"); strings.ContainsFunc(line, func(r rune) bool { return !unicode.IsPrint(r) }) || strings.HasPrefix(line, "channels  none") {
				t.Errorf("%q prints the line %q", args, line)
			}
		}
	}
}

func TestWrongUseIsNamedBeforeAnythingIsSent(t *testing.T) {
	for _, c := range []struct {
		args []string
		want string
	}{
		{[]string{"status", "extra"}, "culvert status takes no arguments, only flags"},
		{[]string{"channel", "join"}, "culvert channel join takes NAME"},
		{[]string{"channel", "join", ""}, "culvert channel join takes NAME"},
		{[]string{"channel", "leave", " "}, "culvert channel leave takes NAME"},
		{[]string{"channel", "wait", "x"}, "culvert channel wait takes no arguments"},
		{[]string{"channel", "wait", "--for", "soon"}, "culvert channel wait: invalid value"},
	} {
		// There is no sidecar: sending would be exit code 4.
		_, _, err := runControls(t, filepath.Join(t.TempDir(), "none.sock"), c.args...)
		if exitCode(err) != exitUsage || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%q: exit %d, %v", c.args, exitCode(err), err)
		}
	}
}

func TestExitCode(t *testing.T) {
	for want, errs := range map[int][]error{
		0: {nil},
		1: {errors.New("x"), tunnel.CloudUnreachable, tunnel.Errorf(tunnel.NotPermitted, "x")},
		2: {tunnel.Errorf(tunnel.ConfigInvalid, "x"), tunnel.Errorf(tunnel.PolicyInvalid, "x"), errors.New("flag provided but not defined: -x")},
		3: {fmt.Errorf("stop: %w", tunnel.Errorf(tunnel.ChannelActive, "x"))},
		4: {fmt.Errorf("x: %w", control.ErrNoSidecar)},
		7: {cli.Exit("x", 7)},
	} {
		for _, err := range errs {
			if got := exitCode(err); got != want {
				t.Errorf("%v: %d, want %d", err, got, want)
			}
		}
	}
}

func TestAWrongCommandIsWrongUsage(t *testing.T) {
	for _, args := range [][]string{{"nosuch"}, {"capture", "nosuch"}, {"channel", "nosuch"}, {"policy", "nosuch"}, {"capture", "on", "nosuch"}, {"capture", "on", "--nosuch"}} {
		var out, errs strings.Builder
		if code := run(t.Context(), append([]string{"culvert"}, args...), &out, &errs); code != exitUsage || !strings.Contains(errs.String(), "nosuch") {
			t.Errorf("%v: exit code %d\n%s", args, code, errs.String())
		}
	}
	for _, group := range []string{"capture", "channel", "policy"} {
		var out, errs strings.Builder
		if code := run(t.Context(), []string{"culvert", group}, &out, &errs); code != exitDone || !strings.Contains(out.String(), "COMMANDS") {
			t.Errorf("%s: exit code %d\n%s%s", group, code, out.String(), errs.String())
		}
	}
}
