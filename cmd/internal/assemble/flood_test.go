package assemble_test

import (
	"context"
	"crypto/ed25519"
	"crypto/tls"
	"encoding/binary"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"culvert/cloudproxy/identity"
	"culvert/cmd/internal/assemble"
	"culvert/tunnel"
	"culvert/tunnel/tunnelquic"
	"culvert/tunnel/tunneltest"
	"culvert/tunnel/uplink"
	"culvert/tunnel/wire"
)

// peer is somebody with a key and a token of the site, who need not be a sidecar.
type peer struct {
	key   ed25519.PrivateKey
	tls   *tls.Config
	token string
}

func (s *site) peer(t *testing.T) *peer {
	t.Helper()
	key, err := identity.GenerateKey()
	if err != nil {
		t.Fatal(err)
	}
	return &peer{key: key, tls: s.clientTLS(t, key), token: s.issue(t, identity.Claims{})}
}

// clientTLS is what a sidecar with this key connects with.
func (s *site) clientTLS(t *testing.T, key ed25519.PrivateKey) *tls.Config {
	t.Helper()
	pin, err := assemble.PinOf(s.cert)
	if err != nil {
		t.Fatal(err)
	}
	conf, err := uplink.ClientTLS(uplink.TLSConfig{Key: key, Pins: []string{pin}, ServerName: assemble.DefaultServerName})
	if err != nil {
		t.Fatal(err)
	}
	return conf
}

// issue issues a token of the App ID "test", with what c has beside that.
func (s *site) issue(t *testing.T, c identity.Claims) string {
	t.Helper()
	now := time.Now()
	if c.App == "" {
		c.App = "test"
	}
	if c.Expires.IsZero() {
		c.Issued, c.Expires = now, now.Add(time.Hour)
	}
	c.Concurrency = max(s.places, 1)
	token, err := identity.Issue(s.signer, c)
	if err != nil {
		t.Fatal(err)
	}
	return token
}

// say sends an opening message and returns the answer.
func say(t *testing.T, c io.ReadWriter, m wire.Message) wire.Message {
	t.Helper()
	if err := wire.Write(c, m); err != nil {
		t.Fatal(err)
	}
	answer, err := wire.Read(c, wire.Version{})
	if err != nil {
		t.Fatal(err)
	}
	return answer
}

func (p *peer) open() wire.Message {
	return wire.Message{Open: &wire.Open{Version: wire.Current, App: "test", Token: p.token}}
}

// dial makes a TLS connection whose records the test writes from here on.
func (p *peer) dial(t *testing.T, to string) (*tunneltest.Records, *tls.Conn, net.Conn) {
	t.Helper()
	tcp, err := net.Dial("tcp", to)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { tcp.Close() })
	log := &tunneltest.KeyLog{}
	conf := p.tls.Clone()
	conf.KeyLogWriter = log
	conn := tls.Client(tcp, conf)
	conn.SetDeadline(time.Now().Add(patience))
	if err := conn.Handshake(); err != nil {
		t.Fatal(err)
	}
	w, err := log.Records(tcp, conn.ConnectionState())
	if err != nil {
		t.Skip(err)
	}
	return w, conn, tcp
}

// greet is say on records that the test writes.
func greet(t *testing.T, w io.Writer, conn *tls.Conn, m wire.Message) wire.Welcome {
	t.Helper()
	answer := say(t, struct {
		io.Reader
		io.Writer
	}{conn, w}, m)
	if answer.Welcome == nil {
		t.Fatalf("%+v", answer.Refused)
	}
	go io.Copy(io.Discard, conn) // what answers the flood
	return *answer.Welcome
}

// yamux is a frame of the TLS carrier without a body: type 0 is data, 1 a window, 2 a
// ping; flag 1 opens, 8 resets.
func yamux(kind byte, flags uint16, stream, length uint32) []byte {
	b := append([]byte{0, kind}, make([]byte, 10)...)
	binary.BigEndian.PutUint16(b[2:], flags)
	binary.BigEndian.PutUint32(b[4:], stream)
	binary.BigEndian.PutUint32(b[8:], length)
	return b
}

// floods says for each how it is begun. What is returned goes on until it fails.
func floods(t *testing.T, s *site) map[string]func(*peer) (more func() error) {
	carrier := func(frame func() []byte) func(*peer) func() error {
		return func(p *peer) func() error {
			w, conn, _ := p.dial(t, s.listen)
			greet(t, w, conn, p.open())
			w.Write(yamux(1, 1, 1, 0))
			return func() error {
				var many []byte
				for range 500 {
					many = append(many, frame()...)
				}
				_, err := w.Write(many)
				return err
			}
		}
	}
	rekeys := func(lane bool, data []byte, updates int, answer bool) func(*peer) func() error {
		return func(p *peer) func() error {
			w, conn, tcp := p.dial(t, s.listen)
			welcome := greet(t, w, conn, p.open())
			if lane {
				w, conn, tcp = p.dial(t, s.listen)
				greet(t, w, conn, wire.Message{Join: &wire.Join{Version: wire.Current, Session: welcome.Session, As: wire.AsLane}})
			} else {
				w.Write(yamux(1, 1, 1, 0))
			}
			return func() error {
				var many []byte
				for range 100 {
					if data != nil {
						many = w.Append(many, tunneltest.ApplicationData, data, 0)
					}
					for range updates {
						many, _ = w.AppendKeyUpdate(many, answer)
					}
				}
				_, err := tcp.Write(many)
				return err
			}
		}
	}
	stream := uint32(1)
	datagram := append([]byte{0, 102, 0, 0}, make([]byte, 100)...) // of a lane: length of what follows, send time
	return map[string]func(*peer) (more func() error){
		"TLS, pings":   carrier(func() []byte { return yamux(2, 1, 0, rand.Uint32()) }),
		"TLS, windows": carrier(func() []byte { return yamux(1, 0, 1, 1) }),
		"TLS, streams opened and reset": carrier(func() []byte {
			stream += 2
			return append(yamux(1, 1, stream, 0), yamux(1, 8, stream, 0)...)
		}),
		"TLS, KeyUpdates":                      rekeys(false, nil, 1, false),
		"TLS, KeyUpdates that ask for another": rekeys(false, nil, 1, true),
		"TLS, KeyUpdates between data":         rekeys(false, yamux(1, 0, 1, 1), 5, true),
		"lane, KeyUpdates between datagrams":   rekeys(true, datagram, 1, true),
		"QUIC, streams opened and reset": func(p *peer) func() error {
			d, err := tunnelquic.NewDialer(tunnelquic.Config{TLS: p.tls})
			if err != nil {
				t.Fatal(err)
			}
			ctx, cancel := context.WithTimeout(t.Context(), patience)
			t.Cleanup(cancel)
			c, err := d.Dial(ctx, s.listen)
			if err != nil {
				t.Fatal(err)
			}
			if m := say(t, c, p.open()); m.Welcome == nil {
				t.Fatalf("%+v", m.Refused)
			}
			carrier, err := c.Carrier()
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { carrier.Close(nil) })
			return func() error {
				st, err := carrier.OpenStream(ctx)
				if err != nil {
					return err
				}
				st.Write([]byte{0})
				st.Abort(nil)
				return nil
			}
		},
	}
}

// steady counts how many of the datagrams that are sent every 5 ms come back.
func (a *association) steady(to netip.AddrPort, over <-chan struct{}, least time.Duration) (sent, came int) {
	done := make(chan int)
	stop := make(chan struct{})
	go func() {
		n := 0
		for {
			if _, err := a.receive(100 * time.Millisecond); err == nil {
				n++
				continue
			}
			select {
			case <-stop:
				done <- n
				return
			default:
			}
		}
	}()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for began := time.Now(); ; {
		<-tick.C
		if time.Since(began) > least {
			select {
			case <-over:
				close(stop)
				return sent, <-done
			default:
			}
		}
		a.send(make([]byte, 160), to)
		sent++
	}
}

// share is the part of what others send that comes back, by what carries them.
func share(others []*association, far netip.AddrPort, over <-chan struct{}) []float64 {
	const least = 250 * time.Millisecond
	shares := make([]float64, len(others))
	var wg sync.WaitGroup
	for i, a := range others {
		wg.Go(func() {
			sent, came := a.steady(far, over, least)
			shares[i] = float64(came) / float64(sent)
		})
	}
	wg.Wait()
	return shares
}

// One tenant that floods the cloud proxy is cut, and what others have under way
// goes on.
func TestATenantThatFloodsIsCutAndOthersKeepTheirMedia(t *testing.T) {
	if testing.Short() {
		t.Skip("six seconds")
	}
	far := newEcho(t)
	s := newSite(t)
	s.places = 100
	cloud, _ := s.cloud(t)
	var sidecars []*assemble.Sidecar
	var others []*association
	for _, mode := range bothCarriers {
		sc := s.sidecar(t, mode)
		a := associate(t, sc.Front.Addr())
		eventually(t, "the first echo", func() bool { return a.echoes(t, "first", far.addr) })
		sidecars, others = append(sidecars, sc), append(others, a)
	}
	now := make(chan struct{})
	close(now)
	for name, begin := range floods(t, s) {
		t.Run(name, func(t *testing.T) {
			before := share(others, far.addr, now)
			more := begin(s.peer(t))
			lines := strings.Count(s.log.String(), string(tunnel.LimitExceeded))
			cut := make(chan struct{})
			var took time.Duration
			go func() {
				defer close(cut)
				began := time.Now()
				for more() == nil && time.Since(began) < patience {
				}
				for cloud.Sessions() > len(others) && time.Since(began) < patience {
					time.Sleep(time.Millisecond)
				}
				took = time.Since(began)
			}()
			during := share(others, far.addr, cut)
			if took >= patience || strings.Count(s.log.String(), string(tunnel.LimitExceeded)) == lines {
				t.Errorf("after %v the flood goes on, or was not named", took)
			}
			for i, mode := range bothCarriers {
				if during[i] < before[i]/2 {
					t.Errorf("of the datagrams of another that uses %s %.1f %% came back, before %.1f %%", mode, 100*during[i], 100*before[i])
				}
				t.Logf("cut after %v; of the datagrams of another that uses %s %.1f %% came back, before %.1f %%", took.Round(time.Millisecond), mode, 100*during[i], 100*before[i])
			}
		})
	}
	for _, sc := range sidecars {
		if n := sc.Link.Stats().Connects; n != 1 {
			t.Errorf("another connected %d times", n)
		}
	}
}
