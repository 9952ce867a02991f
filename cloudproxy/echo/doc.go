// Package echo sends datagrams back that are meant for the cloud proxy itself,
// so that a sidecar can measure the path to it (tunnel/wire/PROTOCOL.md 5.7):
//
//	session ──► echo ──► resolve ──► guard ──► egress
//
// It promises that an answer is exactly as long as what it answers, that there
// is one for each at most, and that a session gets no more echoed than its
// allowance: nobody outside a session gets anything, and nobody else is sent to.
//
// It does not look names up, opens no socket, and decides nothing: whether there
// is an echo is asked of its caller.
package echo
