package sidecar

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"culvert/tunnel"
)

// rfcCase is one conversation of RFC 1928 and 1929.
type rfcCase struct {
	name   string
	auth   bool // the front asks for user and password
	parts  [][]byte
	want   []byte // all that is answered, of a request that is not served
	served byte   // the command that is; then want is what stands before the reply
}

const (
	rfcUser     = "user"
	rfcPassword = "a long password"
)

func rfcLogin(version byte, user, password string) []byte {
	b := append([]byte{version, byte(len(user))}, user...)
	return append(append(b, byte(len(password))), password...)
}

// rfcCases is every combination of what the two documents tell apart.
func rfcCases() (all []rfcCase) {
	refused := func(code byte) []byte { return []byte{5, code, 0, 1, 0, 0, 0, 0, 0, 0} }
	address := map[byte][]byte{
		atypIPv4: {atypIPv4, 192, 0, 2, 1}, atypIPv6: append([]byte{atypIPv6, 0x20, 1, 0xd, 0xb8}, make([]byte, 12)...),
		atypName: append([]byte{atypName, 255}, strings.Repeat("n", 255)...),
	}
	for _, unknown := range []byte{0, 2, 5, 255} {
		address[unknown] = []byte{unknown, 1, 2, 3, 4}
	}
	// RFC 1928 §4: each command with each type of address.
	for _, command := range []byte{1, 2, 3, 0, 4, 127, 255} {
		for atyp, a := range address {
			for _, auth := range []bool{false, true} {
				c := rfcCase{name: fmt.Sprintf("command %d, address type %d, login %v", command, atyp, auth), auth: auth,
					parts: [][]byte{{5, 1, 0}, append(append([]byte{5, command, 0}, a...), 0x1b, 0x58)}, want: []byte{5, 0}}
				if auth {
					c.parts[0], c.want = append([]byte{5, 1, 2}, rfcLogin(1, rfcUser, rfcPassword)...), []byte{5, 2, 1, 0}
				}
				switch {
				case atyp != atypIPv4 && atyp != atypIPv6 && atyp != atypName:
					c.want = append(c.want, refused(socksAddressUnsupported)...)
				case command == 1 || command == 3:
					c.served = command
				default:
					c.want = append(c.want, refused(socksCommandUnsupported)...)
				}
				all = append(all, c)
			}
		}
	}
	// §3: the methods that are offered, of which 255 and those for private use are none.
	many := make([]byte, 253)
	for i := range many {
		many[i] = byte(i + 3)
	}
	connect := append(append([]byte{5, 1, 0}, address[atypIPv4]...), 0x1b, 0x58)
	for _, methods := range [][]byte{{}, {0}, {1}, {2}, {0, 2}, {2, 0}, {1, 0}, {255}, {0, 0, 0}, many, append(bytes.Clone(many), 0), append(bytes.Clone(many), 2)} {
		greeting := append([]byte{5, byte(len(methods))}, methods...)
		open := rfcCase{name: fmt.Sprintf("methods %.12x, no login", methods), parts: [][]byte{greeting, connect}, want: []byte{5, 0}, served: 1}
		login := rfcCase{name: fmt.Sprintf("methods %.12x, a login", methods), auth: true, parts: [][]byte{greeting, rfcLogin(1, rfcUser, rfcPassword), connect}, want: []byte{5, 2, 1, 0}, served: 1}
		if !slices.Contains(methods, 0) {
			open.want, open.served = []byte{5, 255}, 0
		}
		if !slices.Contains(methods, 2) {
			login.want, login.served = []byte{5, 255}, 0
		}
		all = append(all, open, login)
	}
	// RFC 1929 §2: one version, and lengths up to 255.
	for _, user := range []string{"", "u", rfcUser, rfcUser + "x", strings.Repeat("u", 255), "\r\n\x1b[2J", "\xff\x00"} {
		for _, password := range []string{"", rfcPassword[:5], rfcPassword, rfcPassword + "x", strings.Repeat("p", 255)} {
			c := rfcCase{name: fmt.Sprintf("user %.8q, password %.8q", user, password), auth: true, parts: [][]byte{{5, 1, 2}, rfcLogin(1, user, password), connect}, want: []byte{5, 2, 1, 1}}
			if user == rfcUser && password == rfcPassword {
				c.want, c.served = []byte{5, 2, 1, 0}, 1
			}
			all = append(all, c)
		}
	}
	for _, version := range []byte{0, 2, 5, 255} {
		all = append(all, rfcCase{name: fmt.Sprintf("login of version %d", version), auth: true, parts: [][]byte{{5, 1, 2}, rfcLogin(version, rfcUser, rfcPassword), connect}, want: []byte{5, 2}})
		if version != 5 {
			all = append(all, rfcCase{name: fmt.Sprintf("request of version %d", version), parts: [][]byte{{5, 1, 0}, append([]byte{version}, connect[1:]...)}, want: []byte{5, 0}})
		}
	}
	return all
}

// However a conversation is cut into segments, each request is answered as RFC
// 1928 and 1929 say, and a connection that is not served ends within a second.
func TestEachRequestOfRFC1928And1929IsAnswered(t *testing.T) {
	echo := frontFarEnd(t, frontEcho)
	next := &frontDirect{open: func(ctx context.Context, _ tunnel.Target) (tunnel.Stream, error) {
		c, err := new(net.Dialer).DialContext(ctx, "tcp", echo.String())
		if err != nil {
			return nil, err
		}
		return &frontStream{TCPConn: c.(*net.TCPConn)}, nil
	}}
	fronts := map[bool]*Front{
		false: frontStart(t, next, nil),
		true:  frontStart(t, next, func(c *FrontConfig) { c.Auth = StaticAuth(rfcUser, rfcPassword) }),
	}
	var took []time.Duration
	all := rfcCases()
	for _, tc := range all {
		for cut, send := range frontCuts {
			c := frontDial(t, fronts[tc.auth])
			parts := tc.parts
			if tc.served == 1 {
				parts = append(slices.Clone(parts), []byte("payload"))
			}
			send(c, parts...)
			sent := time.Now()
			got := make([]byte, len(tc.want))
			if n, err := io.ReadFull(c, got); err != nil || !bytes.Equal(got, tc.want) {
				t.Errorf("%s, %s: answered %x, %v, want %x", tc.name, cut, got[:n], err, tc.want)
				c.Close()
				continue
			}
			if tc.served != 0 {
				reply := make([]byte, 10)
				if _, err := io.ReadFull(c, reply); err != nil || !bytes.Equal(reply[:4], []byte{5, 0, 0, 1}) {
					t.Errorf("%s, %s: reply %x, %v", tc.name, cut, reply, err)
				}
				if payload := make([]byte, 7); tc.served == 1 {
					if _, err := io.ReadFull(c, payload); err != nil || string(payload) != "payload" {
						t.Errorf("%s, %s: echo %q, %v", tc.name, cut, payload, err)
					}
				}
				c.Close()
				continue
			}
			rest, err := io.ReadAll(c)
			if len(rest) != 0 || errors.Is(err, os.ErrDeadlineExceeded) {
				t.Errorf("%s, %s: it goes on with %x, %v", tc.name, cut, rest, err)
			}
			took = append(took, time.Since(sent))
			c.Close()
		}
	}
	slices.Sort(took)
	// The median, because a busy machine may stop any one of them for longer.
	if median := took[len(took)/2]; median > time.Second {
		t.Errorf("half of the %d connections that are not served are open after %s", len(took), median)
	}
	t.Logf("%d conversations in %d cuts each; what is not served has ended within %s (median), %s (all)", len(all), len(frontCuts), took[len(took)/2], took[len(took)-1])
}

// An association is over when its TCP connection is, at once.
func TestAnAssociationEndsAtOnceWithItsConnection(t *testing.T) {
	next := &frontDirect{}
	f := frontStart(t, next, nil)
	for name, leave := range map[string]func(*net.TCPConn){
		"close":      func(c *net.TCPConn) { c.Close() },
		"half-close": func(c *net.TCPConn) { c.CloseWrite() },
		"reset":      func(c *net.TCPConn) { c.SetLinger(0); c.Close() },
	} {
		var took []time.Duration
		for range 30 {
			c, _ := frontAssociate(t, f, frontUnnamed)
			relay, left := next.relay(), time.Now()
			leave(c)
			select {
			case <-relay.closed:
			case <-time.After(frontPatience):
				t.Fatalf("%s: it is still open", name)
			}
			took = append(took, time.Since(left))
		}
		slices.Sort(took)
		if median := took[len(took)/2]; median > 100*time.Millisecond {
			t.Errorf("%s: half of %d associations last longer than %s", name, len(took), median)
		}
		t.Logf("%s: %d associations have ended within %s (median), %s (all)", name, len(took), took[len(took)/2], took[len(took)-1])
	}
}

// RFC 1928 §7: who does not put fragments together must drop all that are some.
func TestEachFragmentIsDropped(t *testing.T) {
	echo := frontUDPEcho(t)
	next := &frontDirect{}
	f := frontStart(t, next, nil)
	_, relay := frontAssociate(t, f, frontUnnamed)
	fragments := frontApp(t, relay) // of another socket than the whole one: they lock nothing
	for frag := 1; frag < 256; frag++ {
		b := frontDatagram(tunnel.TargetOf(echo), "x")
		b[2] = byte(frag)
		fragments.Write(b)
	}
	frontEventually(t, "all are counted", func() bool { return f.Stats().Dropped["fragment"] == 255 })
	app := frontApp(t, relay)
	app.Write(frontDatagram(tunnel.TargetOf(echo), "whole"))
	frontExpect(t, app, echo, "whole")
	if n := next.relay().sent.Load(); n != 1 {
		t.Errorf("%d datagrams were passed on", n)
	}
}

// RFC 1928 §6: a client that does not know its own address yet says zeros, and
// some say what others know them by.
func TestAnAssociationIsForItsFirstSenderWhateverItsClientSaid(t *testing.T) {
	echo := frontUDPEcho(t)
	f := frontStart(t, &frontDirect{}, nil)
	zeros, cases := uint64(0), 0
	for _, own := range []tunnel.Target{
		{Addr: netip.IPv4Unspecified()}, {Addr: netip.IPv6Unspecified()}, {Addr: netip.MustParseAddr("127.0.0.1")}, {Addr: netip.MustParseAddr("192.168.1.7")},
		{Addr: netip.MustParseAddr("::ffff:127.0.0.1")}, {Addr: netip.MustParseAddr("2001:db8::1")}, {Host: "localhost"}, {Host: "laptop.clinic.example"},
	} {
		request := []byte{5, 3, 0}
		if own.Host == "" && own.Addr.Is6() { // also those that hold an IPv4 address
			b := own.Addr.As16()
			request = append(append(append(request, atypIPv6), b[:]...), 0, 0)
		} else {
			request = frontRequestBytes(3, own)
		}
		c := frontDial(t, f)
		c.Write(append(bytes.Clone(frontGreet), request...))
		got := frontRead(t, c, 12)
		if got[3] != 0 {
			t.Errorf("%s: reply %x", own, got)
			continue
		}
		relay := netip.AddrPortFrom(netip.AddrFrom4([4]byte(got[6:])), uint16(got[10])<<8|uint16(got[11]))
		app, other := frontApp(t, relay), frontApp(t, relay)
		app.Write(frontDatagram(tunnel.TargetOf(echo), "first"))
		frontExpect(t, app, echo, "first")
		other.Write(frontDatagram(tunnel.TargetOf(echo), "stolen"))
		zeros++
		frontEventually(t, "another is dropped", func() bool { return f.Stats().Dropped["wrong_source"] == zeros })
		app.Write(frontDatagram(tunnel.TargetOf(echo), "again"))
		frontExpect(t, app, echo, "again")
		c.Close()
		cases++
	}
	t.Logf("%d ways to say it", cases)
}
