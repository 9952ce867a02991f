package tunnel_test

import (
	"context"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"strings"
	"syscall"
	"testing"

	"culvert/tunnel"
)

func TestAddressesOfCloudProxies(t *testing.T) {
	for text, want := range map[string]string{ // HOST:PORT and the URL's path
		"cloud.example.net:443":                  "cloud.example.net:443",
		"192.0.2.1:8443":                         "192.0.2.1:8443",
		"wss://cloud.example.net":                "cloud.example.net:443 ",
		"wss://cloud.example.net/a/b":            "cloud.example.net:443 /a/b",
		"wss://[2001:db8::1]:8443/a":             "[2001:db8::1]:8443 /a",
		"cloud.example.net":                      "",
		"ws://cloud.example.net/a":               "",
		"https://cloud.example.net/a":            "",
		"wss:///a":                               "",
		"wss://user:secret@host/a":               "",
		"wss://host/a?b":                         "",
		"wss://host:0/a":                         "",
		"wss://host/" + strings.Repeat("a", 600): "",
	} {
		to, u, err := tunnel.ParseAddress(text)
		got := ""
		if err == nil {
			got = to.String()
		}
		if u != nil && err == nil {
			got += " " + u.Path
		}
		if got != want || err != nil && (tunnel.CodeOf(err) != tunnel.ConfigInvalid || len(err.Error()) > 250) {
			t.Errorf("%.60s is %q (%v), want %q", text, got, err, want)
		}
	}
}

func TestAddressesAsValues(t *testing.T) {
	want := netip.MustParseAddrPort("192.0.2.1:443")
	for name, c := range map[string]struct {
		addr net.Addr
		want netip.AddrPort
	}{
		"TCP":          {&net.TCPAddr{IP: net.IPv4(192, 0, 2, 1), Port: 443}, want}, // 16 bytes: mapped
		"UDP":          {&net.UDPAddr{IP: net.IPv4(192, 0, 2, 1).To4(), Port: 443}, want},
		"IPv6":         {&net.TCPAddr{IP: net.ParseIP("2001:db8::1"), Port: 1}, netip.MustParseAddrPort("[2001:db8::1]:1")},
		"another":      {&net.UnixAddr{Name: "/run/x"}, netip.AddrPort{}},
		"none":         {nil, netip.AddrPort{}},
		"none, of TCP": {(*net.TCPAddr)(nil), netip.AddrPort{}},
		"no address":   {&net.TCPAddr{}, netip.AddrPort{}},
	} {
		if got := tunnel.AddrPortOf(c.addr); got != c.want {
			t.Errorf("%s: %v, want %v", name, got, c.want)
		}
	}
}

func TestAnErrorIsItsCodeAndItsCause(t *testing.T) {
	cause := fmt.Errorf("dial: %w", syscall.ECONNREFUSED)
	err := error(tunnel.Errorf(tunnel.CloudUnreachable, "nothing listens at %s: %w", "192.0.2.1:443", cause))
	wrapped := fmt.Errorf("start: %w", err)
	for _, e := range []error{err, wrapped} {
		if !errors.Is(e, tunnel.CloudUnreachable) || !errors.Is(e, syscall.ECONNREFUSED) {
			t.Errorf("%v is not its code and its cause", e)
		}
		if errors.Is(e, tunnel.PolicyDenied) {
			t.Errorf("%v is a code that it does not have", e)
		}
		if got := tunnel.CodeOf(e); got != tunnel.CloudUnreachable {
			t.Errorf("the code of %v is %s; an error's own code goes before its cause's", e, got)
		}
	}
	if want := "nothing listens at 192.0.2.1:443: dial: connection refused (cloud_unreachable)"; err.Error() != want {
		t.Errorf("the text is %q, want %q", err, want)
	}
	if tunnel.Errorf(tunnel.Internal, "no cause").Unwrap() != nil {
		t.Error("an error without %w has a cause")
	}
}

func TestCodeOf(t *testing.T) {
	dial := func(err error) error {
		return fmt.Errorf("try: %w", &net.OpError{Op: "dial", Net: "tcp", Err: os.NewSyscallError("connect", err)})
	}
	for name, c := range map[string]struct {
		err  error
		want tunnel.Code
	}{
		"nothing":               {nil, ""},
		"a code":                {tunnel.QuotaExceeded, tunnel.QuotaExceeded},
		"a wrapped code":        {fmt.Errorf("x: %w", tunnel.QuotaExceeded), tunnel.QuotaExceeded},
		"an error in an error":  {tunnel.Errorf(tunnel.TokenRejected, "x: %w", tunnel.Errorf(tunnel.Internal, "y")), tunnel.TokenRejected},
		"joined":                {errors.Join(errors.New("x"), tunnel.Errorf(tunnel.TimedOut, "y")), tunnel.TimedOut},
		"no such name":          {&net.OpError{Op: "dial", Err: &net.DNSError{Err: "no such host", Name: "x", IsNotFound: true}}, tunnel.NameUnresolved},
		"DNS in time":           {&net.DNSError{Err: "i/o timeout", IsTimeout: true}, tunnel.NameUnresolved},
		"refused":               {dial(syscall.ECONNREFUSED), tunnel.ConnectionRefused},
		"no route":              {dial(syscall.ENETUNREACH), tunnel.NetworkUnreachable},
		"no address of a kind":  {dial(syscall.EADDRNOTAVAIL), tunnel.NetworkUnreachable},
		"no host":               {dial(syscall.EHOSTUNREACH), tunnel.HostUnreachable},
		"may not":               {dial(syscall.EACCES), tunnel.NotPermitted},
		"a firewall here":       {dial(syscall.EPERM), tunnel.NotPermitted},
		"the kernel's patience": {dial(syscall.ETIMEDOUT), tunnel.TimedOut},
		"a deadline":            {&net.OpError{Op: "read", Err: os.ErrDeadlineExceeded}, tunnel.TimedOut},
		"a context's deadline":  {fmt.Errorf("x: %w", context.DeadlineExceeded), tunnel.TimedOut},
		"something else":        {io.ErrUnexpectedEOF, tunnel.Internal},
		"cancelled":             {context.Canceled, tunnel.Internal},
	} {
		if got := tunnel.CodeOf(c.err); got != c.want {
			t.Errorf("%s: %v is %q, want %q", name, c.err, got, c.want)
		}
	}
}

func TestSentenceLeavesTheCodeOut(t *testing.T) {
	e := tunnel.Errorf(tunnel.TimedOut, "it took too long; try again")
	for _, err := range []error{e, fmt.Errorf("around: %w", e)} {
		if got := tunnel.Sentence(err); got != "it took too long; try again" {
			t.Errorf("%q", got)
		}
	}
	if got := tunnel.Sentence(io.EOF); got != "EOF" {
		t.Errorf("%q", got)
	}
}

func TestParseTarget(t *testing.T) {
	for in, want := range map[string]tunnel.Target{
		"example.com:443":                        {Host: "example.com", Port: 443},
		"192.0.2.1:1":                            {Addr: netip.MustParseAddr("192.0.2.1"), Port: 1},
		"[2001:db8::1]:65535":                    {Addr: netip.MustParseAddr("2001:db8::1"), Port: 65535},
		"[fe80::1%eth0]:80":                      {Addr: netip.MustParseAddr("fe80::1%eth0"), Port: 80},
		"[::ffff:192.0.2.1]:80":                  {Addr: netip.MustParseAddr("::ffff:192.0.2.1"), Port: 80},
		strings.Repeat("a", 255) + ":80":         {Host: strings.Repeat("a", 255), Port: 80},
		"127.1:80" /* a name, not an address */ : {Host: "127.1", Port: 80},
	} {
		got, err := tunnel.ParseTarget(in)
		if err != nil || got != want {
			t.Errorf("%q is %+v, %v; want %+v", in, got, err, want)
			continue
		}
		if again, err := tunnel.ParseTarget(got.String()); err != nil || again != got {
			t.Errorf("%q is written as %q, which is %+v, %v", in, got, again, err)
		}
	}
	for _, in := range []string{"", "example.com", ":443", "[]:443", "a:0", "a:65536", "a:-1", "a:+1", "a:http", "a:", "2001:db8::1:443", "[2001:db8::1]", strings.Repeat("a", 256) + ":80"} {
		if got, err := tunnel.ParseTarget(in); tunnel.CodeOf(err) != tunnel.ConfigInvalid || got != (tunnel.Target{}) {
			t.Errorf("%.40q is %+v, %v; want no target and config_invalid", in, got, err)
		}
	}
	a := netip.MustParseAddrPort("[2001:db8::1]:80")
	if got := tunnel.TargetOf(a); got.AddrPort() != a || got.String() != "[2001:db8::1]:80" {
		t.Errorf("%v becomes %v, %s", a, got.AddrPort(), got)
	}
	if (tunnel.Target{Host: "x", Port: 1}).AddrPort().IsValid() {
		t.Error("an unresolved target has a numeric address")
	}
}

// knownPin is what this prints for testdata/pin.pem:
//
//	openssl x509 -in pin.pem -pubkey -noout | openssl pkey -pubin -outform der |
//	    openssl dgst -sha256 -binary | openssl base64
const knownPin = "sha256/pl47pm5IaZ5gix5UAthdS6BQBkJC/v1hY+Q1w/ynQzI="

func TestPinIsWhatOpensslComputes(t *testing.T) {
	b, err := os.ReadFile("testdata/pin.pem")
	if err != nil {
		t.Fatal(err)
	}
	block, _ := pem.Decode(b)
	c, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	if got := tunnel.Pin(c); got != knownPin {
		t.Errorf("the pin is %s, want %s", got, knownPin)
	}
	if got, err := tunnel.ParsePin(knownPin); err != nil || got != knownPin {
		t.Errorf("read as %q, %v", got, err)
	}
}

func TestParsePinRefusesWhatIsNone(t *testing.T) {
	bare := strings.TrimPrefix(knownPin, "sha256/")
	for name, in := range map[string]string{
		"empty": "", "no hash named": bare, "HPKP's own form": "sha256//" + bare, "another hash": "sha1/" + bare,
		"cut": knownPin[:len(knownPin)-4], "too long": knownPin[:len(knownPin)-1] + "AAA=", "no base64": "sha256/" + strings.Repeat("!", 44), "a space": knownPin + " ",
	} {
		if got, err := tunnel.ParsePin(in); got != "" || !errors.Is(err, tunnel.ConfigInvalid) || !strings.Contains(err.Error(), "culvert-cloudproxy init") {
			t.Errorf("%s: %q is %q, %v", name, in, got, err)
		}
	}
}

func TestParseMode(t *testing.T) {
	for in, want := range map[string]tunnel.Mode{"": tunnel.ModeAuto, "auto": tunnel.ModeAuto, "udp": tunnel.ModeUDP, "tcp": tunnel.ModeTCP} {
		if got, err := tunnel.ParseMode(in); got != want || err != nil {
			t.Errorf("%q is %q, %v", in, got, err)
		}
	}
	for _, in := range []string{"TCP", "quic", " auto"} {
		if got, err := tunnel.ParseMode(in); got != "" || !errors.Is(err, tunnel.ConfigInvalid) || !strings.Contains(err.Error(), "auto, udp or tcp") {
			t.Errorf("%q is %q, %v", in, got, err)
		}
	}
}

func TestALinkStateIsALineForLogs(t *testing.T) {
	for want, s := range map[string]tunnel.LinkState{
		"up over quic (datagrams: quic-datagram, streams: tls) to 192.0.2.1:443: mode is tcp": {Phase: tunnel.LinkUp, Carrier: "quic", Way: "quic-datagram", Streams: "tls", Why: "mode is tcp", Remote: netip.MustParseAddrPort("192.0.2.1:443")},
		"connecting: started": {Phase: tunnel.LinkConnecting, Why: "started"},
	} {
		if got := s.String(); got != want {
			t.Errorf("%q, want %q", got, want)
		}
	}
}
