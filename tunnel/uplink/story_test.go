package uplink

import (
	"context"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"culvert/tunnel"
	"culvert/tunnel/tunneltest"
	"culvert/tunnel/wire"
)

// costs fails where a change did not take about so long, and did not cost about
// so many datagrams.
func costs(t *testing.T, c tunnel.Change, gap [2]time.Duration, up, down [2]uint64) {
	t.Helper()
	if c.Gap < gap[0] || c.Gap > gap[1] {
		t.Errorf("%v: the gap is %v, want %v", c, c.Gap, gap)
	}
	if c.LostUp < up[0] || c.LostUp > up[1] || c.Lost < down[0] || c.Lost > down[1] {
		t.Errorf("%v: lost %d up and %d down, want %d and %d", c, c.LostUp, c.Lost, up, down)
	}
}

// story is a call of 50 datagrams a second, each way, beside a network that
// changes, and what is told of it.
type story struct {
	f       *far
	r       *running
	network *network
}

// network is what happens to packets.
type network struct {
	udp, flow, datagrams, tcp atomic.Bool            // nothing passes: all UDP, the flow of sealed packets, QUIC DATAGRAM, TCP
	up, down                  atomic.Bool            // with flow: in this direction only
	restarted                 atomic.Pointer[string] // this session is not known any more
}

// tell runs one story in a bubble. The link has been up for 2 s, and a call too,
// when act begins; the sessions of the far end are real.
func tell(t *testing.T, mode tunnel.Mode, change func(*Config), call bool, act func(t *testing.T, s *story)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		n := &network{}
		const delay = 20 * time.Millisecond
		drop := func(up bool) bool {
			return n.udp.Load() || n.flow.Load() && (!n.up.Load() || up) && (!n.down.Load() || !up)
		}
		f := newFarOn(t, tunneltest.Config{
			Flow: true, Packet: func(up bool, _ []byte) tunneltest.Fate { return tunneltest.Fate{Delay: delay, Drop: drop(up)} },
			Datagram: func(bool, []byte) tunneltest.Fate {
				return tunneltest.Fate{Delay: delay, Drop: n.udp.Load() || n.datagrams.Load()}
			},
		}, first, second)
		defer f.end()
		f.real(0)
		answer := f.answer
		f.answer = func(kind, address string, m wire.Message) *wire.Message {
			if old := n.restarted.Load(); m.Join != nil && old != nil && m.Join.Session == *old {
				return refused(tunnel.SessionUnknown)
			}
			return answer(kind, address, m)
		}
		f.dial = func(ctx context.Context, kind, _ string, _ int) error {
			if kind == "quic" && n.udp.Load() || kind == "tls" && n.tcp.Load() {
				return silent(ctx)
			}
			return nil
		}
		s := &story{f: f, r: f.run(mode, change), network: n}
		s.r.up()
		ctx, cancel := context.WithCancel(context.Background())
		none := make(chan struct{})
		close(none)
		var ended <-chan struct{} = none
		defer func() {
			cancel()
			<-ended
			s.r.stop()
		}()
		if call {
			ended = s.r.call(ctx)
		}
		time.Sleep(3 * time.Second)
		act(t, s)
	})
}

const ms = time.Millisecond

func TestUDPThatGoesAndComesIsTold(t *testing.T) {
	tell(t, tunnel.ModeAuto, nil, true, func(t *testing.T, s *story) {
		s.network.udp.Store(true)
		c := s.r.toldTo(tunnel.ChangedDatagrams, "sealed", "lanes", tunnel.UDPBlocked)
		// 50 datagrams a second; silence is decided on after 600 ms.
		costs(t, c, [2]time.Duration{550 * ms, 1000 * ms}, [2]uint64{20, 50}, [2]uint64{0, 5})
		time.Sleep(3 * time.Second)
		s.network.udp.Store(false)
		c = s.r.toldTo(tunnel.ChangedDatagrams, "lanes", "sealed", tunnel.UDPReturned)
		costs(t, c, [2]time.Duration{0, 100 * ms}, [2]uint64{0, 0}, [2]uint64{0, 0})
	})
}

// blocked is a dialer whose packets are refused at once.
type blocked struct{ tunnel.Dialer }

func (blocked) Dial(context.Context, string) (tunnel.Candidate, error) {
	return nil, tunnel.Errorf(tunnel.UDPBlocked, "blocked")
}

func TestWhyLanesAreUsedIsTold(t *testing.T) {
	for mode, why := range map[tunnel.Mode]string{tunnel.ModeTCP: "mode is tcp", tunnel.ModeAuto: "UDP does not pass"} {
		tell(t, mode, func(c *Config) { // QUIC finds nobody
			c.QUIC = blocked{c.QUIC}
		}, false, func(t *testing.T, s *story) {
			if got := s.r.up(); got.Way != wire.WayLanes.String() || got.WayWhy != why {
				t.Errorf("mode %s: datagrams go by %s: %s, want %s", mode, got.Way, got.WayWhy, why)
			}
		})
	}
}

func TestWhatAWayLostIsNotToldAgainWhenItsConnectionEnds(t *testing.T) {
	tell(t, tunnel.ModeAuto, nil, true, func(t *testing.T, s *story) {
		s.network.udp.Store(true)
		for s.r.up().Way != wire.WayLanes.String() {
			time.Sleep(10 * ms)
		}
		s.f.nets["quic"].Cut()
		c := s.r.toldTo(tunnel.ChangedDatagrams, "sealed", "lanes", tunnel.UDPBlocked)
		costs(t, c, [2]time.Duration{550 * ms, 1000 * ms}, [2]uint64{20, 50}, [2]uint64{0, 5})
		time.Sleep(10 * time.Second)
		var up uint64
		for _, c := range s.r.changes() {
			up += c.LostUp
		}
		if up != c.LostUp {
			t.Errorf("%d lost on their way up are told in all, %d with the change that cost them", up, c.LostUp)
		}
	})
}

func TestSealedPacketsThatDoNotPassAreTold(t *testing.T) {
	for name, direction := range map[string]func(*network){
		"both ways": func(*network) {},
		"upwards":   func(n *network) { n.up.Store(true) },
		"downwards": func(n *network) { n.down.Store(true) },
	} {
		t.Run(name, func(t *testing.T) {
			tell(t, tunnel.ModeUDP, nil, true, func(t *testing.T, s *story) {
				direction(s.network)
				s.network.flow.Store(true)
				c := s.r.toldTo(tunnel.ChangedDatagrams, "sealed", "quic-datagram", tunnel.PathSilent)
				missed := uint64(c.Gap / (20 * ms))
				up, down := [2]uint64{missed * 3 / 4, missed + 5}, [2]uint64{0, 5}
				if name == "downwards" { // what the echoes answer has arrived, but that nobody can know
					up, down = [2]uint64{0, missed + 5}, up
				}
				costs(t, c, [2]time.Duration{400 * ms, 2000 * ms}, up, down)
			})
		})
	}
}

func TestAPathThatComesBackByItselfIsTold(t *testing.T) {
	tell(t, tunnel.ModeUDP, nil, true, func(t *testing.T, s *story) {
		s.network.datagrams.Store(true)
		s.network.flow.Store(true)
		time.Sleep(3 * time.Second)
		s.network.flow.Store(false)
		c := s.r.toldTo(tunnel.ChangedDatagrams, "sealed", "sealed", tunnel.PathSilent)
		costs(t, c, [2]time.Duration{2900 * ms, 3500 * ms}, [2]uint64{100, 160}, [2]uint64{0, 5})
	})
}

func TestASessionThatIsLostAndOpenedAgainIsTold(t *testing.T) {
	tell(t, tunnel.ModeAuto, nil, true, func(t *testing.T, s *story) {
		old := s.r.up().Session
		s.network.restarted.Store(&old)
		s.f.nets["quic"].Cut()
		s.f.nets["tls"].Cut()
		s.r.toldTo(tunnel.ChangedSession, old, "", tunnel.SessionUnknown)
		c := s.r.toldTo(tunnel.ChangedSession, "", "*", tunnel.SessionUnknown)
		if !c.NewPorts || c.To == old {
			t.Errorf("%v: associations have new ports, which it does not say", c)
		}
		costs(t, c, [2]time.Duration{0, 1500 * ms}, [2]uint64{0, 80}, [2]uint64{0, 5})
	})
}

func TestASessionThatExpiresIsTold(t *testing.T) {
	tell(t, tunnel.ModeAuto, nil, true, func(t *testing.T, s *story) {
		old := s.r.up().Session
		s.f.dialNow(func(context.Context, string, string, int) error {
			return tunnel.Errorf(tunnel.CloudUnreachable, "down")
		})
		s.f.nets["quic"].Cut()
		s.f.nets["tls"].Cut()
		time.Sleep(90 * time.Second)
		s.f.dialNow(func(context.Context, string, string, int) error { return nil })
		c := s.r.toldTo(tunnel.ChangedSession, old, "", tunnel.SessionExpired)
		if !strings.Contains(c.Why, "nothing has served it for 1m0s") {
			t.Errorf("%v", c)
		}
		c = s.r.toldTo(tunnel.ChangedSession, "", "*", tunnel.SessionExpired)
		if !c.NewPorts {
			t.Errorf("%v: associations have new ports, which it does not say", c)
		}
		costs(t, c, [2]time.Duration{90 * time.Second, 101 * time.Second}, [2]uint64{4000, 5500}, [2]uint64{0, 5})
	})
}

func TestAMoveToAnotherCloudProxyIsTold(t *testing.T) {
	tell(t, tunnel.ModeAuto, func(c *Config) { c.Proxies = []string{first, second} }, true, func(t *testing.T, s *story) {
		s.f.dialNow(func(_ context.Context, _, address string, _ int) error {
			if address == first {
				return tunnel.Errorf(tunnel.CloudUnreachable, "down")
			}
			return nil
		})
		s.f.nets["quic"].Cut()
		s.f.nets["tls"].Cut()
		c := s.r.toldTo(tunnel.ChangedCloudProxy, first, second, tunnel.CloudProxyGone)
		if !c.NewPorts {
			t.Errorf("%v: associations have new ports, which it does not say", c)
		}
		c = s.r.toldTo(tunnel.ChangedSession, "", "*", tunnel.CloudUnreachable)
		costs(t, c, [2]time.Duration{time.Second, lonely + 5*time.Second}, [2]uint64{0, 100}, [2]uint64{0, 5})
		var up uint64 // a datagram is told of once
		for _, c := range s.r.changes() {
			up += c.LostUp
		}
		if gone := uint64(c.Gap / (20 * ms)); up < gone*3/4 || up > gone+10 {
			t.Errorf("%d lost on their way up in %v, want %d", up, c.Gap, gone)
		}
	})
}

func TestAnUplinkGivesUpAfterTwentyMinutesAndCanBeStartedAgain(t *testing.T) {
	for name, busy := range map[string]bool{"with an app": true, "without": false} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := newFar(t, first)
				defer f.end()
				r := f.run(tunnel.ModeAuto, nil)
				r.up()
				closed := make(lastWord, 1)
				if busy {
					if _, err := r.OpenPackets(tunnel.Peer{}, closed); err != nil {
						t.Fatal(err)
					}
				}
				f.dialNow(func(context.Context, string, string, int) error {
					return tunnel.Errorf(tunnel.CloudUnreachable, "down")
				})
				f.nets["quic"].Cut()
				f.nets["tls"].Cut()
				began := time.Now()
				err := <-r.over
				if took := time.Since(began); took < giveUp || took > giveUp+2*maxBackoff {
					t.Errorf("given up after %v, want %v", took, giveUp)
				}
				if tunnel.CodeOf(err) != tunnel.CloudUnreachable || !strings.Contains(tunnel.Sentence(err), "down") {
					t.Errorf("the link ended with %v, want its last cause", err)
				}
				if busy {
					if why := <-closed; tunnel.CodeOf(why) != tunnel.CloudUnreachable {
						t.Errorf("the association ended with %v", why)
					}
				}
				// What was lost for so long may be there again in a moment.
				f.dialNow(func(context.Context, string, string, int) error { return nil })
				ctx, cancel := context.WithCancel(t.Context())
				up := make(chan struct{})
				over := make(chan error, 1)
				go func() {
					over <- r.Run(ctx, tunnel.ModeAuto, func(s tunnel.LinkState) {
						if s.Phase == tunnel.LinkUp {
							select {
							case <-up:
							default:
								close(up)
							}
						}
					})
				}()
				select {
				case <-up:
				case err := <-over:
					t.Fatalf("started again it ended with %v", err)
				}
				cancel()
				if err := <-over; err != nil {
					t.Error(err)
				}
			})
		})
	}
}
