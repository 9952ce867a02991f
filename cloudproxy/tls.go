package cloudproxy

import (
	"crypto/tls"

	"culvert/tunnel"
)

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
