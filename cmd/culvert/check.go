package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"

	"github.com/urfave/cli/v2"

	"culvert/cmd/internal/assemble"
	"culvert/cmd/internal/config"
	"culvert/sidecar/check"
	"culvert/sidecar/control"
	"culvert/tunnel"
)

// checkClock is the clock of 'culvert check'; tests put another in its place.
var checkClock = time.Now

// checkFiles are read where none is named.
var checkFiles = []string{"culvert.yaml", "/etc/culvert/culvert.yaml"}

// maxCheckMedia is what the cloud proxy's echo allows on two ways, and somewhat less.
const maxCheckMedia = time.Minute

func checkCommand() *cli.Command {
	return &cli.Command{
		Name:  "check",
		Usage: "test all that a call needs, and say what stands in the way (exit 0 good, 1 not usable, 5 usable but degraded)",
		Flags: []cli.Flag{
			&cli.StringFlag{Name: "config", Aliases: []string{"c"}, Usage: "read `FILE` (default: " + strings.Join(checkFiles, ", ") + ")", EnvVars: []string{"CULVERT_CONFIG"}},
			&cli.BoolFlag{Name: "json", Usage: "print one JSON object"},
			&cli.StringFlag{Name: "report", Usage: "write a page for IT to `FILE`, without secrets in it"},
			&cli.DurationFlag{Name: "media", Value: 10 * time.Second, Usage: "make test calls of `TIME` each, also while an app is in a channel"},
			&cli.StringFlag{Name: "mode", Usage: "`MODE`: auto, udp or tcp (default: the configured one)", EnvVars: []string{"CULVERT_MODE"}},
			&cli.StringFlag{Name: "control", Usage: "a sidecar that may run here has its control socket at `PATH`", EnvVars: []string{"CULVERT_CONTROL"}},
		},
		OnUsageError: func(_ *cli.Context, err error, _ bool) error { return usageError("culvert check: %w; see --help", err) },
		Action:       runCheck,
	}
}

func runCheck(c *cli.Context) error {
	media := c.Duration("media")
	switch {
	case c.NArg() > 0:
		return usageError("culvert check takes no arguments, %q is one; see --help", c.Args().First())
	case media < 500*time.Millisecond || media > maxCheckMedia:
		return usageError("--media %v is not between 500ms and %v", media, maxCheckMedia)
	}
	if _, err := tunnel.ParseMode(c.String("mode")); err != nil {
		return err
	}
	file, err := checkFile(c.String("config"))
	if err != nil {
		return err
	}
	var page *os.File
	if name := c.String("report"); name != "" { // before minutes have passed
		if page, err = checkPage(name, file); err != nil {
			return usageError("--report: %w", err)
		}
		defer page.Close()
	}
	var stop context.CancelFunc
	c.Context, stop = signal.NotifyContext(c.Context, os.Interrupt, syscall.SIGTERM)
	defer stop()
	context.AfterFunc(c.Context, stop) // a second signal ends the program at once

	out := checkOutput{w: c.App.Writer, quiet: c.Bool("json")}
	r := checkAll(c, file, media, &out)
	r.Version = version
	r.Machine, _ = os.Hostname()
	var lost error // the page; what was found is told all the same
	if page != nil {
		lost = writeCheckPage(page, r)
	}
	if c.Bool("json") {
		err = policyJSON(c.App.Writer, r)
	} else {
		err = out.conclusion(r)
	}
	switch {
	case err != nil:
		return err
	case lost != nil:
		return tunnel.Errorf(tunnel.Internal, "the report can not be written: %w", lost)
	case r.Exit() != exitDone:
		return checkFailed{r}
	}
	return nil
}

// checkPage opens the file for the page, which keeps what it holds until there is
// something to write. It is not to be the configuration.
func checkPage(name, conf string) (*os.File, error) {
	page, err := os.OpenFile(name, os.O_WRONLY|os.O_CREATE, 0o666)
	if err != nil {
		return nil, err
	}
	if own, err := os.Stat(conf); err == nil {
		if there, err := page.Stat(); err == nil && os.SameFile(own, there) {
			page.Close()
			return nil, fmt.Errorf("%s is the configuration", name)
		}
	}
	return page, nil
}

func writeCheckPage(page *os.File, r *check.Report) error {
	if there, err := page.Stat(); err == nil && there.Mode().IsRegular() {
		if err := page.Truncate(0); err != nil {
			return err
		}
	}
	return errors.Join(r.WritePage(page), page.Close())
}

// checkFailed is a verdict that is not good. It has been told already.
type checkFailed struct{ r *check.Report }

func (e checkFailed) Error() string { return e.r.Sentence }
func (e checkFailed) ExitCode() int { return e.r.Exit() }

func checkFile(named string) (string, error) {
	if named != "" {
		return named, nil
	}
	for _, f := range checkFiles {
		if _, err := os.Stat(f); err == nil {
			return f, nil
		}
	}
	return "", usageError("culvert check needs a configuration, and there is none at %s: -c culvert.yaml", strings.Join(checkFiles, " or "))
}

// checkAll tests one cloud proxy after another until calls can be made.
func checkAll(c *cli.Context, file string, media time.Duration, out *checkOutput) *check.Report {
	conf, err := config.ReadSidecar(file)
	if err != nil {
		return checkSetup(c.Context, check.Config{}, err, out)
	}
	if m := c.String("mode"); m != "" {
		conf.Mode = m
	}
	beside := control.NewClient()
	if p := c.String("control"); p != "" {
		beside = control.NewClient(p)
	} else if conf.Control.Path != "" {
		beside = control.NewClient(conf.Control.Path)
	}
	var first *check.Report
	for _, address := range conf.CloudProxy.Address {
		if first != nil {
			out.line("")
		}
		t, err := assemble.NewCheck(c.Context, conf, address, beside, checkClock)
		if err != nil {
			return checkSetup(c.Context, t, err, out)
		}
		if c.IsSet("media") {
			t.Busy = ""
		}
		t.Media, t.Begin, t.End = media, out.begin, out.end
		r := check.Run(c.Context, t)
		r.App = conf.Identity.App
		if r.Verdict != check.Failed {
			return r
		}
		if first == nil {
			first = r
		}
		if c.Context.Err() != nil {
			break
		}
	}
	return first
}

// checkSetup is the report where the configuration can not be used.
func checkSetup(ctx context.Context, t check.Config, err error, out *checkOutput) *check.Report {
	code := tunnel.CodeOf(err)
	t.Setup = check.Outcome{Status: check.Failed, Code: code, Says: tunnel.Sentence(err), Do: "correct the configuration; docs/configuration.md has every key"}
	switch {
	case errors.Is(err, fs.ErrPermission):
		t.Setup.Do = "check as a user who may read it, such as with sudo"
	case code == tunnel.TokenRejected:
		t.Setup.Do = "get a new token from the cloud proxy's operator ('culvert-cloudproxy token new')"
	}
	t.Begin, t.End = out.begin, out.end
	return check.Run(ctx, t)
}

// checkOutput prints steps as they are taken.
type checkOutput struct {
	w     io.Writer
	quiet bool
}

func (o *checkOutput) line(format string, args ...any) {
	if !o.quiet {
		fmt.Fprintf(o.w, format+"\n", args...)
	}
}

func (o *checkOutput) begin(title string) {
	if !o.quiet {
		fmt.Fprintf(o.w, "%-22s ", title)
	}
}

func (o *checkOutput) end(s check.Step) {
	code := ""
	if s.Code != "" {
		code = " (" + string(s.Code) + ")"
	}
	o.line("%-8s %7s  %s%s", s.Status, s.Took.Round(time.Millisecond), s.Says, code)
}

// conclusion prints the figures, the one sentence and the next step.
func (o *checkOutput) conclusion(r *check.Report) error {
	ms := func(d time.Duration) string { return fmt.Sprintf("%.1f ms", float64(d)/float64(time.Millisecond)) }
	for _, way := range r.Ways {
		w := tabwriter.NewWriter(o.w, 0, 8, 3, ' ', tabwriter.AlignRight)
		fmt.Fprintf(w, "\n%s\tsent\tlost\tdelay\tp99\tjitter\tlongest gap\t\n", way.Way)
		for _, row := range way.Rows() {
			fmt.Fprintf(w, "%s\t%d\t%.1f %%\t%s\t%s\t%s\t%s\t %s\n", row.What, row.Sent, 100*row.Loss, ms(row.Delay), ms(row.P99), ms(row.Jitter), ms(row.Gap), row.Grade)
		}
		if err := w.Flush(); err != nil {
			return err
		}
	}
	word := map[check.Status]string{check.Good: "Good", check.Degraded: "Usable, but", check.Failed: "Not usable"}[r.Verdict]
	if r.Interrupted {
		word = "Not known"
	}
	_, err := fmt.Fprintf(o.w, "\n%s: %s.\nNext: %s.\n", word, r.Sentence, r.Next)
	return err
}
