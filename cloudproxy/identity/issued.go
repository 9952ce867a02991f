package identity

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"io/fs"
	"os"

	"culvert/tunnel"
)

// maxIssuedFile bounds what is read, in bytes: some 200,000 tokens.
const maxIssuedFile = 64 << 20

// AppendIssued writes down what was signed, in a file for its owner alone: what
// a token says, not the token.
func AppendIssued(file string, c Claims) error {
	b, err := json.Marshal(c)
	if err != nil {
		return err
	}
	return appendLine(file, "", string(b), 0o600)
}

// LoadIssued reads what was signed, oldest first. A file that is missing holds
// nothing. Lines that are no claims are counted.
func LoadIssued(file string) (all []Claims, bad int, err error) {
	f, err := os.Open(file)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, 0, nil
	}
	if err != nil {
		return nil, 0, tunnel.Errorf(tunnel.ConfigInvalid, "the list of tokens can not be read: %w", err)
	}
	defer f.Close()
	lines := bufio.NewScanner(io.LimitReader(f, maxIssuedFile))
	for lines.Scan() {
		if len(bytes.TrimSpace(lines.Bytes())) == 0 {
			continue
		}
		var c Claims
		if json.Unmarshal(lines.Bytes(), &c) != nil || c.check() != nil {
			bad++
			continue
		}
		all = append(all, c)
	}
	if err := lines.Err(); err != nil {
		return nil, 0, tunnel.Errorf(tunnel.ConfigInvalid, "the list of tokens can not be read: %w", err)
	}
	return all, bad, nil
}
