package channel

import (
	"bufio"
	"cmp"
	"encoding/hex"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// epoch is a fixed time: nothing here depends on when it runs.
var epoch = time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)

var far = target("203.0.113.5:3478")

func target(s string) Target {
	a := netip.MustParseAddrPort(s)
	return Target{Addr: a.Addr(), Port: a.Port()}
}

var me = Owner{Addr: netip.MustParseAddr("127.0.0.1")}

// fact is one recorded packet.
type fact struct {
	at time.Duration
	up bool
	p  []byte
}

// recording reads a file of testdata; its first line says how it was made.
func recording(tb testing.TB, name string) []fact {
	tb.Helper()
	f, err := os.Open("testdata/" + name + ".txt")
	if err != nil {
		tb.Fatal(err)
	}
	defer f.Close()
	var all []fact
	for s := bufio.NewScanner(f); s.Scan(); {
		line := s.Text()
		if strings.HasPrefix(line, "#") {
			continue
		}
		var ms, n int
		var dir, text string
		if _, err := fmt.Sscan(line, &ms, &dir, &n, &text); err != nil {
			tb.Fatalf("%s: %q: %v", name, line, err)
		}
		p, err := hex.DecodeString(text)
		if err != nil || len(p) > n {
			tb.Fatalf("%s: %q: %v", name, line, err)
		}
		all = append(all, fact{time.Duration(ms) * time.Millisecond, dir == "up", append(p, make([]byte, n-len(p))...)})
	}
	if len(all) == 0 {
		tb.Fatalf("%s is empty", name)
	}
	return all
}

// states is a channel's life as seen each 100 ms: "0.0 - | 1.2 live | 35.0 quiet".
type states struct {
	text []string
	last string
	seen []string // the evidence at the last time there was any
}

func (s *states) look(w *Watcher, at time.Duration) {
	now, is := epoch.Add(at), "-"
	for _, c := range w.Channels(now) {
		is, s.seen = c.State, c.Evidence
	}
	if is != s.last {
		s.last = is
		s.text = append(s.text, fmt.Sprintf("%.1f %s", at.Seconds(), is))
	}
}

func (s *states) String() string { return strings.Join(s.text, " | ") }

// play feeds facts through feed, looking each 100 ms (after 70 s each second),
// and goes on looking.
func play(w *Watcher, facts []fact, after time.Duration, feed func(fact, time.Time)) *states {
	s := &states{}
	var at time.Duration
	until := func(end time.Duration) {
		for at <= end {
			s.look(w, at)
			if at += 100 * time.Millisecond; at > 70*time.Second {
				at = (at + 999*time.Millisecond).Truncate(time.Second)
			}
		}
	}
	for _, f := range facts {
		until(f.at)
		feed(f, epoch.Add(f.at))
	}
	until(at + after)
	return s
}

func newWatcher(cfg Config) *Watcher {
	cfg.Epoch = epoch
	return New(cfg)
}

func TestRealTrafficIsJudgedByItsHeaders(t *testing.T) {
	for _, c := range []struct {
		name     string
		stream   bool
		want     string
		evidence string // a part of the last
	}{
		{"pion-call", false, "0.0 - | 0.2 live | 9.1 -", "RTP ssrc 0x"},
		{"pion-viewer", false, "0.0 - | 0.2 live | 9.1 -", "down in"},
		{"pion-data", false, "0.0 - | 0.3 live | 17.1 -", "STUN consent"},
		{"pion-turn-udp", false, "0.0 - | 2.3 live | 11.1 -", "inside TURN"},
		{"pion-turn-tcp", true, "0.0 - | 2.1 live | 11.1 -", "inside TURN on TCP"},
		{"baresip-rtp", false, "0.0 - | 0.5 live | 36.2 quiet | 607.0 -", "on hold"},
		{"baresip-rtcp", false, "0.0 -", ""},
		{"baresip-sip", false, "0.0 -", ""},
		{"dns", false, "0.0 -", ""},
		{"quic", false, "0.0 -", ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			w := newWatcher(Config{})
			var s *states
			if c.stream {
				f := w.OpenStream(me, far)
				s = play(w, recording(t, c.name), 11*time.Minute, func(p fact, now time.Time) { f.Data(p.up, p.p, now) })
			} else {
				f := w.OpenSocket(me)
				s = play(w, recording(t, c.name), 11*time.Minute, func(p fact, now time.Time) { f.Packet(p.up, far, p.p, now) })
			}
			if s.String() != c.want {
				t.Errorf("%s\nwant %s", s, c.want)
			}
			if !strings.Contains(strings.Join(s.seen, "\n"), c.evidence) {
				t.Errorf("the evidence %q has no %q", s.seen, c.evidence)
			}
		})
	}
}

func TestABaresipCallEndsWithTheGoodbyeOnItsOtherSocket(t *testing.T) {
	w := newWatcher(Config{})
	var all []fact
	sockets := map[string]*Socket{}
	from := map[*byte]*Socket{}
	for _, name := range []string{"baresip-sip", "baresip-rtp", "baresip-rtcp"} {
		sockets[name] = w.OpenSocket(me)
		for _, f := range recording(t, name) {
			all = append(all, f)
			from[&f.p[0]] = sockets[name]
		}
	}
	slices.SortStableFunc(all, func(a, b fact) int { return cmp.Compare(a.at, b.at) })
	got := play(w, all, time.Minute, func(f fact, now time.Time) { from[&f.p[0]].Packet(f.up, far, f.p, now) })
	if want := "0.0 - | 0.5 live | 11.3 -"; got.String() != want {
		t.Errorf("%s\nwant %s", got, want)
	}
}
