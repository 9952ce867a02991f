package tunneltest

import (
	"crypto/ed25519"
	"testing"

	"go.uber.org/goleak"

	"culvert/tunnel"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestMemoryPassesTheExam(t *testing.T) {
	for _, kind := range []string{"quic", "tls"} {
		t.Run(kind, func(t *testing.T) {
			Exam(t, func(t *testing.T) Setup {
				key := ed25519.PublicKey(noise(1, ed25519.PublicKeySize))
				return Setup{
					Pair: func(t *testing.T) (client, server tunnel.Candidate) {
						return Pair(t, Config{Kind: kind}, key)
					},
					Key:       key,
					Datagrams: kind == "quic",
					Lanes:     kind == "tls",
				}
			})
		})
	}
}
