package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/urfave/cli/v2"

	"culvert/sidecar/control"
	"culvert/tunnel"
)

// Exit codes, as the README promises them.
const (
	exitDone      = 0
	exitFailed    = 1
	exitUsage     = 2
	exitChannel   = 3
	exitNoSidecar = 4
)

// exitCode is the process's exit code for an error.
func exitCode(err error) int {
	var coder cli.ExitCoder
	switch {
	case err == nil:
		return exitDone
	case errors.Is(err, control.ErrNoSidecar):
		return exitNoSidecar
	case errors.As(err, &coder):
		return coder.ExitCode()
	}
	switch tunnel.CodeOf(err) {
	case tunnel.ChannelActive:
		return exitChannel
	case tunnel.ConfigInvalid, tunnel.PolicyInvalid:
		return exitUsage
	}
	// The flag package and cli have no type for what a user typed wrongly.
	for _, sign := range []string{"flag provided but not defined", "flag needs an argument", "invalid value \"", "Required flag", "Required flags"} {
		if strings.HasPrefix(err.Error(), sign) {
			return exitUsage
		}
	}
	return exitFailed
}

// controlCommands speak with a running sidecar.
func controlCommands() []*cli.Command {
	path := &cli.StringFlag{Name: "control", Usage: "the sidecar's control socket is at `PATH` (default: " + strings.Join(control.Paths(), ", ") + ")", EnvVars: []string{"CULVERT_CONTROL"}}
	asJSON := &cli.BoolFlag{Name: "json", Usage: "print one JSON object"}
	command := func(name, args, usage string, do func(*cli.Context, *control.Client) error, flags ...cli.Flag) *cli.Command {
		return &cli.Command{
			Name: name[strings.LastIndexByte(name, ' ')+1:], ArgsUsage: args, Usage: usage, Flags: append(flags, path),
			OnUsageError: func(_ *cli.Context, err error, _ bool) error {
				return tunnel.Errorf(tunnel.ConfigInvalid, "culvert %s: %w; see --help", name, err)
			},
			Action: func(c *cli.Context) error {
				switch {
				case args == "" && c.NArg() > 0:
					return tunnel.Errorf(tunnel.ConfigInvalid, "culvert %s takes no arguments, only flags; see --help", name)
				case args != "" && (c.NArg() != len(strings.Fields(args)) || strings.TrimSpace(c.Args().First()) == ""):
					return tunnel.Errorf(tunnel.ConfigInvalid, "culvert %s takes %s, which is not empty, with flags before it; see --help", name, args)
				}
				cl := control.NewClient()
				if p := c.String("control"); p != "" {
					cl = control.NewClient(p)
				}
				return do(c, cl)
			},
		}
	}
	return []*cli.Command{
		command("start", "", "start the proxy; returns when it runs", controlStart,
			&cli.StringFlag{Name: "mode", Usage: "`MODE`: auto, udp or tcp (default: the configured one)"}),
		command("stop", "", "stop the proxy, unless an app is in a channel", controlStop,
			&cli.DurationFlag{Name: "wait", Usage: "give channels `TIME` to end, such as 30s"},
			&cli.BoolFlag{Name: "force", Usage: "stop even if that breaks a call"}),
		command("status", "", "show how things stand", controlStatus, asJSON,
			&cli.BoolFlag{Name: "ready", Usage: "print nothing; exit 0 once the proxy listens and the first start has been decided, else 1 (for probes)"}),
		command("events", "", "print each change, until interrupted", controlEvents),
		{
			Name:  "channel",
			Usage: "list the channels that apps are in, or join or leave one by name",
			Subcommands: []*cli.Command{
				command("channel list", "", "list live and quiet channels with their evidence", controlChannels, asJSON),
				command("channel wait", "", "return when no app is in a channel any more", controlWait,
					&cli.DurationFlag{Name: "for", Usage: "give up after `TIME`, with exit code 3 (default: never)"}),
				command("channel join", "NAME", "say that a channel begins, before the app shows it", controlJoin,
					&cli.IntFlag{Name: "pid", Usage: "it ends with process `N`"}),
				command("channel leave", "NAME", "say that a channel joined by name has ended", controlLeave),
			},
		},
	}
}

func controlStart(c *cli.Context, cl *control.Client) error {
	mode := tunnel.Mode(c.String("mode"))
	if mode != "" {
		if _, err := tunnel.ParseMode(string(mode)); err != nil {
			return err
		}
	}
	d, err := cl.Start(c.Context, mode)
	return controlDone(c, d, err)
}

func controlStop(c *cli.Context, cl *control.Client) error {
	wait := c.Duration("wait")
	if wait < 0 {
		return tunnel.Errorf(tunnel.ConfigInvalid, "--wait %s is negative; give a time such as 30s", wait)
	}
	d, err := cl.Stop(c.Context, wait, c.Bool("force"))
	return controlDone(c, d, err)
}

// controlDone prints what was done, or the channels that stand in the way.
func controlDone(c *cli.Context, d control.Done, err error) error {
	var active *control.ActiveError
	if errors.As(err, &active) {
		controlPrintChannels(c.App.ErrWriter, active.Channels)
	}
	if err != nil {
		return err
	}
	already := ""
	if d.Already {
		already = "already "
	}
	_, err = fmt.Fprintln(c.App.Writer, controlText("Culvert is %s%s.", already, d.State))
	return err
}

func controlStatus(c *cli.Context, cl *control.Client) error {
	st, err := cl.Status(c.Context)
	if err != nil {
		return err
	}
	switch {
	case c.Bool("ready") && st.Ready:
		return nil
	case c.Bool("ready"):
		return tunnel.Errorf(tunnel.CloudUnreachable, "Culvert is %s and the first start has not been decided yet", st.State)
	case c.Bool("json"):
		return policyJSON(c.App.Writer, st)
	}
	return controlPrintStatus(c.App.Writer, st, time.Now())
}

func controlEvents(c *cli.Context, cl *control.Client) error {
	err := cl.Events(c.Context, func(e control.Event) error {
		what := e.Kind
		if e.Name != "" {
			what += " " + e.Name
		}
		change := policyOr(e.To, "ended")
		if e.From != "" && e.From != e.To {
			change = e.From + " -> " + change
		}
		why := e.Cause
		if e.Code != "" {
			why += " (" + string(e.Code) + ")"
		}
		if why != "" {
			why = ": " + why
		}
		if e.Change != nil {
			_, err := fmt.Fprintln(c.App.Writer, controlText("%s  %s", e.Change.At.Local().Format("15:04:05.000"), e.Change))
			return err
		}
		_, err := fmt.Fprintln(c.App.Writer, controlText("%s  %s %s%s", e.At.Local().Format("15:04:05.000"), what, change, why))
		return err
	})
	if errors.Is(err, context.Canceled) {
		return nil
	}
	return err
}

func controlChannels(c *cli.Context, cl *control.Client) error {
	list, err := cl.Channels(c.Context)
	if err != nil {
		return err
	}
	if c.Bool("json") {
		return policyJSON(c.App.Writer, map[string]any{"channels": append([]control.Channel{}, list...)})
	}
	if len(list) == 0 {
		_, err := fmt.Fprintln(c.App.Writer, "No app is in a channel.")
		return err
	}
	return controlPrintChannels(c.App.Writer, list)
}

// channelPoll is how often a wait looks: a channel ends by silence, of which
// nobody tells in time.
const channelPoll = 500 * time.Millisecond

// controlWait waits for the end of all channels.
func controlWait(c *cli.Context, cl *control.Client) error {
	ctx := c.Context
	if d := c.Duration("for"); d > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, d)
		defer cancel()
	}
	tick := time.NewTicker(channelPoll)
	defer tick.Stop()
	for {
		list, err := cl.Channels(c.Context)
		if err != nil || len(list) == 0 {
			return err
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			controlPrintChannels(c.App.ErrWriter, list)
			return tunnel.Errorf(tunnel.ChannelActive, "an app is still in a channel after %s; wait longer, or end the call", c.Duration("for"))
		}
	}
}

func controlJoin(c *cli.Context, cl *control.Client) error {
	name, pid := c.Args().First(), c.Int("pid")
	if pid < 0 {
		return tunnel.Errorf(tunnel.ConfigInvalid, "--pid %d is not a process", pid)
	}
	if err := cl.Join(c.Context, name, pid); err != nil {
		return err
	}
	_, err := fmt.Fprintf(c.App.Writer, "Joined channel %s.\n", name)
	return err
}

func controlLeave(c *cli.Context, cl *control.Client) error {
	name := c.Args().First()
	d, err := cl.Leave(c.Context, name)
	if err != nil {
		return err
	}
	text := "Left channel %s.\n"
	if d.Already {
		text = "Channel %s was not joined by name; nothing to leave.\n"
	}
	_, err = fmt.Fprintf(c.App.Writer, text, name)
	return err
}

func controlPrintChannels(w io.Writer, list []control.Channel) error {
	for _, ch := range list {
		who := policyOr(ch.App, "an unknown app")
		if ch.PID != 0 {
			who += fmt.Sprintf(", process %d", ch.PID)
		}
		if ch.User != "" {
			who += ", user " + ch.User
		}
		if _, err := fmt.Fprintln(w, controlText("channel %s (%s): %s; since %s", ch.Name, ch.State, who, ch.Since.Local().Format("15:04:05"))); err != nil {
			return err
		}
		for _, e := range ch.Evidence {
			if _, err := fmt.Fprintln(w, controlText("    %s", e)); err != nil {
				return err
			}
		}
	}
	return nil
}

// controlText is one line for a terminal: what apps, the cloud proxy or whoever
// answers on the socket call themselves does nothing there.
func controlText(format string, args ...any) string {
	return tunnel.LogText(fmt.Sprintf(format, args...), 4096)
}

// controlCounts names the reasons that are not zero, in order.
func controlCounts(m map[string]uint64) string {
	var counts []string
	for _, reason := range slices.Sorted(maps.Keys(m)) {
		if n := m[reason]; n > 0 {
			counts = append(counts, fmt.Sprintf("%s %d", reason, n))
		}
	}
	return strings.Join(counts, ", ")
}

// statusChanges is how many changes of the link a screen shows.
const statusChanges = 6

// controlPrintStatus prints one screen.
func controlPrintStatus(out io.Writer, st control.Status, now time.Time) error {
	w := tabwriter.NewWriter(out, 0, 8, 2, ' ', 0)
	row := func(name, format string, args ...any) {
		fmt.Fprintf(w, "%s\t%s\n", name, controlText(format, args...))
	}
	row("switch", "%s since %s (%s), mode %s", st.State, st.Since.Local().Format(time.DateTime), now.Sub(st.Since).Round(time.Second), st.Mode)
	if st.Draining {
		row("", "a stop waits for channels to end; new requests are refused")
	}
	if st.Cause != "" {
		row("cause", "%s (%s)", st.Cause, st.Code)
	}
	if st.Listen != "" {
		row("proxy for apps", "%s", st.Listen)
	}
	switch l := st.Link; {
	case l.Phase == tunnel.LinkUp:
		row("carrier", "%s: %s", l.Carrier, cmp.Or(l.Why, "no reason is known"))
		row("datagrams", "%s: %s", l.Way, cmp.Or(l.WayWhy, "no reason is known"))
		row("streams", "%s", l.Streams)
		row("cloud proxy", "%s, round trip %s", l.Remote, st.Tunnel.RTT.Round(time.Millisecond/10))
	case l.Phase != "":
		row("carrier", "none: %s %s", l.Phase, l.Why)
	default:
		row("carrier", "none")
	}
	for i, p := range st.Link.Info.Proxies {
		name, more := "", ""
		if i == 0 {
			name = "proxy information"
		}
		if p.Region != "" {
			more += ", region " + p.Region
		}
		if !p.Expires.IsZero() {
			more += ", until " + p.Expires.Local().Format(time.DateTime)
		}
		row(name, "%s%s", p.Address, more)
	}
	for i, c := range st.Changes[max(0, len(st.Changes)-statusChanges):] {
		name := ""
		if i == 0 {
			name = "last changes"
		}
		row(name, "%s  %s", c.At.Local().Format("15:04:05.000"), c)
	}
	if t := st.Capture; t != nil {
		row("captured now", "%d UDP sockets, %d TCP connections; 'culvert capture status' says of whom", t.Relays, t.Open)
	}
	row("open now", "%d associations, %d streams", st.Associations, st.Streams)
	row("datagrams", "%d up (%d bytes), %d down (%d bytes)", st.Tunnel.DatagramsUp, st.Tunnel.DatagramBytesUp, st.Tunnel.DatagramsDown, st.Tunnel.DatagramBytesDn)
	row("stream bytes", "%d up, %d down", st.Tunnel.StreamBytesUp, st.Tunnel.StreamBytesDown)
	row("dropped", "%s", policyOr(controlCounts(st.Dropped), "none"))
	for _, l := range st.Losers {
		who := l.From.String()
		if l.User != "" {
			who += ", user " + l.User
		}
		row("", "of the association of %s: %s", who, controlCounts(l.Dropped))
	}
	if st.Version != "" {
		row("version", "%s, up %s", st.Version, st.Uptime.Round(time.Second))
	}
	if len(st.Channels) == 0 {
		row("channels", "none")
	}
	if err := w.Flush(); err != nil {
		return err
	}
	return controlPrintChannels(out, st.Channels)
}
