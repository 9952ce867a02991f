package httpproxy

import (
	"slices"
	"strings"
)

const (
	// maxChallenges bounds what is read of the challenges in one answer.
	maxChallenges = 16
	maxSchemeName = 32 // bytes
)

// A challenge is one of the ways in which a proxy wants to know who we are
// (RFC 9110 §11.3).
type challenge struct {
	scheme string // as the proxy writes it
	rest   string // a token68, or parameters as they stand
}

func (c challenge) is(scheme string) bool { return strings.EqualFold(c.scheme, scheme) }

// challenges reads Proxy-Authenticate fields. Several challenges may share a
// field, where commas part them as well as their parameters: what begins
// another is a word followed by a space or nothing, not by "=".
func challenges(fields []string) []challenge {
	var all []challenge
	for _, field := range fields {
		begun := false // a challenge, in this field
		for part := range parts(field) {
			word, rest, _ := strings.Cut(part, " ")
			rest = strings.TrimSpace(rest)
			switch {
			case word == "":
			case isToken(word) && !strings.HasPrefix(rest, "="):
				if len(all) == maxChallenges {
					return all
				}
				begun = true
				all = append(all, challenge{word, rest})
			case begun:
				last := &all[len(all)-1]
				if last.rest != "" {
					last.rest += ", "
				}
				last.rest += part
			}
		}
	}
	return all
}

// parts splits at the commas that are not inside a quoted string.
func parts(field string) func(yield func(string) bool) {
	return func(yield func(string) bool) {
		quoted, escaped, from := false, false, 0
		for i := 0; i < len(field); i++ {
			switch c := field[i]; {
			case escaped:
				escaped = false
			case quoted && c == '\\':
				escaped = true
			case c == '"':
				quoted = !quoted
			case c == ',' && !quoted:
				if !yield(strings.TrimSpace(field[from:i])) {
					return
				}
				from = i + 1
			}
		}
		yield(strings.TrimSpace(field[from:]))
	}
}

// isToken: RFC 9110 §5.6.2, in bounds, since these names get into sentences.
func isToken(s string) bool {
	if s == "" || len(s) > maxSchemeName {
		return false
	}
	for _, c := range []byte(s) {
		letter := 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || '0' <= c && c <= '9'
		if !letter && !strings.ContainsRune("!#$%&'*+-.^_`|~", rune(c)) {
			return false
		}
	}
	return true
}

// schemes names what a proxy offers, each once, as it stands there.
func schemes(all []challenge) []string {
	var names []string
	for _, c := range all {
		if !slices.ContainsFunc(names, c.is) {
			names = append(names, c.scheme)
		}
	}
	return names
}
