// Package tunnel is the contract that joins Culvert's parts: what a path for a
// call can be asked to do, what carries it, and how failures are named.
//
// It promises that every stage of a path looks the same. A front, a guard, a
// tunnel and an egress all speak Opener, so they can be reordered, removed or
// put side by side in one process with no network between them:
//
//	front -> watch -> switch -> guard -> session (near) == 443 == session (far) -> resolve -> guard -> egress
//
// It does not move a byte itself, knows no wire format and no library, and
// imports only the standard library. The bytes are in tunnel/wire, the
// carriers in tunnel/tunnelquic and tunnel/tunneltls, and the exam that every
// carrier sits in tunnel/tunneltest.
package tunnel
