package identity

import (
	"context"
	"crypto/ed25519"
	"sync"
	"time"

	"culvert/tunnel"
)

// Config says who is admitted.
type Config struct {
	Keys    Keys             // required
	Apps    map[string]Limit // the App IDs served, with limits; nil: any App ID that a token names
	Revoked *Revoked         // nil: nothing is
	Now     func() time.Time // nil: time.Now
}

func (c *Config) check() error {
	if len(c.Keys) == 0 {
		return tunnel.Errorf(tunnel.ConfigInvalid, "Keys: no public key is given, so no token could be checked")
	}
	for app, l := range c.Apps {
		if l.Sessions < 0 {
			return tunnel.Errorf(tunnel.ConfigInvalid, "Apps: %q has a negative number of sessions", app)
		}
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	return nil
}

// Limit bounds one App ID, whatever its tokens say.
type Limit struct {
	Sessions int // at once; 0: as the token says
}

// Admission admits sessions and counts them.
type Admission struct {
	mu   sync.Mutex // guards the fields below
	cfg  Config
	apps map[string]map[string]int // sessions by App ID and the sidecar key's Thumbprint; none is 0
}

// NewAdmission checks the configuration.
func NewAdmission(cfg Config) (*Admission, error) {
	if err := cfg.check(); err != nil {
		return nil, err
	}
	return &Admission{cfg: cfg, apps: map[string]map[string]int{}}, nil
}

// Change puts another configuration in force. Places that it would not give any
// more are kept until they are released: Place.Check says so. After an error the
// old one is in force.
func (a *Admission) Change(cfg Config) error {
	if err := cfg.check(); err != nil {
		return err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.cfg = cfg
	return nil
}

func (a *Admission) config() Config {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.cfg
}

// A Place is an admitted session's.
type Place struct {
	a       *Admission
	open    tunnel.Open // without its token
	thumb   string      // of the sidecar's key
	release func()

	mu     sync.Mutex // guards the fields below
	claims Claims
	signer string // the Thumbprint of the key that has signed the token
}

// Admit checks the token and takes one of the App ID's places. Sessions with the
// same key and App ID share one: a sidecar that comes back must not be kept out
// by what is left of itself. The place is free when each of them has been
// released.
func (a *Admission) Admit(ctx context.Context, o tunnel.Open) (*Place, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	cfg := a.config()
	c, signer, err := cfg.judge(o)
	if err != nil {
		return nil, err
	}
	sessions := c.Concurrency
	if limit := cfg.Apps[c.App].Sessions; limit > 0 {
		sessions = min(sessions, limit)
	}
	thumb := Thumbprint(o.Key)
	o.Token = ""
	a.mu.Lock()
	defer a.mu.Unlock()
	claims := a.apps[c.App]
	if claims[thumb] == 0 && len(claims) >= sessions {
		return nil, tunnel.Errorf(tunnel.QuotaExceeded, "App ID %q has %d sessions, and %d are allowed; end one or get a token with a higher concurrency", c.App, len(claims), sessions)
	}
	if claims == nil {
		claims = map[string]int{}
		a.apps[c.App] = claims
	}
	claims[thumb]++
	return &Place{a: a, open: o, thumb: thumb, claims: c, signer: signer, release: sync.OnceFunc(func() { a.release(c.App, thumb) })}, nil
}

// judge checks what a sidecar says of itself. It returns the Thumbprint of the
// token's signer too.
func (c *Config) judge(o tunnel.Open) (Claims, string, error) {
	t, signer, err := c.Keys.verify(o.Token, c.Now())
	if err != nil {
		return Claims{}, "", err
	}
	reject := func(format string, args ...any) (Claims, string, error) {
		return Claims{}, "", tunnel.Errorf(tunnel.TokenRejected, format, args...)
	}
	_, served := c.Apps[t.App]
	switch {
	case len(o.Key) != ed25519.PublicKeySize:
		return reject("the sidecar showed no Ed25519 key; its TLS must not be ended on the way")
	case o.App != t.App:
		return reject("the token is for another App ID than %.128q; use the token of this App ID", o.App)
	case c.Apps != nil && !served:
		return Claims{}, "", notServed(t.App)
	case t.Region != "" && o.Region != t.Region:
		return reject("the token is for region %q and the sidecar asks for %.128q; make them agree", t.Region, o.Region)
	case t.Operator != "" && o.Operator != t.Operator:
		return reject("the token is for network operator %q and the sidecar names %.128q; make them agree", t.Operator, o.Operator)
	case t.Key != "" && t.Key != Thumbprint(o.Key):
		return reject("the token is bound to another sidecar's key; get a token for this one")
	case c.Revoked.Revokes(t, Thumbprint(o.Key)):
		return Claims{}, "", errRevoked
	}
	return t, signer, nil
}

var errRevoked = tunnel.Errorf(tunnel.TokenRejected, "the token has been revoked; get a new one from whoever runs the cloud proxy")

func notServed(app string) error {
	return tunnel.Errorf(tunnel.TokenRejected, "App ID %q is not served by this cloud proxy; ask whoever runs it", app)
}

// Claims are those of the token that the place is held with.
func (p *Place) Claims() Claims {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.claims
}

// Renew holds the place with another token for the same sidecar from now on.
// After an error it is held with the one before. The number of places that the
// new token names counts for whoever is admitted next.
func (p *Place) Renew(token string) (Claims, error) {
	o := p.open
	o.Token = token
	cfg := p.a.config()
	c, signer, err := cfg.judge(o)
	if err != nil {
		return Claims{}, err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.claims, p.signer = c, signer
	return c, nil
}

// Check says why the place may be held no longer: its token has expired, was
// revoked, or would not be accepted any more; nil: it may be held. It is cheap
// enough to be asked each second for each session.
func (p *Place) Check() error {
	cfg := p.a.config()
	p.mu.Lock()
	defer p.mu.Unlock()
	_, served := cfg.Apps[p.claims.App]
	switch {
	case cfg.Now().After(p.claims.Expires.Add(Skew)):
		return expiredOn(p.claims)
	case cfg.Keys[p.signer] == nil:
		return tunnel.Errorf(tunnel.TokenRejected, "the key that the token is signed with is accepted no longer; get a new token")
	case cfg.Apps != nil && !served:
		return notServed(p.claims.App)
	case cfg.Revoked.Revokes(p.claims, p.thumb):
		return errRevoked
	}
	return nil
}

// Release gives the place back. It may be called more than once.
func (p *Place) Release() { p.release() }

func (a *Admission) release(app, thumb string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	claims := a.apps[app]
	if claims[thumb]--; claims[thumb] > 0 {
		return
	}
	if delete(claims, thumb); len(claims) == 0 {
		delete(a.apps, app)
	}
}

// Sessions returns how many places of each App ID are taken.
func (a *Admission) Sessions() map[string]int {
	a.mu.Lock()
	defer a.mu.Unlock()
	m := make(map[string]int, len(a.apps))
	for app, c := range a.apps {
		m[app] = len(c)
	}
	return m
}
