// Package wire is the bytes of the tunnel: control messages, datagram records
// and lane framing, each read and written in one place.
//
// It promises that reading never allocates by a length that the peer declared,
// never panics, and gives a coded error for anything malformed, and that
// PROTOCOL.md beside it says the same as the code (a test decodes the
// document's examples). It does not open connections, keep state or decide
// anything: tunnel/session does.
package wire
