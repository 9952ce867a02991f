package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"culvert/scripts/bench/internal/lab"
)

// scene is where a row takes place.
type scene struct {
	dir       string    // for configurations and logs
	bin       string    // our programs
	near, far lab.Place // both "": this machine's loopback
	link      *lab.Link // nil on the loopback
	host      string    // the far place's address as near sees it
	restrict  bool      // no program may choose its congestion control
	services  []*lab.Process
}

// Ports, the same in both places. On the loopback both ends share them.
const (
	farPort    = 19000
	tunnelPort = 19443
	socksPort  = 19080
	relayPort  = 19070
)

func at(host string, port int) string { return fmt.Sprintf("%s:%d", host, port) }

// direct is the far end's address without a proxy; inner is what a proxy's far end calls it.
func (s *scene) direct() string { return at(s.host, farPort) }
func (s *scene) inner() string  { return at("127.0.0.1", farPort) }
func (s *scene) socks() string  { return at("127.0.0.1", socksPort) }
func (s *scene) tunnel() string { return at(s.host, tunnelPort) }

func (s *scene) program(name string) string { return filepath.Join(s.bin, name) }
func (s *scene) file(name string) string    { return filepath.Join(s.dir, name) }

// write makes a configuration file and returns its name.
func (s *scene) write(name, content string) (string, error) {
	return s.file(name), os.WriteFile(s.file(name), []byte(content), 0o600)
}

// serve starts a program that runs until the scene is cleared.
func (s *scene) serve(p lab.Place, name string, args ...string) error {
	if s.restrict {
		args = append([]string{s.program("nobbr")}, args...)
	}
	process, err := p.Service(s.file(name+".log"), args...)
	if err != nil {
		return err
	}
	s.services = append(s.services, process)
	return nil
}

// clear ends what serve started, the last first.
func (s *scene) clear() {
	for i := len(s.services) - 1; i >= 0; i-- {
		s.services[i].Stop()
	}
	s.services = nil
}

func (s *scene) pids() (list string) {
	for _, p := range s.services {
		list += fmt.Sprintf("%d,", p.Pid())
	}
	return list
}

// complaints are what the services have logged last.
func (s *scene) complaints() (all string) {
	for _, p := range s.services {
		all += p.Complaint() + "\n"
	}
	return all
}

// patience is how long a proxy may take to carry its first packet.
const patience = 20 * time.Second

// settle waits until a proxy carries packets.
func (s *scene) settle() error {
	deadline := time.Now().Add(patience)
	for {
		_, err := s.near.Run(s.program("load"), "first", "-times", "1", "-size", "200", "-socks", s.socks(), "-target", s.inner())
		if err == nil {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("it carries nothing: %w; it says: %s", err, s.complaints())
		}
		time.Sleep(200 * time.Millisecond)
	}
}

// subject is what is measured in a row.
type subject struct {
	name  string
	needs string // the program that must be on PATH
	// start starts it at the scene; nil: nothing is between the app and the far end.
	start func(*scene) error
	// plain is the address that stands for the far end where the subject is no proxy.
	plain func(*scene) string
	// bare is the kind of transport that program bare measures; no other load does.
	bare string
}

// subjects are all that are known, by name; the README says what they are.
var subjects = map[string]subject{
	"direct":    {name: "direct", plain: (*scene).direct},
	"relay":     {name: "relay", start: startRelay, plain: func(*scene) string { return at("127.0.0.1", relayPort) }},
	"bare quic": {name: "bare quic", start: startBare, bare: "quic"},
	"bare tls":  {name: "bare tls", start: startBare, bare: "tls"},

	"relay quic": {name: "relay quic", start: startBareRelay("quic"), plain: func(*scene) string { return at("127.0.0.1", relayPort) }},
	"relay tls":  {name: "relay tls", start: startBareRelay("tls"), plain: func(*scene) string { return at("127.0.0.1", relayPort) }},

	"culvert auto": culvert("auto"),
	"culvert udp":  culvert("udp"),
	"culvert tcp":  culvert("tcp"),

	"culvert captured": {name: "culvert captured", start: startCaptured, plain: (*scene).direct},

	"hysteria": {name: "hysteria", needs: "hysteria", start: startHysteria},
	"hy2":      {name: "hy2", needs: "sing-box", start: singBox(hy2In, hy2Out)},
	"tuic":     {name: "tuic", needs: "sing-box", start: singBox(tuicIn, tuicOut)},
	"yamux":    {name: "yamux", needs: "sing-box", start: singBox(trojanIn, trojanOut)},
	"xray":     {name: "xray", needs: "xray", start: startXray},
}

func startRelay(s *scene) error {
	second := at("127.0.0.1", relayPort+1)
	if err := s.serve(s.far, "relay-far", s.program("relay"), "-listen", second, "-to", s.inner()); err != nil {
		return err
	}
	return s.serve(s.near, "relay-near", s.program("relay"), "-listen", at("127.0.0.1", relayPort), "-to", second)
}

func startBare(s *scene) error {
	return s.serve(s.far, "bare", s.program("bare"), "serve", "-addr", s.tunnel())
}

// startBareRelay puts a bare transport between two TCP relays: a proxy's hops,
// and nothing of a proxy.
func startBareRelay(kind string) func(*scene) error {
	return func(s *scene) error {
		if err := s.serve(s.far, "bare-far", s.program("bare"), "far", "-addr", s.tunnel(), "-to", s.inner()); err != nil {
			return err
		}
		return s.serve(s.near, "bare-near", s.program("bare"), "near", "-listen", at("127.0.0.1", relayPort), "-addr", s.tunnel(), "-kind", kind)
	}
}

// culvert is this tree's programs with the configuration that init writes.
func culvert(mode string) subject {
	return subject{name: "culvert " + mode, start: func(s *scene) error { return s.culvert(mode, "") }}
}

// culvert starts both ends; more is added to the sidecar's configuration.
func (s *scene) culvert(mode, more string) error {
	conf := s.file("culvert")
	if err := os.RemoveAll(conf); err != nil {
		return err
	}
	if _, err := lab.Place("").Run(s.program("culvert-cloudproxy"), "init", "--host", s.tunnel(), "--dir", conf, "--allow", "127.0.0.0/8", "--allow", lab.FarAddr+"/32"); err != nil {
		return err
	}
	if err := s.serve(s.far, "cloudproxy", s.program("culvert-cloudproxy"), "run", "-c", filepath.Join(conf, "cloudproxy.yaml")); err != nil {
		return err
	}
	sidecar := filepath.Join(conf, "culvert.yaml")
	if more != "" {
		b, err := os.ReadFile(sidecar)
		if err == nil {
			err = os.WriteFile(sidecar, append(b, more...), 0o600)
		}
		if err != nil {
			return err
		}
	}
	return s.serve(s.near, "sidecar", s.program("culvert"), "run", "-c", sidecar,
		"--listen", s.socks(), "--mode", mode, "--control", s.file("control.sock"))
}

// startCaptured captures all of the near place, which must be a namespace: the
// load goes straight to the far end and is taken on its way.
func startCaptured(s *scene) error {
	if s.near == "" {
		return errors.New("this machine's own traffic would be captured; it needs a link")
	}
	if err := s.culvert("udp", "\ncapture: {}\n"); err != nil {
		return err
	}
	if err := s.settle(); err != nil { // by SOCKS, so that the tunnel is up
		return err
	}
	_, err := s.near.Run(s.program("culvert"), "capture", "on", "--all", "--control", s.file("control.sock"))
	return err
}
