package assemble

import (
	"bytes"
	"context"
	"log/slog"
	"net/netip"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"culvert/cmd/internal/config"
)

type writerFunc func(p []byte)

func (f writerFunc) Write(p []byte) (int, error) { f(p); return len(p), nil }

func TestFiguresAreLoggedOnceAMinuteWhileTheyChangeAndAtTheEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		lines := make(chan string, 8)
		var now atomic.Pointer[figures]
		now.Store(&figures{})
		ctx, cancel := context.WithCancel(t.Context())
		go logFigures(ctx, func() figures { return *now.Load() }, slog.New(slog.NewTextHandler(writerFunc(func(p []byte) { lines <- string(p) }), nil)))
		after := func(d time.Duration, want string) {
			t.Helper()
			time.Sleep(d)
			synctest.Wait()
			got := ""
			for len(lines) > 0 {
				got += <-lines
			}
			if want == "" && got != "" || !strings.HasSuffix(got, want) || strings.Count(got, "\n") > 1 {
				t.Errorf("logged %q, want %q", got, want)
			}
		}
		after(figuresEvery+time.Second, "")
		now.Store(&figures{1, 2, 3, 4, 5, map[string]uint64{"egress_full": 6, droppedName: 7}})
		after(figuresEvery, "msg=egress sessions=1 associations=2 streams=3 sent=4 received=5 dropped.egress_full=6 dropped.name_unresolved=7\n")
		after(3*figuresEvery, "")
		now.Store(&figures{sent: 4, received: 5, dropped: map[string]uint64{"egress_full": 8}})
		after(figuresEvery, "sent=4 received=5 dropped.egress_full=8\n")
		now.Store(&figures{sent: 9, received: 5, dropped: map[string]uint64{"egress_full": 8}})
		cancel()
		after(0, "sent=9 received=5 dropped.egress_full=8\n")
	})
}

func TestNothingIsLoggedOfACloudProxyThatNobodyUsed(t *testing.T) {
	var text bytes.Buffer
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	logFigures(ctx, func() figures { return figures{dropped: map[string]uint64{}} }, slog.New(slog.NewTextHandler(&text, nil)))
	if text.Len() > 0 {
		t.Errorf("logged %q", &text)
	}
}

func TestEgressIsAsConfigured(t *testing.T) {
	c, err := egressConfig(&config.Egress{IPv4: "192.0.2.1", IPv6: "2001:db8::1", Public: config.List{"198.51.100.5", "2001:db8::5"}, Idle: config.Duration(time.Minute), Associations: 7, Streams: 8})
	if err != nil {
		t.Fatal(err)
	}
	if c.Local4 != netip.MustParseAddr("192.0.2.1") || c.Local6 != netip.MustParseAddr("2001:db8::1") || c.Idle != time.Minute || c.MaxAssociations != 7 || c.MaxStreams != 8 ||
		len(c.Public) != 2 || c.Public[0] != netip.MustParseAddr("198.51.100.5") || c.Public[1] != netip.MustParseAddr("2001:db8::5") {
		t.Errorf("%+v", c)
	}
}

func TestCloudProxiesWithOneResetKeyDoNotKnowEachOthersTokens(t *testing.T) {
	secret := make([]byte, 32)
	a, err := resetKey(secret, "a.example.net:443")
	if err != nil {
		t.Fatal(err)
	}
	b, err := resetKey(secret, "b.example.net:443")
	if err != nil || *a == *b {
		t.Errorf("%x and %x, %v", *a, *b, err)
	}
}
