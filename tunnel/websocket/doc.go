// Package websocket makes byte streams inside WebSockets (RFC 6455), for networks
// and load balancers that pass only HTTP.
//
//	dialer, err := websocket.NewDialer(websocket.DialConfig{TLS: outer})
//	conn, err := dialer.Dial(ctx, "tcp", "wss://cloud.example.net/culvert")
//
//	listener, err := websocket.NewListener(websocket.ListenConfig{Path: "/culvert"})
//	go listener.Serve(plain)        // behind a load balancer
//	listener.Take(connection)       // one whose TLS has ended here
//	conn, err := listener.Accept()
//
// What is written is sent as binary messages, whose borders mean nothing. Both
// ends run the tunnel's own TLS inside: see PROTOCOL.md, section 1.1.
//
// It promises that a peer which has not become a WebSocket yet is bounded in
// number, time and bytes, that a connection knows the TCP connection below it, and
// that Close leaves no goroutine behind.
//
// It does not keep anything private: whoever ends the outer TLS reads and writes
// what passes. It does not know what that is.
package websocket
