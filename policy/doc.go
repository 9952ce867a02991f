// Package policy decides which destinations may be reached.
//
// It promises a decision with its reason and the rule that made it, from the
// protocol and the target alone: no packet, no DNS, no clock. Special
// addresses (loopback, private, link-local, metadata, translated, ...: see
// Special) are refused unless the operator lists them; then a matching deny
// rule refuses, then a matching allow rule allows, and all else is refused.
// Guard is a tunnel.Opener that asks first and then passes on.
//
//	policy:
//	  profiles: [agora-mainland-test]       # built-in rules: see Profiles
//	  special: [10.20.0.0/16]               # special addresses that rules may allow
//	  rules:
//	    - allow: tcp                        # tcp, udp or any
//	      to: ["*.example.com", 10.20.0.7]  # name, *.name, address, CIDR, public, any; one or a list
//	      ports: 443,8000-8100              # left out: every port
//	      tag: media                        # optional: what the traffic is
//	      name: our media servers           # optional: shown when the rule decides
//	    - deny: any
//	      to: old.example.com
//
// Listing an address under special only lifts the refusal: an allow rule must
// match it as well, and the words of profile public never do. A metadata
// service is lifted only by listing exactly its address, never by a larger
// CIDR. *.example.com stands for every name below example.com, not for
// example.com itself.
//
// The same policy is asked at the sidecar and at the cloud proxy. A name
// without an address is judged by the name rules; where only an address could
// tell, the decision is Undecided and the target passes on. A target with an
// address is always decided for good, and where it kept the name it was
// resolved from, name rules count as well, but never let a special address
// through that is not listed.
//
// It does not resolve names, and it believes that a target's Addr is an
// address of its Host: the stage before must have resolved it. It does not
// know which addresses belong to the machine it runs on, unless they are
// special.
package policy
