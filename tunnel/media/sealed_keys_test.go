package media

import (
	"bufio"
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"

	"golang.org/x/crypto/chacha20poly1305"

	"culvert/tunnel/wire"
)

// vectors reads the fenced blocks of one kind, as lines of "name value".
func vectors(t *testing.T, file string) (all []map[string]string) {
	t.Helper()
	f, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var v map[string]string
	for sc := bufio.NewScanner(f); sc.Scan(); {
		name, value, _ := strings.Cut(sc.Text(), " ")
		switch {
		case v == nil && sc.Text() == "```sealed":
			v = map[string]string{}
		case v != nil && strings.HasPrefix(sc.Text(), "```"):
			all, v = append(all, v), nil
		case v != nil:
			v[name] += strings.ReplaceAll(value, " ", "")
		}
	}
	return all
}

func unhex(t *testing.T, s string) []byte {
	t.Helper()
	b, err := hex.DecodeString(s)
	if err != nil {
		t.Fatalf("%q: %v", s, err)
	}
	return b
}

// expandByHand is HKDF-Expand (RFC 5869 §2.3) for SHA-256, from HMAC alone.
func expandByHand(root []byte, info string, n int) (out []byte) {
	var last []byte
	for i := byte(1); len(out) < n; i++ {
		h := hmac.New(sha256.New, root)
		h.Write(last)
		h.Write([]byte(info))
		h.Write([]byte{i})
		last = h.Sum(nil)
		out = append(out, last...)
	}
	return out[:n]
}

func TestTheKnownAnswersAreWhatTheDocumentSays(t *testing.T) {
	inDocument, inFile := vectors(t, "../wire/PROTOCOL.md"), vectors(t, "testdata/sealed.md")
	if len(inFile) < 6 || len(inDocument) != len(inFile) {
		t.Fatalf("%d vectors in testdata/sealed.md and %d in PROTOCOL.md", len(inFile), len(inDocument))
	}
	seen := map[string]bool{}
	for i, v := range inFile {
		t.Run(fmt.Sprintf("%s from %s epoch %s counter %s", v["aead"], v["direction"], v["epoch"], v["counter"]), func(t *testing.T) {
			for name, value := range v {
				if inDocument[i][name] != value {
					t.Errorf("%s is %s in the file and %s in the document", name, value, inDocument[i][name])
				}
			}
			var direction byte
			var epoch, counter uint32
			fmt.Sscan(v["direction"], &direction)
			fmt.Sscan(v["epoch"], &epoch)
			fmt.Sscan(v["counter"], &counter)
			seen[v["aead"]+v["direction"]] = true
			root, record, packet := unhex(t, v["root"]), unhex(t, v["record"]), unhex(t, v["packet"])

			// By hand, from the document's words.
			info := func(what string) string {
				return "culvert sealed " + v["aead"] + " " + what + string([]byte{direction}) + string(binary.BigEndian.AppendUint32(nil, epoch))
			}
			keySize := map[string]int{"aes-128-gcm": 16, "chacha20-poly1305": 32}[v["aead"]]
			key, iv, id := expandByHand(root, info("key"), keySize), expandByHand(root, info("iv"), 12), expandByHand(root, info("id"), 8)
			for name, b := range map[string][]byte{"key": key, "iv": iv, "id": id} {
				if hex.EncodeToString(b) != v[name] {
					t.Errorf("%s is %x, the vector has %s", name, b, v[name])
				}
			}
			var aead cipher.AEAD
			if keySize == 32 {
				aead, _ = chacha20poly1305.New(key)
			} else {
				block, _ := aes.NewCipher(key)
				aead, _ = cipher.NewGCM(block)
			}
			nonce := slices.Clone(iv)
			for i, b := range binary.BigEndian.AppendUint32(nil, counter) {
				nonce[8+i] ^= b
			}
			header := append([]byte{packet[0]}, id...)
			header = append(header, byte(counter>>16), byte(counter>>8), byte(counter))
			if packet[0]>>6 != 1 {
				t.Errorf("the first byte is %#x", packet[0])
			}
			if want := aead.Seal(header, nonce, record, header); !bytes.Equal(packet, want) {
				t.Errorf("the packet by hand is\n%x, the vector has\n%x", want, packet)
			}

			// By the code.
			k, err := deriveEpoch(root, v["aead"], direction, epoch)
			if err != nil || !bytes.Equal(k.iv[:], iv) || !bytes.Equal(k.id[:], id) {
				t.Fatalf("the code derives %x and %x, %v", k.iv, k.id, err)
			}
			e := &openEpoch{epochKeys: k}
			o := &opener{limit: epochPackets, cur: e}
			sc := &scratch{}
			if v, _, _ := o.open(sc, e, packet); v != opened || !bytes.Equal(sc.buf, record) {
				t.Errorf("the code opens it as %q, %x", verdictWords[v], sc.buf)
			}
			s := &sealer{limit: epochPackets}
			out := &sealEpoch{epochKeys: k}
			out.next.Store(uint64(counter))
			s.epoch.Store(out)
			if err := s.seal(sc, record); err != nil || !bytes.Equal(sc.buf[1:12], packet[1:12]) || len(sc.buf) != len(packet) {
				t.Errorf("the code seals it as %x, %v", sc.buf, err)
			}
		})
	}
	if len(seen) != 4 {
		t.Errorf("the vectors do not have both AEADs in both directions: %v", seen)
	}
}

func TestEachPurposeHasItsOwnKeys(t *testing.T) {
	seen := map[string]string{}
	for _, root := range [][]byte{testRoot, bytes.Repeat([]byte{1}, rootSize)} {
		for _, aead := range PreferredAEADs() {
			for _, direction := range []byte{fromNear, fromFar} {
				for _, epoch := range []uint32{0, 1, 256, 1 << 24} {
					k, err := deriveEpoch(root, aead, direction, epoch)
					if err != nil {
						t.Fatal(err)
					}
					who := fmt.Sprintf("%x %s %d %d", root[0], aead, direction, epoch)
					sealed := k.aead.Seal(nil, make([]byte, ivSize), make([]byte, 32), nil)
					for _, what := range []string{string(k.iv[:]), string(k.id[:]), string(sealed)} {
						if other := seen[what]; other != "" {
							t.Errorf("%s has something in common with %s", who, other)
						}
						seen[what] = who
					}
				}
			}
		}
	}
}

func TestTheRootIsBoundToTheSessionAndTheNonce(t *testing.T) {
	nonce := bytes.Repeat([]byte{7}, sealedNonceSize)
	export := func(label string, context []byte, n int) ([]byte, error) {
		return fmt.Appendf(nil, "%s|%x|%d", label, context, n), nil
	}
	got, err := SealedRoot(export, "0f5e9a6c2f6d4c0c8f0d3a4be1d2c3f4", nonce)
	want := "EXPORTER-culvert-sealed|20" + hex.EncodeToString([]byte("0f5e9a6c2f6d4c0c8f0d3a4be1d2c3f4")) + strings.Repeat("07", 16) + "|32"
	if string(got) != want || err != nil {
		t.Errorf("%s, %v\nwant %s", got, err, want)
	}
	for name, c := range map[string]struct {
		session string
		nonce   []byte
	}{
		"no session": {"", nonce}, "a session that is too long": {strings.Repeat("a", 256), nonce},
		"a short nonce": {"a", nonce[1:]}, "a long nonce": {"a", append(nonce, 0)}, "no nonce": {"a", nil},
	} {
		if got, err := SealedRoot(export, c.session, c.nonce); err == nil {
			t.Errorf("%s: %s", name, got)
		}
	}
	ended := errors.New("ended")
	if _, err := SealedRoot(func(string, []byte, int) ([]byte, error) { return nil, ended }, "a", nonce); err != ended {
		t.Error(err)
	}
}

func TestTheSlowerEndDecidesTheAEAD(t *testing.T) {
	const aes, chacha = wire.AES128GCM, wire.ChaCha20Poly1305
	for name, c := range map[string]struct {
		theirs []string
		fast   bool
		want   string
	}{
		"both have AES":         {[]string{aes, chacha}, true, aes},
		"the peer has no AES":   {[]string{chacha, aes}, true, chacha},
		"this end has no AES":   {[]string{aes, chacha}, false, chacha},
		"neither has AES":       {[]string{chacha, aes}, false, chacha},
		"only AES is offered":   {[]string{aes}, false, aes},
		"something new is best": {[]string{"aegis-128l", aes}, true, aes},
		"nothing is known":      {[]string{"aegis-128l"}, true, ""},
		"nothing is offered":    {nil, true, ""},
	} {
		if got := chooseAEAD(c.theirs, c.fast); got != c.want {
			t.Errorf("%s: %q, want %q", name, got, c.want)
		}
	}
	if a, b := preferredAEADs(true), preferredAEADs(false); a[0] != aes || b[0] != chacha || len(a) != 2 || len(b) != 2 {
		t.Errorf("%q with AES, %q without", a, b)
	}
	if best := PreferredAEADs(); ChooseAEAD(best) != best[0] {
		t.Errorf("of its own %q this end takes %q", best, ChooseAEAD(best))
	}
}

func TestAConfigIsCheckedOnce(t *testing.T) {
	f := newFlow(farPath)
	good := SealedConfig{Flow: f, Root: testRoot, AEAD: wire.AES128GCM, Near: true}
	for name, change := range map[string]func(*SealedConfig){
		"a short root": func(c *SealedConfig) { c.Root = c.Root[1:] },
		"another AEAD": func(c *SealedConfig) { c.AEAD = "rot13" },
		"no flow":      func(c *SealedConfig) { c.Flow = nil },
	} {
		c := good
		change(&c)
		if _, err := NewSealed(c); err == nil {
			t.Errorf("%s is accepted", name)
		}
	}
	s, err := NewSealed(good)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := NewSealed(good); err == nil {
		t.Error("two ways receive with the same IDs")
	}
	if len(f.claims) != 2 {
		t.Errorf("%d IDs are claimed for epochs 0 and 1", len(f.claims))
	}
	s.Close()
	if len(f.claims) != 0 {
		t.Errorf("%d IDs are claimed after Close", len(f.claims))
	}
}
