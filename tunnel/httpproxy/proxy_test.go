package httpproxy

import (
	"bufio"
	"crypto/hmac"
	"crypto/md5"
	"crypto/rand"
	"encoding/base64"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"strings"
	"sync"
	"testing"
	"unicode/utf16"

	"github.com/icholy/digest"
	"golang.org/x/crypto/md4" //lint:ignore SA1019 NTLM is made of it
)

// A proxy of the tests answers CONNECT as its login says.
type proxy struct {
	t     *testing.T
	url   *url.URL
	login func(conn *session, req *http.Request) (challenges []string) // none: let in
	close bool                                                         // after each 407
	shut  bool                                                         // the same, without saying so
	wg    sync.WaitGroup
	mu    sync.Mutex
	said  []string // the Proxy-Authorization fields, in order
	conns int
}

// session is what a proxy remembers of a connection.
type session struct{ challenge []byte }

func newProxy(t *testing.T, login func(*session, *http.Request) []string) *proxy {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	p := &proxy{t: t, login: login, url: &url.URL{Scheme: "http", Host: ln.Addr().String()}}
	p.wg.Go(func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			p.mu.Lock()
			p.conns++
			p.mu.Unlock()
			p.wg.Go(func() { p.serve(c) })
		}
	})
	t.Cleanup(func() { ln.Close(); p.wg.Wait() })
	return p
}

func (p *proxy) serve(c net.Conn) {
	defer c.Close()
	br, s := bufio.NewReader(c), &session{}
	for {
		req, err := http.ReadRequest(br)
		if err != nil {
			return
		}
		p.mu.Lock()
		p.said = append(p.said, req.Header.Get("Proxy-Authorization"))
		p.mu.Unlock()
		ask := p.login(s, req)
		if len(ask) == 0 {
			// What the other end says at once comes together with the head.
			fmt.Fprintf(c, "HTTP/1.1 200 Connection established\r\n\r\nhello from %s", req.Host)
			io.Copy(c, br)
			return
		}
		fmt.Fprintf(c, "HTTP/1.1 407 Proxy Authentication Required\r\n")
		for _, a := range ask {
			fmt.Fprintf(c, "Proxy-Authenticate: %s\r\n", a)
		}
		if p.close {
			fmt.Fprintf(c, "Connection: close\r\n\r\n<html>who are you")
			return
		}
		fmt.Fprintf(c, "Content-Length: 11\r\n\r\nwho are you")
		if p.shut && req.Header.Get("Proxy-Authorization") == "" {
			return
		}
	}
}

// heard returns what was said to the proxy, and on how many connections.
func (p *proxy) heard() ([]string, int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	said, conns := p.said, p.conns
	p.said, p.conns = nil, 0
	return said, conns
}

const (
	goodUser, goodPassword = "alice", "Sesam, öffne dich"
	target                 = "cloud.example.net:443"
)

func open(*session, *http.Request) []string { return nil }

func basic(_ *session, req *http.Request) []string {
	want := "Basic " + base64.StdEncoding.EncodeToString([]byte(goodUser+":"+goodPassword))
	if req.Header.Get("Proxy-Authorization") == want {
		return nil
	}
	return []string{`Basic realm="the proxy, of \"all\""`}
}

// digested returns a login by Digest whose nonces are good for some answers.
func digested(algorithm string, uses int) func(*session, *http.Request) []string {
	var nonce string
	used := map[string]bool{}
	return func(_ *session, req *http.Request) []string {
		chal := func(stale bool) []string {
			nonce, used = rand.Text(), map[string]bool{}
			return []string{`Basic realm="r"`, fmt.Sprintf(`Digest realm="r", nonce="%s", qop="auth", algorithm=%s, stale=%t`, nonce, algorithm, stale)}
		}
		cred, err := digest.ParseCredentials(req.Header.Get("Proxy-Authorization"))
		if err != nil {
			return chal(false)
		}
		if cred.Nonce != nonce || used[fmt.Sprint(cred.Nc)] || len(used) >= uses {
			return chal(true)
		}
		used[fmt.Sprint(cred.Nc)] = true
		want, err := digest.Digest(&digest.Challenge{Realm: "r", Nonce: nonce, QOP: []string{"auth"}, Algorithm: algorithm}, digest.Options{
			Method: "CONNECT", URI: req.RequestURI, Count: cred.Nc, Cnonce: cred.Cnonce, Username: goodUser, Password: goodPassword,
		})
		if err != nil || want.Response != cred.Response {
			return chal(false)
		}
		return nil
	}
}

// ntlm returns a login by NTLM under a scheme's name. It takes NTLMv2 only, and
// is written from MS-NLMP, not from the library that answers it.
func ntlm(scheme string, others ...string) func(*session, *http.Request) []string {
	return func(s *session, req *http.Request) []string {
		ask := append([]string{scheme}, others...)
		field, ok := strings.CutPrefix(req.Header.Get("Proxy-Authorization"), scheme+" ")
		message, err := base64.StdEncoding.DecodeString(field)
		if !ok || err != nil || len(message) < 12 || string(message[:8]) != "NTLMSSP\x00" {
			return ask
		}
		switch binary.LittleEndian.Uint32(message[8:]) {
		case 1:
			s.challenge = make([]byte, 8)
			rand.Read(s.challenge)
			return []string{scheme + " " + base64.StdEncoding.EncodeToString(ntlmChallenge(s.challenge))}
		case 3:
			if s.challenge != nil && ntlmProves(message, s.challenge) {
				return nil
			}
		}
		return ask
	}
}

// ntlmHelper is the argument by which this program is squid's helper for NTLM: the
// one that squid brings (ntlm_fake_auth of 5.7) sends challenges with a wild offset.
const ntlmHelper = "ntlm-helper"

// helpSquid: https://wiki.squid-cache.org/Features/AddonHelpers#negotiate-and-ntlm-scheme
func helpSquid() {
	var challenge []byte
	for in := bufio.NewScanner(os.Stdin); in.Scan(); {
		what, blob, _ := strings.Cut(in.Text(), " ")
		message, _ := base64.StdEncoding.DecodeString(blob)
		switch {
		case what == "YR":
			challenge = make([]byte, 8)
			rand.Read(challenge)
			fmt.Println("TT", base64.StdEncoding.EncodeToString(ntlmChallenge(challenge)))
		case what == "KK" && ntlmProves(message, challenge):
			fmt.Println("AF", goodUser)
		case what == "KK":
			fmt.Println("NA", "wrong")
		default:
			fmt.Println("BH", "what")
		}
	}
}

// ntlmChallenge: MS-NLMP §2.2.1.2.
func ntlmChallenge(challenge []byte) []byte {
	name := utf16le("CLINIC")
	info := append(binary.LittleEndian.AppendUint16(nil, 2), byte(len(name)), 0) // MsvAvNbDomainName
	info = append(append(info, name...), 0, 0, 0, 0)                             // MsvAvEOL
	const head, unicode, ntlm, extended, targetInfo, targetDomain = 56, 0x1, 0x200, 0x80000, 0x800000, 0x10000
	b := append([]byte("NTLMSSP\x00"), 2, 0, 0, 0)
	at := func(length, offset int) {
		b = binary.LittleEndian.AppendUint16(b, uint16(length))
		b = binary.LittleEndian.AppendUint16(b, uint16(length))
		b = binary.LittleEndian.AppendUint32(b, uint32(offset))
	}
	at(len(name), head)
	b = binary.LittleEndian.AppendUint32(b, unicode|ntlm|extended|targetInfo|targetDomain)
	b = append(append(b, challenge...), make([]byte, 8)...)
	at(len(info), head+len(name))
	b = append(b, 10, 0, 0, 0, 0, 0, 0, 15) // version
	return append(append(b, name...), info...)
}

// ntlmProves: MS-NLMP §2.2.1.3 and §3.3.2.
func ntlmProves(m, challenge []byte) bool {
	part := func(at int) []byte {
		if len(m) < at+8 {
			return nil
		}
		n, from := int(binary.LittleEndian.Uint16(m[at:])), int(binary.LittleEndian.Uint32(m[at+4:]))
		if from+n > len(m) {
			return nil
		}
		return m[from : from+n]
	}
	response, domain, user := part(20), part(28), part(36)
	if len(response) < 16 || string(user) != string(utf16le(goodUser)) {
		return false
	}
	hash := md4.New()
	hash.Write(utf16le(goodPassword))
	key := mac(hash.Sum(nil), utf16le(strings.ToUpper(goodUser)), domain)
	return hmac.Equal(response[:16], mac(key, challenge, response[16:]))
}

func mac(key []byte, parts ...[]byte) []byte {
	h := hmac.New(md5.New, key)
	for _, p := range parts {
		h.Write(p)
	}
	return h.Sum(nil)
}

func utf16le(s string) (b []byte) {
	for _, u := range utf16.Encode([]rune(s)) {
		b = binary.LittleEndian.AppendUint16(b, u)
	}
	return b
}
