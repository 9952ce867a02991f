//go:build !unix

package egress

// noBroadcast does nothing: the sockets of this system are left as they are.
func (s *socket) noBroadcast() error { return nil }
