// Package httpproxy makes TCP connections through HTTP CONNECT proxies, such as
// those of hospitals and banks that let nothing else out.
//
//	dialer, err := httpproxy.New(httpproxy.Config{Choose: choose, Credentials: read})
//	conn, err := dialer.Dial(ctx, "tcp", "cloud.example.net:443")
//
// Which proxy, if any, a Chooser says: a fixed one, the environment
// (HTTPS_PROXY, NO_PROXY), or a PAC file. A proxy that asks who we are is
// answered with the best it offers of Negotiate (by a Kerberos ticket, or NTLM
// inside), NTLM (NTLMv2), Digest and Basic.
//
// It promises that what a proxy answers is bounded in bytes, and in time by the
// context; that a password goes to no proxy before that has asked for it, by the
// best scheme that it offers and goes on with, and into no error and no log; and
// that a password which was rejected is not sent again for ten minutes, unless it
// has changed: directories lock accounts that guess.
//
// It does not encrypt anything but the way to a proxy with an https URL, does not
// look at what passes, and does not carry UDP.
package httpproxy
