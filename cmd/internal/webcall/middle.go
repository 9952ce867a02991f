package webcall

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"maps"
	"net"
	"slices"
	"sync"
	"testing"

	"github.com/pion/ice/v4"
	"github.com/pion/interceptor"
	"github.com/pion/logging"
	"github.com/pion/rtcp"
	"github.com/pion/webrtc/v4"
)

// middle passes on what two parties send: each gets what the other sends.
type middle struct {
	api  *webrtc.API
	conn *heard
	wg   sync.WaitGroup

	mu      sync.Mutex // guards parties
	parties map[string]*party
}

// party is one connection, seen from the middle.
type party struct {
	name string
	pc   *webrtc.PeerConnection
	to   map[string]*webrtc.TrackLocalStaticRTP // what it gets, by kind

	mu   sync.Mutex // guards from
	from map[string]*webrtc.TrackRemote
}

// heard keeps whom datagrams came from.
type heard struct {
	net.PacketConn
	mu   sync.Mutex // guards from
	from map[string]bool
}

func (h *heard) ReadFrom(b []byte) (int, net.Addr, error) {
	n, from, err := h.PacketConn.ReadFrom(b)
	if err == nil {
		h.mu.Lock()
		h.from[from.String()] = true
		h.mu.Unlock()
	}
	return n, from, err
}

func (h *heard) all() []string {
	h.mu.Lock()
	defer h.mu.Unlock()
	return slices.Sorted(maps.Keys(h.from))
}

func newMiddle(t testing.TB, media net.PacketConn) *middle {
	t.Helper()
	conn := &heard{PacketConn: media, from: map[string]bool{}}
	quiet := logging.NewDefaultLoggerFactory() // pion takes the end of a call for a fault
	quiet.DefaultLogLevel = logging.LogLevelDisabled
	s := webrtc.SettingEngine{LoggerFactory: quiet}
	s.SetLite(true)
	s.SetIncludeLoopbackCandidate(true)
	s.SetNetworkTypes([]webrtc.NetworkType{webrtc.NetworkTypeUDP4})
	s.SetICEMulticastDNSMode(ice.MulticastDNSModeDisabled)
	mux := ice.NewUDPMuxDefault(ice.UDPMuxParams{UDPConn: conn, Logger: quiet.NewLogger("ice")})
	s.SetICEUDPMux(mux)
	var codecs webrtc.MediaEngine
	var reg interceptor.Registry
	err := errors.Join(
		codecs.RegisterCodec(webrtc.RTPCodecParameters{RTPCodecCapability: opus, PayloadType: 111}, webrtc.RTPCodecTypeAudio),
		codecs.RegisterCodec(webrtc.RTPCodecParameters{RTPCodecCapability: vp8, PayloadType: 96}, webrtc.RTPCodecTypeVideo),
		webrtc.RegisterDefaultInterceptors(&codecs, &reg),
	)
	if err != nil {
		t.Fatal(err)
	}
	m := &middle{
		conn:    conn,
		api:     webrtc.NewAPI(webrtc.WithSettingEngine(s), webrtc.WithMediaEngine(&codecs), webrtc.WithInterceptorRegistry(&reg)),
		parties: map[string]*party{},
	}
	t.Cleanup(func() {
		m.mu.Lock()
		all := m.parties
		m.parties = nil // nobody joins any more
		m.mu.Unlock()
		for _, p := range all {
			p.pc.GracefulClose()
		}
		mux.Close()
		conn.Close()
		m.wg.Wait()
	})
	return m
}

var (
	opus = webrtc.RTPCodecCapability{MimeType: webrtc.MimeTypeOpus, ClockRate: 48000, Channels: 2, SDPFmtpLine: "minptime=10;useinbandfec=1"}
	vp8  = webrtc.RTPCodecCapability{MimeType: webrtc.MimeTypeVP8, ClockRate: 90000, RTCPFeedback: []webrtc.RTCPFeedback{
		{Type: "nack"}, {Type: "nack", Parameter: "pli"}, {Type: "transport-cc"},
	}}
)

// join answers an offer.
func (m *middle) join(ctx context.Context, name string, offer io.Reader) (*webrtc.SessionDescription, error) {
	var offered webrtc.SessionDescription
	if err := json.NewDecoder(offer).Decode(&offered); err != nil {
		return nil, err
	}
	pc, err := m.api.NewPeerConnection(webrtc.Configuration{})
	if err != nil {
		return nil, err
	}
	p := &party{name: name, pc: pc, to: map[string]*webrtc.TrackLocalStaticRTP{}, from: map[string]*webrtc.TrackRemote{}}
	answer, err := m.answer(ctx, p, offered)
	if err == nil {
		err = m.admit(p)
	}
	if err != nil {
		pc.GracefulClose()
		return nil, err
	}
	return answer, nil
}

func (m *middle) answer(ctx context.Context, p *party, offered webrtc.SessionDescription) (*webrtc.SessionDescription, error) {
	p.pc.OnTrack(func(r *webrtc.TrackRemote, _ *webrtc.RTPReceiver) { m.wg.Go(func() { m.pass(p, r) }) })
	for _, what := range []webrtc.RTPCodecCapability{opus, vp8} {
		track, err := webrtc.NewTrackLocalStaticRTP(what, what.MimeType[:5], "there")
		if err != nil {
			return nil, err
		}
		p.to[track.Kind().String()] = track
		sender, err := p.pc.AddTrack(track)
		if err != nil {
			return nil, err
		}
		m.wg.Go(func() { m.listen(p, track.Kind().String(), sender) })
	}
	if err := p.pc.SetRemoteDescription(offered); err != nil {
		return nil, err
	}
	answer, err := p.pc.CreateAnswer(nil)
	if err != nil {
		return nil, err
	}
	gathered := webrtc.GatheringCompletePromise(p.pc)
	if err := p.pc.SetLocalDescription(answer); err != nil {
		return nil, err
	}
	select {
	case <-gathered:
		return p.pc.LocalDescription(), nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

func (m *middle) admit(p *party) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	switch {
	case m.parties == nil:
		return errors.New("the test has ended")
	case m.parties[p.name] != nil:
		return errors.New("the name is taken")
	case len(m.parties) == 2:
		return errors.New("there are two already")
	}
	m.parties[p.name] = p
	return nil
}

// other is the one that p talks to; nil: it has not come.
func (m *middle) other(p *party) *party {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, o := range m.parties {
		if o != p {
			return o
		}
	}
	return nil
}

// pass hands what p sends to the other.
func (m *middle) pass(p *party, r *webrtc.TrackRemote) {
	kind := r.Kind().String()
	p.mu.Lock()
	p.from[kind] = r
	p.mu.Unlock()
	for {
		pkt, _, err := r.ReadRTP()
		if err != nil {
			return
		}
		// Extensions are numbered by each connection for itself.
		pkt.Extension, pkt.Extensions = false, nil
		if o := m.other(p); o != nil {
			o.to[kind].WriteRTP(pkt) // what can not leave is lost like the rest
		}
	}
}

// listen asks the other for a whole picture when p, which gets its, asks for one.
func (m *middle) listen(p *party, kind string, sender *webrtc.RTPSender) {
	for {
		all, _, err := sender.ReadRTCP()
		if err != nil {
			return
		}
		for _, report := range all {
			if _, ok := report.(*rtcp.PictureLossIndication); !ok {
				continue
			}
			if o := m.other(p); o != nil {
				o.ask(kind)
			}
		}
	}
}

// ask asks p for a whole picture.
func (p *party) ask(kind string) {
	p.mu.Lock()
	r := p.from[kind]
	p.mu.Unlock()
	if r != nil {
		p.pc.WriteRTCP([]rtcp.Packet{&rtcp.PictureLossIndication{MediaSSRC: uint32(r.SSRC())}}) // asked for again when lost
	}
}
