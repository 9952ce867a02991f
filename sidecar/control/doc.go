// Package control is how people and launchers speak with a running sidecar:
// JSON over HTTP on a unix socket.
//
//	GET  /v1/status
//	POST /v1/start                  {"mode": "auto"}
//	POST /v1/stop                   {"wait": "30s", "force": false}
//	GET  /v1/channels
//	POST /v1/channels/NAME/join     {"pid": 4711}
//	POST /v1/channels/NAME/leave
//	GET  /v1/events                 server-sent: the state now, then each change
//
// It promises that an error is one sentence with its code,
// {"error": {"code": …, "text": …, "channels": […]}}, and that nothing a web
// page can send is obeyed, should a page ever reach the socket: requests with
// Origin, Referer or Sec-Fetch-* headers, for another Host, or with a body that
// is not declared as JSON, are refused.
//
// On a socket of Listen it answers root, the user that made it and the members
// of its group, whatever the rights of the file have become, where the system
// tells who asks. On TCP (ServeTCP) it answers who shows a token.
//
// It decides nothing, and does not tell one who may control the sidecar from
// another. What happens is the Backend's.
package control
