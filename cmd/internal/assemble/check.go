package assemble

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/netip"
	"net/url"
	"slices"
	"time"

	"culvert/cloudproxy/identity"
	"culvert/cmd/internal/config"
	"culvert/policy"
	"culvert/sidecar/capture"
	"culvert/sidecar/check"
	"culvert/sidecar/control"
	"culvert/tunnel"
	"culvert/tunnel/tunnelquic"
	"culvert/tunnel/uplink"
)

// NewCheck makes what 'culvert check' tests of a sidecar's configuration: one
// cloud proxy of it. beside is how a sidecar that runs here is asked.
//
// The test has a session of its own, beside that of a sidecar which runs. Its key
// is thrown away: the sidecar's would end the sidecar's session. Where the token
// is bound to the sidecar's key, that is used only while no sidecar runs.
func NewCheck(ctx context.Context, c *config.Sidecar, address string, beside *control.Client, now func() time.Time) (check.Config, error) {
	own := *c
	own.CloudProxy.Address = config.List{address}
	to, web, err := tunnel.ParseAddress(address)
	if err != nil {
		return check.Config{}, err
	}
	if capture.MayMark() != nil {
		own.Capture = nil // a socket that can not be marked would not be made
	}
	conf := check.Config{
		Address: to.String(), Web: web != nil, Mode: tunnel.Mode(c.Mode), Pins: c.CloudProxy.Pin, Inspectors: c.CloudProxy.TrustInterception,
		Destinations: checkDestinations(c.Policy), Now: now,
	}
	token, err := c.Identity.TokenNow()
	if err != nil {
		return conf, err
	}
	claims, err := identity.Unverified(token)
	if err != nil {
		return conf, err
	}
	conf.Setup = setup(c, claims, now())

	st, err := beside.Status(ctx)
	running := err == nil && st.State != "stopped" && st.State != "failed"
	if running && st.Link.Phase == tunnel.LinkUp {
		conf.Beside = beside.Media
	}
	for _, ch := range st.Channels {
		if ch.State == "live" {
			conf.Busy = fmt.Sprintf("%s is in a channel on this machine, which a test call would disturb; --media 10s makes one in spite of that", ch.Name)
		}
	}
	key, kerr := identity.GenerateKey()
	if claims.Key != "" {
		switch {
		case running:
			conf.Shared = "the token is bound to the key of the sidecar that runs here, whose session stands for the test's"
		case errors.Is(err, fs.ErrPermission):
			conf.Shared = "the token is bound to the sidecar's key, and whether that runs may not be asked by this user; check again with sudo"
		default:
			key, kerr = sidecarKey(c.Identity.KeyFile)
		}
	}
	if kerr != nil {
		return conf, kerr
	}
	roots, err := rootsFrom("cloud_proxy.ca_file", c.CloudProxy.CAFile)
	if err != nil {
		return conf, err
	}
	known := uplink.TLSConfig{Key: key, Pins: c.CloudProxy.Pin, Roots: roots, ServerName: c.CloudProxy.ServerName, ALPN: c.CloudProxy.ALPN}
	if conf.TLS, err = uplink.ClientTLS(known); err != nil {
		return conf, err
	}
	conf.TLS.Time = now
	log := slog.New(slog.DiscardHandler)
	p := protect(own.Capture)
	conf.Direct = p.dialer().DialContext
	conf.Lookup = func(ctx context.Context, host string) ([]netip.Addr, error) {
		return p.resolver.LookupNetIP(ctx, "ip", host)
	}
	if err := proxyStep(ctx, &own, p, &conf); err != nil {
		return conf, err
	}
	if conf.QUIC, err = tunnelquic.NewDialer(tunnelquic.Config{TLS: conf.TLS, Control: p.control, Resolver: p.resolver, Log: log}); err != nil {
		return conf, err
	}
	conf.Link, err = newUplink(&own, key, nil, nil, log)
	return conf, err
}

// proxyStep has the test go through an HTTP proxy where one leads to the cloud
// proxy, as the sidecar would.
func proxyStep(ctx context.Context, c *config.Sidecar, own protection, conf *check.Config) error {
	roots, err := rootsFrom("proxy.ca_file", c.Proxy.CAFile)
	if err != nil {
		return err
	}
	choose, err := chooseProxy(&c.Proxy, &tls.Config{RootCAs: roots}, own)
	if err != nil {
		return err
	}
	through, err := throughProxy(&c.Proxy, own)
	if err != nil {
		return err
	}
	asking, cancel := context.WithTimeout(ctx, proxyTime)
	defer cancel()
	ways, err := choose(asking, conf.Address)
	if err == nil && !slices.ContainsFunc(ways, func(u *url.URL) bool { return u != nil }) {
		return nil // directly
	}
	conf.Through = through.Dial
	conf.Proxy = func(ctx context.Context) check.Outcome {
		if err != nil {
			return check.ProxyOutcome("", err)
		}
		ctx, cancel := context.WithTimeout(ctx, proxyTime)
		defer cancel()
		c, err := through.Dial(ctx, "tcp", conf.Address)
		if err != nil {
			return check.ProxyOutcome("", err)
		}
		c.Close()
		via := ""
		if p, ok := c.(interface{ Via() string }); ok {
			via = p.Via()
		}
		return check.ProxyOutcome(via, nil)
	}
	return nil
}

// proxyTime bounds a connection through a proxy, and the choice of one.
const proxyTime = 5 * time.Second

// setup says what the configuration and the token are good for.
func setup(c *config.Sidecar, claims identity.Claims, now time.Time) check.Outcome {
	o := check.Outcome{Status: check.Good, Says: fmt.Sprintf("the configuration is understood; the token of App ID %q is good until %s", claims.App, claims.Expires.UTC().Format("2006-01-02 15:04 UTC"))}
	switch {
	case claims.App != c.Identity.App:
		o.Status, o.Code = check.Degraded, tunnel.TokenRejected
		o.Says = fmt.Sprintf("the configuration has App ID %q and the token is for %q", c.Identity.App, claims.App)
		o.Do = "get a token for this App ID, or correct identity.app"
	case now.After(claims.Expires):
		o.Status, o.Code = check.Degraded, tunnel.TokenExpired
		o.Says = fmt.Sprintf("by this machine's clock the token expired on %s", claims.Expires.UTC().Format("2006-01-02 15:04 UTC"))
		o.Do = "get a new token; if it has not expired, check this machine's clock"
	case !claims.Issued.IsZero() && now.Before(claims.Issued.Add(-identity.Skew)):
		o.Status, o.Code = check.Degraded, tunnel.ClockWrong
		o.Says = fmt.Sprintf("this machine's clock says that it is %s, before the token was issued", now.UTC().Format("2006-01-02 15:04 UTC"))
		o.Do = "set this machine's clock (turn on NTP), then check again"
	}
	return o
}

// checkDestinations are the single addresses and names that a policy allows, each
// with the first port of its rule.
func checkDestinations(c policy.Config) []check.Destination {
	p, err := policy.New(c)
	if err != nil {
		return nil // which has been told
	}
	var all []check.Destination
	seen := map[check.Destination]bool{}
	for _, r := range p.Rules() {
		if !r.Allow {
			continue
		}
		for _, to := range r.To {
			t := tunnel.Target{Host: to.Name}
			switch {
			case to.Word != "" || len(to.Name) > 0 && to.Name[0] == '*':
				continue
			case to.Prefix.IsValid() && to.Prefix.IsSingleIP():
				t.Addr = to.Prefix.Addr()
			case to.Name == "":
				continue
			}
			for _, proto := range []policy.Proto{policy.TCP, policy.UDP} {
				d := check.Destination{UDP: proto == policy.UDP, To: t}
				switch {
				case r.Proto&proto == 0:
					continue
				case len(r.Ports) > 0:
					d.To.Port = r.Ports[0].Low
				case d.UDP:
					d.To.Port = 3478
				default:
					d.To.Port = 443
				}
				if !seen[d] && p.Decide(proto, d.To).Allow {
					seen[d] = true
					all = append(all, d)
				}
			}
		}
	}
	return all
}
