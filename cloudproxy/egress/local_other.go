//go:build !linux

package egress

import "net/netip"

// localPrefixes is not known here.
func localPrefixes() []netip.Prefix { return nil }
