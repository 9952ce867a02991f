package assemble

import (
	"context"
	"log/slog"
	"slices"
	"strings"
	"time"

	"culvert/cloudproxy/identity"
	"culvert/cmd/internal/config"
	"culvert/policy"
	"culvert/sidecar"
	"culvert/tunnel"
	"culvert/tunnel/session"
)

// Rules are what a cloud proxy follows and can be given anew while it runs: who
// may use it, and for what.
type Rules struct {
	Keys    identity.Keys
	Revoked *identity.Revoked // nil: nothing is
	Apps    map[string]App    // the App IDs served; nil: any that a token names
	Policy  *policy.Policy    // where the App has none of its own
}

// App is what one App ID may do.
type App struct {
	Sessions int            // at once; 0: as its token says
	Limits   session.Limits // of each session; zero fields: the general ones
	Rate     int            // bytes per second of each session, each way; 0: as for all
	Policy   *policy.Policy // nil: the general one
}

// RulesFrom reads what the configuration names.
func RulesFrom(c *config.CloudProxy) (r Rules, err error) {
	if r.Keys, err = identity.LoadKeys(c.Tokens.PublicKeys...); err != nil {
		return r, err
	}
	if c.Tokens.Revoked != "" {
		if r.Revoked, err = identity.LoadRevoked(c.Tokens.Revoked); err != nil {
			return r, err
		}
	}
	if r.Policy, err = policy.New(c.Policy); err != nil {
		return r, err
	}
	if len(c.Apps) > 0 {
		r.Apps = map[string]App{}
	}
	for _, a := range c.Apps {
		app := App{Sessions: a.Sessions, Rate: a.Limits.BytesPerSecond, Limits: session.Limits{Associations: a.Limits.Associations, Streams: a.Limits.Streams, OpensPerSecond: a.Limits.OpensPerSecond}}
		if a.Policy != nil {
			if app.Policy, err = policy.New(*a.Policy); err != nil {
				return r, err
			}
		}
		r.Apps[a.ID] = app
	}
	return r, nil
}

// of is the policy for a peer.
func (r *Rules) of(by tunnel.Peer) *policy.Policy {
	if p := r.Apps[by.App].Policy; p != nil {
		return p
	}
	return r.Policy
}

func (r *Rules) admission() identity.Config {
	c := identity.Config{Keys: r.Keys, Revoked: r.Revoked}
	if r.Apps != nil {
		c.Apps = map[string]identity.Limit{}
	}
	for id, a := range r.Apps {
		c.Apps[id] = identity.Limit{Sessions: a.Sessions}
	}
	return c
}

// Change puts other rules in force, all at once. Flows that they forbid end
// now, sessions that they do not admit within two seconds. After an error the
// old ones are in force.
func (c *CloudProxy) Change(r Rules) error {
	if err := c.admission.Change(r.admission()); err != nil {
		return err
	}
	c.rules.Store(&r)
	c.guard.Review()
	return nil
}

// Reload reads the configuration again at once, as a change of its file does
// within a second. It does not wait.
func (c *CloudProxy) Reload() { request(c.ask) }

// request asks whoever follows files to read them now.
func request(ask chan<- struct{}) {
	select {
	case ask <- struct{}{}:
	default: // it is about to
	}
}

// cloudFiles are those that a cloud proxy's rules are read from.
func cloudFiles(c *config.CloudProxy) []string {
	return append([]string{c.File(), c.Tokens.Revoked}, c.Tokens.PublicKeys...)
}

// follow keeps the rules those of the configuration's file until ctx ends.
func (c *CloudProxy) follow(ctx context.Context, conf *config.CloudProxy) {
	was, err := config.ReadCloudProxy(conf.File()) // as it stands there, without flags
	if err != nil {
		was = conf
	}
	follow(ctx, c.seen, func() []string { return cloudFiles(was) }, c.ask, func(bool) {
		next, err := config.ReadCloudProxy(conf.File())
		var r Rules
		if err == nil {
			r, err = RulesFrom(next)
		}
		if err == nil {
			err = c.Change(r)
		}
		if err != nil {
			notTaken(c.log, err)
			c.revoke(was.Tokens.Revoked)
			return
		}
		c.log.Info("the configuration was read again; policy, App IDs, keys and revocations are in force as they stand there", auditKey, "changed")
		needsRestart(c.log, config.Changed(was, next, "policy", "tokens", "apps"))
		was = next
	})
}

// revoke puts a list of revocations in force by itself: whoever revokes a token need
// not know of a mistake in another file, and is not to wait until it is mended.
func (c *CloudProxy) revoke(file string) {
	if file == "" {
		return
	}
	list, err := identity.LoadRevoked(file)
	if err != nil {
		return // that is the mistake, or another
	}
	r := *c.rules.Load()
	r.Revoked = list
	if c.Change(r) == nil {
		c.log.Info("the revocations are in force as they stand in their file all the same", auditKey, "changed")
	}
}

func notTaken(log *slog.Logger, err error) {
	log.Error("a changed file can not be used, and what was in force before stays so", auditKey, "not_changed", "code", tunnel.CodeOf(err), "why", tunnel.Sentence(err))
}

func needsRestart(log *slog.Logger, keys []string) {
	if len(keys) > 0 {
		log.Warn("other keys of the configuration have changed, which counts from the next start on", "keys", strings.Join(keys, " "))
	}
}

// OwnPolicy is the policy of a sidecar's configuration; policy.Elsewhere where
// it has none.
func OwnPolicy(c policy.Config) (*policy.Policy, error) {
	if len(c.Profiles)+len(c.Rules) == 0 {
		return policy.Elsewhere(), nil
	}
	return policy.New(c)
}

// ChangePolicy puts another policy in force. Flows that it forbids end now.
func (s *Sidecar) ChangePolicy(p *policy.Policy) {
	s.policy.Store(p)
	for _, g := range s.guards {
		g.Review()
	}
}

// Reload is that of CloudProxy.
func (s *Sidecar) Reload() { request(s.ask) }

// follow keeps the policy that of the configuration's file, and the session's
// token that of its file, until ctx ends.
func (s *Sidecar) follow(ctx context.Context, conf *config.Sidecar) {
	if file := conf.Identity.TokenFile; file != "" {
		done := make(chan struct{})
		defer func() { <-done }()
		go func() {
			defer close(done)
			follow(ctx, s.seen, func() []string { return []string{file} }, nil, func(bool) { s.tokenChanged(ctx) })
		}()
	}
	if conf.File() == "" {
		<-ctx.Done()
		return
	}
	was, err := config.ReadSidecar(conf.File()) // as it stands there, without flags
	if err != nil {
		was = conf
	}
	follow(ctx, s.seen, func() []string { return []string{conf.File()} }, s.ask, func(asked bool) {
		if asked {
			s.tokenChanged(ctx)
		}
		next, err := config.ReadSidecar(conf.File())
		var p *policy.Policy
		if err == nil {
			p, err = OwnPolicy(next.Policy)
		}
		if err != nil {
			notTaken(s.log, err)
			return
		}
		s.ChangePolicy(p)
		s.log.Info("the configuration was read again; the policy is in force as it stands there", auditKey, "changed")
		needsRestart(s.log, config.Changed(was, next, "policy"))
		if conf.Capture != nil && conf.Capture.Profiles {
			s.log.Warn("what is captured are the destinations of the policy at the start; start Culvert again to have those of the new one captured")
		}
		was = next
	})
}

// tokenChanged brings the token to the cloud proxy, or starts again what has
// failed for want of a good one.
func (s *Sidecar) tokenChanged(ctx context.Context) {
	request(s.renewed)
	st := s.Switch.Status()
	if st.State != sidecar.Failed || !slices.Contains([]tunnel.Code{tunnel.TokenExpired, tunnel.TokenRejected}, st.Code) {
		return
	}
	s.log.Info("there is another token; starting again")
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	s.Switch.Start(ctx, sidecar.StartOptions{Keep: true}) // it logs what comes of it
}
