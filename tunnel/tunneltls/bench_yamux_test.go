package tunneltls

import (
	"crypto/tls"
	"io"
	"log/slog"
	"testing"
	"time"

	"github.com/hashicorp/yamux"
)

func linkFrames(c *tls.Conn) *frames {
	return &frames{link: &link{Conn: c, raw: c.NetConn(), gather: &gather{Conn: c.NetConn(), timeout: 5 * time.Second}}}
}

// uncoalesced takes the two Writes of a frame as they come.
type uncoalesced struct{ *frames }

func (u *uncoalesced) Write(p []byte) (int, error) { return u.link.Write(p) }

func benchSession(b *testing.B, conn io.ReadWriteCloser, client bool) *yamux.Session {
	conf := yamux.DefaultConfig()
	conf.LogOutput, conf.Logger = nil, &yamuxLog{to: slog.New(slog.DiscardHandler)}
	make := yamux.Server
	if client {
		make = yamux.Client
	}
	s, err := make(conn, conf)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { s.Close() })
	return s
}
