package main

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"encoding/pem"
	"fmt"
	"math/big"
	"os"
	"strings"
	"time"
)

// Peers run with their defaults. All take the same certificate and secret.
const (
	peerName   = "bench.test"
	peerSecret = "6ba7b810-9dad-11d1-80b4-00c04fd430c8" // xray and TUIC want a UUID
)

// certificate makes one for the peers and returns its SHA-256 in hex, as xray pins it.
func (s *scene) certificate() (sum string, err error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return "", err
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: peerName}, DNSNames: []string{peerName},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return "", err
	}
	private, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return "", err
	}
	for name, block := range map[string]*pem.Block{"cert.pem": {Type: "CERTIFICATE", Bytes: der}, "key.pem": {Type: "PRIVATE KEY", Bytes: private}} {
		if err := os.WriteFile(s.file(name), pem.EncodeToMemory(block), 0o600); err != nil {
			return "", err
		}
	}
	hash := sha256.Sum256(der)
	return hex.EncodeToString(hash[:]), nil
}

// pair writes two configurations and starts a program with each.
func (s *scene) pair(extension, server, client string, serverArgs, clientArgs []string) error {
	near, err := s.write("client"+extension, client)
	if err != nil {
		return err
	}
	far, err := s.write("server"+extension, server)
	if err != nil {
		return err
	}
	if err := s.serve(s.far, "server", append(serverArgs, far)...); err != nil {
		return err
	}
	return s.serve(s.near, "client", append(clientArgs, near)...)
}

func startHysteria(s *scene) error {
	if _, err := s.certificate(); err != nil {
		return err
	}
	server := fmt.Sprintf("listen: :%d\ntls:\n  cert: %s\n  key: %s\nauth:\n  type: password\n  password: %s\n", tunnelPort, s.file("cert.pem"), s.file("key.pem"), peerSecret)
	client := fmt.Sprintf("server: %s\nauth: %s\ntls:\n  sni: %s\n  insecure: true\nsocks5:\n  listen: %s\n", s.tunnel(), peerSecret, peerName, s.socks())
	return s.pair(".yaml", server, client, []string{"hysteria", "server", "-c"}, []string{"hysteria", "client", "-c"})
}

// What differs between sing-box's protocols: the part of the inbound and of the outbound.
const (
	hy2In     = `"type": "hysteria2", "users": [{"password": "SECRET"}]`
	hy2Out    = `"type": "hysteria2", "password": "SECRET"`
	tuicIn    = `"type": "tuic", "users": [{"uuid": "SECRET", "password": "SECRET"}]`
	tuicOut   = `"type": "tuic", "uuid": "SECRET", "password": "SECRET"`
	trojanIn  = `"type": "trojan", "users": [{"password": "SECRET"}], "multiplex": {"enabled": true}`
	trojanOut = `"type": "trojan", "password": "SECRET", "multiplex": {"enabled": true, "protocol": "yamux"}`
)

func singBox(in, out string) func(*scene) error {
	return func(s *scene) error {
		if _, err := s.certificate(); err != nil {
			return err
		}
		server, client := singBoxConfigs(s, in, out)
		return s.pair(".json", server, client, []string{"sing-box", "run", "-c"}, []string{"sing-box", "run", "-c"})
	}
}

func singBoxConfigs(s *scene, in, out string) (server, client string) {
	fill := func(part string) string { return strings.ReplaceAll(part, "SECRET", peerSecret) }
	alpn := `"alpn": ["h3"], `
	if in == trojanIn {
		alpn = ""
	}
	server = fmt.Sprintf(`{"log": {"level": "warn"}, "inbounds": [{%s, "listen": "::", "listen_port": %d, "tls": {"enabled": true, %s"certificate_path": %q, "key_path": %q}}], "outbounds": [{"type": "direct"}]}`,
		fill(in), tunnelPort, alpn, s.file("cert.pem"), s.file("key.pem"))
	client = fmt.Sprintf(`{"log": {"level": "warn"}, "inbounds": [{"type": "socks", "listen": "127.0.0.1", "listen_port": %d}], "outbounds": [{%s, "server": %q, "server_port": %d, "tls": {"enabled": true, %s"server_name": %q, "insecure": true}}]}`,
		socksPort, fill(out), s.host, tunnelPort, alpn, peerName)
	return server, client
}

func startXray(s *scene) error {
	pin, err := s.certificate()
	if err != nil {
		return err
	}
	server, client := xrayConfigs(s, pin)
	return s.pair(".json", server, client, []string{"xray", "run", "-c"}, []string{"xray", "run", "-c"})
}

func xrayConfigs(s *scene, pin string) (server, client string) {
	server = fmt.Sprintf(`{"log": {"loglevel": "warning"}, "inbounds": [{"port": %d, "protocol": "vless", "settings": {"clients": [{"id": %q}], "decryption": "none"},
"streamSettings": {"network": "tcp", "security": "tls", "tlsSettings": {"certificates": [{"certificateFile": %q, "keyFile": %q}]}}}], "outbounds": [{"protocol": "freedom", "settings": {"finalRules": [{"action": "allow"}]}}]}`,
		tunnelPort, peerSecret, s.file("cert.pem"), s.file("key.pem"))
	client = fmt.Sprintf(`{"log": {"loglevel": "warning"}, "inbounds": [{"listen": "127.0.0.1", "port": %d, "protocol": "socks", "settings": {"udp": true}}],
"outbounds": [{"protocol": "vless", "settings": {"vnext": [{"address": %q, "port": %d, "users": [{"id": %q, "encryption": "none"}]}]},
"streamSettings": {"network": "tcp", "security": "tls", "tlsSettings": {"serverName": %q, "pinnedPeerCertSha256": %q}},
"mux": {"enabled": true, "concurrency": -1, "xudpConcurrency": 16, "xudpProxyUDP443": "allow"}}]}`,
		socksPort, s.host, tunnelPort, peerSecret, peerName, pin)
	return server, client
}
