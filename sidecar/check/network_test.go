package check

import (
	"bufio"
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"strings"
	"syscall"
	"testing"

	"culvert/tunnel"
)

func TestWhyUDPDoesNotPass(t *testing.T) {
	upTo := func(n int) map[int]bool {
		passed := map[int]bool{}
		for _, size := range sizes {
			if size <= n {
				passed[size] = true
			}
		}
		return passed
	}
	silence := tunnel.Errorf(tunnel.UDPBlocked, "nothing")
	for name, c := range map[string]struct {
		passed     map[int]bool
		rejected   error
		says, next string
	}{
		"nothing comes back":   {nil, nil, "dropped silently", "open UDP 443"},
		"small packets pass":   {upTo(600), nil, "600 bytes is the largest, and QUIC needs 1,200", "1,500 bytes"},
		"QUIC is filtered":     {upTo(1400), nil, "QUIC does not", "allow QUIC"},
		"refused":              {nil, syscall.ECONNREFUSED, "is refused", "open UDP 443"},
		"no route":             {nil, syscall.ENETUNREACH, "rejected on the way", "open UDP 443"},
		"protocol unreachable": {nil, syscall.ENOPROTOOPT, "rejected on the way", "open UDP 443"},
		"own firewall":         {nil, syscall.EPERM, "this machine's own firewall forbids", "open UDP 443"},
		"ICMPv6 prohibited":    {nil, syscall.EACCES, "on the way or by this machine's own firewall", "open UDP 443"},
	} {
		o := udpFailure(silence, c.passed, c.rejected, "cloud.example.net:443")
		if o.Code != tunnel.UDPBlocked || !strings.Contains(o.Says, c.says) || !strings.Contains(o.Do, c.next) {
			t.Errorf("%s: %+v", name, o)
		}
	}
}

func TestWhatDNSSays(t *testing.T) {
	for name, c := range map[string]struct {
		found      []string
		err        error
		says, next string // of the step that fails
	}{
		"no such name":        {nil, &net.DNSError{Err: "no such host", IsNotFound: true}, "there is no cloud.example.net", "check the name"},
		"no answer":           {nil, &net.DNSError{Err: "i/o timeout", IsTimeout: true}, "no DNS server answers", "have DNS opened"},
		"server failure":      {nil, &net.DNSError{Err: "server misbehaving", Server: "192.0.2.53:53", IsTemporary: true}, "192.0.2.53:53 can not resolve cloud.example.net: server misbehaving", "look at that DNS server"},
		"filtered, 0.0.0.0":   {[]string{"0.0.0.0", "::"}, nil, "is this machine itself (0.0.0.0)", "DNS filter"},
		"filtered, 127.0.0.1": {[]string{"127.0.0.1"}, nil, "is this machine itself (127.0.0.1)", "DNS filter"},
		"another machine":     {[]string{"127.0.0.1", "192.0.2.1"}, nil, "is refused", "open TCP 443"},
	} {
		r := &run{host: "cloud.example.net", cfg: Config{
			Address: "cloud.example.net:443",
			Lookup: func(context.Context, string) (found []netip.Addr, err error) {
				for _, a := range c.found {
					found = append(found, netip.MustParseAddr(a))
				}
				return found, c.err
			},
			Direct: func(context.Context, string, string) (net.Conn, error) {
				return nil, &net.OpError{Op: "dial", Err: os.NewSyscallError("connect", syscall.ECONNREFUSED)}
			},
		}}
		o := r.names(t.Context())
		if o.Status == Good {
			o = r.tcp(t.Context())
		}
		if o.Status != Failed || !strings.Contains(o.Says, c.says) || !strings.Contains(o.Do, c.next) || c.err == nil && strings.Contains(o.Do, "DNS") != strings.Contains(name, "filtered") {
			t.Errorf("%s: %+v", name, o)
		}
	}
}

func TestAProxyThatSendsToASignInPage(t *testing.T) {
	elsewhere := &tunnel.Error{Code: tunnel.CloudUnreachable, Text: "the proxy sends elsewhere", Err: tunnel.CaptivePortal}
	if o := ProxyOutcome("", elsewhere); o.Code != tunnel.CaptivePortal || o.Do != signIn {
		t.Errorf("got %+v", o)
	}
	if o := ProxyOutcome("", errors.New("broken")); o.Code != tunnel.CloudUnreachable {
		t.Errorf("got %+v", o)
	}
}

// Some answer 200 to every CONNECT, and show the page that says no inside.
func TestAPageBehindAProxysYesIsTheProxys(t *testing.T) {
	for via, want := range map[string]string{"the proxy http://proxy.example:3128": "the proxy http://proxy.example:3128 says that it has connected", "": "what answers at cloud.example.net:443"} {
		page := func(context.Context, string, string) (net.Conn, error) {
			near, far := net.Pipe()
			go func() {
				defer far.Close()
				far.Read(make([]byte, 4096))
				io.WriteString(far, "<html>blocked</html>")
			}()
			return near, nil
		}
		r := Run(t.Context(), Config{
			Address: "cloud.example.net:443", TLS: &tls.Config{}, Mode: tunnel.ModeTCP, Setup: Outcome{Status: Good},
			Lookup: func(context.Context, string) ([]netip.Addr, error) {
				return []netip.Addr{netip.MustParseAddr("192.0.2.1")}, nil
			},
			Proxy:  func(context.Context) Outcome { return ProxyOutcome(via, nil) },
			Direct: page, Through: page,
		})
		if r.Verdict != Failed || !strings.Contains(r.Sentence, want) || strings.Contains(r.Next, "CONNECT") != (via != "") {
			t.Errorf("via %q: %s; %s", via, r.Sentence, r.Next)
		}
	}
}

// It let the first connection through, and not the second: that is not the far end's fault.
func TestAProxyThatChangesItsMindIsNamed(t *testing.T) {
	refusal := tunnel.Errorf(tunnel.ProxyAuthRequired, "the proxy does not accept this password")
	r := &run{cfg: Config{
		Address: "cloud.example.net:443", TLS: &tls.Config{}, Proxy: func(context.Context) Outcome { return Outcome{Status: Good} },
		Through: func(context.Context, string, string) (net.Conn, error) { return nil, refusal },
	}}
	if o := r.handshake(t.Context()); o.Code != tunnel.ProxyAuthRequired || o.Says != refusal.Text || o.Status != Failed {
		t.Errorf("got %+v", o)
	}
}

// What a test met that was ended says nothing of the network.
func TestAnInterruptedTestGivesNoVerdict(t *testing.T) {
	for _, at := range []string{"name resolution", "TCP 443"} {
		ctx, end := context.WithCancel(t.Context())
		r := Run(ctx, Config{
			Address: "cloud.example.net:443", TLS: &tls.Config{}, Mode: tunnel.ModeTCP, Setup: Outcome{Status: Good, Says: "understood"},
			Lookup: func(ctx context.Context, _ string) ([]netip.Addr, error) {
				if at == "name resolution" {
					end()
				}
				return []netip.Addr{netip.MustParseAddr("192.0.2.1")}, ctx.Err()
			},
			Direct: func(context.Context, string, string) (net.Conn, error) { end(); return nil, ctx.Err() },
		})
		if !r.Interrupted || r.Verdict != Failed || r.Exit() != 1 || r.Code != "" || !strings.Contains(r.Sentence, `interrupted at the step "`+at) || r.Next == "" {
			t.Errorf("%s: %+v", at, r)
		}
		if r.Steps[0].Status != Good {
			t.Errorf("%s: what was found before is %+v", at, r.Steps[0])
		}
		for _, s := range r.Steps {
			if s.Status == Failed {
				t.Errorf("%s: the network is blamed: %+v", at, s)
			}
		}
		var page strings.Builder
		if err := r.WritePage(&page); err != nil || !strings.Contains(page.String(), "<strong>Not known:</strong> the check was interrupted") {
			t.Errorf("%s: %v\n%s", at, err, page.String())
		}
	}
}

func TestAPortalIsOneWhateverItsLocationIs(t *testing.T) {
	for location, want := range map[string]string{
		"http://portal.example/?session=secret":        `sends to "http://portal.example" (HTTP 302)`,
		"http://portal.example/%zz?session=secret":     "a captive portal answers in the cloud proxy's name (HTTP 302)",
		"http://" + strings.Repeat("a", 60000) + "/":   `sends to "http://aaaa`,
		"http://u:secret@portal.example/secret#secret": `sends to "http://portal.example" (HTTP 302)`,
		"http://cloud.example.net/elsewhere?session=x": "",
		"/elsewhere": "",
	} {
		r := &run{host: "cloud.example.net", cfg: Config{Direct: func(context.Context, string, string) (net.Conn, error) {
			near, far := net.Pipe()
			go func() {
				defer far.Close()
				if _, err := http.ReadRequest(bufio.NewReader(far)); err == nil {
					io.WriteString(far, "HTTP/1.1 302 Found\r\nLocation: "+location+"\r\nContent-Length: 0\r\n\r\n")
				}
			}()
			return near, nil
		}}}
		o := r.portal(t.Context())
		if (o.Status == Failed) != (want != "") || !strings.Contains(o.Says, want) || strings.Contains(o.Says, "secret") || len(o.Says) > 300 {
			t.Errorf("%.80s: %.300v", location, o)
		}
	}
}
