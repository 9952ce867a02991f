package rules

import (
	"errors"
	"fmt"
	"net/netip"
	"path"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"

	"culvert/tunnel"
)

const (
	// Table is the nftables table, of family inet.
	Table = "culvert"
	// Mark is the bit of a packet's mark that says that it is captured.
	Mark = 1 << 26
	// OwnMark is the bit that a sidecar sets on its own packets, which are
	// never captured.
	OwnMark = 1 << 27
	// RouteTable is the routing table that keeps captured packets on this
	// machine, and the priority of the rule that leads to it: before a VPN's.
	RouteTable = 4430
)

// ErrOther refuses rules while those of another sidecar are set.
var ErrOther = errors.New("capture is on already")

// Rules say what is captured and where it goes.
type Rules struct {
	// Port is where the sidecar listens, on 127.0.0.1 and ::1.
	Port uint16
	// Whose traffic: users, cgroups (version 2, such as
	// "system.slice/phone.service"), or All.
	Users   []User
	Cgroups []string
	All     bool
	// Sidecars are users whose traffic is left alone, as the sidecar's own is
	// where it does not mark its packets.
	Sidecars []User
	// Except are destinations that are left alone.
	Except []netip.Prefix
	// Only are the destinations that are captured; none: all.
	Only []Destination
	// DNS captures port 53 also where it goes to this machine or into Except.
	DNS bool
	// Lasting rules stay when no sidecar runs, as an init container needs it.
	Lasting bool
}

// nobody is the number that stands for no user.
const nobody = 1<<32 - 1

// A User is a local user; Name is for people and may be empty.
type User struct {
	UID  uint32
	Name string
}

// A Destination is a network with ports.
type Destination struct {
	Prefix netip.Prefix
	TCP    bool
	UDP    bool
	Ports  []Ports // none: all
	Name   string  // for people
}

// Ports is a range with both its ends.
type Ports struct{ Low, High uint16 }

// State is what the kernel has.
type State struct {
	On      bool
	Port    uint16
	Lasting bool
	Routed  bool   // what is captured has its way to the port
	Lines   []Line // in the order in which they are asked
}

// A Line is one rule in words.
type Line struct {
	Text     string `json:"text"`
	Captures bool   `json:"captures"` // or leaves alone
	Packets  uint64 `json:"packets"`
}

// Check says what is missing or can not be. Its errors have the code
// ConfigInvalid.
func (r Rules) Check() error {
	switch {
	case r.Port == 0:
		return tunnel.Errorf(tunnel.ConfigInvalid, "the port to which captured traffic goes is missing")
	case !r.All && len(r.Users)+len(r.Cgroups) == 0:
		return tunnel.Errorf(tunnel.ConfigInvalid, "nothing says whose traffic to capture; name users, cgroups, or all")
	case r.All && len(r.Users)+len(r.Cgroups) > 0:
		return tunnel.Errorf(tunnel.ConfigInvalid, "to capture all leaves no choice of users or cgroups; name one or the other")
	}
	for _, u := range r.Users {
		if u.UID == nobody {
			return tunnel.Errorf(tunnel.ConfigInvalid, "%s is nobody's number; the kernel has no such user", u)
		}
		if slices.ContainsFunc(r.Sidecars, func(s User) bool { return s.UID == u.UID }) {
			return tunnel.Errorf(tunnel.ConfigInvalid, "user %s is both captured and the sidecar's; leave one out", u)
		}
	}
	for i, c := range r.Cgroups {
		if clean := cleanCgroup(c); clean == "" {
			return tunnel.Errorf(tunnel.ConfigInvalid, "%.80q is not a cgroup; it is a path such as system.slice/phone.service", c)
		} else {
			r.Cgroups[i] = clean
		}
	}
	for _, p := range r.Except {
		if !p.IsValid() {
			return tunnel.Errorf(tunnel.ConfigInvalid, "a destination to leave alone is not a network such as 10.0.0.0/8")
		}
	}
	for _, d := range r.Only {
		if !d.Prefix.IsValid() || !d.TCP && !d.UDP {
			return tunnel.Errorf(tunnel.ConfigInvalid, "the destination %s needs a network and a protocol", d.Name)
		}
	}
	return nil
}

// cleanCgroup is a cgroup's path from the root of the hierarchy; empty: it is none.
// A backslash is systemd's, as in app-gnome-google\x2dchrome-1234.scope.
func cleanCgroup(c string) string {
	for _, root := range []string{"/sys/fs/cgroup/unified/", "/sys/fs/cgroup/"} { // beside version 1, and alone
		if rest, ok := strings.CutPrefix(c, root); ok {
			c = rest
			break
		}
	}
	c = strings.Trim(path.Clean("/"+c), "/")
	if len(c) > 255 || !utf8.ValidString(c) || strings.ContainsFunc(c, func(r rune) bool { return r <= ' ' || r == '"' || r == 0x7f }) {
		return ""
	}
	return c
}

func (u User) String() string {
	if u.Name == "" {
		return strconv.FormatUint(uint64(u.UID), 10)
	}
	return fmt.Sprintf("%s (%d)", u.Name, u.UID)
}
