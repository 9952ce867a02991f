package media

import (
	"bytes"
	"testing"

	"culvert/tunnel"
	"culvert/tunnel/wire"
)

// FuzzOpen gives the far end whatever comes. Nothing but what the near end has
// sealed may be delivered, and each once.
func FuzzOpen(f *testing.F) {
	genuine := map[string]string{}
	for epoch := range uint32(3) { // the far end has the keys of the first two
		k, err := deriveEpoch(testRoot, wire.AES128GCM, fromNear, epoch)
		if err != nil {
			f.Fatal(err)
		}
		for counter, r := range [][]byte{record("a"), (&wire.Probe{Nonce: 1, Size: 40}).Append(nil), (&wire.Answer{Nonce: 1}).Append(nil), {0, 0}, record("beyond the epoch")} {
			p := fixedPacket(&k, uint32(counter), r)
			genuine[string(p[1:12])] = string(r)
			f.Add(p)
		}
	}
	f.Fuzz(func(t *testing.T, p []byte) {
		far := newEnd(t, false, wire.AES128GCM, 4, nil)
		var now []byte // the packet that is given at the moment
		times := map[string]int{}
		far.Start(func(r []byte) {
			name := string(now[1:12])
			if want, ok := genuine[name]; !ok || want != string(r) {
				t.Errorf("%x is delivered as %x", now, r)
			}
			if times[name]++; times[name] > 1 {
				t.Errorf("%x is delivered again", now)
			}
		}, nil)
		give := func(e *openEpoch, q []byte, from tunnel.Path) {
			now = bytes.Clone(q)
			if e == nil {
				far.flow.arrive(q, from)
			} else {
				far.receive(e, q, from)
			}
		}
		give(nil, p, nearPath)
		give(nil, p, newPath)
		for _, e := range []*openEpoch{far.in.cur, far.in.next} { // as if it had each ID that is claimed
			q := bytes.Clone(p)
			if len(q) >= 9 {
				copy(q[1:], e.id[:])
			}
			give(e, q, nearPath)
		}
		for _, out := range far.flow.take() { // answers to nobody: at most three times what came
			if len(out.p) > 3*len(p) {
				t.Errorf("%d bytes are answered with %d", len(p), len(out.p))
			}
		}
	})
}

// fixedPacket seals a record with a first byte that is always the same.
func fixedPacket(k *epochKeys, counter uint32, r []byte) []byte {
	header := append([]byte{0x40}, k.id[:]...)
	header = append(header, byte(counter>>16), byte(counter>>8), byte(counter))
	return k.aead.Seal(header, k.nonce(new([ivSize]byte), counter), r, header)
}
