package policy

import (
	"fmt"
	"io"
	"slices"
	"strings"

	"culvert/tunnel"
)

// NeedsAddresses reports whether a format of Write needs the numeric addresses
// of the cloud proxies.
func NeedsAddresses(format string) bool {
	return slices.Contains([]string{"nftables", "iptables", "powershell"}, format)
}

// numeric fails where a cloud proxy is known by its name only.
func (f Firewall) numeric(format string) error {
	for _, o := range f.With {
		if !o.everywhere && len(o.prefixes) == 0 {
			return tunnel.Errorf(tunnel.ConfigInvalid, "%s needs the numeric address of %s; give it with --cloud ADDRESS:PORT", format, quote(o.To[0]))
		}
	}
	return nil
}

// text describes an opening in one line of printable ASCII, which is short:
// iptables-restore takes no more than 10,240 bytes for a line.
func (o Opening) text() string {
	const most = 1000 // bytes of addresses, and of ports
	to, ports := strings.Join(o.To, " "), or(o.Ports, "all")
	if len(to) > most {
		to = o.To[0] + " and others"
	}
	if len(ports) > most {
		ports = "of a long list"
	}
	return nftLine(fmt.Sprintf("%s to %s, ports %s: %s %s", protocols(o.Proto), to, ports, o.Purpose, o.From))
}

// protos are the protocols of an opening, one by one.
func (o Opening) protos() []string {
	if o.Proto == Any.String() {
		return []string{TCP.String(), UDP.String()}
	}
	return []string{o.Proto}
}

// iptablesPorts is how many ports a multiport match takes; a range counts twice.
const iptablesPorts = 15

// iptables writes a shell script that loads two chains of each family.
func (f Firewall) iptables(w io.Writer) error {
	if err := f.numeric("iptables"); err != nil {
		return err
	}
	var b strings.Builder
	b.WriteString(`#!/bin/sh -e
# What the firewall must let out with Culvert, beside what that replaces.
# Running this script changes no traffic until a rule jumps to one of its chains:
#   sh FILE && iptables -I FORWARD -j culvert && ip6tables -I FORWARD -j culvert
# Running it again replaces what is in the chains.
`)
	for _, family := range []struct {
		tool, any string
		is4       bool
	}{{"iptables", "0.0.0.0/0", true}, {"ip6tables", "::/0", false}} {
		fmt.Fprintf(&b, "\n%s-restore --noflush <<'EOF'\n*filter\n:culvert - [0:0]\n:culvert_replaces - [0:0]\n", family.tool)
		for _, c := range []struct {
			chain string
			list  []Opening
		}{{"culvert", f.With}, {"culvert_replaces", f.Replaces}} {
			for _, o := range c.list {
				fmt.Fprintf(&b, "# %s\n", o.text())
				to := outermost(o.prefixes, family.is4)
				if o.everywhere {
					to = []string{family.any}
				}
				for _, addr := range to {
					for _, proto := range o.protos() {
						for _, ports := range iptablesMatches(o.ports) {
							fmt.Fprintf(&b, "-A %s -d %s -p %s%s -j ACCEPT\n", c.chain, addr, proto, ports)
						}
					}
				}
			}
		}
		b.WriteString("COMMIT\nEOF\n")
	}
	_, err := io.WriteString(w, b.String())
	return err
}

// iptablesMatches are the matches for ports, as many as it takes.
func iptablesMatches(ports Ports) []string {
	if len(ports) == 0 {
		return []string{""}
	}
	var all []string
	var list []string
	room := iptablesPorts
	for _, r := range ports {
		word, size := fmt.Sprint(r.Low), 1
		if r.High != r.Low {
			word, size = fmt.Sprintf("%d:%d", r.Low, r.High), 2
		}
		if room < size {
			all = append(all, " -m multiport --dports "+strings.Join(list, ","))
			list, room = nil, iptablesPorts
		}
		list, room = append(list, word), room-size
	}
	return append(all, " -m multiport --dports "+strings.Join(list, ","))
}

// powershell writes a script of rules for the firewall of Windows itself. What
// is replaced is there too, but not enabled.
func (f Firewall) powershell(w io.Writer) error {
	if err := f.numeric("powershell"); err != nil {
		return err
	}
	var b strings.Builder
	b.WriteString(`# What the firewall of this Windows machine must let out with Culvert, beside what that replaces.
# Run it as an administrator: powershell -ExecutionPolicy Bypass -File FILE.ps1
# It replaces the rules that an earlier run has made. To take them out: Remove-NetFirewallRule -Group 'Culvert', and 'Culvert replaces'
$ErrorActionPreference = 'Stop'
`)
	for _, c := range []struct {
		group, enabled, what string
		list                 []Opening
	}{{"Culvert", "True", "To open with Culvert", f.With}, {"Culvert replaces", "False", "What that replaces: no longer needed, so these rules are off", f.Replaces}} {
		fmt.Fprintf(&b, "\n# %s.\nGet-NetFirewallRule -Group '%s' -ErrorAction SilentlyContinue | Remove-NetFirewallRule\n", c.what, c.group)
		for n, o := range c.list {
			fmt.Fprintf(&b, "# %s\n", o.text())
			to := append(outermost(o.prefixes, true), outermost(o.prefixes, false)...)
			if o.everywhere {
				to = []string{"Any"}
			}
			if len(to) == 0 {
				continue // names only, which a packet filter does not know
			}
			for _, proto := range o.protos() {
				fmt.Fprintf(&b, "New-NetFirewallRule -DisplayName '%s %d %s' -Group '%s' -Description '%s' -Direction Outbound -Action Allow -Enabled %s -Profile Any -Protocol %s -RemoteAddress %s",
					c.group, n+1, proto, c.group, strings.ReplaceAll(o.text(), "'", "''"), c.enabled, strings.ToUpper(proto), psList(to))
				if len(o.ports) > 0 {
					fmt.Fprintf(&b, " -RemotePort %s", psList(strings.Split(o.ports.String(), ",")))
				}
				b.WriteString(" | Out-Null\n")
			}
		}
	}
	_, err := io.WriteString(w, b.String())
	return err
}

// psList is a list of words without quotes in PowerShell.
func psList(words []string) string { return "@('" + strings.Join(words, "','") + "')" }
