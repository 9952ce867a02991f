package webcall_test

import (
	"bytes"
	"encoding/json"
	"io"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/pion/logging"
	"github.com/pion/rtcp"
	"github.com/pion/rtp"
	"github.com/pion/webrtc/v4"
	"go.uber.org/goleak"

	"culvert/cmd/internal/webcall"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// patience bounds each wait for something that must happen.
const patience = time.Minute

func newRoom(t *testing.T) *webcall.Room {
	t.Helper()
	web, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	media, err := net.ListenPacket("udp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	return webcall.New(t, "127.0.0.1", web, media)
}

// ask is one request to a room, and returns the answer's status and body.
func ask(t *testing.T, method, url string, body any) (int, []byte) {
	t.Helper()
	b, _ := json.Marshal(body)
	q, err := http.NewRequestWithContext(t.Context(), method, url, bytes.NewReader(b))
	if err != nil {
		t.Fatal(err)
	}
	q.Close = true
	a, err := http.DefaultClient.Do(q)
	if err != nil {
		t.Fatal(err)
	}
	defer a.Body.Close()
	b, err = io.ReadAll(a.Body)
	if err != nil {
		t.Fatal(err)
	}
	return a.StatusCode, b
}

// guest is one that takes part as the page does.
type guest struct {
	pc      *webrtc.PeerConnection
	sound   *webrtc.TrackLocalStaticRTP
	picture *webrtc.TrackLocalStaticRTP
	got     chan *rtp.Packet
	asked   chan struct{} // for a whole picture
}

func join(t *testing.T, room *webcall.Room, name string) *guest {
	t.Helper()
	quiet := logging.NewDefaultLoggerFactory()
	quiet.DefaultLogLevel = logging.LogLevelDisabled
	s := webrtc.SettingEngine{LoggerFactory: quiet}
	s.SetIncludeLoopbackCandidate(true)
	s.SetIPFilter(net.IP.IsLoopback)
	pc, err := webrtc.NewAPI(webrtc.WithSettingEngine(s)).NewPeerConnection(webrtc.Configuration{})
	if err != nil {
		t.Fatal(err)
	}
	g := &guest{pc: pc, got: make(chan *rtp.Packet), asked: make(chan struct{}, 1)}
	end := make(chan struct{})
	var wg sync.WaitGroup
	t.Cleanup(func() {
		close(end)
		pc.GracefulClose()
		wg.Wait()
	})
	pc.OnTrack(func(r *webrtc.TrackRemote, _ *webrtc.RTPReceiver) {
		wg.Go(func() {
			for {
				pkt, _, err := r.ReadRTP()
				if err != nil {
					return
				}
				pc.WriteRTCP([]rtcp.Packet{&rtcp.PictureLossIndication{MediaSSRC: uint32(r.SSRC())}})
				select {
				case g.got <- pkt:
				case <-end:
				}
			}
		})
	})
	for _, track := range []struct {
		at   **webrtc.TrackLocalStaticRTP
		what webrtc.RTPCodecCapability
	}{
		{&g.sound, webrtc.RTPCodecCapability{MimeType: webrtc.MimeTypeOpus, ClockRate: 48000, Channels: 2}},
		{&g.picture, webrtc.RTPCodecCapability{MimeType: webrtc.MimeTypeVP8, ClockRate: 90000}},
	} {
		if *track.at, err = webrtc.NewTrackLocalStaticRTP(track.what, track.what.MimeType[:5], "here"); err != nil {
			t.Fatal(err)
		}
		sender, err := pc.AddTrack(*track.at)
		if err != nil {
			t.Fatal(err)
		}
		wg.Go(func() {
			for {
				all, _, err := sender.ReadRTCP()
				if err != nil {
					return
				}
				if slices.ContainsFunc(all, func(p rtcp.Packet) bool { _, ok := p.(*rtcp.PictureLossIndication); return ok }) {
					select {
					case g.asked <- struct{}{}:
					default:
					}
				}
			}
		})
	}
	offer, err := pc.CreateOffer(nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := pc.SetLocalDescription(offer); err != nil {
		t.Fatal(err)
	}
	status, b := ask(t, http.MethodPost, room.Origin()+"/join?name="+name, offer) // with no candidate in it
	var answer webrtc.SessionDescription
	if err := json.Unmarshal(b, &answer); status != http.StatusOK || err != nil {
		t.Fatalf("%s joins: %d %s", name, status, b)
	}
	if !strings.Contains(answer.SDP, "a=ice-lite") {
		t.Errorf("the room is not ICE lite:\n%s", answer.SDP)
	}
	if err := pc.SetRemoteDescription(answer); err != nil {
		t.Fatal(err)
	}
	return g
}

func TestEachOfTwoGetsWhatTheOtherSends(t *testing.T) {
	room := newRoom(t)
	anna, bert := join(t, room, "anna"), join(t, room, "bert")
	for name, call := range map[string]struct{ from, to *guest }{"anna to bert": {anna, bert}, "bert to anna": {bert, anna}} {
		var sound, picture, asked bool
		over := time.After(patience)
		for pkt := (rtp.Packet{Header: rtp.Header{Version: 2}}); !(sound && picture && asked); pkt.SequenceNumber++ {
			for payload, track := range map[string]*webrtc.TrackLocalStaticRTP{"sound": call.from.sound, "picture": call.from.picture} {
				pkt.Payload = []byte(payload)
				if err := track.WriteRTP(&pkt); err != nil {
					t.Fatal(err)
				}
			}
			select {
			case got := <-call.to.got:
				sound = sound || string(got.Payload) == "sound"
				picture = picture || string(got.Payload) == "picture"
			case <-call.from.asked:
				asked = true
			case <-time.After(10 * time.Millisecond):
			case <-over:
				t.Fatalf("%s: sound came: %v, pictures: %v, a request for a whole picture: %v", name, sound, picture, asked)
			}
		}
	}
	if heard := room.Heard(); len(heard) != 2 {
		t.Errorf("media came from %v, want two addresses", heard)
	}
}

func TestARoomGivesItsPageAndKeepsWhatItReports(t *testing.T) {
	room := newRoom(t)
	if status, b := ask(t, http.MethodGet, room.Page("anna", "bert"), nil); status != http.StatusOK || !strings.Contains(string(b), "getUserMedia") {
		t.Errorf("the page: %d %s", status, b)
	}
	if _, ok := room.Last("anna"); ok {
		t.Error("there is a report that nobody has made")
	}
	want := webcall.Report{ICE: []string{"connected"}, Pair: "a - b", Pairs: 1, Sent: map[string]int{"audio": 7}, Decoded: 3}
	ask(t, http.MethodPost, room.Origin()+"/report?name=anna", want)
	if got, ok := room.Last("anna"); !ok || got.Pair != "a - b" || got.Decoded != 3 || got.Sent["audio"] != 7 || !slices.Equal(got.ICE, want.ICE) {
		t.Errorf("the report is %+v, want %+v", got, want)
	}
}
