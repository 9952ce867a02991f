package main

import (
	"bytes"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/tls"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"time"

	"github.com/urfave/cli/v2"
	"go.yaml.in/yaml/v3"

	"culvert/cloudproxy/identity"
	"culvert/cmd/internal/assemble"
	"culvert/cmd/internal/config"
	"culvert/policy"
	"culvert/tunnel"
)

func initCommand() *cli.Command {
	return &cli.Command{
		Name:  "init",
		Usage: "make keys, a certificate, a token, cloudproxy.yaml, and a ready culvert.yaml for a sidecar",
		Flags: []cli.Flag{
			&cli.StringFlag{Name: "host", Usage: "sidecars reach this cloud proxy at `HOST[:PORT]`, a name or an address (port 443)"},
			&cli.StringFlag{Name: "dir", Usage: "write everything into the folder `DIR`"},
			&cli.StringSliceFlag{Name: "profile", Usage: "allow the destinations of the built-in profile `NAME`; can be repeated"},
			&cli.StringSliceFlag{Name: "allow", Usage: "allow the destinations in `CIDR`, private ones too; can be repeated"},
			&cli.StringFlag{Name: "cert", Usage: "use the certificate chain in `FILE` (PEM) instead of making one"},
			&cli.StringFlag{Name: "key", Usage: "the certificate's key is in `FILE` (PEM)"},
			&cli.StringFlag{Name: "app", Value: "default", Usage: "the token is for the App ID `ID`"},
			&cli.StringFlag{Name: "region", Usage: "this cloud proxy's region, told to sidecars"},
			&cli.IntFlag{Name: "concurrency", Value: 100, Usage: "the token allows `N` sidecars at once"},
			&cli.DurationFlag{Name: "for", Value: 90 * 24 * time.Hour, Usage: "the token is good for `TIME`"},
		},
		OnUsageError: onUsage("init"),
		Action:       runInit,
	}
}

// plan is what init is asked for, checked.
type plan struct {
	host, port string
	dir        string
	policy     policy.Config
	cert, key  []byte // PEM
	pin        string
	serverName string
}

func planOf(c *cli.Context) (*plan, error) {
	p := &plan{dir: c.String("dir")}
	switch {
	case c.NArg() > 0:
		return nil, usageError("culvert-cloudproxy init takes no arguments, %q is one; see --help", c.Args().First())
	case c.String("host") == "" || p.dir == "":
		return nil, usageError("culvert-cloudproxy init needs --host HOST and --dir DIR")
	case (c.String("cert") == "") != (c.String("key") == ""):
		return nil, usageError("--cert and --key belong together")
	case c.Int("concurrency") < 1 || c.Duration("for") <= 0:
		return nil, usageError("--concurrency and --for must be positive")
	}
	address := config.WithPort(c.String("host"))
	if err := config.CheckAddress(address); err != nil {
		return nil, usageError("--host: %s", tunnel.Sentence(err))
	}
	p.host, p.port, _ = net.SplitHostPort(address)

	p.policy.Profiles = c.StringSlice("profile")
	for _, s := range c.StringSlice("allow") {
		prefix, err := netip.ParsePrefix(s)
		if err != nil {
			return nil, usageError("--allow: %.60q is not a CIDR such as 10.1.0.0/16 or 192.0.2.7/32", s)
		}
		p.policy.AllowCIDR(prefix)
	}
	if len(p.policy.Profiles)+len(p.policy.Rules) == 0 {
		return nil, usageError("nothing would be allowed; name destinations with --profile (public, for every public address) or --allow CIDR")
	}
	if _, err := policy.New(p.policy); err != nil {
		return nil, err
	}
	return p, p.certificate(c.String("cert"), c.String("key"))
}

// certificate reads the given certificate, or makes one.
func (p *plan) certificate(certFile, keyFile string) (err error) {
	if certFile == "" {
		p.cert, p.key, err = assemble.CertificateFor(p.host)
	} else if p.cert, err = os.ReadFile(certFile); err == nil {
		p.key, err = os.ReadFile(keyFile)
	}
	if err != nil {
		return usageError("the certificate can not be read: %w", err)
	}
	pair, err := tls.X509KeyPair(p.cert, p.key)
	if err != nil {
		return usageError("%s and %s are not a certificate and its key: %w", certFile, keyFile, err)
	}
	if p.pin, err = assemble.PinOf(pair); err != nil {
		return err
	}
	p.serverName = p.host
	if net.ParseIP(p.host) != nil {
		p.serverName = assemble.DefaultServerName
	}
	return nil
}

func runInit(c *cli.Context) error {
	p, err := planOf(c)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(p.dir, 0o755); err != nil {
		return usageError("the folder %s can not be made: %w", p.dir, err)
	}
	in := func(name string) string { return filepath.Join(p.dir, name) }
	files := []string{"cert.pem", "key.pem", "reset.key", "token.key", "token.pub", revokedName, issuedName, "cloudproxy.yaml", "culvert.yaml"}
	for _, name := range files { // all or nothing
		if _, err := os.Lstat(in(name)); err == nil {
			return usageError("%s is there already and is not overwritten; choose another --dir, or move it away", in(name))
		}
	}
	signer, err := identity.GenerateKey()
	if err != nil {
		return err
	}
	now := time.Now().Truncate(time.Second) // as tokens tell it
	claims := identity.Claims{App: c.String("app"), Region: c.String("region"), Concurrency: c.Int("concurrency"), Issued: now, Expires: now.Add(c.Duration("for")), ID: identity.NewID()}
	token, err := identity.Issue(signer, claims)
	if err != nil {
		return err
	}
	address := net.JoinHostPort(p.host, p.port)
	far, err := document("The cloud proxy's configuration; docs/configuration.md has every key.", config.CloudProxy{
		Listen: ":" + p.port, Address: address, Region: c.String("region"),
		Certificate: config.Certificate{CertFile: "cert.pem", KeyFile: "key.pem"}, ResetKey: "reset.key",
		Tokens: config.Tokens{PublicKeys: config.List{"token.pub"}, Revoked: revokedName}, Policy: p.policy,
	})
	if err != nil {
		return err
	}
	near, err := document("A sidecar's configuration. It holds a token: keep it from other users.", config.Sidecar{
		CloudProxy: config.CloudProxyRef{Address: config.List{address}, Pin: config.List{p.pin}, ServerName: p.serverName},
		Identity:   config.Identity{App: c.String("app"), Token: token, Region: c.String("region")},
		Policy:     p.policy,
	})
	if err != nil {
		return err
	}
	reset := make([]byte, 32)
	rand.Read(reset) // never fails
	if err := identity.SaveKey(in("token.key"), signer); err != nil {
		return err
	}
	if err := identity.SavePublicKey(in("token.pub"), signer.Public().(ed25519.PublicKey)); err != nil {
		return err
	}
	if err := identity.NewRevoked(in(revokedName)); err != nil {
		return err
	}
	if err := identity.AppendIssued(in(issuedName), claims); err != nil {
		return err
	}
	for _, f := range []struct {
		name string
		data []byte
		mode os.FileMode
	}{
		{"cert.pem", p.cert, 0o644}, {"key.pem", p.key, 0o600}, {"reset.key", reset, 0o600},
		{"cloudproxy.yaml", far, 0o644}, {"culvert.yaml", near, 0o600},
	} {
		if err := assemble.WriteNew(in(f.name), f.data, f.mode); err != nil {
			return err
		}
	}
	_, err = fmt.Fprintf(c.App.Writer, `Made in %s:
  cert.pem key.pem       the certificate, pin %s
  token.key token.pub    what signs tokens; 'culvert-cloudproxy token new' makes more
  token.revoked          which are accepted no longer: 'culvert-cloudproxy token revoke'
  token.issued           what was signed, for 'culvert-cloudproxy token list'; holds no token
  reset.key              lets sidecars notice a restart at once
  cloudproxy.yaml        run here:     culvert-cloudproxy run -c %s
  culvert.yaml           take it to the sidecar's machine: culvert run -c culvert.yaml
The token for App ID %q allows %d sidecars at once, until %s.
`, p.dir, p.pin, in("cloudproxy.yaml"), c.String("app"), c.Int("concurrency"), now.Add(c.Duration("for")).UTC().Format(time.RFC3339))
	return err
}

// document writes a configuration with a comment above it.
func document(head string, v any) ([]byte, error) {
	var b bytes.Buffer
	fmt.Fprintf(&b, "# %s\n", head)
	e := yaml.NewEncoder(&b)
	e.SetIndent(2)
	if err := e.Encode(v); err != nil {
		return nil, err
	}
	return b.Bytes(), e.Close()
}
