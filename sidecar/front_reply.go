package sidecar

import (
	"net/http"

	"culvert/tunnel"
)

// The reply field of RFC 1928 section 6.
const (
	socksSucceeded          = 0x00
	socksFailure            = 0x01
	socksNotAllowed         = 0x02
	socksNetworkUnreachable = 0x03
	socksHostUnreachable    = 0x04
	socksRefused            = 0x05
	socksCommandUnsupported = 0x07
	socksAddressUnsupported = 0x08
	socksNoMethod           = 0xff // of section 3: no acceptable methods
)

// frontReply says what a failure is called in SOCKS and in HTTP. It is the only
// place where errors become replies.
func frontReply(err error) (socks byte, status int) {
	switch tunnel.CodeOf(err) {
	case "":
		return socksSucceeded, http.StatusOK
	case tunnel.PolicyDenied, tunnel.NotPermitted:
		return socksNotAllowed, http.StatusForbidden
	case tunnel.ProxyStopped:
		return socksNotAllowed, http.StatusServiceUnavailable
	case tunnel.NetworkUnreachable, tunnel.CloudUnreachable, tunnel.UDPBlocked,
		tunnel.CertificateUntrusted, tunnel.TLSIntercepted, tunnel.ProxyAuthRequired, tunnel.VersionMismatch,
		tunnel.TokenExpired, tunnel.TokenRejected, tunnel.SessionExpired, tunnel.SessionUnknown:
		return socksNetworkUnreachable, http.StatusBadGateway
	case tunnel.HostUnreachable, tunnel.NameUnresolved:
		return socksHostUnreachable, http.StatusBadGateway
	case tunnel.ConnectionRefused:
		return socksRefused, http.StatusBadGateway
	case tunnel.TimedOut:
		// 0x06 is about the IP hop limit, which is not what happened.
		return socksHostUnreachable, http.StatusGatewayTimeout
	case tunnel.LimitExceeded, tunnel.QuotaExceeded:
		return socksFailure, http.StatusServiceUnavailable
	case tunnel.Unsupported:
		return socksCommandUnsupported, http.StatusNotImplemented
	case tunnel.ConfigInvalid:
		return socksFailure, http.StatusBadRequest
	}
	return socksFailure, http.StatusInternalServerError
}
