package tunneltls

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"net"
	"os"
	"slices"
	"strings"
	"syscall"

	"github.com/hashicorp/yamux"

	"culvert/tunnel"
)

// certificateAlerts (RFC 8446 §6.2) judge this side's certificate: bad,
// unsupported, revoked, expired, unknown, unknown CA, required.
var certificateAlerts = []tls.AlertError{42, 43, 44, 45, 46, 48, 116}

// alert returns the TLS alert that the peer sent; nil: it sent none. Over TCP
// crypto/tls gives it a type that is not exported, but the same text.
func alert(err error) error {
	var op *net.OpError
	if errors.As(err, &op) && op.Op == "remote error" {
		return op.Err
	}
	return nil
}

func oneOf(err error, alerts []tls.AlertError) bool {
	return slices.ContainsFunc(alerts, func(a tls.AlertError) bool { return a.Error() == err.Error() })
}

// dialError names why address could not be reached. An Error that verification
// made stays as it is: it knows more.
func dialError(address string, err error) error {
	var made *tunnel.Error
	var record tls.RecordHeaderError
	var dns *net.DNSError
	switch {
	case errors.As(err, &made):
		return made
	case errors.As(err, &dns):
		return tunnel.Errorf(tunnel.CloudUnreachable, "the cloud proxy's name in %s could not be resolved; check the name and the DNS server: %w", address, err)
	case untrusted(err):
		return tunnel.Errorf(tunnel.CertificateUntrusted, "the certificate of the cloud proxy at %s is not trusted; check the address and the pinned certificate, something may be intercepting the connection: %w", address, err)
	case alert(err) != nil && oneOf(alert(err), certificateAlerts):
		return refused(err)
	case alert(err) != nil:
		// A cloud proxy of another version gets as far as the opening, and says
		// so there itself.
		return tunnel.Errorf(tunnel.CloudUnreachable, "what answers at %s is not a Culvert cloud proxy; check the address, the port and alpn: %w", address, err)
	case errors.As(err, &record):
		return tunnel.Errorf(tunnel.CloudUnreachable, "what answers at %s does not speak TLS; check the port, and whether the network redirects it or a proxy shows a page in its place: %w", address, err)
	case errors.Is(err, syscall.ECONNREFUSED):
		return tunnel.Errorf(tunnel.CloudUnreachable, "nothing listens at %s; check that the cloud proxy runs and the port is right: %w", address, err)
	case errors.Is(err, context.DeadlineExceeded), errors.Is(err, os.ErrDeadlineExceeded), errors.Is(err, syscall.ETIMEDOUT):
		return tunnel.Errorf(tunnel.CloudUnreachable, "the cloud proxy at %s did not answer over TCP in time; check the address and that the firewall lets TCP out to it: %w", address, err)
	case errors.Is(err, io.EOF), errors.Is(err, syscall.ECONNRESET):
		return tunnel.Errorf(tunnel.CloudUnreachable, "the connection to %s was cut during the TLS handshake; a firewall may forbid it: %w", address, err)
	}
	return tunnel.Errorf(tunnel.CloudUnreachable, "the cloud proxy at %s can not be reached over TCP: %w", address, err)
}

func untrusted(err error) bool {
	var verify *tls.CertificateVerificationError
	var invalid x509.CertificateInvalidError
	var host x509.HostnameError
	var authority x509.UnknownAuthorityError
	return errors.As(err, &verify) || errors.As(err, &invalid) || errors.As(err, &host) || errors.As(err, &authority)
}

// refused names a TLS alert of the peer. With TLS 1.3 a client's certificate is
// judged after the client's own handshake is done, so the verdict arrives in
// its first Read.
func refused(err error) error {
	switch a := alert(err); {
	case a == nil:
		return err
	case oneOf(a, certificateAlerts):
		return tunnel.Errorf(tunnel.CertificateUntrusted, "the peer does not accept this side's certificate: %w", err)
	}
	return tunnel.Errorf(tunnel.CloudUnreachable, "the peer ended the TLS connection: %w", err)
}

// ended names why an established connection is over.
func ended(err error) error {
	var made *tunnel.Error
	switch {
	case errors.As(err, &made):
		return err
	case strings.Contains(err.Error(), "too many non-advancing records"): // crypto/tls has no value for it
		return errRekeys
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		return tunnel.Errorf(tunnel.CloudUnreachable, "the peer closed the connection: %w", err)
	case errors.Is(err, os.ErrDeadlineExceeded), errors.Is(err, syscall.ETIMEDOUT), errors.Is(err, yamux.ErrConnectionWriteTimeout):
		return tunnel.Errorf(tunnel.CloudUnreachable, "the network stands still, so the connection was given up: %w", err)
	}
	return tunnel.Errorf(tunnel.CloudUnreachable, "the connection was lost: %w", err)
}
