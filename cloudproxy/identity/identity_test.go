package identity

import (
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/base64"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/golang-jwt/jwt/v5"
	"go.uber.org/goleak"

	"culvert/tunnel"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var epoch = time.Date(2026, 11, 23, 12, 0, 0, 0, time.UTC)

func newKey(t testing.TB) (ed25519.PrivateKey, ed25519.PublicKey) {
	t.Helper()
	k, err := GenerateKey()
	if err != nil {
		t.Fatal(err)
	}
	return k, k.Public().(ed25519.PublicKey)
}

func issue(t testing.TB, k ed25519.PrivateKey, c Claims) string {
	t.Helper()
	s, err := Issue(k, c)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func good() Claims {
	return Claims{App: "app", Concurrency: 10, Issued: epoch, Expires: epoch.Add(time.Hour)}
}

func TestATokenSaysWhatWasIssued(t *testing.T) {
	key, pub := newKey(t)
	_, side := newKey(t)
	want := Claims{App: "app-1", Region: "eu", Operator: "op", Concurrency: 7, Issued: epoch, Expires: epoch.Add(time.Hour), ID: "j", Key: Thumbprint(side)}
	_, other := newKey(t)
	got, err := NewKeys(other, pub).Verify(issue(t, key, want), epoch)
	if err != nil || got != want {
		t.Fatalf("got %+v, %v; want %+v", got, err, want)
	}
}

func TestTokensThatAreRefused(t *testing.T) {
	key, pub := newKey(t)
	stranger, _ := newKey(t)
	token := issue(t, key, good())
	parts := strings.Split(token, ".")
	forge := func(m jwt.SigningMethod, with any, claims any) string {
		tok := jwt.NewWithClaims(m, claims.(jwt.Claims))
		tok.Header["kid"] = Thumbprint(pub)
		s, err := tok.SignedString(with)
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	all := jwt.MapClaims{"app": "app", "concurrency": 1, "exp": epoch.Add(time.Hour).Unix(), "jti": "x"}
	without := func(k string) jwt.MapClaims {
		m := jwt.MapClaims{}
		for n, v := range all {
			if n != k {
				m[n] = v
			}
		}
		return m
	}
	odd := without("")
	odd["cnf"] = map[string]string{"jkt": "x"}
	for name, c := range map[string]struct {
		token string
		now   time.Time
		code  tunnel.Code
	}{
		"within the skew":   {token, epoch.Add(time.Hour + Skew - time.Second), ""},
		"expired":           {token, epoch.Add(time.Hour + Skew + time.Second), tunnel.TokenExpired},
		"early, in skew":    {token, epoch.Add(-Skew + time.Second), ""},
		"from the future":   {token, epoch.Add(-Skew - time.Minute), tunnel.TokenRejected},
		"empty":             {"", epoch, tunnel.TokenRejected},
		"too long":          {strings.Repeat("a", MaxToken+1), epoch, tunnel.TokenRejected},
		"unknown key":       {issue(t, stranger, good()), epoch, tunnel.TokenRejected},
		"no signature":      {parts[0] + "." + parts[1] + ".", epoch, tunnel.TokenRejected},
		"other claims":      {parts[0] + "." + strings.Split(issue(t, stranger, good()), ".")[1] + "." + parts[2], epoch, tunnel.TokenRejected},
		"alg none":          {forge(jwt.SigningMethodNone, jwt.UnsafeAllowNoneSignatureType, all), epoch, tunnel.TokenRejected},
		"alg HS256":         {forge(jwt.SigningMethodHS256, []byte(pub), all), epoch, tunnel.TokenRejected},
		"other signer":      {forge(jwt.SigningMethodEdDSA, stranger, all), epoch, tunnel.TokenRejected},
		"the same, genuine": {forge(jwt.SigningMethodEdDSA, key, all), epoch, ""},
		"no expiry":         {forge(jwt.SigningMethodEdDSA, key, without("exp")), epoch, tunnel.TokenRejected},
		"no App ID":         {forge(jwt.SigningMethodEdDSA, key, without("app")), epoch, tunnel.TokenRejected},
		"no concurrency":    {forge(jwt.SigningMethodEdDSA, key, without("concurrency")), epoch, tunnel.TokenRejected},
		"odd cnf":           {forge(jwt.SigningMethodEdDSA, key, odd), epoch, tunnel.TokenRejected},
	} {
		_, err := NewKeys(pub).Verify(c.token, c.now)
		if tunnel.CodeOf(err) != c.code {
			t.Errorf("%s: %v, want code %q", name, err, c.code)
		}
		if err != nil && len(c.token) > 20 && strings.Contains(err.Error(), c.token[:20]) {
			t.Errorf("%s: the error quotes the token: %v", name, err)
		}
	}
}

// What signs tokens may be another program than ours, and wrong. What it says is
// taken as the RFCs say, or not at all.
func TestTokensOfASignerThatIsWrong(t *testing.T) {
	key, pub := newKey(t)
	part := base64.RawURLEncoding.EncodeToString
	sign := func(head, claims string) string {
		text := part([]byte(`{"alg":"EdDSA","kid":"`+Thumbprint(pub)+`"`+head+`}`)) + "." + part([]byte(`{"concurrency":1,"jti":"x"`+claims+`}`))
		return text + "." + part(ed25519.Sign(key, []byte(text)))
	}
	const app = `,"app":"app"`
	exp := fmt.Sprintf(`,"exp":%d`, epoch.Add(time.Hour).Unix())
	for name, c := range map[string]struct{ head, claims, want string }{
		"nothing wrong":                    {"", app + exp + `,"nbf":0,"iat":0`, ""},
		"a header that is critical":        {`,"crit":["exp2"],"exp2":1`, app + exp, "crit"}, // RFC 7515 §4.1.11
		"an encoding that is critical":     {`,"crit":["b64"],"b64":false`, app + exp, "crit"},
		"for another service":              {"", app + exp + `,"aud":"mail"`, "aud"}, // RFC 7519 §4.1.3
		"for several others":               {"", app + exp + `,"aud":["mail","web"]`, "aud"},
		"an end in milliseconds":           {"", app + fmt.Sprintf(`,"exp":%d`, epoch.UnixMilli()), "seconds"},
		"an end beyond all numbers":        {"", app + `,"exp":1e400`, "not a token"},
		"an end that overflows":            {"", app + `,"exp":1e300`, "seconds"},
		"an end that overflows downwards":  {"", app + `,"exp":-1e300`, "seconds"},
		"an end that is almost too far":    {"", app + `,"exp":253402300799`, ""},
		"from a future that overflows":     {"", app + exp + `,"nbf":1e300`, "future"},
		"issued when time overflows":       {"", app + exp + `,"iat":1e300`, "seconds"},
		"an App ID that moves the cursor":  {"", `,"app":"a\u009b2J"` + exp, "control"},
		"an App ID written right to left":  {"", `,"app":"a\u202ebc"` + exp, "not seen"},
		"an App ID that seems to be other": {"", `,"app":"app\u200b"` + exp, "not seen"},
		"an App ID of two words":           {"", `,"app":"a\u00a0b"` + exp, "space"},
		"a token ID that is not seen":      {"", app + exp + `,"jti":"\u00ad"`, "not seen"},
	} {
		_, err := NewKeys(pub).Verify(sign(c.head, c.claims), epoch)
		if c.want == "" && err != nil || c.want != "" && (tunnel.CodeOf(err) != tunnel.TokenRejected || !strings.Contains(err.Error(), c.want)) {
			t.Errorf("%s: %v, want %q", name, err, c.want)
		}
	}
	for _, app := range []string{"a#b", "a\u00a0b", "a\u009b2J"} {
		c := good()
		c.App = app
		if _, err := Issue(key, c); tunnel.CodeOf(err) != tunnel.ConfigInvalid {
			t.Errorf("App ID %q, which no list of revocations could name: %v", app, err)
		}
	}
}

func TestKeyFiles(t *testing.T) {
	key, pub := newKey(t)
	dir := t.TempDir()
	private, public := filepath.Join(dir, "token.key"), filepath.Join(dir, "token.pub")
	if err := errors.Join(SaveKey(private, key), SavePublicKey(public, pub)); err != nil {
		t.Fatal(err)
	}
	if st, _ := os.Stat(private); st.Mode().Perm() != 0o600 {
		t.Errorf("the private key has mode %v", st.Mode())
	}
	if k, err := LoadKey(private); err != nil || !k.Equal(key) {
		t.Errorf("LoadKey: %v", err)
	}
	if k, err := LoadKeys(public); err != nil || !k[Thumbprint(pub)].Equal(pub) {
		t.Errorf("LoadKeys: %v", err)
	}
	if err := SaveKey(private, key); err == nil {
		t.Error("a key was replaced")
	}
	if _, err := LoadKey(public); tunnel.CodeOf(err) != tunnel.ConfigInvalid {
		t.Errorf("a public key as the private one: %v", err)
	}
	if _, err := LoadPublicKey(private); tunnel.CodeOf(err) != tunnel.ConfigInvalid {
		t.Errorf("a private key as the public one: %v", err)
	}
	os.Chmod(private, 0o604)
	if _, err := LoadKey(private); tunnel.CodeOf(err) != tunnel.ConfigInvalid {
		t.Errorf("a key that everybody reads: %v", err)
	}
}

func TestAdmissionAsksForWhatTheTokenNames(t *testing.T) {
	key, pub := newKey(t)
	_, side := newKey(t)
	_, other := newKey(t)
	c := good()
	c.Region, c.Operator, c.Key = "eu", "op", Thumbprint(side)
	token := issue(t, key, c)
	a, err := NewAdmission(Config{Keys: NewKeys(pub), Now: func() time.Time { return epoch }})
	if err != nil {
		t.Fatal(err)
	}
	right := tunnel.Open{App: "app", Token: token, Region: "eu", Operator: "op", Key: side}
	for name, change := range map[string]func(*tunnel.Open){
		"App ID": func(o *tunnel.Open) { o.App = "x" }, "region": func(o *tunnel.Open) { o.Region = "" },
		"operator": func(o *tunnel.Open) { o.Operator = "x" }, "key": func(o *tunnel.Open) { o.Key = other }, "no key": func(o *tunnel.Open) { o.Key = nil },
	} {
		o := right
		change(&o)
		if _, err := a.Admit(context.Background(), o); tunnel.CodeOf(err) != tunnel.TokenRejected {
			t.Errorf("another %s: %v", name, err)
		}
	}
	if p, err := a.Admit(context.Background(), right); err != nil {
		t.Error(err)
	} else {
		p.Release()
	}
	strict, _ := NewAdmission(Config{Keys: NewKeys(pub), Apps: map[string]Limit{"b": {}}, Now: func() time.Time { return epoch }})
	if _, err := strict.Admit(context.Background(), right); tunnel.CodeOf(err) != tunnel.TokenRejected {
		t.Errorf("an App ID that is not served: %v", err)
	}
}

func TestAThousandClaimsOnTenPlacesGetTen(t *testing.T) {
	key, pub := newKey(t)
	token := issue(t, key, good())
	a, _ := NewAdmission(Config{Keys: NewKeys(pub), Now: func() time.Time { return epoch }})
	var got, refused atomic.Int32
	var wg sync.WaitGroup
	for range 1000 {
		side, _, _ := ed25519.GenerateKey(rand.Reader)
		wg.Go(func() {
			switch _, err := a.Admit(context.Background(), tunnel.Open{App: "app", Token: token, Key: side}); tunnel.CodeOf(err) {
			case "":
				got.Add(1)
			case tunnel.QuotaExceeded:
				refused.Add(1)
			}
		})
	}
	wg.Wait()
	if got.Load() != 10 || refused.Load() != 990 || a.Sessions()["app"] != 10 {
		t.Fatalf("%d admitted, %d refused, %v", got.Load(), refused.Load(), a.Sessions())
	}
}

func TestSessionsOfOneKeyShareAPlaceUntilTheLastHasEnded(t *testing.T) {
	key, pub := newKey(t)
	_, side := newKey(t)
	_, other := newKey(t)
	c := good()
	c.Concurrency = 1
	open := tunnel.Open{App: "app", Token: issue(t, key, c), Key: side}
	stranger := open
	stranger.Key = other
	for name, order := range map[string][2]int{"the first ends first": {0, 1}, "the second ends first": {1, 0}} {
		t.Run(name, func(t *testing.T) {
			a, _ := NewAdmission(Config{Keys: NewKeys(pub), Now: func() time.Time { return epoch }})
			var release [2]func()
			for i := range release {
				p, err := a.Admit(context.Background(), open)
				if err != nil {
					t.Fatal(err)
				}
				release[i] = p.Release
			}
			release[order[0]]()
			release[order[0]]()
			if a.Sessions()["app"] != 1 {
				t.Fatal("the end of one session took the other one's place away")
			}
			if _, err := a.Admit(context.Background(), stranger); tunnel.CodeOf(err) != tunnel.QuotaExceeded {
				t.Fatalf("another key beside it: %v", err)
			}
			release[order[1]]()
			release[order[1]]()
			if len(a.Sessions()) != 0 {
				t.Fatal("the place was not given back")
			}
			if _, err := a.Admit(context.Background(), stranger); err != nil {
				t.Fatalf("another key after it: %v", err)
			}
		})
	}
}

func FuzzVerify(f *testing.F) {
	key := ed25519.NewKeyFromSeed(make([]byte, ed25519.SeedSize))
	keys := NewKeys(key.Public().(ed25519.PublicKey))
	c := good()
	c.ID = "seed"
	real := issue(f, key, c)
	f.Add(real)
	f.Add("eyJhbGciOiJub25lIn0.e30.")
	f.Add("..")
	f.Fuzz(func(t *testing.T, token string) {
		Unverified(token)
		got, err := keys.Verify(token, epoch)
		if code := tunnel.CodeOf(err); err != nil && code != tunnel.TokenRejected && code != tunnel.TokenExpired {
			t.Fatalf("code %q: %v", code, err)
		}
		if err == nil && got != c { // only the one token was ever signed
			t.Fatalf("forged: %+v", got)
		}
	})
}
