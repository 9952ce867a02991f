package httpproxy

import (
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/Azure/go-ntlmssp"
	"github.com/icholy/digest"

	"culvert/tunnel"
)

// AuthError is the cause of an error with the code proxy_auth_required.
type AuthError struct {
	Proxy   string   // HOST:PORT
	Schemes []string // that the proxy offers
	Tried   string   // the scheme whose answer was rejected; "": there was none
}

func (e *AuthError) Error() string {
	if e.Tried == "" {
		return fmt.Sprintf("%s asks for authentication: %s", e.Proxy, strings.Join(e.Schemes, ", "))
	}
	return fmt.Sprintf("%s rejected what was answered by %s; it offers %s", e.Proxy, e.Tried, strings.Join(e.Schemes, ", "))
}

// credentials are a user and a password.
type credentials struct{ user, password string }

// String keeps them out of whatever is printed.
func (credentials) String() string { return "…" }

// A method is how a proxy wants to be answered.
//
//	Basic, Digest, Negotiate by a ticket    one request with the answer
//	NTLM, Negotiate by NTLM                 a first message, a challenge, the answer; all on one connection
type method struct {
	scheme string            // as the proxy writes it
	digest *digest.Challenge // Digest's
	ticket bool              // Negotiate by a Kerberos ticket, in one request; else by NTLM
	count  int               // how many answers its nonce has had
}

// preference is from the best to the least (the order of Chromium's rating).
var preference = []string{negotiate, "NTLM", "Digest", "Basic"}

const negotiate = "Negotiate"

// choose takes the best that is offered, besides the schemes that were of no use;
// nil: nothing here can answer.
func choose(offered []challenge, useless []string) *method {
	for _, scheme := range preference {
		if slices.ContainsFunc(useless, func(u string) bool { return strings.EqualFold(u, scheme) }) {
			continue
		}
		for _, c := range offered {
			if !c.is(scheme) {
				continue
			}
			m := &method{scheme: c.scheme}
			if scheme == "Digest" { // the strongest comes first (RFC 7616 §3.3), but may be one that nobody knows here
				parsed, err := digest.ParseChallenge("Digest " + c.rest)
				if err != nil || parsed.Nonce == "" || !digest.CanDigest(parsed) {
					continue
				}
				m.digest = parsed
			}
			return m
		}
	}
	return nil
}

// login is the way to an answer that a proxy accepts.
type login struct {
	proxy   *url.URL
	address string
	cred    credentials
	ticket  func() ([]byte, error) // nil: there are none

	method   *method  // how it is answered; nil: not at all yet
	count    int      // which answer by this method it is
	fresh    bool     // the proxy has offered the method just now
	answer   string   // to the challenge of a handshake; "": there was none
	useless  []string // schemes that led nowhere
	noTicket error    // why there is none; nil: it was not tried, or not accepted
	tried    bool     // a ticket was
	rejected bool     // the answer was wrong
}

// field is what the next request says of us.
func (l *login) field() (string, error) {
	switch {
	case l.answer != "":
		return l.answer, nil
	case l.method == nil:
		return "", nil
	case l.method.ticket:
		var token []byte
		if token, l.noTicket = l.ticket(); l.noTicket != nil {
			return "", nil // it has run out; the password may do
		}
		return l.method.scheme + " " + base64.StdEncoding.EncodeToString(token), nil
	case l.cred.user == "":
		return "", nil
	}
	return l.method.begin(l.cred, l.address, l.count)
}

// next decides what to say next, after an answer of 407.
func (l *login) next(offered []challenge) (err error) {
	was := l.method
	switch {
	case was == nil, l.cred.user == "" && !was.ticket:
	case was.ticket:
		l.tried = true
	case was.handshake() && l.answer == "":
		if l.answer, err = was.reply(l.cred, offered); err != nil {
			return misunderstood(l.proxy, err)
		}
		if l.answer != "" {
			return nil
		}
		// No challenge: it wants something else by this scheme, such as a Kerberos ticket.
		l.useless = append(l.useless, was.scheme)
	case was.digest != nil && stale(offered):
		// The password was right, and the nonce of another of several proxies, or too old already.
	case l.fresh, was.handshake(), was.digest == nil && slices.ContainsFunc(offered, func(c challenge) bool { return c.is(was.scheme) }):
		// The password itself was judged, not a nonce.
		l.rejected = true
		return required(l.proxy, offered, l.cred, was, l.tried, l.noTicket)
	}
	l.count, l.fresh, l.answer = 1, true, ""
	for {
		l.method = choose(offered, l.useless)
		switch {
		case l.method == nil:
			return required(l.proxy, offered, l.cred, nil, l.tried, l.noTicket)
		case l.byTicket():
			return nil
		case l.cred.user != "":
			return nil
		}
		l.useless = append(l.useless, l.method.scheme)
	}
}

// stale says that only a nonce was not accepted (RFC 7616 §3.3).
func stale(offered []challenge) bool {
	m := choose(slices.DeleteFunc(slices.Clone(offered), func(c challenge) bool { return !c.is("Digest") }), nil)
	return m != nil && m.digest.Stale
}

// byTicket answers by a Kerberos ticket, where that is asked for and there is one.
func (l *login) byTicket() bool {
	if l.tried || l.ticket == nil || !strings.EqualFold(l.method.scheme, negotiate) {
		return false
	}
	l.tried = true
	token, err := l.ticket()
	if err != nil {
		l.noTicket = err
		return false
	}
	l.method.ticket = true
	l.answer = l.method.scheme + " " + base64.StdEncoding.EncodeToString(token)
	return true
}

// handshake says whether it takes a challenge on the same connection.
func (m *method) handshake() bool {
	return !m.ticket && (strings.EqualFold(m.scheme, "NTLM") || strings.EqualFold(m.scheme, negotiate))
}

// begin returns the field with which a request begins, of the answer to a
// request to address. count is how many answers there have been with this method.
func (m *method) begin(c credentials, address string, count int) (string, error) {
	switch {
	case m.handshake():
		first, err := ntlmssp.NewNegotiateMessage("", "")
		return m.scheme + " " + base64.StdEncoding.EncodeToString(first), err
	case m.digest != nil:
		answer, err := digest.Digest(m.digest, digest.Options{Method: "CONNECT", URI: address, Count: count, Username: c.user, Password: c.password})
		if err != nil {
			return "", err
		}
		return answer.String(), nil
	}
	return m.scheme + " " + base64.StdEncoding.EncodeToString([]byte(c.user+":"+c.password)), nil
}

// reply answers the challenge of a handshake; "": the proxy sent none.
func (m *method) reply(c credentials, offered []challenge) (string, error) {
	for _, o := range offered {
		if !o.is(m.scheme) || o.rest == "" {
			continue
		}
		message, err := base64.StdEncoding.DecodeString(o.rest)
		if err != nil {
			return "", fmt.Errorf("its challenge is not base64")
		}
		answer, err := ntlmssp.NewAuthenticateMessage(message, c.user, c.password, nil)
		if err != nil {
			return "", err
		}
		return m.scheme + " " + base64.StdEncoding.EncodeToString(answer), nil
	}
	return "", nil
}

// A rejection is of a password, which it holds as a hash.
type rejection struct {
	of  [sha256.Size]byte
	at  time.Time
	err error
}

// hashKey makes the hashes of this process useless elsewhere.
var hashKey = rand.Text()

func (c credentials) hash() [sha256.Size]byte {
	return sha256.Sum256([]byte(hashKey + "\x00" + c.user + "\x00" + c.password))
}

// credentialsFor returns what to answer a proxy with; an empty user: nothing.
func (d *Dialer) credentialsFor(proxy *url.URL) (c credentials, err error) {
	if proxy.User != nil {
		c.user = proxy.User.Username()
		c.password, _ = proxy.User.Password()
		return c, nil
	}
	if d.cfg.Credentials == nil {
		return c, nil
	}
	c.user, c.password, err = d.cfg.Credentials()
	return c, err
}

// required is the error where a proxy wants to know who we are. ticket says that a
// Kerberos ticket was asked for, noTicket why there was none.
func required(proxy *url.URL, offered []challenge, c credentials, tried *method, ticket bool, noTicket error) error {
	e := &AuthError{Proxy: proxy.Host, Schemes: schemes(offered)}
	offers := "names no scheme"
	if len(e.Schemes) > 0 {
		offers = "offers " + strings.Join(e.Schemes, ", ")
	}
	kerberos := slices.ContainsFunc(offered, func(o challenge) bool { return o.is(negotiate) })
	var text string
	switch {
	case tried != nil:
		e.Tried = tried.scheme
		text = fmt.Sprintf("%s does not accept this user or password by %s (it %s); correct proxy.user and the file of proxy.password_file, or where HTTPS_PROXY holds them, that", name(proxy), tried.scheme, offers)
	case c.user == "":
		text = fmt.Sprintf("%s wants to know who is there (407; it %s); set proxy.user and proxy.password_file, or ask IT to let this machine through", name(proxy), offers)
	case kerberos: // answered by NTLM inside it, in vain
		text = fmt.Sprintf("%s wants to know who is there (407; it %s), and takes no password that way; ask IT to offer NTLM, Digest or Basic", name(proxy), offers)
	default:
		text = fmt.Sprintf("%s wants to know who is there (407; it %s), and Culvert can answer Negotiate, NTLM, Digest (MD5, SHA-256 or SHA-512/256) and Basic; ask IT to offer one of these", name(proxy), offers)
	}
	switch {
	case errors.Is(noTicket, errNoTickets):
		if kerberos && tried == nil {
			text += "; there is no Kerberos ticket here, which kinit gets"
		}
	case noTicket != nil:
		text += fmt.Sprintf("; a Kerberos ticket could not be used (%.300q)", noTicket.Error())
	case ticket:
		text += "; a Kerberos ticket was not accepted"
	}
	return &tunnel.Error{Code: tunnel.ProxyAuthRequired, Text: text, Err: e}
}
