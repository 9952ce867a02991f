package assemble

import (
	"crypto/ed25519"
	"crypto/tls"
	"log/slog"
	"net/netip"
	"time"

	"culvert/cloudproxy/identity"
	"culvert/cmd/internal/config"
	"culvert/policy"
)

// Embedded makes a cloud proxy inside this process, with throwaway keys, on
// loopback, and points the sidecar's configuration at it. Loopback and public
// targets are allowed.
func Embedded(c *config.Sidecar, log *slog.Logger) (*CloudProxy, error) {
	certPEM, keyPEM, err := CertificateFor(DefaultServerName)
	if err != nil {
		return nil, err
	}
	cert, err := tls.X509KeyPair(certPEM, keyPEM)
	if err != nil {
		return nil, err
	}
	pin, err := PinOf(cert)
	if err != nil {
		return nil, err
	}
	signer, err := identity.GenerateKey()
	if err != nil {
		return nil, err
	}
	keys := identity.NewKeys(signer.Public().(ed25519.PublicKey))
	now := time.Now()
	token, err := identity.Issue(signer, identity.Claims{App: "embedded", Concurrency: 1, Issued: now, Expires: now.AddDate(1, 0, 0)})
	if err != nil {
		return nil, err
	}
	allowed := policy.Config{Profiles: []string{"public"}}
	allowed.AllowCIDR(netip.MustParsePrefix("127.0.0.0/8"))
	allowed.AllowCIDR(netip.MustParsePrefix("::1/128"))
	pol, err := policy.New(allowed)
	if err != nil {
		return nil, err
	}
	cloud, err := NewCloudProxy(CloudProxyParts{
		Listen: "127.0.0.1:0", Certificate: cert, Rules: Rules{Keys: keys, Policy: pol}, Log: log,
		Drain: time.Millisecond, // the sidecar in the same process has waited already
	})
	if err != nil {
		return nil, err
	}
	c.CloudProxy = config.CloudProxyRef{Address: config.List{cloud.Addr.String()}, Pin: config.List{pin}, ServerName: DefaultServerName}
	c.Identity = config.Identity{App: "embedded", Token: token}
	return cloud, nil
}
