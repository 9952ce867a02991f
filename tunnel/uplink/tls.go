package uplink

import (
	"bytes"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
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
	// Inspectors are the common names of authorities that may open the outer TLS.
	Inspectors []string
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
			if slices.Contains(cfg.Pins, tunnel.Pin(s.PeerCertificates[0])) {
				return nil
			}
			return cfg.unpinned(s)
		}
	}
	return c, nil
}

// OuterTLS makes the TLS configuration around a WebSocket, inside which ClientTLS
// runs. It may end at a load balancer, or where somebody inspects: what it shows
// has to be pinned, or signed by an authority that is trusted here.
func OuterTLS(cfg TLSConfig) *tls.Config {
	return &tls.Config{
		InsecureSkipVerify: true, // VerifyConnection decides instead
		VerifyConnection: func(s tls.ConnectionState) error {
			if slices.Contains(cfg.Pins, tunnel.Pin(s.PeerCertificates[0])) {
				return nil
			}
			if _, err := cfg.chains(s); err != nil {
				return cfg.unpinned(s)
			}
			return nil
		},
	}
}

// Inspected is the cause of an error with the code tls_intercepted.
type Inspected struct {
	Issuer  string // who signed what was shown
	Trusted bool   // its authority is one of TLSConfig.Inspectors, and signed it indeed
}

func (i *Inspected) Error() string { return "TLS is opened by " + i.Issuer }

// unpinned names what shows a certificate that is not pinned. One that somebody
// has signed for the cloud proxy's name was made to be taken for it; one that
// signs itself, or is for another name, is another machine, or a new key.
func (cfg *TLSConfig) unpinned(s tls.ConnectionState) error {
	leaf := s.PeerCertificates[0]
	issuer := leaf.Issuer.CommonName
	if issuer == "" {
		issuer = leaf.Issuer.String()
	}
	if leaf.VerifyHostname(s.ServerName) != nil || bytes.Equal(leaf.RawIssuer, leaf.RawSubject) {
		return tunnel.Errorf(tunnel.CertificateUntrusted, "the certificate shown (issued by %.80q, pin %s) is not the pinned one; either something else answers at this address, or the cloud proxy has a new key and this sidecar needs its new culvert.yaml",
			issuer, tunnel.Pin(leaf))
	}
	why := &Inspected{Issuer: issuer}
	chains, err := cfg.chains(s)
	for _, chain := range chains {
		for _, by := range chain[1:] {
			why.Trusted = why.Trusted || slices.Contains(cfg.Inspectors, by.Subject.CommonName)
		}
	}
	do := "have IT exempt the cloud proxy's address, or, where inspection is meant to be, name that authority in cloud_proxy.trust_interception"
	if err != nil && slices.Contains(cfg.Inspectors, issuer) {
		do = fmt.Sprintf("cloud_proxy.trust_interception names it, but what it shows is not good (%.200q)", err.Error())
		if errors.As(err, new(x509.UnknownAuthorityError)) {
			do += "; where it is no authority of this system, put its certificate into cloud_proxy.ca_file"
		}
	}
	return &tunnel.Error{Code: tunnel.TLSIntercepted, Err: why, Text: fmt.Sprintf(
		"something on the way opens TLS: it shows a certificate for %s that %.80q has issued (pin %s), which is not the pinned one; %s. Or the cloud proxy has a new key, and this sidecar needs its new culvert.yaml",
		s.ServerName, issuer, tunnel.Pin(leaf), do)}
}

// chains verifies what was shown as if there were no pins.
func (cfg *TLSConfig) chains(s tls.ConnectionState) ([][]*x509.Certificate, error) {
	between := x509.NewCertPool()
	for _, c := range s.PeerCertificates[1:] {
		between.AddCert(c)
	}
	return s.PeerCertificates[0].Verify(x509.VerifyOptions{DNSName: s.ServerName, Roots: cfg.Roots, Intermediates: between})
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
