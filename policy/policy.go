package policy

import (
	"fmt"
	"math"
	"net/netip"
	"slices"
	"strings"

	"github.com/gaissmai/bart"

	"culvert/tunnel"
)

// A Policy decides. It never changes and is safe for concurrent use.
type Policy struct {
	// rules in the order in which they decide: those that deny before those
	// that allow, then the operator's before the profiles', then as written.
	// Everywhere below a rule is its index here, and lists are ascending.
	rules   []Rule
	reasons []string // by rule, made once
	denies  int32    // rules before this one deny

	elsewhere bool // decides nothing: see Elsewhere

	special  bart.Lite
	listed   []netip.Prefix // what special holds, for people
	profiles []string

	addrs    bart.Table[[]int32] // a prefix and all rules that cover it
	any      []int32
	public   []int32
	names    map[string][]int32
	suffixes map[string][]int32 // "example.com" for *.example.com
	byAddr   []int32            // allow rules that only an address can match
}

// maxDestinations bounds the work that a file with many aliases can cause.
const maxDestinations = 500_000

// none is later than every rule.
const none = int32(math.MaxInt32)

// New makes a policy. The error's code is PolicyInvalid.
func New(c Config) (*Policy, error) {
	rules := slices.Clone(c.Rules)
	for i := range rules {
		if err := rules[i].check(); err != nil {
			return nil, tunnel.Errorf(tunnel.PolicyInvalid, "policy rule %d (%s) %w", i+1, rules[i].Origin(), err)
		}
		rules[i].Ports = rules[i].Ports.normal()
	}
	p := &Policy{names: map[string][]int32{}, suffixes: map[string][]int32{}}
	for _, name := range c.Profiles {
		if slices.Contains(p.profiles, name) {
			continue
		}
		more, ok := profileRules(name)
		if !ok {
			return nil, tunnel.Errorf(tunnel.PolicyInvalid, "%w", unknownProfile(name))
		}
		p.profiles = append(p.profiles, name)
		rules = append(rules, more...)
	}
	for _, prefix := range c.Special {
		if !prefix.IsValid() {
			return nil, tunnel.Errorf(tunnel.PolicyInvalid, "the policy lists an empty CIDR under special")
		}
		p.special.Insert(prefix)
		p.listed = append(p.listed, prefix.Masked())
	}
	slices.SortStableFunc(rules, func(a, b Rule) int {
		switch {
		case a.Allow == b.Allow:
			return 0
		case b.Allow:
			return -1
		}
		return 1
	})
	p.rules = rules
	if err := p.index(); err != nil {
		return nil, err
	}
	return p, nil
}

// Elsewhere is the policy of an end that has none: it lets everything pass, for
// the other end to decide. It is always the same.
func Elsewhere() *Policy { return elsewhere }

var elsewhere = &Policy{elsewhere: true}

// index fills the tables from the rules.
func (p *Policy) index() error {
	own := map[netip.Prefix][]int32{}
	total := 0
	for i := range p.rules {
		r, n := &p.rules[i], int32(i)
		if total += len(r.To); total > maxDestinations {
			return tunnel.Errorf(tunnel.PolicyInvalid, "the policy has more than %d destinations; join addresses to CIDRs", maxDestinations)
		}
		p.reasons = append(p.reasons, "by the rule: "+r.String())
		if !r.Allow {
			p.denies = n + 1
		}
		numeric := false
		for _, d := range r.To {
			switch {
			case d.Word == wordAny:
				p.any = addRule(p.any, n)
			case d.Word == wordPublic:
				p.public, numeric = addRule(p.public, n), true
			case strings.HasPrefix(d.Name, "*."):
				p.suffixes[d.Name[2:]] = addRule(p.suffixes[d.Name[2:]], n)
			case d.Name != "":
				p.names[d.Name] = addRule(p.names[d.Name], n)
			default:
				own[d.Prefix], numeric = addRule(own[d.Prefix], n), true
			}
		}
		if r.Allow && numeric {
			p.byAddr = append(p.byAddr, n)
		}
	}
	// A lookup finds the longest prefix only, so each prefix also holds the
	// rules of those around it.
	var flat bart.Table[[]int32]
	for prefix, list := range own {
		flat.Insert(prefix, list)
	}
	for prefix := range own {
		var all []int32
		for _, list := range flat.Supernets(prefix) { // with itself
			all = append(all, list...)
		}
		slices.Sort(all)
		p.addrs.Insert(prefix, slices.Compact(all))
	}
	return nil
}

// addRule keeps a list ascending and free of repeats; n never decreases.
func addRule(list []int32, n int32) []int32 {
	if len(list) > 0 && list[len(list)-1] == n {
		return list
	}
	return append(list, n)
}

// A Decision is the answer for one target.
type Decision struct {
	Allow bool
	// Undecided: the target is a name and only its address can tell. Allow is
	// then true: it may pass here, and the cloud proxy decides.
	Undecided bool
	Reason    string // part of a sentence: "no rule allows it"
	Rule      *Rule  // the rule that decided; nil when none did
	Tag       string // the rule's, when it allows
	Class     string // the kind of special address that was refused; "" otherwise
}

// Reasons of decisions without a rule.
const (
	reasonNoRule    = "no rule allows it"
	reasonNoTarget  = "it has neither a name nor an address"
	reasonNoPort    = "port 0 is no destination"
	reasonLongName  = "its name is longer than a host name can be"
	reasonOwn       = "it is an address of the cloud proxy's own host, which the policy does not list under special"
	reasonElsewhere = "there is no policy here, and the cloud proxy decides"
	reasonUndecided = "not decided here: only address rules could match, and the cloud proxy decides on the numeric address"
)

// Decide judges one target for TCP or UDP. It allocates nothing for a target
// with an address, whether that keeps its name or not. A nil Policy refuses.
func (p *Policy) Decide(proto Proto, t tunnel.Target) Decision {
	if p == nil {
		return Decision{Reason: "no policy is loaded"}
	}
	if p.elsewhere {
		return Decision{Allow: true, Undecided: true, Reason: reasonElsewhere}
	}
	host, addr := strings.TrimSuffix(t.Host, "."), t.Addr
	if !addr.IsValid() && literal(host) {
		if a, err := netip.ParseAddr(host); err == nil {
			host, addr = "", a
		}
	}
	switch {
	case host == "" && !addr.IsValid():
		return Decision{Reason: reasonNoTarget}
	case t.Port == 0:
		return Decision{Reason: reasonNoPort}
	case len(host) > maxName:
		return Decision{Reason: reasonLongName}
	}
	best := p.first(p.any, proto, t.Port, none)
	if host != "" {
		best = p.byName(host, proto, t.Port, best)
	}
	if !addr.IsValid() {
		if best == none && p.first(p.byAddr, proto, t.Port, none) != none {
			return Decision{Allow: true, Undecided: true, Reason: reasonUndecided}
		}
		return p.decided(best)
	}

	b := classify(addr)
	if b != nil {
		if !p.lifted(addr, b) {
			return Decision{Reason: b.refusal, Class: b.class}
		}
		if b.inner != nil {
			v4 := b.inner(addr)
			if in := classify(v4); in != nil && !p.lifted(v4, in) {
				return Decision{Reason: in.innerRefusal, Class: b.class}
			}
			// As far as it only denies, a rule for the address inside counts too.
			list, _ := p.addrs.Lookup(v4)
			if n := p.first(list, proto, t.Port, best); b.translates || n < p.denies {
				best = n
			}
		}
	} else {
		best = p.first(p.public, proto, t.Port, best)
	}
	list, _ := p.addrs.Lookup(addr)
	return p.decided(p.first(list, proto, t.Port, best))
}

func (p *Policy) decided(n int32) Decision {
	if n == none {
		return Decision{Reason: reasonNoRule}
	}
	r := &p.rules[n]
	d := Decision{Allow: r.Allow, Reason: p.reasons[n], Rule: r}
	if r.Allow {
		d.Tag = r.Tag
	}
	return d
}

// first returns the first rule of the list that matches, or best where none
// before it does.
func (p *Policy) first(list []int32, proto Proto, port uint16, best int32) int32 {
	for _, n := range list {
		if n >= best {
			break
		}
		if r := &p.rules[n]; r.Proto&proto != 0 && r.Ports.Contains(port) {
			return n
		}
	}
	return best
}

// maxName is the longest host name without its trailing dot, in bytes (RFC 1035 §2.3.4).
const maxName = 253

// byName is first for the rules by name. host has no trailing dot and at most
// maxName bytes.
func (p *Policy) byName(host string, proto Proto, port uint16, best int32) int32 {
	if len(p.names) == 0 && len(p.suffixes) == 0 {
		return best
	}
	var buf [maxName]byte
	name := buf[:copy(buf[:], host)]
	for i, c := range name {
		if 'A' <= c && c <= 'Z' {
			name[i] = c + 'a' - 'A'
		}
	}
	// The compiler looks up map[string(bytes)] without an allocation.
	best = p.first(p.names[string(name)], proto, port, best)
	for i, c := range name {
		if c == '.' && i > 0 {
			best = p.first(p.suffixes[string(name[i+1:])], proto, port, best)
		}
	}
	return best
}

// literal tells whether a host could be an address, so that names cost no
// parse error.
func literal(host string) bool {
	return host != "" && ('0' <= host[0] && host[0] <= '9' || strings.IndexByte(host, ':') >= 0)
}

// lifted reports whether the operator has listed a special address.
func (p *Policy) lifted(a netip.Addr, b *block) bool {
	switch {
	case b == zoned:
		return false
	case b.exact:
		return p.special.Get(b.prefix)
	}
	return p.special.Contains(a)
}

// Rules returns the rules in the order in which they decide.
func (p *Policy) Rules() []Rule { return slices.Clone(p.rules) }

// Special returns the special addresses that the operator lists.
func (p *Policy) Special() []netip.Prefix { return slices.Clone(p.listed) }

// Profiles returns the names of the profiles that are part of the policy.
func (p *Policy) Profiles() []string { return slices.Clone(p.profiles) }

func unknownProfile(name string) error {
	return fmt.Errorf("%s is not a profile%s; there are %s", quote(name), meant(name, Profiles()...), strings.Join(Profiles(), ", "))
}
