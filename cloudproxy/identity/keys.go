package identity

import (
	"crypto/ed25519"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"io"
	"os"
	"runtime"

	"culvert/tunnel"
)

// maxKeyFile bounds what is read, in bytes.
const maxKeyFile = 64 << 10

// GenerateKey makes a key.
func GenerateKey() (ed25519.PrivateKey, error) {
	_, key, err := ed25519.GenerateKey(rand.Reader)
	return key, err
}

// SaveKey writes a private key as PKCS#8 PEM with mode 0600. It never replaces a file.
func SaveKey(file string, key ed25519.PrivateKey) error {
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return err
	}
	return save(file, "PRIVATE KEY", der, 0o600)
}

// SavePublicKey writes a public key as PKIX PEM with mode 0644. It never replaces a file.
func SavePublicKey(file string, key ed25519.PublicKey) error {
	der, err := x509.MarshalPKIXPublicKey(key)
	if err != nil {
		return err
	}
	return save(file, "PUBLIC KEY", der, 0o644)
}

func save(file, kind string, der []byte, mode os.FileMode) error {
	return writeNew(file, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), mode)
}

// writeNew writes a file that must not exist yet.
func writeNew(file string, data []byte, mode os.FileMode) error {
	f, err := os.OpenFile(file, os.O_WRONLY|os.O_CREATE|os.O_EXCL, mode)
	if err != nil {
		return tunnel.Errorf(tunnel.ConfigInvalid, "the file can not be written: %w", err)
	}
	_, err = f.Write(data)
	if e := f.Close(); err == nil {
		err = e
	}
	if err != nil {
		os.Remove(file)
		return tunnel.Errorf(tunnel.ConfigInvalid, "the file can not be written: %w", err)
	}
	return nil
}

func load(file string, open func(string) (*os.File, error)) (*pem.Block, error) {
	f, err := open(file)
	if err != nil {
		return nil, tunnel.Errorf(tunnel.ConfigInvalid, "the key can not be read: %w", err)
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxKeyFile))
	if err != nil {
		return nil, tunnel.Errorf(tunnel.ConfigInvalid, "the key can not be read: %w", err)
	}
	block, _ := pem.Decode(b)
	if block == nil {
		return nil, tunnel.Errorf(tunnel.ConfigInvalid, "%s holds no key in PEM form; 'culvert-cloudproxy init' makes one", file)
	}
	return block, nil
}

// open opens a file that a running cloud proxy reads. A pipe would hold it up until
// somebody writes, and nothing else would be followed meanwhile.
func open(file string) (*os.File, error) {
	st, err := os.Stat(file)
	if err != nil {
		return nil, err
	}
	if st.Mode()&os.ModeNamedPipe != 0 {
		return nil, errors.New(file + " is a pipe, which is not read; use a file")
	}
	return os.Open(file)
}

// LoadKey reads a private key. A file that everybody may read or write is refused,
// but on Windows, where its bits do not tell.
func LoadKey(file string) (ed25519.PrivateKey, error) {
	if st, err := os.Stat(file); err == nil && runtime.GOOS != "windows" && st.Mode().Perm()&0o007 != 0 {
		return nil, tunnel.Errorf(tunnel.ConfigInvalid, "%s is a private key that every user can read or write; run chmod 600 on it", file)
	}
	block, err := load(file, os.Open)
	if err != nil {
		return nil, err
	}
	k, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	key, ok := k.(ed25519.PrivateKey)
	if err != nil || !ok {
		return nil, tunnel.Errorf(tunnel.ConfigInvalid, "%s is not an Ed25519 private key in PKCS#8 form; name the token.key that 'culvert-cloudproxy init' made", file)
	}
	return key, nil
}

// LoadPublicKey reads a public key.
func LoadPublicKey(file string) (ed25519.PublicKey, error) {
	block, err := load(file, open)
	if err != nil {
		return nil, err
	}
	k, err := x509.ParsePKIXPublicKey(block.Bytes)
	key, ok := k.(ed25519.PublicKey)
	if err != nil || !ok {
		return nil, tunnel.Errorf(tunnel.ConfigInvalid, "%s is not an Ed25519 public key; name the token.pub that 'culvert-cloudproxy init' made", file)
	}
	return key, nil
}

// LoadKeys reads the public keys of several files.
func LoadKeys(files ...string) (Keys, error) {
	k := Keys{}
	for _, f := range files {
		p, err := LoadPublicKey(f)
		if err != nil {
			return nil, err
		}
		k[Thumbprint(p)] = p
	}
	return k, nil
}
