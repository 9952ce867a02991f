package assemble_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"math/big"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"culvert/cloudproxy/identity"
	"culvert/cmd/internal/assemble"
	"culvert/cmd/internal/config"
	"culvert/sidecar"
	"culvert/tunnel"
	"culvert/tunnel/tunnelquic"
	"culvert/tunnel/tunneltls"
	"culvert/tunnel/uplink"
	"culvert/tunnel/websocket"
	"culvert/tunnel/wire"
)

// dialled connects to the site in every way that there is, and says what it was.
func (s *site) dialled(t *testing.T, conf *tls.Config) map[string]func(context.Context) (tunnel.Candidate, error) {
	t.Helper()
	pin, err := assemble.PinOf(s.cert)
	if err != nil {
		t.Fatal(err)
	}
	web, err := websocket.NewDialer(websocket.DialConfig{TLS: uplink.OuterTLS(uplink.TLSConfig{Pins: []string{pin}}), Name: assemble.DefaultServerName})
	if err != nil {
		t.Fatal(err)
	}
	quic, err := tunnelquic.NewDialer(tunnelquic.Config{TLS: conf})
	if err != nil {
		t.Fatal(err)
	}
	over, err := tunneltls.NewDialer(tunneltls.Config{TLS: conf})
	if err != nil {
		t.Fatal(err)
	}
	inside, err := tunneltls.NewDialer(tunneltls.Config{TLS: conf, Dial: web.Dial})
	if err != nil {
		t.Fatal(err)
	}
	again := func(d tunnel.Dialer, address string) func(context.Context) (tunnel.Candidate, error) {
		return func(ctx context.Context) (tunnel.Candidate, error) {
			for { // handshakes may take too long on a busy machine
				c, err := d.Dial(ctx, address)
				if code := tunnel.CodeOf(err); code != tunnel.UDPBlocked && code != tunnel.CloudUnreachable || ctx.Err() != nil {
					return c, err
				}
			}
		}
	}
	return map[string]func(context.Context) (tunnel.Candidate, error){
		"QUIC":      again(quic, s.listen),
		"TLS":       again(over, s.listen),
		"WebSocket": again(inside, "wss://"+s.listen+websocket.DefaultPath),
	}
}

// asks connects and says m. It returns the answer, or why there was none.
func asks(t *testing.T, dial func(context.Context) (tunnel.Candidate, error), m wire.Message) (wire.Message, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	c, err := dial(ctx)
	if err != nil {
		return wire.Message{}, err
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(patience))
	if err := wire.Write(c, m); err != nil {
		return wire.Message{}, err
	}
	return wire.Read(c, wire.Version{})
}

// Whoever has no right to a session gets none, by whatever it comes: neither
// with a token that is not good, nor with what it has copied of another's.
func TestNobodyIsServedWithoutARightToIt(t *testing.T) {
	s := newSite(t)
	s.places = 10
	s.web = config.WebSocket{Path: websocket.DefaultPath}
	revokedKey, err := identity.GenerateKey()
	if err != nil {
		t.Fatal(err)
	}
	if s.rules.Revoked, err = identity.ParseRevoked([]byte("id stolen\nkey " + identity.Thumbprint(revokedKey.Public().(ed25519.PublicKey)) + "\n")); err != nil {
		t.Fatal(err)
	}
	s.rules.Apps = map[string]assemble.App{"test": {}, "other": {}}
	cloud, _ := s.cloud(t)

	victim, thief := s.peer(t), s.peer(t)
	w, conn, _ := victim.dial(t, s.listen)
	session := greet(t, w, conn, victim.open()).Session
	before := cloud.Sessions()

	now := time.Now()
	foreign, err := identity.GenerateKey()
	if err != nil {
		t.Fatal(err)
	}
	forged, err := identity.Issue(foreign, identity.Claims{App: "test", Concurrency: 9, Issued: now, Expires: now.Add(time.Hour)})
	if err != nil {
		t.Fatal(err)
	}
	good := strings.Split(thief.token, ".")
	part := base64.RawURLEncoding.EncodeToString
	bound := s.issue(t, identity.Claims{Key: identity.Thumbprint(victim.key.Public().(ed25519.PublicKey))})
	revoked := *thief
	revoked.key, revoked.tls = revokedKey, s.clientTLS(t, revokedKey)
	// The victim's certificate is no secret: TLS has shown it to nobody else, but a
	// core file or a disk may. Its key is.
	copied := *thief
	copied.tls = thief.tls.Clone()
	copied.tls.Certificates = []tls.Certificate{{Certificate: victim.tls.Certificates[0].Certificate, PrivateKey: thief.key}}
	curve := *thief
	curve.tls = thief.tls.Clone()
	curve.tls.Certificates = []tls.Certificate{ecdsaCertificate(t)}
	nobody := *thief
	nobody.tls = thief.tls.Clone()
	nobody.tls.Certificates = nil

	type attempt struct {
		by   *peer
		m    wire.Message
		want tunnel.Code // "": it does not get as far as an answer
	}
	open := func(token string) wire.Message {
		return wire.Message{Open: &wire.Open{Version: wire.Current, App: "test", Token: token}}
	}
	as := func(app, region string) wire.Message {
		m := open(s.issue(t, identity.Claims{Region: "eu"}))
		m.Open.App, m.Open.Region = app, region
		return m
	}
	join := func(session, as string) wire.Message {
		return wire.Message{Join: &wire.Join{Version: wire.Current, Session: session, As: as}}
	}
	attempts := map[string]attempt{
		"no token":                   {thief, open(""), tunnel.TokenRejected},
		"noise":                      {thief, open("noise"), tunnel.TokenRejected},
		"a token without its end":    {thief, open(strings.Join(good[:2], ".")), tunnel.TokenRejected},
		"another's signature":        {thief, open(strings.Join(append(good[:2:2], strings.Split(forged, ".")[2]), ".")), tunnel.TokenRejected},
		"a token that is not signed": {thief, open(part([]byte(`{"alg":"none"}`)) + "." + good[1] + "."), tunnel.TokenRejected},
		"signed with the public key": {thief, open(part([]byte(`{"alg":"HS256"}`)) + "." + good[1] + "." + good[2]), tunnel.TokenRejected},
		"signed by somebody":         {thief, open(forged), tunnel.TokenRejected},
		"a token that has expired":   {thief, open(s.issue(t, identity.Claims{Issued: now.Add(-2 * time.Hour), Expires: now.Add(-identity.Skew - time.Minute)})), tunnel.TokenExpired},
		"a token that was revoked":   {thief, open(s.issue(t, identity.Claims{ID: "stolen"})), tunnel.TokenRejected},
		"a key that was revoked":     {&revoked, open(thief.token), tunnel.TokenRejected},
		"a token of another App ID":  {thief, open(s.issue(t, identity.Claims{App: "other"})), tunnel.TokenRejected},
		"an App ID that is not served": {thief, func() wire.Message {
			m := open(s.issue(t, identity.Claims{App: "third"}))
			m.Open.App = "third"
			return m
		}(), tunnel.TokenRejected},
		"another's App ID":                {thief, as("other", "eu"), tunnel.TokenRejected},
		"another region":                  {thief, as("test", "us"), tunnel.TokenRejected},
		"a token bound to another's key":  {thief, open(bound), tunnel.TokenRejected},
		"that, and its certificate":       {&copied, open(bound), ""},
		"a key that is not Ed25519":       {&curve, open(thief.token), tunnel.NotPermitted},
		"no key":                          {&nobody, open(thief.token), ""},
		"another's session, as a lane":    {thief, join(session, wire.AsLane), tunnel.SessionUnknown},
		"another's session, as a carrier": {thief, join(session, wire.AsCarrier), tunnel.SessionUnknown},
		"that, and its certificate, lane": {&copied, join(session, wire.AsLane), ""},
		"that, and its certificate, more": {&copied, join(session, wire.AsCarrier), ""},
		"another's session without a key": {&nobody, join(session, wire.AsLane), ""},
		"another's session, another kind": {&curve, join(session, wire.AsLane), tunnel.NotPermitted},
		"a session that is not there":     {thief, join(strings.Repeat("0", len(session)), wire.AsLane), tunnel.SessionUnknown},
		"no session":                      {thief, join("", wire.AsCarrier), tunnel.SessionUnknown},
	}
	tried := 0
	for name, a := range attempts {
		for way, dial := range s.dialled(t, a.by.tls) {
			tried++
			m, err := asks(t, dial, a.m)
			switch {
			case m.Welcome != nil:
				t.Errorf("%s by %s: it is welcome", name, way)
			case a.want == "" && err == nil:
				t.Errorf("%s by %s: it was answered with %+v", name, way, m.Refused)
			case a.want != "" && (err != nil || m.Refused == nil || m.Refused.Code != a.want):
				t.Errorf("%s by %s: %+v, %v; want %s", name, way, m.Refused, err, a.want)
			}
		}
	}
	if n := cloud.Sessions(); n != before {
		t.Errorf("%d sessions, before %d", n, before)
	}
	// The victim is where it was, and what is right is served in every way.
	for way, dial := range s.dialled(t, victim.tls) {
		if m, err := asks(t, dial, join(session, wire.AsCarrier)); err != nil || m.Welcome == nil {
			t.Errorf("the victim by %s: %+v, %v", way, m.Refused, err)
		}
	}
	for way, dial := range s.dialled(t, thief.tls) {
		if m, err := asks(t, dial, thief.open()); err != nil || m.Welcome == nil {
			t.Errorf("a good token by %s: %+v, %v", way, m.Refused, err)
		}
	}
	for _, a := range attempts {
		if a.m.Open != nil && len(a.m.Open.Token) > 10 && strings.Contains(s.log.String(), a.m.Open.Token) {
			t.Error("a token is in the log")
		}
	}
	t.Logf("%d attempts, %d of each way; none was served", tried, len(attempts))
}

func ecdsaCertificate(t *testing.T) tls.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

// Of many that claim a place at once, by every carrier, exactly as many get one
// as there are; and a place is free again with the end of its session.
func TestManyClaimsAtOnceOnAFewPlaces(t *testing.T) {
	claims := 1000
	if testing.Short() {
		claims = 60
	}
	s := newSite(t)
	s.places = 10
	s.web = config.WebSocket{Path: websocket.DefaultPath}
	cloud, _ := s.cloud(t)
	token := s.issue(t, identity.Claims{})
	ctx, cancel := context.WithTimeout(t.Context(), 3*patience)
	defer cancel()
	open := wire.Message{Open: &wire.Open{Version: wire.Current, App: "test", Token: token}}

	var mu sync.Mutex
	var held []tunnel.Carrier
	t.Cleanup(func() {
		for _, c := range held {
			c.Close(nil)
		}
	})
	taken := map[string]int{}
	var refused atomic.Int64
	claim := func(n int) {
		key, err := identity.GenerateKey()
		if err != nil {
			t.Error(err)
			return
		}
		way := []string{"QUIC", "TLS", "WebSocket"}[n%3]
		c, err := s.dialled(t, s.clientTLS(t, key))[way](ctx)
		if err != nil {
			t.Errorf("%s: %v", way, err)
			return
		}
		c.SetDeadline(time.Now().Add(patience))
		if err := wire.Write(c, open); err != nil {
			t.Errorf("%s: %v", way, err)
			return
		}
		m, err := wire.Read(c, wire.Version{})
		switch {
		case err == nil && m.Welcome != nil:
			c.SetDeadline(time.Time{})
			carrier, err := c.Carrier()
			if err != nil {
				t.Error(err)
				return
			}
			mu.Lock()
			defer mu.Unlock()
			taken[way]++
			held = append(held, carrier)
			return
		case err == nil && m.Refused != nil && m.Refused.Code == tunnel.QuotaExceeded:
			refused.Add(1)
		default:
			t.Errorf("%s: %+v, %v", way, m, err)
		}
		c.Close()
	}
	var wg sync.WaitGroup
	handshakes := make(chan struct{}, 30) // as many as are neither refused for being many nor too slow
	for n := range claims {
		wg.Go(func() {
			handshakes <- struct{}{}
			defer func() { <-handshakes }()
			claim(n)
		})
	}
	wg.Wait()
	if len(held) != s.places || int(refused.Load()) != claims-s.places || cloud.Sessions() != s.places {
		t.Fatalf("of %d claims %d were given a place and %d refused, want %d; %d sessions", claims, len(held), refused.Load(), s.places, cloud.Sessions())
	}
	t.Logf("of %d claims at once %d were given a place (%v) and %d refused", claims, len(held), taken, refused.Load())
}

// A place is another's as soon as its session has ended.
func TestAPlaceIsFreeWithTheEndOfItsSession(t *testing.T) {
	for _, mode := range bothCarriers {
		t.Run(string(mode), func(t *testing.T) {
			s := newSite(t)
			cloud, _ := s.cloud(t)
			first, second := s.sidecar(t, mode), s.stopped(t, mode)
			refused := func() bool {
				_, err := second.Switch.Start(t.Context(), sidecar.StartOptions{})
				return tunnel.CodeOf(err) == tunnel.QuotaExceeded
			}
			eventually(t, "the second is refused", refused)
			began := time.Now()
			if _, err := first.Switch.Stop(t.Context(), sidecar.StopOptions{Force: true}); err != nil {
				t.Fatal(err)
			}
			eventually(t, "the session has ended", func() bool { return cloud.Sessions() == 0 })
			ended := time.Since(began)
			if refused() {
				t.Error("the session has ended and its place is taken")
			}
			start(t, second)
			t.Logf("the session ended %v after the stop began, and another had its place after %v", ended, time.Since(began))
		})
	}
}
