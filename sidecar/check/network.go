package check

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"culvert/tunnel"
	"culvert/tunnel/wire"
)

// names resolves the cloud proxy's name.
func (r *run) names(ctx context.Context) Outcome {
	if a, err := netip.ParseAddr(r.host); err == nil {
		r.addrs = []netip.Addr{a}
		return Outcome{Status: Good, Says: r.host + " is an address; nothing is to be resolved"}
	}
	ctx, cancel := context.WithTimeout(ctx, lookupTime)
	defer cancel()
	found, err := r.cfg.Lookup(ctx, r.host)
	if err == nil && len(found) == 0 {
		err = errors.New("it has no address")
	}
	if err != nil {
		o := Outcome{Status: Failed, Code: tunnel.NameUnresolved, Do: "check the name in cloud_proxy.address, and this machine's DNS server"}
		var dns *net.DNSError
		switch {
		case errors.As(err, &dns) && dns.IsNotFound:
			o.Says = fmt.Sprintf("the DNS server says that there is no %s", r.host)
		case errors.As(err, &dns) && dns.IsTimeout:
			o.Says = fmt.Sprintf("no DNS server answers when it is asked for %s", r.host)
			o.Do = "have DNS opened for this machine, or write the cloud proxy's address as a number"
		case errors.As(err, &dns) && dns.Server != "":
			o.Says = fmt.Sprintf("the DNS server %s can not resolve %s: %s", dns.Server, r.host, dns.Err)
			o.Do = "have IT look at that DNS server, or write the cloud proxy's address as a number"
		default:
			o.Says = fmt.Sprintf("%s can not be resolved: %v", r.host, err)
		}
		if r.cfg.Proxy != nil {
			o.Status, o.Do = Skipped, ""
			o.Says += "; the enterprise proxy resolves it"
		}
		return o
	}
	var words []string
	for _, a := range found {
		r.addrs = append(r.addrs, a.Unmap())
		words = append(words, a.Unmap().String())
	}
	return Outcome{Status: Good, Says: fmt.Sprintf("%s is %s", r.host, strings.Join(words, ", "))}
}

// tcp connects to the cloud proxy, directly.
func (r *run) tcp(ctx context.Context) Outcome {
	ctx, cancel := context.WithTimeout(ctx, dialTime)
	defer cancel()
	began := time.Now()
	c, err := r.cfg.Direct(ctx, "tcp", r.cfg.Address)
	if err == nil {
		c.Close()
		r.tcpOK = true
		return Outcome{Status: Good, Says: fmt.Sprintf("%s answers in %v", c.RemoteAddr(), time.Since(began).Round(time.Millisecond/10))}
	}
	o := Outcome{Status: Failed, Code: tunnel.CloudUnreachable}
	o.Says, o.Do = refusedOr(err, "TCP", r.cfg.Address)
	if r.filtered() {
		o.Says += fmt.Sprintf("; DNS says that %s is this machine itself (%s), as filters of names do", r.host, r.addrs[0])
		o.Do = fmt.Sprintf("have IT take %s out of the DNS filter", r.host)
	}
	if r.cfg.Proxy != nil {
		o.Status, o.Do = Skipped, ""
		o.Says += "; Culvert goes through the enterprise proxy"
	}
	return o
}

// filtered says whether a name leads to no other machine.
func (r *run) filtered() bool {
	_, err := netip.ParseAddr(r.host)
	return err != nil && len(r.addrs) > 0 && !slices.ContainsFunc(r.addrs, func(a netip.Addr) bool { return !a.IsLoopback() && !a.IsUnspecified() })
}

// refusedOr says how a network stands in the way of a packet.
func refusedOr(err error, protocol, address string) (says, do string) {
	_, port, _ := net.SplitHostPort(address)
	open := fmt.Sprintf("have IT open %s %s from this machine to %s", protocol, port, address)
	switch {
	case errors.Is(err, syscall.ECONNREFUSED):
		return fmt.Sprintf("%s to %s is refused: a firewall rejects it, or nothing listens there", protocol, address), open + "; or check that the cloud proxy runs"
	case errors.Is(err, syscall.EHOSTUNREACH), errors.Is(err, syscall.ENETUNREACH), errors.Is(err, syscall.EHOSTDOWN), errors.Is(err, syscall.ENOPROTOOPT): // the kernel's words for the codes of ICMP
		return fmt.Sprintf("%s to %s is rejected on the way, or there is no route: %v", protocol, address, reason(err)), open
	case errors.Is(err, syscall.EACCES): // ICMPv6's "administratively prohibited" as well
		return fmt.Sprintf("%s to %s is forbidden, on the way or by this machine's own firewall", protocol, address), open
	case errors.Is(err, syscall.EPERM):
		return fmt.Sprintf("this machine's own firewall forbids %s to %s", protocol, address), open
	case errors.Is(err, syscall.ECONNRESET):
		return fmt.Sprintf("%s to %s is cut by something on the way", protocol, address), open
	case errors.Is(err, context.DeadlineExceeded), errors.Is(err, os.ErrDeadlineExceeded), errors.Is(err, syscall.ETIMEDOUT):
		return fmt.Sprintf("%s to %s is dropped silently: nothing came back", protocol, address), open
	}
	return fmt.Sprintf("%s to %s fails: %v", protocol, address, reason(err)), open
}

// reason is the innermost error, whose text does not repeat the addresses.
func reason(err error) error {
	for {
		next := errors.Unwrap(err)
		if next == nil {
			return err
		}
		err = next
	}
}

// handshake looks at who answers with TLS, whoever it is, and then judges.
func (r *run) handshake(ctx context.Context) Outcome {
	ctx, cancel := context.WithTimeout(ctx, tlsTime)
	defer cancel()
	conf := r.cfg.TLS.Clone()
	conf.MinVersion = tls.VersionTLS12 // an inspecting proxy may know no other
	conf.InsecureSkipVerify, conf.VerifyConnection = true, nil
	if r.cfg.Web {
		conf.NextProtos, conf.Certificates = []string{"http/1.1"}, nil
		if net.ParseIP(r.host) == nil {
			conf.ServerName = r.host
		}
	}
	conn, err := r.client(ctx, conf)
	var record tls.RecordHeaderError
	if err != nil && !errors.As(err, &record) && ctx.Err() == nil {
		// What is no cloud proxy may not know our protocol: then show without.
		plain := conf.Clone()
		plain.NextProtos, plain.Certificates = nil, nil
		if again, e := r.client(ctx, plain); e == nil {
			conn, err = again, nil
		}
	}
	var byProxy *tunnel.Error
	switch {
	case err != nil && r.cfg.Proxy != nil && errors.As(err, &byProxy): // which has let the connection before through
		return ProxyOutcome("", err)
	case err != nil:
		return r.noTLS(err)
	}
	defer conn.Close()
	r.tls = r.verdict(conn.ConnectionState().PeerCertificates)
	// Nothing secret is said: whoever it is may tell the time.
	if !r.cfg.Web && r.tls.inspector == "" && (r.tls.code == "" || r.tls.date) {
		r.askTime(conn, conn.SetDeadline)
	}
	o := r.tls.outcome(r.skewKnown, r.skew, r.cfg.Now())
	r.tlsOK = o.Status != Failed
	return o
}

// verdict judges what was shown, by the cloud proxy or by a web server before it.
func (r *run) verdict(shown []*x509.Certificate) verdict {
	roots, now := r.cfg.TLS.RootCAs, r.cfg.Now()
	v := judge(shown, r.cfg.Pins, roots, r.cfg.TLS.ServerName, now)
	if v.foreign && namedFor(v.leaf, r.host) { // an inspector goes by the address where the name is ours alone
		v.foreign, v.code = false, tunnel.TLSIntercepted
		if v.own {
			v.code = tunnel.CertificateUntrusted
		}
	}
	switch {
	case v.code == "":
	case r.cfg.Web:
		v = judge(shown, nil, roots, r.host, now)
	case v.code == tunnel.TLSIntercepted:
		v.inspected(shown, roots, r.cfg.TLS.ServerName, r.cfg.Inspectors, now)
	}
	v.address = r.cfg.Address
	return v
}

func (r *run) client(ctx context.Context, conf *tls.Config) (*tls.Conn, error) {
	raw, err := r.cfg.Through(ctx, "tcp", r.cfg.Address)
	if err != nil {
		return nil, err
	}
	conn := tls.Client(raw, conf)
	if err := conn.HandshakeContext(ctx); err != nil {
		raw.Close()
		return nil, err
	}
	return conn, nil
}

// noTLS says what a failed handshake means.
func (r *run) noTLS(err error) Outcome {
	o := Outcome{Status: Failed, Code: tunnel.CloudUnreachable}
	var record tls.RecordHeaderError
	switch {
	case errors.As(err, &record) && string(record.RecordHeader[:]) == "HTTP/":
		o.Code = tunnel.CaptivePortal
		o.Says = fmt.Sprintf("%s answers with a web page where TLS is spoken: a captive portal, or a proxy that does not know this address", r.cfg.Address)
		o.Do = signIn
	case errors.As(err, &record) && r.via != "": // such as a page of its own behind a 200
		o.Says = fmt.Sprintf("%s says that it has connected to %s, and what comes then is not TLS", r.via, r.cfg.Address)
		o.Do = "have IT allow CONNECT to the cloud proxy, without inspection or a page in its place; else check cloud_proxy.address and its port"
	case errors.As(err, &record):
		o.Says = fmt.Sprintf("what answers at %s does not speak TLS", r.cfg.Address)
		o.Do = "check cloud_proxy.address and its port, and whether the network redirects it"
	case errors.Is(err, io.EOF), errors.Is(err, syscall.ECONNRESET):
		o.Says = fmt.Sprintf("the connection to %s is cut during the TLS handshake: something on the way forbids TLS that it does not know", r.cfg.Address)
		o.Do = "have IT exempt this address from application control and TLS inspection"
	case errors.Is(err, context.DeadlineExceeded), errors.Is(err, os.ErrDeadlineExceeded):
		o.Says = fmt.Sprintf("%s accepts TCP and then says nothing: something on the way swallows TLS", r.cfg.Address)
		o.Do = "have IT exempt this address from application control and TLS inspection"
	default:
		o.Says = fmt.Sprintf("what answers at %s is not a Culvert cloud proxy: %v", r.cfg.Address, reason(err))
		o.Do = "check cloud_proxy.address, its port and cloud_proxy.alpn"
	}
	return o
}

const signIn = "open a web browser on this machine, sign in at the page that the network shows, then check again"

// askTime learns the cloud proxy's clock, by asking to join no session, which
// is refused with the time.
func (r *run) askTime(c io.ReadWriter, deadline func(time.Time) error) {
	deadline(time.Now().Add(2 * time.Second))
	began, ours := time.Now(), r.cfg.Now()
	if wire.Write(c, wire.Message{Join: &wire.Join{Version: wire.Current, As: wire.AsLane}}) != nil {
		return
	}
	m, err := wire.Read(c, wire.Version{})
	if err != nil || m.Refused == nil || m.Refused.Time.IsZero() {
		return // a cloud proxy of before, or none
	}
	r.skew, r.skewKnown = m.Refused.Time.Sub(ours.Add(time.Since(began)/2)), true
}

// portal looks for a web page that stands in for others.
func (r *run) portal(ctx context.Context) Outcome {
	if r.tls.foreign {
		return Outcome{Status: Failed, Code: tunnel.CaptivePortal, Do: signIn,
			Says: fmt.Sprintf("another server answers with TLS in the cloud proxy's place: its certificate is for %q, issued by %q", r.tls.subject(), r.tls.issuer())}
	}
	ctx, cancel := context.WithTimeout(ctx, portalTime)
	defer cancel()
	t := &http.Transport{DialContext: r.cfg.Direct, DisableKeepAlives: true}
	host := r.host
	if strings.Contains(host, ":") {
		host = "[" + host + "]"
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+host+"/", nil)
	if err != nil {
		return Outcome{Status: Skipped, Says: "the cloud proxy's name fits in no URL"}
	}
	res, err := t.RoundTrip(req) // a client would take a Location that it can not read for no answer
	if err != nil {
		return Outcome{Status: Good, Says: "nobody answers plain HTTP in the cloud proxy's name"}
	}
	res.Body.Close()
	to := ""
	loc, err := res.Location()
	if err == nil && !strings.EqualFold(loc.Hostname(), r.host) {
		to = (&url.URL{Scheme: loc.Scheme, Host: loc.Host}).String() // what follows may be a secret of the portal's
	}
	caught := to != "" || err != nil && !errors.Is(err, http.ErrNoLocation) || res.StatusCode == http.StatusNetworkAuthenticationRequired // RFC 6585 §6
	switch {
	case caught && !r.tlsOK:
		o := Outcome{Status: Failed, Code: tunnel.CaptivePortal, Do: signIn, Says: fmt.Sprintf("a captive portal answers in the cloud proxy's name (HTTP %d)", res.StatusCode)}
		if to != "" {
			o.Says = fmt.Sprintf("a captive portal answers in the cloud proxy's name and sends to %.100q (HTTP %d)", to, res.StatusCode)
		}
		return o
	case caught:
		return Outcome{Status: Good, Says: fmt.Sprintf("plain HTTP is sent elsewhere (HTTP %d), but TLS reaches the cloud proxy itself", res.StatusCode)}
	}
	return Outcome{Status: Good, Says: fmt.Sprintf("plain HTTP is answered (HTTP %d) and sent nowhere", res.StatusCode)}
}

// sizes of UDP payloads that are tried: what any path takes, what QUIC needs at
// least (RFC 9000 §14), what our sealed packets need, and what most paths take.
var sizes = []int{100, 600, firstQUIC, 1232, 1280, 1400}

// firstQUIC is the size of the packets with which our QUIC begins.
const firstQUIC = 1200

// udp makes a QUIC connection, and beside it tries which sizes pass at all.
func (r *run) udp(ctx context.Context) Outcome {
	if r.cfg.Mode == tunnel.ModeTCP {
		return Outcome{Status: Skipped, Says: "mode is tcp"}
	}
	var passed map[int]bool
	var rejected error
	var wg sync.WaitGroup
	wg.Go(func() { passed, rejected = r.probe(ctx) })
	began := time.Now()
	dial, cancel := context.WithTimeout(ctx, dialTime)
	defer cancel()
	c, err := r.cfg.QUIC.Dial(dial, r.cfg.Address)
	took := time.Since(began)
	wg.Wait()
	if err == nil {
		r.askTime(c, c.SetDeadline)
		c.Close()
		r.udpOK = true
		o := Outcome{Status: Good, Says: fmt.Sprintf("QUIC answers in %v", took.Round(time.Millisecond/10))}
		if largest(passed) >= sizes[0] && !passed[1232] && !passed[1280] && !passed[1400] {
			o.Status, o.Code = Degraded, tunnel.UDPBlocked
			o.Says += fmt.Sprintf(", but of the sizes tried nothing above %d bytes passes", largest(passed))
			o.Do = "have IT look at the MTU and at what filters UDP by its size on the way to " + r.cfg.Address
		}
		return o
	}
	return udpFailure(err, passed, rejected, r.cfg.Address)
}

// udpFailure says why there is no QUIC, from what the handshake met and what
// single packets did.
func udpFailure(err error, passed map[int]bool, rejected error, address string) Outcome {
	o := Outcome{Status: Failed, Code: tunnel.UDPBlocked}
	switch code := tunnel.CodeOf(err); {
	case code != tunnel.UDPBlocked && code != tunnel.CloudUnreachable && code != tunnel.Internal:
		o.Code = code // the certificate, most likely
		o.Says, o.Do = tunnel.Sentence(err), "see the step about TLS"
	case largest(passed) >= firstQUIC:
		o.Says = fmt.Sprintf("UDP packets pass to %s, but QUIC does not: something on the way filters it", address)
		o.Do = fmt.Sprintf("have IT allow QUIC, as an application as well, from this machine to %s", address)
	case largest(passed) > 0:
		o.Says = fmt.Sprintf("only small UDP packets pass to %s: of the sizes tried %d bytes is the largest, and QUIC needs 1,200", address, largest(passed))
		o.Do = fmt.Sprintf("have IT let UDP packets of up to 1,500 bytes pass to %s", address)
	case rejected != nil:
		o.Says, o.Do = refusedOr(rejected, "UDP", address)
	case errors.Is(err, syscall.EPERM), errors.Is(err, syscall.EACCES), errors.Is(err, syscall.ECONNREFUSED):
		o.Says, o.Do = refusedOr(err, "UDP", address)
	default:
		o.Says, o.Do = refusedOr(context.DeadlineExceeded, "UDP", address)
	}
	return o
}

func largest(passed map[int]bool) int {
	most := 0
	for n := range passed {
		most = max(most, n)
	}
	return most
}

const (
	probeTries = 3
	probeEvery = 250 * time.Millisecond
)

// probe sends single packets of each size that look like those of a QUIC
// connection which the cloud proxy does not know (RFC 8999 §5.2): it answers each
// with a stateless reset (RFC 9000 §10.3), which is shorter. A cloud proxy
// without a reset key answers none.
func (r *run) probe(ctx context.Context) (passed map[int]bool, rejected error) {
	to, err := r.routed(ctx)
	if err != nil {
		return nil, err
	}
	passed = map[int]bool{}
	var mu sync.Mutex // guards passed and rejected
	var wg sync.WaitGroup
	for i, size := range sizes {
		wg.Go(func() {
			// Apart, since answers to many at once are not sent.
			select {
			case <-time.After(time.Duration(i) * probeEvery / time.Duration(len(sizes))):
			case <-ctx.Done():
				return
			}
			ok, err := r.probeSize(ctx, to, size)
			mu.Lock()
			defer mu.Unlock()
			if ok {
				passed[size] = true
			}
			if err != nil {
				rejected = err
			}
		})
	}
	wg.Wait()
	return passed, rejected
}

// routed returns the first address of the cloud proxy to which there is a route:
// this machine may have one family only.
func (r *run) routed(ctx context.Context) (to string, err error) {
	for _, a := range r.addrs {
		to = net.JoinHostPort(a.String(), r.port())
		var c net.Conn
		if c, err = r.cfg.Direct(ctx, "udp", to); err == nil { // nothing is sent
			c.Close()
			return to, nil
		}
	}
	return "", err
}

func (r *run) probeSize(ctx context.Context, to string, size int) (passed bool, rejected error) {
	c, err := r.cfg.Direct(ctx, "udp", to)
	if err != nil {
		return false, err
	}
	defer c.Close()
	hearRejections(c)
	p := make([]byte, size)
	var answer [1500]byte
	for range probeTries {
		rand.Read(p)            // never fails
		p[0] = 0x40 | p[0]&0x3f // short header, fixed bit
		if _, err := c.Write(p); err != nil && !errors.Is(err, syscall.EMSGSIZE) {
			return false, err
		}
		c.SetReadDeadline(time.Now().Add(probeEvery))
		_, err := c.Read(answer[:])
		switch {
		case err == nil:
			return true, nil
		case !errors.Is(err, os.ErrDeadlineExceeded) && !errors.Is(err, syscall.EMSGSIZE):
			return false, err // ICMP
		}
	}
	return false, nil
}

// ProxyOutcome says what an enterprise proxy, which calls itself via, has done with
// a connection to the cloud proxy.
func ProxyOutcome(via string, err error) Outcome {
	switch code := tunnel.CodeOf(err); {
	case err == nil && via == "":
		return Outcome{Status: Good, Says: "none is in the way to the cloud proxy"}
	case err == nil:
		return Outcome{Status: Good, Says: via + " connects to the cloud proxy", via: via}
	case code == tunnel.ProxyAuthRequired:
		return Outcome{Status: Failed, Code: code, Says: tunnel.Sentence(err), Do: "set proxy.user and proxy.password_file to what the proxy accepts, or have IT let this machine through without"}
	case errors.Is(err, tunnel.CaptivePortal):
		return Outcome{Status: Failed, Code: tunnel.CaptivePortal, Says: tunnel.Sentence(err), Do: signIn}
	case code == tunnel.NotPermitted:
		return Outcome{Status: Failed, Code: code, Says: tunnel.Sentence(err), Do: "have IT allow CONNECT to the cloud proxy, without inspection"}
	default:
		return Outcome{Status: Failed, Code: tunnel.CloudUnreachable, Says: tunnel.Sentence(err), Do: "check proxy.url, proxy.pac or HTTPS_PROXY, and have IT look at the proxy"}
	}
}

// clock compares this machine's clock with the cloud proxy's.
func (r *run) clock() Outcome {
	if !r.skewKnown {
		return Outcome{Status: Skipped, Says: "the cloud proxy has not told the time"}
	}
	off := r.skew.Abs().Round(time.Second)
	switch {
	case off <= Skew && off < 2*time.Second:
		return Outcome{Status: Good, Says: "it agrees with the cloud proxy's"}
	case off <= Skew:
		return Outcome{Status: Good, Says: fmt.Sprintf("it differs from the cloud proxy's by %v, which is accepted", off)}
	}
	return Outcome{Status: Degraded, Code: tunnel.ClockWrong, Says: fmt.Sprintf("this machine's clock is %s, against the cloud proxy's", behind(r.skew)), Do: setClock}
}

const setClock = "set this machine's clock (turn on NTP), then check again"

// behind says how wrong our clock is.
func behind(skew time.Duration) string {
	off := skew.Abs().Round(time.Second)
	if skew > 0 {
		return fmt.Sprintf("%v behind", off)
	}
	return fmt.Sprintf("%v ahead", off)
}
