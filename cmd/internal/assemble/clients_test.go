package assemble_test

import (
	"bytes"
	"crypto/rand"
	"crypto/sha256"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"culvert/tunnel"
)

// Programs that were not written for Culvert, over a whole path.

var bothCarriers = []tunnel.Mode{tunnel.ModeUDP, tunnel.ModeTCP}

func TestCurlMovesTenMiBEachWay(t *testing.T) {
	curl := want(t, "curl")
	resolveFar(t)
	blob := make([]byte, 10<<20)
	rand.Read(blob)
	sum := fmt.Sprintf("%x", sha256.Sum256(blob))
	file := filepath.Join(t.TempDir(), "blob")
	if err := os.WriteFile(file, blob, 0o600); err != nil {
		t.Fatal(err)
	}
	server := newWeb(t, func(w http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodPut {
			h := sha256.New()
			io.Copy(h, r.Body)
			fmt.Fprintf(w, "%x", h.Sum(nil))
			return
		}
		w.Write(blob)
	})
	for _, mode := range bothCarriers {
		front := newPath(t, mode).Front.Addr().String()
		for name, args := range map[string][]string{
			"SOCKS":        {"--socks5-hostname", front},
			"HTTP CONNECT": {"-p", "-x", "http://" + front},
		} {
			t.Run(string(mode)+", "+name, func(t *testing.T) {
				args := append([]string{"-sS"}, args...)
				url := "http://" + net.JoinHostPort(farName, server.port) + "/blob"
				down, err := command(t, curl, append(args, url)...).Output()
				if err != nil || !bytes.Equal(down, blob) {
					t.Fatalf("down: %d bytes, %v", len(down), err)
				}
				up, err := command(t, curl, append(args, "-T", file, url)...).Output()
				if err != nil || string(up) != sum {
					t.Fatalf("up: %q, %v", up, err)
				}
			})
		}
	}
	server.onlyFromOutside(t)
}

// insisting is an input that says the same again and again, since a datagram
// may be lost. The program that reads it must end by itself.
type insisting string

func (i insisting) Read(p []byte) (int, error) {
	time.Sleep(100 * time.Millisecond)
	return copy(p, i), nil
}

func TestSocksifiedUDPProgramReachesANameThatTheCloudProxyResolves(t *testing.T) {
	socksify, nc := want(t, "socksify"), want(t, "nc")
	resolveFar(t)
	for _, mode := range bothCarriers {
		t.Run(string(mode), func(t *testing.T) {
			far := newEcho(t)
			sc := newPath(t, mode)
			_, port, _ := net.SplitHostPort(sc.Front.Addr().String())
			config := filepath.Join(t.TempDir(), "socks.conf")
			if err := os.WriteFile(config, fmt.Appendf(nil, `resolveprotocol: fake
route {
  from: 0.0.0.0/0 to: 0.0.0.0/0 via: 127.0.0.1 port = %s
  command: connect udpassociate
  protocol: tcp udp
  proxyprotocol: socks_v5
  method: none
}
`, port), 0o600); err != nil {
				t.Fatal(err)
			}
			cmd := command(t, socksify, nc, "-u", "-W", "1", farName, fmt.Sprint(far.addr.Port())) // ends with the first answer
			cmd.Env = append(cmd.Env, "SOCKS_CONF="+config)
			cmd.Stdin = insisting("through the tunnel\n")
			out, err := cmd.CombinedOutput()
			if !strings.Contains(string(out), "through the tunnel") {
				t.Fatalf("%v: %s; front %+v", err, out, sc.Front.Stats())
			}
			if from := far.sources(); len(from) != 1 || from[0].Addr().String() != outside {
				t.Errorf("it came from %v, want the cloud proxy's %s", from, outside)
			}
		})
	}
}

func TestChromiumLoadsAPageFromBehindTheCloudProxy(t *testing.T) {
	chromium := want(t, "chromium")
	resolveFar(t)
	server := newWeb(t, func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/":
			fmt.Fprint(w, `<!doctype html><title>far</title><p id=p>empty</p><script src=/script.js></script>`)
		case "/script.js":
			w.Header().Set("Content-Type", "text/javascript")
			fmt.Fprint(w, `document.getElementById("p").textContent = "six times seven is " + 6*7`)
		default:
			http.NotFound(w, r)
		}
	})
	sc := newPath(t, tunnel.ModeAuto)
	cmd := command(t, chromium, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-quic", "--no-first-run",
		"--disable-background-networking", "--disable-component-update", "--disable-sync", "--user-data-dir="+scratch(t),
		"--proxy-server=socks5://"+sc.Front.Addr().String(), "--proxy-bypass-list=<-loopback>",
		"--dump-dom", "http://"+net.JoinHostPort(farName, server.port)+"/")
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	page, err := cmd.Output()
	if err != nil || !strings.Contains(string(page), "six times seven is 42") {
		t.Fatalf("%v: %s\n%s", err, page, stderr.Bytes())
	}
	server.onlyFromOutside(t)
}
