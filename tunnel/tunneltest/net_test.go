package tunneltest

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"culvert/tunnel"
)

// inbox collects what a way receives, with the time since it began.
type inbox struct {
	mu       sync.Mutex
	got      []string
	writable int
}

func collect(w tunnel.Way) *inbox {
	b := new(inbox)
	began := time.Now()
	w.Start(func(p []byte) {
		b.mu.Lock()
		defer b.mu.Unlock()
		b.got = append(b.got, fmt.Sprint(string(p), "@", time.Since(began)))
	}, func() {
		b.mu.Lock()
		defer b.mu.Unlock()
		b.writable++
	})
	return b
}

func (b *inbox) is(t *testing.T, want ...string) {
	t.Helper()
	synctest.Wait()
	b.mu.Lock()
	defer b.mu.Unlock()
	if !slices.Equal(b.got, want) {
		t.Errorf("received %q; want %q", b.got, want)
	}
}

// network makes a Net and a pair of carriers on it.
func network(t *testing.T, c Config) (n *Net, client, server tunnel.Carrier) {
	t.Helper()
	n = NewNet(c)
	l, err := n.Listen("192.0.2.1:443")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { n.Cut(); l.Close() })
	cc, err := n.Dialer(nil).Dial(t.Context(), "192.0.2.1:443")
	if err != nil {
		t.Fatal(err)
	}
	sc, err := l.Accept(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	client, server = upgrade(t, cc, sc)
	return n, client, server
}

func TestDatagramsMeetTheirFate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		_, client, server := network(t, Config{Datagram: func(fromClient bool, p []byte) Fate {
			if !fromClient {
				return Fate{}
			}
			return map[string]Fate{
				"lost":  {Drop: true},
				"twice": {Extra: 1},
				"late":  {Delay: 3 * time.Second},
				"later": {Delay: 5 * time.Second},
			}[string(p)]
		}})
		a, b := collect(client.Datagrams()), collect(server.Datagrams())
		for _, p := range []string{"later", "late", "lost", "twice", "plain"} {
			if err := client.Datagrams().Send([]byte(p)); err != nil {
				t.Fatal(p, err)
			}
		}
		if err := server.Datagrams().Send([]byte("lost")); err != nil {
			t.Fatal(err)
		}
		time.Sleep(10 * time.Second)
		b.is(t, "twice@0s", "twice@0s", "plain@0s", "late@3s", "later@5s")
		a.is(t, "lost@0s")
	})
}

func TestABlockedNetRefusesAndAnnouncesRoom(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n, client, server := network(t, Config{})
		a, b := collect(client.Datagrams()), collect(server.Datagrams())
		n.Block(true)
		if err := client.Datagrams().Send([]byte("x")); err != tunnel.ErrBlocked {
			t.Errorf("Send on a blocked net: %v", err)
		}
		synctest.Wait()
		if a.writable != 0 {
			t.Error("writable was called on a blocked net")
		}
		n.Block(false)
		synctest.Wait()
		if a.writable != 1 || b.writable != 0 {
			t.Errorf("writable: client %d, server %d; want 1 and 0", a.writable, b.writable)
		}
		if err := client.Datagrams().Send([]byte("x")); err != nil {
			t.Error(err)
		}
		b.is(t, "x@0s")
	})
}

func TestAFullQueueRefusesUntilItIsRead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		_, client, server := network(t, Config{Queue: 2})
		a := collect(client.Datagrams())
		for i, want := range []error{nil, nil, tunnel.ErrBlocked} {
			if err := client.Datagrams().Send([]byte("x")); err != want {
				t.Errorf("Send %d: %v; want %v", i, err, want)
			}
		}
		collect(server.Datagrams()).is(t, "x@0s", "x@0s")
		if a.writable != 1 {
			t.Errorf("writable was called %d times", a.writable)
		}
	})
}

func TestANetFailsDialsAndIsCut(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		down := true
		n, client, server := network(t, Config{Dial: func(context.Context, string) error {
			if down = !down; down {
				return tunnel.UDPBlocked
			}
			return nil
		}})
		if _, err := n.Dialer(nil).Dial(t.Context(), "192.0.2.1:443"); !errors.Is(err, tunnel.UDPBlocked) {
			t.Errorf("Dial: %v", err)
		}
		if _, err := n.Dialer(nil).Dial(t.Context(), "192.0.2.2:443"); !errors.Is(err, tunnel.CloudUnreachable) {
			t.Errorf("Dial where nobody listens: %v", err)
		}
		n.Cut()
		<-client.Done()
		<-server.Done()
		if client.Err() == nil || server.Err() == nil {
			t.Error("a carrier was cut without an error")
		}
	})
}
