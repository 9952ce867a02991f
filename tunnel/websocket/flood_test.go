package websocket

import (
	"bufio"
	"bytes"
	"crypto/tls"
	"errors"
	"io"
	"net/http"
	"testing"
	"time"

	"culvert/tunnel"
)

// A peer that keeps this end busy with signs of life is cut, and told from one that
// has gone.
func TestFloodsOfFramesThatCarryNothingEndTheConnection(t *testing.T) {
	for name, frame := range map[string][]byte{ // masked with zeros (RFC 6455 §5.2)
		"pings":                  {0x89, 0x80, 0, 0, 0, 0},
		"pings with a payload":   append([]byte{0x89, 0x80 | 125, 0, 0, 0, 0}, make([]byte, 125)...),
		"pongs without a ping":   {0x8a, 0x80, 0, 0, 0, 0},
		"messages without data":  {0x82, 0x80, 0, 0, 0, 0},
		"parts without data":     {0x00, 0x80, 0, 0, 0, 0},
		"pings with data beside": {0x89, 0x80, 0, 0, 0, 0, 0x82, 0x81, 0, 0, 0, 0, 'x'},
	} {
		t.Run(name, func(t *testing.T) {
			l := listener(t, ListenConfig{})
			address, _ := secured(t, l)
			conn, err := tls.Dial("tcp", address, &tls.Config{InsecureSkipVerify: true})
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			conn.SetDeadline(time.Now().Add(patience))
			io.WriteString(conn, "GET "+DefaultPath+" HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n")
			in := bufio.NewReader(conn)
			if res, err := http.ReadResponse(in, nil); err != nil || res.StatusCode != http.StatusSwitchingProtocols {
				t.Fatal(res, err)
			}
			far, err := l.Accept()
			if err != nil {
				t.Fatal(err)
			}
			defer far.Close()
			far.SetDeadline(time.Now().Add(patience))
			go io.Copy(io.Discard, in)
			go func() {
				if frame[0] == 0 { // the parts of one message
					conn.Write([]byte{0x02, 0x81, 0, 0, 0, 0, 'x'})
				}
				for many := bytes.Repeat(frame, 100); ; {
					if _, err := conn.Write(many); err != nil {
						return
					}
				}
			}()
			began := time.Now()
			if _, err := io.Copy(io.Discard, far); !errors.Is(err, tunnel.LimitExceeded) {
				t.Error(err)
			}
			t.Logf("ended after %v", time.Since(began))
		})
	}
}
