package policy

import (
	"net/netip"
	"slices"
)

// profiles are the built-in ones, in the order in which they are shown. The
// Agora tables are the addresses that Agora gives for tests of its cloud
// proxy: TCP 443, 4000 and 3433-3460 carry messages and media, the four
// 443 addresses talk to edge nodes, UDP is media.
var profiles = []struct {
	name  string
	rules []Rule
}{
	{"agora-mainland-test", []Rule{
		{Proto: TCP, To: hosts("150.138.153.78"), Ports: agoraTCP, Tag: TagMessagesMedia},
		{Proto: TCP, To: agoraEdge, Ports: Ports{{443, 443}}, Tag: TagEdge},
		{Proto: UDP, To: hosts("150.138.153.78"), Ports: agoraUDP, Tag: TagMedia},
	}},
	{"agora-overseas-test", []Rule{
		{Proto: TCP, To: hosts("23.236.115.138", "148.153.66.218"), Ports: agoraTCP, Tag: TagMessagesMedia},
		{Proto: TCP, To: agoraEdge, Ports: Ports{{443, 443}}, Tag: TagEdge},
		{Proto: UDP, To: hosts("23.236.115.138", "148.153.66.218"), Ports: agoraUDP, Tag: TagMedia},
	}},
	// No tag: with one, all UDP would count as media.
	{"public", []Rule{
		{Proto: Any, To: []Dest{{Word: wordPublic}}},
	}},
}

var (
	agoraTCP  = Ports{{443, 443}, {3433, 3460}, {4000, 4000}}
	agoraUDP  = Ports{{3478, 3500}}
	agoraEdge = hosts("47.74.211.17", "52.80.192.229", "52.52.84.170", "47.96.234.219")
)

func hosts(addrs ...string) []Dest {
	out := make([]Dest, len(addrs))
	for i, s := range addrs {
		a := netip.MustParseAddr(s)
		out[i].Prefix = netip.PrefixFrom(a, a.BitLen())
	}
	return out
}

// Profiles returns the names of the built-in profiles.
func Profiles() []string {
	names := make([]string, len(profiles))
	for i, p := range profiles {
		names[i] = p.name
	}
	return names
}

// profileRules returns a copy of a built-in profile's rules.
func profileRules(name string) ([]Rule, bool) {
	for _, p := range profiles {
		if p.name == name {
			rules := slices.Clone(p.rules)
			for i := range rules {
				rules[i].Allow, rules[i].Profile = true, name
			}
			return rules, true
		}
	}
	return nil, false
}
