package config

import (
	"net/netip"

	"culvert/sidecar/capture"
	"culvert/tunnel"
)

// Capture is traffic that the kernel hands over. Without users, cgroups and All
// the sidecar takes it, and 'culvert capture on' says whose.
type Capture struct {
	Port     int    `yaml:"port,omitempty"`
	Users    List   `yaml:"users,omitempty"`    // names or numbers
	Cgroups  List   `yaml:"cgroups,omitempty"`  // such as system.slice/phone.service
	All      bool   `yaml:"all,omitempty"`      // everything but the sidecar's own
	Profiles bool   `yaml:"profiles,omitempty"` // only what the policy allows
	Except   List   `yaml:"except,omitempty"`   // addresses and networks
	DNS      string `yaml:"dns,omitempty"`      // ADDRESS or ADDRESS:PORT
}

// Selects reports whether the configuration says whose traffic is captured.
func (c *Capture) Selects() bool { return c.All || len(c.Users)+len(c.Cgroups) > 0 }

// Check fills in defaults and says what can not be.
func (c *Capture) Check() error {
	if c.Port == 0 {
		c.Port = capture.DefaultPort
	}
	if c.Port < 0 || c.Port > 65535 {
		return tunnel.Errorf(tunnel.ConfigInvalid, "capture.port: %d is not a port between 1 and 65535", c.Port)
	}
	if c.All && len(c.Users)+len(c.Cgroups) > 0 {
		return tunnel.Errorf(tunnel.ConfigInvalid, "capture: all leaves no choice of users or cgroups; name one or the other")
	}
	if _, err := c.Excepted(); err != nil {
		return err
	}
	_, err := c.Server()
	return err
}

// Excepted are the networks that are left alone.
func (c *Capture) Excepted() ([]netip.Prefix, error) {
	var all []netip.Prefix
	for _, s := range c.Except {
		p, err := netip.ParsePrefix(s)
		if err != nil {
			var a netip.Addr
			if a, err = netip.ParseAddr(s); err == nil && a.Zone() == "" {
				a = a.Unmap()
				p = netip.PrefixFrom(a, a.BitLen())
			}
		}
		if err != nil || !p.IsValid() || p.Addr().Is4In6() { // packets for a mapped address are IPv4
			return nil, tunnel.Errorf(tunnel.ConfigInvalid, "capture.except: %.60q is not an address or a network such as 10.0.0.0/8", s)
		}
		all = append(all, p.Masked())
	}
	return all, nil
}

// Server is where DNS goes; invalid: where the app sends it.
func (c *Capture) Server() (netip.AddrPort, error) {
	if c.DNS == "" {
		return netip.AddrPort{}, nil
	}
	if a, err := netip.ParseAddr(c.DNS); err == nil && a.Zone() == "" {
		return netip.AddrPortFrom(a.Unmap(), 53), nil
	}
	a, err := netip.ParseAddrPort(c.DNS)
	if err != nil || a.Port() == 0 || a.Addr().Zone() != "" {
		return netip.AddrPort{}, tunnel.Errorf(tunnel.ConfigInvalid, "capture.dns: %.60q is not the address of a name server, such as 192.0.2.53 or 192.0.2.53:53", c.DNS)
	}
	return netip.AddrPortFrom(a.Addr().Unmap(), a.Port()), nil
}
