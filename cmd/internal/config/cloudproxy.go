package config

import (
	"math"
	"net"
	"net/netip"
	"strings"

	"culvert/policy"
	"culvert/tunnel"
)

// CloudProxy is cloudproxy.yaml.
type CloudProxy struct {
	Listen      string        `yaml:"listen,omitempty"`        // UDP and TCP
	Address     string        `yaml:"address"`                 // HOST:PORT under which sidecars reach this instance
	Region      string        `yaml:"region,omitempty"`        // told to sidecars
	Proxies     []Proxy       `yaml:"cloud_proxies,omitempty"` // told to sidecars, in order; empty: this one alone
	Certificate Certificate   `yaml:"certificate"`
	ResetKey    string        `yaml:"reset_key_file,omitempty"` // lets sidecars notice a restart at once
	ALPN        List          `yaml:"alpn,omitempty"`
	WebSocket   WebSocket     `yaml:"websocket,omitempty"`
	Tokens      Tokens        `yaml:"tokens"`
	Apps        []App         `yaml:"apps,omitempty"` // the App IDs served; empty: any that a token names
	Policy      policy.Config `yaml:"policy"`
	Egress      Egress        `yaml:"egress,omitempty"`
	Limits      Limits        `yaml:"limits,omitempty"`
	Media       Media         `yaml:"media,omitempty"`
	Drain       Duration      `yaml:"drain,omitempty"` // how long live calls may take to finish at a stop
	Log         Log           `yaml:"log,omitempty"`

	file string // where it was read
}

// Proxy is one of several cloud proxies that serve the same sidecars.
type Proxy struct {
	Address string `yaml:"address"` // HOST:PORT or wss://HOST/PATH
	Region  string `yaml:"region,omitempty"`
}

// WebSocket is where sidecars come that are let through as HTTP alone.
type WebSocket struct {
	Path   string `yaml:"path,omitempty"`   // empty: nowhere
	Listen string `yaml:"listen,omitempty"` // plain HTTP, behind what ends TLS
}

// Certificate is a chain and its key, as PEM files.
type Certificate struct {
	CertFile string `yaml:"cert_file"`
	KeyFile  string `yaml:"key_file"`
}

// Tokens says whose tokens are accepted.
type Tokens struct {
	PublicKeys List   `yaml:"public_keys"`            // files
	Revoked    string `yaml:"revoked_file,omitempty"` // of the tokens that are not
}

// App is what one App ID may do, whatever its tokens say.
type App struct {
	ID       string         `yaml:"id"`
	Sessions int            `yaml:"sessions,omitempty"` // at once; 0: as the token says
	Policy   *policy.Config `yaml:"policy,omitempty"`   // in place of the general one
	Limits   AppLimits      `yaml:"limits,omitempty"`   // of each session, in place of the general ones
}

// AppLimits bound each session of an App ID; what is 0 is as for all.
type AppLimits struct {
	Associations   int `yaml:"associations,omitempty"`
	Streams        int `yaml:"streams,omitempty"`
	OpensPerSecond int `yaml:"opens_per_second,omitempty"`
	BytesPerSecond int `yaml:"bytes_per_second,omitempty"`
}

// Egress is where traffic leaves from.
type Egress struct {
	IPv4         string   `yaml:"ipv4,omitempty"` // a local address; empty: the kernel chooses
	IPv6         string   `yaml:"ipv6,omitempty"`
	Public       List     `yaml:"public,omitempty"`       // addresses of this host that it does not hold, as behind a 1:1 NAT
	Idle         Duration `yaml:"idle,omitempty"`         // when an unheld UDP association ends; 2m
	Associations int      `yaml:"associations,omitempty"` // of all sessions together
	Streams      int      `yaml:"streams,omitempty"`      // of all sessions together
}

// Addrs returns the addresses; invalid ones are not configured.
func (e *Egress) Addrs() (v4, v6 netip.Addr, err error) {
	if e.IPv4 != "" {
		if v4, err = netip.ParseAddr(e.IPv4); err != nil || !v4.Is4() {
			return v4, v6, tunnel.Errorf(tunnel.ConfigInvalid, "egress.ipv4: %.60q is not an IPv4 address", e.IPv4)
		}
	}
	if e.IPv6 != "" {
		if v6, err = netip.ParseAddr(e.IPv6); err != nil || !v6.Is6() {
			return v4, v6, tunnel.Errorf(tunnel.ConfigInvalid, "egress.ipv6: %.60q is not an IPv6 address", e.IPv6)
		}
	}
	return v4, v6, nil
}

// PublicAddrs returns the addresses of Public.
func (e *Egress) PublicAddrs() ([]netip.Addr, error) {
	var all []netip.Addr
	for _, text := range e.Public {
		a, err := netip.ParseAddr(text)
		if err != nil || a.Zone() != "" || a.IsUnspecified() || a.IsMulticast() {
			return nil, tunnel.Errorf(tunnel.ConfigInvalid, "egress.public: %.60q is not the IP address of one host", text)
		}
		all = append(all, a)
	}
	return all, nil
}

// maxStreamMemory is a terabyte, in MiB, on machines that can count so far.
const maxStreamMemory = min(1<<20, math.MaxInt>>20)

// Limits bound each session, and TotalStreamMemory all of them.
type Limits struct {
	Associations   int `yaml:"associations,omitempty"`
	Streams        int `yaml:"streams,omitempty"`
	OpensPerSecond int `yaml:"opens_per_second,omitempty"`
	BytesPerSecond int `yaml:"bytes_per_second,omitempty"` // each way
	// In MiB: of one session, and of all.
	StreamMemory      int `yaml:"stream_memory,omitempty"`
	TotalStreamMemory int `yaml:"total_stream_memory,omitempty"`
}

// ReadCloudProxy reads and checks cloudproxy.yaml.
func ReadCloudProxy(file string) (*CloudProxy, error) {
	c := &CloudProxy{file: file}
	if err := read(file, c); err != nil {
		return nil, err
	}
	for _, name := range []*string{&c.Certificate.CertFile, &c.Certificate.KeyFile, &c.ResetKey, &c.Tokens.Revoked, &c.Log.AuditFile} {
		*name = beside(file, *name)
	}
	for i := range c.Tokens.PublicKeys {
		c.Tokens.PublicKeys[i] = beside(file, c.Tokens.PublicKeys[i])
	}
	if err := checked(file, c.Check); err != nil {
		return nil, err
	}
	return c, nil
}

// File is where the configuration was read; "": nowhere.
func (c *CloudProxy) File() string { return c.file }

// checkApps says what can not be in the App IDs.
func (c *CloudProxy) checkApps() error {
	seen := map[string]bool{}
	for _, a := range c.Apps {
		switch {
		case a.ID == "":
			return missing("apps.id", "the App ID that its tokens name")
		case seen[a.ID]:
			return tunnel.Errorf(tunnel.ConfigInvalid, "apps: the App ID %.80q stands twice", a.ID)
		case a.Sessions < 0 || a.Limits.Associations < 0 || a.Limits.Streams < 0 || a.Limits.OpensPerSecond < 0 || a.Limits.BytesPerSecond < 0:
			return tunnel.Errorf(tunnel.ConfigInvalid, "apps: a bound of %.80q is negative; leave it out for the general one", a.ID)
		}
		seen[a.ID] = true
		if a.Policy == nil {
			continue
		}
		if _, err := policy.New(*a.Policy); err != nil {
			return tunnel.Errorf(tunnel.PolicyInvalid, "apps: the policy of %.80q: %s", a.ID, tunnel.Sentence(err))
		}
	}
	return nil
}

// Check fills in defaults and says what is missing or can not be.
func (c *CloudProxy) Check() error {
	if c.Listen == "" {
		c.Listen = ":443"
	}
	if _, port, err := net.SplitHostPort(c.Listen); err != nil || port == "" {
		return tunnel.Errorf(tunnel.ConfigInvalid, "listen: %.60q is not ADDRESS:PORT; use :443 for every address", c.Listen)
	}
	if c.Address == "" {
		return missing("address", "HOST:443 under which sidecars reach this cloud proxy")
	}
	c.Address = WithPort(c.Address)
	if err := CheckAddress(c.Address); err != nil {
		return field("address", err)
	}
	for i := range c.Proxies {
		p := &c.Proxies[i]
		var err error
		if p.Address, err = cloudProxyAddress(p.Address); err != nil {
			return field("cloud_proxies.address", err)
		}
	}
	if err := c.Media.check(); err != nil {
		return err
	}
	if p := c.WebSocket.Path; p != "" && !strings.HasPrefix(p, "/") {
		return tunnel.Errorf(tunnel.ConfigInvalid, "websocket.path: %.60q does not begin with /; write a path such as /culvert", p)
	}
	if at := c.WebSocket.Listen; at != "" {
		if _, port, err := net.SplitHostPort(at); err != nil || port == "" {
			return tunnel.Errorf(tunnel.ConfigInvalid, "websocket.listen: %.60q is not ADDRESS:PORT such as 127.0.0.1:8080", at)
		}
		if c.WebSocket.Path == "" {
			return missing("websocket.path", "where what listens at websocket.listen answers, such as /culvert")
		}
	}
	if c.Certificate.CertFile == "" || c.Certificate.KeyFile == "" {
		return missing("certificate", "cert_file and key_file; 'culvert-cloudproxy init' makes both")
	}
	if len(c.Tokens.PublicKeys) == 0 {
		return missing("tokens.public_keys", "the file of the key that signs tokens; 'culvert-cloudproxy init' makes it")
	}
	if len(c.Policy.Profiles)+len(c.Policy.Rules) == 0 {
		return missing("policy", "what may be reached, and without it nothing may; 'profiles: [public]' allows every public address")
	}
	if _, err := policy.New(c.Policy); err != nil {
		return err
	}
	if err := c.checkApps(); err != nil {
		return err
	}
	if _, _, err := c.Egress.Addrs(); err != nil {
		return err
	}
	if _, err := c.Egress.PublicAddrs(); err != nil {
		return err
	}
	for name, n := range map[string]int{"limits.stream_memory": c.Limits.StreamMemory, "limits.total_stream_memory": c.Limits.TotalStreamMemory} {
		if n < 0 || n > maxStreamMemory {
			return tunnel.Errorf(tunnel.ConfigInvalid, "%s: %d is not a number of MiB up to %d", name, n, maxStreamMemory)
		}
	}
	for name, n := range map[string]int{"limits.associations": c.Limits.Associations, "limits.streams": c.Limits.Streams, "limits.opens_per_second": c.Limits.OpensPerSecond, "limits.bytes_per_second": c.Limits.BytesPerSecond, "egress.associations": c.Egress.Associations, "egress.streams": c.Egress.Streams} {
		if n < 0 {
			return tunnel.Errorf(tunnel.ConfigInvalid, "%s: %d is negative", name, n)
		}
	}
	return c.Log.check()
}
