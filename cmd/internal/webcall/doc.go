// Package webcall is a conference for the tests of browsers: a web server with one
// page, and a peer in the middle (an SFU) that passes on what two such pages
// send. A page sends a camera and a microphone, plays what comes, and
// reports what its getStats says twice a second.
//
//	room := webcall.New(t, host, web, media)
//	… a browser opens room.Page("anna"), another room.Page("bert") …
//	r, ok := room.Last("anna")
//
// It promises that it answers only: it sends no packet to an address that it
// has not heard from (ICE lite, RFC 8445 §2.5), and that all it has started is gone
// when the test has ended.
//
// It is for tests. It does not start a browser, knows no tunnel, and judges nothing.
package webcall
