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
	Keys Keys             // required
	Apps map[string]Limit // the App IDs served, with limits; nil: any App ID that a token names
	Now  func() time.Time // nil: time.Now
}

// Limit bounds one App ID, whatever its tokens say.
type Limit struct {
	Sessions int // at once; 0: as the token says
}

// Grant is what an admitted session may do.
type Grant struct {
	Claims   Claims
	Sessions int // simultaneous sessions of the App ID
}

// Admission admits sessions and counts them.
type Admission struct {
	cfg Config

	mu   sync.Mutex
	apps map[string]map[string]int // sessions by App ID and the sidecar key's Thumbprint; none is 0
}

// NewAdmission checks the configuration.
func NewAdmission(cfg Config) (*Admission, error) {
	if len(cfg.Keys) == 0 {
		return nil, tunnel.Errorf(tunnel.ConfigInvalid, "Keys: no public key is given, so no token could be checked")
	}
	for app, l := range cfg.Apps {
		if l.Sessions < 0 {
			return nil, tunnel.Errorf(tunnel.ConfigInvalid, "Apps: %q has a negative number of sessions", app)
		}
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	return &Admission{cfg: cfg, apps: map[string]map[string]int{}}, nil
}

// Admit checks the token and takes one of the App ID's places. Sessions with the
// same key and App ID share one: a sidecar that comes back must not be kept out
// by what is left of itself. The place is free when each of them has been
// released; release may be called more than once.
func (a *Admission) Admit(ctx context.Context, o tunnel.Open) (g Grant, release func(), err error) {
	if err := ctx.Err(); err != nil {
		return Grant{}, nil, err
	}
	c, err := a.cfg.Keys.Verify(o.Token, a.cfg.Now())
	if err != nil {
		return Grant{}, nil, err
	}
	limit, served := a.cfg.Apps[c.App]
	reject := func(format string, args ...any) (Grant, func(), error) {
		return Grant{}, nil, tunnel.Errorf(tunnel.TokenRejected, format, args...)
	}
	switch {
	case len(o.Key) != ed25519.PublicKeySize:
		return reject("the sidecar showed no Ed25519 key; its TLS must not be ended on the way")
	case o.App != c.App:
		return reject("the token is for another App ID than %.128q; use the token of this App ID", o.App)
	case a.cfg.Apps != nil && !served:
		return reject("App ID %q is not served by this cloud proxy; ask whoever runs it", c.App)
	case c.Region != "" && o.Region != c.Region:
		return reject("the token is for region %q and the sidecar asks for %.128q; make them agree", c.Region, o.Region)
	case c.Operator != "" && o.Operator != c.Operator:
		return reject("the token is for network operator %q and the sidecar names %.128q; make them agree", c.Operator, o.Operator)
	case c.Key != "" && c.Key != Thumbprint(o.Key):
		return reject("the token is bound to another sidecar's key; get a token for this one")
	}
	sessions := c.Concurrency
	if limit.Sessions > 0 {
		sessions = min(sessions, limit.Sessions)
	}

	thumb := Thumbprint(o.Key)
	a.mu.Lock()
	defer a.mu.Unlock()
	claims := a.apps[c.App]
	if claims[thumb] == 0 && len(claims) >= sessions {
		return Grant{}, nil, tunnel.Errorf(tunnel.QuotaExceeded, "App ID %q has %d sessions, and %d are allowed; end one or get a token with a higher concurrency", c.App, len(claims), sessions)
	}
	if claims == nil {
		claims = map[string]int{}
		a.apps[c.App] = claims
	}
	claims[thumb]++
	return Grant{c, sessions}, sync.OnceFunc(func() { a.release(c.App, thumb) }), nil
}

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
