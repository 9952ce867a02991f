// Link joins two network namespaces by one link with a delay, jitter, loss, a
// rate with a queue, and blocked protocols, all changeable while it runs. It is
// for kernels that have no netem; it needs root, iproute2 and /dev/net/tun.
//
//	link -near app -far cloud delay=20ms loss=1 rate=10 queue=200ms
//
// makes the namespaces that are missing, puts a TUN device into each (198.18.64.1
// and .2), prints "ready", and then reads settings from standard input, a line
// at a time. Each line, an empty one too, is answered by a line of JSON: what
// each direction has done so far. At the end of input it ends and the devices
// go; so it never outlives the program that runs it. Namespaces stay.
//
//	delay=20ms jitter=5ms   one-way; jitter is added, even up to that, and never reorders
//	loss=1 burst=4          percent in each direction; mean length of a run of lost packets
//	rate=10 queue=200ms     Mbit/s in each direction (0: no limit); a packet that would wait longer is dropped
//	udp=off tcp=off         blocks the protocol
//	down=on                 blocks everything
//
// It promises no exact times: a packet leaves when it is due, or as soon after
// as the scheduler lets it, some 0.1 ms on an idle machine.
package main

import (
	"bufio"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"log"
	"os"
	"os/exec"
	"strings"
	"sync/atomic"
)

func main() {
	log.SetFlags(0)
	log.SetPrefix("link: ")
	near := flag.String("near", "near", "the `namespace` at one end")
	far := flag.String("far", "far", "the `namespace` at the other")
	nearAddr := flag.String("near-addr", "198.18.64.1/24", "address there")
	farAddr := flag.String("far-addr", "198.18.64.2/24", "address there")
	mtu := flag.Int("mtu", 1500, "largest packet in bytes")
	flag.Parse()
	if err := run(end{*near, *nearAddr}, end{*far, *farAddr}, *mtu, strings.Join(flag.Args(), " ")); err != nil {
		log.Fatal(err)
	}
}

type end struct{ namespace, addr string }

func run(near, far end, mtu int, words string) error {
	s, err := defaults.change(words)
	if err != nil {
		return err
	}
	var now atomic.Pointer[settings]
	now.Store(&s)
	var devices [2]*os.File
	for i, e := range []end{near, far} {
		if devices[i], err = attach(e, fmt.Sprintf("link%d%c", os.Getpid(), 'a'+i), mtu); err != nil {
			return err
		}
	}
	up := newDirection(devices[0], devices[1], &now)
	down := newDirection(devices[1], devices[0], &now)
	failed := make(chan error, 5)
	for _, d := range []*direction{up, down} {
		go func() { failed <- d.read() }()
		go func() { failed <- d.write() }()
	}
	fmt.Println("ready")
	go func() { failed <- obey(os.Stdin, os.Stdout, &now, up, down) }()
	return <-failed
}

// answer is what each line of input gets.
type answer struct {
	Error string `json:"error,omitempty"`
	Up    Counts `json:"up"` // from near to far
	Down  Counts `json:"down"`
}

// obey reads settings until the input ends.
func obey(in io.Reader, out io.Writer, now *atomic.Pointer[settings], up, down *direction) error {
	lines := bufio.NewScanner(in)
	for lines.Scan() {
		s, err := now.Load().change(lines.Text())
		a := answer{Up: up.counts(), Down: down.counts()}
		if err != nil {
			a.Error = err.Error()
		} else {
			now.Store(&s)
		}
		if err := json.NewEncoder(out).Encode(a); err != nil {
			return err
		}
	}
	return lines.Err()
}

// attach makes a TUN device and moves it into the namespace, which is made
// when missing. The device lives as long as the file is open.
func attach(e end, name string, mtu int) (*os.File, error) {
	if _, err := os.Stat("/run/netns/" + e.namespace); err != nil {
		if err := ip("netns", "add", e.namespace); err != nil {
			return nil, err
		}
	}
	device, err := openTUN(name)
	if err != nil {
		return nil, fmt.Errorf("no TUN device: %w", err)
	}
	for _, args := range [][]string{
		{"link", "set", name, "netns", e.namespace},
		{"-n", e.namespace, "link", "set", "lo", "up"},
		{"-n", e.namespace, "addr", "add", e.addr, "dev", name},
		// The device's own queue must not drop before the link does.
		{"-n", e.namespace, "link", "set", name, "mtu", fmt.Sprint(mtu), "txqueuelen", "5000", "up"},
	} {
		if err := ip(args...); err != nil {
			return nil, err
		}
	}
	return device, nil
}

func ip(args ...string) error {
	if out, err := exec.Command("ip", args...).CombinedOutput(); err != nil {
		return fmt.Errorf("ip %s: %w: %s", strings.Join(args, " "), err, strings.TrimSpace(string(out)))
	}
	return nil
}
