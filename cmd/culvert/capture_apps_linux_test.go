package main

import (
	"bytes"
	_ "embed" // the SIP scenario
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/net/dns/dnsmessage"

	"culvert/cmd/internal/cmdtest"
	"culvert/cmd/internal/netpair"
	"culvert/cmd/internal/webcall"
)

// captureApps are real programs that run as the captured user.
type captureApps struct {
	*captured
	home string // theirs
}

func newCaptureApps(t *testing.T) *captureApps {
	t.Helper()
	for _, program := range []string{"chromium", "gst-launch-1.0", "sipp"} {
		if _, err := exec.LookPath(program); err != nil {
			if os.Getenv("CI") == "true" {
				t.Fatalf("CI=true says that nothing may be left out: %v", err)
			}
			t.Skip(err)
		}
	}
	c := &captureApps{captured: newCaptured(t, captureBuild(t), fmt.Sprintf("capture: {dns: %s}\n", outside4))}
	// What is watched is then the only way out.
	if out, err := c.in(c.pair.Near, 0, "ip", "link", "del", "away"); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	var err error
	if c.home, err = os.MkdirTemp("", "captured"); err != nil { // t.TempDir's is for root alone
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(c.home) })
	if err := os.Chown(c.home, captureUser, captureUser); err != nil {
		t.Fatal(err)
	}
	return c
}

// launch starts a program, until the test ends.
func (c *captureApps) launch(args ...string) *exec.Cmd {
	c.t.Helper()
	log := &cmdtest.Text{}
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Dir = c.home
	cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "HOME=" + c.home, "TMPDIR=" + c.home}
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Credential: &syscall.Credential{Uid: captureUser, Gid: captureUser, NoSetGroups: true}}
	c.pair.Near.Start(c.t, cmd)
	c.t.Cleanup(func() {
		syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) // its children too
		if c.t.Failed() {
			c.t.Logf("%s:\n%s", filepath.Base(args[0]), log)
		}
	})
	return cmd
}

// outside is outside4.
var outside = net.ParseIP(outside4)

// roomName is a name that only resolves outside.
const roomName = "room.culvert.test"

// names is the only name server that knows roomName. It is outside, where no
// app asks it by itself.
func (c *captureApps) names() {
	c.t.Helper()
	var udp *net.UDPConn
	err := c.pair.Far.Do(func() (err error) {
		udp, err = net.ListenUDP("udp4", &net.UDPAddr{IP: outside, Port: 53})
		return err
	})
	if err != nil {
		c.t.Fatal(err)
	}
	var serving sync.WaitGroup
	serving.Go(func() {
		for b := make([]byte, 2048); ; {
			n, from, err := udp.ReadFromUDPAddrPort(b)
			if err != nil {
				return
			}
			var q dnsmessage.Message
			if q.Unpack(b[:n]) != nil || len(q.Questions) != 1 {
				continue
			}
			a := dnsmessage.Message{Header: dnsmessage.Header{ID: q.ID, Response: true, RecursionDesired: q.RecursionDesired, RecursionAvailable: true}, Questions: q.Questions}
			switch asked := q.Questions[0]; {
			case !strings.EqualFold(asked.Name.String(), roomName+"."):
				a.RCode = dnsmessage.RCodeNameError
			case asked.Type == dnsmessage.TypeA:
				a.Answers = []dnsmessage.Resource{{
					Header: dnsmessage.ResourceHeader{Name: asked.Name, Type: asked.Type, Class: asked.Class, TTL: 60},
					Body:   &dnsmessage.AResource{A: [4]byte(outside.To4())},
				}}
			}
			if answer, err := a.Pack(); err == nil {
				udp.WriteToUDPAddrPort(answer, from)
			}
		}
	})
	c.t.Cleanup(func() { udp.Close(); serving.Wait() })
}

// room opens a conference outside.
func (c *captureApps) room() *webcall.Room {
	c.t.Helper()
	var web net.Listener
	var media net.PacketConn
	err := c.pair.Far.Do(func() (err error) {
		if web, err = net.Listen("tcp4", outside4+":0"); err != nil {
			return err
		}
		media, err = net.ListenPacket("udp4", outside4+":0")
		return err
	})
	if err != nil {
		c.t.Fatal(err)
	}
	return webcall.New(c.t, roomName, web, media)
}

// browse opens the pages of a room in one browser.
func (c *captureApps) browse(room *webcall.Room, names ...string) {
	c.t.Helper()
	c.launch("chromium", "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-quic", "--no-first-run",
		"--disable-background-networking", "--disable-component-update", "--disable-sync", "--user-data-dir="+filepath.Join(c.home, "chromium"),
		// A page in the background is slowed down otherwise.
		"--disable-background-timer-throttling", "--disable-renderer-backgrounding", "--disable-backgrounding-occluded-windows",
		// getUserMedia wants a secure origin.
		"--unsafely-treat-insecure-origin-as-secure="+room.Origin(),
		"--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream",
		"--disable-popup-blocking", room.Page(names...))
}

// captureFar is a far end of RTP: it counts what comes and sends it back.
type captureFar struct {
	udp  *net.UDPConn
	mu   sync.Mutex // guards the fields below
	came int
	from map[netip.AddrPort]bool
}

func (c *captureApps) far() *captureFar {
	c.t.Helper()
	f := &captureFar{from: map[netip.AddrPort]bool{}}
	err := c.pair.Far.Do(func() (err error) {
		f.udp, err = net.ListenUDP("udp4", &net.UDPAddr{IP: outside})
		return err
	})
	if err != nil {
		c.t.Fatal(err)
	}
	var reading sync.WaitGroup
	reading.Go(func() {
		for b := make([]byte, 2048); ; {
			n, from, err := f.udp.ReadFromUDPAddrPort(b)
			if err != nil {
				return
			}
			f.mu.Lock()
			f.came++
			f.from[from] = true
			f.mu.Unlock()
			f.udp.WriteToUDPAddrPort(b[:n], from) // what can not leave is lost like the rest
		}
	})
	c.t.Cleanup(func() { f.udp.Close(); reading.Wait() })
	return f
}

func (f *captureFar) port() int { return f.udp.LocalAddr().(*net.UDPAddr).Port }

// heard is how much came, and from how many addresses.
func (f *captureFar) heard() (came, from int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.came, len(f.from)
}

// stream sends sound by RTP with GStreamer, 50 packets a second.
func (c *captureApps) stream(to *captureFar) {
	c.t.Helper()
	c.launch("gst-launch-1.0", "audiotestsrc", "is-live=true", "samplesperbuffer=160", "!", "mulawenc", "!", "rtppcmupay", "!",
		"udpsink", "host="+outside4, fmt.Sprintf("port=%d", to.port()))
}

//go:embed testdata/sip.xml
var sipScenario []byte

// sip calls a SIP phone outside, which sends back the sound that comes, and hangs
// up after a while.
func (c *captureApps) sip(length time.Duration) *exec.Cmd {
	c.t.Helper()
	c.start(c.pair.Far, "sipp", "-sn", "uas", "-i", outside4, "-mi", outside4, "-rtp_echo", "-nostdin")
	for name, b := range map[string][]byte{"sip.xml": sipScenario, "sound.ulaw": bytes.Repeat([]byte{0xff}, 8000)} { // silence, 1 s
		if err := os.WriteFile(filepath.Join(c.home, name), b, 0o644); err != nil {
			c.t.Fatal(err)
		}
	}
	// An INVITE that comes before the phone listens is sent again.
	return c.launch("sipp", outside4+":5060", "-sf", "sip.xml", "-i", netpair.NearAddr.String(), "-mi", netpair.NearAddr.String(),
		"-m", "1", "-d", fmt.Sprint(length.Milliseconds()), "-timeout", fmt.Sprint(runPatience.Seconds()), "-timeout_error", "-nostdin")
}

// live is why the sidecar takes an app to be in a call, with media both ways;
// empty: it does not.
func (c *captureApps) live(app string) string {
	for _, ch := range runStatus(c.t, c.socket).Channels {
		if why := strings.Join(ch.Evidence, "; "); ch.App == app && ch.State == "live" && strings.Contains(why, " up in ") && strings.Contains(why, " down in ") {
			return why
		}
	}
	return ""
}

// Apps that know nothing of a proxy hold their calls through a firewall that lets
// only port 443 pass, and keep them when that loses UDP or the sidecar is killed.
func TestAppsThatAreCapturedHoldTheirCallsThroughPort443(t *testing.T) {
	if testing.Short() {
		t.Skip("the calls last ten seconds")
	}
	c := newCaptureApps(t)
	began, stalls := time.Now(), callStalls(t)
	w := c.pair.Watch(t, 443)
	if out, err := c.capture(0, "on", "--user", fmt.Sprint(captureUser), "--dns", "--control", c.socket); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}

	names := []string{"anna", "bert"}
	c.names()
	room, rtp := c.room(), c.far()
	c.browse(room, names...)
	c.stream(rtp)

	// goesOn waits until each call has gone on for some time from now.
	goesOn := func(when string) {
		t.Helper()
		began, before := time.Now(), map[string]webcall.Report{}
		for _, name := range names {
			before[name], _ = room.Last(name)
		}
		came, _ := rtp.heard()
		runEventually(t, when+": media go both ways between the pages, and from GStreamer", func() bool {
			ok := true
			for _, name := range names {
				was := before[name]
				is, _ := room.Last(name)
				if is.Error != "" {
					t.Fatalf("%s's page: %s", name, is.Error)
				}
				ok = ok && is.Decoded >= was.Decoded+15
				for _, kind := range []string{"audio", "video"} {
					ok = ok && is.Sent[kind] >= was.Sent[kind]+15 && is.Received[kind] >= was.Received[kind]+15
				}
			}
			now, _ := rtp.heard()
			return ok && now >= came+50
		})
		t.Logf("%s: a second of media took %v", when, time.Since(began).Round(time.Millisecond))
	}
	// connected fails the test if a page has found itself cut off; it does when it
	// has heard nothing for 2.5 s.
	connected := func() {
		t.Helper()
		held := stalls(began, time.Now())
		for _, name := range names {
			r, _ := room.Last(name)
			if held < time.Second && slices.ContainsFunc(r.ICE, func(s string) bool { return s != "checking" && s != "connected" && s != "completed" }) {
				t.Errorf("%s's ICE states were %v (the machine stood still for %v)", name, r.ICE, held)
			}
		}
	}
	goesOn("at first")
	phone := c.sip(5 * time.Second)
	for _, app := range []string{"chromium", "gst-launch-1.0", "sipp"} {
		var why string
		runEventually(t, "the sidecar says that "+app+" is in a call", func() bool { why = c.live(app); return why != "" })
		t.Logf("%s: %s", app, why)
	}
	first := map[string]webcall.Report{}
	for _, name := range names {
		r, _ := room.Last(name)
		first[name] = r
		// What a page takes for its own address is the cloud proxy's, as behind a NAT.
		own, other, _ := strings.Cut(r.Pair, " - ")
		if !slices.Contains(room.Heard(), strings.TrimPrefix(own, "prflx udp ")) || !strings.HasPrefix(other, "host udp "+outside4) {
			t.Errorf("%s's pair is %s, want one from %v to %s", name, r.Pair, room.Heard(), outside4)
		}
	}
	runEventually(t, "datagrams go by sealed, with TLS joined beside it", func() bool {
		l := runStatus(c.t, c.socket).Link
		return l.Way == "sealed" && l.Streams == "tls"
	})

	const noUDP = "iifname link meta l4proto udp drop"
	callFilter(t, c.pair.Near, noUDP)
	callFilter(t, c.pair.Far, captureFirewall+"\n"+noUDP)
	runEventually(t, "datagrams go by lanes", func() bool { return runStatus(c.t, c.socket).Link.Way == "lanes" })
	goesOn("without UDP")
	callFilter(t, c.pair.Near, "")
	callFilter(t, c.pair.Far, captureFirewall)
	runEventually(t, "datagrams go by sealed again", func() bool { return runStatus(t, c.socket).Link.Way == "sealed" })
	goesOn("with UDP again")
	for _, name := range names {
		r, _ := room.Last(name)
		t.Logf("%s: pair %s, ICE states %v, %d frames decoded", name, r.Pair, r.ICE, r.Decoded)
		if was := first[name]; r.Pair != was.Pair || r.Pairs != was.Pairs {
			t.Errorf("%s had the pair %s, has %s, choice %d instead of %d", name, was.Pair, r.Pair, r.Pairs, was.Pairs)
		}
	}
	connected()
	if heard := room.Heard(); len(heard) != len(names) {
		t.Errorf("the pages came from %v, want one egress port each", heard)
	}
	if _, from := rtp.heard(); from != 1 {
		t.Errorf("the RTP stream came from %d addresses, want one egress port", from)
	}
	// The SIP call has ended as it should.
	if err := phone.Wait(); err != nil {
		t.Errorf("the SIP call: %v", err)
	}
	hungUp := time.Now()
	runEventually(t, "the sidecar says that it has ended", func() bool { return c.live("sipp") == "" })
	if took := time.Since(hungUp); took > 15*time.Second { // 30 s: its silence alone has told
		t.Errorf("the sidecar knows after %v that the SIP call has ended", took)
	} else {
		t.Logf("the sidecar knows after %v that the SIP call has ended", took.Round(time.Millisecond))
	}

	st := runStatus(t, c.socket)
	t.Logf("captured: %+v; dropped: %v", *st.Capture, st.Dropped)
	// What is captured has no connection to the sidecar that could break: when that
	// is killed, the next takes over, if only its configuration says so.
	if err := os.WriteFile(filepath.Join(c.dir, "culvert.yaml"), []byte(strings.Replace(c.read("culvert.yaml"), "capture: {", fmt.Sprintf("capture: {users: %d, ", captureUser), 1)), 0o600); err != nil {
		t.Fatal(err)
	}
	c.sidecar.Process.Kill()
	c.sidecar.Wait()
	c.run()
	goesOn("with another sidecar")
	connected()

	s := w.Stop()
	if s.UDP < 100 || s.TCP < 100 {
		t.Errorf("seen %+v, want a hundred packets of each kind at least", s)
	}
	for what, n := range s.Stray {
		t.Errorf("the link saw %s, %d times", what, n)
	}
	// The same apps are seen there as soon as nothing captures them.
	if out, err := c.capture(0, "off"); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	runEventually(t, "what is not captured is seen on the link", func() bool {
		w := c.pair.Watch(t, 443)
		time.Sleep(100 * time.Millisecond) // is how long it watches
		return len(w.Stop().Stray) > 0
	})
}
