package tunnel

import (
	"context"
	"net"
	"net/netip"
	"time"
)

// A DialFunc is a net.Dialer's DialContext, or what stands for it.
type DialFunc = func(ctx context.Context, network, address string) (net.Conn, error)

const (
	dialAgain = 250 * time.Millisecond // RFC 8305 §5, Connection Attempt Delay
	dialTries = 4
	// maxAddresses is how many addresses of one name are tried.
	maxAddresses = 6
)

// A Resolver looks names up. *net.Resolver is one, and a nil one is the system's.
type Resolver interface {
	LookupNetIP(ctx context.Context, network, host string) ([]netip.Addr, error)
}

// Addresses returns the addresses of a host in the order in which they are to be
// tried: the resolver's, with the families in turn (RFC 8305 §4), and no more than
// six. The error is r's.
func Addresses(ctx context.Context, r Resolver, host string) ([]netip.Addr, error) {
	if a, err := netip.ParseAddr(host); err == nil {
		return []netip.Addr{a}, nil
	}
	all, err := r.LookupNetIP(ctx, "ip", host)
	if err != nil {
		return nil, err
	}
	return inTurn(all), nil
}

func inTurn(all []netip.Addr) (order []netip.Addr) {
	var families [2][]netip.Addr // the first is that of the first address
	for _, a := range all {
		a = a.Unmap()
		other := 0
		if a.Is4() != all[0].Unmap().Is4() {
			other = 1
		}
		families[other] = append(families[other], a)
	}
	for i := range all {
		for _, family := range families {
			if i < len(family) && len(order) < maxAddresses {
				order = append(order, family[i])
			}
		}
	}
	return order
}

// DialAgain makes a TCP dialer that is not held up by one lost packet, nor by one
// address of a name that does not answer. TCP repeats its first packet after a
// second (RFC 6298 §2), for which a call would wait where a link has just come back;
// here another attempt begins every 250 ms beside those before, four in all or one
// for each address, each at the next address. The first connection counts. An
// address that fails is not tried again, and the next one is at once; where all have
// failed the first error counts.
func DialAgain(dial DialFunc, r Resolver) DialFunc {
	return func(ctx context.Context, network, address string) (net.Conn, error) {
		host, port, err := net.SplitHostPort(address)
		if err != nil {
			return nil, &net.OpError{Op: "dial", Net: network, Err: err}
		}
		addrs, err := Addresses(ctx, r, host)
		if err != nil {
			return nil, &net.OpError{Op: "dial", Net: network, Err: err}
		}
		ctx, cancel := context.WithCancel(ctx)
		defer cancel()
		type answer struct {
			at   int
			conn net.Conn
			err  error
		}
		most := max(dialTries, len(addrs))
		answers := make(chan answer, most)
		failed, failures := make([]error, len(addrs)), 0
		next, tried, open := 0, 0, 0
		try := func() {
			for tried < most && failures < len(addrs) { // at the next that has not failed
				at := next % len(addrs)
				next++
				if failed[at] != nil {
					continue
				}
				tried++
				open++
				go func() {
					c, err := dial(ctx, network, net.JoinHostPort(addrs[at].String(), port))
					answers <- answer{at, c, err}
				}()
				return
			}
		}
		try()
		again := time.NewTicker(dialAgain)
		defer again.Stop()
		for {
			select {
			case a := <-answers:
				open--
				if a.err != nil {
					if failed[a.at] == nil {
						failed[a.at] = a.err
						failures++
					}
					if failures < len(addrs) {
						if next < len(addrs) || open == 0 {
							try()
						}
						if open > 0 {
							continue
						}
					}
					a.err = failed[0]
				}
				go func() {
					for range open {
						if late := <-answers; late.conn != nil {
							late.conn.Close()
						}
					}
				}()
				return a.conn, a.err
			case <-again.C:
				try()
			}
		}
	}
}
