package main

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/pion/ice/v4"
	"github.com/pion/interceptor"
	"github.com/pion/logging"
	"github.com/pion/rtp"
	"github.com/pion/webrtc/v4"
)

// medium is one kind of media as it is sent each way.
type medium struct {
	name    string
	kind    webrtc.RTPCodecCapability
	every   time.Duration // one frame
	packets int           // in a frame
	size    int           // payload bytes of a packet
	clock   uint32        // RTP ticks per frame
}

var (
	audio = medium{"audio", webrtc.RTPCodecCapability{MimeType: webrtc.MimeTypeOpus, ClockRate: 48000, Channels: 2}, 20 * time.Millisecond, 1, 120, 960}
	video = medium{"video", webrtc.RTPCodecCapability{MimeType: webrtc.MimeTypeVP8, ClockRate: 90000}, 33 * time.Millisecond, 4, 1000, 2970}
)

// flow counts what one track brought.
type flow struct {
	medium medium
	sent   atomic.Int64

	mu       sync.Mutex // guards the fields below
	received int
	delays   []time.Duration
	jitter   float64 // RFC 3550 §6.4.1, seconds
	last     time.Duration
}

func (f *flow) arrived(delay time.Duration) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.received++; f.received > 1 {
		f.jitter += (math.Abs((delay - f.last).Seconds()) - f.jitter) / 16
	}
	f.last = delay
	f.delays = append(f.delays, delay)
}

// report is what arrived of a flow.
type report struct {
	sent, received      int
	lost                float64 // percent
	median, p99, jitter time.Duration
}

func (f *flow) report() report {
	f.mu.Lock()
	defer f.mu.Unlock()
	r := report{sent: int(f.sent.Load()), received: f.received, jitter: time.Duration(f.jitter * float64(time.Second))}
	if r.sent > 0 {
		r.lost = 100 * float64(r.sent-r.received) / float64(r.sent)
	}
	if n := len(f.delays); n > 0 {
		d := slices.Sorted(slices.Values(f.delays))
		r.median, r.p99 = d[n/2], d[min(n-1, n*99/100)]
	}
	return r
}

// party is one side of the call.
type party struct {
	pc        *webrtc.PeerConnection
	connected chan struct{}
	in        []*flow // what the other side sends, audio then video
	wg        sync.WaitGroup
}

// newParty makes a side of the call. conn, where given, is the socket for all
// its media; otherwise it uses loopback directly.
func newParty(conn net.PacketConn, in []*flow) (*party, error) {
	quiet := logging.NewDefaultLoggerFactory() // pion takes the end of a call for a fault
	quiet.DefaultLogLevel = logging.LogLevelDisabled
	s := webrtc.SettingEngine{LoggerFactory: quiet}
	s.SetIncludeLoopbackCandidate(true)
	s.SetNetworkTypes([]webrtc.NetworkType{webrtc.NetworkTypeUDP4})
	s.SetIPFilter(func(ip net.IP) bool { return ip.IsLoopback() })
	if conn != nil {
		s.SetICEUDPMux(ice.NewUDPMuxDefault(ice.UDPMuxParams{UDPConn: conn, Logger: quiet.NewLogger("ice")}))
	}
	var m webrtc.MediaEngine
	if err := m.RegisterDefaultCodecs(); err != nil {
		return nil, err
	}
	// Sender and receiver reports only: retransmissions would hide a loss.
	var reg interceptor.Registry
	if err := webrtc.ConfigureRTCPReports(&reg); err != nil {
		return nil, err
	}
	pc, err := webrtc.NewAPI(webrtc.WithSettingEngine(s), webrtc.WithMediaEngine(&m), webrtc.WithInterceptorRegistry(&reg)).NewPeerConnection(webrtc.Configuration{})
	if err != nil {
		return nil, err
	}
	p := &party{pc: pc, connected: make(chan struct{}), in: in}
	var once sync.Once
	pc.OnConnectionStateChange(func(st webrtc.PeerConnectionState) {
		if st == webrtc.PeerConnectionStateConnected {
			once.Do(func() { close(p.connected) })
		}
	})
	pc.OnTrack(func(t *webrtc.TrackRemote, _ *webrtc.RTPReceiver) {
		p.wg.Go(func() { p.receive(t) })
	})
	return p, nil
}

// receive reads a track to its end. Each payload begins with the time at which
// it was sent, by the clock that both sides share on this machine.
func (p *party) receive(t *webrtc.TrackRemote) {
	f := p.in[0]
	if t.Kind() == webrtc.RTPCodecTypeVideo {
		f = p.in[1]
	}
	b := make([]byte, 1500)
	var pkt rtp.Packet
	for {
		n, _, err := t.Read(b)
		if err != nil {
			return
		}
		if pkt.Unmarshal(b[:n]) == nil && len(pkt.Payload) >= 8 {
			f.arrived(time.Since(time.Unix(0, int64(binary.BigEndian.Uint64(pkt.Payload)))))
		}
	}
}

// track adds one medium to what the party sends.
func (p *party) track(m medium) (*webrtc.TrackLocalStaticRTP, error) {
	t, err := webrtc.NewTrackLocalStaticRTP(m.kind, m.name, "culvert-demo")
	if err != nil {
		return nil, err
	}
	sender, err := p.pc.AddTrack(t)
	if err != nil {
		return nil, err
	}
	p.wg.Go(func() { // RTCP must be read for the reports to work
		b := make([]byte, 1500)
		for {
			if _, _, err := sender.Read(b); err != nil {
				return
			}
		}
	})
	return t, nil
}

// send sends one medium until ctx ends.
func send(ctx context.Context, t *webrtc.TrackLocalStaticRTP, f *flow) {
	tick := time.NewTicker(f.medium.every)
	defer tick.Stop()
	pkt := rtp.Packet{Header: rtp.Header{Version: 2}, Payload: make([]byte, f.medium.size)}
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		pkt.Timestamp += f.medium.clock
		for i := range f.medium.packets {
			pkt.SequenceNumber++
			pkt.Marker = i == f.medium.packets-1
			binary.BigEndian.PutUint64(pkt.Payload, uint64(time.Now().UnixNano()))
			t.WriteRTP(&pkt) // what can not leave counts as sent: it is lost like the rest
			f.sent.Add(1)
		}
	}
}

// call is a two-party call: an app that speaks through the proxy, and a far end.
type call struct {
	app, far *party
	up, down []*flow // audio then video
	tracks   [4]*webrtc.TrackLocalStaticRTP
}

// place sets up the call: the app offers, the far end answers, ICE and DTLS run
// over the app's association.
func place(ctx context.Context, conn net.PacketConn) (c *call, err error) {
	flows := func() []*flow { return []*flow{{medium: audio}, {medium: video}} }
	c = &call{up: flows(), down: flows()}
	defer func() {
		if err != nil {
			c.hangUp()
		}
	}()
	if c.app, err = newParty(conn, c.down); err != nil {
		return c, err
	}
	if c.far, err = newParty(nil, c.up); err != nil {
		return c, err
	}
	for i, p := range []*party{c.app, c.app, c.far, c.far} {
		if c.tracks[i], err = p.track([]medium{audio, video}[i%2]); err != nil {
			return c, err
		}
	}
	if err = negotiate(ctx, c.app.pc, c.far.pc); err != nil {
		return c, err
	}
	for _, p := range []*party{c.app, c.far} {
		select {
		case <-p.connected:
		case <-ctx.Done():
			return c, fmt.Errorf("the call did not connect: %w", context.Cause(ctx))
		}
	}
	return c, nil
}

// negotiate exchanges offer and answer with all candidates in them.
func negotiate(ctx context.Context, a, b *webrtc.PeerConnection) error {
	local := func(pc *webrtc.PeerConnection, d webrtc.SessionDescription, err error) error {
		if err != nil {
			return err
		}
		gathered := webrtc.GatheringCompletePromise(pc)
		if err := pc.SetLocalDescription(d); err != nil {
			return err
		}
		select {
		case <-gathered:
			return nil
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	offer, err := a.CreateOffer(nil)
	if err := local(a, offer, err); err != nil {
		return err
	}
	if err := b.SetRemoteDescription(*a.LocalDescription()); err != nil {
		return err
	}
	answer, err := b.CreateAnswer(nil)
	if err := local(b, answer, err); err != nil {
		return err
	}
	return a.SetRemoteDescription(*b.LocalDescription())
}

// talk sends media both ways until ctx ends, and waits for what is under way.
func (c *call) talk(ctx context.Context) {
	var wg sync.WaitGroup
	for i, f := range slices.Concat(c.up, c.down) {
		wg.Go(func() { send(ctx, c.tracks[i], f) })
	}
	wg.Wait()
	time.Sleep(300 * time.Millisecond) // what is still under way arrives
}

// hangUp ends the call and waits for both sides.
func (c *call) hangUp() error {
	var errs []error
	for _, p := range []*party{c.app, c.far} {
		if p != nil {
			errs = append(errs, p.pc.GracefulClose())
			p.wg.Wait()
		}
	}
	return errors.Join(errs...)
}
