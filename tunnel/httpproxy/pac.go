package httpproxy

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"culvert/tunnel"
)

const (
	maxScript  = 1 << 20 // bytes
	maxAnswer  = 4 << 10 // bytes
	maxWays    = 8
	fetchTime  = 5 * time.Second
	answerTime = 4 * time.Second // culvert-pac gives up a second before
	// scriptFor is how long a script that was fetched is used, and answerFor what
	// it has answered. Where neither can be had anew the old are used on.
	scriptFor = 10 * time.Minute
	answerFor = time.Minute
)

// PACProgram is the program that runs the script.
const PACProgram = "culvert-pac"

// PAC chooses as a proxy auto-configuration file says.
type PAC struct {
	Source  string      // a file, or an http or https URL, which is fetched without a proxy
	Program string      // empty: PACProgram, beside this one or in PATH
	TLS     *tls.Config // for an https URL; nil: the system's authorities
	// Dial makes TCP connections to fetch it; nil: a net.Dialer.
	Dial tunnel.DialFunc
	// Mark is what the program's packets are to have (SO_MARK), where it may set
	// one; 0: nothing.
	Mark uint32

	mu      sync.Mutex // guards the fields below
	script  []byte
	fetched time.Time
	answers map[string]answer // by host
}

type answer struct {
	ways []*url.URL
	at   time.Time
}

// Choose is a Chooser.
func (p *PAC) Choose(ctx context.Context, address string) ([]*url.URL, error) {
	to, err := tunnel.ParseTarget(address)
	if err != nil {
		return nil, err
	}
	host := to.Host
	if host == "" {
		host = to.Addr.String()
	}
	p.mu.Lock()
	last, known := p.answers[host]
	p.mu.Unlock()
	if known && time.Since(last.at) < answerFor {
		return last.ways, nil
	}
	text, err := p.ask(ctx, host)
	var ways []*url.URL
	if err == nil {
		ways, err = parsePAC(text)
	}
	if err != nil {
		if known {
			return last.ways, nil
		}
		return nil, err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.answers == nil || len(p.answers) > 100 {
		p.answers = map[string]answer{}
	}
	p.answers[host] = answer{ways, time.Now()}
	return ways, nil
}

// parsePAC reads what FindProxyForURL returns: "PROXY a:80; HTTPS b:443; DIRECT".
func parsePAC(text string) (ways []*url.URL, err error) {
	var useless error
	for part := range strings.SplitSeq(text, ";") {
		words := strings.Fields(part)
		if len(words) == 0 || len(ways) == maxWays {
			continue
		}
		scheme := map[string]string{"PROXY": "http", "HTTP": "http", "HTTPS": "https"}[strings.ToUpper(words[0])]
		switch {
		case strings.EqualFold(words[0], "DIRECT"):
			ways = append(ways, nil)
		case scheme == "" || len(words) != 2:
			useless = tunnel.Errorf(tunnel.Unsupported, "the PAC file names %.60q, and Culvert goes through PROXY and HTTPS proxies; ask IT for one, or set proxy.url", withoutUsers(words))
		default:
			u, err := ParseURL(scheme + "://" + words[1])
			if err != nil {
				useless = tunnel.Errorf(tunnel.Unsupported, "the PAC file names %.60q, which is no proxy; tell IT, or set proxy.url", withoutUsers(words))
				continue
			}
			ways = append(ways, u)
		}
	}
	if len(ways) == 0 && useless != nil {
		return nil, useless
	}
	return ways, nil // none: direct
}

// withoutUsers joins words without what stands for a user and a password.
func withoutUsers(words []string) string {
	words = slices.Clone(words)
	for i, w := range words {
		if at := strings.LastIndexByte(w, '@'); at >= 0 {
			words[i] = "…" + w[at:]
		}
	}
	return strings.Join(words, " ")
}

// ask runs the script.
func (p *PAC) ask(ctx context.Context, host string) (string, error) {
	program, err := p.program()
	if err != nil {
		return "", err
	}
	script, err := p.fetch(ctx)
	if err != nil {
		return "", err
	}
	ctx, cancel := context.WithTimeout(ctx, answerTime)
	defer cancel()
	var out, bad bounded
	args := []string{host}
	if p.Mark != 0 {
		args = []string{"--mark", strconv.FormatUint(uint64(p.Mark), 10), host}
	}
	cmd := exec.CommandContext(ctx, program, args...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = bytes.NewReader(script), &out, &bad
	cmd.Env = []string{} // what is secret here is nothing to the script
	cmd.Dir = "/"
	cmd.WaitDelay = time.Second
	if err := cmd.Run(); err != nil {
		if said, _, _ := strings.Cut(strings.TrimSpace(bad.String()), "\n"); said != "" {
			err = fmt.Errorf("%w: %.200q", err, said)
		}
		return "", tunnel.Errorf(tunnel.CloudUnreachable, "the PAC file %s gives no answer; tell IT, or set proxy.url: %w", p.name(), err)
	}
	return strings.TrimSpace(out.String()), nil
}

// program finds what runs the script: beside this program before PATH.
func (p *PAC) program() (string, error) {
	if p.Program != "" {
		return p.Program, nil
	}
	if self, err := os.Executable(); err == nil {
		if beside := filepath.Join(filepath.Dir(self), PACProgram); executable(beside) {
			return beside, nil
		}
	}
	found, err := exec.LookPath(PACProgram)
	if err != nil {
		return "", tunnel.Errorf(tunnel.ConfigInvalid, "proxy.pac needs the program %s, which is neither beside this one nor in PATH; install it, or set proxy.url", PACProgram)
	}
	return found, nil
}

func executable(file string) bool {
	info, err := os.Stat(file)
	return err == nil && info.Mode().IsRegular() && info.Mode()&0o111 != 0
}

// name is how the source is spoken of, without what may be secret of a URL.
func (p *PAC) name() string {
	if u, err := url.Parse(p.Source); err == nil && isURL(p.Source) {
		if u.RawQuery != "" {
			u.RawQuery = "…"
		}
		return u.Redacted()
	}
	return p.Source
}

func isURL(source string) bool {
	return strings.HasPrefix(source, "http://") || strings.HasPrefix(source, "https://")
}

// fetch returns the script.
func (p *PAC) fetch(ctx context.Context) ([]byte, error) {
	if !isURL(p.Source) {
		f, err := os.Open(p.Source)
		if err != nil {
			return nil, tunnel.Errorf(tunnel.ConfigInvalid, "proxy.pac: %s can not be read: %w", p.Source, errors.Unwrap(err))
		}
		defer f.Close()
		return p.read(f)
	}
	p.mu.Lock()
	script, fetched := p.script, p.fetched
	p.mu.Unlock()
	if script != nil && time.Since(fetched) < scriptFor {
		return script, nil
	}
	fresh, err := p.get(ctx)
	if err != nil {
		if script != nil {
			return script, nil
		}
		return nil, err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.script, p.fetched = fresh, time.Now()
	return fresh, nil
}

func (p *PAC) get(ctx context.Context) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, fetchTime)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, p.Source, nil)
	if err != nil {
		return nil, tunnel.Errorf(tunnel.ConfigInvalid, "proxy.pac: %.100q is no URL", p.name())
	}
	client := http.Client{Transport: &http.Transport{DialContext: p.Dial, TLSClientConfig: p.TLS, DisableKeepAlives: true, MaxResponseHeaderBytes: maxHead}}
	res, err := client.Do(req)
	if err != nil {
		var wrapped *url.Error
		if errors.As(err, &wrapped) {
			err = wrapped.Err // without the URL
		}
		return nil, tunnel.Errorf(tunnel.CloudUnreachable, "the PAC file %s can not be fetched; check proxy.pac: %w", p.name(), err)
	}
	defer res.Body.Close()
	if res.StatusCode != http.StatusOK {
		return nil, tunnel.Errorf(tunnel.CloudUnreachable, "the PAC file %s can not be fetched (%d %s); check proxy.pac", p.name(), res.StatusCode, http.StatusText(res.StatusCode))
	}
	return p.read(res.Body)
}

func (p *PAC) read(r io.Reader) ([]byte, error) {
	script, err := io.ReadAll(io.LimitReader(r, maxScript+1))
	switch {
	case err != nil:
		return nil, tunnel.Errorf(tunnel.CloudUnreachable, "the PAC file %s can not be read to its end: %w", p.name(), err)
	case len(script) > maxScript:
		return nil, tunnel.Errorf(tunnel.ConfigInvalid, "the PAC file %s is longer than %d bytes; set proxy.url", p.name(), maxScript)
	}
	return script, nil
}

// bounded keeps the beginning of what is written.
type bounded struct{ bytes.Buffer }

func (b *bounded) Write(p []byte) (int, error) {
	b.Buffer.Write(p[:min(len(p), maxAnswer-b.Len())])
	return len(p), nil
}
