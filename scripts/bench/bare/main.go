// Bare moves bytes over a transport with nothing around it: quic-go or TLS over
// TCP with their defaults, one stream. It is the yardstick for Culvert's bulk
// figures, to be run on the same link in the same minute.
//
//	bare serve -addr HOST:PORT            QUIC on UDP, TLS on TCP; sends until the client leaves
//	bare load  -addr HOST:PORT -kind quic|tls -dur 5s
//
// load prints one JSON line. It promises no more than that: it measures no
// delay and no loss.
package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"log"
	"math/big"
	"net"
	"os"
	"time"

	"github.com/quic-go/quic-go"
)

func main() {
	log.SetFlags(0)
	log.SetPrefix("bare: ")
	if len(os.Args) < 2 {
		log.Fatal("usage: bare serve|load")
	}
	fs := flag.NewFlagSet(os.Args[1], flag.ExitOnError)
	addr := fs.String("addr", "127.0.0.1:4443", "where to listen, or what to load")
	kind := fs.String("kind", "quic", "load: quic or tls")
	dur := fs.Duration("dur", 5*time.Second, "load: measured time")
	warm := fs.Duration("warm", time.Second, "load: time before measuring")
	fs.Parse(os.Args[2:])
	var err error
	switch os.Args[1] {
	case "serve":
		err = serve(*addr)
	case "load":
		err = load(*addr, *kind, *warm, *dur)
	default:
		log.Fatalf("unknown command %q", os.Args[1])
	}
	if err != nil {
		log.Fatal(err)
	}
}

// window is large enough for 100 ms at a gigabit, as Culvert's is.
var quicConfig = &quic.Config{MaxStreamReceiveWindow: 16 << 20, MaxConnectionReceiveWindow: 24 << 20}

func serve(addr string) error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	cert := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(24 * time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, cert, cert, key.Public(), key)
	if err != nil {
		return err
	}
	conf := &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}, NextProtos: []string{"bare"}, MinVersion: tls.VersionTLS13}
	ql, err := quic.ListenAddr(addr, conf, quicConfig)
	if err != nil {
		return err
	}
	tl, err := tls.Listen("tcp", addr, conf)
	if err != nil {
		return err
	}
	go func() {
		for {
			c, err := ql.Accept(context.Background())
			if err != nil {
				return
			}
			go func() {
				if s, err := c.AcceptStream(context.Background()); err == nil {
					source(s)
				}
			}()
		}
	}()
	fmt.Println("ready", addr)
	for {
		c, err := tl.Accept()
		if err != nil {
			return err
		}
		go source(c)
	}
}

// source sends once a byte has come, until the other side leaves.
func source(c io.ReadWriter) {
	b := make([]byte, 64<<10)
	if _, err := io.ReadFull(c, b[:1]); err != nil {
		return
	}
	for {
		if _, err := c.Write(b); err != nil {
			return
		}
	}
}

func load(addr, kind string, warm, dur time.Duration) error {
	conf := &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"bare"}, MinVersion: tls.VersionTLS13}
	var c io.ReadWriter
	if kind == "quic" {
		conn, err := quic.DialAddr(context.Background(), addr, conf, quicConfig)
		if err != nil {
			return err
		}
		defer conn.CloseWithError(0, "")
		if c, err = conn.OpenStream(); err != nil {
			return err
		}
	} else {
		conn, err := tls.DialWithDialer(&net.Dialer{Timeout: 5 * time.Second}, "tcp", addr, conf)
		if err != nil {
			return err
		}
		defer conn.Close()
		c = conn
	}
	if _, err := c.Write([]byte{'S'}); err != nil {
		return err
	}
	b := make([]byte, 64<<10)
	start := time.Now().Add(warm)
	end := start.Add(dur)
	total := 0
	for now := time.Now(); now.Before(end); now = time.Now() {
		n, err := c.Read(b)
		if err != nil {
			return err
		}
		if now.After(start) {
			total += n
		}
	}
	return json.NewEncoder(os.Stdout).Encode(map[string]any{"kind": kind, "mbit_per_s": float64(total) * 8 / dur.Seconds() / 1e6})
}
