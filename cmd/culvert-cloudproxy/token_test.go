package main

import (
	"bytes"
	"crypto/ed25519"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/urfave/cli/v2"

	"culvert/cloudproxy/identity"
	"culvert/tunnel"
)

// runToken runs the command as the program does.
func runToken(in string, args ...string) (string, error) {
	var out bytes.Buffer
	app := &cli.App{Name: "culvert-cloudproxy", Commands: []*cli.Command{tokenCommand()}, Reader: strings.NewReader(in), Writer: &out, ErrWriter: &out,
		ExitErrHandler: func(*cli.Context, error) {}}
	err := app.Run(append([]string{"culvert-cloudproxy", "token"}, args...))
	return out.String(), err
}

// tokenDir is what init makes, as far as tokens are concerned.
func tokenDir(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	key, err := identity.GenerateKey()
	if err != nil {
		t.Fatal(err)
	}
	if err := identity.SaveKey(filepath.Join(dir, "token.key"), key); err != nil {
		t.Fatal(err)
	}
	if err := identity.SavePublicKey(filepath.Join(dir, "token.pub"), key.Public().(ed25519.PublicKey)); err != nil {
		t.Fatal(err)
	}
	return dir
}

func inspect(t *testing.T, token string, args ...string) (tokenReport, error) {
	t.Helper()
	out, err := runToken(token, append([]string{"inspect", "--json"}, args...)...)
	var r tokenReport
	if e := json.Unmarshal([]byte(out), &r); e != nil {
		t.Fatalf("%v in %q (%v)", e, out, err)
	}
	return r, err
}

func TestANewTokenIsInspected(t *testing.T) {
	dir, other := tokenDir(t), tokenDir(t)
	token, err := runToken("", "new", "--dir", dir, "--app", "a1", "--region", "eu", "--operator", "op", "--concurrency", "3", "--for", "2h")
	if err != nil || strings.Count(token, "\n") != 1 {
		t.Fatalf("%q, %v", token, err)
	}
	for _, c := range []struct {
		name      string
		args      []string
		signature string
		code      tunnel.Code
	}{
		{"no key", nil, "not checked", ""},
		{"the directory", []string{"--dir", dir}, "good", ""},
		{"the private key", []string{"--key", filepath.Join(dir, "token.key")}, "good", ""},
		{"another key", []string{"--dir", other}, "bad", tunnel.TokenRejected},
	} {
		r, err := inspect(t, token, c.args...)
		if r.Signature != c.signature || tunnel.CodeOf(err) != c.code || r.Valid != (c.code == "") || r.Code != c.code {
			t.Errorf("%s: %+v, %v", c.name, r, err)
		}
		if cl := r.Claims; cl.App != "a1" || cl.Region != "eu" || cl.Operator != "op" || cl.Concurrency != 3 || cl.Expires.Sub(cl.Issued).Hours() != 2 {
			t.Errorf("%s: %+v", c.name, cl)
		}
	}
	text, err := runToken(token, "inspect", "--dir", dir, "-")
	if err != nil || !strings.Contains(text, "a1") || !strings.Contains(text, "good") {
		t.Errorf("%q, %v", text, err)
	}
}

func TestATokenIsWrittenForItsOwnerOnly(t *testing.T) {
	dir := tokenDir(t)
	file := filepath.Join(dir, "token")
	args := []string{"new", "--dir", dir, "--app", "a", "--out", file}
	if out, err := runToken("", args...); err != nil || out != "" {
		t.Fatalf("%q, %v", out, err)
	}
	st, err := os.Stat(file)
	if err != nil || st.Mode().Perm() != 0o600 {
		t.Fatal(st, err)
	}
	if _, err := runToken("", "inspect", "--dir", dir, file); err != nil {
		t.Error(err)
	}
	if _, err := runToken("", args...); tunnel.CodeOf(err) != tunnel.ConfigInvalid {
		t.Errorf("a file was replaced: %v", err)
	}
}

func TestWrongUseOfTokenIsRefused(t *testing.T) {
	dir := tokenDir(t)
	token, _ := runToken("", "new", "--dir", dir, "--app", "a")
	for name, c := range map[string]struct {
		in   string
		args []string
		code tunnel.Code
	}{
		"no app":             {"", []string{"new", "--dir", dir}, tunnel.ConfigInvalid},
		"no key":             {"", []string{"new", "--app", "a"}, tunnel.ConfigInvalid},
		"key and dir":        {"", []string{"new", "--app", "a", "--dir", dir, "--key", "x"}, tunnel.ConfigInvalid},
		"no such key":        {"", []string{"new", "--app", "a", "--key", filepath.Join(dir, "none")}, tunnel.ConfigInvalid},
		"public key":         {"", []string{"new", "--app", "a", "--key", filepath.Join(dir, "token.pub")}, tunnel.ConfigInvalid},
		"no concurrency":     {"", []string{"new", "--app", "a", "--dir", dir, "--concurrency", "0"}, tunnel.ConfigInvalid},
		"no time":            {"", []string{"new", "--app", "a", "--dir", dir, "--for", "-1h"}, tunnel.ConfigInvalid},
		"bad thumbprint":     {"", []string{"new", "--app", "a", "--dir", dir, "--cnf", "x"}, tunnel.ConfigInvalid},
		"arguments":          {"", []string{"new", "--app", "a", "--dir", dir, "x"}, tunnel.ConfigInvalid},
		"token as argument":  {"", []string{"inspect", strings.TrimSpace(token)}, tunnel.ConfigInvalid},
		"no such token file": {"", []string{"inspect", filepath.Join(dir, "none")}, tunnel.ConfigInvalid},
		"garbage":            {"garbage", []string{"inspect"}, tunnel.TokenRejected},
		"nothing":            {"", []string{"inspect"}, tunnel.TokenRejected},
		"too much":           {strings.Repeat("x", 1<<20), []string{"inspect", "-"}, tunnel.TokenRejected},
	} {
		_, err := runToken(c.in, c.args...)
		if tunnel.CodeOf(err) != c.code {
			t.Errorf("%s: %v, want %s", name, err, c.code)
		}
		if err != nil && strings.Contains(err.Error(), strings.TrimSpace(token)) {
			t.Errorf("%s: the error quotes the token", name)
		}
	}
}

func TestAnExpiredTokenSaysSo(t *testing.T) {
	dir := tokenDir(t)
	key, err := identity.LoadKey(filepath.Join(dir, "token.key"))
	if err != nil {
		t.Fatal(err)
	}
	past := identity.Claims{App: "a", Concurrency: 1}
	past.Expires = past.Expires.AddDate(2019, 0, 0)
	token, err := identity.Issue(key, past)
	if err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{nil, {"--dir", dir}} {
		r, err := inspect(t, token, args...)
		if tunnel.CodeOf(err) != tunnel.TokenExpired || r.Valid || r.Claims.App != "a" {
			t.Errorf("%v: %+v, %v", args, r, err)
		}
	}
}

func TestATokenWithinTheClockSkewSaysSo(t *testing.T) {
	dir := tokenDir(t)
	key, err := identity.LoadKey(filepath.Join(dir, "token.key"))
	if err != nil {
		t.Fatal(err)
	}
	now := time.Now()
	token, err := identity.Issue(key, identity.Claims{App: "a", Concurrency: 1, Issued: now.Add(-time.Hour), Expires: now.Add(-time.Minute)})
	if err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{{"inspect"}, {"inspect", "--dir", dir}} {
		text, err := runToken(token, args...)
		if err != nil || !strings.Contains(text, "expired 1m") || !strings.Contains(text, "s (clock skew)") || !strings.Contains(text, "ago, still accepted for 3m") && !strings.Contains(text, "ago, still accepted for 4m") {
			t.Errorf("%v: %v\n%s", args, err, text)
		}
	}
}

func TestTokensAreListedAndRevoked(t *testing.T) {
	dir := tokenDir(t)
	_, side, err := ed25519.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	thumb := identity.Thumbprint(side.Public().(ed25519.PublicKey))
	var tokens []string
	for _, args := range [][]string{{"--app", "a"}, {"--app", "a"}, {"--app", "b"}, {"--app", "c", "--cnf", thumb}, {"--app", "d"}} {
		token, err := runToken("", append([]string{"new", "--dir", dir}, args...)...)
		if err != nil {
			t.Fatal(err)
		}
		tokens = append(tokens, token)
	}
	list := func() []tokenLine {
		t.Helper()
		out, err := runToken("", "list", "--dir", dir, "--json")
		var l struct{ Tokens []tokenLine }
		if err != nil || json.Unmarshal([]byte(out), &l) != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		for _, token := range tokens {
			if strings.Contains(out, strings.TrimSpace(token)) {
				t.Error("the list holds a token")
			}
		}
		return l.Tokens
	}
	all := list()
	if len(all) != 5 || all[0].ID == all[1].ID || all[3].Key != thumb {
		t.Fatalf("%+v", all)
	}
	for _, args := range [][]string{{"--id", all[0].ID}, {"--app", "b"}, {"--cnf", thumb}, {"-"}} {
		if out, err := runToken(tokens[4], append([]string{"revoke", "--dir", dir}, args...)...); err != nil || !strings.Contains(out, "token.revoked") {
			t.Errorf("%v: %v %s", args, err, out)
		}
	}
	want := []string{"revoked", "valid", "revoked", "revoked", "revoked"}
	for i, l := range list() {
		if l.State != want[i] {
			t.Errorf("token %d is %s, want %s", i, l.State, want[i])
		}
		r, err := inspect(t, tokens[i], "--dir", dir)
		if r.Valid != (want[i] == "valid") || r.Valid != (err == nil) || !r.Valid && r.Code != tunnel.TokenRejected {
			t.Errorf("inspect of token %d: %+v, %v", i, r, err)
		}
	}
	if text, err := runToken("", "list", "--dir", dir); err != nil || strings.Count(text, "\n") != 6 || !strings.Contains(text, thumb) {
		t.Errorf("%v\n%s", err, text)
	}
}

// Times of tokens are whole seconds: what is signed in the second of a revocation
// must not fall under it.
func TestATokenThatIsMadeAfterARevocationIsGood(t *testing.T) {
	dir := tokenDir(t)
	for range 2 {
		old, err := runToken("", "new", "--dir", dir, "--app", "a")
		if err != nil {
			t.Fatal(err)
		}
		if _, err := runToken("", "revoke", "--dir", dir, "--app", "a"); err != nil {
			t.Fatal(err)
		}
		token, err := runToken("", "new", "--dir", dir, "--app", "a")
		if err != nil {
			t.Fatal(err)
		}
		if r, err := inspect(t, token, "--dir", dir); err != nil || !r.Valid {
			t.Errorf("%+v, %v", r, err)
		}
		if r, err := inspect(t, old, "--dir", dir); err == nil || r.Valid {
			t.Errorf("the one before: %+v", r)
		}
	}
	thumb := identity.Thumbprint(make(ed25519.PublicKey, ed25519.PublicKeySize))
	if _, err := runToken("", "revoke", "--dir", dir, "--cnf", thumb); err != nil {
		t.Fatal(err)
	}
	if text, err := runToken("", "new", "--dir", dir, "--app", "b", "--cnf", thumb); err != nil || !strings.Contains(text, "no good") {
		t.Errorf("for a key that has been revoked: %q, %v", text, err)
	}
}

func TestWrongUseOfRevokeAndListIsRefused(t *testing.T) {
	dir := tokenDir(t)
	token, _ := runToken("", "new", "--dir", dir, "--app", "a")
	for name, args := range map[string][]string{
		"revoke without a list":      {"revoke", "--id", "x"},
		"revoke with two lists":      {"revoke", "--dir", dir, "--list", "x", "--id", "x"},
		"revoke of nothing":          {"revoke", "--dir", dir},
		"revoke of two things":       {"revoke", "--dir", dir, "--id", "x", "--app", "a"},
		"revoke of a bad thumbprint": {"revoke", "--dir", dir, "--cnf", "x"},
		"revoke of two words":        {"revoke", "--dir", dir, "--id", "x y"},
		"token as argument":          {"revoke", "--dir", dir, strings.TrimSpace(token)},
		"list without a folder":      {"list"},
		"list with an argument":      {"list", "--dir", dir, "x"},
	} {
		_, err := runToken("", args...)
		if tunnel.CodeOf(err) != tunnel.ConfigInvalid || strings.Contains(err.Error(), strings.TrimSpace(token)) {
			t.Errorf("%s: %v", name, err)
		}
	}
}
