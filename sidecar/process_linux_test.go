package sidecar

import (
	"net"
	"net/netip"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strconv"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"culvert/tunnel"
)

func TestProcessBehindAConnection(t *testing.T) {
	l := frontListen(t)
	defer l.Close()
	client, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	u, err := net.Dial("udp", "127.0.0.1:9")
	if err != nil {
		t.Fatal(err)
	}
	defer u.Close()
	udpLocal := u.LocalAddr().(*net.UDPAddr).AddrPort()
	for name, ask := range map[string]func() (Process, error){
		"tcp": func() (Process, error) {
			return ProcessOfTCP(tunnel.AddrPortOf(client.LocalAddr()), tunnel.AddrPortOf(l.Addr()))
		},
		"udp": func() (Process, error) { return ProcessOf(udpLocal, netip.MustParseAddrPort("127.0.0.1:9"), "udp") },
	} {
		t.Run(name, func(t *testing.T) {
			p, err := ask()
			if err != nil {
				t.Fatal(err)
			}
			self, _ := os.Executable()
			me, _ := user.Current()
			if p.PID != os.Getpid() || p.UID != os.Getuid() || p.Name != filepath.Base(self) || p.User != me.Username {
				t.Fatalf("got %+v", p)
			}
		})
	}
}

func TestProcessOfNoSocket(t *testing.T) {
	nobody := netip.MustParseAddrPort("127.0.0.1:1")
	if p, err := ProcessOfTCP(nobody, nobody); tunnel.CodeOf(err) != tunnel.Internal {
		t.Errorf("got %+v, %v", p, err)
	}
	if _, err := ProcessOf(nobody, nobody, "sctp"); tunnel.CodeOf(err) != tunnel.ConfigInvalid {
		t.Errorf("sctp: %v", err)
	}
}

// Who listens on a port is not who connects from that port of another machine, or
// has done so.
func TestAListenerIsNotTheClientOfItsPort(t *testing.T) {
	front := frontListen(t)
	defer front.Close()
	server := tunnel.AddrPortOf(front.Addr())
	for _, at := range []string{"127.0.0.1:0", "0.0.0.0:0", "[::]:0"} {
		l, err := net.Listen("tcp", at)
		if err != nil {
			t.Fatal(err)
		}
		port := tunnel.AddrPortOf(l.Addr()).Port()
		for _, from := range []string{"127.0.0.1", "127.0.0.2", "192.0.2.1"} {
			client := netip.AddrPortFrom(netip.MustParseAddr(from), port)
			if p, err := ProcessOfTCP(client, server); tunnel.CodeOf(err) != tunnel.Internal {
				t.Errorf("%s, while another socket listens on %s: %+v, %v", client, l.Addr(), p, err)
			}
		}
		l.Close()
	}
}

func TestASocketIsKnownUntilItIsClosed(t *testing.T) {
	to := netip.MustParseAddrPort("127.0.0.1:9")
	for name, c := range map[string]struct {
		network, bind string
		connect       string // to somebody else
	}{
		"bound":                  {"udp4", "127.0.0.1:0", ""},
		"on all addresses":       {"udp4", "0.0.0.0:0", ""},
		"of both families":       {"udp", "[::]:0", ""},
		"connected":              {"udp4", "127.0.0.1:0", "127.0.0.1:9"},
		"connected elsewhere":    {"udp4", "127.0.0.1:0", "127.0.0.2:99"},
		"of both, and elsewhere": {"udp", "[::]:0", "127.0.0.2:99"},
	} {
		t.Run(name, func(t *testing.T) {
			p, err := net.ListenPacket(c.network, c.bind)
			if err != nil {
				t.Fatal(err)
			}
			u := p.(*net.UDPConn)
			defer u.Close()
			own := netip.AddrPortFrom(to.Addr(), u.LocalAddr().(*net.UDPAddr).AddrPort().Port())
			if c.connect != "" {
				raw, _ := u.SyscallConn()
				at := netip.MustParseAddrPort(c.connect)
				raw.Control(func(fd uintptr) {
					if c.network == "udp4" {
						err = unix.Connect(int(fd), &unix.SockaddrInet4{Addr: at.Addr().As4(), Port: int(at.Port())})
					} else {
						err = unix.Connect(int(fd), &unix.SockaddrInet6{Addr: at.Addr().As16(), Port: int(at.Port())})
					}
				})
				if err != nil {
					t.Fatal(err)
				}
			}
			socket, open := SocketOf(own, to)
			if elsewhere := c.connect == "127.0.0.2:99"; !open || (socket == 0) != elsewhere {
				t.Errorf("while it is open: %d, %v", socket, open)
			}
			u.Close()
			if socket, open := SocketOf(own, to); open {
				t.Errorf("after it was closed: %d, %v", socket, open)
			}
		})
	}
}

func TestOtherLocalUserIsDropped(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("only root can become another user")
	}
	for name, users := range map[string][]uint32{"anybody may use the front": nil, "some may": {0, 65534}} {
		t.Run(name, func(t *testing.T) { otherLocalUserIsDropped(t, users) })
	}
}

func otherLocalUserIsDropped(t *testing.T, users []uint32) {
	next := &frontDirect{}
	f := frontStart(t, next, func(c *FrontConfig) { c.Users = users })
	_, relay := frontAssociate(t, f, frontUnnamed)

	asOtherUser(t, relay, netip.AddrPort{})
	frontEventually(t, "the drop is counted", func() bool { return f.Stats().Dropped["wrong_user"] == 1 })

	echo := frontUDPEcho(t)
	app := frontApp(t, relay)
	app.Write(frontDatagram(tunnel.TargetOf(echo), "mine"))
	frontExpect(t, app, echo, "mine")
	if n := next.relay().sent.Load(); n != 1 {
		t.Errorf("%d datagrams were passed on", n)
	}
}

// asOtherUser has another user send a datagram to a relay, from a port of its own
// where from is none. It holds the port until stop is called or the test ends.
func asOtherUser(t *testing.T, relay, from netip.AddrPort) (stop func()) {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	// A copy, because another user may not reach the original.
	binary := filepath.Join("/tmp", "culvert-other-user-"+strconv.Itoa(os.Getpid()))
	if err := exec.Command("cp", self, binary).Run(); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(binary, "-test.run=TestMainOfOtherUser")
	cmd.Env = append(os.Environ(), frontUserHelper+"="+relay.String())
	if from.IsValid() {
		cmd.Env = append(cmd.Env, frontUserPort+"="+from.String())
	}
	cmd.Dir = "/"
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	stay, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		os.Remove(binary)
		t.Skip("this root can not become another user: ", err)
	}
	stop = sync.OnceFunc(func() {
		stay.Close()
		cmd.Wait()
		os.Remove(binary)
	})
	t.Cleanup(stop)
	return stop
}

// Where there is no descriptor to ask by, nothing is known of an owner: a call that
// goes on is not taken for another user's.
func TestNoDescriptorsAreNoAnswer(t *testing.T) {
	f := frontStart(t, &frontDirect{}, nil)
	_, relay := frontAssociate(t, f, frontUnnamed)
	sender := tunnel.AddrPortOf(frontApp(t, relay).LocalAddr())
	o := &socketOwner{uid: uint32(os.Getuid()), known: true, strict: true}
	if owned, sure := o.owns(sender, relay); !owned || !sure {
		t.Fatalf("owned %v, sure %v", owned, sure)
	}
	var was syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &was); err != nil {
		t.Fatal(err)
	}
	none := was
	none.Cur = 3 // less than is open
	if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &none); err != nil {
		t.Fatal(err)
	}
	owned, sure := o.owns(sender, relay)
	if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &was); err != nil {
		t.Fatal(err)
	}
	if owned || sure {
		t.Errorf("without descriptors: owned %v, sure %v", owned, sure)
	}
}

// An app may give up its UDP port and keep its connection. Who binds the port
// then neither sends as that app nor gets what comes for it.
func TestAnotherUserWhoTakesTheSendersPortIsDropped(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("only root can become another user")
	}
	next := &frontDirect{}
	f := frontStartWith(t, next, nil, func(f *Front) { f.ownerPause = 0 }) // each time
	_, relay := frontAssociate(t, f, frontUnnamed)
	echo := frontUDPEcho(t)
	app := frontApp(t, relay)
	app.Write(frontDatagram(tunnel.TargetOf(echo), "mine"))
	frontExpect(t, app, echo, "mine")
	from := app.LocalAddr().(*net.UDPAddr)
	app.Close()
	remote := netip.MustParseAddrPort("192.0.2.1:3478")
	next.relay().r.Deliver([]byte("for mine"), remote)

	stop := asOtherUser(t, relay, from.AddrPort())
	frontEventually(t, "the drop is counted", func() bool { return f.Stats().Dropped["wrong_user"] == 1 })
	next.relay().r.Deliver([]byte("for mine"), remote)
	stop()
	if s := f.Stats(); next.relay().sent.Load() != 1 || s.Down != 1 || s.Dropped["app_socket_failed"] != 2 {
		t.Errorf("%d datagrams were passed on; counters %+v", next.relay().sent.Load(), s)
	}

	again, err := net.DialUDP("udp", from, net.UDPAddrFromAddrPort(relay))
	if err != nil {
		t.Fatal(err)
	}
	defer again.Close()
	again.SetDeadline(time.Now().Add(frontPatience))
	again.Write(frontDatagram(tunnel.TargetOf(echo), "mine again"))
	frontExpect(t, again, echo, "mine again")
}
