package policy

import (
	"encoding/csv"
	"encoding/json"
	"fmt"
	"io"
	"net/netip"
	"strconv"
	"strings"
	"text/tabwriter"

	"github.com/gaissmai/bart"

	"culvert/tunnel"
)

// An Opening is one line of what a firewall must let out.
type Opening struct {
	Proto   string   `json:"protocol"` // "tcp", "udp", or "any" for both
	To      []string `json:"to"`
	Ports   string   `json:"ports,omitempty"` // "" for every port
	Purpose string   `json:"purpose,omitempty"`
	From    string   `json:"from,omitempty"` // the rule's origin

	everywhere bool
	prefixes   []netip.Prefix
	names      []string
	ports      Ports
}

// A Firewall is what IT must open with Culvert, beside what that replaces.
type Firewall struct {
	With     []Opening `json:"with_culvert"`
	Replaces []Opening `json:"replaces"`
}

// CloudProxy is one cloud proxy for a Firewall.
type CloudProxy struct {
	Target tunnel.Target // as it is configured; a name or an address
	Addrs  []netip.Addr  // of the name; only packet filters need them
}

// Firewall lists the openings for the cloud proxies, and those that the
// policy's allow rules would need without them.
func (p *Policy) Firewall(cloud ...CloudProxy) Firewall {
	f := Firewall{With: []Opening{}, Replaces: []Opening{}}
	for _, c := range cloud {
		o := Opening{
			Proto:   Any.String(),
			To:      []string{c.Target.Host},
			Ports:   strconv.Itoa(int(c.Target.Port)),
			Purpose: "cloud proxy: QUIC over UDP, TLS over TCP",
			ports:   Ports{{c.Target.Port, c.Target.Port}},
		}
		addrs := c.Addrs
		if c.Target.Addr.IsValid() {
			o.To[0], addrs = c.Target.Addr.String(), []netip.Addr{c.Target.Addr}
		}
		for _, a := range addrs {
			a = a.Unmap()
			o.prefixes = append(o.prefixes, netip.PrefixFrom(a, a.BitLen()))
		}
		f.With = append(f.With, o)
	}
	for i := range p.rules {
		r := &p.rules[i]
		if !r.Allow {
			continue
		}
		o := Opening{Proto: r.Proto.String(), Ports: r.Ports.String(), Purpose: r.Tag, From: r.Origin(), ports: r.Ports}
		if r.Name != "" {
			o.Purpose = strings.TrimPrefix(o.Purpose+": "+r.Name, ": ")
		}
		for _, d := range r.To {
			o.To = append(o.To, d.String())
			switch {
			case d.Word != "":
				o.everywhere = true
			case d.Name != "":
				o.names = append(o.names, d.Name)
			default:
				o.prefixes = append(o.prefixes, d.Prefix)
			}
		}
		f.Replaces = append(f.Replaces, o)
	}
	return f
}

// FirewallFormats returns the formats that Write knows.
func FirewallFormats() []string {
	return []string{"table", "csv", "json", "nftables", "iptables", "powershell"}
}

// Write writes the openings as a table for people, csv, json, an nftables
// ruleset, a shell script for iptables, or a PowerShell script for the firewall
// of Windows. Loading what is for nftables or iptables changes nothing until a
// rule jumps to its chain.
func (f Firewall) Write(w io.Writer, format string) error {
	switch format {
	case "table":
		return f.table(w)
	case "csv":
		return f.csv(w)
	case "json":
		enc := json.NewEncoder(w)
		enc.SetIndent("", "  ")
		return enc.Encode(f)
	case "nftables":
		return f.nftables(w)
	case "iptables":
		return f.iptables(w)
	case "powershell":
		return f.powershell(w)
	}
	return tunnel.Errorf(tunnel.ConfigInvalid, "%s is not a format%s; use %s",
		quote(format), meant(format, FirewallFormats()...), strings.Join(FirewallFormats(), ", "))
}

func (f Firewall) table(w io.Writer) error {
	tw := tabwriter.NewWriter(w, 0, 8, 3, ' ', 0)
	section := func(title string, list []Opening) {
		fmt.Fprintln(tw, title)
		fmt.Fprintln(tw, "  PROTOCOL\tTO\tPORTS\tFOR\tFROM")
		for _, o := range list {
			for i, to := range o.To {
				if i == 0 {
					fmt.Fprintf(tw, "  %s\t%s\t%s\t%s\t%s\n", protocols(o.Proto), to, or(o.Ports, "all"), or(o.Purpose, "-"), or(o.From, "-"))
				} else {
					fmt.Fprintf(tw, "  \t%s\t\t\t\n", to)
				}
			}
		}
		tw.Flush() // so that each section has its own columns
	}
	section("To open with Culvert:", f.With)
	fmt.Fprintln(tw)
	section("What that replaces:", f.Replaces)
	return tw.Flush()
}

func (f Firewall) csv(w io.Writer) error {
	cw := csv.NewWriter(w)
	cw.Write([]string{"side", "protocol", "to", "ports", "purpose", "from"})
	for _, o := range f.With {
		for _, to := range o.To {
			cw.Write([]string{"with_culvert", protocols(o.Proto), to, or(o.Ports, "all"), csvText(o.Purpose), csvText(o.From)})
		}
	}
	for _, o := range f.Replaces {
		for _, to := range o.To {
			cw.Write([]string{"replaces", protocols(o.Proto), to, or(o.Ports, "all"), csvText(o.Purpose), csvText(o.From)})
		}
	}
	cw.Flush()
	return cw.Error() // of any of the writes
}

// csvText keeps a spreadsheet from taking a text for a formula.
func csvText(s string) string {
	if s != "" && strings.ContainsRune("=+-@", rune(s[0])) {
		return "'" + s
	}
	return s
}

func (f Firewall) nftables(w io.Writer) error {
	var b strings.Builder
	b.WriteString(`# What the firewall must let out with Culvert, beside what that replaces.
# Loading this file changes no traffic until a rule jumps to one of its chains. In a ruleset with the chain "forward" of "inet filter":
#   nft -f FILE && nft add rule inet filter forward jump culvert
table inet filter {
`)
	chain := func(name string, list []Opening) error {
		fmt.Fprintf(&b, "\tchain %s {\n", name)
		for _, o := range list {
			if err := o.nftables(&b); err != nil {
				return err
			}
		}
		b.WriteString("\t}\n")
		return nil
	}
	b.WriteString("\t# To open with Culvert.\n")
	if err := chain("culvert", f.With); err != nil {
		return err
	}
	b.WriteString("\n\t# What that replaces: no longer needed.\n")
	if err := chain("culvert_replaces", f.Replaces); err != nil {
		return err
	}
	b.WriteString("}\n")
	_, err := io.WriteString(w, b.String())
	return err
}

// nftables writes one rule per address family.
func (o Opening) nftables(b *strings.Builder) error {
	if !o.everywhere && len(o.prefixes) == 0 && o.From == "" {
		return tunnel.Errorf(tunnel.ConfigInvalid, "nftables needs the numeric address of %s; give it with --cloud ADDRESS:PORT", quote(o.To[0]))
	}
	match := "meta l4proto " + o.Proto
	switch {
	case o.Proto == Any.String() && len(o.ports) > 0:
		match = "meta l4proto { tcp, udp } th dport { " + o.ports.String() + " }"
	case o.Proto == Any.String():
		match = "meta l4proto { tcp, udp }"
	case len(o.ports) > 0:
		match = o.Proto + " dport { " + o.ports.String() + " }"
	}
	comment := strings.TrimSuffix(or(o.From, strings.Join(o.To, " "))+": "+o.Purpose, ": ")
	verdict := ` accept comment "` + nftText(comment) + "\"\n"
	if o.everywhere {
		b.WriteString("\t\t" + match + verdict)
		return nil
	}
	for _, family := range []struct {
		word string
		is4  bool
	}{{"ip", true}, {"ip6", false}} {
		if list := outermost(o.prefixes, family.is4); len(list) > 0 {
			b.WriteString("\t\t" + family.word + " daddr { " + strings.Join(list, ", ") + " } " + match + verdict)
		}
	}
	for _, name := range o.names {
		fmt.Fprintf(b, "\t\t# %s to %s, ports %s: a packet filter does not know names (%s)\n",
			protocols(o.Proto), name, or(o.Ports, "all"), nftLine(o.From))
	}
	return nil
}

// outermost returns the prefixes of one family that no other one contains: the
// intervals of an nftables set must not overlap.
func outermost(list []netip.Prefix, is4 bool) []string {
	var t bart.Lite
	for _, p := range list {
		if p.Addr().Is4() == is4 {
			t.Insert(p)
		}
	}
	t.Aggregate()
	var out []string
	for p := range t.AllSorted() {
		out = append(out, Dest{Prefix: p}.String())
	}
	return out
}

// nftText keeps what can stand in a comment of nftables: 127 bytes without quotes.
func nftText(s string) string {
	s = nftLine(s)
	return s[:min(len(s), 127)]
}

// nftLine makes a text one line of printable ASCII without quotes.
func nftLine(s string) string {
	return strings.Map(func(r rune) rune {
		if r < ' ' || r > '~' || r == '"' || r == '\\' {
			return '_'
		}
		return r
	}, s)
}

func protocols(proto string) string {
	if proto == Any.String() {
		return "tcp+udp"
	}
	return proto
}

func or(s, other string) string {
	if s == "" {
		return other
	}
	return s
}
