package sidecar

import (
	"bytes"
	"io"
	"net"
	"net/netip"
	"os"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"culvert/tunnel"
)

func TestOnlyTheUsersThatAreNamedMayUseTheFront(t *testing.T) {
	me := uint32(os.Getuid())
	echo := frontUDPEcho(t)
	for name, c := range map[string]struct {
		users []uint32
		may   bool
	}{
		"everybody":  {nil, true},
		"me":         {[]uint32{4242, me}, true},
		"others":     {[]uint32{4242, 4243}, false},
		"not root":   {[]uint32{me + 1}, false},
		"the number": {[]uint32{me}, true},
	} {
		t.Run(name, func(t *testing.T) {
			next := &frontDirect{}
			f := frontStart(t, next, func(fc *FrontConfig) { fc.Users = c.users })
			l := frontListen(t)
			defer l.Close()
			go func() {
				for {
					conn, err := l.Accept()
					if err != nil {
						return
					}
					conn.Close()
				}
			}()
			to := tunnel.TargetOf(tunnel.AddrPortOf(l.Addr()))

			s := frontDial(t, f)
			s.Write(append(bytes.Clone(frontGreet), frontRequestBytes(1, to)...))
			if got := frontRead(t, s, 12); (got[3] == 0) != c.may || !c.may && got[3] != 2 {
				t.Errorf("CONNECT: reply %x", got)
			}
			h := frontDial(t, f)
			io.WriteString(h, "CONNECT "+to.String()+" HTTP/1.1\r\nHost: x\r\n\r\n")
			h.SetReadDeadline(time.Now().Add(frontPatience))
			head := make([]byte, 1024)
			n, _ := io.ReadAtLeast(h, head, 12)
			if text := string(head[:n]); strings.HasPrefix(text, "HTTP/1.1 200") != c.may || !c.may && !strings.HasPrefix(text, "HTTP/1.1 403") {
				t.Errorf("HTTP: %q", text)
			}
			if !c.may {
				a := frontDial(t, f)
				a.Write(append(bytes.Clone(frontGreet), appendSOCKSAddr([]byte{5, 3, 0}, frontUnnamed)...))
				if got := frontRead(t, a, 12); got[3] != 2 {
					t.Errorf("ASSOCIATE: reply %x", got)
				}
				if st := f.Stats(); st.Refused[string(tunnel.NotPermitted)] != 3 || st.Streams != 0 || st.Associations != 0 {
					t.Errorf("counted %+v", st)
				}
				return
			}
			_, relay := frontAssociate(t, f, frontUnnamed)
			app := frontApp(t, relay)
			app.Write(frontDatagram(tunnel.TargetOf(echo), "mine"))
			frontExpect(t, app, echo, "mine")
		})
	}
}

// Those who may not use the front can hold all that is theirs, and those who may
// are served.
func TestConnectionsOfOtherUsersTakeNoPlaces(t *testing.T) {
	f := frontStart(t, &frontDirect{}, func(fc *FrontConfig) { fc.Users = []uint32{uint32(os.Getuid()) + 1} })
	var silent []net.Conn
	for range 3 * maxStrangers {
		silent = append(silent, frontDial(t, f))
	}
	frontEventually(t, "those beyond the bound are closed", func() bool { return f.Stats().Open <= maxStrangers })
	for _, c := range silent {
		c.Close()
	}
}

// dialAs connects to the front as another user.
func dialAs(t *testing.T, f *Front, uid int) net.Conn {
	t.Helper()
	got := make(chan net.Conn)
	go func() {
		// The kernel gives a socket to its thread's user for the file system. Locked,
		// the thread ends with the goroutine.
		runtime.LockOSThread()
		var c net.Conn
		err := syscall.Setfsuid(uid)
		if err == nil {
			c, err = net.Dial("tcp", f.Addr().String())
		}
		if err != nil {
			t.Error(err)
		}
		got <- c
	}()
	c := <-got
	if c == nil {
		t.FailNow()
	}
	t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(frontPatience))
	return c
}

func TestAUserWithManyConnectionsLeavesRoomForOthers(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("only root can become another user")
	}
	const greedy, other = 4242, 4243
	f := frontStart(t, &frontDirect{}, func(fc *FrontConfig) { fc.Users, fc.MaxConns = []uint32{greedy, other}, 36 })
	to := tunnel.TargetOf(frontFarEnd(t, frontEcho))
	connect := func(uid int) (net.Conn, byte) {
		c := dialAs(t, f, uid)
		c.Write(append(bytes.Clone(frontGreet), frontRequestBytes(1, to)...))
		reply := make([]byte, 12)
		if _, err := io.ReadFull(c, reply); err != nil {
			t.Fatal(err)
		}
		return c, reply[3]
	}
	var last net.Conn
	for i := range 32 {
		c, reply := connect(greedy)
		if reply != 0 {
			t.Fatalf("the %d. of 36: reply %d", i+1, reply)
		}
		last = c
	}
	if _, reply := connect(greedy); reply == 0 {
		t.Error("one user got more than eight ninths")
	}
	if n := f.Stats().Refused[string(tunnel.LimitExceeded)]; n != 1 {
		t.Errorf("%d refusals are counted", n)
	}
	if _, reply := connect(other); reply != 0 {
		t.Errorf("another user: reply %d", reply)
	}
	last.Close()
	frontEventually(t, "the place is free again", func() bool { return f.Stats().Open <= 32 })
	if _, reply := connect(other); reply != 0 {
		t.Errorf("another user, when there is room: reply %d", reply)
	}
}

func TestWhatIsNotOfThisMachineIsNobodys(t *testing.T) {
	c := &frontConn{from: netip.MustParseAddrPort("192.0.2.1:4444")}
	l := frontListen(t)
	defer l.Close()
	conn, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	c.TCPConn = conn.(*net.TCPConn)
	f := &Front{users: []uint32{uint32(os.Getuid())}}
	if err := f.strange(c); tunnel.CodeOf(err) != tunnel.NotPermitted {
		t.Errorf("got %v", err)
	}
	strict, _ := (&socketOwner{strict: true}).owns(c.from, tunnel.AddrPortOf(l.Addr()))
	if lax, _ := (&socketOwner{}).owns(c.from, tunnel.AddrPortOf(l.Addr())); strict || !lax {
		t.Error("who is not known owns a socket where users are named, or does not where they are not")
	}
}
