package main

import (
	"bytes"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"culvert/cmd/internal/cmdtest"
	"culvert/cmd/internal/config"
	"culvert/cmd/internal/netpair"
	"culvert/sidecar/control"
	"culvert/tunnel"
)

// secretBed is a pair whose two programs know secrets of every kind.
type secretBed struct {
	*only443
	near, far *exec.Cmd
	cloudLog  *cmdtest.Text
	secrets   map[string][]string // by what they are: in each way to write them
	told      map[string]string   // what was written or answered, by where
}

// knows adds a secret.
func (s *secretBed) knows(what, secret string) {
	s.secrets[what] = append(s.secrets[what], secret, base64.StdEncoding.EncodeToString([]byte(secret)), base64.RawURLEncoding.EncodeToString([]byte(secret)), hex.EncodeToString([]byte(secret)))
}

// secretWords are passwords and tokens that appear in nothing else.
var secretWords = map[string]string{
	"the front's password": "opensesame-front-1", "the HTTP proxy's password": "opensesame-proxy-2", "the control API's token": "opensesame-control-3",
	"a wrong password of the front": "opensesame-wrong-4", "a wrong token of the control API": "opensesame-wrong-control-5", "the password of a PAC file's URL": "opensesame-pac-6", "a wrong token of a sidecar": "opensesame.wrong.token7",
}

// Whatever is done with the two programs, at level debug, none of their secrets is
// in a log, a status, an answer, an argument or a core.
func TestSecretsAreInNoLogStatusArgumentOrCore(t *testing.T) {
	if testing.Short() {
		t.Skip("builds the programs and runs them between namespaces")
	}
	bin := buildBoth(t)
	s := newSecretBed(t, bin)
	s.use()
	s.refuse()
	s.diagnose()
	for what, cmd := range map[string]*exec.Cmd{"the sidecar": s.near, "the cloud proxy": s.far} {
		for _, name := range []string{"cmdline", "comm", "status", "limits"} {
			text, err := os.ReadFile(fmt.Sprintf("/proc/%d/%s", cmd.Process.Pid, name))
			if err != nil {
				t.Error(err)
			}
			s.told[what+"'s "+name] = string(text)
		}
		if !regexp.MustCompile(`(?m)^Max core file size\s+0\s+0\s`).MatchString(s.told[what+"'s limits"]) {
			t.Errorf("%s may leave a core:\n%s", what, s.told[what+"'s limits"])
		}
		s.crash(what, cmd)
	}
	for _, name := range []string{"near.audit", "far.audit", "token.issued"} {
		text, err := os.ReadFile(filepath.Join(s.dir, name))
		if err != nil {
			t.Error(err)
		}
		s.told[name] = string(text)
	}
	for i, log := range s.logs {
		s.told[fmt.Sprintf("log %d", i)] = log.String()
	}
	searched, bytes := 0, 0
	for where, text := range s.told {
		bytes += len(text)
		for what, all := range s.secrets {
			for _, secret := range all {
				if searched++; strings.Contains(text, secret) {
					t.Errorf("%s stands in %s", what, where)
				}
			}
		}
	}
	if s.cloudLog.String() == "" || len(s.told) < 15 {
		t.Errorf("only %d things were searched", len(s.told))
	}
	t.Logf("%d secrets searched for in %d things of %d bytes, %d searches", len(s.secrets), len(s.told), bytes, searched)
}

func newSecretBed(t *testing.T, bin string) *secretBed {
	t.Helper()
	s := &secretBed{secrets: map[string][]string{}, told: map[string]string{}}
	for what, word := range secretWords {
		s.knows(what, word)
	}
	pair := netpair.New(t)
	proxy := secretProxy(t, pair)
	o := &only443{t: t, pair: pair, dir: t.TempDir(), culvert: filepath.Join(bin, "culvert"), socket: runSocket(t)}
	s.only443 = o
	cloud := filepath.Join(bin, "culvert-cloudproxy")
	if out, err := exec.Command(cloud, "init", "--host", netpair.FarAddr.String(), "--dir", o.dir, "--allow", "127.0.0.0/8").CombinedOutput(); err != nil {
		t.Fatalf("init: %v\n%s", err, out)
	} else {
		s.told["what init says"] = string(out)
	}
	for name, what := range map[string]string{"front.password": "the front's password", "proxy.password": "the HTTP proxy's password", "control.token": "the control API's token"} {
		if err := os.WriteFile(filepath.Join(o.dir, name), []byte(secretWords[what]), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	rewrite(t, o.dir, func(text string) string {
		return strings.Replace(text, "identity:\n", "identity:\n  key_file: near.key\n", 1) + `front: {user: user, password_file: front.password}
proxy: {url: "http://` + proxy.String() + `", user: ward, password_file: proxy.password}
control: {listen: "127.0.0.1:1081", token_file: control.token}
log: {level: debug, audit_file: near.audit}
`
	}, func(text string) string {
		return text + "log: {level: debug, format: json, audit_file: far.audit}\nwebsocket: {path: /culvert}\n"
	})
	o.echo()
	s.far = s.crashing(pair.Far, cloud, "run", "-c", filepath.Join(o.dir, "cloudproxy.yaml"))
	s.cloudLog = o.logs[len(o.logs)-1]
	farAnswers(t, pair, netip.MustParseAddrPort("127.0.0.1:443"))
	s.near = s.crashing(pair.Near, o.culvert, "run", "-c", filepath.Join(o.dir, "culvert.yaml"), "--listen", "127.0.0.1:1080", "--control", o.socket)
	runReady(t, o.socket)

	// What the files hold: keys by each line of their PEM.
	for _, name := range []string{"key.pem", "token.key", "near.key", "reset.key"} {
		text, err := os.ReadFile(filepath.Join(o.dir, name))
		if err != nil {
			t.Fatal(err)
		}
		if name == "reset.key" {
			s.knows("the reset key", string(text))
			continue
		}
		for line := range strings.Lines(string(text)) {
			if line = strings.TrimSpace(line); len(line) >= 16 && !strings.HasPrefix(line, "-----") {
				s.secrets["the key in "+name] = append(s.secrets["the key in "+name], line)
			}
		}
	}
	conf, err := config.ReadSidecar(filepath.Join(o.dir, "culvert.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	parts := strings.Split(conf.Identity.Token, ".")
	if len(parts) != 3 || len(s.secrets["the key in key.pem"]) == 0 || len(s.secrets["the key in token.key"]) == 0 || len(s.secrets["the key in near.key"]) == 0 {
		t.Fatalf("the secrets are not as they were: %d parts of the token", len(parts))
	}
	s.secrets["the token"] = []string{conf.Identity.Token, parts[1] + ".", parts[2]}
	return s
}

// crashing starts a program that would leave a core in a folder of its own.
func (s *secretBed) crashing(at *netpair.Space, args ...string) *exec.Cmd {
	cmd := exec.Command("sh", append([]string{"-c", `ulimit -c unlimited; exec "$0" "$@"`}, args...)...)
	cmd.Dir = s.t.TempDir()
	cmd.Env = append(os.Environ(), "GOTRACEBACK=crash")
	s.launch(at, cmd)
	return cmd
}

// crash ends a program so that it would leave a core.
func (s *secretBed) crash(what string, cmd *exec.Cmd) {
	s.t.Helper()
	if err := cmd.Process.Signal(syscall.SIGABRT); err != nil {
		s.t.Error(err)
	}
	runEventually(s.t, what+" ends", func() bool {
		text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", cmd.Process.Pid))
		return err != nil || bytes.Contains(text, []byte(") Z ")) // waited for at the test's end
	})
	if left, err := os.ReadDir(cmd.Dir); err != nil || len(left) > 0 {
		s.t.Errorf("%s has left %v, %v", what, left, err)
	}
}

// secretProxy is an HTTP proxy at the far end that asks for ward's password.
func secretProxy(t *testing.T, pair *netpair.Pair) netip.AddrPort {
	t.Helper()
	at := netip.AddrPortFrom(netpair.FarAddr, 3128)
	var l net.Listener
	if err := pair.Far.Do(func() (err error) { l, err = net.Listen("tcp4", at.String()); return err }); err != nil {
		t.Fatal(err)
	}
	passwordProxy(t, pair, l, "ward", secretWords["the HTTP proxy's password"], `Basic realm="clinic"`)
	return at
}

// socks logs in, and asks for a destination; it returns the connection.
func (s *secretBed) socks(password string, host string, port uint16) (c net.Conn, answer []byte) {
	s.t.Helper()
	c = s.dial("tcp4", "127.0.0.1:1080")
	c.Write(append([]byte{5, 1, 2, 1, 4, 'u', 's', 'e', 'r', byte(len(password))}, password...))
	answer = make([]byte, 4)
	if _, err := io.ReadFull(c, answer); err != nil {
		s.t.Fatal(err)
	}
	if answer[3] == 0 {
		c.Write(socksRequest(1, host, port))
		reply := make([]byte, 10)
		if _, err := io.ReadFull(c, reply); err != nil {
			s.t.Fatal(err)
		}
		answer = append(answer, reply...)
	}
	return c, answer
}

// use does what everybody does, with every secret.
func (s *secretBed) use() {
	s.t.Helper()
	c, answer := s.socks(secretWords["the front's password"], "127.0.0.1", s.tcp)
	if len(answer) != 14 || answer[5] != 0 {
		s.t.Fatalf("CONNECT: %x", answer)
	}
	io.WriteString(c, "hello")
	if _, err := io.ReadFull(c, make([]byte, 5)); err != nil {
		s.t.Error(err)
	}
	s.http("CONNECT 127.0.0.1:1 HTTP/1.1", "Proxy-Authorization: Basic "+base64.StdEncoding.EncodeToString([]byte("user:"+secretWords["the front's password"])))
	for _, path := range []string{"/v1/status", "/v1/channels", "/metrics", "/debug/pprof/cmdline", "/debug/vars"} {
		s.api("GET "+path, secretWords["the control API's token"])
	}
	st, err := control.NewClient(s.socket).Status(s.t.Context())
	text, _ := json.Marshal(st)
	if s.told["the status"] = string(text); err != nil || st.Link.Phase != tunnel.LinkUp {
		s.t.Errorf("the link is %+v, %v", st.Link, err)
	}
	for _, args := range [][]string{{"status"}, {"status", "--json"}, {"channel", "list", "--json"}} {
		out, err := exec.Command(s.culvert, append(args, "--control", s.socket)...).CombinedOutput()
		if err != nil {
			s.t.Errorf("%v: %v", args, err)
		}
		s.told[strings.Join(args, " ")] = string(out)
	}
	// Both read their files again.
	s.near.Process.Signal(syscall.SIGHUP)
	s.far.Process.Signal(syscall.SIGHUP)
	runEventually(s.t, "both have read their files again", func() bool {
		return strings.Contains(s.logs[len(s.logs)-1].String(), "read again") && strings.Contains(s.cloudLog.String(), "read again")
	})
}

// refuse does what is refused.
func (s *secretBed) refuse() {
	s.t.Helper()
	wrong := secretWords["a wrong password of the front"]
	if _, answer := s.socks(wrong, "127.0.0.1", s.tcp); len(answer) != 4 || answer[3] == 0 {
		s.t.Errorf("a wrong password was let in: %x", answer)
	}
	s.http("CONNECT 127.0.0.1:1 HTTP/1.1", "Proxy-Authorization: Basic "+base64.StdEncoding.EncodeToString([]byte("user:"+wrong)))
	s.http("CONNECT 127.0.0.1:1 HTTP/1.1", "Proxy-Authorization: Bearer "+wrong)
	s.api("POST /v1/start", secretWords["a wrong token of the control API"])
	s.api("GET /v1/status?token="+secretWords["a wrong token of the control API"], "")
	// Sidecars with a wrong token, a token that was cut, and a wrong password of the proxy.
	for what, change := range map[string]func(string) string{
		"a wrong token": func(text string) string {
			return regexp.MustCompile(`(?m)^  token: \S+`).ReplaceAllString(text, "  token: "+secretWords["a wrong token of a sidecar"])
		},
		"a token that was changed": func(text string) string {
			return regexp.MustCompile(`(?m)^(  token: \S+)\S{4}`).ReplaceAllString(text, "${1}AAAA")
		},
		"the password of the front for the proxy": func(text string) string {
			return strings.Replace(text, "password_file: proxy.password", "password_file: front.password", 1)
		},
		"a PAC file that needs a password": func(text string) string {
			pac := "http://ward:" + secretWords["the password of a PAC file's URL"] + "@198.18.80.2:9/x.pac"
			return regexp.MustCompile(`(?m)^proxy: .*$`).ReplaceAllString(text, "proxy: {pac: \""+pac+"\"}")
		},
		"a proxy whose URL has a password": func(text string) string {
			return regexp.MustCompile(`(?m)^proxy: .*$`).ReplaceAllString(text, "proxy: {url: \"http://ward:"+secretWords["the HTTP proxy's password"]+"@198.18.80.2:3128\"}")
		},
		"a mistake in the token's line": func(text string) string {
			return regexp.MustCompile(`(?m)^  token: (\S+)`).ReplaceAllString(text, "  token: [$1]")
		},
		"a mistake in the token's name": func(text string) string { return strings.Replace(text, "\n  token: ", "\n  tokn: ", 1) },
		"no YAML after the token": func(text string) string {
			return regexp.MustCompile(`(?m)^  token: (\S+)`).ReplaceAllString(text, "  token: $1: $1")
		},
		"a password for a file": func(text string) string {
			return strings.Replace(text, "token_file: control.token", "token_file: missing.token", 1)
		},
	} {
		file := filepath.Join(s.dir, "other.yaml")
		text, err := os.ReadFile(filepath.Join(s.dir, "culvert.yaml"))
		if err != nil {
			s.t.Fatal(err)
		}
		other := strings.NewReplacer("near.audit", "other.audit", "127.0.0.1:1081", "127.0.0.1:1082", "near.key", "other.key").Replace(change(string(text)))
		if err := os.WriteFile(file, []byte(other), 0o600); err != nil {
			s.t.Fatal(err)
		}
		log := &cmdtest.Text{}
		cmd := exec.Command(s.culvert, "run", "-c", file, "--mode", "tcp", "--listen", "127.0.0.1:0", "--control", runSocket(s.t))
		cmd.Stderr = log
		if err := s.pair.Near.Do(cmd.Start); err != nil {
			s.t.Fatal(err)
		}
		ended := make(chan struct{})
		go func() { cmd.Wait(); close(ended) }()
		runEventually(s.t, what+" is told of", func() bool {
			select {
			case <-ended:
				return true
			default:
				return strings.Contains(log.String(), "no connection") || strings.Contains(log.String(), "to=failed")
			}
		})
		cmd.Process.Kill()
		<-ended
		s.told[what] = log.String()
		if s.told[what] == "" {
			s.t.Errorf("%s: nothing was said", what)
		}
		os.Remove(filepath.Join(s.dir, "other.audit"))
	}
}

// diagnose runs the check, and writes its page for IT.
func (s *secretBed) diagnose() {
	s.t.Helper()
	page := filepath.Join(s.dir, "page.html")
	cmd := exec.Command(s.culvert, "check", "-c", filepath.Join(s.dir, "culvert.yaml"), "--json", "--report", page, "--media", "1s", "--control", s.socket)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := s.pair.Near.Do(cmd.Start); err != nil {
		s.t.Fatal(err)
	}
	cmd.Wait()
	text, err := os.ReadFile(page)
	if err != nil {
		s.t.Errorf("the check: %v\n%s", err, out.String())
	}
	s.told["what the check says"], s.told["the check's page"] = out.String(), string(text)
	for _, args := range [][]string{{"token", "list", "--dir", s.dir}} {
		out, _ := exec.Command(filepath.Join(filepath.Dir(s.culvert), "culvert-cloudproxy"), args...).CombinedOutput()
		s.told[strings.Join(args[:2], " ")] = string(out)
	}
}

// http asks the front, and keeps the answer.
func (s *secretBed) http(lines ...string) {
	s.t.Helper()
	c := s.dial("tcp4", "127.0.0.1:1080")
	defer c.Close()
	io.WriteString(c, strings.Join(lines, "\r\n")+"\r\n\r\n")
	c.(*net.TCPConn).CloseWrite()
	text, _ := io.ReadAll(io.LimitReader(c, 64<<10))
	s.told[fmt.Sprintf("answer %d of the front", len(s.told))] = string(text)
}

// api asks the control API by TCP, and keeps the answer.
func (s *secretBed) api(request, token string) {
	s.t.Helper()
	c := s.dial("tcp4", "127.0.0.1:1081")
	defer c.Close()
	c.SetDeadline(time.Now().Add(runPatience))
	fmt.Fprintf(c, "%s HTTP/1.1\r\nHost: 127.0.0.1:1081\r\nAuthorization: Bearer %s\r\nConnection: close\r\n\r\n", request, token)
	text, _ := io.ReadAll(io.LimitReader(c, 4<<20))
	s.told["the control API's answer to "+strings.SplitN(request, "?", 2)[0]+fmt.Sprint(len(s.told))] = string(text)
}
