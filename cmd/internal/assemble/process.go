package assemble

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"os"
	"os/user"
	"sync"
	"time"

	"culvert/cmd/internal/config"
	"culvert/sidecar/control"
)

// ProcessConfig says what a sidecar's process is made of.
type ProcessConfig struct {
	Sidecar  *config.Sidecar // checked; EmbeddedConfig gives one for Embedded
	Embedded bool            // a cloud proxy inside the process, with throwaway keys
	Version  string
	Began    time.Time // when the process started
	Log      *slog.Logger
}

// Process is a sidecar with its control socket and, where it was asked for, a
// cloud proxy inside the same process.
type Process struct {
	Sidecar *Sidecar
	Cloud   *CloudProxy // nil without Embedded
	Control string      // the control socket's path
	backend *Backend
	server  *control.Server
	socket  net.Listener
	tcp     net.Listener // for what can not use the socket; nil: none
	token   func() (string, error)
}

// EmbeddedConfig is where a configuration without a file begins.
func EmbeddedConfig() *config.Sidecar {
	return &config.Sidecar{
		CloudProxy: config.CloudProxyRef{Address: config.List{"127.0.0.1:443"}, ServerName: DefaultServerName},
		Identity:   config.Identity{App: "embedded", Token: "embedded"},
	}
}

// NewProcess makes everything and takes every port and path, so that whatever
// can fail at once fails before anything runs.
func NewProcess(c ProcessConfig) (p *Process, err error) {
	made := &Process{Control: c.Sidecar.Control.Path}
	defer func() {
		if err != nil {
			made.close()
		}
	}()
	if c.Embedded {
		if made.Cloud, err = Embedded(c.Sidecar, c.Log.With("end", "cloudproxy")); err != nil {
			return nil, err
		}
	}
	if made.Sidecar, err = NewSidecar(c.Sidecar, c.Log); err != nil {
		return nil, err
	}
	if made.Control == "" {
		made.Control = control.Paths()[0]
	}
	if made.socket, err = control.Listen(made.Control, controlGroup(c.Sidecar.Control.Group)); err != nil {
		return nil, err
	}
	if listen := c.Sidecar.Control.Listen; listen != "" {
		made.token = c.Sidecar.Control.Token
		if _, err := made.token(); err != nil {
			return nil, err
		}
		if made.tcp, err = net.Listen("tcp", listen); err != nil {
			return nil, cannotListen("TCP", listen, err)
		}
	}
	made.backend = &Backend{Sidecar: made.Sidecar, Version: c.Version, Began: c.Began}
	made.server, err = control.NewServer(control.Config{Backend: made.backend, Log: c.Log})
	return made, err
}

// serviceGroup may control a sidecar that systemd runs, where the group exists.
const serviceGroup = "culvert"

// controlGroup is the group that the control socket is given to; empty: none.
func controlGroup(configured string) string {
	if configured != "" || os.Getenv("RUNTIME_DIRECTORY") == "" {
		return configured
	}
	if _, err := user.LookupGroup(serviceGroup); err != nil {
		return ""
	}
	return serviceGroup
}

// Ready says that the first start has been decided, whichever way.
func (p *Process) Ready() { p.backend.Ready.Store(true) }

// Run serves until ctx ends or a part fails, and returns when everything has
// ended. The embedded cloud proxy ends last.
func (p *Process) Run(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	cloudCtx, stopCloud := context.WithCancel(context.Background())
	var near, far sync.WaitGroup
	var errs [4]error
	if p.Cloud != nil {
		far.Go(func() { defer cancel(); errs[0] = p.Cloud.Run(cloudCtx) })
	}
	near.Go(func() { defer cancel(); errs[1] = p.Sidecar.Run(ctx) })
	near.Go(func() { defer cancel(); errs[2] = p.server.Serve(ctx, p.socket) })
	if p.tcp != nil {
		near.Go(func() { defer cancel(); errs[3] = p.server.ServeTCP(ctx, p.tcp, p.token) })
	}
	near.Wait()
	stopCloud()
	far.Wait()
	return errors.Join(errs[:]...)
}

// close gives up what was made.
func (p *Process) close() {
	for _, l := range []net.Listener{p.socket, p.tcp} {
		if l != nil {
			l.Close()
		}
	}
	if p.Sidecar != nil {
		p.Sidecar.Close()
	}
	if p.Cloud != nil {
		p.Cloud.Close()
	}
}
