package control

import (
	"bufio"
	"context"
	"io"
	"net"
	"net/http"
	"testing"
	"time"
)

// Anybody on the machine may connect: that takes neither descriptors nor memory
// without end.
func TestConnectionsAreBounded(t *testing.T) {
	const token = "0123456789abcdef"
	for where, at := range pageListeners(t, &fake{}, token) {
		t.Run(where, func(t *testing.T) {
			dial := func(request string) (net.Conn, *bufio.Reader) {
				t.Helper()
				c, err := net.Dial(at.network, at.address)
				if err != nil {
					t.Fatal(err)
				}
				t.Cleanup(func() { c.Close() })
				c.SetDeadline(time.Now().Add(time.Minute))
				io.WriteString(c, request+" HTTP/1.1\r\nHost: "+at.host+"\r\nAuthorization: Bearer "+token+"\r\n\r\n")
				return c, bufio.NewReader(c)
			}
			var held []net.Conn
			for range maxConns { // events go on until their reader leaves
				c, r := dial("GET /v1/events")
				if res, err := http.ReadResponse(r, nil); err != nil || res.StatusCode != http.StatusOK {
					t.Fatalf("connection %d: %+v, %v", len(held)+1, res, err)
				}
				held = append(held, c)
			}
			if _, r := dial("GET /v1/status"); func() bool { _, err := r.ReadByte(); return err == nil }() {
				t.Errorf("one more than %d connections was served", maxConns)
			}
			held[0].Close()
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			for {
				_, r := dial("GET /v1/status")
				if res, err := http.ReadResponse(r, nil); err == nil && res.StatusCode == http.StatusOK {
					break
				}
				select {
				case <-ctx.Done():
					t.Fatal("the place of one that has ended is not free")
				case <-time.After(10 * time.Millisecond):
				}
			}
		})
	}
}

// net/http answers OPTIONS * by itself, before anybody has asked who it is. Who is
// refused keeps no place.
func TestOptionsOfTheServerAreRefusedAndTheConnectionEnds(t *testing.T) {
	for where, at := range pageListeners(t, &fake{}, "0123456789abcdef") {
		c, err := net.Dial(at.network, at.address)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		c.SetDeadline(time.Now().Add(time.Minute))
		io.WriteString(c, "OPTIONS * HTTP/1.1\r\nHost: "+at.host+"\r\nOrigin: http://evil.example\r\n\r\n")
		if res, err := http.ReadResponse(bufio.NewReader(c), nil); err != nil || res.StatusCode != http.StatusForbidden || !res.Close {
			t.Errorf("%s: %+v, %v", where, res, err)
		}
	}
}
