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
// It decides nothing and authenticates nobody: who may open the socket may
// control the sidecar. What happens is the Backend's.
package control
