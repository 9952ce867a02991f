package rules

import (
	"fmt"
	"net/netip"
	"strconv"
	"strings"
)

// The chains. Each rule is a row of parts; a part is what nft calls it, and what
// the kernel is given (see parts_linux.go).
//
//	output ──tcp, udp──► skip ──► where ──► who ──► take: marked, routed to lo
//	                      │ not captured  │ elsewhere │ somebody else
//	                      ▼               ▼           ▼
//	                   its own way
//
//	prerouting, on lo: what is marked goes to the sidecar's sockets, or is rejected
var chains = []chain{
	{name: "prerouting", base: "type filter hook prerouting priority mangle; policy accept;"},
	{name: "output", base: "type route hook output priority mangle; policy accept;"},
	{name: "postrouting", base: "type filter hook postrouting priority mangle; policy accept;"},
	{name: "skip"}, {name: "where"}, {name: "who"}, {name: "take"},
}

type chain struct{ name, base string }

// A rule is one line of a chain.
type rule struct {
	chain   string
	parts   []part
	comment string // in words, for status; empty: nothing to tell
}

// commentMost is how many bytes nft takes for a comment.
const commentMost = 127

// script is all rules in order. What each part is stands in parts_linux.go.
func (r Rules) script() []rule {
	var all []rule
	add := func(chain, comment string, parts ...part) {
		if comment != "" { // what is told is counted, before the verdict ends the rule
			parts = append(parts[:len(parts)-1:len(parts)-1], counted(), parts[len(parts)-1])
		}
		all = append(all, rule{chain, parts, comment[:min(len(comment), commentMost)]})
	}
	for _, family := range []netip.Addr{netip.AddrFrom4([4]byte{127, 0, 0, 1}), netip.IPv6Loopback()} {
		for _, proto := range []string{"tcp", "udp"} {
			add("prerouting", "", onLoopback(), marked(Mark), ofFamily(family), l4(proto), tproxy(family, r.Port), verdict("accept"))
		}
	}
	// Nobody is there. The kernel has no ICMP for a destination that is not this
	// machine's, so UDP is dropped.
	add("prerouting", "", onLoopback(), marked(Mark), l4("tcp"), reset())
	add("prerouting", "", onLoopback(), marked(Mark), verdict("drop"))

	// A TCP connection is decided on once, at its first packet.
	add("output", "", l4("tcp"), ctDirection("original"), ctMarked(Mark), setMark(Mark), verdict("accept"))
	// What the sidecar hands to an app can be the first that the kernel sees of a
	// conversation, as when a peer speaks first from another port. The app's answer
	// is then not an answer to what came from outside.
	add("output", "", l4("udp"), marked(OwnMark), setCTMark(OwnMark))
	add("output", "", l4("tcp"), verdict("jump skip"))
	add("output", "", l4("udp"), verdict("jump skip"))
	// When an app's socket is gone the kernel tells whom a datagram seems to come
	// from, and quotes it: in clear, on the network of this machine.
	for _, proto := range []string{"icmp", "ipv6-icmp"} {
		add("output", "", l4(proto), notLoopback(), ctMarked(OwnMark), verdict("drop"))
	}

	add("skip", "the sidecar's own packets", marked(OwnMark), verdict("return"))
	for _, u := range r.Sidecars {
		add("skip", "the sidecar's user "+u.String(), userIs(u.UID), verdict("return"))
	}
	add("skip", "answers to what came from outside", ctDirection("reply"), ctUnmarked(OwnMark), verdict("return"))
	if r.DNS {
		add("skip", "", port(53, 53), verdict("jump who"))
	}
	add("skip", "to this machine itself", fibType("local"), verdict("return"))
	for _, kind := range []string{"broadcast", "multicast"} {
		add("skip", "to "+kind, fibType(kind), verdict("return"))
	}
	for _, p := range linkLocal {
		add("skip", "to the own link, "+p.String(), append(to(p), verdict("return"))...)
	}
	for _, p := range r.Except {
		add("skip", "excepted: to "+p.String(), append(to(p), verdict("return"))...)
	}
	if len(r.Only) == 0 {
		add("skip", "", verdict("goto who"))
	} else {
		add("skip", "", verdict("goto where"))
	}
	for _, d := range r.Only {
		for _, proto := range []struct {
			name string
			is   bool
		}{{"tcp", d.TCP}, {"udp", d.UDP}} {
			if !proto.is {
				continue
			}
			ports := d.Ports
			if len(ports) == 0 {
				ports = []Ports{{0, 65535}}
			}
			for _, p := range ports {
				add("where", "", append(to(d.Prefix), l4(proto.name), port(p.Low, p.High), verdict("jump who"))...)
			}
		}
	}
	if len(r.Only) > 0 { // also what 'who' has sent back, of others
		add("where", "elsewhere than the policy allows, or of somebody else", verdict("return"))
	}

	for _, u := range r.Users {
		add("who", "of user "+u.String(), userIs(u.UID), verdict("goto take"))
	}
	for _, c := range r.Cgroups {
		add("who", "of cgroup "+c, cgroupIs(c), verdict("goto take"))
	}
	if r.All {
		add("who", "of all apps", verdict("goto take"))
	}

	add("take", "connections that were open before", l4("tcp"), notSYN(), verdict("return"))
	add("take", "", l4("tcp"), setCTMark(Mark))
	add("take", "", setMark(Mark), verdict("accept"))

	// A socket may insist on a device, and other programs may remove our routing
	// rule: rather nothing than beside the tunnel.
	add("postrouting", "dropped: bound to a device, and so not to be captured", marked(Mark), notLoopback(), ofThisMachine(), verdict("drop"))
	all[0].comment = r.about()
	return all
}

// linkLocal is what no router passes on.
var linkLocal = []netip.Prefix{netip.MustParsePrefix("169.254.0.0/16"), netip.MustParsePrefix("fe80::/10")}

// about is the comment of the first rule, which says whose the table is.
func (r Rules) about() string {
	s := "culvert: to port " + strconv.Itoa(int(r.Port))
	if r.Lasting {
		s += ", lasting"
	}
	return s
}

// parseAbout is the reverse of about.
func parseAbout(s string) (port uint16, lasting, ok bool) {
	s, ok = strings.CutPrefix(s, "culvert: to port ")
	s, lasting = strings.CutSuffix(s, ", lasting")
	n, err := strconv.ParseUint(s, 10, 16)
	return uint16(n), lasting, ok && err == nil
}

// Text is the rules as a script for 'nft -f', and the routing rules as comments.
func (r Rules) Text() (string, error) {
	if err := r.Check(); err != nil {
		return "", err
	}
	var b strings.Builder
	for _, f := range []string{"-4", "-6"} {
		fmt.Fprintf(&b, "# ip %s rule add fwmark %#x/%#x lookup %d priority %d\n", f, Mark, Mark, RouteTable, RouteTable)
		fmt.Fprintf(&b, "# ip %s route add local default dev lo table %d\n", f, RouteTable)
	}
	script := r.script()
	fmt.Fprintf(&b, "table inet %s {\n", Table)
	for _, c := range chains { // a jump needs its chain
		fmt.Fprintf(&b, "\tchain %s {\n", c.name)
		if c.base != "" {
			fmt.Fprintf(&b, "\t\t%s\n", c.base)
		}
		for _, l := range script {
			if l.chain != c.name {
				continue
			}
			words := make([]string, 0, len(l.parts)+1)
			for _, p := range l.parts {
				if p.text != "" {
					words = append(words, p.text)
				}
			}
			if l.comment != "" {
				words = append(words, `comment "`+l.comment+`"`) // nft knows no escapes
			}
			fmt.Fprintf(&b, "\t\t%s\n", strings.Join(words, " "))
		}
		b.WriteString("\t}\n")
	}
	b.WriteString("}\n")
	return b.String(), nil
}

func number[N ~uint32 | ~uint16](n N) string { return strconv.FormatUint(uint64(n), 10) }
