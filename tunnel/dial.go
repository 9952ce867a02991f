package tunnel

import (
	"context"
	"net"
	"time"
)

// A DialFunc is a net.Dialer's DialContext, or what stands for it.
type DialFunc = func(ctx context.Context, network, address string) (net.Conn, error)

const (
	dialAgain = 250 * time.Millisecond
	dialTries = 4
)

// DialAgain makes a TCP dialer that is not held up by one lost packet. TCP repeats
// its first packet after a second (RFC 6298 §2), for which a call would wait where
// a link has just come back; here another attempt begins beside those before after
// 250 ms, 500 ms and 750 ms. The first answer counts, be it an error, and the other
// attempts are dropped.
func DialAgain(dial DialFunc) DialFunc {
	return func(ctx context.Context, network, address string) (net.Conn, error) {
		ctx, cancel := context.WithCancel(ctx)
		defer cancel()
		type answer struct {
			conn net.Conn
			err  error
		}
		answers := make(chan answer, dialTries)
		try := func() {
			c, err := dial(ctx, network, address)
			answers <- answer{c, err}
		}
		go try()
		again := time.NewTicker(dialAgain)
		defer again.Stop()
		for tried := 1; ; {
			select {
			case a := <-answers:
				go func() {
					for range tried - 1 {
						if late := <-answers; late.conn != nil {
							late.conn.Close()
						}
					}
				}()
				return a.conn, a.err
			case <-again.C:
				if tried < dialTries {
					tried++
					go try()
				}
			}
		}
	}
}
