package identity

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"culvert/tunnel"
)

const (
	// maxRevokedFile bounds what is read, in bytes: some 100,000 lines.
	maxRevokedFile = 8 << 20
	revokedHead    = "# Tokens that are not accepted any more, one a line; 'culvert-cloudproxy token revoke' adds them:\n" +
		"#   id ID                 one token\n" +
		"#   key THUMBPRINT        every token that this sidecar's key shows\n" +
		"#   app ID TIME           every token of an App ID issued until then\n"
)

// A Revocation is one line of a list: exactly one of ID, Key and App is set.
type Revocation struct {
	ID  string    // a token's
	Key string    // a sidecar's Thumbprint
	App string    // with Until
	At  time.Time // tokens of App issued until then, in whole seconds
}

// Revoked is a list of what is not accepted though it is signed and has not
// expired. It never changes. A nil list is empty.
type Revoked struct {
	ids, keys map[string]bool
	apps      map[string]time.Time
}

// ParseRevoked reads a list, strictly. Its errors give the line.
func ParseRevoked(data []byte) (*Revoked, error) {
	r := &Revoked{ids: map[string]bool{}, keys: map[string]bool{}, apps: map[string]time.Time{}}
	lines := bufio.NewScanner(bytes.NewReader(data))
	for n := 1; lines.Scan(); n++ {
		text, _, _ := strings.Cut(lines.Text(), "#")
		words := strings.Fields(text)
		if len(words) == 0 {
			continue
		}
		if err := r.add(words); err != nil {
			return nil, tunnel.Errorf(tunnel.ConfigInvalid, "line %d of the revocation list %w", n, err)
		}
	}
	if err := lines.Err(); err != nil {
		return nil, tunnel.Errorf(tunnel.ConfigInvalid, "the revocation list has a line that is too long to be one: %w", err)
	}
	return r, nil
}

func (r *Revoked) add(words []string) error {
	switch {
	case words[0] == "id" && len(words) == 2:
		r.ids[words[1]] = true
	case words[0] == "key" && len(words) == 2:
		if err := ParseThumbprint(words[1]); err != nil {
			return fmt.Errorf("is wrong: %s", tunnel.Sentence(err))
		}
		r.keys[words[1]] = true
	case words[0] == "app" && len(words) == 3:
		at, err := time.Parse(time.RFC3339, words[2])
		if err != nil {
			return fmt.Errorf("has no time such as 2026-11-01T00:00:00Z after the App ID")
		}
		if at.After(r.apps[words[1]]) {
			r.apps[words[1]] = at
		}
	default:
		return fmt.Errorf("is none of 'id ID', 'key THUMBPRINT' and 'app ID TIME'")
	}
	return nil
}

// LoadRevoked reads a list from a file.
func LoadRevoked(file string) (*Revoked, error) {
	f, err := open(file)
	if err != nil {
		return nil, tunnel.Errorf(tunnel.ConfigInvalid, "the revocation list can not be read: %w", err)
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxRevokedFile+1))
	switch {
	case err != nil:
		return nil, tunnel.Errorf(tunnel.ConfigInvalid, "the revocation list can not be read: %w", err)
	case len(b) > maxRevokedFile: // and what is beyond would be accepted again
		return nil, tunnel.Errorf(tunnel.ConfigInvalid, "the revocation list %s is larger than %d MiB; revoke whole App IDs, or sign with another key", file, maxRevokedFile>>20)
	}
	r, err := ParseRevoked(b)
	if err != nil {
		return nil, tunnel.Errorf(tunnel.ConfigInvalid, "%s: %w", file, err)
	}
	return r, nil
}

// Revokes reports whether a token is in the list, shown by a sidecar's key.
func (r *Revoked) Revokes(c Claims, thumbprint string) bool {
	if r == nil {
		return false
	}
	at, app := r.apps[c.App]
	return r.ids[c.ID] || r.keys[thumbprint] || c.Key != "" && r.keys[c.Key] || app && !c.Issued.After(at)
}

// AppendRevoked adds a line to a list, and makes the list where it is missing.
// The file stays a valid list at each moment.
func AppendRevoked(file string, v Revocation) error {
	line := "id " + v.ID
	switch {
	case v.Key != "":
		line = "key " + v.Key
	case v.App != "":
		line = "app " + v.App + " " + v.At.UTC().Format(time.RFC3339)
	}
	if _, err := ParseRevoked([]byte(line)); err != nil || strings.ContainsAny(line, "#\r\n") {
		return tunnel.Errorf(tunnel.ConfigInvalid, "%.80q can not be revoked; name a token's ID, a thumbprint or an App ID", line)
	}
	return appendLine(file, revokedHead, line, 0o644)
}

// appendLine adds a line with one write, so that a reader sees all or nothing
// of it. A new file begins with head.
func appendLine(file, head, line string, mode os.FileMode) error {
	f, err := os.OpenFile(file, os.O_RDWR|os.O_CREATE|os.O_APPEND, mode)
	if err != nil {
		return tunnel.Errorf(tunnel.ConfigInvalid, "the list can not be written: %w", err)
	}
	text := line + "\n"
	st, err := f.Stat()
	if err == nil && st.Size() == 0 {
		text = head + text
	} else if err == nil {
		var last [1]byte // an editor may have left the last line without its end
		if _, e := f.ReadAt(last[:], st.Size()-1); e == nil && last[0] != '\n' {
			text = "\n" + text
		}
	}
	if err == nil {
		var n int
		if n, err = f.WriteString(text); err != nil && n > 0 { // a full disk takes a part of it
			if st, e := f.Stat(); e == nil { // anew: another process may have added its line
				f.Truncate(st.Size() - int64(n))
			}
		}
	}
	if e := f.Sync(); err == nil {
		err = e
	}
	if e := f.Close(); err == nil {
		err = e
	}
	if err != nil {
		return tunnel.Errorf(tunnel.ConfigInvalid, "the list can not be written: %w", err)
	}
	return nil
}

// NewRevoked makes an empty list in a new file.
func NewRevoked(file string) error {
	return writeNew(file, []byte(revokedHead), 0o644)
}
