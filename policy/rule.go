package policy

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"culvert/tunnel"
)

// A Proto is a set of protocols.
type Proto uint8

// The protocols. Any is only for rules.
const (
	TCP Proto = 1 << iota
	UDP
	Any = TCP | UDP
)

// ParseProto reads "tcp", "udp" or "any".
func ParseProto(s string) (Proto, error) {
	switch s {
	case "tcp":
		return TCP, nil
	case "udp":
		return UDP, nil
	case "any":
		return Any, nil
	}
	return 0, fmt.Errorf("%s is not a protocol%s; use tcp, udp or any", quote(s), meant(s, "tcp", "udp", "any"))
}

// String returns "tcp", "udp" or "any".
func (p Proto) String() string {
	switch p {
	case TCP:
		return "tcp"
	case UDP:
		return "udp"
	}
	return "any"
}

// A PortRange is the ports from Low to High, both included.
type PortRange struct{ Low, High uint16 }

// Ports is a set of ports: sorted ranges that do not touch. The empty set
// stands for every port.
type Ports []PortRange

// ParsePorts reads "443,4000,3433-3460".
func ParsePorts(s string) (Ports, error) {
	var ports Ports
	for part := range strings.SplitSeq(s, ",") {
		part = strings.TrimSpace(part)
		low, high, isRange := strings.Cut(part, "-")
		a, err := parsePort(low)
		if err != nil {
			return nil, err
		}
		b := a
		if isRange {
			if b, err = parsePort(high); err != nil {
				return nil, err
			}
		}
		if a > b {
			return nil, fmt.Errorf("%s runs backwards; did you mean %d-%d?", quote(part), b, a)
		}
		ports = append(ports, PortRange{a, b})
	}
	return ports.normal(), nil
}

func parsePort(s string) (uint16, error) {
	s = strings.TrimSpace(s)
	n, err := strconv.ParseUint(s, 10, 16)
	if err != nil || n == 0 || s[0] == '+' {
		return 0, fmt.Errorf("%s is not a port; use numbers from 1 to 65535 as in 443,4000,3433-3460", quote(s))
	}
	return uint16(n), nil
}

// normal sorts the ranges and joins those that touch.
func (p Ports) normal() Ports {
	p = slices.Clone(p)
	slices.SortFunc(p, func(a, b PortRange) int { return cmp.Compare(a.Low, b.Low) })
	var out Ports
	for _, r := range p {
		if n := len(out); n > 0 && int(r.Low) <= int(out[n-1].High)+1 {
			out[n-1].High = max(out[n-1].High, r.High)
			continue
		}
		out = append(out, r)
	}
	return out
}

// Contains reports whether the port is in the set.
func (p Ports) Contains(port uint16) bool {
	for _, r := range p {
		if r.Low <= port && port <= r.High {
			return true
		}
	}
	return len(p) == 0
}

// String returns "443,3433-3460"; "" for every port.
func (p Ports) String() string {
	parts := make([]string, len(p))
	for i, r := range p {
		parts[i] = strconv.Itoa(int(r.Low))
		if r.High != r.Low {
			parts[i] += "-" + strconv.Itoa(int(r.High))
		}
	}
	return strings.Join(parts, ",")
}

// A Dest is a destination in a rule: a prefix, a name, a pattern of names, or
// one of two words.
type Dest struct {
	Prefix netip.Prefix // an address is a prefix of its full length
	Name   string       // in lower case, without a trailing dot; "*.example.com" for the names below it
	Word   string       // "any": all there is; "public": addresses that are not special
}

// The words of a Dest.
const (
	wordAny    = "any"
	wordPublic = "public"
)

// ParseDest reads an address, a CIDR, a name, a pattern like *.example.com, or
// one of the words any and public.
func ParseDest(s string) (Dest, error) {
	if s == wordAny || s == wordPublic {
		return Dest{Word: s}, nil
	}
	if s == "*" {
		return Dest{}, fmt.Errorf(`"*" is not a destination; did you mean "any"?`)
	}
	if looksNumeric(s) {
		p, err := parsePrefix(s)
		return Dest{Prefix: p}, err
	}
	name, err := parsePattern(s)
	return Dest{Name: name}, err
}

// looksNumeric tells addresses from names. No top-level domain is a number.
func looksNumeric(s string) bool {
	last := strings.TrimSuffix(s, ".")
	last = last[strings.LastIndexByte(last, '.')+1:]
	_, err := strconv.ParseUint(last, 10, 64)
	return err == nil || strings.ContainsAny(s, ":/")
}

// parsePrefix reads an address or a CIDR without host bits.
func parsePrefix(s string) (netip.Prefix, error) {
	if a, err := netip.ParseAddr(s); err == nil {
		if a.Zone() != "" {
			return netip.Prefix{}, fmt.Errorf("%s has a zone, which means an interface of one machine; leave %s out", quote(s), quote("%"+a.Zone()))
		}
		return netip.PrefixFrom(a, a.BitLen()), nil
	}
	p, err := netip.ParsePrefix(s)
	if err != nil {
		if host, port, ok := strings.Cut(s, ":"); ok && !strings.Contains(port, ":") {
			return netip.Prefix{}, fmt.Errorf("%s is not a destination; write the port under ports and %s here", quote(s), quote(host))
		}
		return netip.Prefix{}, fmt.Errorf("%s is not an address or a CIDR like 10.0.0.0/8 or fd00::/8", quote(s))
	}
	if p != p.Masked() {
		return netip.Prefix{}, fmt.Errorf("%s has bits beyond its length; did you mean %s or %s?", quote(s), p.Masked(), p.Addr())
	}
	return p, nil
}

func parsePattern(s string) (string, error) {
	name := strings.ToLower(strings.TrimSuffix(s, "."))
	rest := strings.TrimPrefix(name, "*.")
	if strings.Contains(rest, "*") {
		return "", fmt.Errorf("%s is not a pattern; a * stands only before the first dot, as in *.example.com", quote(s))
	}
	if len(rest) > 253 {
		return "", fmt.Errorf("%s is longer than the 253 bytes of a host name", quote(s))
	}
	for label := range strings.SplitSeq(rest, ".") {
		if len(label) == 0 || len(label) > 63 {
			return "", fmt.Errorf("%s is not a host name: the parts between its dots have 1 to 63 bytes", quote(s))
		}
		for _, c := range []byte(label) {
			switch {
			case 'a' <= c && c <= 'z', '0' <= c && c <= '9', c == '-', c == '_':
			case c >= 0x80:
				return "", fmt.Errorf("%s is not in ASCII; write the form that begins with xn--", quote(s))
			default:
				return "", fmt.Errorf("%s is not a host name, an address, a CIDR, any or public", quote(s))
			}
		}
	}
	return name, nil
}

// String returns what ParseDest reads.
func (d Dest) String() string {
	switch {
	case d.Word != "":
		return d.Word
	case d.Name != "":
		return d.Name
	case d.Prefix.IsSingleIP():
		return d.Prefix.Addr().String()
	}
	return d.Prefix.String()
}

// A Rule allows or denies. It matches when protocol, one destination and the
// port match.
type Rule struct {
	Allow bool // otherwise it denies
	Proto Proto
	To    []Dest // at least one
	Ports Ports  // empty: every port
	Tag   string // what the traffic is; TagMedia, ... or the operator's word
	Name  string // for people; may be empty

	Profile string // the built-in profile it comes from; "" otherwise
	File    string // where it was read; "" when unknown
	Line    int    // 0 when unknown
}

// The tags of the built-in profiles. Only TagMedia has a meaning of its own:
// UDP to such a destination is taken for media even where it can not be read.
const (
	TagMedia         = "media"
	TagMessagesMedia = "messages+media"
	TagEdge          = "edge"
)

// Action returns "allow" or "deny".
func (r *Rule) Action() string {
	if r.Allow {
		return "allow"
	}
	return "deny"
}

// Origin says where the rule stands: "profile public", "culvert.yaml line 12".
func (r *Rule) Origin() string {
	switch {
	case r.Profile != "":
		return "profile " + r.Profile
	case r.Line == 0:
		return "policy"
	case r.File == "":
		return "line " + strconv.Itoa(r.Line)
	}
	return tunnel.LogText(r.File, 200) + " line " + strconv.Itoa(r.Line) // a file may be called anything
}

// String returns the rule as "allow udp to 192.0.2.1 ports 3478-3500 (profile x)".
// Long lists are cut, so that it fits into a line of a log.
func (r *Rule) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s %s to ", r.Action(), r.Proto)
	const enough = 80 // bytes of destinations, and of ports
	start := b.Len()
	for i, d := range r.To {
		if i > 0 {
			if b.Len()-start > enough {
				fmt.Fprintf(&b, " and %d more", len(r.To)-i)
				break
			}
			b.WriteString(", ")
		}
		b.WriteString(d.String())
	}
	if ports := r.Ports.String(); len(ports) > enough {
		fmt.Fprintf(&b, " ports %s,…", ports[:strings.LastIndexByte(ports[:enough], ',')])
	} else if ports != "" {
		fmt.Fprintf(&b, " ports %s", ports)
	}
	if r.Name != "" {
		fmt.Fprintf(&b, " %q", r.Name)
	}
	fmt.Fprintf(&b, " (%s)", r.Origin())
	return b.String()
}

// check finds what a Rule made by a program could have wrong.
func (r *Rule) check() error {
	if r.Proto == 0 || r.Proto&^Any != 0 {
		return fmt.Errorf("has no protocol")
	}
	if len(r.To) == 0 {
		return fmt.Errorf("has no destination")
	}
	for _, d := range r.To {
		if d.Word == "" && d.Name == "" && !d.Prefix.IsValid() {
			return fmt.Errorf("has an empty destination")
		}
		if again, err := ParseDest(d.String()); err != nil || again != d {
			return fmt.Errorf("has a destination %s that is not in its plain form", quote(d.String()))
		}
	}
	for _, p := range r.Ports {
		if p.Low == 0 || p.Low > p.High {
			return fmt.Errorf("has a port range %d-%d", p.Low, p.High)
		}
	}
	if r.Tag != "" {
		if err := checkTag(r.Tag); err != nil {
			return fmt.Errorf("has a bad tag: %w", err)
		}
	}
	if r.Name != "" {
		if err := checkName(r.Name); err != nil {
			return fmt.Errorf("has a bad name: %w", err)
		}
	}
	return nil
}
