package check

import (
	"context"
	"encoding/binary"
	"net/netip"
	"sync"
	"time"

	"culvert/tunnel"
	"culvert/tunnel/wire"
)

// What is sent: sound of 50 packets a second, and pictures of 1 Mbit/s.
const (
	audioEvery, audioSize = 20 * time.Millisecond, 160
	videoEvery, videoSize = 8 * time.Millisecond, 1000
	// warmUp is how long little flows before it counts: by then datagrams go the
	// best way that there is. What is lost of it tells a path that loses from one
	// that is throttled.
	warmUp     = 1500 * time.Millisecond
	lightEvery = 10 * time.Millisecond // of audioSize: 128 kbit/s
	// straggle is how long the last ones may take to come back.
	straggle = 700 * time.Millisecond
)

// where our own fields are in a datagram, behind the echo's.
const (
	sequenceAt = wire.EchoMin
	sentAt     = sequenceAt + 4
)

// Measure sends a test call to the cloud proxy's echo and back. It fails where
// the echo refuses.
func Measure(ctx context.Context, through tunnel.Opener, d time.Duration) (Way, error) {
	var w Way
	light, err := newFlow(through, 111, lightEvery, audioSize)
	if err != nil {
		return w, err
	}
	defer light.packets.Close() // its last answers come while the call runs
	light.run(ctx, min(warmUp, d))
	if err := light.failure(); err != nil {
		return w, err
	}
	var audio, video *flow
	if audio, err = newFlow(through, 111, audioEvery, audioSize); err != nil {
		return w, err
	}
	defer audio.packets.Close()
	if video, err = newFlow(through, 96, videoEvery, videoSize); err != nil {
		return w, err
	}
	defer video.packets.Close()
	var wg sync.WaitGroup
	wg.Go(func() { audio.run(ctx, d) })
	wg.Go(func() { video.run(ctx, d) })
	wg.Wait()
	select {
	case <-time.After(straggle):
	case <-ctx.Done():
		return w, context.Cause(ctx)
	}
	for _, f := range []*flow{audio, video} {
		if err := f.failure(); err != nil {
			return w, err
		}
	}
	up, down := light.figures()
	w.Light = max(up.Loss, down.Loss)
	w.Audio.Up, w.Audio.Down = audio.figures()
	w.Video.Up, w.Video.Down = video.figures()
	w.Audio.judge(audioLimits)
	w.Video.judge(videoLimits)
	return w, nil
}

// A flow is one kind of media, and the tunnel.Receiver of what comes back.
type flow struct {
	packets tunnel.Packets
	epoch   time.Time
	every   time.Duration
	packet  []byte
	sent    int

	mu      sync.Mutex // guards the fields below
	samples []sample
	err     error
}

func newFlow(through tunnel.Opener, payloadType byte, every time.Duration, size int) (*flow, error) {
	f := &flow{epoch: time.Now(), every: every, packet: make([]byte, size)}
	f.packet[0], f.packet[1] = 0x80, payloadType // RFC 3550 §5.1
	binary.BigEndian.PutUint32(f.packet[8:], 0xca11<<8|uint32(payloadType))
	var err error
	f.packets, err = through.OpenPackets(tunnel.Peer{User: "check", Held: true}, f)
	return f, err
}

// run sends for a while, at a steady rate also where the machine stood still.
func (f *flow) run(ctx context.Context, d time.Duration) {
	tick := time.NewTicker(f.every)
	defer tick.Stop()
	began := time.Now()
	for {
		now := time.Now()
		for due := int(min(now.Sub(began), d) / f.every); f.sent < due; f.sent++ {
			binary.BigEndian.PutUint16(f.packet[2:], uint16(f.sent))
			binary.BigEndian.PutUint32(f.packet[4:], uint32(f.sent)*uint32(f.every/time.Millisecond)*48)
			binary.BigEndian.PutUint32(f.packet[sequenceAt:], uint32(f.sent))
			binary.BigEndian.PutUint64(f.packet[sentAt:], uint64(time.Since(f.epoch)))
			if err := f.packets.Send(f.packet, wire.Echo); err != nil {
				f.fail(err)
				return
			}
			f.packets.Flush()
		}
		if now.Sub(began) >= d || f.failure() != nil {
			return
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}

func (f *flow) figures() (up, down Figures) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return figuresOf(f.sent, f.samples)
}

func (f *flow) fail(err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.err == nil {
		f.err = err
	}
}

func (f *flow) failure() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.err
}

// Deliver implements tunnel.Receiver.
func (f *flow) Deliver(p []byte, from netip.AddrPort) {
	back := time.Since(f.epoch)
	if from != wire.EchoFrom || len(p) != len(f.packet) {
		return
	}
	stamp := wire.ReadEchoStamp(p)
	f.mu.Lock()
	defer f.mu.Unlock()
	f.samples = append(f.samples, sample{
		sent: time.Duration(binary.BigEndian.Uint64(p[sentAt:])), back: back, far: stamp.Time, count: stamp.Count,
	})
}

// Unreachable implements tunnel.Receiver.
func (f *flow) Unreachable(_ netip.AddrPort, err error) { f.fail(err) }

// Closed implements tunnel.Receiver.
func (f *flow) Closed(err error) { f.fail(err) }
