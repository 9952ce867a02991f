package tunneltls

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"testing"
	"time"

	"culvert/tunnel"
	"culvert/tunnel/tunneltest"
)

// raw is a client that writes its TLS records itself, and the server's candidate.
func raw(t *testing.T) (*tunneltest.Records, net.Conn, tunnel.Candidate) {
	t.Helper()
	cc, sc := both(t)
	l := listen(t, sc)
	tcp, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { tcp.Close() })
	log := &tunneltest.KeyLog{}
	conf := cc.TLS.Clone()
	conf.KeyLogWriter, conf.MinVersion = log, tls.VersionTLS13
	conn := tls.Client(tcp, conf)
	if err := conn.Handshake(); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	c, err := l.Accept(ctx)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	w, err := log.Records(tcp, conn.ConnectionState())
	if err != nil {
		t.Skip(err)
	}
	return w, tcp, c
}

// crypto/tls bounds KeyUpdates that come one after another, and none that have
// data between them.
func TestFloodsOfKeyUpdatesEndTheConnection(t *testing.T) {
	window := yamuxFrame(1, 0, 1, 1)
	for name, c := range map[string]struct {
		data    []byte // between them
		updates int    // between data
		answer  bool
	}{
		"alone":                          {nil, 200, false},
		"alone, each to be answered":     {nil, 200, true},
		"with data":                      {window, 1, false},
		"with data, each to be answered": {window, 1, true},
		"fifteen at a time":              {window, 15, false},
	} {
		for _, of := range []string{"carrier", "lane"} {
			t.Run(name+" on a "+of, func(t *testing.T) {
				w, tcp, sc := raw(t)
				go io.Copy(io.Discard, tcp) // the answers
				data := c.data
				var done <-chan struct{}
				var why func() error
				if of == "lane" {
					lane, err := sc.Lane()
					if err != nil {
						t.Fatal(err)
					}
					t.Cleanup(func() { lane.Close(nil) })
					lane.Start(func([]byte) {}, func() {})
					done, why = lane.Done(), lane.Err
					if data != nil {
						data = appendRecord(nil, 0, make([]byte, 100))
					}
				} else {
					carrier := carry(t, sc)
					done, why = carrier.Done(), carrier.Err
					w.Write(yamuxFrame(1, 1, 1, 0)) // the control stream
				}
				began := time.Now()
				go func() {
					for {
						var many []byte
						for range 40 {
							if len(data) > 0 {
								many = w.Append(many, tunneltest.ApplicationData, data, 0)
							}
							for range c.updates {
								many, _ = w.AppendKeyUpdate(many, c.answer)
							}
						}
						if _, err := tcp.Write(many); err != nil {
							return
						}
					}
				}()
				receive(t, "the end", done)
				if !errors.Is(why(), tunnel.LimitExceeded) {
					t.Error(why())
				}
				t.Logf("ended after %v: %v", time.Since(began), why())
			})
		}
	}
}

// What is data is none of a flood, however it is cut into records and padded, nor
// is a KeyUpdate now and then.
func TestRecordsThatCarryDataAreNoFlood(t *testing.T) {
	w, tcp, c := raw(t)
	const records = 3000
	done := make(chan error, 1)
	want := 0
	for n := range records {
		want += n % 700
	}
	go func() {
		for n := range records {
			b := w.Append(nil, tunneltest.ApplicationData, make([]byte, n%700), n%300)
			if n%100 == 50 {
				b, _ = w.AppendKeyUpdate(b, false)
			}
			if _, err := tcp.Write(b); err != nil {
				done <- err
				return
			}
		}
		done <- nil
	}()
	c.SetDeadline(time.Now().Add(patience))
	if n, err := io.CopyN(io.Discard, c, int64(want)); err != nil {
		t.Errorf("after %d of %d bytes: %v", n, want, err)
	}
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// The records are the same however the network cuts them.
func FuzzRekeyMeter(f *testing.F) {
	record := append([]byte{23, 3, 3, 0, 22}, make([]byte, 22)...)
	f.Add(append(record, record...), 5)
	f.Add([]byte{23, 3, 3, 0xff, 0xff, 1}, 1)
	f.Add([]byte{22, 3, 1, 0, 0, 23, 3, 3, 0, 1, 9}, 3)
	f.Fuzz(func(t *testing.T, p []byte, cut int) {
		whole, parts := newRekeyMeter(nil), newRekeyMeter(nil)
		whole.came(p)
		cut = max(1, cut%64)
		for rest := p; len(rest) > 0; {
			n := min(cut, len(rest))
			parts.came(rest[:n])
			rest = rest[n:]
		}
		if whole.have != parts.have || whole.skip != parts.skip || whole.records != parts.records || whole.content != parts.content {
			t.Fatalf("in one piece %+v, in pieces of %d %+v", whole, cut, parts)
		}
		if whole.content > len(p)+1<<16 {
			t.Fatalf("%d bytes hold %d", len(p), whole.content)
		}
	})
}
