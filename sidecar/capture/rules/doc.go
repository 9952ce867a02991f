// Package rules sets and removes what makes the kernel hand the traffic of apps
// to a sidecar: one nftables table and one routing rule for each family, all
// under names of their own.
//
//	err := rules.On(rules.Rules{Port: 1443, Users: users})
//	state, err := rules.Read()
//	was, err := rules.Off()
//
// It promises that On replaces what was there in one step, that On and Off may be
// repeated, that Off leaves nothing behind, and that Text is the same rules as On
// sets, since both are made of the same parts. Nothing is captured on its way to
// this machine itself, in answer to a connection from outside, or on its way out
// of the sidecar.
//
// It does not open the sockets that receive the traffic, and does not know what
// becomes of it. Where nobody listens at the port the kernel resets what is
// captured of TCP and drops the rest: it fails closed. Without Linux everything is Unsupported; without
// CAP_NET_ADMIN it is NotPermitted.
package rules
