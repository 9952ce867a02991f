package tunneltest

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/sha256"
	"crypto/tls"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"net"
	"sync"
)

// The types of TLS records (RFC 8446 §5.1).
const (
	Handshake       = 22
	ApplicationData = 23
)

// Records writes TLS 1.3 records that crypto/tls would not, on a connection whose
// handshake crypto/tls has done. It is no more than a test of the other end needs.
//
//	log := &tunneltest.KeyLog{}
//	conf.KeyLogWriter = log
//	tls.Client(tcp, conf).Handshake()
//	records, err := log.Records(tcp)
type Records struct {
	conn   net.Conn
	secret []byte
	aead   cipher.AEAD
	iv     []byte
	seq    uint64
}

// KeyLog is a tls.Config.KeyLogWriter that keeps what a client writes with.
type KeyLog struct {
	mu     sync.Mutex
	secret []byte
}

func (k *KeyLog) Write(line []byte) (int, error) {
	if f := bytes.Fields(line); len(f) == 3 && string(f[0]) == "CLIENT_TRAFFIC_SECRET_0" {
		secret, err := hex.DecodeString(string(f[2]))
		if err != nil {
			return 0, err
		}
		k.mu.Lock()
		k.secret = secret
		k.mu.Unlock()
	}
	return len(line), nil
}

// Records takes over the client's writing on conn, on which crypto/tls has
// written nothing since the handshake. It knows TLS_AES_128_GCM_SHA256 alone, which crypto/tls
// chooses where the processor knows AES.
func (k *KeyLog) Records(conn net.Conn, state tls.ConnectionState) (*Records, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if state.CipherSuite != tls.TLS_AES_128_GCM_SHA256 || k.secret == nil {
		return nil, fmt.Errorf("no records can be written with %s", tls.CipherSuiteName(state.CipherSuite))
	}
	r := &Records{conn: conn, secret: k.secret}
	return r, r.derive()
}

// label is HKDF-Expand-Label (RFC 8446 §7.1).
func (r *Records) label(name string, n int) ([]byte, error) {
	name = "tls13 " + name
	info := binary.BigEndian.AppendUint16(nil, uint16(n))
	info = append(append(append(info, byte(len(name))), name...), 0)
	return hkdf.Expand(sha256.New, r.secret, string(info), n)
}

func (r *Records) derive() error {
	key, err := r.label("key", 16)
	if err != nil {
		return err
	}
	block, err := aes.NewCipher(key)
	if err != nil {
		return err
	}
	if r.aead, err = cipher.NewGCM(block); err != nil {
		return err
	}
	r.seq = 0
	r.iv, err = r.label("iv", 12)
	return err
}

// Append appends a record with padding zeros after its content (RFC 8446 §5.2).
func (r *Records) Append(b []byte, kind byte, content []byte, padding int) []byte {
	inner := append(append(bytes.Clone(content), kind), make([]byte, padding)...)
	head := binary.BigEndian.AppendUint16([]byte{ApplicationData, 3, 3}, uint16(len(inner)+r.aead.Overhead()))
	nonce := bytes.Clone(r.iv)
	for i := range 8 {
		nonce[len(nonce)-1-i] ^= byte(r.seq >> (8 * i))
	}
	r.seq++
	return r.aead.Seal(append(b, head...), nonce, inner, head)
}

// AppendKeyUpdate appends a KeyUpdate, and takes the next keys (RFC 8446 §4.6.3).
// With answer the peer is to take its next keys too.
func (r *Records) AppendKeyUpdate(b []byte, answer bool) ([]byte, error) {
	asks := byte(0)
	if answer {
		asks = 1
	}
	b = r.Append(b, Handshake, []byte{24, 0, 0, 1, asks}, 0)
	var err error
	if r.secret, err = r.label("traffic upd", sha256.Size); err != nil {
		return nil, err
	}
	return b, r.derive()
}

// Write writes p in records.
func (r *Records) Write(p []byte) (int, error) {
	var b []byte
	for rest := p; len(rest) > 0; {
		n := min(len(rest), 1<<14)
		b = r.Append(b, ApplicationData, rest[:n], 0)
		rest = rest[n:]
	}
	if _, err := r.conn.Write(b); err != nil {
		return 0, err
	}
	return len(p), nil
}
