package session

import (
	"crypto/rand"
	"encoding/hex"
	"errors"

	"culvert/tunnel"
	"culvert/tunnel/media"
	"culvert/tunnel/wire"
)

// OfferSealed answers what a sidecar has said of sealed packets in Open or
// Join: it chooses an AEAD and makes a fresh nonce. nil: there are none.
func OfferSealed(aeads []string) *wire.Sealed {
	aead := media.ChooseAEAD(aeads)
	if aead == "" {
		return nil
	}
	var nonce [16]byte
	rand.Read(nonce[:]) // never fails
	return &wire.Sealed{AEAD: aead, Nonce: hex.EncodeToString(nonce[:])}
}

// keyed is a connection that sealed packets can share: a carrier, or a candidate
// that is to become one.
type keyed interface {
	Flow() tunnel.Flow
	ExportKey(label string, context []byte, n int) ([]byte, error)
}

// ReadySealed makes the far end's sealed way of a connection; nil: it has none.
// It is made before the sidecar is welcomed, since that may send at once, and a
// packet that nobody has claimed is answered with a stateless reset. It ends
// with the connection, at the latest.
func ReadySealed(c keyed, id string, how *wire.Sealed) (*media.Sealed, error) {
	return newSealed(c, id, how, false, nil)
}

// newSealed makes the sealed way of a connection; nil: it has none.
func newSealed(c keyed, id string, how *wire.Sealed, near bool, reset func()) (*media.Sealed, error) {
	flow := c.Flow()
	if flow == nil || how == nil {
		return nil, nil
	}
	nonce, err := hex.DecodeString(how.Nonce)
	if err == nil && len(nonce) != 16 {
		err = errors.New("it has another length")
	}
	if err != nil {
		return nil, tunnel.Errorf(tunnel.Internal, "the nonce for sealed packets is not 16 bytes in hex: %w", err)
	}
	root, err := media.SealedRoot(c.ExportKey, id, nonce)
	if err != nil {
		return nil, tunnel.Errorf(tunnel.Internal, "no keys for sealed packets: %w", err)
	}
	return media.NewSealed(media.SealedConfig{Flow: flow, Root: root, AEAD: how.AEAD, Near: near, OnReset: reset})
}
