package rules

import (
	"bufio"
	"errors"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/google/nftables/userdata"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"culvert/tunnel"
)

var families = []int{netlink.FAMILY_V4, netlink.FAMILY_V6}

// On sets the rules, in place of those that were there. It refuses while
// another port's are: those are another sidecar's.
func On(r Rules) error {
	if err := r.Check(); err != nil {
		return err
	}
	defer alone()()
	state, err := Read()
	if err != nil {
		return err
	}
	if state.On && state.Port == 0 { // a table of that name, which is not ours
		return tunnel.Errorf(tunnel.NotPermitted, "%w, by a table 'inet %s' that names no port; look at it with 'nft list table inet %s', and remove it with 'culvert capture off'", ErrOther, Table, Table)
	}
	if state.On && state.Port != r.Port {
		return tunnel.Errorf(tunnel.NotPermitted, "%w, for the sidecar at port %d; turn that off first, with 'culvert capture off'", ErrOther, state.Port)
	}
	// Made before anything is changed: a cgroup may not exist.
	c := &nftables.Conn{}
	table := &nftables.Table{Name: Table, Family: nftables.TableFamilyINet}
	c.AddTable(table)
	c.DelTable(table)
	c.AddTable(table)
	made := map[string]*nftables.Chain{}
	for _, ch := range chains {
		made[ch.name] = c.AddChain(baseOf(ch.name, table))
	}
	for _, l := range r.script() {
		var all []expr.Any
		for _, p := range l.parts {
			e, err := p.expr()
			if err != nil {
				return err
			}
			all = append(all, e...)
		}
		var data []byte
		if l.comment != "" {
			data = userdata.AppendString(nil, userdata.TypeComment, l.comment)
		}
		c.AddRule(&nftables.Rule{Table: table, Chain: made[l.chain], Exprs: all, UserData: data})
	}
	// The way first: what is marked must have somewhere to go.
	if err := route(true); err != nil {
		return err
	}
	if err := c.Flush(); err != nil {
		if !state.On {
			route(false)
		}
		return explain("set nftables rules", err)
	}
	return nil
}

// aloneWait is how long On and Off wait for another one to end.
const aloneWait = 3 * time.Second

// alone lets one On or Off at a time change a network namespace, so that none
// takes away the routes of rules that another has just set. Who may not, or would
// have to wait for too long, goes on: the lock is everybody's to hold.
func alone() (done func()) {
	f, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		return func() {}
	}
	for end := time.Now().Add(aloneWait); ; time.Sleep(5 * time.Millisecond) {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR) || time.Now().After(end) {
			return func() { f.Close() }
		}
	}
}

// baseOf is a chain with its hook, where it has one.
func baseOf(name string, t *nftables.Table) *nftables.Chain {
	c := &nftables.Chain{Name: name, Table: t}
	accept := nftables.ChainPolicyAccept
	switch name {
	case "prerouting":
		c.Type, c.Hooknum, c.Priority, c.Policy = nftables.ChainTypeFilter, nftables.ChainHookPrerouting, nftables.ChainPriorityMangle, &accept
	case "postrouting":
		c.Type, c.Hooknum, c.Priority, c.Policy = nftables.ChainTypeFilter, nftables.ChainHookPostrouting, nftables.ChainPriorityMangle, &accept
	case "output":
		c.Type, c.Hooknum, c.Priority, c.Policy = nftables.ChainTypeRoute, nftables.ChainHookOutput, nftables.ChainPriorityMangle, &accept
	}
	return c
}

// Off removes the rules and reports whether there were any.
func Off() (was bool, err error) {
	defer alone()()
	state, err := Read()
	if err != nil {
		return false, err
	}
	c := &nftables.Conn{}
	table := &nftables.Table{Name: Table, Family: nftables.TableFamilyINet}
	c.AddTable(table) // so that there is one to delete
	c.DelTable(table)
	if err := c.Flush(); err != nil {
		return false, explain("remove nftables rules", err)
	}
	return state.On, route(false)
}

// route sets or removes the rule and the route of each family.
func route(on bool) error {
	lo, err := net.InterfaceByName("lo")
	if err != nil {
		return explain("find the loopback interface", err)
	}
	for _, family := range families {
		if family == netlink.FAMILY_V6 && !hasIPv6(on) {
			continue
		}
		all := &net.IPNet{IP: net.IPv4zero.To4(), Mask: net.CIDRMask(0, 32)}
		if family == netlink.FAMILY_V6 {
			all = &net.IPNet{IP: net.IPv6zero, Mask: net.CIDRMask(0, 128)}
		}
		way := &netlink.Route{Family: family, LinkIndex: lo.Index, Dst: all, Table: RouteTable, Type: unix.RTN_LOCAL, Scope: unix.RT_SCOPE_HOST}
		rule := netlink.NewRule()
		mask := uint32(Mark)
		rule.Family, rule.Mark, rule.Mask, rule.Table, rule.Priority = family, Mark, &mask, RouteTable, RouteTable
		if on {
			if err := netlink.RouteReplace(way); err != nil {
				return explain("set a route", err)
			}
			if err := netlink.RuleAdd(rule); err != nil && !errors.Is(err, unix.EEXIST) {
				return explain("set a routing rule", err)
			}
			continue
		}
		for { // there may be several, of an earlier version or by hand
			err := netlink.RuleDel(rule)
			if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EAFNOSUPPORT) {
				break
			}
			if err != nil {
				return explain("remove a routing rule", err)
			}
		}
		if err := netlink.RouteDel(way); err != nil && !errors.Is(err, unix.ESRCH) && !errors.Is(err, unix.ENOENT) {
			return explain("remove a route", err)
		}
	}
	return nil
}

// hasIPv6 reports whether the kernel has the family at all, and, where it is to be
// used, whether it is on where routes lead to: net.ipv6.conf.all.disable_ipv6
// forbids them.
func hasIPv6(used bool) bool {
	off, err := os.ReadFile("/proc/sys/net/ipv6/conf/lo/disable_ipv6")
	if !used && err == nil {
		return true
	}
	return err == nil && strings.TrimSpace(string(off)) == "0"
}

// Halved reports whether others have removed either the rules, as 'nft flush
// ruleset' does, or their routes. Off takes both. In doubt they have not.
func Halved() bool {
	defer alone()()
	tables, err := (&nftables.Conn{}).ListTablesOfFamily(nftables.TableFamilyINet)
	if err != nil {
		return false
	}
	on := slices.ContainsFunc(tables, func(t *nftables.Table) bool { return t.Name == Table })
	ways, err := routed()
	return err == nil && on != ways
}

// routed reports whether the routing rules and routes are there. Others remove
// them: systemd-networkd those that it does not know, and the kernel the routes
// when lo is set down.
func routed() (bool, error) {
	for _, family := range families {
		if family == netlink.FAMILY_V6 && !hasIPv6(true) {
			continue
		}
		known, err := netlink.RuleList(family)
		if err != nil || !slices.ContainsFunc(known, func(r netlink.Rule) bool { return r.Mark == Mark && r.Table == RouteTable }) {
			return false, err
		}
		ways, err := netlink.RouteListFiltered(family, &netlink.Route{Table: RouteTable, Type: unix.RTN_LOCAL}, netlink.RT_FILTER_TABLE|netlink.RT_FILTER_TYPE)
		if err != nil || len(ways) == 0 {
			return false, err
		}
	}
	return true, nil
}

// Read returns what the kernel has.
func Read() (State, error) {
	c := &nftables.Conn{}
	tables, err := c.ListTablesOfFamily(nftables.TableFamilyINet)
	if err != nil {
		return State{}, explain("read nftables rules", err)
	}
	i := slices.IndexFunc(tables, func(t *nftables.Table) bool { return t.Name == Table })
	if i < 0 {
		return State{}, nil
	}
	s := State{On: true}
	if s.Routed, err = routed(); err != nil {
		return State{}, explain("read the routing rules", err)
	}
	for n, name := range []string{"prerouting", "skip", "where", "who", "take", "postrouting"} {
		list, err := c.GetRules(tables[i], &nftables.Chain{Name: name, Table: tables[i]})
		if errors.Is(err, unix.ENOENT) {
			continue // a table that has our name and not our chains
		}
		if err != nil {
			return State{}, explain("read nftables rules", err)
		}
		for k, r := range list {
			comment, _ := userdata.GetString(r.UserData, userdata.TypeComment)
			if n == 0 && k == 0 {
				s.Port, s.Lasting, _ = parseAbout(comment)
				continue
			}
			if comment == "" {
				continue
			}
			l := Line{Text: comment, Captures: name == "who" || name == "postrouting"}
			for _, e := range r.Exprs {
				if count, ok := e.(*expr.Counter); ok {
					l.Packets = count.Packets
				}
			}
			s.Lines = append(s.Lines, l)
		}
	}
	return s, nil
}

// CgroupID is the number that the kernel has for a cgroup of version 2.
func CgroupID(path string) (uint64, error) {
	root, err := cgroupRoot()
	if err != nil {
		return 0, err
	}
	var st unix.Stat_t
	if err := unix.Stat(filepath.Join(root, path), &st); err != nil || st.Mode&unix.S_IFMT != unix.S_IFDIR {
		return 0, tunnel.Errorf(tunnel.ConfigInvalid, "there is no cgroup %s below %s; start what runs in it first, or name its slice", path, root)
	}
	return st.Ino, nil
}

// cgroupRoot is where the hierarchy of version 2 is mounted.
func cgroupRoot() (string, error) {
	f, err := os.Open("/proc/self/mounts")
	if err == nil {
		defer f.Close()
		for lines := bufio.NewScanner(f); lines.Scan(); {
			if field := strings.Fields(lines.Text()); len(field) > 2 && field[2] == "cgroup2" {
				return field[1], nil
			}
		}
	}
	return "", tunnel.Errorf(tunnel.Unsupported, "this system has no cgroups of version 2; capture by user instead")
}

// explain says what an error of the kernel means here.
func explain(what string, err error) error {
	switch {
	case errors.Is(err, unix.EPERM), errors.Is(err, unix.EACCES):
		return tunnel.Errorf(tunnel.NotPermitted, "to %s needs CAP_NET_ADMIN; run it as root, or grant the capability", what)
	case errors.Is(err, unix.ENETDOWN):
		return tunnel.Errorf(tunnel.Internal, "can not %s: the loopback interface is down; set it up with 'ip link set lo up'", what)
	case errors.Is(err, unix.EOPNOTSUPP), errors.Is(err, unix.EPROTONOSUPPORT), errors.Is(err, unix.ENOENT):
		return tunnel.Errorf(tunnel.Unsupported, "this kernel can not %s; it lacks nftables, or their tproxy, socket or fib: %w", what, err)
	}
	return tunnel.Errorf(tunnel.Internal, "can not %s: %w", what, err)
}
