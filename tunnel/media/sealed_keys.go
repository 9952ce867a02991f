package media

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"runtime"
	"slices"

	"golang.org/x/crypto/chacha20poly1305"
	"golang.org/x/sys/cpu"

	"culvert/tunnel/wire"
)

// The sizes of the key schedule, in bytes. PROTOCOL.md 5.4 has it in words.
const (
	rootSize        = 32 // SHA-256's, so that the root is a pseudorandom key of HKDF as it is
	sealedNonceSize = 16 // the server's nonce in Welcome
	ivSize          = 12
	idSize          = 8

	sealedExporter = "EXPORTER-culvert-sealed"
	sealedLabel    = "culvert sealed "
)

// What a key is for: who sends.
const (
	fromNear byte = 0 // the sidecar
	fromFar  byte = 1 // the cloud proxy
)

// SealedRoot derives the root of a sealed way's keys from a TLS connection.
// export is the carrier's ExportKey; session is the session's ID, 1 to 255
// bytes; nonce is the 16 bytes that the cloud proxy has chosen for this
// connection alone. It fails with export's error or for a wrong length.
func SealedRoot(export func(label string, context []byte, n int) ([]byte, error), session string, nonce []byte) ([]byte, error) {
	if len(session) == 0 || len(session) > 255 || len(nonce) != sealedNonceSize {
		return nil, fmt.Errorf("sealed: a session of %d bytes and a nonce of %d", len(session), len(nonce))
	}
	context := append([]byte{byte(len(session))}, session...)
	return export(sealedExporter, append(context, nonce...), rootSize)
}

// PreferredAEADs returns the AEADs for wire.Open.Sealed, best first: AES where
// this machine has instructions for all of AES-GCM, else ChaCha20.
func PreferredAEADs() []string { return preferredAEADs(hasAESGCM()) }

func preferredAEADs(fastAES bool) []string {
	if fastAES {
		return []string{wire.AES128GCM, wire.ChaCha20Poly1305}
	}
	return []string{wire.ChaCha20Poly1305, wire.AES128GCM}
}

// ChooseAEAD picks one of the peer's AEADs, which come best first. The peer's
// order holds, except that an end without AES instructions takes ChaCha20 where
// it is offered: the slower end decides. It returns "" if none is known.
func ChooseAEAD(theirs []string) string { return chooseAEAD(theirs, hasAESGCM()) }

func chooseAEAD(theirs []string, fastAES bool) string {
	if !fastAES && slices.Contains(theirs, wire.ChaCha20Poly1305) {
		return wire.ChaCha20Poly1305
	}
	for _, a := range theirs {
		if aeadKeySize(a) > 0 {
			return a
		}
	}
	return ""
}

// hasAESGCM asks for AES and for the carry-less multiplication that GCM's
// authentication needs: one without the other is slower than ChaCha20.
func hasAESGCM() bool {
	switch runtime.GOARCH {
	case "amd64", "386":
		return cpu.X86.HasAES && cpu.X86.HasPCLMULQDQ && cpu.X86.HasSSE41
	case "arm64":
		return cpu.ARM64.HasAES && cpu.ARM64.HasPMULL
	case "s390x":
		return cpu.S390X.HasAES && cpu.S390X.HasAESGCM
	}
	return false
}

// aeadKeySize is the size of the key in bytes; 0: an AEAD that is not known.
func aeadKeySize(name string) int {
	switch name {
	case wire.AES128GCM:
		return 16
	case wire.ChaCha20Poly1305:
		return chacha20poly1305.KeySize
	}
	return 0
}

// epochKeys are the keys of one direction for one epoch.
type epochKeys struct {
	number uint32
	aead   cipher.AEAD
	iv     [ivSize]byte
	id     [idSize]byte
}

// deriveEpoch makes an epoch's keys. root and name have been checked.
func deriveEpoch(root []byte, name string, direction byte, number uint32) (epochKeys, error) {
	k := epochKeys{number: number}
	expand := func(what string, n int) []byte {
		info := binary.BigEndian.AppendUint32(append([]byte(sealedLabel+name+" "+what), direction), number)
		b, err := hkdf.Expand(sha256.New, root, string(info), n)
		if err != nil {
			// Only for more than 255 × 32 bytes, or a short root where only
			// FIPS-approved lengths are allowed.
			panic(err)
		}
		return b
	}
	copy(k.iv[:], expand("iv", ivSize))
	copy(k.id[:], expand("id", idSize))
	var err error
	key := expand("key", aeadKeySize(name))
	if name == wire.ChaCha20Poly1305 {
		k.aead, err = chacha20poly1305.New(key)
	} else {
		var block cipher.Block
		if block, err = aes.NewCipher(key); err == nil {
			k.aead, err = cipher.NewGCM(block)
		}
	}
	return k, err
}

// nonce writes the nonce of a packet: the IV XOR its counter, right-aligned.
func (k *epochKeys) nonce(to *[ivSize]byte, counter uint32) []byte {
	*to = k.iv
	binary.BigEndian.PutUint32(to[ivSize-4:], binary.BigEndian.Uint32(k.iv[ivSize-4:])^counter)
	return to[:]
}
