package identity

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"culvert/tunnel"
)

func TestARevokedTokenIsRefusedAndItsPlaceIsHeldNoLonger(t *testing.T) {
	key, pub := newKey(t)
	_, side := newKey(t)
	_, other := newKey(t)
	c := good()
	c.ID = "token-1"
	open := tunnel.Open{App: "app", Token: issue(t, key, c), Key: side}
	for name, v := range map[string]struct {
		list string
		hit  bool
	}{
		"nothing":                {"# only a comment\n\n", false},
		"the token":              {"id token-1\n", true},
		"another token":          {"id token-2", false},
		"the sidecar":            {"key " + Thumbprint(side) + " # stolen", true},
		"another sidecar":        {"key " + Thumbprint(other), false},
		"the App ID until now":   {"app app " + epoch.Format(time.RFC3339), true},
		"the App ID until then":  {"app app " + epoch.Add(-time.Second).Format(time.RFC3339), false},
		"the later of two times": {"app app " + epoch.Format(time.RFC3339) + "\napp app " + epoch.Add(-time.Hour).Format(time.RFC3339), true},
		"another App ID":         {"app app2 " + epoch.Format(time.RFC3339), false},
	} {
		t.Run(name, func(t *testing.T) {
			list, err := ParseRevoked([]byte(v.list))
			if err != nil {
				t.Fatal(err)
			}
			conf := Config{Keys: NewKeys(pub), Now: func() time.Time { return epoch }}
			a, _ := NewAdmission(conf)
			p, err := a.Admit(context.Background(), open)
			if err != nil {
				t.Fatal(err)
			}
			conf.Revoked = list
			if err := a.Change(conf); err != nil {
				t.Fatal(err)
			}
			_, again := a.Admit(context.Background(), open)
			for what, err := range map[string]error{"the live session": p.Check(), "a new one": again} {
				if got := tunnel.CodeOf(err) == tunnel.TokenRejected; got != v.hit {
					t.Errorf("%s: %v", what, err)
				}
			}
		})
	}
}

func TestAListThatIsNotUnderstoodIsRefusedWithItsLine(t *testing.T) {
	for list, want := range map[string]string{
		"id a\nid": "line 2", "revoke x": "line 1", "id a b": "line 1", "key short": "line 1", "app a": "line 1", "app a yesterday": "line 1", "\n\nID a": "line 3",
	} {
		if _, err := ParseRevoked([]byte(list)); tunnel.CodeOf(err) != tunnel.ConfigInvalid || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v", list, err)
		}
	}
}

func TestWhatIsAppendedToAListIsReadBack(t *testing.T) {
	file := filepath.Join(t.TempDir(), "revoked")
	if err := NewRevoked(file); err != nil {
		t.Fatal(err)
	}
	_, side := newKey(t)
	if err := AppendRevoked(file, Revocation{ID: "one"}); err != nil {
		t.Fatal(err)
	}
	f, _ := os.OpenFile(file, os.O_APPEND|os.O_WRONLY, 0)
	f.WriteString("id two") // as an editor may leave it
	f.Close()
	for _, v := range []Revocation{{Key: Thumbprint(side)}, {App: "app", At: epoch}} {
		if err := AppendRevoked(file, v); err != nil {
			t.Fatal(err)
		}
	}
	for _, v := range []Revocation{{}, {ID: "a b"}, {ID: "a\nid b"}, {ID: "a#b"}, {Key: "x"}, {App: "a b", At: epoch}} {
		if err := AppendRevoked(file, v); tunnel.CodeOf(err) != tunnel.ConfigInvalid {
			t.Errorf("%+v: %v", v, err)
		}
	}
	list, err := LoadRevoked(file)
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]Claims{"one": {ID: "one"}, "two": {ID: "two"}, "key": {Key: Thumbprint(side)}, "app": {App: "app", Issued: epoch}} {
		if !list.Revokes(c, "") {
			t.Errorf("%s is not revoked", name)
		}
	}
	if list.Revokes(Claims{ID: "three", App: "app", Issued: epoch.Add(time.Second)}, "x") {
		t.Error("a token that was not named is revoked")
	}
}

func TestAPlaceIsHeldWithTheTokenThatCameLast(t *testing.T) {
	key, pub := newKey(t)
	_, side := newKey(t)
	now := epoch
	a, _ := NewAdmission(Config{Keys: NewKeys(pub), Now: func() time.Time { return now }})
	first := good()
	p, err := a.Admit(context.Background(), tunnel.Open{App: "app", Token: issue(t, key, first), Key: side})
	if err != nil {
		t.Fatal(err)
	}
	now = epoch.Add(time.Hour + Skew)
	if err := p.Check(); err != nil {
		t.Errorf("within the skew: %v", err)
	}
	foreign := good()
	foreign.App, foreign.Expires = "other", now.Add(time.Hour)
	if _, err := p.Renew(issue(t, key, foreign)); tunnel.CodeOf(err) != tunnel.TokenRejected {
		t.Errorf("a token of another App ID: %v", err)
	}
	second := good()
	second.Issued, second.Expires = now, now.Add(time.Hour)
	if c, err := p.Renew(issue(t, key, second)); err != nil || !c.Expires.Equal(second.Expires) {
		t.Fatalf("%+v, %v", c, err)
	}
	now = now.Add(time.Hour)
	if err := p.Check(); err != nil {
		t.Errorf("with the second token: %v", err)
	}
	now = now.Add(Skew + time.Second)
	if err := p.Check(); tunnel.CodeOf(err) != tunnel.TokenExpired {
		t.Errorf("after its end: %v", err)
	}
	if a.Sessions()["app"] != 1 {
		t.Error("a renewal took another place")
	}
}

func TestAKeyIsReplacedWithTwoThatAreValidMeanwhile(t *testing.T) {
	oldKey, oldPub := newKey(t)
	newKeyPriv, newPub := newKey(t)
	_, side := newKey(t)
	at := func() time.Time { return epoch }
	a, _ := NewAdmission(Config{Keys: NewKeys(oldPub), Now: at})
	old, err := a.Admit(context.Background(), tunnel.Open{App: "app", Token: issue(t, oldKey, good()), Key: side})
	if err != nil {
		t.Fatal(err)
	}
	fresh := tunnel.Open{App: "app", Token: issue(t, newKeyPriv, good()), Key: side}
	if _, err := a.Admit(context.Background(), fresh); tunnel.CodeOf(err) != tunnel.TokenRejected {
		t.Errorf("the new key before it is known: %v", err)
	}
	a.Change(Config{Keys: NewKeys(oldPub, newPub), Now: at})
	p, err := a.Admit(context.Background(), fresh)
	if err != nil || old.Check() != nil || p.Check() != nil {
		t.Fatalf("with both keys: %v, %v", err, old.Check())
	}
	a.Change(Config{Keys: NewKeys(newPub), Now: at})
	if tunnel.CodeOf(old.Check()) != tunnel.TokenRejected || p.Check() != nil {
		t.Errorf("without the old key: %v, %v", old.Check(), p.Check())
	}
	if err := a.Change(Config{}); tunnel.CodeOf(err) != tunnel.ConfigInvalid || p.Check() != nil {
		t.Errorf("a configuration without keys: %v, then %v", err, p.Check())
	}
}

func TestTheListOfTokensHoldsWhatTheySayAndNoToken(t *testing.T) {
	file := filepath.Join(t.TempDir(), "issued")
	if all, bad, err := LoadIssued(file); len(all) != 0 || bad != 0 || err != nil {
		t.Fatal(all, bad, err)
	}
	c := good()
	c.ID = "x"
	for range 2 {
		if err := AppendIssued(file, c); err != nil {
			t.Fatal(err)
		}
	}
	f, _ := os.OpenFile(file, os.O_APPEND|os.O_WRONLY, 0)
	f.WriteString("{rubbish\n\n")
	f.Close()
	all, bad, err := LoadIssued(file)
	if err != nil || bad != 1 || len(all) != 2 || all[1] != c {
		t.Fatal(all, bad, err)
	}
	if st, _ := os.Stat(file); st.Mode().Perm() != 0o600 {
		t.Error(st.Mode())
	}
}

func FuzzRevoked(f *testing.F) {
	f.Add([]byte("id a\nkey x\napp a 2026-11-01T00:00:00Z # c"))
	f.Add([]byte(revokedHead))
	f.Fuzz(func(t *testing.T, b []byte) {
		r, err := ParseRevoked(b)
		if (r == nil) == (err == nil) || err != nil && tunnel.CodeOf(err) != tunnel.ConfigInvalid {
			t.Fatal(r, err)
		}
		if err != nil && len(err.Error()) > 1024 {
			t.Fatalf("%d bytes", len(err.Error()))
		}
	})
}
