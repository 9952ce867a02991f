// Bare moves bytes over a transport with nothing around it: quic-go or TLS over
// TCP with their defaults, one stream. It is the yardstick for Culvert's bulk
// figures, to be run on the same link in the same minute.
//
//	bare serve -addr HOST:PORT            QUIC on UDP, TLS on TCP; sends until the client leaves
//	bare load  -addr HOST:PORT -kind quic|tls -dur 5s
//
// load prints one JSON line. It promises no more than that: it measures no
// delay and no loss.
//
// A proxy's bytes also cross two TCP connections, one at each end. So that what
// those cost can be told from what the tunnel costs, the same transports also run
// between two relays, with a copying loop and nothing else:
//
//	bare far  -addr HOST:PORT -to HOST:PORT            dials TCP for each stream or connection
//	bare near -listen HOST:PORT -addr HOST:PORT -kind quic|tls
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
		log.Fatal("usage: bare serve|load|far|near")
	}
	fs := flag.NewFlagSet(os.Args[1], flag.ExitOnError)
	addr := fs.String("addr", "127.0.0.1:4443", "where to listen, or what to load")
	kind := fs.String("kind", "quic", "load: quic or tls")
	dur := fs.Duration("dur", 5*time.Second, "load: measured time")
	warm := fs.Duration("warm", time.Second, "load: time before measuring")
	to := fs.String("to", "", "far: where each stream goes")
	listen := fs.String("listen", "", "near: where TCP is accepted")
	fs.Parse(os.Args[2:])
	var err error
	switch os.Args[1] {
	case "serve":
		err = serve(*addr, source)
	case "far":
		err = serve(*addr, func(c io.ReadWriteCloser) { relayTo(c, *to) })
	case "near":
		err = near(*listen, *addr, *kind)
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

// serve gives every stream and connection to use.
func serve(addr string, use func(io.ReadWriteCloser)) error {
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
				for {
					s, err := c.AcceptStream(context.Background())
					if err != nil {
						return
					}
					go use(s)
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
		go use(c)
	}
}

// source sends once a byte has come, until the other side leaves.
func source(c io.ReadWriteCloser) {
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

// dial returns how to open a stream: of one QUIC connection, or a TLS
// connection each.
func dial(addr, kind string) (open func() (io.ReadWriteCloser, error), err error) {
	conf := &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"bare"}, MinVersion: tls.VersionTLS13}
	if kind != "quic" {
		return func() (io.ReadWriteCloser, error) {
			return tls.DialWithDialer(&net.Dialer{Timeout: 5 * time.Second}, "tcp", addr, conf)
		}, nil
	}
	conn, err := quic.DialAddr(context.Background(), addr, conf, quicConfig)
	if err != nil {
		return nil, err
	}
	return func() (io.ReadWriteCloser, error) { return conn.OpenStream() }, nil
}

// near accepts TCP and relays each connection over a stream.
func near(listen, addr, kind string) error {
	l, err := net.Listen("tcp", listen)
	if err != nil {
		return err
	}
	var open func() (io.ReadWriteCloser, error)
	for deadline := time.Now().Add(5 * time.Second); ; time.Sleep(100 * time.Millisecond) { // for the far end to listen
		var first io.Closer
		if open, err = dial(addr, kind); err == nil {
			if first, err = open(); err == nil {
				first.Close()
				break
			}
		}
		if time.Now().After(deadline) {
			return err
		}
	}
	fmt.Println("ready", listen)
	for {
		c, err := l.Accept()
		if err != nil {
			return err
		}
		go func() {
			s, err := open()
			if err != nil {
				c.Close()
				return
			}
			relay(c, s)
		}()
	}
}

func relayTo(s io.ReadWriteCloser, to string) {
	c, err := net.Dial("tcp", to)
	if err != nil {
		s.Close()
		return
	}
	relay(s, c)
}

// relay copies both ways until both have ended.
func relay(a, b io.ReadWriteCloser) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		pump(a, b)
	}()
	pump(b, a)
	<-done
}

// pump closes to at the end, which ends the other way too.
func pump(to io.WriteCloser, from io.Reader) {
	defer to.Close()
	b := make([]byte, 64<<10)
	for {
		n, err := from.Read(b)
		if n > 0 {
			if _, err := to.Write(b[:n]); err != nil {
				return
			}
		}
		if err != nil {
			return
		}
	}
}

func load(addr, kind string, warm, dur time.Duration) error {
	open, err := dial(addr, kind)
	if err != nil {
		return err
	}
	c, err := open()
	if err != nil {
		return err
	}
	defer c.Close()
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
