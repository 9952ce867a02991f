package tunnelquic

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"strings"
	"syscall"
	"testing"

	"github.com/quic-go/quic-go"

	"culvert/tunnel"
)

func sendmsg(errno syscall.Errno) error {
	return &net.OpError{Op: "write", Net: "udp", Err: os.NewSyscallError("sendmsg", errno)}
}

func alert(number int, remote bool) error {
	return &quic.TransportError{Remote: remote, ErrorCode: quic.TransportErrorCode(0x100 + number)}
}

func TestADialsErrorTellsTheHostTheNetworkAndTheServerApart(t *testing.T) {
	const address = "proxy.test:443"
	for name, c := range map[string]struct {
		err  error
		code tunnel.Code
		says string
	}{
		"a firewall of the host":             {sendmsg(syscall.EPERM), tunnel.UDPBlocked, "refuses UDP to " + address},
		"a rule that prohibits the way":      {sendmsg(syscall.EACCES), tunnel.UDPBlocked, "refuses UDP to " + address},
		"no route":                           {sendmsg(syscall.ENETUNREACH), tunnel.CloudUnreachable, "no route"},
		"no route to the host":               {sendmsg(syscall.EHOSTUNREACH), tunnel.CloudUnreachable, "no route"},
		"the network is down":                {sendmsg(syscall.ENETDOWN), tunnel.CloudUnreachable, "no route"},
		"no address of the family":           {sendmsg(syscall.EADDRNOTAVAIL), tunnel.CloudUnreachable, "no route"},
		"a closed port":                      {sendmsg(syscall.ECONNREFUSED), tunnel.CloudUnreachable, "nothing listens"},
		"no protocol of ours, it says":       {alert(120, true), tunnel.CloudUnreachable, "not a Culvert cloud proxy"},
		"no protocol of ours, we say":        {alert(120, false), tunnel.CloudUnreachable, "not a Culvert cloud proxy"},
		"another version of TLS":             {alert(70, true), tunnel.CloudUnreachable, "not a Culvert cloud proxy"},
		"no parameters in common":            {alert(40, true), tunnel.CloudUnreachable, "not a Culvert cloud proxy"},
		"it does not know the name":          {alert(112, true), tunnel.CloudUnreachable, "not a Culvert cloud proxy"},
		"another version of QUIC":            {&quic.VersionNegotiationError{}, tunnel.CloudUnreachable, "not a Culvert cloud proxy"},
		"it does not accept our certificate": {alert(42, true), tunnel.NotPermitted, "our certificate"},
		"a DNS server that does not answer":  {fmt.Errorf("%w: %w", &net.DNSError{Err: "timeout", IsTimeout: true}, context.DeadlineExceeded), tunnel.NameUnresolved, "DNS server"},
		"we do not accept its certificate":   {alert(42, false), tunnel.CertificateUntrusted, "not trusted"},
	} {
		t.Run(name, func(t *testing.T) {
			err := dialError(c.err, address)
			if tunnel.CodeOf(err) != c.code || !strings.Contains(tunnel.Sentence(err), c.says) || !strings.Contains(tunnel.Sentence(err), address) || !errors.Is(err, c.err) {
				t.Errorf("%v; want %s and %q", err, c.code, c.says)
			}
		})
	}
}

func TestAMissingRouteSaysLessThanAFirewallAndThisLessThanAnAnswer(t *testing.T) {
	route, firewall, answer := weight(sendmsg(syscall.ENETUNREACH)), weight(sendmsg(syscall.EPERM)), weight(errNoAnswer)
	if route >= firewall || firewall >= answer {
		t.Errorf("route %d, firewall %d, answer %d", route, firewall, answer)
	}
}

func TestWhyAPeerHasClosedIsSaidInItsWordsAlone(t *testing.T) {
	err := endError(&quic.ApplicationError{Remote: true, ErrorMessage: "the sidecar has stopped"}, "192.0.2.1:443")
	if err.Error() != `the peer closed the connection: "the sidecar has stopped"` || !errors.Is(err, net.ErrClosed) {
		t.Errorf("%v", err)
	}
}
