// Package uplink is the sidecar's choice of path: it races handshakes, asks
// for a session, keeps the carriers joined that it needs, decides by what
// arrives how datagrams go, and joins or connects again with jittered backoff.
//
// It promises to report every change of state with its reason, to stop trying
// only where repeating can not help or after twenty minutes, and to leave no
// connection behind when Run returns. It does not know the carriers (cmd hands
// in their dialers), and does not carry traffic: session.Near does.
package uplink
