package cloudproxy

import (
	"crypto/tls"
	"slices"

	"culvert/tunnel"
)

// WithWeb lets peers in that offer none of the tunnel's protocols: they speak HTTP,
// and show no certificate. The tunnel's own TLS, with both certificates, runs
// inside a WebSocket then.
func WithWeb(c *tls.Config) *tls.Config {
	web := &tls.Config{MinVersion: tls.VersionTLS12, Certificates: c.Certificates, NextProtos: []string{"http/1.1"}} // inspecting proxies may not know 1.3
	both := c.Clone()
	both.GetConfigForClient = func(hello *tls.ClientHelloInfo) (*tls.Config, error) {
		if slices.ContainsFunc(c.NextProtos, func(p string) bool { return slices.Contains(hello.SupportedProtos, p) }) {
			return nil, nil
		}
		return web, nil
	}
	return both
}

// ServerTLS makes the TLS configuration of every listener. A client shows a
// certificate for the key that it is known by; who has signed it does not
// matter, since the session is bound to the key itself.
func ServerTLS(cert tls.Certificate, alpn []string) (*tls.Config, error) {
	if len(cert.Certificate) == 0 || cert.PrivateKey == nil {
		return nil, tunnel.Errorf(tunnel.ConfigInvalid, "the cloud proxy has no certificate; 'culvert-cloudproxy init' makes one")
	}
	if len(alpn) == 0 {
		return nil, tunnel.Errorf(tunnel.ConfigInvalid, "the cloud proxy has no application protocol (ALPN) to offer")
	}
	return &tls.Config{
		MinVersion:   tls.VersionTLS13,
		Certificates: []tls.Certificate{cert},
		NextProtos:   alpn,
		ClientAuth:   tls.RequireAnyClientCert,
	}, nil
}
