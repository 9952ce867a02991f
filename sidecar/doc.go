// Package sidecar is the end of Culvert that stands beside the app: the front
// that apps connect to, and the switch that starts and stops the proxy.
//
// The Front promises one loopback TCP port that speaks SOCKS5 (CONNECT and UDP
// ASSOCIATE, RFC 1928 and 1929), HTTP CONNECT and a PAC file, told apart by the
// first byte. It turns each request into one call of a tunnel.Opener, answers
// with what really happened, and leaves no goroutine, socket or association
// behind when the app's connection or Run's context ends:
//
//	front, err := sidecar.NewFront(sidecar.FrontConfig{Listener: l, Next: opener})
//	…
//	err = front.Run(ctx)
//
// It does not resolve names, decide what is allowed, or know a tunnel: all of
// that is the Opener's. It does not offer BIND, GSSAPI or fragments of SOCKS
// datagrams, and it forwards no HTTP request other than CONNECT.
package sidecar
