package main

import (
	"os/signal"
	"syscall"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
	"github.com/urfave/cli/v2"

	"culvert/cmd/internal/assemble"
	"culvert/cmd/internal/config"
	"culvert/tunnel"
)

func runCommand() *cli.Command {
	return &cli.Command{
		Name:  "run",
		Usage: "run the cloud proxy until SIGTERM or SIGINT, which let live calls finish; a second signal does not",
		Flags: []cli.Flag{
			&cli.StringFlag{Name: "config", Aliases: []string{"c"}, Usage: "read `FILE` (cloudproxy.yaml)", EnvVars: []string{"CULVERT_CONFIG"}},
			&cli.StringFlag{Name: "listen", Usage: "listen on `ADDRESS:PORT`, UDP and TCP (default: the configured one, or :443)", EnvVars: []string{"CULVERT_LISTEN"}},
			&cli.StringFlag{Name: "log-level", Usage: "`LEVEL`: debug, info, warn or error", EnvVars: []string{"CULVERT_LOG_LEVEL"}},
		},
		OnUsageError: onUsage("run"),
		Action:       runCloudProxy,
	}
}

func runCloudProxy(c *cli.Context) error {
	if c.NArg() > 0 {
		return usageError("culvert-cloudproxy run takes no arguments, %q is one; see --help", c.Args().First())
	}
	file := c.String("config")
	if file == "" {
		return usageError("culvert-cloudproxy run needs its configuration: -c cloudproxy.yaml; 'culvert-cloudproxy init' makes one")
	}
	conf, err := config.ReadCloudProxy(file)
	if err != nil {
		return err
	}
	for flag, field := range map[string]*string{"listen": &conf.Listen, "log-level": &conf.Log.Level} {
		if v := c.String(flag); v != "" {
			*field = v
		}
	}
	if err := conf.Check(); err != nil {
		return err
	}
	log, err := assemble.NewLog(conf.Log, "", c.App.ErrWriter)
	if err != nil {
		return err
	}
	assemble.WarnOfExposed(log, conf.Exposed())
	cloud, err := assemble.CloudProxyFrom(conf, log)
	if err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(c.Context, syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	go func() {
		<-ctx.Done()
		daemon.SdNotify(false, daemon.SdNotifyStopping)
		stop() // a second signal ends the process at once
	}()
	defer assemble.OnHangup(ctx, cloud.Reload)()
	if every, err := daemon.SdWatchdogEnabled(false); err == nil && every > 0 {
		go func() {
			for {
				cloud.Sessions() // hangs where the server does, and then systemd is not told
				daemon.SdNotify(false, daemon.SdNotifyWatchdog)
				time.Sleep(every / 2)
			}
		}()
	}
	log.Info("the cloud proxy listens, UDP and TCP", "audit", "started", "address", cloud.Addr.String(), "known_as", conf.Address, "version", version)
	daemon.SdNotify(false, daemon.SdNotifyReady)
	err = cloud.Run(ctx)
	log.Info("the cloud proxy has stopped", "audit", "stopped", "code", string(tunnel.CodeOf(err)))
	return err
}
