package policy

import (
	"net/netip"
	"strings"

	"culvert/tunnel"
)

// An Explanation says how a decision came about.
type Explanation struct {
	Decision
	Also []Rule // further rules that match; the one that decided comes before them
	Near []Near // rules for the same destination that do not match
}

// A Near is a rule that would have matched but for one thing.
type Near struct {
	Rule Rule
	Not  string // "protocol" or "ports": what it is not for
}

// Explain decides as Decide does, and looks at every rule to say why. It is for
// people: it takes time in proportion to the policy.
func (p *Policy) Explain(proto Proto, t tunnel.Target) Explanation {
	e := Explanation{Decision: p.Decide(proto, t)}
	if p == nil || t.Port == 0 {
		return e
	}
	host, addr := strings.ToLower(strings.TrimSuffix(t.Host, ".")), t.Addr
	if a, err := netip.ParseAddr(host); err == nil && !addr.IsValid() {
		host, addr = "", a
	}
	for i := range p.rules {
		r := &p.rules[i]
		switch {
		case !r.covers(host, addr):
		case r.Proto&proto == 0:
			e.Near = append(e.Near, Near{*r, "protocol"})
		case !r.Ports.Contains(t.Port):
			e.Near = append(e.Near, Near{*r, "ports"})
		case e.Rule != r:
			e.Also = append(e.Also, *r)
		}
	}
	return e
}

// covers reports whether a destination of the rule covers a name, in lower case
// and without a trailing dot, or an address; either may be missing.
func (r *Rule) covers(host string, addr netip.Addr) bool {
	for _, d := range r.To {
		switch {
		case d.Word == wordAny:
			return true
		case d.Word == wordPublic:
			if addr.IsValid() && classify(addr) == nil {
				return true
			}
		case strings.HasPrefix(d.Name, "*."):
			if strings.HasSuffix(host, d.Name[1:]) && len(host) > len(d.Name)-1 {
				return true
			}
		case d.Name != "":
			if d.Name == host {
				return true
			}
		case addr.IsValid() && d.Prefix.Contains(addr):
			return true
		}
	}
	return false
}
