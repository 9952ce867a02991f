package check

import (
	"cmp"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"culvert/tunnel"
)

// A verdict is about the certificates that were shown.
type verdict struct {
	address  string
	leaf     *x509.Certificate
	code     tunnel.Code // "": they are what was expected
	date     bool        // only their dates are wrong
	foreign  bool        // they are another server's
	own      bool        // the leaf is signed by itself
	expected string
	// inspector is who opens TLS and may; the tunnel's own runs inside.
	inspector string
	// unfit is why whoever may open TLS did not do so with a good certificate.
	unfit error
}

// judge holds what was shown against what was expected, as the sidecar does:
// with pins the key alone decides.
func judge(shown []*x509.Certificate, pins []string, roots *x509.CertPool, name string, now time.Time) verdict {
	if len(shown) == 0 {
		return verdict{code: tunnel.CertificateUntrusted, expected: "a certificate"}
	}
	v := verdict{leaf: shown[0], own: shown[0].CheckSignatureFrom(shown[0]) == nil || string(shown[0].RawIssuer) == string(shown[0].RawSubject)}
	named := namedFor(v.leaf, name)
	if len(pins) > 0 {
		v.expected = "the pinned key " + strings.Join(pins, " or ")
		switch {
		case slices.Contains(pins, tunnel.Pin(v.leaf)):
		case !named:
			v.code, v.foreign = tunnel.CaptivePortal, true
		case v.own:
			v.code = tunnel.CertificateUntrusted
		default:
			v.code = tunnel.TLSIntercepted
		}
		return v
	}
	v.expected = fmt.Sprintf("one for %s from a CA that is trusted here", name)
	between := x509.NewCertPool()
	for _, c := range shown[1:] {
		between.AddCert(c)
	}
	verify := func(at time.Time) error {
		_, err := v.leaf.Verify(x509.VerifyOptions{DNSName: name, Roots: roots, Intermediates: between, CurrentTime: at})
		return err
	}
	err := verify(now)
	var invalid x509.CertificateInvalidError
	switch {
	case err == nil:
	case !named:
		v.code, v.foreign = tunnel.CaptivePortal, true
	case (errors.As(err, &invalid) && invalid.Reason == x509.Expired || !within(v.leaf, now)) && verify(v.leaf.NotBefore.Add(v.leaf.NotAfter.Sub(v.leaf.NotBefore)/2)) == nil:
		v.code, v.date = tunnel.CertificateUntrusted, true
	case v.own:
		v.code = tunnel.CertificateUntrusted
	default:
		v.code = tunnel.TLSIntercepted
	}
	return v
}

// namedFor says whether a certificate is for a name. Old inspectors give it as the
// subject alone, which counts for nothing but shows who is imitated.
func namedFor(leaf *x509.Certificate, name string) bool {
	return leaf.VerifyHostname(name) == nil || len(leaf.DNSNames)+len(leaf.IPAddresses) == 0 && strings.EqualFold(leaf.Subject.CommonName, name)
}

// inspected finds out whether TLS is opened by an authority that may.
func (v *verdict) inspected(shown []*x509.Certificate, roots *x509.CertPool, name string, inspectors []string, now time.Time) {
	between := x509.NewCertPool()
	for _, c := range shown[1:] {
		between.AddCert(c)
	}
	chains, err := v.leaf.Verify(x509.VerifyOptions{DNSName: name, Roots: roots, Intermediates: between, CurrentTime: now})
	if err != nil {
		if slices.Contains(inspectors, v.leaf.Issuer.CommonName) {
			v.unfit = err
		}
		return
	}
	for _, chain := range chains {
		for _, by := range chain[1:] {
			if slices.Contains(inspectors, by.Subject.CommonName) {
				v.code, v.inspector = "", by.Subject.CommonName
				return
			}
		}
	}
}

// outcome puts the verdict into words. skew is the cloud proxy's clock less
// ours, where it is known.
func (v verdict) outcome(known bool, skew time.Duration, now time.Time) Outcome {
	o := Outcome{Status: Failed, Code: v.code}
	if v.leaf == nil {
		o.Says, o.Do = "no certificate was shown", "check cloud_proxy.address"
		return o
	}
	issuer, subject := v.issuer(), v.subject()
	shown := fmt.Sprintf("the certificate shown is issued by %q", issuer)
	if v.own {
		shown = fmt.Sprintf("the certificate shown is signed by itself (%q)", subject)
	}
	switch {
	case v.inspector != "":
		o.Status = Good
		o.Says = fmt.Sprintf("TLS is inspected by %q, which cloud_proxy.trust_interception allows; the tunnel's own TLS runs inside", v.inspector)
	case v.code == "":
		o.Status = Good
		o.Says = shown + ", as expected"
	case v.date && known && skew.Abs() > Skew && within(v.leaf, now.Add(skew)):
		o.Code = tunnel.ClockWrong
		o.Says = fmt.Sprintf("the certificate is valid from %s to %s, but this machine's clock is %s", day(v.leaf.NotBefore), day(v.leaf.NotAfter), behind(skew))
		o.Do = setClock
	case v.date && now.Before(v.leaf.NotBefore):
		o.Says = fmt.Sprintf("the certificate is not valid before %s, and this machine says that it is %s", day(v.leaf.NotBefore), day(now))
		o.Do = "check this machine's clock; if it is right, tell the cloud proxy's operator"
	case v.date && !now.After(v.leaf.NotAfter):
		o.Says = fmt.Sprintf("the cloud proxy's certificate is issued by %q, whose own has expired by this machine's clock, %s", issuer, day(now))
		o.Do = "have the cloud proxy's operator renew it; if it has not expired, check this machine's clock"
	case v.date:
		o.Says = fmt.Sprintf("the cloud proxy's certificate expired on %s, and this machine says that it is %s", day(v.leaf.NotAfter), day(now))
		o.Do = "have the cloud proxy's operator renew it; if it has not expired, check this machine's clock"
	case v.foreign:
		o.Says = fmt.Sprintf("what answers at %s is another server: its certificate is for %q, issued by %q; expected was %s", v.address, subject, issuer, v.expected)
		o.Do = signIn
	case v.code == tunnel.TLSIntercepted:
		o.Says = fmt.Sprintf("TLS is inspected on the way: %s, pin %s; expected was %s", shown, tunnel.Pin(v.leaf), v.expected)
		if v.unfit != nil {
			o.Says += fmt.Sprintf("; cloud_proxy.trust_interception names it, but what it shows is not good (%.200q)", v.unfit.Error())
		}
		o.Do = fmt.Sprintf("have IT exempt %s from TLS inspection (by %q); if %q is the cloud proxy's own CA, get its new culvert.yaml", v.address, issuer, issuer)
	default:
		o.Says = fmt.Sprintf("%s and its pin is %s; expected was %s", shown, tunnel.Pin(v.leaf), v.expected)
		o.Do = "ask the cloud proxy's operator whether it has a new key, and take its pin into cloud_proxy.pin"
	}
	return o
}

func (v verdict) issuer() string  { return nameOf(v.leaf.Issuer, v.leaf.Issuer.Organization) }
func (v verdict) subject() string { return nameOf(v.leaf.Subject, v.leaf.DNSNames) }

func within(c *x509.Certificate, at time.Time) bool {
	return !at.Before(c.NotBefore) && !at.After(c.NotAfter)
}

func day(t time.Time) string { return t.UTC().Format("2006-01-02 15:04 UTC") }

// nameOf is what a certificate calls somebody, fit for a terminal.
func nameOf(whole pkix.Name, others []string) string {
	name := cmp.Or(whole.CommonName, strings.Join(others, ", "), whole.String(), "nobody")
	if len(name) > 100 {
		name = strings.ToValidUTF8(name[:100], "") + "…"
	}
	return name
}
