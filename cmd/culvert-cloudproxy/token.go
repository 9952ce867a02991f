package main

import (
	"crypto/ed25519"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/urfave/cli/v2"

	"culvert/cloudproxy/identity"
	"culvert/tunnel"
)

// tokenCommand makes, shows, lists and revokes tokens. It needs no running cloud
// proxy: one that runs notices by itself that the revocation list has changed.
func tokenCommand() *cli.Command {
	return &cli.Command{
		Name:  "token",
		Usage: "make a token for a sidecar, show what one says, revoke it, or list those that were made",
		Subcommands: []*cli.Command{
			{
				Name:  "new",
				Usage: "sign a token and print it",
				Flags: []cli.Flag{
					&cli.StringFlag{Name: "key", Usage: "sign with the private key in `FILE`"},
					&cli.StringFlag{Name: "dir", Usage: "sign with `DIR`/token.key, which 'culvert-cloudproxy init' made"},
					&cli.StringFlag{Name: "app", Usage: "App `ID` (must be given)"},
					&cli.StringFlag{Name: "region", Usage: "only for `REGION`"},
					&cli.StringFlag{Name: "operator", Usage: "only for network `OPERATOR`"},
					&cli.IntFlag{Name: "concurrency", Value: 10, Usage: "`N` simultaneous sessions of the App ID"},
					&cli.DurationFlag{Name: "for", Value: 720 * time.Hour, Usage: "valid for `DURATION`"},
					&cli.StringFlag{Name: "cnf", Usage: "only for the sidecar whose key has this `THUMBPRINT`"},
					&cli.StringFlag{Name: "out", Usage: "write to `FILE` (mode 0600, never replaced) instead of standard output"},
				},
				Action: tokenNew,
			},
			{
				Name:      "inspect",
				Usage:     "print what a token says and whether it is valid (exit 0 valid or not checked, 1 not valid)",
				ArgsUsage: "[FILE|-]",
				Flags: []cli.Flag{
					&cli.StringFlag{Name: "key", Usage: "check the signature with the public or private key in `FILE`"},
					&cli.StringFlag{Name: "dir", Usage: "check the signature with `DIR`/token.pub"},
					&cli.BoolFlag{Name: "json", Usage: "print one JSON object"},
				},
				Action: tokenInspect,
			},
			{
				Name:      "revoke",
				Usage:     "have a token accepted no longer: live sessions that it opened end within 5 s",
				ArgsUsage: "[FILE|-]",
				Flags: []cli.Flag{
					&cli.StringFlag{Name: "dir", Usage: "the list is `DIR`/" + revokedName},
					&cli.StringFlag{Name: "list", Usage: "the list is `FILE` (tokens.revoked_file of cloudproxy.yaml)"},
					&cli.StringFlag{Name: "id", Usage: "the token with this `ID`, as inspect and list show it"},
					&cli.StringFlag{Name: "app", Usage: "all tokens of the App `ID` that were made until now"},
					&cli.StringFlag{Name: "cnf", Usage: "all tokens that the sidecar with this key's `THUMBPRINT` shows"},
				},
				Action: tokenRevoke,
			},
			{
				Name:  "list",
				Usage: "list the tokens that were made with a key, and which are valid",
				Flags: []cli.Flag{
					&cli.StringFlag{Name: "dir", Usage: "`DIR` holds token.key, with the lists beside it (must be given)"},
					&cli.BoolFlag{Name: "json", Usage: "print one JSON object"},
				},
				Action: tokenList,
			},
		},
	}
}

// tokenKeyFile returns the file that --key or --dir names; "" for neither.
func tokenKeyFile(c *cli.Context, name string) (string, error) {
	key, dir := c.String("key"), c.String("dir")
	switch {
	case key != "" && dir != "":
		return "", tunnel.Errorf(tunnel.ConfigInvalid, "--key and --dir name the same thing; give one of them")
	case dir != "":
		return filepath.Join(dir, name), nil
	}
	return key, nil
}

func tokenNew(c *cli.Context) error {
	if c.Args().Present() {
		return tunnel.Errorf(tunnel.ConfigInvalid, "token new takes no arguments; see --help")
	}
	file, err := tokenKeyFile(c, "token.key")
	if err != nil {
		return err
	}
	if file == "" {
		return tunnel.Errorf(tunnel.ConfigInvalid, "a token needs a key to sign it; give --key FILE or --dir DIR")
	}
	if strings.TrimSpace(c.String("app")) == "" {
		return tunnel.Errorf(tunnel.ConfigInvalid, "a token is for one App ID; give it with --app ID")
	}
	if c.Duration("for") <= 0 {
		return tunnel.Errorf(tunnel.ConfigInvalid, "--for %s is not a time to be valid for; give one such as 720h", c.Duration("for"))
	}
	key, err := identity.LoadKey(file)
	if err != nil {
		return err
	}
	now := time.Now().Truncate(time.Second) // as tokens tell it
	claims := identity.Claims{
		App: c.String("app"), Region: c.String("region"), Operator: c.String("operator"), Concurrency: c.Int("concurrency"),
		Issued: now, Expires: now.Add(c.Duration("for")), Key: c.String("cnf"), ID: identity.NewID(),
	}
	if list, err := identity.LoadRevoked(filepath.Join(filepath.Dir(file), revokedName)); err == nil && list.Revokes(claims, claims.Key) {
		claims.Issued = now.Add(time.Second)  // all of the App ID were revoked within this second, which is waited for:
		time.Sleep(time.Until(claims.Issued)) // what is dated ahead would escape the next revocation
		if list.Revokes(claims, claims.Key) {
			fmt.Fprintln(c.App.ErrWriter, "culvert-cloudproxy: this token is no good where token.revoked is in force: it is bound to a key that has been revoked")
		}
	}
	token, err := identity.Issue(key, claims)
	if err != nil {
		return err
	}
	if err := identity.AppendIssued(filepath.Join(filepath.Dir(file), issuedName), claims); err != nil { // the token is good all the same
		fmt.Fprintln(c.App.ErrWriter, "culvert-cloudproxy: 'token list' will not show this token:", err)
	}
	out := c.String("out")
	if out == "" {
		_, err = fmt.Fprintln(c.App.Writer, token)
		return err
	}
	f, err := os.OpenFile(out, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return tunnel.Errorf(tunnel.ConfigInvalid, "the token can not be written: %w", err)
	}
	_, err = fmt.Fprintln(f, token)
	if e := f.Close(); err == nil {
		err = e
	}
	if err != nil {
		return tunnel.Errorf(tunnel.ConfigInvalid, "the token can not be written: %w", err)
	}
	return nil
}

// The lists lie beside the key that signs.
const (
	revokedName = "token.revoked"
	issuedName  = "token.issued"
)

func tokenRevoke(c *cli.Context) error {
	list := c.String("list")
	switch dir := c.String("dir"); {
	case (dir == "") == (list == ""):
		return tunnel.Errorf(tunnel.ConfigInvalid, "token revoke needs --dir DIR or --list FILE, one of them")
	case dir != "":
		list = filepath.Join(dir, revokedName)
	}
	v := identity.Revocation{ID: c.String("id"), Key: c.String("cnf"), App: c.String("app"), At: time.Now()}
	given := 0
	for _, word := range []string{v.ID, v.Key, v.App, c.Args().First()} {
		if word != "" {
			given++
		}
	}
	if given != 1 {
		return tunnel.Errorf(tunnel.ConfigInvalid, "token revoke takes one of --id, --app, --cnf and the file that holds the token, with flags before it; see --help")
	}
	if c.Args().Present() {
		token, err := tokenRead(c)
		if err != nil {
			return err
		}
		claims, err := identity.Unverified(token)
		if err != nil {
			return err
		}
		v.ID = claims.ID
	}
	if err := identity.AppendRevoked(list, v); err != nil {
		return err
	}
	_, err := fmt.Fprintf(c.App.Writer, "Revoked in %s; the cloud proxies that have it as tokens.revoked_file follow within 5 s.\n", list)
	return err
}

// tokenLine is one token of the list.
type tokenLine struct {
	identity.Claims
	State string `json:"state"` // "valid", "expired" or "revoked"
}

func tokenList(c *cli.Context) error {
	dir := c.String("dir")
	if dir == "" || c.Args().Present() {
		return tunnel.Errorf(tunnel.ConfigInvalid, "token list takes --dir DIR and no arguments; see --help")
	}
	issued, bad, err := identity.LoadIssued(filepath.Join(dir, issuedName))
	if err != nil {
		return err
	}
	revoked, err := identity.LoadRevoked(filepath.Join(dir, revokedName))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if bad > 0 {
		fmt.Fprintf(c.App.ErrWriter, "culvert-cloudproxy: %d lines of %s are not understood and are left out\n", bad, filepath.Join(dir, issuedName))
	}
	lines := []tokenLine{}
	for _, cl := range issued {
		state := "valid"
		switch {
		case revoked.Revokes(cl, cl.Key):
			state = "revoked"
		case time.Now().After(cl.Expires.Add(identity.Skew)):
			state = "expired"
		}
		lines = append(lines, tokenLine{cl, state})
	}
	if c.Bool("json") {
		e := json.NewEncoder(c.App.Writer)
		e.SetIndent("", "  ")
		return e.Encode(struct {
			Tokens []tokenLine `json:"tokens"`
		}{lines})
	}
	w := tabwriter.NewWriter(c.App.Writer, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "ID\tSTATE\tAPP ID\tCONCURRENCY\tISSUED\tEXPIRES\tREGION\tOPERATOR\tBOUND TO KEY")
	for _, l := range lines {
		fmt.Fprintf(w, "%s\t%s\t%s\t%d\t%s\t%s\t%s\t%s\t%s\n", l.ID, l.State, l.App, l.Concurrency, tokenTime(l.Issued), tokenTime(l.Expires), dash(l.Region), dash(l.Operator), dash(l.Key))
	}
	return w.Flush()
}

func dash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}

// tokenReport is what inspect prints.
type tokenReport struct {
	Claims    identity.Claims `json:"claims"`
	Signature string          `json:"signature"`      // "good", "bad", "not checked"
	Valid     bool            `json:"valid"`          // not expired, and the signature is not bad
	Skew      string          `json:"skew,omitempty"` // how a token that has expired is still valid
	Why       string          `json:"why,omitempty"`
	Code      tunnel.Code     `json:"code,omitempty"`
}

func tokenInspect(c *cli.Context) error {
	token, err := tokenRead(c)
	if err != nil {
		return err
	}
	file, err := tokenKeyFile(c, "token.pub")
	if err != nil {
		return err
	}
	var key ed25519.PublicKey
	if file != "" {
		if key, err = tokenPublicKey(file); err != nil {
			return err
		}
	}
	report, err := tokenJudge(token, key, time.Now())
	if dir := c.String("dir"); err == nil && dir != "" {
		err = report.revokedIn(filepath.Join(dir, revokedName))
	}
	if err != nil && report.Claims.App == "" {
		return err // nothing could be read
	}
	if c.Bool("json") {
		e := json.NewEncoder(c.App.Writer)
		e.SetIndent("", "  ")
		if e := e.Encode(report); e != nil {
			return e
		}
		return err
	}
	w := tabwriter.NewWriter(c.App.Writer, 0, 0, 2, ' ', 0)
	cl := report.Claims
	for _, row := range [][2]string{
		{"App ID", cl.App}, {"region", cl.Region}, {"operator", cl.Operator}, {"concurrency", fmt.Sprint(cl.Concurrency)},
		{"issued", tokenTime(cl.Issued)}, {"expires", tokenTime(cl.Expires)}, {"id", cl.ID}, {"bound to key", cl.Key}, {"signature", report.Signature},
		{"validity", report.Skew},
	} {
		if row[1] != "" {
			fmt.Fprintf(w, "%s\t%s\n", row[0], row[1])
		}
	}
	if e := w.Flush(); e != nil {
		return e
	}
	return err
}

// revokedIn looks the token up in a list, where there is one.
func (r *tokenReport) revokedIn(list string) error {
	revoked, err := identity.LoadRevoked(list)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err == nil && revoked.Revokes(r.Claims, r.Claims.Key):
		err = tunnel.Errorf(tunnel.TokenRejected, "the token has been revoked; get a new one")
	}
	if err != nil {
		r.Valid, r.Why, r.Code = false, tunnel.Sentence(err), tunnel.CodeOf(err)
	}
	return err
}

func tokenTime(t time.Time) string {
	if t.IsZero() {
		return ""
	}
	return t.UTC().Format(time.RFC3339)
}

// tokenRead reads the token from a file or standard input: an argument would
// be seen in the list of processes.
func tokenRead(c *cli.Context) (string, error) {
	var in io.Reader = c.App.Reader
	switch name := c.Args().First(); {
	case c.Args().Len() > 1:
		return "", tunnel.Errorf(tunnel.ConfigInvalid, "token %s takes one file, with flags before it; see --help", c.Command.Name)
	case strings.HasPrefix(name, "eyJ"):
		return "", tunnel.Errorf(tunnel.ConfigInvalid, "a token is a secret and is not taken as an argument; give a file, or - and the token on standard input")
	case name != "" && name != "-":
		f, err := os.Open(name)
		if err != nil {
			return "", tunnel.Errorf(tunnel.ConfigInvalid, "the token can not be read: %w", err)
		}
		defer f.Close()
		in = f
	}
	b, err := io.ReadAll(io.LimitReader(in, identity.MaxToken+64)) // room for white space
	if err != nil {
		return "", tunnel.Errorf(tunnel.ConfigInvalid, "the token can not be read: %w", err)
	}
	return strings.TrimSpace(string(b)), nil
}

// tokenPublicKey takes either half of the pair.
func tokenPublicKey(file string) (ed25519.PublicKey, error) {
	if key, err := identity.LoadKey(file); err == nil {
		return key.Public().(ed25519.PublicKey), nil
	}
	return identity.LoadPublicKey(file)
}

func tokenJudge(token string, key ed25519.PublicKey, now time.Time) (tokenReport, error) {
	r := tokenReport{Signature: "not checked"}
	claims, err := identity.Unverified(token)
	if err != nil {
		return r, err
	}
	r.Claims = claims
	if key != nil {
		_, err = identity.NewKeys(key).Verify(token, now)
		r.Signature = "good"
		if tunnel.CodeOf(err) == tunnel.TokenRejected {
			r.Signature = "bad"
			if claims.Issued.After(now.Add(identity.Skew)) {
				r.Signature = "not checked"
			}
		}
	} else if now.After(claims.Expires.Add(identity.Skew)) {
		err = tunnel.Errorf(tunnel.TokenExpired, "the token expired on %s; get a new one", tokenTime(claims.Expires))
	}
	r.Valid = err == nil
	if past := now.Sub(claims.Expires); r.Valid && past > 0 {
		r.Skew = fmt.Sprintf("expired %s ago, still accepted for %s (clock skew)", past.Round(time.Second), (identity.Skew - past).Round(time.Second))
	}
	if err != nil {
		r.Why, r.Code = tunnel.Sentence(err), tunnel.CodeOf(err)
	}
	return r, err
}
