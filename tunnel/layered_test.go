package tunnel_test

import (
	"io"
	"net"
	"testing"

	"culvert/tunnel"
)

func TestWhatTCPIsGivenIsCountedOnceWhateverRunsOnIt(t *testing.T) {
	near, far := net.Pipe()
	defer far.Close()
	go io.CopyN(io.Discard, far, 5) // and then nobody reads
	c := tunnel.CountTCP(near)
	if c.TCP() != near || c.Sent() != 0 || tunnel.CountTCP(c) != c {
		t.Errorf("%v on %v, %d bytes sent", c, c.TCP(), c.Sent())
	}
	if _, err := c.Write([]byte("hello")); err != nil || c.Sent() != 5 {
		t.Errorf("%d of 5 bytes, %v", c.Sent(), err)
	}
	c.Close()
	if _, err := c.Write([]byte("hello")); err == nil || c.Sent() != 5 {
		t.Errorf("what was not taken is counted: %d, %v", c.Sent(), err)
	}
}
