package check

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"math/big"
	"net"
	"strings"
	"testing"
	"time"

	"culvert/tunnel"
)

// issue makes a certificate for a name. by is its CA; nil: it signs itself.
func issue(t *testing.T, name string, by *signer, from, to time.Time, but ...func(*x509.Certificate)) *signer {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	c := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name}, DNSNames: []string{name}, NotBefore: from, NotAfter: to}
	for _, change := range but {
		change(c)
	}
	s := &signer{c, key}
	if by == nil {
		by = s
		c.IsCA, c.BasicConstraintsValid, c.KeyUsage = true, true, x509.KeyUsageCertSign
	}
	der, err := x509.CreateCertificate(rand.Reader, c, by.cert, key.Public(), by.key)
	if err != nil {
		t.Fatal(err)
	}
	if s.cert, err = x509.ParseCertificate(der); err != nil {
		t.Fatal(err)
	}
	return s
}

type signer struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func TestWhatWasShownIsHeldAgainstWhatWasExpected(t *testing.T) {
	const name = "cloud.example.net"
	now := time.Date(2026, 11, 27, 12, 0, 0, 0, time.UTC)
	year := func(n int) time.Time { return now.AddDate(n, 0, 0) }
	ca, foreign := issue(t, "Good CA", nil, year(-5), year(5)), issue(t, "Hospital CA", nil, year(-5), year(5))
	leaf := issue(t, name, ca, year(-1), year(1))
	old := issue(t, name, ca, year(-2), year(-1))
	forged := issue(t, name, foreign, year(-1), year(1))
	portal := issue(t, "portal.example", foreign, year(-1), year(1))
	own, other := issue(t, name, nil, year(-1), year(1)), issue(t, name, nil, year(-1), year(1))
	ownOld := issue(t, name, nil, year(-2), year(-1))
	forgedOld := issue(t, name, foreign, year(-2), year(-1))
	fading := issue(t, "Fading CA", nil, year(-5), year(-1))
	outlives := issue(t, name, fading, year(-4), year(1))
	bare := issue(t, name, foreign, year(-1), year(1), func(c *x509.Certificate) { c.DNSNames = nil })
	nameless := issue(t, "", nil, year(-5), year(5), func(c *x509.Certificate) { c.Subject = pkix.Name{OrganizationalUnit: []string{"Web Gateway"}} })
	roots := x509.NewCertPool()
	roots.AddCert(ca.cert)
	roots.AddCert(fading.cert)
	for title, c := range map[string]struct {
		shown  *signer
		pin    *signer
		skew   time.Duration // known where it is not 0
		status Status
		code   tunnel.Code
		says   string
	}{
		"a CA's":                       {leaf, nil, 0, Good, "", `issued by "Good CA"`},
		"expired":                      {old, nil, 0, Failed, tunnel.CertificateUntrusted, "expired on 2025-11-27 12:00 UTC"},
		"expired by a wrong clock":     {old, nil, -500 * 24 * time.Hour, Failed, tunnel.ClockWrong, "12000h0m0s ahead"},
		"expired, the clock being off": {old, nil, time.Hour, Failed, tunnel.CertificateUntrusted, "expired"},
		"a foreign CA's":               {forged, nil, 0, Failed, tunnel.TLSIntercepted, `"Hospital CA"`},
		"another name's":               {portal, nil, 0, Failed, tunnel.CaptivePortal, `for "portal.example", issued by "Hospital CA"`},
		"its own, without a pin":       {own, nil, 0, Failed, tunnel.CertificateUntrusted, "signed by itself"},
		"pinned":                       {own, own, 0, Good, "", "as expected"},
		"pinned and expired":           {ownOld, ownOld, 0, Good, "", "as expected"},
		"pinned, of a CA":              {leaf, leaf, 0, Good, "", "as expected"},
		"another key":                  {other, own, 0, Failed, tunnel.CertificateUntrusted, tunnel.Pin(other.cert)},
		"pinned, inspected":            {forged, own, 0, Failed, tunnel.TLSIntercepted, `issued by "Hospital CA"`},
		"a foreign CA's, expired":      {forgedOld, nil, 0, Failed, tunnel.TLSIntercepted, `"Hospital CA"`},
		"its CA has expired":           {outlives, nil, 0, Failed, tunnel.CertificateUntrusted, `issued by "Fading CA", whose own has expired`},
		"inspected, without SANs":      {bare, own, 0, Failed, tunnel.TLSIntercepted, `issued by "Hospital CA"`},
		"inspected by a unit":          {issue(t, name, nameless, year(-1), year(1)), own, 0, Failed, tunnel.TLSIntercepted, `"OU=Web Gateway"`},
		"pinned, a portal":             {portal, own, 0, Failed, tunnel.CaptivePortal, tunnel.Pin(own.cert)},
	} {
		var pins []string
		if c.pin != nil {
			pins = []string{tunnel.Pin(c.pin.cert)}
		}
		v := judge([]*x509.Certificate{c.shown.cert}, pins, roots, name, now)
		o := v.outcome(c.skew != 0, c.skew, now)
		if o.Status != c.status || o.Code != c.code || !strings.Contains(o.Says, c.says) || (o.Do == "") != (o.Status == Good) {
			t.Errorf("%s: %+v", title, o)
		}
	}
	if o := judge(nil, nil, roots, name, now).outcome(false, 0, now); o.Status != Failed {
		t.Errorf("nothing shown: %+v", o)
	}
}

func TestInspectionByWhomTheOperatorTrustsIsNoFault(t *testing.T) {
	const name = "cloud.example.net"
	now := time.Now()
	ca, other := issue(t, "Hospital CA", nil, now.AddDate(-1, 0, 0), now.AddDate(1, 0, 0)), issue(t, "Hospital CA", nil, now.AddDate(-1, 0, 0), now.AddDate(1, 0, 0))
	own := issue(t, name, nil, now.AddDate(-1, 0, 0), now.AddDate(1, 0, 0))
	roots := x509.NewCertPool()
	roots.AddCert(ca.cert)
	for title, c := range map[string]struct {
		by    *signer
		names []string
		want  tunnel.Code
	}{
		"named":                      {ca, []string{"Other CA", "Hospital CA"}, ""},
		"not named":                  {ca, []string{"Other CA"}, tunnel.TLSIntercepted},
		"named, of the same name":    {other, []string{"Hospital CA"}, tunnel.TLSIntercepted},
		"nobody is, but it is known": {ca, nil, tunnel.TLSIntercepted},
	} {
		shown := []*x509.Certificate{issue(t, name, c.by, now.AddDate(-1, 0, 0), now.AddDate(0, 1, 0)).cert}
		v := judge(shown, []string{tunnel.Pin(own.cert)}, roots, name, now)
		v.inspected(shown, roots, name, c.names, now)
		if o := v.outcome(false, 0, now); o.Code != c.want || (o.Status == Good) != (c.want == "") || !strings.Contains(o.Says, "Hospital CA") {
			t.Errorf("%s: %+v", title, o)
		}
	}
}

// What is wrong with a certificate of an inspector that is trusted has to be said:
// that it is trusted everybody sees in the configuration.
func TestAnInspectorWhoIsTrustedAndShowsNothingGood(t *testing.T) {
	const name = "cloud.example.net"
	now := time.Now()
	ca := issue(t, "Hospital CA", nil, now.AddDate(-1, 0, 0), now.AddDate(1, 0, 0))
	roots := x509.NewCertPool()
	roots.AddCert(ca.cert)
	for why, shown := range map[string]*signer{
		"not valid for any names": issue(t, "192.0.2.1", ca, now.AddDate(0, -2, 0), now.AddDate(0, 1, 0), func(c *x509.Certificate) { c.DNSNames, c.IPAddresses = nil, []net.IP{{192, 0, 2, 1}} }),
		"expired":                 issue(t, name, ca, now.AddDate(0, -2, 0), now.AddDate(0, -1, 0)),
		"incompatible key usa":    issue(t, name, ca, now.AddDate(0, -2, 0), now.AddDate(0, 1, 0), func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth} }),
		"legacy Common Name":      issue(t, name, ca, now.AddDate(0, -2, 0), now.AddDate(0, 1, 0), func(c *x509.Certificate) { c.DNSNames = nil }),
	} {
		r := &run{host: "192.0.2.1", cfg: Config{Address: "192.0.2.1:443", TLS: &tls.Config{RootCAs: roots, ServerName: name}, Pins: []string{"sha256/x"}, Inspectors: []string{"Hospital CA"}, Now: time.Now}}
		o := r.verdict([]*x509.Certificate{shown.cert}).outcome(false, 0, now)
		if o.Code != tunnel.TLSIntercepted || !strings.Contains(o.Says, "trust_interception names it") || !strings.Contains(o.Says, why) {
			t.Errorf("%s: %+v", why, o)
		}
	}
}

// Some inspectors go by the address, and our name for the cloud proxy may be no other's.
func TestACertificateForTheAddressIsNoPortals(t *testing.T) {
	now := time.Now()
	ca := issue(t, "Hospital CA", nil, now.AddDate(-1, 0, 0), now.AddDate(1, 0, 0))
	for title, c := range map[string]struct {
		names []net.IP
		as    string
		want  tunnel.Code
	}{
		"an address":    {[]net.IP{{192, 0, 2, 1}}, "", tunnel.TLSIntercepted},
		"a subject":     {nil, "192.0.2.1", tunnel.TLSIntercepted},
		"another's":     {[]net.IP{{192, 0, 2, 2}}, "192.0.2.1", tunnel.CaptivePortal},
		"another name":  {nil, "portal.example", tunnel.CaptivePortal},
		"nobody at all": {nil, "", tunnel.CaptivePortal},
	} {
		shown := issue(t, c.as, ca, now.AddDate(-1, 0, 0), now.AddDate(1, 0, 0), func(x *x509.Certificate) { x.DNSNames, x.IPAddresses = nil, c.names })
		r := &run{host: "192.0.2.1", cfg: Config{Address: "192.0.2.1:443", TLS: &tls.Config{ServerName: "cloudproxy.culvert"}, Pins: []string{"sha256/x"}, Now: time.Now}}
		r.tls = r.verdict([]*x509.Certificate{shown.cert})
		o := r.tls.outcome(false, 0, now)
		if r.tls.foreign {
			o = r.portal(t.Context())
		}
		if o.Code != c.want || !strings.Contains(o.Says, "Hospital CA") {
			t.Errorf("%s: %+v", title, o)
		}
	}
}
