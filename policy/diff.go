package policy

import (
	"net/netip"
	"slices"

	"culvert/tunnel"
)

// A Difference is what two policies do not agree on.
type Difference struct {
	Removed, Added               []Rule         // rules that only the first or only the second has, wherever they stand
	SpecialRemoved, SpecialAdded []netip.Prefix // special addresses that only one of them lists
	Flips                        []Flip         // destinations named in either that they judge differently
}

// A Flip is a destination that two policies judge differently.
type Flip struct {
	Proto         Proto
	To            tunnel.Target
	Before, After Decision
}

// Diff compares two policies: their rules, and what they make of every
// destination that one of their rules names, at the ends of its ranges of
// addresses and ports. Where rules overlap, a difference may lie between those
// ends as well: then the rules differ too.
func Diff(a, b *Policy) Difference {
	d := Difference{
		Removed: only(a.rules, b.rules), Added: only(b.rules, a.rules),
		SpecialRemoved: onlyPrefixes(a.listed, b.listed), SpecialAdded: onlyPrefixes(b.listed, a.listed),
	}
	ports := portsOf(a.rules, b.rules)
	seen := map[tunnel.Target]bool{}
	for _, rules := range [][]Rule{a.rules, b.rules} {
		for i := range rules {
			for _, to := range rules[i].To {
				for _, t := range to.samples() {
					for _, port := range ports {
						t.Port = port
						if seen[t] || len(seen) >= maxSamples {
							continue
						}
						seen[t] = true
						d.flips(a, b, t)
					}
				}
			}
		}
	}
	return d
}

// maxSamples bounds the work that two huge policies can cause.
const maxSamples = 200_000

// Same reports whether nothing differs.
func (d Difference) Same() bool {
	return len(d.Removed)+len(d.Added)+len(d.SpecialRemoved)+len(d.SpecialAdded)+len(d.Flips) == 0
}

func (d *Difference) flips(a, b *Policy, t tunnel.Target) {
	for _, proto := range []Proto{TCP, UDP} {
		before, after := a.Decide(proto, t), b.Decide(proto, t)
		if before.Allow != after.Allow || before.Undecided != after.Undecided || before.Tag != after.Tag {
			d.Flips = append(d.Flips, Flip{proto, t, before, after})
		}
	}
}

// samples are targets of a destination: its name, a name below it, or the ends
// of its addresses.
func (d Dest) samples() []tunnel.Target {
	switch {
	case d.Word != "":
		return []tunnel.Target{{Addr: netip.AddrFrom4([4]byte{8, 8, 8, 8})}, {Host: "any.example"}}
	case len(d.Name) > 2 && d.Name[:2] == "*.":
		return []tunnel.Target{{Host: "x" + d.Name[1:]}}
	case d.Name != "":
		return []tunnel.Target{{Host: d.Name}}
	}
	first := d.Prefix.Addr()
	last := lastOf(d.Prefix)
	if first == last {
		return []tunnel.Target{{Addr: first}}
	}
	return []tunnel.Target{{Addr: first}, {Addr: last}}
}

func lastOf(p netip.Prefix) netip.Addr {
	b := p.Addr().AsSlice()
	for i := p.Bits(); i < 8*len(b); i++ {
		b[i/8] |= 0x80 >> (i % 8)
	}
	a, _ := netip.AddrFromSlice(b)
	return a
}

// portsOf are the ends of every range of ports, and one that may be in none.
func portsOf(lists ...[]Rule) []uint16 {
	ports := []uint16{1}
	for _, rules := range lists {
		for i := range rules {
			for _, r := range rules[i].Ports {
				ports = append(ports, r.Low, r.High)
			}
		}
	}
	slices.Sort(ports)
	return slices.Compact(ports)
}

// only returns the rules of a that b has not, wherever they were read.
func only(a, b []Rule) (all []Rule) {
	for _, r := range a {
		if !slices.ContainsFunc(b, func(other Rule) bool { return r.same(&other) }) {
			all = append(all, r)
		}
	}
	return all
}

func (r *Rule) same(o *Rule) bool {
	return r.Allow == o.Allow && r.Proto == o.Proto && r.Tag == o.Tag && slices.Equal(r.To, o.To) && slices.Equal(r.Ports, o.Ports)
}

func onlyPrefixes(a, b []netip.Prefix) (all []netip.Prefix) {
	for _, p := range a {
		if !slices.Contains(b, p) {
			all = append(all, p)
		}
	}
	return all
}
