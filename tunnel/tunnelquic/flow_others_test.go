//go:build linux && (amd64 || arm64 || arm || riscv64)

package tunnelquic

import (
	"bytes"
	"maps"
	"slices"
	"sync"
	"sync/atomic"
	"testing"

	"culvert/tunnel"
	"culvert/tunnel/media"
	"culvert/tunnel/wire"
)

// overheard is a flow whose packets somebody copies.
type overheard struct {
	tunnel.Flow
	mu   sync.Mutex
	sent [][]byte
}

func (o *overheard) Send(p []byte, to tunnel.Path) error {
	o.mu.Lock()
	o.sent = append(o.sent, bytes.Clone(p))
	o.mu.Unlock()
	return o.Flow.Send(p, to)
}

// One session has seen all packets of another, and sends what it can make of
// them to the cloud proxy that serves both.
func TestOneSessionCanNotDisturbAnother(t *testing.T) {
	s, c, _ := configs(t)
	key := [32]byte{1, 2, 3}
	l := listen(t, Config{TLS: s, StatelessResetKey: &key})
	type ends struct {
		client, server tunnel.Carrier
		near, far      *media.Sealed
		wire           *overheard
		came           atomic.Int64
	}
	open := func(root byte) *ends {
		e := &ends{}
		e.client, e.server = carriers(t, l, dialer(t, c))
		e.wire = &overheard{Flow: e.client.Flow()}
		var err error
		if e.far, err = media.NewSealed(media.SealedConfig{Flow: e.server.Flow(), Root: bytes.Repeat([]byte{root}, 32), AEAD: wire.AES128GCM}); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(e.far.Close)
		if e.near, err = media.NewSealed(media.SealedConfig{Flow: e.wire, Root: bytes.Repeat([]byte{root}, 32), AEAD: wire.AES128GCM, Near: true}); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(e.near.Close)
		e.far.Start(func([]byte) { e.came.Add(1) }, func() {})
		e.near.Start(func([]byte) {}, func() {})
		return e
	}
	record := append([]byte{0, 1, 0, 0}, make([]byte, 100)...)
	pass := func(e *ends, n int) {
		t.Helper()
		for range n {
			before := e.came.Load()
			soon(t, "a packet arrives", func() bool {
				if err := e.near.Send(record); err != nil {
					t.Fatal(err)
				}
				return e.came.Load() > before
			})
		}
	}
	victim, attacker := open(1), open(2)
	pass(victim, 50)
	pass(attacker, 1)
	path := victim.far.Stats().Path
	own := attacker.wire.sent[0]
	for name, c := range map[string]struct {
		of     func(p []byte) []byte // what is made of a packet of the victim's
		reason string                // under which the victim's way counts it
	}{
		"copied":                  {func(p []byte) []byte { return p }, "replayed"},
		"a counter far ahead":     {func(p []byte) []byte { p[9] = 0x3f; return p }, "not_authentic"},
		"a counter without end":   {func(p []byte) []byte { p[9] = 0xff; return p }, "not_authentic"},
		"another record":          {func(p []byte) []byte { p[9], p[20] = 1, p[20]^1; return p }, "not_authentic"},
		"cut":                     {func(p []byte) []byte { return p[:media.SealedOverhead-1] }, "truncated"},
		"longer than can be read": {func(p []byte) []byte { return append(p, make([]byte, maxPacket)...) }, "truncated"},
		"the attacker's own, with the victim's ID": {func(p []byte) []byte {
			q := bytes.Clone(own)
			copy(q[1:9], p[1:9])
			q[9] = 1
			return q
		}, "not_authentic"},
	} {
		before := victim.far.Lost()
		victim.wire.mu.Lock()
		seen := slices.Clone(victim.wire.sent)
		victim.wire.mu.Unlock()
		for _, p := range seen[:50] {
			if err := attacker.wire.Flow.Send(c.of(bytes.Clone(p)), attacker.wire.Path()); err != nil {
				t.Fatal(err)
			}
		}
		soon(t, name+": it is counted", func() bool { return victim.far.Lost()[c.reason] > before[c.reason] })
		pass(victim, 5)
	}
	if st := victim.far.Stats(); st.Moves != 0 || st.Path != path || st.Epoch != 0 {
		t.Errorf("the victim's way goes to %v after %d moves, before it went to %v", st.Path, st.Moves, path)
	}
	if lost := victim.far.Lost(); !slices.Equal(slices.Sorted(maps.Keys(lost)), []string{"not_authentic", "replayed", "truncated"}) {
		t.Errorf("the victim's way counts %v", lost)
	}
	if lost := attacker.far.Lost(); len(lost) != 0 {
		t.Errorf("the attacker's way counts %v", lost)
	}
	for _, e := range []*ends{victim, attacker} {
		pass(e, 5)
		if err := works(e.client, e.server); err != nil {
			t.Error(err)
		}
	}
}
