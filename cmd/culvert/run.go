package main

import (
	"context"
	"os"
	"os/signal"
	"sync"
	"syscall"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
	"github.com/urfave/cli/v2"

	"culvert/cmd/internal/assemble"
	"culvert/cmd/internal/config"
	"culvert/sidecar"
	"culvert/tunnel"
)

func usageError(format string, args ...any) error {
	return tunnel.Errorf(tunnel.ConfigInvalid, format, args...)
}

// defaultStopWait is how long a signal lets a channel end by itself.
const defaultStopWait = 10 * time.Second

func runCommand() *cli.Command {
	return &cli.Command{
		Name:  "run",
		Usage: "run the sidecar until SIGTERM or SIGINT, which wait for channels to end; a second signal does not, a third ends it at once",
		Flags: []cli.Flag{
			&cli.StringFlag{Name: "config", Aliases: []string{"c"}, Usage: "read `FILE` (culvert.yaml)", EnvVars: []string{"CULVERT_CONFIG"}},
			&cli.BoolFlag{Name: "embedded", Usage: "run a cloud proxy inside this process, with throwaway keys; loopback and public targets are allowed"},
			&cli.StringFlag{Name: "listen", Usage: "offer the proxy at `ADDRESS:PORT` (default: the configured one, or " + config.DefaultListen + ")", EnvVars: []string{"CULVERT_LISTEN"}},
			&cli.StringFlag{Name: "mode", Usage: "`MODE`: auto, udp or tcp", EnvVars: []string{"CULVERT_MODE"}},
			&cli.StringFlag{Name: "control", Usage: "make the control socket at `PATH` (default: control.sock under $RUNTIME_DIRECTORY, $XDG_RUNTIME_DIR/culvert or /run/culvert)", EnvVars: []string{"CULVERT_CONTROL"}},
			&cli.StringFlag{Name: "log-level", Usage: "`LEVEL`: debug, info, warn or error", EnvVars: []string{"CULVERT_LOG_LEVEL"}},
		},
		OnUsageError: func(_ *cli.Context, err error, _ bool) error { return usageError("culvert run: %w; see --help", err) },
		Action:       runSidecar,
	}
}

// runConfig is the configuration with flags and variables over it.
func runConfig(c *cli.Context) (conf *config.Sidecar, err error) {
	file, embedded := c.String("config"), c.Bool("embedded")
	switch {
	case c.NArg() > 0:
		return nil, usageError("culvert run takes no arguments, %q is one; see --help", c.Args().First())
	case file == "" && !embedded:
		return nil, usageError("culvert run needs a configuration: -c culvert.yaml, or --embedded to try it without one")
	case file != "" && embedded:
		return nil, usageError("--embedded makes its own configuration; leave out -c")
	case embedded:
		conf = assemble.EmbeddedConfig()
	default:
		if conf, err = config.ReadSidecar(file); err != nil {
			return nil, err
		}
	}
	for flag, field := range map[string]*string{"listen": &conf.Front.Listen, "mode": &conf.Mode, "control": &conf.Control.Path, "log-level": &conf.Log.Level} {
		if v := c.String(flag); v != "" {
			*field = v
		}
	}
	return conf, conf.Check()
}

func runSidecar(c *cli.Context) error {
	began := time.Now()
	conf, err := runConfig(c)
	if err != nil {
		return err
	}
	log, err := assemble.NewLog(conf.Log, conf.Identity.App, c.App.ErrWriter)
	if err != nil {
		return conf.Located(err)
	}
	assemble.WarnOfExposed(log, conf.Exposed())
	signals := make(chan os.Signal, 2)
	signal.Notify(signals, syscall.SIGTERM, syscall.SIGINT)
	defer signal.Stop(signals)

	p, err := assemble.NewProcess(assemble.ProcessConfig{Sidecar: conf, Embedded: c.Bool("embedded"), Version: version, Began: began, Log: log})
	if err != nil {
		return conf.Located(err)
	}
	ctx, cancel := context.WithCancel(c.Context)
	defer cancel()
	var parts sync.WaitGroup
	failed := make(chan error, 1)
	parts.Go(func() { failed <- p.Run(ctx) })
	log.Info("the proxy for apps listens", "address", p.Sidecar.Front.Addr().String(), "control", p.Control, "version", version)

	s, manager := p.Sidecar, &systemd{}
	parts.Go(func() {
		if conf.Start == "auto" {
			// Start logs what comes of it; without a cloud proxy the link keeps trying.
			s.Switch.Start(ctx, sidecar.StartOptions{Keep: true})
		}
		p.Ready()
		manager.ready()
	})
	parts.Go(func() { watchdog(ctx, s) })
	defer assemble.OnHangup(ctx, s.Reload)()

	select {
	case sig := <-signals:
		log.Info("stopping", "signal", sig.String())
		manager.stopping()
		stopWait := time.Duration(conf.StopWait)
		if stopWait == 0 {
			stopWait = defaultStopWait
		}
		stopCtx, stop := context.WithCancel(ctx)
		go func() { // a second signal ends the wait, a third the process
			select {
			case <-signals:
				signal.Stop(signals)
				stop()
			case <-stopCtx.Done():
			}
		}()
		if _, err := s.Switch.Stop(stopCtx, sidecar.StopOptions{Wait: stopWait}); err != nil {
			log.Warn("stopping in spite of this", "code", tunnel.CodeOf(err), "why", tunnel.Sentence(err))
		}
		stop()
	case err = <-failed:
	case <-ctx.Done():
	}
	// Whatever still hangs: from here on a signal does what it does by default.
	signal.Stop(signals)
	manager.stopping()
	cancel()
	parts.Wait()
	select {
	case err = <-failed:
	default:
	}
	return err
}

// systemd is told that the sidecar is ready or stopping, and never ready after
// stopping: a start that a signal interrupts is decided as well.
type systemd struct {
	mu     sync.Mutex
	ending bool
}

func (s *systemd) ready() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.ending {
		daemon.SdNotify(false, daemon.SdNotifyReady)
	}
}

func (s *systemd) stopping() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.ending {
		s.ending = true
		daemon.SdNotify(false, daemon.SdNotifyStopping)
	}
}

// watchdog tells systemd that the switch answers, as often as it asks for.
func watchdog(ctx context.Context, s *assemble.Sidecar) {
	every, err := daemon.SdWatchdogEnabled(false)
	if err != nil || every == 0 {
		return
	}
	tick := time.NewTicker(every / 2)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			s.Switch.Status() // hangs where the switch does, and then systemd is not told
			daemon.SdNotify(false, daemon.SdNotifyWatchdog)
		}
	}
}
