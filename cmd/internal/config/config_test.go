package config

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"culvert/tunnel"
)

const goodSidecar = `
cloud_proxy:
  address: proxy.example.net
  pin: sha256/AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=
identity:
  app: clinic
  token_file: token
  key_file: sidecar.key
front: {listen: "127.0.0.1:1081"}
media: {max_wait: 100ms}
policy:
  profiles: [public]
`

const goodCloudProxy = `
address: proxy.example.net
certificate: {cert_file: cert.pem, key_file: key.pem}
tokens: {public_keys: token.pub}
policy: {profiles: [public]}
drain: 20s
`

func write(t *testing.T, text string) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "c.yaml")
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}

func TestAGoodSidecarFileIsReadAndItsNamesCountFromItsFolder(t *testing.T) {
	file := write(t, goodSidecar)
	c, err := ReadSidecar(file)
	if err != nil {
		t.Fatal(err)
	}
	if c.CloudProxy.Address[0] != "proxy.example.net:443" || c.CloudProxy.ServerName != "proxy.example.net" || c.Front.Listen != "127.0.0.1:1081" || c.Start != "auto" || c.WhenStopped != "refuse" {
		t.Errorf("%+v", c)
	}
	if want := filepath.Join(filepath.Dir(file), "sidecar.key"); c.Identity.KeyFile != want {
		t.Errorf("key file %q, want %q", c.Identity.KeyFile, want)
	}
}

func TestAGoodCloudProxyFileIsRead(t *testing.T) {
	c, err := ReadCloudProxy(write(t, goodCloudProxy))
	if err != nil {
		t.Fatal(err)
	}
	if c.Address != "proxy.example.net:443" || c.Listen != ":443" || !filepath.IsAbs(c.Tokens.PublicKeys[0]) {
		t.Errorf("%+v", c)
	}
}

func TestBadFilesAreRefusedWithTheirLineAndWhatWasMeant(t *testing.T) {
	sidecar := func(f string) error { _, err := ReadSidecar(f); return err }
	cloud := func(f string) error { _, err := ReadCloudProxy(f); return err }
	for name, c := range map[string]struct {
		read func(string) error
		text string
		want []string
	}{
		"an unknown key":          {sidecar, goodSidecar + "frunt: {}\n", []string{"line 13", `"frunt"`, "front"}},
		"an unknown key within":   {sidecar, strings.Replace(goodSidecar, "app:", "aap:", 1), []string{"line 6", `"aap"`, "identity", "app"}},
		"a key twice":             {sidecar, goodSidecar + "front: {}\n", []string{"line 13", "twice", "line 9"}},
		"an unknown policy key":   {sidecar, strings.Replace(goodSidecar, "profiles:", "profile:", 1), []string{"line 12", "profiles"}},
		"a bad duration":          {sidecar, strings.Replace(goodSidecar, "100ms", "100", 1), []string{"line 10", "150ms"}},
		"a bad pin":               {sidecar, strings.Replace(goodSidecar, "sha256/", "sha1/", 1), []string{"line 4", "cloud_proxy.pin", "sha256/"}},
		"a bad mode":              {sidecar, goodSidecar + "mode: tpc\n", []string{"line 13", "mode", "tpc", "tcp"}},
		"no app":                  {sidecar, strings.Replace(goodSidecar, "  app: clinic\n", "", 1), []string{"line 5", "identity.app"}},
		"no name for the server":  {sidecar, strings.Replace(goodSidecar, "proxy.example.net", "192.0.2.1", 1), []string{"server_name"}},
		"two tokens":              {sidecar, strings.Replace(goodSidecar, "  app: clinic", "  app: clinic\n  token: x", 1), []string{"token_file"}},
		"a list for a mapping":    {sidecar, "front: [1]\n", []string{"line 1", "mapping"}},
		"no YAML":                 {sidecar, "x: y\na: b: c\n", []string{"line 2"}},
		"two documents":           {sidecar, goodSidecar + "---\nfront: {}\n", []string{"line 13", "second YAML document"}},
		"a word for a number":     {cloud, goodCloudProxy + "limits: {streams: many}\n", []string{"line 7", `"many"`, "whole number"}},
		"a public name":           {cloud, goodCloudProxy + "egress: {public: [198.51.100.5, nat.example.net]}\n", []string{"egress.public", `"nat.example.net"`, "IP address"}},
		"a public wildcard":       {cloud, goodCloudProxy + "egress: {public: 0.0.0.0}\n", []string{"egress.public", `"0.0.0.0"`, "one host"}},
		"a negative limit":        {cloud, goodCloudProxy + "limits: {streams: -1}\n", []string{"line 7", "limits.streams", "-1"}},
		"a memory too large":      {cloud, goodCloudProxy + "limits: {total_stream_memory: 9999999}\n", []string{"line 7", "limits.total_stream_memory", "9999999", "MiB"}},
		"no certificate":          {cloud, strings.Replace(goodCloudProxy, "cert_file: cert.pem, ", "", 1), []string{"cert_file"}},
		"a listen without a port": {cloud, goodCloudProxy + "listen: 0.0.0.0\n", []string{"listen", ":443"}},
		"a host that is none":     {cloud, strings.Replace(goodCloudProxy, "proxy.example.net", "foo bar", 1), []string{"line 2", "address", "foo bar"}},
		"no policy":               {cloud, strings.Replace(goodCloudProxy, "policy: {profiles: [public]}", "", 1), []string{"policy", "public"}},
		"a wait without an end":   {sidecar, strings.Replace(goodSidecar, "100ms", "10h", 1), []string{"line 10", "media.max_wait"}},
		"a listen that is none":   {sidecar, strings.Replace(goodSidecar, "127.0.0.1:1081", "foo", 1), []string{"line 9", "front.listen", "ADDRESS:PORT"}},
		"fewer than none":         {sidecar, strings.Replace(goodSidecar, `{listen: "127.0.0.1:1081"}`, "{max_connections: -1}", 1), []string{"line 9", "front.max_connections"}},
		"a proxy of another kind": {sidecar, goodSidecar + "proxy: {url: socks5://p:1080}\n", []string{"line 13", "proxy.url", "socks5", "http://"}},
		"a password in a URL":     {sidecar, goodSidecar + "proxy: {url: \"http://u:p@h:3128\"}\n", []string{"line 13", "proxy.url", "proxy.password_file"}},
		"a user alone":            {sidecar, goodSidecar + "proxy: {url: http://h, user: u}\n", []string{"line 13", "proxy", "password_file"}},
		"two answers which proxy": {sidecar, goodSidecar + "proxy: {url: http://h, pac: f}\n", []string{"line 13", "url", "pac"}},
		"a PAC file from nowhere": {sidecar, goodSidecar + "proxy: {pac: ftp://h/f}\n", []string{"line 13", "proxy.pac", "ftp"}},
		"a WebSocket without TLS": {sidecar, strings.Replace(goodSidecar, "proxy.example.net", "ws://h/p", 1), []string{"line 3", "cloud_proxy.address", "wss://"}},
		"a WebSocket, no pin":     {sidecar, strings.Replace(strings.Replace(goodSidecar, "proxy.example.net", "wss://h/p", 1), "  pin:", "  alpn:", 1), []string{"cloud_proxy.pin", "wss://"}},
		"inspection without pin":  {sidecar, strings.Replace(goodSidecar, "  pin:", "  trust_interception:", 1), []string{"cloud_proxy.pin", "trust_interception"}},
		"a path that is none":     {cloud, goodCloudProxy + "websocket: {path: culvert}\n", []string{"line 7", "websocket.path", "/culvert"}},
		"a WebSocket nowhere":     {cloud, goodCloudProxy + "websocket: {listen: \"127.0.0.1:8080\"}\n", []string{"websocket.path"}},
		"a WebSocket, no port":    {cloud, goodCloudProxy + "websocket: {path: /c, listen: h}\n", []string{"line 7", "websocket.listen", "ADDRESS:PORT"}},
		"users that are none":     {sidecar, strings.Replace(goodSidecar, `{listen: "127.0.0.1:1081"}`, "{users: []}", 1), []string{"line 9", "users", "empty list"}},
		"users, and no value":     {sidecar, strings.Replace(goodSidecar, `{listen: "127.0.0.1:1081"}`, "\n  users:", 1), []string{"line 10", "users", "no value"}},
		"a file that ends early":  {sidecar, goodSidecar[:strings.Index(goodSidecar, "policy:")+len("policy:")], []string{"line 11", "policy has no value"}},
		"a pin without a value":   {sidecar, strings.Replace(goodSidecar, "sha256/AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=", "", 1), []string{"line 4", "pin", "no value"}},
		"no App ID at all":        {cloud, goodCloudProxy + "apps: []\n", []string{"line 7", "apps", "empty list"}},
		"an egress that is none":  {cloud, goodCloudProxy + "egress: {ipv4: '::1'}\n", []string{"egress.ipv4"}},
	} {
		t.Run(name, func(t *testing.T) {
			err := c.read(write(t, c.text))
			if tunnel.CodeOf(err) != tunnel.ConfigInvalid {
				t.Fatalf("error %v", err)
			}
			for _, w := range append(c.want, "c.yaml") {
				if !strings.Contains(err.Error(), w) {
					t.Errorf("%q does not mention %q", err, w)
				}
			}
			if strings.Contains(err.Error(), "\n") {
				t.Errorf("%q is more than a line", err)
			}
		})
	}
	if err := sidecar("/nowhere/culvert.yaml"); tunnel.CodeOf(err) != tunnel.ConfigInvalid || !strings.Contains(err.Error(), "no such file") {
		t.Errorf("a missing file: %v", err)
	}
}

func FuzzSidecar(f *testing.F) {
	f.Add([]byte(goodSidecar))
	f.Add([]byte("front: &a {listen: x}\nmedia: *a\n"))
	f.Fuzz(func(t *testing.T, text []byte) {
		c := &Sidecar{}
		if decode(text, "f", c) == nil {
			c.Check()
		}
	})
}

func FuzzCloudProxy(f *testing.F) {
	f.Add([]byte(goodCloudProxy))
	f.Fuzz(func(t *testing.T, text []byte) {
		c := &CloudProxy{}
		if decode(text, "f", c) == nil {
			c.Check()
		}
	})
}

func TestWhatCanNotBeCapturedIsNamed(t *testing.T) {
	for text, want := range map[string]string{
		"capture: {port: 70000}":                   "capture.port: 70000",
		"capture: {all: true, users: alice}":       "all leaves no choice",
		"capture: {except: 10.0.0.0/33}":           `capture.except: "10.0.0.0/33"`,
		"capture: {except: intranet}":              `"intranet"`,
		"capture: {except: '::ffff:10.0.0.0/104'}": `capture.except: "::ffff:10.0.0.0/104"`,
		"capture: {dns: '[fe80::1%eth0]:53'}":      `capture.dns: "[fe80::1%eth0]:53"`,
		"capture: {dns: resolver}":                 `capture.dns: "resolver"`,
		"capture: {dns: '9.9.9.9:0'}":              `capture.dns: "9.9.9.9:0"`,
		"capture: {user: alice}":                   "user",
	} {
		_, err := ReadSidecar(write(t, goodSidecar+"\n"+text+"\n"))
		if tunnel.CodeOf(err) != tunnel.ConfigInvalid || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %s", text, err, want)
		}
	}
	c, err := ReadSidecar(write(t, goodSidecar+"\ncapture: {except: [10.1.2.3/8, '2001:db8::1'], dns: '2001:db8::53'}\n"))
	if err != nil {
		t.Fatal(err)
	}
	nets, _ := c.Capture.Excepted()
	server, _ := c.Capture.Server()
	if c.Capture.Port != 1443 || c.Capture.Selects() || len(nets) != 2 || nets[0].String() != "10.0.0.0/8" || nets[1].String() != "2001:db8::1/128" || server.String() != "[2001:db8::53]:53" {
		t.Errorf("%+v, %v, %v", c.Capture, nets, server)
	}
}
