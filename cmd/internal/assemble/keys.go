package assemble

import (
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"io/fs"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"time"

	"culvert/cloudproxy/identity"
	"culvert/tunnel"
)

// CertificateFor makes a self-signed certificate and key for a host, which is
// a name or an address, and for the name DefaultServerName. It is meant to be
// pinned; it is good for ten years since what counts is the pin.
func CertificateFor(host string) (certPEM, keyPEM []byte, err error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, err
	}
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127))
	if err != nil {
		return nil, nil, err
	}
	now := time.Now()
	t := &x509.Certificate{
		SerialNumber: serial,
		Subject:      pkix.Name{CommonName: host},
		DNSNames:     []string{DefaultServerName},
		NotBefore:    now.Add(-time.Hour), // clocks differ
		NotAfter:     now.AddDate(10, 0, 0),
		KeyUsage:     x509.KeyUsageDigitalSignature,
		ExtKeyUsage:  []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	if ip := net.ParseIP(host); ip != nil {
		t.IPAddresses = []net.IP{ip}
	} else if host != DefaultServerName {
		t.DNSNames = append(t.DNSNames, host)
	}
	der, err := x509.CreateCertificate(rand.Reader, t, t, key.Public(), key)
	if err != nil {
		return nil, nil, err
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, nil, err
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: pkcs8}), nil
}

// DefaultServerName is the name in a certificate made for an address, since
// the SNI must always be a name.
const DefaultServerName = "cloudproxy.culvert"

// LoadCertificate reads a chain and its key.
func LoadCertificate(certFile, keyFile string) (tls.Certificate, error) {
	c, err := tls.LoadX509KeyPair(certFile, keyFile)
	if err != nil {
		return c, tunnel.Errorf(tunnel.ConfigInvalid, "the certificate %s with the key %s can not be used: %w", certFile, keyFile, err)
	}
	return c, nil
}

// PinOf returns the pin of a certificate's public key.
func PinOf(c tls.Certificate) (string, error) {
	leaf, err := x509.ParseCertificate(c.Certificate[0])
	if err != nil {
		return "", err
	}
	return tunnel.Pin(leaf), nil
}

// sidecarKey reads the sidecar's key, or makes it where the file is missing.
// Without a file it is kept in the service's state directory (systemd's
// StateDirectory=), and where there is none it is new at each start.
func sidecarKey(file string) (ed25519.PrivateKey, error) {
	if dir := os.Getenv("STATE_DIRECTORY"); file == "" && dir != "" {
		file = filepath.Join(dir, "sidecar.key")
	}
	if file == "" {
		return identity.GenerateKey()
	}
	key, err := identity.LoadKey(file)
	if !errors.Is(err, fs.ErrNotExist) {
		return key, err
	}
	if key, err = identity.GenerateKey(); err != nil {
		return nil, err
	}
	return key, identity.SaveKey(file, key)
}

// WriteNew writes a file that must not exist yet.
func WriteNew(file string, data []byte, mode fs.FileMode) error {
	f, err := os.OpenFile(file, os.O_WRONLY|os.O_CREATE|os.O_EXCL, mode)
	if errors.Is(err, fs.ErrExist) {
		return tunnel.Errorf(tunnel.ConfigInvalid, "%s is there already and is not overwritten; choose another folder, or move it away", file)
	}
	if err != nil {
		return tunnel.Errorf(tunnel.ConfigInvalid, "%s can not be made: %w", file, errors.Unwrap(err))
	}
	_, err = f.Write(data)
	return errors.Join(err, f.Close())
}
