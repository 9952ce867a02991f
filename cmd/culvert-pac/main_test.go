package main

import (
	"context"
	"errors"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"culvert/tunnel"
	"culvert/tunnel/httpproxy"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// at is a Friday.
var at = time.Date(2026, time.November, 27, 14, 30, 15, 0, time.FixedZone("CET", 3600))

func knows(_ context.Context, host string) ([]string, error) {
	if a := map[string][]string{"inside.clinic.example": {"2001:db8::7", "10.1.2.3"}, "six.example": {"2001:db8::1"}}[host]; a != nil {
		return a, nil
	}
	return nil, &net.DNSError{IsNotFound: true}
}

func asked(t *testing.T, script, host string) (string, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 500*time.Millisecond)
	defer cancel()
	return find(ctx, script, host, world{now: at, lookup: knows, own: func() string { return "10.9.8.7" }})
}

func TestTheFunctionsThatScriptsMayCall(t *testing.T) {
	for expression, want := range map[string]string{
		`isPlainHostName("www")`:                                           "true",
		`isPlainHostName("www.example")`:                                   "false",
		`dnsDomainIs("www.Clinic.example", ".clinic.example")`:             "true",
		`dnsDomainIs("clinic.example", ".clinic.example")`:                 "false",
		`localHostOrDomainIs("www", "www.clinic.example")`:                 "true",
		`localHostOrDomainIs("ww", "www.clinic.example")`:                  "false",
		`localHostOrDomainIs("home.clinic.example", "www.clinic.example")`: "false",
		`isResolvable("inside.clinic.example")`:                            "true",
		`isResolvable("nobody.example")`:                                   "false",
		`dnsResolve("inside.clinic.example")`:                              "10.1.2.3",
		`dnsResolve("nobody.example")`:                                     "null",
		`isInNet("inside.clinic.example", "10.1.0.0", "255.255.0.0")`:      "true",
		`isInNet("10.2.0.1", "10.1.0.0", "255.255.0.0")`:                   "false",
		`isInNet("nobody.example", "10.1.0.0", "255.255.0.0")`:             "false",
		`isInNet("six.example", "10.1.0.0", "255.255.0.0")`:                "false",
		`isInNet("10.2.0.1", "0.0.0.0", "0.0.0.0")`:                        "true",
		`isInNet("10.2.0.1", "rubbish", "255.0.0.0")`:                      "false",
		`convert_addr("104.16.41.2")`:                                      "1745889538",
		`myIpAddress()`:                                                    "10.9.8.7",
		`dnsDomainLevels("a.b.c")`:                                         "2",
		`shExpMatch("http://home/a.png", "*/home/?.png")`:                  "true",
		`shExpMatch("abc", "a.c")`:                                         "false",
		`shExpMatch("a+(b", "a+(?")`:                                       "true",
		`weekdayRange("FRI")`:                                              "true",
		`weekdayRange("MON", "FRI")`:                                       "true",
		`weekdayRange("SAT", "MON")`:                                       "false",
		`weekdayRange("THU", "MON", "GMT")`:                                "true",
		`weekdayRange("XXX")`:                                              "false",
		`timeRange(14)`:                                                    "true",
		`timeRange(13, "GMT")`:                                             "true",
		`timeRange(8, 13)`:                                                 "false",
		`timeRange(14, 30, 14, 31)`:                                        "true",
		`timeRange(22, 30, 6, 0)`:                                          "false",
		`timeRange(14, 30, 16, 14, 40, 0)`:                                 "false",
		`timeRange()`:                                                      "false",
		`timeRange("noon")`:                                                "false",
		`dateRange(27)`:                                                    "true",
		`dateRange(1, 15)`:                                                 "false",
		`dateRange("NOV")`:                                                 "true",
		`dateRange("OCT", "FEB")`:                                          "true",
		`dateRange(24, "DEC", 6, "JAN")`:                                   "false",
		`dateRange(2026)`:                                                  "true",
		`dateRange("JUN", 2025, "AUG", 2026)`:                              "false",
		`dateRange(1, "NOV", 2026, 30, "NOV", 2026, "GMT")`:                "true",
		`dateRange(1, "NOV", 2026)`:                                        "false",
		`dateRange()`:                                                      "false",
	} {
		got, err := asked(t, `function FindProxyForURL(url, host) { return String(`+expression+`); }`, "x")
		if err != nil || got != want {
			t.Errorf("%s is %q (%v), want %s", expression, got, err, want)
		}
	}
}

func TestWhatAScriptIsToldAndAnswers(t *testing.T) {
	for script, want := range map[string]string{
		`function FindProxyForURL(url, host) { return url + " " + host; }`: "https://cloud.example/ cloud.example",
		`function FindProxyForURL() { return null; }`:                      "DIRECT",
		`function FindProxyForURL() { }`:                                   "DIRECT",
		`var FindProxyForURL = () => "PROXY a:1";`:                         "PROXY a:1",
		`function FindProxyForURL() { return "a\nb"; }`:                    "",
		`function FindProxyForURL() { return "x".repeat(10000); }`:         "",
		`function FindProxyForURL() { for (;;); }`:                         "",
		`function FindProxyForURL() { return FindProxyForURL(); }`:         "",
		`function FindProxyForURL() { return gone(); }`:                    "",
		`function FindProxyForURL( {`:                                      "",
		`for (;;);`:                                                        "",
		`var x = require("fs");`:                                           "",
		``:                                                                 "",
	} {
		got, err := asked(t, script, "cloud.example")
		if got != want || (err == nil) != (want != "") {
			t.Errorf("%s: %q, %v", script, got, err)
		}
	}
	if got, err := asked(t, `function FindProxyForURL(url, host) { return url + " " + host; }`, "2001:db8::1"); got != "https://[2001:db8::1]/ 2001:db8::1" {
		t.Errorf("%q, %v", got, err)
	}
}

func TestWhyAScriptFailsIsSaid(t *testing.T) {
	for script, want := range map[string]string{
		`function FindProxyForURL() { return FindProxyForURL(); }`: "calls itself more than 1000 times",
		`(function f() { f(); })();`:                               "calls itself more than 1000 times",
		`function FindProxyForURL() { for (;;); }`:                 "takes too long",
		`function FindProxyForURL() { return gone(); }`:            "gone is not defined",
		`<html>`: "SyntaxError",
	} {
		if _, err := asked(t, script, "cloud.example"); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", script, err)
		}
	}
}

// program builds this command.
func program(t *testing.T) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), httpproxy.PACProgram)
	if out, err := exec.CommandContext(t.Context(), "go", "build", "-o", file, ".").CombinedOutput(); err != nil {
		t.Fatalf("go build: %v\n%s", err, out)
	}
	return file
}

func write(t *testing.T, script string) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "clinic.pac")
	if err := os.WriteFile(file, []byte(script), 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}

func TestASidecarGoesWhereThePACFileSays(t *testing.T) {
	bin := program(t)
	t.Setenv("SECRET", "sesame")
	for name, c := range map[string]struct {
		script string
		want   string // ways; "-" is the direct one
		code   tunnel.Code
	}{
		"a proxy, then direct": {`function FindProxyForURL(url, host) { return "PROXY " + host + ":3128; DIRECT"; }`, "http://cloud.example.net:3128 -", ""},
		"https":                {`function FindProxyForURL() { return "HTTPS proxy"; }`, "https://proxy:443", ""},
		"no SOCKS":             {`function FindProxyForURL() { return "SOCKS a:1; PROXY b:2"; }`, "http://b:2", ""},
		"only SOCKS":           {`function FindProxyForURL() { return "SOCKS5 a:1"; }`, "", tunnel.Unsupported},
		"a password":           {`function FindProxyForURL() { return "PROXY u:p@b:2"; }`, "", tunnel.Unsupported},
		"nothing":              {`function FindProxyForURL() { return ""; }`, "", ""},
		"fails":                {`function FindProxyForURL() { throw "no"; }`, "", tunnel.CloudUnreachable},
		"eats memory":          {`function FindProxyForURL() { var a = []; for (;;) a.push(new Array(1e6).fill(1)); }`, "", tunnel.CloudUnreachable},
	} {
		t.Run(name, func(t *testing.T) {
			pac := &httpproxy.PAC{Source: write(t, c.script), Program: bin}
			ways, err := pac.Choose(t.Context(), "cloud.example.net:443")
			if got := say(ways); got != c.want || tunnel.CodeOf(err) != c.code || err != nil && strings.Contains(err.Error(), "\n") {
				t.Errorf("%q, %v", got, err)
			}
		})
	}
	if out, err := exec.Command(bin).CombinedOutput(); err == nil || !strings.Contains(string(out), "usage") {
		t.Errorf("%s, %v", out, err)
	}
	pac := &httpproxy.PAC{Source: filepath.Join(t.TempDir(), "none"), Program: bin}
	if _, err := pac.Choose(t.Context(), "a:443"); tunnel.CodeOf(err) != tunnel.ConfigInvalid || !strings.Contains(err.Error(), "proxy.pac") {
		t.Errorf("without a file: %v", err)
	}
}

func say(ways []*url.URL) string {
	var all []string
	for _, u := range ways {
		if u == nil {
			all = append(all, "-")
		} else {
			all = append(all, u.String())
		}
	}
	return strings.Join(all, " ")
}

func TestAPACFileIsFetchedAndWhatItSaidIsRemembered(t *testing.T) {
	bin := program(t)
	status, fetched := http.StatusOK, 0
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		fetched++
		w.WriteHeader(status)
		w.Write([]byte(`function FindProxyForURL() { return "PROXY proxy:3128"; }`))
	}))
	defer s.Close()
	u := strings.Replace(s.URL, "http://", "http://who:sesame@", 1) + "/proxy.pac"
	pac := &httpproxy.PAC{Source: u, Program: bin}
	for _, host := range []string{"a:443", "a:443", "b:443"} {
		ways, err := pac.Choose(t.Context(), host)
		if err != nil || say(ways) != "http://proxy:3128" {
			t.Errorf("%q, %v", say(ways), err)
		}
	}
	if fetched != 1 {
		t.Errorf("it was fetched %d times", fetched)
	}
	status = http.StatusNotFound
	_, err := (&httpproxy.PAC{Source: u, Program: bin}).Choose(t.Context(), "a:443")
	if tunnel.CodeOf(err) != tunnel.CloudUnreachable || !strings.Contains(err.Error(), "404") || strings.Contains(err.Error(), "sesame") {
		t.Errorf("where there is none: %v", err)
	}
	s.Close()
	if _, err = (&httpproxy.PAC{Source: u, Program: bin}).Choose(t.Context(), "a:443"); tunnel.CodeOf(err) != tunnel.CloudUnreachable || strings.Contains(err.Error(), "sesame") {
		t.Errorf("where nobody answers: %v", err)
	}
	if ways, err := pac.Choose(t.Context(), "c:443"); err != nil || say(ways) != "http://proxy:3128" {
		t.Errorf("with a script from before: %q, %v", say(ways), err)
	}
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		t.Error("the program was run without a script")
	}
}
