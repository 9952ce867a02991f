// Command culvert-demo shows what Culvert does, on one machine and with nothing
// but Go: it starts a cloud proxy, a sidecar and a far end, places a real
// two-party call through the tunnel and prints what arrived.
//
// It promises that the call is a WebRTC call with real RTP, that its media goes
// through the proxy's UDP ASSOCIATE, and that the figures are measured. It does
// not leave the machine: all ends are on loopback.
package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/urfave/cli/v2"

	"culvert/cmd/internal/assemble"
	"culvert/cmd/internal/config"
	"culvert/sidecar"
	"culvert/tunnel"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	os.Exit(run(ctx, os.Args, os.Stdout, os.Stderr))
}

// run is the whole program; it returns the exit code.
func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	app := &cli.App{
		Name:  "culvert-demo",
		Usage: "a call through Culvert, on this machine alone",
		Flags: []cli.Flag{
			&cli.BoolFlag{Name: "once", Usage: "end after the call: exit 0, or 1 when media did not arrive"},
			&cli.StringFlag{Name: "listen", Value: config.DefaultListen, Usage: "offer the proxy at `ADDRESS:PORT`"},
			&cli.StringFlag{Name: "mode", Value: "auto", Usage: "`MODE` of the tunnel: auto, udp or tcp"},
			&cli.DurationFlag{Name: "for", Value: 10 * time.Second, Usage: "the call lasts `TIME`"},
		},
		HideHelpCommand: true,
		Writer:          stdout,
		ErrWriter:       stderr,
		ExitErrHandler:  func(*cli.Context, error) {},
		Action: func(c *cli.Context) error {
			if c.NArg() > 0 {
				return tunnel.Errorf(tunnel.ConfigInvalid, "culvert-demo takes no arguments, %q is one; see --help", c.Args().First())
			}
			return demo(c)
		},
	}
	err := app.RunContext(ctx, args)
	if err != nil {
		fmt.Fprintln(stderr, "culvert-demo:", err)
	}
	switch tunnel.CodeOf(err) {
	case "":
		return 0
	case tunnel.ConfigInvalid:
		return 2
	}
	return 1
}

// demo runs everything and ends it again.
func demo(c *cli.Context) (err error) {
	began := time.Now()
	ctx, cancel := context.WithCancel(c.Context)
	defer cancel()
	log := &logBuffer{}

	// The control socket lets 'culvert status' look at the demo while it runs.
	dir, err := os.MkdirTemp("", "culvert-demo-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	conf := assemble.EmbeddedConfig()
	conf.Front.Listen, conf.Mode, conf.Control.Path = c.String("listen"), c.String("mode"), filepath.Join(dir, "control.sock")
	if err := conf.Check(); err != nil {
		return err
	}
	logger, err := assemble.NewLog(conf.Log, "", log)
	if err != nil {
		return err
	}
	p, err := assemble.NewProcess(assemble.ProcessConfig{Sidecar: conf, Embedded: true, Version: "demo", Began: began, Log: logger})
	if err != nil {
		return err
	}
	s := p.Sidecar
	var parts sync.WaitGroup
	defer parts.Wait()
	defer cancel()
	parts.Go(func() { p.Run(ctx) })

	if _, err := s.Switch.Start(ctx, sidecar.StartOptions{}); err != nil {
		return err
	}
	link := s.Switch.Status().Link
	out := c.App.Writer
	fmt.Fprintf(out, "A sidecar at %s and a cloud proxy at %s are up; the tunnel is %s: %s.\n", s.Front.Addr(), p.Cloud.Addr, link.Carrier, link.Why)

	story := newStory(began)
	events, unsubscribe := s.Switch.Subscribe()
	defer unsubscribe()
	parts.Go(func() { story.follow(ctx, events) })
	if err := theCall(ctx, out, s, c.Duration("for")); err != nil {
		return fmt.Errorf("%w\n%s", err, log.tail())
	}
	// The channel ends with the call's association; give the watcher its second.
	story.waitForChannelEnd(ctx, 3*time.Second)
	story.print(out)
	if c.Bool("once") || ctx.Err() != nil {
		return nil
	}
	return stayUp(ctx, out, s, p.Control)
}

// theCall places the call and reports it.
func theCall(ctx context.Context, out io.Writer, s *assemble.Sidecar, long time.Duration) error {
	conn, err := associate(s.Front.Addr().String())
	if err != nil {
		return err
	}
	defer conn.Close()
	setup, cancel := context.WithTimeoutCause(ctx, 15*time.Second, errors.New("no connection within 15 s"))
	defer cancel()
	began := time.Now()
	call, err := place(setup, conn)
	if err != nil {
		return err
	}
	defer call.hangUp()
	fmt.Fprintf(out, "A WebRTC call between an app behind the proxy and a far end connected in %v (ICE and DTLS).\n", time.Since(began).Round(time.Millisecond))

	link := s.Switch.Status().Link
	talk, hang := context.WithTimeout(ctx, long)
	defer hang()
	go progress(talk, out, call, long)
	call.talk(talk)

	fmt.Fprintf(out, "\n\n%-22s %8s %8s %7s %9s %9s %9s\n", "", "sent", "arrived", "lost", "delay", "p99", "jitter")
	ok := true
	for _, way := range []struct {
		name  string
		flows []*flow
	}{{"app to far end", call.up}, {"far end to app", call.down}} {
		for _, f := range way.flows {
			r := f.report()
			fmt.Fprintf(out, "%-22s %8d %8d %6.2f%% %9s %9s %9s\n", way.name+", "+f.medium.name, r.sent, r.received, r.lost, ms(r.median), ms(r.p99), ms(r.jitter))
			ok = ok && r.sent > 0 && float64(r.received) >= 0.9*float64(r.sent)
		}
	}
	stats := s.Link.Stats()
	fmt.Fprintf(out, "Carried by %s, datagrams as %s: %d up, %d down.\n", link.Carrier, link.Way, stats.DatagramsUp, stats.DatagramsDown)
	if !ok {
		return errors.New("media did not arrive: more than a tenth of a flow is missing")
	}
	return nil
}

func ms(d time.Duration) string { return fmt.Sprintf("%.2f ms", float64(d)/1e6) }

// progress prints a line each second.
func progress(ctx context.Context, out io.Writer, c *call, long time.Duration) {
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	began := time.Now()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			up, down := 0, 0
			for i := range c.up {
				up += c.up[i].report().received
				down += c.down[i].report().received
			}
			fmt.Fprintf(out, "\r%2.0f of %.0f s: %d packets arrived at the far end, %d at the app", time.Since(began).Seconds(), long.Seconds(), up, down)
		}
	}
}

// stayUp leaves the proxy to the reader until interrupted.
func stayUp(ctx context.Context, out io.Writer, s *assemble.Sidecar, socket string) error {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	page := &http.Server{ReadHeaderTimeout: 5 * time.Second, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprintf(w, "Hello from the far end. The cloud proxy came from %s.\n", r.RemoteAddr)
	})}
	go page.Serve(l)
	defer page.Close()
	at := s.Front.Addr()
	fmt.Fprintf(out, `
The proxy stays up at socks5://%s and http://%s. Try it:

    curl --noproxy '' --socks5-hostname %s http://%s/
    go run ./cmd/culvert status --control %s

Ctrl-C stops it.
`, at, at, at, l.Addr(), socket)
	<-ctx.Done()
	fmt.Fprintln(out, "\nStopped.")
	return nil
}

// story is what happened to the channel and the switch.
type story struct {
	began time.Time
	mu    sync.Mutex // guards lines, ended
	lines []string
	ended chan struct{} // closed when a channel has ended
	once  sync.Once
}

func newStory(began time.Time) *story { return &story{began: began, ended: make(chan struct{})} }

func (s *story) follow(ctx context.Context, events <-chan sidecar.Event) {
	for {
		select {
		case <-ctx.Done():
			return
		case e, ok := <-events:
			if !ok {
				return
			}
			s.take(e)
		}
	}
}

func (s *story) take(e sidecar.Event) {
	if e.Kind != "channel" {
		return
	}
	to := e.To
	if to == "" {
		to = "ended"
	}
	s.mu.Lock()
	s.lines = append(s.lines, fmt.Sprintf("%6.1f s  channel of %s: %s (%s)", e.At.Sub(s.began).Seconds(), e.Name, to, e.Cause))
	s.mu.Unlock()
	if e.To == "" {
		s.once.Do(func() { close(s.ended) })
	}
}

func (s *story) waitForChannelEnd(ctx context.Context, patience time.Duration) {
	select {
	case <-s.ended:
	case <-time.After(patience):
	case <-ctx.Done():
	}
}

func (s *story) print(out io.Writer) {
	s.mu.Lock()
	defer s.mu.Unlock()
	fmt.Fprintf(out, "\nWhat the sidecar saw of the channel:\n%s\n", strings.Join(s.lines, "\n"))
}

// logBuffer keeps the last lines of the log for when something fails.
type logBuffer struct {
	mu sync.Mutex
	b  []byte
}

func (l *logBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.b = append(l.b, p...); len(l.b) > 16<<10 {
		l.b = append([]byte(nil), l.b[len(l.b)-8<<10:]...)
	}
	return len(p), nil
}

func (l *logBuffer) tail() []byte {
	l.mu.Lock()
	defer l.mu.Unlock()
	return bytes.TrimSpace(l.b)
}
