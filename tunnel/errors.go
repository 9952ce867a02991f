package tunnel

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"syscall"
)

// A Code is a word for a failure. The same words stand in the command line, the
// control API, logs, metrics and on the wire. A Code is itself an error, so
// errors.Is(err, PolicyDenied) asks what happened.
type Code string

// The codes. Those of the second group say what a destination answered.
const (
	CaptivePortal        Code = "captive_portal" // a network's sign-in page answers in the cloud proxy's place
	CertificateUntrusted Code = "certificate_untrusted"
	ChannelActive        Code = "channel_active"
	ClockWrong           Code = "clock_wrong" // this machine's
	CloudUnreachable     Code = "cloud_unreachable"
	ConfigInvalid        Code = "config_invalid"
	LimitExceeded        Code = "limit_exceeded"
	NotPermitted         Code = "not_permitted"
	AddressChanged       Code = "address_changed"  // this machine has another address or route
	CloudProxyGone       Code = "cloud_proxy_gone" // the cloud proxy has stopped or is about to, or was restarted
	PathJoined           Code = "path_joined"      // a connection was made that was wanted
	PathLost             Code = "path_lost"        // the connection that the datagrams went by has ended
	PathProved           Code = "path_proved"      // probes of a better way were answered
	PathSilent           Code = "path_silent"      // nothing authentic came by a way for some time
	PathStrained         Code = "path_strained"    // a way carries less than the call sends
	UDPReturned          Code = "udp_returned"     // UDP passes again
	PolicyDenied         Code = "policy_denied"
	PolicyInvalid        Code = "policy_invalid"
	ProxyAuthRequired    Code = "proxy_auth_required" // an HTTP proxy on the way wants a password, or another one
	ProxyStopped         Code = "proxy_stopped"
	QuotaExceeded        Code = "quota_exceeded"
	SessionExpired       Code = "session_expired"
	SessionUnknown       Code = "session_unknown"
	TLSIntercepted       Code = "tls_intercepted" // something on the way shows a certificate of its own for the cloud proxy
	TokenExpired         Code = "token_expired"
	TokenRejected        Code = "token_rejected"
	UDPBlocked           Code = "udp_blocked"
	VersionMismatch      Code = "version_mismatch"

	ConnectionRefused  Code = "connection_refused"  // RST, or ICMP port unreachable
	HostUnreachable    Code = "host_unreachable"    // no answer from the host's network
	NetworkUnreachable Code = "network_unreachable" // no route
	NameUnresolved     Code = "name_unresolved"     // DNS has no such name, or no answer
	TimedOut           Code = "timed_out"           // nothing came back in time
	Unsupported        Code = "unsupported"         // the request asks for what Culvert does not do
	Internal           Code = "internal"            // a fault without a better word
)

// Error returns the word.
func (c Code) Error() string { return string(c) }

// An Error is one sentence for a person (what, why, what to do) and the code.
type Error struct {
	Code Code
	Text string
	Err  error // the cause; may be nil. It is not part of Error's text.
}

// Error returns the sentence with its code.
func (e *Error) Error() string { return e.Text + " (" + string(e.Code) + ")" }

// Unwrap returns the cause.
func (e *Error) Unwrap() error { return e.Err }

// Is reports whether target is this error's code.
func (e *Error) Is(target error) bool {
	c, ok := target.(Code)
	return ok && c == e.Code
}

// Errorf makes an Error. A %w in the format sets its cause as fmt.Errorf does.
func Errorf(c Code, format string, args ...any) *Error {
	err := fmt.Errorf(format, args...)
	return &Error{Code: c, Text: err.Error(), Err: errors.Unwrap(err)}
}

// CodeOf names any error: an Error's or Code's own code, the matching code for
// what the standard library reports about dialling, Internal for the rest, and
// "" for nil.
func CodeOf(err error) Code {
	var e *Error
	var c Code
	var dns *net.DNSError
	switch {
	case err == nil:
		return ""
	case errors.As(err, &e):
		return e.Code
	case errors.As(err, &c):
		return c
	case errors.As(err, &dns):
		return NameUnresolved
	case errors.Is(err, syscall.ECONNREFUSED):
		return ConnectionRefused
	case errors.Is(err, syscall.ENETUNREACH), errors.Is(err, syscall.EADDRNOTAVAIL):
		return NetworkUnreachable
	case errors.Is(err, syscall.EHOSTUNREACH):
		return HostUnreachable
	case errors.Is(err, syscall.EACCES), errors.Is(err, syscall.EPERM):
		return NotPermitted
	case errors.Is(err, context.DeadlineExceeded), errors.Is(err, os.ErrDeadlineExceeded), errors.Is(err, syscall.ETIMEDOUT):
		return TimedOut
	}
	return Internal
}

// Sentence returns the error's text without its code, for places that show
// the code beside it.
func Sentence(err error) string {
	var e *Error
	if errors.As(err, &e) {
		return e.Text
	}
	return err.Error()
}
