package uplink

import (
	"crypto/ed25519"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"math/big"
	"net"
	"slices"
	"time"

	"culvert/tunnel"
)

// DefaultALPN is the application protocol that both ends offer.
const DefaultALPN = "culvert/1"

// TLSConfig is what the sidecar knows about its own key and the cloud proxy's
// certificate.
type TLSConfig struct {
	Key        ed25519.PrivateKey // proves who the sidecar is
	Pins       []string           // accepted public keys, see tunnel.Pin; empty: the certificate is verified by Roots
	Roots      *x509.CertPool     // nil: the system's
	ServerName string             // the SNI, and the name in the certificate where there is no pin; always a name
	ALPN       string             // empty: DefaultALPN
}

// ClientTLS makes the TLS configuration of every connection to a cloud proxy.
// With pins, the public key alone decides: a chain that some other authority
// has signed is refused, whatever the system trusts.
func ClientTLS(cfg TLSConfig) (*tls.Config, error) {
	if len(cfg.Key) != ed25519.PrivateKeySize {
		return nil, tunnel.Errorf(tunnel.ConfigInvalid, "the sidecar has no Ed25519 key")
	}
	if cfg.ServerName == "" || net.ParseIP(cfg.ServerName) != nil {
		return nil, tunnel.Errorf(tunnel.ConfigInvalid, "the server name %q is not a name; set cloud_proxy.server_name to the name in the cloud proxy's certificate", cfg.ServerName)
	}
	for _, p := range cfg.Pins {
		if _, err := tunnel.ParsePin(p); err != nil {
			return nil, err
		}
	}
	cert, err := clientCertificate(cfg.Key)
	if err != nil {
		return nil, err
	}
	if cfg.ALPN == "" {
		cfg.ALPN = DefaultALPN
	}
	c := &tls.Config{
		MinVersion:   tls.VersionTLS13,
		Certificates: []tls.Certificate{cert},
		ServerName:   cfg.ServerName,
		RootCAs:      cfg.Roots,
		NextProtos:   []string{cfg.ALPN},
	}
	if len(cfg.Pins) > 0 {
		c.InsecureSkipVerify = true // VerifyConnection decides instead, on every handshake
		c.VerifyConnection = func(s tls.ConnectionState) error {
			shown := tunnel.Pin(s.PeerCertificates[0])
			if slices.Contains(cfg.Pins, shown) {
				return nil
			}
			return tunnel.Errorf(tunnel.CertificateUntrusted, "the certificate shown (issued by %q, pin %s) is not the pinned one; either something between here and the cloud proxy inspects TLS, or the cloud proxy has a new key and this sidecar needs its new culvert.yaml",
				s.PeerCertificates[0].Issuer.CommonName, shown)
		}
	}
	return c, nil
}

// clientCertificate wraps the sidecar's key. Only the key counts at the cloud
// proxy, so the certificate neither names nor limits anything.
func clientCertificate(key ed25519.PrivateKey) (tls.Certificate, error) {
	t := &x509.Certificate{
		SerialNumber: big.NewInt(1),
		Subject:      pkix.Name{CommonName: "sidecar"},
		NotBefore:    time.Unix(0, 0),
		NotAfter:     time.Date(9999, 12, 31, 23, 59, 59, 0, time.UTC), // RFC 5280 §4.1.2.5: no end
	}
	der, err := x509.CreateCertificate(rand.Reader, t, t, key.Public(), key)
	if err != nil {
		return tls.Certificate{}, err
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, nil
}
