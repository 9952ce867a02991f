package media

import (
	"bytes"
	"errors"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"testing"

	"culvert/tunnel"
	"culvert/tunnel/wire"
)

var (
	testRoot = bytes.Repeat([]byte{0x2a}, rootSize)
	nearPath = pathOf("192.0.2.1:40000") // where the far end sees the near end
	farPath  = pathOf("198.51.100.1:443")
	newPath  = pathOf("192.0.2.77:41000") // where the near end has gone
)

func pathOf(s string) tunnel.Path { return tunnel.Path{Remote: netip.MustParseAddrPort(s)} }

// A sealedParcel is a packet that has been given to a flow.
type sealedParcel struct {
	p  []byte
	to tunnel.Path
}

// flow is a tunnel.Flow whose packets wait until the test carries them.
type memFlow struct {
	mu      sync.Mutex
	path    tunnel.Path
	claims  map[[8]byte]func([]byte, tunnel.Path) bool
	watches map[[16]byte]func()
	resets  bool // it has reset tokens
	sent    []sealedParcel
	late    atomic.Uint64
	fails   func(n int) error // what Send returns for a packet of n bytes; nil: nothing fails
}

func newFlow(path tunnel.Path) *memFlow {
	return &memFlow{path: path, claims: map[[8]byte]func([]byte, tunnel.Path) bool{}, watches: map[[16]byte]func(){}}
}

func (f *memFlow) Claim(id [8]byte, recv func([]byte, tunnel.Path) bool) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.claims[id] != nil {
		return errors.New("claimed already")
	}
	f.claims[id] = recv
	return nil
}

func (f *memFlow) Release(id [8]byte) {
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.claims, id)
}

func (f *memFlow) Send(p []byte, to tunnel.Path) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.fails != nil {
		if err := f.fails(len(p)); err != nil {
			return err
		}
	}
	f.sent = append(f.sent, sealedParcel{slices.Clone(p), to})
	return nil
}

func (f *memFlow) Path() tunnel.Path {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.path
}

func (f *memFlow) Late() uint64 { return f.late.Load() }

func (f *memFlow) ResetToken(id [8]byte) (token [16]byte, ok bool) {
	copy(token[8:], id[:])
	return token, f.resets
}

func (f *memFlow) WatchReset(token [16]byte, g func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if g == nil {
		delete(f.watches, token)
	} else {
		f.watches[token] = g
	}
}

// arrive gives the flow a packet. claimed: somebody has its ID; taken: and kept it.
func (f *memFlow) arrive(p []byte, from tunnel.Path) (claimed, taken bool) {
	if len(p) < 9 {
		return false, false
	}
	f.mu.Lock()
	recv := f.claims[[8]byte(p[1:9])]
	f.mu.Unlock()
	return recv != nil, recv != nil && recv(slices.Clone(p), from)
}

func (f *memFlow) take() []sealedParcel {
	f.mu.Lock()
	defer f.mu.Unlock()
	out := f.sent
	f.sent = nil
	return out
}

// An end is a sealed way with what it has received, and a plane that answers probes.
type end struct {
	*Sealed
	flow *memFlow
	got  []string // records that are no notices
	rest []wire.Notice
}

func newEnd(t testing.TB, near bool, aead string, limit uint64, onReset func()) *end {
	t.Helper()
	e := &end{flow: newFlow(nearPath)}
	if near {
		e.flow = newFlow(farPath)
	}
	e.flow.resets = !near
	var err error
	if e.Sealed, err = newSealed(SealedConfig{Flow: e.flow, Root: testRoot, AEAD: aead, Near: near, OnReset: onReset}, limit, 0); err != nil {
		t.Fatal(err)
	}
	e.Start(func(p []byte) {
		if !wire.IsNotice(p) {
			e.got = append(e.got, string(p))
			return
		}
		_, _, n, _, _ := wire.ParseRecord(p)
		if n.Probe != nil {
			e.Send((&wire.Answer{Nonce: n.Probe.Nonce, Size: uint16(n.Probe.Size)}).Append(nil))
		}
		e.rest = append(e.rest, n)
	}, nil)
	return e
}

// A pair is both ends and the network between them.
type pair struct {
	near, far *end
	from      tunnel.Path // where near's packets come from, and where far's must go to reach it
	mtu       int         // longer packets vanish; 0: none do
	lose      func(p sealedParcel, up bool) bool
	epochs    map[[8]byte]int // see epochOf
}

func newPair(t testing.TB, aead string, limit uint64) *pair {
	return &pair{near: newEnd(t, true, aead, limit, nil), far: newEnd(t, false, aead, limit, nil), from: nearPath}
}

// carry carries packets both ways until there are none left, and returns them.
func (w *pair) carry() (up, down []sealedParcel) {
	for {
		a, b := w.near.flow.take(), w.far.flow.take()
		if len(a)+len(b) == 0 {
			return up, down
		}
		up, down = append(up, a...), append(down, b...)
		for _, p := range a {
			if !w.lost(p, true) {
				w.far.flow.arrive(p.p, w.from)
			}
		}
		for _, p := range b {
			if !w.lost(p, false) && p.to == w.from {
				w.near.flow.arrive(p.p, farPath)
			}
		}
	}
}

func (w *pair) lost(p sealedParcel, up bool) bool {
	return w.mtu > 0 && len(p.p) > w.mtu || w.lose != nil && w.lose(p, up)
}

// record makes a record that is no notice.
func record(s string) []byte { return append([]byte{0, 1, 0, 0}, s...) }

func (e *end) say(t testing.TB, records ...string) {
	t.Helper()
	for _, r := range records {
		if err := e.Send(record(r)); err != nil {
			t.Fatal(err)
		}
	}
}

// heard returns what has come since the last call, without the headers.
func (e *end) heard() (all []string) {
	for _, r := range e.got {
		all = append(all, r[4:])
	}
	e.got = nil
	return all
}
