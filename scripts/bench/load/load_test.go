package main

import (
	"encoding/binary"
	"encoding/json"
	"net"
	"testing"
	"time"

	"culvert/scripts/bench/internal/measure"
	"culvert/scripts/bench/internal/packet"
)

func TestKinds(t *testing.T) {
	tests := map[string]struct {
		want kind
		bad  bool
	}{
		"video=2x210x1190": {want: kind{"video", 2, 210, 1190, packet.Video}},
		"audio=1x50x125":   {want: kind{"audio", 1, 50, 125, packet.Audio}},
		"video":            {bad: true},
		"=1x1x100":         {bad: true},
		"v=1x1":            {bad: true},
		"v=0x1x100":        {bad: true},
		"v=1xmanyx100":     {bad: true},
		"v=1x1x39":         {bad: true},
		"v=1x1x65508":      {bad: true},
	}
	for in, test := range tests {
		t.Run(in, func(t *testing.T) {
			if got, err := parseKind(in); (err != nil) != test.bad || got != test.want {
				t.Errorf("got %+v, %v", got, err)
			}
		})
	}
}

func TestSummaryCountsLateAndLostPacketsOfEachKind(t *testing.T) {
	ms := time.Millisecond
	audio := &stream{kind: kind{name: "audio"}, sent: make([]time.Duration, 4), gap: 30 * ms, back: []measure.Sample{
		{Up: 20 * ms, Down: 100 * ms}, {Up: 20 * ms, Down: 101 * ms}, {Up: 500 * ms, Down: 20 * ms},
	}}
	video := &stream{kind: kind{name: "video"}, sent: make([]time.Duration, 4), back: make([]measure.Sample, 4)}
	var r measure.Result
	summarize(&r, []*stream{audio, video}, &options{budget: 100 * ms, dur: time.Second, series: true})
	if r.Sent != 8 || r.Back != 7 || r.OnTime != 62.5 || r.LossPct != 12.5 || r.Gap != 30 || r.Up.Max != 500 {
		t.Errorf("all: %+v", r)
	}
	if a, v := r.Kinds["audio"], r.Kinds["video"]; a.OnTime != 25 || v.OnTime != 100 || r.Series == nil {
		t.Errorf("audio %+v, video %+v", a, v)
	}
}

func TestFarEndTellsWhatItHasReceived(t *testing.T) {
	f := &farEnd{runs: map[uint32]*tally{}}
	now := time.Unix(100, 0)
	f.count(packet.Packet{Run: 7, Counts: true, Sent: now.Add(-20 * time.Millisecond)}, now)
	f.count(packet.Packet{Run: 7, Counts: true, Sent: now.Add(-5 * time.Millisecond)}, now)
	f.count(packet.Packet{Run: 7, Sent: now.Add(-time.Hour)}, now) // warm-up
	f.count(packet.Packet{Run: 8, Counts: true, Sent: now}, now)
	us, them := net.Pipe()
	defer us.Close()
	go func() {
		defer them.Close()
		f.serveTCP(them)
	}()
	if _, err := us.Write(binary.BigEndian.AppendUint32([]byte{wantTally}, 7)); err != nil {
		t.Fatal(err)
	}
	var got tally
	if err := json.NewDecoder(us).Decode(&got); err != nil || got != (tally{Received: 2, OldestMs: 20}) {
		t.Errorf("got %+v, %v", got, err)
	}
}
