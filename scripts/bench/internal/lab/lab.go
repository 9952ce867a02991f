// Package lab runs programs in two places, near and far: both on this machine's
// loopback, or each in a network namespace with a link between them.
//
// It ends what it has started, also when the program that uses it dies; the
// namespaces that it made stay then, empty.
package lab

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"
)

// Place is where a program runs: the name of a network namespace, or "" for
// this machine as it is.
type Place string

// Namespaces of a Link, and the addresses in them.
const (
	Near Place = "culvert-bench-near"
	Far  Place = "culvert-bench-far"

	FarAddr = "198.18.64.2"
)

// command is how args are run at p.
func (p Place) command(args []string) *exec.Cmd {
	if p != "" {
		args = append([]string{"ip", "netns", "exec", string(p)}, args...)
	}
	cmd := exec.Command(args[0], args[1:]...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	return cmd
}

// Process is a program that runs until Stop.
type Process struct {
	cmd   *exec.Cmd
	stdin io.WriteCloser
	out   *bufio.Reader
	log   string
}

// Start starts a program whose standard error goes to the file log. The
// caller's goroutine must be locked to its thread: the program dies with it.
func (p Place) Start(log string, args ...string) (*Process, error) {
	cmd := p.command(args)
	file, err := os.Create(log)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	cmd.Stderr = file
	stdin, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	return &Process{cmd: cmd, stdin: stdin, out: bufio.NewReader(stdout), log: log}, nil
}

// Service is Start for a program whose output no one reads: it goes to the log.
func (p Place) Service(log string, args ...string) (*Process, error) {
	cmd := p.command(args)
	file, err := os.Create(log)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	cmd.Stdout, cmd.Stderr = file, file
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	return &Process{cmd: cmd, log: log}, nil
}

// Run runs a program to its end and returns its output.
func (p Place) Run(args ...string) ([]byte, error) {
	cmd := p.command(args)
	var out, complaint bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &complaint
	if err := cmd.Run(); err != nil {
		return nil, fmt.Errorf("%s: %w: %s", filepath.Base(args[0]), err, strings.TrimSpace(complaint.String()))
	}
	return out.Bytes(), nil
}

// Pid of the program itself: "ip netns exec" becomes what it runs.
func (p *Process) Pid() int { return p.cmd.Process.Pid }

// Line waits for a line of output.
func (p *Process) Line() (string, error) {
	line, err := p.out.ReadString('\n')
	if err != nil {
		return "", fmt.Errorf("%s ended: %s", filepath.Base(p.cmd.Path), p.Complaint())
	}
	return strings.TrimSpace(line), nil
}

// Complaint is the end of what the program has logged.
func (p *Process) Complaint() string {
	b, err := os.ReadFile(p.log)
	if err != nil {
		return err.Error()
	}
	b = bytes.TrimSpace(b)
	return string(b[max(0, len(b)-400):])
}

// patience is how long a program may take to end by itself.
const patience = 3 * time.Second

// Stop ends the program, kindly at first. It may be called again.
func (p *Process) Stop() {
	if p == nil || p.cmd.ProcessState != nil {
		return
	}
	// It may have ended by itself: that is what is wanted.
	_ = p.cmd.Process.Signal(syscall.SIGTERM)
	timer := time.AfterFunc(patience, func() { _ = p.cmd.Process.Kill() })
	defer timer.Stop()
	// Its exit status says how it was ended, which is known.
	_ = p.cmd.Wait()
}

// Wait waits for the program's own end.
func (p *Process) Wait() error {
	if err := p.cmd.Wait(); err != nil {
		return fmt.Errorf("%s: %w: %s", filepath.Base(p.cmd.Path), err, p.Complaint())
	}
	return nil
}

// Link is two namespaces and the program link between them.
type Link struct{ process *Process }

// NewLink makes them; program is the link's file.
func NewLink(program, log, settings string) (*Link, error) {
	args := append([]string{program, "-near", string(Near), "-far", string(Far), "-far-addr", FarAddr + "/24"}, strings.Fields(settings)...)
	p, err := Place("").Start(log, args...)
	if err != nil {
		return nil, err
	}
	l := &Link{p}
	if line, err := p.Line(); err != nil || line != "ready" {
		l.Close()
		return nil, errors.Join(fmt.Errorf("the link does not come up: %s", line), err)
	}
	return l, nil
}

// Queued is how long the link's rate held a packet at most, in milliseconds,
// in either direction, since it was last asked.
type Queued float64

// Set changes the link.
func (l *Link) Set(settings string) (Queued, error) {
	if _, err := fmt.Fprintln(l.process.stdin, settings); err != nil {
		return 0, err
	}
	line, err := l.process.Line()
	if err != nil {
		return 0, err
	}
	var answer struct {
		Error    string
		Up, Down struct {
			Queued Queued `json:"queued_ms"`
		}
	}
	if err := json.Unmarshal([]byte(line), &answer); err != nil {
		return 0, err
	}
	if answer.Error != "" {
		return 0, errors.New(answer.Error)
	}
	return max(answer.Up.Queued, answer.Down.Queued), nil
}

// allowed lists the algorithms that a namespace may have. It belongs to the
// whole machine and can't be written from a namespace.
const allowed = "/proc/sys/net/ipv4/tcp_allowed_congestion_control"

// Congestion chooses the kernel's congestion control in both namespaces. Where
// the machine does not allow namespaces the algorithm, it does for that moment.
func (l *Link) Congestion(algorithm string) (err error) {
	list, err := os.ReadFile(allowed)
	if err != nil {
		return err
	}
	if now := strings.TrimSpace(string(list)); !slices.Contains(strings.Fields(now), algorithm) {
		if err := os.WriteFile(allowed, []byte(now+" "+algorithm), 0); err != nil {
			return err
		}
		defer func() { err = errors.Join(err, os.WriteFile(allowed, []byte(now), 0)) }()
	}
	for _, p := range []Place{Near, Far} {
		if _, err := p.Run("sh", "-c", `echo "$0" >/proc/sys/net/ipv4/tcp_congestion_control`, algorithm); err != nil {
			return err
		}
	}
	return nil
}

// Close ends the link and takes the namespaces away.
func (l *Link) Close() {
	l.process.Stop()
	for _, p := range []Place{Near, Far} {
		// Whatever can't be taken away is made use of the next time.
		_, _ = Place("").Run("ip", "netns", "del", string(p))
	}
}
