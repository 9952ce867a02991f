package httpproxy

import (
	"context"
	"errors"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	ccache "github.com/jcmturner/gokrb5/v8/credentials"

	"culvert/tunnel"
)

// realm starts MIT's KDC on loopback, with alice, who has a ticket, and a key for
// the proxy on this host. It sets this process's environment.
func realm(t *testing.T, dir string) {
	t.Helper()
	at := free(t)
	for name, text := range map[string]string{
		"krb5.conf": `[libdefaults]
	default_realm = CLINIC.TEST
	dns_lookup_kdc = false
	dns_canonicalize_hostname = false
	rdns = false
	udp_preference_limit = 1
[realms]
	CLINIC.TEST = {
		kdc = AT
	}
`,
		"kdc.conf": `[kdcdefaults]
	kdc_listen = ""
	kdc_tcp_listen = AT
[realms]
	CLINIC.TEST = {
		database_name = DIR/principal
		key_stash_file = DIR/stash
		acl_file = DIR/acl
	}
[logging]
	kdc = FILE:DIR/kdc.log
`,
	} {
		text = strings.NewReplacer("AT", at, "DIR", dir).Replace(text)
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	t.Setenv("KRB5_CONFIG", filepath.Join(dir, "krb5.conf"))
	t.Setenv("KRB5_KDC_PROFILE", filepath.Join(dir, "kdc.conf"))
	t.Setenv("KRB5CCNAME", filepath.Join(dir, "tickets"))
	do := func(in, program string, args ...string) {
		t.Helper()
		cmd := exec.Command(needed(t, program), args...)
		cmd.Stdin = strings.NewReader(in)
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%s %q: %v\n%s", program, args, err, out)
		}
	}
	do("", "kdb5_util", "create", "-s", "-P", "master", "-r", "CLINIC.TEST")
	do("addprinc -pw sesame alice\naddprinc -randkey HTTP/127.0.0.1\nktadd -k "+filepath.Join(dir, "keytab")+" HTTP/127.0.0.1\n", "kadmin.local", "-r", "CLINIC.TEST")
	if err := os.Chmod(filepath.Join(dir, "keytab"), 0o644); err != nil { // for squid's user
		t.Fatal(err)
	}
	kdc := exec.Command(needed(t, "krb5kdc"), "-n", "-r", "CLINIC.TEST")
	if err := kdc.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		kdc.Process.Kill()
		kdc.Wait()
		if log, err := os.ReadFile(filepath.Join(dir, "kdc.log")); t.Failed() && err == nil {
			t.Logf("KDC:\n%s", log)
		}
	})
	for end := time.Now().Add(30 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		if c, err := net.Dial("tcp", at); err == nil {
			c.Close()
			break
		}
		if time.Now().After(end) {
			t.Fatal("the KDC does not listen")
		}
	}
	do("sesame\n", "kinit", "alice")
}

func TestATicketOpensASquidThatWantsKerberos(t *testing.T) {
	dir, at := openDir(t), echo(t)
	realm(t, dir)
	u := squid(t, dir, "auth_param negotiate program /usr/lib/squid/negotiate_kerberos_auth -k DIR/keytab -s HTTP/127.0.0.1@CLINIC.TEST")
	d := dialer(t, Config{Choose: to(u), Ticket: Ticket})
	passes(t, d, at)
	d.learn(u, func(k *known) {
		if k.method == nil || !k.method.ticket {
			t.Errorf("squid was answered by %+v", k.method)
		}
	})
	// What is no ticket cache is a sentence, and no end of the process.
	if err := os.WriteFile(filepath.Join(dir, "tickets"), []byte{5, 4, 0, 12, 255, 255, 255}, 0o600); err != nil {
		t.Fatal(err)
	}
	_, err := d.Dial(t.Context(), "tcp", at)
	if tunnel.CodeOf(err) != tunnel.ProxyAuthRequired || !strings.Contains(err.Error(), "ticket could not be used") || strings.Contains(err.Error(), "\n") {
		t.Errorf("with a broken cache: %v", err)
	}
	t.Setenv("KRB5CCNAME", "FILE:"+filepath.Join(dir, "none"))
	if _, err := Ticket(t.Context(), "127.0.0.1"); !errors.Is(err, errNoTickets) {
		t.Errorf("without a cache: %v", err)
	}
	if _, err = d.Dial(t.Context(), "tcp", at); tunnel.CodeOf(err) != tunnel.ProxyAuthRequired || strings.Contains(err.Error(), "could not be used") {
		t.Errorf("without a cache: %v", err)
	}
	t.Setenv("KRB5CCNAME", "KEYRING:persistent:0")
	if _, err := Ticket(t.Context(), "127.0.0.1"); err == nil {
		t.Error("a cache that is no file is read")
	}
}

// Where the ticket is not accepted, or there is none, the password is used.
func TestAfterATicketThePasswordIsTried(t *testing.T) {
	for name, ticket := range map[string]func(context.Context, string) ([]byte, error){
		"not accepted": func(context.Context, string) ([]byte, error) { return []byte("ticket"), nil },
		"not had":      func(context.Context, string) ([]byte, error) { return nil, errNoTickets },
	} {
		for scheme, login := range map[string]struct {
			offer []string
			want  string
		}{
			"NTLM":  {[]string{`Basic realm="r"`}, "Negotiate"},
			"Basic": {nil, "Basic"},
		} {
			t.Run(name+", then "+scheme, func(t *testing.T) {
				judge := ntlm("Negotiate", login.offer...)
				if scheme == "Basic" {
					judge = func(s *session, r *http.Request) []string {
						if ask := basic(s, r); ask != nil {
							return append([]string{"Negotiate"}, ask...)
						}
						return nil
					}
				}
				p := newProxy(t, judge)
				d := dialer(t, Config{Choose: to(p.url), Ticket: ticket, Credentials: knownAs(goodUser, goodPassword)})
				if err := dial(t, d); err != nil {
					t.Fatal(err)
				}
				if said, _ := p.heard(); begins(said)[len(said)-1] != login.want {
					t.Errorf("the proxy heard %q", begins(said))
				}
			})
		}
	}
}

// What the proxy wants has to be said: a password does not help.
func TestNegotiateAloneAsksForATicket(t *testing.T) {
	p := newProxy(t, func(*session, *http.Request) []string { return []string{"Negotiate"} })
	for name, c := range map[string]struct {
		user string
		err  error
		want []string
	}{
		"nothing here":   {"", errNoTickets, []string{"set proxy.user", "there is no Kerberos ticket here, which kinit gets"}},
		"a password":     {goodUser, errNoTickets, []string{"takes no password that way", "which kinit gets"}},
		"a ticket":       {"", nil, []string{"a Kerberos ticket was not accepted"}},
		"both":           {goodUser, nil, []string{"takes no password that way", "a Kerberos ticket was not accepted"}},
		"a broken cache": {goodUser, errors.New("broken"), []string{`could not be used ("broken")`}},
	} {
		d := dialer(t, Config{Choose: to(p.url), Ticket: func(context.Context, string) ([]byte, error) { return []byte("ticket"), c.err }, Credentials: knownAs(c.user, goodPassword)})
		err := dial(t, d)
		for _, want := range c.want {
			if tunnel.CodeOf(err) != tunnel.ProxyAuthRequired || !strings.Contains(err.Error(), want) {
				t.Errorf("%s: %v", name, err)
			}
		}
	}
}

// Every user of the machine may put something where nobody has named a cache.
func TestATicketCacheIsAFileOfOurOwnInBounds(t *testing.T) {
	dir := t.TempDir()
	at := func(name string) string { return filepath.Join(dir, name) }
	for _, name := range []string{"good", "huge", "foreign"} {
		if err := os.WriteFile(at(name), []byte("tickets"), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Truncate(at("huge"), 1<<40); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Mkfifo(at("pipe"), 0o644); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]string{"good": "", "huge": "longer than", "pipe": "is no file", ".": "is no file"} {
		for _, named := range []bool{true, false} {
			text, err := readCache(at(name), named)
			if want == "" && (err != nil || string(text) != "tickets") || want != "" && (err == nil || !strings.Contains(err.Error(), want)) {
				t.Errorf("%s, named %t: %d bytes, %v", name, named, len(text), err)
			}
		}
	}
	if err := os.Chown(at("foreign"), 12345, -1); err != nil {
		t.Skip("a file of another user: ", err)
	}
	if _, err := readCache(at("foreign"), false); err == nil || !strings.Contains(err.Error(), "another user's") {
		t.Errorf("another user's: %v", err)
	}
	if _, err := readCache(at("foreign"), true); err != nil {
		t.Errorf("another user's, which the operator has named: %v", err)
	}
}

func TestAnExpiredTicketIsSaidToBe(t *testing.T) {
	dir := openDir(t)
	realm(t, dir)
	text, err := os.ReadFile(filepath.Join(dir, "tickets"))
	if err != nil {
		t.Fatal(err)
	}
	tickets := new(ccache.CCache)
	if err := tickets.Unmarshal(text); err != nil {
		t.Fatal(err)
	}
	now := time.Now()
	if ended := expired(tickets, now); !ended.IsZero() {
		t.Errorf("a good one has expired on %v", ended)
	}
	if ended := expired(tickets, now.AddDate(1, 0, 0)); ended.Before(now) || ended.After(now.AddDate(1, 0, 0)) {
		t.Errorf("in a year it will have expired on %v", ended)
	}
}
