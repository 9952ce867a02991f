package tunnelquic

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"syscall"

	"github.com/quic-go/quic-go"

	"culvert/tunnel"
)

// What the application error codes of our connections and streams mean.
const (
	codeDone    = 0 // the sender of the code has what it wanted
	codeFailed  = 1 // aborted; for connections the reason phrase says why
	codeRefused = 2 // the server can take no more connections now
	codeEarly   = 3 // the client went on before it had been answered
)

// TLS alerts (RFC 8446 §6.2).
const (
	alertBadCertificate      = 42
	alertCertificateExpired  = 45
	alertCertificateUnknown  = 46
	alertUnknownCA           = 48
	alertAccessDenied        = 49
	alertCertificateRequired = 116
)

// errNoAnswer is the cause of a dial that has run out of time.
var errNoAnswer = errors.New("no answer in time")

// dialError puts a failed dial into words.
func dialError(err error, address string) error {
	var already *tunnel.Error
	var noName *net.DNSError
	var transport *quic.TransportError
	var app *quic.ApplicationError
	var version *quic.VersionNegotiationError
	var handshake *quic.HandshakeTimeoutError
	var idle *quic.IdleTimeoutError
	switch {
	case errors.Is(err, context.Canceled):
		return err
	case errors.As(err, &noName): // before the next: a DNS server can be what has not answered in time
		return tunnel.Errorf(tunnel.NameUnresolved, "the name in %s was not resolved; check it and the DNS server: %w", address, err)
	case errors.Is(err, errNoAnswer), errors.Is(err, context.DeadlineExceeded), errors.As(err, &handshake), errors.As(err, &idle):
		return tunnel.Errorf(tunnel.UDPBlocked, "no answer over UDP from %s within %v; a firewall may drop UDP there, or nothing listens: try mode tcp, or have UDP opened: %w", address, handshakeTimeout, err)
	case errors.As(err, &already):
		return err
	case errors.As(err, &version):
		return notOurs(address, err)
	case forbidden(err):
		return tunnel.Errorf(tunnel.UDPBlocked, "this host or its firewall refuses UDP to %s; try mode tcp, or have it allowed: %w", address, err)
	case errors.Is(err, syscall.ECONNREFUSED):
		return tunnel.Errorf(tunnel.CloudUnreachable, "nothing listens for UDP at %s; check that the cloud proxy runs and the port is right: %w", address, err)
	case noWay(err):
		return tunnel.Errorf(tunnel.CloudUnreachable, "this host has no route for UDP to %s; check its network and the address: %w", address, err)
	case errors.As(err, &transport):
		return transportError(transport, address)
	case errors.As(err, &app) && app.ErrorCode == codeRefused:
		return tunnel.Errorf(tunnel.LimitExceeded, "%s can take no more connections now; try again later: %w", address, err)
	}
	return tunnel.Errorf(tunnel.CloudUnreachable, "no QUIC connection to %s: %w", address, err)
}

func transportError(err *quic.TransportError, address string) error {
	alert := -1
	if err.ErrorCode.IsCryptoError() {
		alert = int(err.ErrorCode - 0x100)
	}
	var verify *tls.CertificateVerificationError
	var authority x509.UnknownAuthorityError
	switch {
	case err.ErrorCode == quic.ConnectionRefused:
		return tunnel.Errorf(tunnel.CloudUnreachable, "%s refuses connections at the moment; try again: %w", address, err)
	case err.Remote && (alert == alertCertificateRequired || alert == alertAccessDenied || isCertificate(alert)):
		return tunnel.Errorf(tunnel.NotPermitted, "%s does not accept our certificate; check the sidecar's key: %w", address, err)
	case !err.Remote && (errors.As(err, &verify) || errors.As(err, &authority) || isCertificate(alert)):
		return tunnel.Errorf(tunnel.CertificateUntrusted, "the certificate of %s is not trusted; check the address and the pinned certificate: %w", address, err)
	case alert >= 0:
		return notOurs(address, err)
	}
	return tunnel.Errorf(tunnel.CloudUnreachable, "the QUIC handshake with %s failed: %w", address, err)
}

// notOurs is about whoever has not even got as far as our opening. A cloud
// proxy of another version does, and says so there itself.
func notOurs(address string, err error) error {
	return tunnel.Errorf(tunnel.CloudUnreachable, "what answers at %s is not a Culvert cloud proxy; check the address, the port and alpn: %w", address, err)
}

func isCertificate(alert int) bool {
	return alert >= alertBadCertificate && alert <= alertCertificateUnknown || alert == alertUnknownCA
}

// closed is net.ErrClosed, with a sentence of its own.
type closed string

func (c closed) Error() string        { return string(c) }
func (c closed) Is(target error) bool { return target == net.ErrClosed }

// endError puts the end of an established connection into words.
func endError(err error, peer string) error {
	var app *quic.ApplicationError
	var idle *quic.IdleTimeoutError
	var reset *quic.StatelessResetError
	var transport *quic.TransportError
	switch {
	case errors.As(err, &app) && app.Remote && app.ErrorCode == codeRefused:
		return tunnel.Errorf(tunnel.LimitExceeded, "%s can take no more connections now; try again later: %w", peer, err)
	case errors.As(err, &app) && app.Remote && app.ErrorMessage != "":
		return closed(fmt.Sprintf("the peer closed the connection: %q", app.ErrorMessage))
	case errors.As(err, &app) && app.Remote:
		return closed("the peer closed the connection")
	case errors.As(err, &idle):
		return tunnel.Errorf(tunnel.TimedOut, "nothing came over UDP from %s for %v; the path or the peer is gone: %w", peer, idleTimeout, err)
	case errors.As(err, &reset):
		return tunnel.Errorf(tunnel.CloudUnreachable, "%s does not know the connection any more, so it was restarted: %w", peer, err)
	case errors.As(err, &transport) && transport.ErrorCode.IsCryptoError():
		// A client learns only after its own handshake whether the server
		// accepts its certificate (RFC 8446 §2).
		return transportError(transport, peer)
	}
	return tunnel.Errorf(tunnel.CloudUnreachable, "the QUIC connection with %s failed: %w", peer, err)
}
