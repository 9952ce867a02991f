package tunnel

import (
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"strings"
)

// pinPrefix names the hash, as HPKP (RFC 7469 §2.4) and curl --pinnedpubkey do.
const pinPrefix = "sha256/"

// Pin returns the pin of a certificate's public key: "sha256/" and the base64
// of the SHA-256 of its SubjectPublicKeyInfo. A new certificate for the same
// key keeps its pin.
func Pin(c *x509.Certificate) string {
	h := sha256.Sum256(c.RawSubjectPublicKeyInfo)
	return pinPrefix + base64.StdEncoding.EncodeToString(h[:])
}

// ParsePin checks that s can be a pin.
func ParsePin(s string) (string, error) {
	rest, ok := strings.CutPrefix(s, pinPrefix)
	if b, err := base64.StdEncoding.DecodeString(rest); !ok || err != nil || len(b) != sha256.Size {
		return "", Errorf(ConfigInvalid, "%q is not a certificate pin; a pin is sha256/ and 44 characters of base64, as 'culvert-cloudproxy init' prints it", s)
	}
	return s, nil
}
