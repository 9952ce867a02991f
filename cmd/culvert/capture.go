package main

import (
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/urfave/cli/v2"

	"culvert/cmd/internal/assemble"
	"culvert/cmd/internal/config"
	"culvert/policy"
	"culvert/sidecar/capture"
	"culvert/sidecar/capture/rules"
	"culvert/sidecar/control"
	"culvert/tunnel"
)

const captureHelp = `The kernel hands the traffic of apps to the sidecar; the apps are not told.
It needs Linux, root, and a sidecar whose configuration has 'capture: {}'.

    culvert capture on --user alice                  all that alice's programs send
    culvert capture on --cgroup system.slice/phone.service
    culvert capture on --all --except 10.0.0.0/8     everything but the sidecar's own
    culvert capture on --all --dry-run               shows the rules and sets nothing
    culvert capture status                           what is captured, and what is not

Traffic to this machine itself, answers to connections from outside, and what the
sidecar sends are never captured. The rules go when the sidecar stops.`

func captureCommand() *cli.Command {
	path := &cli.StringFlag{Name: "control", Usage: "the sidecar's control socket is at `PATH` (default: " + strings.Join(control.Paths(), ", ") + ")", EnvVars: []string{"CULVERT_CONTROL"}}
	usage := func(name string) cli.OnUsageErrorFunc {
		return func(_ *cli.Context, err error, _ bool) error {
			return usageError("culvert capture %s: %w; see --help", name, err)
		}
	}
	return &cli.Command{
		Name:        "capture",
		Usage:       "take the traffic of apps without their knowing (Linux)",
		Description: captureHelp,
		Subcommands: []*cli.Command{
			{
				Name: "on", Usage: "set the rules, in place of those that are set", OnUsageError: usage("on"), Action: captureOn,
				Flags: []cli.Flag{
					&cli.StringSliceFlag{Name: "user", Usage: "what `NAME` sends, or a user's number; may be repeated"},
					&cli.StringSliceFlag{Name: "cgroup", Usage: "what is sent in the cgroup at `PATH`, such as system.slice/phone.service; may be repeated"},
					&cli.BoolFlag{Name: "all", Usage: "everything but the sidecar's own"},
					&cli.BoolFlag{Name: "profiles", Usage: "only what the policy of --config allows"},
					&cli.StringSliceFlag{Name: "except", Usage: "not what goes to `NETWORK`; may be repeated"},
					&cli.BoolFlag{Name: "dns", Usage: "also DNS to this machine's own or an excepted server; the sidecar's capture.dns says where it goes"},
					&cli.StringSliceFlag{Name: "sidecar-user", Usage: "not what `NAME` sends, as which a sidecar runs; may be repeated"},
					&cli.IntFlag{Name: "port", Usage: "the sidecar takes it at `PORT`", DefaultText: "what the sidecar says, or 1443"},
					&cli.BoolFlag{Name: "without-sidecar", Usage: "set them though no sidecar runs yet, and let them stay when it stops: for an init container"},
					&cli.BoolFlag{Name: "dry-run", Usage: "print the rules for 'nft -f' and set nothing"},
					&cli.StringFlag{Name: "config", Aliases: []string{"c"}, Usage: "read the policy from `FILE` and, without flags that choose, whose traffic", EnvVars: []string{"CULVERT_CONFIG"}},
					path,
				},
			},
			{Name: "off", Usage: "remove the rules", OnUsageError: usage("off"), Action: captureOff},
			{
				Name: "status", Usage: "show what is captured, and what is not", OnUsageError: usage("status"), Action: captureStatus,
				Flags: []cli.Flag{&cli.BoolFlag{Name: "json", Usage: "print one JSON object"}, path},
			},
		},
	}
}

// captureClient speaks with the sidecar.
func captureClient(c *cli.Context) *control.Client {
	if p := c.String("control"); p != "" {
		return control.NewClient(p)
	}
	return control.NewClient()
}

func captureNoArgs(c *cli.Context, name string) error {
	if c.NArg() > 0 {
		return usageError("culvert capture %s takes no arguments, %.40q is one; see --help", name, c.Args().First())
	}
	return nil
}

// captureRules are what the flags and the configuration ask for.
func captureRules(c *cli.Context) (rules.Rules, error) {
	conf := &config.Capture{}
	var p *policy.Policy
	if file := c.String("config"); file != "" {
		whole, err := config.ReadSidecar(file)
		if err != nil {
			return rules.Rules{}, err
		}
		if whole.Capture != nil {
			conf = whole.Capture
		}
		if len(whole.Policy.Profiles)+len(whole.Policy.Rules) > 0 {
			if p, err = policy.New(whole.Policy); err != nil {
				return rules.Rules{}, err
			}
		}
	}
	if c.Bool("all") || len(c.StringSlice("user"))+len(c.StringSlice("cgroup")) > 0 {
		conf.Users, conf.Cgroups, conf.All = c.StringSlice("user"), c.StringSlice("cgroup"), c.Bool("all")
	}
	conf.Except = append(conf.Except, c.StringSlice("except")...)
	conf.Profiles = conf.Profiles || c.Bool("profiles")
	if c.IsSet("port") {
		conf.Port = c.Int("port")
	}
	if err := conf.Check(); err != nil {
		return rules.Rules{}, err
	}
	if !conf.Selects() {
		return rules.Rules{}, usageError("nothing says whose traffic to capture; give --user NAME, --cgroup PATH or --all")
	}
	r, names, err := assemble.CaptureRules(conf, p)
	if err != nil {
		return r, err
	}
	for _, name := range names {
		fmt.Fprintf(c.App.ErrWriter, "culvert: the policy names %s, which the kernel does not know; it is not captured\n", name)
	}
	r.DNS = r.DNS || c.Bool("dns")
	r.Lasting = c.Bool("without-sidecar")
	sidecars, err := assemble.LocalUsers(c.StringSlice("sidecar-user"))
	if err != nil {
		return r, err
	}
	r.Sidecars = sidecars
	return r, r.Check()
}

func captureOn(c *cli.Context) error {
	if err := captureNoArgs(c, "on"); err != nil {
		return err
	}
	r, err := captureRules(c)
	if err != nil {
		return err
	}
	if !r.Lasting {
		// Without a sidecar all that is captured would be refused.
		st, err := captureClient(c).Status(c.Context)
		switch {
		case err != nil && c.Bool("dry-run"): // shows what would be set
		case err != nil:
			return err
		case st.Capture == nil:
			return tunnel.Errorf(tunnel.Unsupported, "this sidecar does not take captured traffic; add 'capture: {}' to its configuration and start it again")
		case c.IsSet("port") && r.Port != st.Capture.Port:
			return usageError("this sidecar takes captured traffic at port %d, not %d; leave out --port", st.Capture.Port, r.Port)
		case r.DNS && st.Capture.DNS == "": // it would carry it to where only this machine answers
			return usageError("this sidecar has no name server for captured DNS; add capture.dns to its configuration and start it again, or leave out --dns")
		default:
			r.Port = st.Capture.Port
		}
	}
	if c.Bool("dry-run") {
		text, err := r.Text()
		if err == nil {
			_, err = io.WriteString(c.App.Writer, text)
		}
		return err
	}
	if err := rules.On(r); err != nil {
		return err
	}
	fmt.Fprintf(c.App.Writer, "Capture is on, to the sidecar at port %d. Programs that run keep the connections that they have; 'culvert capture status' shows what is captured.\n", r.Port)
	return nil
}

func captureOff(c *cli.Context) error {
	if err := captureNoArgs(c, "off"); err != nil {
		return err
	}
	was, err := rules.Off()
	if err != nil {
		return err
	}
	already := ""
	if !was {
		already = "already "
	}
	_, err = fmt.Fprintf(c.App.Writer, "Capture is %soff.\n", already)
	return err
}

// captureState is what status prints.
type captureState struct {
	On      bool           `json:"on"`
	Port    uint16         `json:"port,omitempty"`
	Lasting bool           `json:"lasting,omitempty"`
	NoRoute bool           `json:"routes_missing,omitempty"`
	Rules   []rules.Line   `json:"rules,omitempty"`
	Unread  string         `json:"rules_unread,omitempty"` // why the rules are not known
	Taken   *capture.Stats `json:"sidecar,omitempty"`      // nil: no sidecar takes it
	Sidecar string         `json:"sidecar_absent,omitempty"`
}

func captureStatus(c *cli.Context) error {
	if err := captureNoArgs(c, "status"); err != nil {
		return err
	}
	var s captureState
	state, err := rules.Read()
	switch tunnel.CodeOf(err) {
	case "":
		s.On, s.Port, s.Lasting, s.NoRoute, s.Rules = state.On, state.Port, state.Lasting, state.On && !state.Routed, state.Lines
	case tunnel.NotPermitted:
		s.Unread = "only root may read the rules"
	default:
		return err
	}
	st, err := captureClient(c).Status(c.Context)
	switch {
	case errors.Is(err, control.ErrNoSidecar):
		s.Sidecar = "no sidecar answers"
	case err != nil:
		return err
	case st.Capture == nil:
		s.Sidecar = "the sidecar does not take captured traffic: its configuration has no 'capture'"
	default:
		s.Taken = st.Capture
	}
	if c.Bool("json") {
		return policyJSON(c.App.Writer, s)
	}
	return capturePrint(c.App.Writer, s)
}

// capturePrint prints one screen.
func capturePrint(w io.Writer, s captureState) error {
	var b strings.Builder
	switch {
	case s.Unread != "":
		fmt.Fprintf(&b, "Whether capture is on is not known: %s.\n", s.Unread)
	case !s.On:
		b.WriteString("Capture is off: apps go their own way.\n")
	case s.Taken != nil && s.Taken.Port == s.Port:
		fmt.Fprintf(&b, "Capture is on, to the sidecar at port %d.\n", s.Port)
	case s.Taken != nil:
		fmt.Fprintf(&b, "Capture is on, to port %d, where this sidecar is not: it is at port %d.\n", s.Port, s.Taken.Port)
	default:
		fmt.Fprintf(&b, "Capture is on, to port %d, and what is captured is refused unless somebody is there: %s.\n", s.Port, s.Sidecar)
	}
	if s.NoRoute {
		b.WriteString("Another program has removed its routes, and what is captured is dropped: run 'culvert capture on' again.\n")
	}
	if s.Lasting {
		b.WriteString("It stays on when the sidecar stops.\n")
	}
	for _, part := range []struct {
		title    string
		captures bool
	}{{"captured", true}, {"left alone", false}} {
		if !s.On {
			break
		}
		fmt.Fprintf(&b, "\n%-62s packets\n", part.title)
		for _, l := range s.Rules {
			if l.Captures == part.captures {
				fmt.Fprintf(&b, "  %-60s %7d\n", l.Text, l.Packets)
			}
		}
	}
	if s.On {
		b.WriteString("  other protocols than TCP and UDP, such as ping\n")
		b.WriteString("  everybody and everything else\n")
	}
	if t := s.Taken; t != nil {
		fmt.Fprintf(&b, "\ntaken now    %d UDP sockets, %d TCP connections\n", t.Relays, t.Open)
		fmt.Fprintf(&b, "since start  %d UDP sockets, %d TCP connections; %d datagrams from apps, %d to apps\n", t.Associations, t.Streams, t.Up, t.Down)
		if t.DNS != "" {
			fmt.Fprintf(&b, "DNS          through the tunnel to %s\n", t.DNS)
		}
		fmt.Fprintf(&b, "refused      %s\n", policyOr(controlCounts(t.Refused), "none"))
		fmt.Fprintf(&b, "dropped      %s\n", policyOr(controlCounts(t.Dropped), "none"))
	}
	_, err := io.WriteString(w, b.String())
	return err
}
