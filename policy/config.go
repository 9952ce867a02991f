package policy

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"

	"go.yaml.in/yaml/v3"

	"culvert/tunnel"
)

// A Config is a policy as it is written: the policy section of a
// configuration, or a file of its own. The zero Config refuses everything.
type Config struct {
	Profiles []string       // names of built-in profiles
	Special  []netip.Prefix // special addresses that rules may allow
	Rules    []Rule
}

// Parse reads a policy from a file of its own, strictly: an unknown key or a
// bad value is an error that gives its line and what was meant. file is only
// for people; it may be empty. The error's code is PolicyInvalid.
func Parse(data []byte, file string) (*Policy, error) {
	var c Config
	dec := yaml.NewDecoder(bytes.NewReader(data))
	err := dec.Decode(&c)
	if err == nil {
		var more yaml.Node
		if err = dec.Decode(&more); err == nil {
			err = bad(&more, "a second document begins; a policy is one document")
		}
	}
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, InFile(file, err)
	}
	for i := range c.Rules {
		c.Rules[i].File = file
	}
	p, err := New(c)
	if err != nil {
		return nil, InFile(file, err)
	}
	return p, nil
}

// InFile adds a file's name to an error of decoding YAML that holds a policy,
// and gives it the code PolicyInvalid where it has none.
func InFile(file string, err error) error {
	var e *tunnel.Error
	code, text := tunnel.PolicyInvalid, ""
	if errors.As(err, &e) {
		code, text = e.Code, e.Text
	} else {
		text = syntaxError(strings.TrimPrefix(err.Error(), "yaml: "))
	}
	if file != "" {
		text = file + ": " + text
	}
	return &tunnel.Error{Code: code, Text: text, Err: err}
}

// syntaxError mends what the YAML parser says: where it "did not find" a part
// of the grammar it counts lines from 0 and leaves out line 0, while its
// scanner, the source of the first message here, counts from 1.
func syntaxError(text string) string {
	quotes := "; did you forget the quotes around a value that begins with * or :, as in \"*.example.com\" or \"::1\"?"
	if strings.Contains(text, "did not find expected alphabetic or numeric character") {
		return text + quotes
	}
	problem, line := text, 0
	if rest, ok := strings.CutPrefix(text, "line "); ok {
		number, after, _ := strings.Cut(rest, ": ")
		if n, err := strconv.Atoi(number); err == nil {
			problem, line = after, n
		}
	}
	if !strings.HasPrefix(problem, "did not find expected ") {
		return text
	}
	if strings.Contains(problem, "node content") {
		problem += quotes
	}
	return fmt.Sprintf("line %d: %s", line+1, problem)
}

// AllowCIDR adds what makes a destination reachable by TCP and UDP: an allow
// rule and, where special addresses are in it, their listing.
func (c *Config) AllowCIDR(p netip.Prefix) {
	p = p.Masked()
	if overlapsSpecial(p) {
		c.Special = append(c.Special, p)
	}
	c.Rules = append(c.Rules, Rule{Allow: true, Proto: Any, To: []Dest{{Prefix: p}}})
}

// UnmarshalYAML decodes strictly, whatever the decoder around it does. Its
// errors give the line.
func (c *Config) UnmarshalYAML(n *yaml.Node) error {
	*c = Config{}
	return eachKey(n, "the policy", func(key, value *yaml.Node) error {
		switch key.Value {
		case "profiles":
			return eachWord(value, key, func(n *yaml.Node, s string) error {
				if _, ok := profileRules(s); !ok {
					return bad(n, "%w", unknownProfile(s))
				}
				c.Profiles = append(c.Profiles, s)
				return nil
			})
		case "special":
			return eachWord(value, key, func(n *yaml.Node, s string) error {
				p, err := parsePrefix(s)
				if err != nil {
					return bad(n, "%w", err)
				}
				c.Special = append(c.Special, p)
				return nil
			})
		case "rules":
			value = follow(value)
			if isNull(value) {
				return nil
			}
			if value.Kind != yaml.SequenceNode {
				return bad(value, "rules is not a list; begin each rule with a dash, as in \"- allow: udp\"")
			}
			for _, item := range value.Content {
				r, err := decodeRule(item)
				if err != nil {
					return err
				}
				c.Rules = append(c.Rules, r)
			}
			return nil
		}
		return unknownKey(key, "the policy", "profiles", "special", "rules")
	})
}

func decodeRule(n *yaml.Node) (Rule, error) {
	r := Rule{Line: n.Line}
	err := eachKey(n, "a rule", func(key, value *yaml.Node) error {
		var err error
		switch key.Value {
		case "allow", "deny":
			if r.Proto != 0 {
				return bad(key, "the rule has both allow and deny; make two rules")
			}
			r.Allow = key.Value == "allow"
			return word(value, key, func(s string) error { r.Proto, err = ParseProto(s); return err })
		case "to":
			return eachWord(value, key, func(n *yaml.Node, s string) error {
				d, err := ParseDest(s)
				if err != nil {
					return bad(n, "%w", err)
				}
				r.To = append(r.To, d)
				return nil
			})
		case "ports":
			return eachWord(value, key, func(n *yaml.Node, s string) error {
				ports, err := ParsePorts(s)
				if err != nil {
					return bad(n, "%w", err)
				}
				r.Ports = append(r.Ports, ports...)
				return nil
			})
		case "tag":
			return word(value, key, func(s string) error { r.Tag = s; return checkTag(s) })
		case "name":
			return word(value, key, func(s string) error { r.Name = s; return checkName(s) })
		}
		return unknownKey(key, "a rule", "allow", "deny", "to", "ports", "tag", "name")
	})
	switch {
	case err != nil:
	case r.Proto == 0:
		err = bad(n, "the rule neither allows nor denies; add \"allow: tcp\", udp or any, or \"deny: …\"")
	case len(r.To) == 0:
		err = bad(n, "the rule has no destination; add \"to:\" with an address, a CIDR, a name, public or any")
	}
	r.Ports = r.Ports.normal()
	return r, err
}

func checkTag(s string) error {
	for _, c := range []byte(s) {
		if !('a' <= c && c <= 'z' || '0' <= c && c <= '9' || c == '-' || c == '_' || c == '+') {
			return fmt.Errorf("%s is not a tag; use up to 32 of a-z, 0-9, - _ and +, as in media", quote(s))
		}
	}
	if s == "" || len(s) > 32 {
		return fmt.Errorf("a tag has 1 to 32 bytes, %s has %d", quote(s), len(s))
	}
	return nil
}

func checkName(s string) error {
	if s == "" || len(s) > 64 {
		return fmt.Errorf("a rule's name has 1 to 64 bytes, %s has %d", quote(s), len(s))
	}
	// Neither what a terminal obeys nor what turns the order of the letters round.
	if strings.ContainsFunc(s, func(r rune) bool { return !unicode.IsGraphic(r) || r == utf8.RuneError }) {
		return fmt.Errorf("a rule's name is one line of text that can be seen, %s is not", quote(s))
	}
	return nil
}

// eachKey calls f for each key of a mapping, in order.
func eachKey(n *yaml.Node, what string, f func(key, value *yaml.Node) error) error {
	n = follow(n)
	if isNull(n) {
		return nil
	}
	if n.Kind != yaml.MappingNode {
		return bad(n, "%s is not a mapping of keys to values", what)
	}
	seen := map[string]int{}
	for i := 0; i+1 < len(n.Content); i += 2 {
		key := n.Content[i]
		if key.Kind != yaml.ScalarNode {
			return bad(key, "a key of %s is not a word", what)
		}
		if line := seen[key.Value]; line != 0 {
			return bad(key, "the key %s stands twice in %s, first in line %d", quote(key.Value), what, line)
		}
		seen[key.Value] = key.Line
		if err := f(key, n.Content[i+1]); err != nil {
			return err
		}
	}
	return nil
}

// eachWord calls f for a word, or for each word of a list.
func eachWord(n, key *yaml.Node, f func(*yaml.Node, string) error) error {
	n = follow(n)
	if n.Kind != yaml.SequenceNode {
		return word(n, key, func(s string) error { return f(n, s) })
	}
	for _, item := range n.Content {
		if err := word(item, key, func(s string) error { return f(item, s) }); err != nil {
			return err
		}
	}
	return nil
}

// word calls f with a scalar as it is written, so that numbers stay what the
// operator wrote. An error of f gets the line unless it has one.
func word(n, key *yaml.Node, f func(string) error) error {
	v := follow(n)
	if v.Kind != yaml.ScalarNode || isNull(v) {
		return bad(n, "%s has no value where a word was expected", quote(key.Value))
	}
	err := f(v.Value)
	var e *tunnel.Error
	if err == nil || errors.As(err, &e) {
		return err
	}
	return bad(n, "%w", err)
}

// follow resolves an alias. An alias of an alias can not be written.
func follow(n *yaml.Node) *yaml.Node {
	if n.Kind == yaml.AliasNode {
		return n.Alias
	}
	return n
}

func isNull(n *yaml.Node) bool { return n.Kind == yaml.ScalarNode && n.ShortTag() == "!!null" }

func unknownKey(key *yaml.Node, what string, known ...string) error {
	return bad(key, "%s is not a key of %s%s; its keys are %s", quote(key.Value), what, meant(key.Value, known...), strings.Join(known, ", "))
}

func bad(n *yaml.Node, format string, args ...any) error {
	return tunnel.Errorf(tunnel.PolicyInvalid, "line %d: "+format, append([]any{n.Line}, args...)...)
}

type configYAML struct {
	Profiles []string   `yaml:"profiles,flow,omitempty"`
	Special  []string   `yaml:"special,flow,omitempty"`
	Rules    []RuleText `yaml:"rules,omitempty"`
}

// RuleText is a rule in words, as files and JSON show it.
type RuleText struct {
	Allow string   `yaml:"allow,omitempty" json:"allow,omitempty"` // the protocol
	Deny  string   `yaml:"deny,omitempty" json:"deny,omitempty"`   // the protocol
	To    []string `yaml:"to,flow" json:"to"`
	Ports string   `yaml:"ports,omitempty" json:"ports,omitempty"`
	Tag   string   `yaml:"tag,omitempty" json:"tag,omitempty"`
	Name  string   `yaml:"name,omitempty" json:"name,omitempty"`
	From  string   `yaml:"-" json:"from,omitempty"` // the rule's Origin
}

// Text returns the rule in words.
func (r *Rule) Text() RuleText {
	t := RuleText{Ports: r.Ports.String(), Tag: r.Tag, Name: r.Name, From: r.Origin()}
	if r.Allow {
		t.Allow = r.Proto.String()
	} else {
		t.Deny = r.Proto.String()
	}
	for _, d := range r.To {
		t.To = append(t.To, d.String())
	}
	return t
}

// MarshalYAML writes what UnmarshalYAML reads.
func (c Config) MarshalYAML() (any, error) {
	y := configYAML{Profiles: c.Profiles}
	for _, p := range c.Special {
		y.Special = append(y.Special, Dest{Prefix: p}.String())
	}
	for i := range c.Rules {
		y.Rules = append(y.Rules, c.Rules[i].Text())
	}
	return y, nil
}
