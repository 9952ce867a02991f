package tunnel

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"time"
)

// Between two tries to accept a connection after a failure; each is twice as long
// as the one before.
const (
	acceptRetry   = 5 * time.Millisecond
	acceptSlowest = time.Second
)

// AcceptConns hands what l accepts to serve, one after the other, until ctx ends,
// and returns nil; the caller closes l then, which ends a wait. What passes, such
// as EMFILE, is logged and tried again: those who are connected can still leave.
// It returns an error where l was closed before ctx ended.
func AcceptConns(ctx context.Context, l net.Listener, log *slog.Logger, serve func(net.Conn)) error {
	retry := acceptRetry
	for {
		c, err := l.Accept()
		switch {
		case ctx.Err() != nil:
			if err == nil {
				c.Close()
			}
			return nil
		case errors.Is(err, net.ErrClosed):
			return Errorf(Internal, "the listener on %s was closed by somebody else: %w", l.Addr(), err)
		case err != nil:
			log.Error("a connection can not be accepted; trying again", "listener", l.Addr(), "err", err, "retry", retry)
			select {
			case <-ctx.Done():
			case <-time.After(retry):
			}
			retry = min(2*retry, acceptSlowest)
		default:
			retry = acceptRetry
			serve(c)
		}
	}
}
