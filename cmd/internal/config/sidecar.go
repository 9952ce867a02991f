package config

import (
	"net"
	"net/netip"
	"strings"
	"time"

	"culvert/policy"
	"culvert/tunnel"
	"culvert/tunnel/httpproxy"
)

// Sidecar is culvert.yaml.
type Sidecar struct {
	CloudProxy  CloudProxyRef `yaml:"cloud_proxy"`
	Identity    Identity      `yaml:"identity"`
	Proxy       HTTPProxy     `yaml:"proxy,omitempty"`
	Front       Front         `yaml:"front,omitempty"`
	Control     Control       `yaml:"control,omitempty"`
	Mode        string        `yaml:"mode,omitempty"`         // auto, udp or tcp
	Start       string        `yaml:"start,omitempty"`        // auto or manual
	WhenStopped string        `yaml:"when_stopped,omitempty"` // refuse or direct
	StopWait    Duration      `yaml:"stop_wait,omitempty"`    // how long SIGTERM waits for a channel to end
	Capture     *Capture      `yaml:"capture,omitempty"`      // nil: nothing is captured
	Media       Media         `yaml:"media,omitempty"`
	Policy      policy.Config `yaml:"policy,omitempty"`
	Log         Log           `yaml:"log,omitempty"`

	file string // where it was read
}

// CloudProxyRef says where the cloud proxy is and how it is known.
type CloudProxyRef struct {
	Address    List   `yaml:"address"` // HOST:PORT or wss://HOST/PATH, in order of preference
	Pin        List   `yaml:"pin,omitempty"`
	ServerName string `yaml:"server_name,omitempty"`
	CAFile     string `yaml:"ca_file,omitempty"`
	ALPN       string `yaml:"alpn,omitempty"`
	// TrustInterception are common names of authorities that may open the outer TLS.
	TrustInterception List `yaml:"trust_interception,omitempty"`
}

// Identity is who the sidecar is.
type Identity struct {
	App       string `yaml:"app"`
	Token     string `yaml:"token,omitempty"`
	TokenFile string `yaml:"token_file,omitempty"`
	KeyFile   string `yaml:"key_file,omitempty"` // made when missing; empty: a new key at each start
	Region    string `yaml:"region,omitempty"`
	Operator  string `yaml:"operator,omitempty"`
}

// HTTPProxy is the HTTP proxy on the way to the cloud proxy. With neither URL nor
// PAC the environment says which: HTTPS_PROXY, NO_PROXY.
type HTTPProxy struct {
	URL          string `yaml:"url,omitempty"` // http://HOST:PORT, https://HOST:PORT or none
	PAC          string `yaml:"pac,omitempty"` // a file, or an http or https URL, that says which
	User         string `yaml:"user,omitempty"`
	PasswordFile string `yaml:"password_file,omitempty"`
	NoProxy      List   `yaml:"no_proxy,omitempty"` // as in NO_PROXY
	CAFile       string `yaml:"ca_file,omitempty"`  // for https://, of the proxy or of the PAC file
}

// NoProxy as the URL goes directly, whatever the environment says.
const NoProxy = "none"

// Front is the proxy for apps.
type Front struct {
	Listen         string `yaml:"listen,omitempty"`
	User           string `yaml:"user,omitempty"`
	PasswordFile   string `yaml:"password_file,omitempty"`
	MaxConnections int    `yaml:"max_connections,omitempty"`
	Users          List   `yaml:"users,omitempty"` // of this machine, names or numbers; empty: all
}

// Control is the control socket.
type Control struct {
	Path  string `yaml:"path,omitempty"`
	Group string `yaml:"group,omitempty"` // its members may control the sidecar; empty: the user alone
	// A listener for what can not use the socket, and what it asks for.
	Listen    string `yaml:"listen,omitempty"`
	TokenFile string `yaml:"token_file,omitempty"`
}

// Media is how datagrams are treated.
type Media struct {
	MaxWait Duration `yaml:"max_wait,omitempty"` // how long one may wait before it is dropped
}

// Log is what is written to standard error.
type Log struct {
	Level  string `yaml:"level,omitempty"`  // debug, info, warn or error
	Format string `yaml:"format,omitempty"` // text or json
	// AuditFile gets the lines about who did what, too, as JSON.
	AuditFile string `yaml:"audit_file,omitempty"`
}

// DefaultListen is where apps find the proxy.
const DefaultListen = "127.0.0.1:1080"

// ReadSidecar reads and checks culvert.yaml.
func ReadSidecar(file string) (*Sidecar, error) {
	c := &Sidecar{file: file}
	if err := read(file, c); err != nil {
		return nil, err
	}
	for _, name := range []*string{&c.CloudProxy.CAFile, &c.Proxy.PasswordFile, &c.Proxy.CAFile, &c.Identity.TokenFile, &c.Identity.KeyFile, &c.Front.PasswordFile, &c.Control.TokenFile, &c.Log.AuditFile} {
		*name = beside(file, *name)
	}
	if !strings.Contains(c.Proxy.PAC, "://") {
		c.Proxy.PAC = beside(file, c.Proxy.PAC)
	}
	if err := checked(file, c.Check); err != nil {
		return nil, err
	}
	return c, nil
}

// File is where the configuration was read; "": nowhere.
func (c *Sidecar) File() string { return c.file }

// Located gives an error about what a key of the file names, such as a user or a
// file, the file's name and the line.
func (c *Sidecar) Located(err error) error {
	if c.file != "" && tunnel.CodeOf(err) == tunnel.ConfigInvalid {
		if line := lineIn(c.file, err); line > 0 {
			return atLine(c.file, line, err)
		}
	}
	return err
}

// Check fills in defaults and says what is missing or can not be.
func (c *Sidecar) Check() error {
	if c.Front.Listen == "" {
		c.Front.Listen = DefaultListen
	}
	if _, port, err := net.SplitHostPort(c.Front.Listen); err != nil || port == "" {
		return tunnel.Errorf(tunnel.ConfigInvalid, "front.listen: %.60q is not ADDRESS:PORT such as %s", c.Front.Listen, DefaultListen)
	}
	if c.Front.MaxConnections < 0 {
		return tunnel.Errorf(tunnel.ConfigInvalid, "front.max_connections: %d is negative; leave it out for the default", c.Front.MaxConnections)
	}
	if err := c.Control.check(); err != nil {
		return err
	}
	if err := c.Media.check(); err != nil {
		return err
	}
	if c.Capture != nil {
		if err := c.Capture.Check(); err != nil {
			return err
		}
	}
	if len(c.CloudProxy.Address) == 0 {
		return missing("cloud_proxy.address", "HOST:443 of the cloud proxy")
	}
	inside := len(c.CloudProxy.TrustInterception) > 0 // the tunnel's TLS runs, or may run, inside another
	for i, a := range c.CloudProxy.Address {
		a, err := cloudProxyAddress(a)
		if err != nil {
			return field("cloud_proxy.address", err)
		}
		c.CloudProxy.Address[i] = a
		inside = inside || strings.Contains(a, "://")
	}
	if inside && len(c.CloudProxy.Pin) == 0 {
		return missing("cloud_proxy.pin", "what the tunnel's own TLS goes by where another one is around it (wss:// or trust_interception); 'culvert-cloudproxy init' prints it")
	}
	for _, p := range c.CloudProxy.Pin {
		if _, err := tunnel.ParsePin(p); err != nil {
			return field("cloud_proxy.pin", err)
		}
	}
	if c.CloudProxy.ServerName == "" {
		if to, _, _ := tunnel.ParseAddress(c.CloudProxy.Address[0]); to.Host != "" {
			c.CloudProxy.ServerName = to.Host
		} else {
			return missing("cloud_proxy.server_name", "the name in the cloud proxy's certificate; the address is a number and tells none")
		}
	}
	if c.Identity.App == "" {
		return missing("identity.app", "the App ID")
	}
	if (c.Identity.Token == "") == (c.Identity.TokenFile == "") {
		return tunnel.Errorf(tunnel.ConfigInvalid, "identity: it needs either token or token_file")
	}
	if (c.Front.User == "") != (c.Front.PasswordFile == "") {
		return tunnel.Errorf(tunnel.ConfigInvalid, "front: it needs both user and password_file, or neither")
	}
	if err := c.Proxy.check(); err != nil {
		return err
	}
	if _, err := tunnel.ParseMode(c.Mode); err != nil {
		return field("mode", err)
	}
	if err := oneOf("start", &c.Start, "auto", "manual"); err != nil {
		return err
	}
	if err := oneOf("when_stopped", &c.WhenStopped, "refuse", "direct"); err != nil {
		return err
	}
	if _, err := policy.New(c.Policy); err != nil {
		return err
	}
	return c.Log.check()
}

func (p *HTTPProxy) check() error {
	if p.URL != "" && p.URL != NoProxy {
		if _, err := httpproxy.ParseURL(p.URL); err != nil {
			return field("proxy.url", err)
		}
	}
	switch scheme, _, isURL := strings.Cut(p.PAC, "://"); {
	case p.PAC != "" && p.URL != "":
		return tunnel.Errorf(tunnel.ConfigInvalid, "proxy: url and pac say both which proxy it is; leave one out")
	case isURL && scheme != "http" && scheme != "https":
		return tunnel.Errorf(tunnel.ConfigInvalid, "proxy.pac: %.60q is neither a file nor an http or https URL", p.PAC)
	}
	if strings.Contains(p.User, ":") { // RFC 7617 §2
		return tunnel.Errorf(tunnel.ConfigInvalid, "proxy.user: a user name can not hold a colon")
	}
	if (p.User == "") != (p.PasswordFile == "") {
		return tunnel.Errorf(tunnel.ConfigInvalid, "proxy: it needs both user and password_file, or neither")
	}
	return nil
}

// minControlToken is the least that a token must have, in bytes: nobody tries 16
// random ones.
const minControlToken = 16

func (c *Control) check() error {
	if (c.Listen == "") != (c.TokenFile == "") {
		return tunnel.Errorf(tunnel.ConfigInvalid, "control: it needs both listen and token_file, or neither")
	}
	if c.Listen == "" {
		return nil
	}
	a, err := netip.ParseAddrPort(c.Listen)
	if err != nil || !a.Addr().IsLoopback() {
		return tunnel.Errorf(tunnel.ConfigInvalid, "control.listen: %.60q is not a loopback ADDRESS:PORT such as 127.0.0.1:1081; whoever reaches it hears the token", c.Listen)
	}
	return nil
}

// Token reads the token that the listener asks for.
func (c *Control) Token() (string, error) {
	t, err := secret(c.TokenFile)
	if err != nil {
		return "", field("control.token_file", err)
	}
	if len(t) < minControlToken {
		return "", tunnel.Errorf(tunnel.ConfigInvalid, "control.token_file: %s holds %d bytes, and at least %d are needed; 'openssl rand -hex 16' makes a token", c.TokenFile, len(t), minControlToken)
	}
	return t, nil
}

// maxWait is more than any call can use, and less than what a lane's 16-bit
// send time can tell.
const maxWait = Duration(10 * time.Second)

func (m *Media) check() error {
	if m.MaxWait > maxWait {
		return tunnel.Errorf(tunnel.ConfigInvalid, "media.max_wait: %s is more than %s; a packet that late is of no use to a call", time.Duration(m.MaxWait), time.Duration(maxWait))
	}
	return nil
}

func (l *Log) check() error {
	if err := oneOf("log.level", &l.Level, "info", "debug", "warn", "error"); err != nil {
		return err
	}
	return oneOf("log.format", &l.Format, "text", "json")
}

// Token returns the token, from its file where it has one.
func (i *Identity) TokenNow() (string, error) {
	if i.TokenFile == "" {
		return i.Token, nil
	}
	t, err := secret(i.TokenFile)
	if err != nil {
		return "", field("identity.token_file", err)
	}
	return t, nil
}

// Password returns the front's password; empty without authentication.
func (f *Front) Password() (string, error) { return password("front.password_file", f.PasswordFile) }

// Credentials returns who we are to the proxy, with the password as the file has
// it now. Empty: nobody.
func (p *HTTPProxy) Credentials() (user, pass string, err error) {
	pass, err = password("proxy.password_file", p.PasswordFile)
	return p.User, pass, err
}

// password reads the file that a key names; empty without one.
func password(key, file string) (string, error) {
	if file == "" {
		return "", nil
	}
	p, err := secret(file)
	if err != nil {
		return "", field(key, err)
	}
	if p == "" {
		err = tunnel.Errorf(tunnel.ConfigInvalid, "%s: %s is empty", key, file)
	}
	return p, err
}

// CheckAddress checks HOST:PORT, where HOST is an address or a name that DNS
// could know.
func CheckAddress(a string) error {
	t, err := tunnel.ParseTarget(a)
	if err != nil {
		return err
	}
	for _, r := range t.Host + t.Addr.Zone() {
		if r != '-' && r != '_' && r != '.' && !('0' <= r && r <= '9') && !('a' <= r && r <= 'z') && !('A' <= r && r <= 'Z') {
			return tunnel.Errorf(tunnel.ConfigInvalid, "%.60q is not a host name (%q does not belong in one); write international names as xn--…", t.Host, r)
		}
	}
	return nil
}

// cloudProxyAddress checks HOST, HOST:PORT or wss://HOST[:PORT]/PATH, and gives the
// first its port.
func cloudProxyAddress(a string) (string, error) {
	if !strings.Contains(a, "://") {
		a = WithPort(a)
	}
	to, _, err := tunnel.ParseAddress(a)
	if err != nil {
		return a, err
	}
	return a, CheckAddress(to.String())
}

// WithPort adds Culvert's port, 443, to an address without one.
func WithPort(a string) string {
	if _, _, err := net.SplitHostPort(a); err == nil {
		return a
	}
	return net.JoinHostPort(strings.Trim(a, "[]"), "443")
}

func missing(key, what string) error {
	return tunnel.Errorf(tunnel.ConfigInvalid, "%s is missing; it is %s", key, what)
}

func field(key string, err error) error {
	return &tunnel.Error{Code: tunnel.ConfigInvalid, Text: key + ": " + tunnel.Sentence(err), Err: err}
}

// oneOf checks a word; an empty one becomes the first choice.
func oneOf(key string, word *string, choices ...string) error {
	if *word == "" {
		*word = choices[0]
	}
	for _, c := range choices {
		if *word == c {
			return nil
		}
	}
	return tunnel.Errorf(tunnel.ConfigInvalid, "%s: %.40q is none of %s", key, *word, strings.Join(choices, ", "))
}
