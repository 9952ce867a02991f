package identity

import (
	"crypto/ed25519"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/golang-jwt/jwt/v5"

	"culvert/tunnel"
)

const (
	// MaxToken is the longest token that is read, in bytes.
	MaxToken = 4096
	// MaxText is the longest App ID, region, operator or token ID, in bytes.
	MaxText = 128
	// Skew is how far two clocks may differ.
	Skew = 5 * time.Minute
	// maxTime is the end of the year 9999, in Unix seconds. What is said in
	// milliseconds lies beyond, and would never expire.
	maxTime = 253402300799
)

// Claims are what a token says.
type Claims struct {
	App         string    `json:"app"`                // App ID
	Region      string    `json:"region,omitempty"`   // empty: any
	Operator    string    `json:"operator,omitempty"` // network operator; empty: any
	Concurrency int       `json:"concurrency"`        // simultaneous sessions of the App ID, at least 1
	Issued      time.Time `json:"issued"`             // in whole seconds
	Expires     time.Time `json:"expires"`            // in whole seconds
	ID          string    `json:"id"`                 // jti; Issue makes one where it is empty
	Key         string    `json:"key,omitempty"`      // Thumbprint of the only sidecar that may use it; empty: any
}

type wireClaims struct {
	jwt.RegisteredClaims
	App         string        `json:"app"`
	Region      string        `json:"region,omitempty"`
	Operator    string        `json:"operator,omitempty"`
	Concurrency int           `json:"concurrency"`
	Confirm     *confirmation `json:"cnf,omitempty"`
}

type confirmation struct {
	Kid string `json:"kid"`
}

// Thumbprint names a key: the SHA-256 of its 32 bytes in base64url, 43
// characters.
func Thumbprint(k ed25519.PublicKey) string {
	h := sha256.Sum256(k)
	return base64.RawURLEncoding.EncodeToString(h[:])
}

// ParseThumbprint checks that s can be a thumbprint.
func ParseThumbprint(s string) error {
	if b, err := base64.RawURLEncoding.Strict().DecodeString(s); err != nil || len(b) != sha256.Size {
		return tunnel.Errorf(tunnel.ConfigInvalid, "%.60q is not the thumbprint of a key; a thumbprint is 43 characters of base64url", s)
	}
	return nil
}

func (c *Claims) check() error {
	for _, f := range []struct{ name, value string }{{"App ID", c.App}, {"region", c.Region}, {"operator", c.Operator}, {"token ID", c.ID}} {
		if len(f.value) > MaxText {
			return tunnel.Errorf(tunnel.ConfigInvalid, "the %s has %d bytes; at most %d are allowed", f.name, len(f.value), MaxText)
		}
		for _, r := range f.value {
			if r == ' ' || !unicode.IsPrint(r) || r == utf8.RuneError {
				return tunnel.Errorf(tunnel.ConfigInvalid, "the %s holds a space, a control character, one that is not seen or invalid UTF-8; leave it out", f.name)
			}
		}
	}
	switch {
	case c.App == "":
		return tunnel.Errorf(tunnel.ConfigInvalid, "a token needs an App ID; name one")
	case c.Concurrency < 1 || c.Concurrency > 1_000_000:
		return tunnel.Errorf(tunnel.ConfigInvalid, "a concurrency of %d is not between 1 and 1,000,000", c.Concurrency)
	case c.Expires.IsZero():
		return tunnel.Errorf(tunnel.ConfigInvalid, "a token needs an expiry; name one")
	case c.Expires.Unix() < 0 || c.Expires.Unix() > maxTime || !c.Issued.IsZero() && (c.Issued.Unix() < 0 || c.Issued.Unix() > maxTime):
		return tunnel.Errorf(tunnel.ConfigInvalid, "a time is before 1970 or after 9999; times of a token are in seconds")
	}
	if c.Key != "" {
		return ParseThumbprint(c.Key)
	}
	return nil
}

// NewID makes a token ID.
func NewID() string { return rand.Text() }

// Issue signs a token. Errors are ConfigInvalid and name the claim.
func Issue(key ed25519.PrivateKey, c Claims) (string, error) {
	if len(key) != ed25519.PrivateKeySize {
		return "", tunnel.Errorf(tunnel.ConfigInvalid, "a token is signed with an Ed25519 key; 'culvert-cloudproxy init' makes one")
	}
	if c.ID == "" {
		c.ID = NewID()
	}
	if err := c.check(); err != nil {
		return "", err
	}
	if strings.Contains(c.App, "#") || strings.Contains(c.ID, "#") {
		return "", tunnel.Errorf(tunnel.ConfigInvalid, "an App ID or token ID with # could not be revoked, where that begins a comment; leave it out")
	}
	w := wireClaims{App: c.App, Region: c.Region, Operator: c.Operator, Concurrency: c.Concurrency}
	w.ID, w.ExpiresAt = c.ID, jwt.NewNumericDate(c.Expires)
	if !c.Issued.IsZero() {
		w.IssuedAt = jwt.NewNumericDate(c.Issued)
	}
	if c.Key != "" {
		w.Confirm = &confirmation{c.Key}
	}
	t := jwt.NewWithClaims(jwt.SigningMethodEdDSA, w)
	t.Header["kid"] = Thumbprint(key.Public().(ed25519.PublicKey))
	s, err := t.SignedString(key)
	if err != nil {
		return "", tunnel.Errorf(tunnel.Internal, "the token could not be signed: %w", err)
	}
	return s, nil
}

// Keys are the public keys whose tokens are accepted, by Thumbprint.
type Keys map[string]ed25519.PublicKey

// NewKeys makes Keys.
func NewKeys(keys ...ed25519.PublicKey) Keys {
	k := Keys{}
	for _, p := range keys {
		k[Thumbprint(p)] = p
	}
	return k
}

var (
	errUnknownKey  = errors.New("unknown key")
	errUnknownRule = errors.New("crit") // RFC 7515 §4.1.11
)

// Verify checks a token at a time; the clocks may differ by Skew. It fails with
// TokenExpired or TokenRejected. With TokenExpired the claims are genuine.
func (k Keys) Verify(token string, now time.Time) (Claims, error) {
	c, _, err := k.verify(token, now)
	return c, err
}

// verify also returns the Thumbprint of the key that has signed the token.
func (k Keys) verify(token string, now time.Time) (Claims, string, error) {
	fail := func(err error) (Claims, string, error) { return Claims{}, "", err }
	if len(token) > MaxToken {
		return fail(tunnel.Errorf(tunnel.TokenRejected, "the token has %d bytes, more than %d; copy it again", len(token), MaxToken))
	}
	var w wireClaims
	var by string
	_, err := jwt.ParseWithClaims(token, &w, func(t *jwt.Token) (any, error) {
		if _, critical := t.Header["crit"]; critical {
			return nil, errUnknownRule
		}
		kid, _ := t.Header["kid"].(string)
		if key, ok := k[kid]; ok && len(key) == ed25519.PublicKeySize {
			by = kid
			return key, nil
		}
		return nil, errUnknownKey
	}, jwt.WithValidMethods([]string{"EdDSA"}), jwt.WithStrictDecoding(), jwt.WithLeeway(Skew), jwt.WithExpirationRequired(),
		jwt.WithIssuedAt(), jwt.WithTimeFunc(func() time.Time { return now }))
	expired := errors.Is(err, jwt.ErrTokenExpired)
	// The library's texts may quote the token, so they are not passed on.
	switch {
	case err == nil, expired:
	case errors.Is(err, errUnknownKey):
		return fail(tunnel.Errorf(tunnel.TokenRejected, "the token is signed with a key that is not known here; get a token for this cloud proxy"))
	case errors.Is(err, errUnknownRule):
		return fail(tunnel.Errorf(tunnel.TokenRejected, "the token's header demands what is not known here (crit); get another one"))
	case errors.Is(err, jwt.ErrTokenUsedBeforeIssued), errors.Is(err, jwt.ErrTokenNotValidYet):
		return fail(errFuture)
	case errors.Is(err, jwt.ErrTokenSignatureInvalid):
		return fail(tunnel.Errorf(tunnel.TokenRejected, "the token's signature is not right; copy it again or get a new one"))
	default:
		return fail(errNoToken)
	}
	if nbf := w.NotBefore; nbf != nil && (nbf.Unix() < 0 || nbf.Unix() > maxTime) { // the library lets pass what overflows
		return fail(errFuture)
	}
	if len(w.Audience) > 0 { // RFC 7519 §4.1.3
		return fail(tunnel.Errorf(tunnel.TokenRejected, "the token is for another service (aud); get one for this cloud proxy"))
	}
	c := w.claims()
	if w.Confirm != nil && c.Key == "" {
		return fail(tunnel.Errorf(tunnel.TokenRejected, "the token is bound to a key in a way that is not known here; get a new one"))
	}
	if err := c.check(); err != nil {
		return fail(tunnel.Errorf(tunnel.TokenRejected, "the token is not right (%s); get a new one", tunnel.Sentence(err)))
	}
	if expired {
		return c, by, expiredOn(c)
	}
	return c, by, nil
}

func expiredOn(c Claims) error {
	return tunnel.Errorf(tunnel.TokenExpired, "the token expired on %s; get a new one", c.Expires.UTC().Format(time.RFC3339))
}

// Unverified reads a token without checking its signature or expiry: only for
// showing what it says. It fails with TokenRejected.
func Unverified(token string) (Claims, error) {
	var w wireClaims
	if len(token) > MaxToken {
		return Claims{}, errNoToken
	}
	if _, _, err := jwt.NewParser(jwt.WithStrictDecoding()).ParseUnverified(token, &w); err != nil || w.ExpiresAt == nil {
		return Claims{}, errNoToken
	}
	c := w.claims()
	if err := c.check(); err != nil {
		return Claims{}, tunnel.Errorf(tunnel.TokenRejected, "the token is not right (%s); get a new one", tunnel.Sentence(err))
	}
	return c, nil
}

var errFuture = tunnel.Errorf(tunnel.TokenRejected, "the token is from the future; check the clocks of this host and of the one that issued it")

var errNoToken = tunnel.Errorf(tunnel.TokenRejected, "this is not a token of Culvert; copy it again or get a new one")

func (w *wireClaims) claims() Claims {
	c := Claims{App: w.App, Region: w.Region, Operator: w.Operator, Concurrency: w.Concurrency, ID: w.ID, Expires: w.ExpiresAt.UTC()}
	if w.IssuedAt != nil {
		c.Issued = w.IssuedAt.UTC()
	}
	if w.Confirm != nil {
		c.Key = w.Confirm.Kid
	}
	return c
}
