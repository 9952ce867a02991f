package assemble

import (
	"context"
	"errors"
	"math"
	"net"
	"net/netip"
	"os/user"
	"slices"
	"strconv"
	"syscall"
	"time"

	"culvert/cmd/internal/config"
	"culvert/policy"
	"culvert/sidecar"
	"culvert/sidecar/capture"
	"culvert/sidecar/capture/rules"
	"culvert/sidecar/channel"
	"culvert/tunnel"
)

// protection keeps this process's own packets from being captured.
type protection struct {
	mark     uint32 // 0: none
	control  func(network, address string, c syscall.RawConn) error
	resolver *net.Resolver
}

// protect is for a configuration that captures; without one nothing is changed.
func protect(c *config.Capture) protection {
	if c == nil {
		return protection{resolver: net.DefaultResolver}
	}
	return protection{rules.OwnMark, capture.Protect(rules.OwnMark), capture.Resolver(rules.OwnMark)}
}

// dialer is one whose packets are left alone.
func (p protection) dialer() *net.Dialer {
	return &net.Dialer{Control: p.control, Resolver: p.resolver}
}

// newCapture makes what takes captured traffic, and the rules that the
// configuration asks for.
func (s *Sidecar) newCapture(c *config.Sidecar) error {
	sockets, err := capture.Listen(uint16(c.Capture.Port), rules.OwnMark)
	if err != nil {
		return err
	}
	if !c.Capture.Selects() { // else they are replaced in one step, so that nothing leaves in between
		s.sweepCapture(sockets.Port()) // the port is ours now: they are nobody else's
	}
	dns, err := c.Capture.Server()
	if err != nil {
		return err
	}
	find := func(client netip.AddrPort) (string, int) {
		server, network, ok := s.Capture.Server(client)
		if !ok {
			return "", 0
		}
		p, err := sidecar.ProcessOf(client, server, network)
		if err != nil {
			return "", 0
		}
		return p.Name, p.PID
	}
	watch := sidecar.NewWatch(s.Switch, s.Watcher, func(by tunnel.Peer) channel.Owner { return sidecar.OwnerOf(by, find) })
	s.Capture, err = capture.New(capture.Config{Sockets: sockets, Next: watch, DNS: dns, Socket: sidecar.SocketOf, MaxAge: maxAge(time.Duration(c.Media.MaxWait)), Log: s.log})
	if err != nil {
		sockets.Close()
		return err
	}
	if !c.Capture.Selects() {
		return nil
	}
	r, unmet, err := CaptureRules(c.Capture, s.policy.Load())
	if err != nil {
		return err
	}
	for _, name := range unmet {
		s.log.Warn("capture: a destination of the policy is a name, which the kernel does not know; it is not captured", "name", name)
	}
	if err := setRules(r); err != nil {
		return err
	}
	s.rules = &r
	return nil
}

// CaptureRules are the rules for a configuration and, where only the policy's
// destinations are captured, the names among them, which can not be.
func CaptureRules(c *config.Capture, p *policy.Policy) (r rules.Rules, names []string, err error) {
	r = rules.Rules{Port: uint16(c.Port), Cgroups: slices.Clone(c.Cgroups), All: c.All, DNS: c.DNS != ""}
	if r.Except, err = c.Excepted(); err != nil {
		return r, nil, err
	}
	if r.Users, err = LocalUsers(c.Users); err != nil {
		return r, nil, err
	}
	if c.Profiles {
		if r.Only, names, err = destinations(p); err != nil {
			return r, nil, err
		}
	}
	return r, names, r.Check()
}

// LocalUsers looks up names and numbers.
func LocalUsers(names []string) (all []rules.User, err error) {
	for _, name := range names {
		number := name
		u, err := user.Lookup(name)
		if err == nil {
			number = u.Uid
		}
		// The system's lookup of a number would take 4294967296 for root's, and
		// the highest of 32 bits is nobody's.
		id, err := strconv.ParseUint(number, 10, 32)
		if err != nil || id == math.MaxUint32 {
			return nil, tunnel.Errorf(tunnel.ConfigInvalid, "there is no user %.60q on this machine; give a name or a number", name)
		}
		if u == nil {
			u, _ = user.LookupId(number)
		}
		one := rules.User{UID: uint32(id)}
		if u != nil {
			one.Name = u.Username
		}
		all = append(all, one)
	}
	return all, nil
}

// destinations are what the policy's rules allow.
func destinations(p *policy.Policy) (all []rules.Destination, names []string, err error) {
	if p == nil || p == policy.Elsewhere() {
		return nil, nil, tunnel.Errorf(tunnel.ConfigInvalid, "capture.profiles: the configuration has no policy; name profiles or rules in it, or leave profiles out")
	}
	for _, o := range p.Firewall().Replaces {
		proto, err := policy.ParseProto(o.Proto)
		if err != nil {
			return nil, nil, err
		}
		d := rules.Destination{TCP: proto&policy.TCP != 0, UDP: proto&policy.UDP != 0, Name: o.Purpose}
		if o.Ports != "" {
			ports, err := policy.ParsePorts(o.Ports)
			if err != nil {
				return nil, nil, err
			}
			for _, r := range ports {
				d.Ports = append(d.Ports, rules.Ports{Low: r.Low, High: r.High})
			}
		}
		for _, to := range o.To {
			if a, err := netip.ParseAddr(to); err == nil {
				d.Prefix = netip.PrefixFrom(a, a.BitLen())
				all = append(all, d)
				continue
			}
			if d.Prefix, err = netip.ParsePrefix(to); err == nil {
				all = append(all, d)
				continue
			}
			if to != "any" && to != "public" {
				names = append(names, to)
				continue
			}
			for _, everywhere := range []string{"0.0.0.0/0", "::/0"} {
				d.Prefix = netip.MustParsePrefix(everywhere)
				all = append(all, d)
			}
		}
	}
	if len(all) == 0 {
		return nil, nil, tunnel.Errorf(tunnel.ConfigInvalid, "capture.profiles: the policy allows only names, and the kernel knows addresses; leave profiles out")
	}
	return all, names, nil
}

// setRules sets rules that this process takes away again.
func setRules(r rules.Rules) error {
	now := r
	now.Cgroups = slices.DeleteFunc(slices.Clone(r.Cgroups), func(c string) bool {
		_, err := rules.CgroupID(c)
		return err != nil // there is none yet
	})
	if !now.All && len(now.Users)+len(now.Cgroups) == 0 {
		return unsetRules(r.Port)
	}
	err := rules.On(now)
	if tunnel.CodeOf(err) == tunnel.NotPermitted && !errors.Is(err, rules.ErrOther) {
		return tunnel.Errorf(tunnel.NotPermitted, "the configuration says whose traffic to capture, and this process may not set the rules for it, which needs CAP_NET_ADMIN; grant it (systemd: AmbientCapabilities), or leave users, cgroups and all out of 'capture' and run 'culvert capture on' as root")
	}
	return err
}

// unsetRules removes the rules of a port, unless they are lasting. Without the
// right to read them it does nothing.
func unsetRules(port uint16) error {
	state, err := rules.Read()
	if err != nil || !state.On || state.Port != port || state.Lasting {
		return nil
	}
	_, err = rules.Off()
	return err
}

// sweepCapture takes away what an earlier run has left behind.
func (s *Sidecar) sweepCapture(port uint16) {
	if err := unsetRules(port); err != nil {
		s.log.Warn("capture: rules of an earlier run can not be removed", "why", tunnel.Sentence(err))
	}
}

// rulesPoll is how often is looked for cgroups, of which one that is made anew, as
// when its service is started again, has another number, and for what other programs
// have removed.
const rulesPoll = 2 * time.Second

// keepRules follows cgroups and keeps the rules whole until ctx ends, and then
// removes them. Rules that somebody has turned off stay off.
func (s *Sidecar) keepRules(ctx context.Context) {
	defer s.dropRules()
	if s.rules == nil {
		<-ctx.Done()
		return
	}
	numbers := func() (all []uint64) {
		for _, c := range s.rules.Cgroups {
			id, _ := rules.CgroupID(c) // 0: there is none
			all = append(all, id)
		}
		return all
	}
	was := numbers()
	tick := time.NewTicker(rulesPoll)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		now := numbers()
		what := "a cgroup has changed"
		if slices.Equal(was, now) {
			if !rules.Halved() {
				continue
			}
			if state, err := rules.Read(); err != nil || state.On && state.Port != s.rules.Port {
				continue
			}
			what = "another program has removed a part of them"
		}
		if err := setRules(*s.rules); err != nil {
			s.log.Warn("capture: the rules can not be set again", "what", what, "why", tunnel.Sentence(err))
			continue
		}
		s.log.Info("capture: the rules are set again", "what", what)
		was = now
	}
}

// dropRules removes the rules, those too that 'culvert capture on' has set for
// this sidecar.
func (s *Sidecar) dropRules() {
	if err := unsetRules(s.Capture.Stats().Port); err != nil {
		s.log.Warn("capture: the rules can not be removed, and what they capture is refused from now on; run 'culvert capture off' as root", "why", tunnel.Sentence(err))
	}
}
