package wire

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"reflect"
	"strings"
	"testing"
	"testing/iotest"

	"culvert/tunnel"
)

func framed(body string) []byte {
	return append(binary.BigEndian.AppendUint16(nil, uint16(len(body))), body...)
}

func TestReadTakesOneMessageAndNotAByteMore(t *testing.T) {
	var b bytes.Buffer
	if err := Write(&b, Message{Opened: &Opened{}}); err != nil {
		t.Fatal(err)
	}
	b.WriteString("the stream's own bytes")
	r := iotest.OneByteReader(&b)
	if m, err := Read(r, Current); err != nil || m.Opened == nil {
		t.Fatalf("read %+v, %v", m, err)
	}
	if rest, _ := io.ReadAll(r); string(rest) != "the stream's own bytes" {
		t.Errorf("what follows is %q", rest)
	}
}

func TestReadRefuses(t *testing.T) {
	for name, c := range map[string]struct {
		in   []byte
		from Version
		code tunnel.Code
	}{
		"no JSON":                       {framed("hello"), Current, tunnel.Internal},
		"two messages in one":           {framed(`{"opened":{},"control":{}}`), Current, tunnel.Internal},
		"no message":                    {framed(`{}`), Current, tunnel.Internal},
		"null":                          {framed(`{"open":null}`), Current, tunnel.Internal},
		"an unknown member":             {framed(`{"opened":{"x":1}}`), Current, tunnel.Internal},
		"an unknown message":            {framed(`{"hello":{}}`), Current, tunnel.Internal},
		"a length over the limit":       {[]byte{0xff, 0xff, '{'}, Current, tunnel.Internal},
		"another major version":         {framed(`{"open":{"version":"2.0","app":"a","token":"t"}}`), Version{}, tunnel.VersionMismatch},
		"no version":                    {framed(`{"open":{"app":"a","token":"t"}}`), Version{}, tunnel.VersionMismatch},
		"a version that is none":        {framed(`{"open":{"version":"1.x","app":"a","token":"t"}}`), Version{}, tunnel.Internal},
		"a number that does not fit":    {framed(`{"closed":{"association":4294967296}}`), Current, tunnel.Internal},
		"an array in place of a string": {framed(`{"redirect":{"addresses":"x"}}`), Current, tunnel.Internal},
	} {
		t.Run(name, func(t *testing.T) {
			if m, err := Read(bytes.NewReader(c.in), c.from); tunnel.CodeOf(err) != c.code {
				t.Errorf("read %+v, error %v, want code %s", m, err, c.code)
			}
		})
	}
	if _, err := Read(bytes.NewReader([]byte{0, 9, '{'}), Current); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("a cut message is %v", err)
	}
	if _, err := Read(bytes.NewReader(nil), Current); err != io.EOF {
		t.Errorf("nothing is %v", err)
	}
}

func TestANewerMinorVersionMaySayMore(t *testing.T) {
	newer := Version{Current.Major, Current.Minor + 1}
	if m, err := Read(bytes.NewReader(framed(`{"closed":{"association":3,"mood":"good"}}`)), newer); err != nil || m.Closed == nil || m.Closed.Association != 3 {
		t.Errorf("read %+v, %v", m, err)
	}
	if m, err := Read(bytes.NewReader(framed(`{"open":{"version":"1.7","app":"a","token":"t","wish":1}}`)), Version{}); err != nil || m.Open == nil || m.Open.App != "a" {
		t.Errorf("read %+v, %v", m, err)
	}
}

func TestADeclaredLengthAllocatesNothing(t *testing.T) {
	in := append([]byte{0x3f, 0xff}, '{')
	if n := testing.AllocsPerRun(100, func() { Read(bytes.NewReader(in), Current) }); n > 20 {
		t.Errorf("%v allocations", n)
	}
}

func TestARefusalFromThePeerIsFitForATerminal(t *testing.T) {
	err := (&Refused{Code: "bad\x1b[31mcode", Text: "red \x1b[31m\r\n" + strings.Repeat("x", 9000)}).Err()
	if s := err.Error(); strings.ContainsAny(s, "\x1b\r\n") || len(s) > 500 {
		t.Errorf("%q", s)
	}
}

func TestWhatAPeerSaysWrongDoesNotFillTheLog(t *testing.T) {
	long := strings.Repeat("x", 15000)
	for body, from := range map[string]Version{`{"` + long + `":1}`: Current, `{"open":{"version":"` + long + `"}}`: {}, `{"open":{"version":"1.0","` + long + `":1}}`: {}} {
		if _, err := Read(bytes.NewReader(framed(body)), from); err == nil || len(err.Error()) > 400 {
			t.Errorf("an error of %d bytes", len(fmt.Sprint(err)))
		}
	}
}

func TestARefusalOfANewerPeerIsUnderstood(t *testing.T) {
	m, err := Read(bytes.NewReader(framed(`{"refused":{"code":"quota_exceeded","text":"full","retry_after":9}}`)), Version{})
	if err != nil || m.Refused == nil || m.Refused.Code != tunnel.QuotaExceeded {
		t.Errorf("%+v, %v", m, err)
	}
	if _, err := Read(bytes.NewReader(framed(`{"open":{"version":"1.9","app":"a","token":"t"},"join":{"version":"1.9","session":"s","as":"lane"}}`)), Version{}); err == nil {
		t.Error("two messages of a newer peer in one are accepted")
	}
}

func TestWriteRefusesWhatReadWould(t *testing.T) {
	if err := Write(io.Discard, Message{Refused: &Refused{Text: strings.Repeat("x", MaxMessage)}}); tunnel.CodeOf(err) != tunnel.LimitExceeded {
		t.Error(err)
	}
}

func TestParseRecordRefusesWhatIsCut(t *testing.T) {
	full := (&Header{Context: 9, Number: 1, Full: true, Association: 4, Target: tunnel.Target{Host: "a.example", Port: 5}}).Append(nil)
	for n := range full {
		if _, _, _, _, err := ParseRecord(full[:n]); err == nil {
			t.Errorf("%d of %d bytes are accepted", n, len(full))
		}
	}
	unreachable := (&Notice{Unreachable: true, Association: 1, Code: "x", Address: netip.MustParseAddrPort("[2001:db8::1]:9")}).Append(nil)
	for n := range unreachable {
		if _, _, _, _, err := ParseRecord(unreachable[:n]); err == nil {
			t.Errorf("%d of %d bytes are accepted", n, len(unreachable))
		}
	}
}

// everyNotice is one of each kind that is more than a context.
var everyNotice = []Notice{
	{Report: &Report{Use: Use{3, WaySealed, WayLanes}, Live: true, Time: 7, Echo: 8, Sent: 9, Lost: 10, Rate: 11, Delay: NoDelay, Seen: 12, Held: NothingSeen}},
	{Report: &Report{Often: true}},
	{Report: &Report{Strained: true}},
	{Probe: &Probe{Use: Use{1, WayDatagram, NoWay}, Nonce: 5, Size: MinProbe}},
	{Probe: &Probe{Nonce: 5, Size: 1200}},
	{Probe: &Probe{Nonce: 5, Size: 1200, Full: true}},
	{Answer: &Answer{Nonce: 5, Size: 1200}},
	{Fragment: Fragment{ID: 9, Index: 1, Count: 2, Piece: []byte{1}}},
	{Reset: &Reset{Epoch: 1, Token: [16]byte{15: 1}}},
}

func TestNoticesAreReadAsTheyWereWritten(t *testing.T) {
	for _, want := range everyNotice {
		p := written(want)
		_, _, got, isNotice, err := ParseRecord(p)
		if err != nil || !isNotice || !reflect.DeepEqual(got, want) {
			t.Errorf("%x is %+v, %v; want %+v", p, got, err, want)
		}
		least := len(p)
		if want.Probe != nil {
			least = MinProbe // the rest is padding
		}
		for n := range least {
			if _, _, _, _, err := ParseRecord(p[:n]); err == nil {
				t.Errorf("%d of %d bytes of %+v are accepted", n, len(p), want)
			}
		}
	}
	for name, f := range map[string]Fragment{"one piece": {Count: 1, Piece: []byte{1}}, "beyond the last": {Index: 2, Count: 2, Piece: []byte{1}}, "empty": {Count: 2}} {
		if _, _, _, _, err := ParseRecord(f.Append(nil)); err == nil {
			t.Errorf("a fragment that is %s is accepted", name)
		}
	}
}

func TestAShortHeaderCostsNoAllocation(t *testing.T) {
	h := Header{Context: 12, Number: 7}
	rec := append(h.Append(nil), make([]byte, 1000)...)
	out := make([]byte, 0, 2000)
	if n := testing.AllocsPerRun(100, func() {
		out = h.Append(out[:0])
		if _, _, _, _, err := ParseRecord(rec); err != nil {
			t.Fatal(err)
		}
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

func FuzzRecord(f *testing.F) {
	f.Add((&Header{Context: 5, Number: 258}).Append(nil))
	f.Add((&Header{Context: 5, Full: true, Association: 1, Held: true, Target: tunnel.Target{Addr: netip.MustParseAddr("203.0.113.9"), Port: 3478}}).Append(nil))
	f.Add((&Header{Full: true, Association: 1, Target: tunnel.Target{Host: "media.example", Port: 1}}).Append(nil))
	f.Add((&Notice{Ack: 3}).Append(nil))
	f.Add((&Notice{Unreachable: true, Association: 9, Code: "timed_out"}).Append(nil))
	for _, n := range everyNotice {
		f.Add(written(n))
	}
	f.Fuzz(func(t *testing.T, p []byte) {
		h, payload, n, isNotice, err := ParseRecord(p)
		if err != nil {
			return
		}
		if isNotice {
			known := n.Ack != 0 || n.Unknown != 0 || n.Unreachable || n.Report != nil || n.Probe != nil || n.Answer != nil || n.Reset != nil || n.Fragment.Count > 0
			if _, _, n2, _, err := ParseRecord(written(n)); known && (err != nil || !reflect.DeepEqual(n, n2)) {
				t.Errorf("%x: %+v is written as %x and read as %+v (%v)", p, n, written(n), n2, err)
			}
			return
		}
		again := append(h.Append(nil), payload...)
		h2, payload2, _, _, err := ParseRecord(again)
		if err != nil || h2 != h || !bytes.Equal(payload, payload2) {
			t.Errorf("%x: %+v is written as %x and read as %+v (%v)", p, h, again, h2, err)
		}
	})
}

func FuzzMessage(f *testing.F) {
	for _, s := range []string{`{"opened":{}}`, `{"open":{"version":"1.0","app":"a","token":"t"}}`, `{"closed":{"association":1}}`, `{"stream":{"number":1,"host":"h","port":1}}`} {
		f.Add(framed(s))
	}
	f.Fuzz(func(t *testing.T, p []byte) {
		m, err := Read(bytes.NewReader(p), Version{})
		if err != nil {
			return
		}
		var b bytes.Buffer
		if err := Write(&b, m); err != nil {
			return // grew over the limit by escaping
		}
		if _, err := Read(&b, Version{}); err != nil {
			t.Errorf("%q can not be read again: %v", b.Bytes(), err)
		}
	})
}

func TestAWaysOwnProbesSayNothingOfUse(t *testing.T) {
	for name, test := range map[string]struct {
		record []byte
		want   bool
	}{
		"its own":         {(&Probe{Nonce: 1, Size: 1200}).Append(nil), true},
		"the sidecar's":   {(&Probe{Use: Use{N: 1}, Nonce: 1, Size: 1200}).Append(nil), false},
		"an answer":       {(&Answer{Nonce: 1}).Append(nil), false},
		"too short":       {(&Probe{Nonce: 1}).Append(nil)[:MinProbe-1], false},
		"a datagram":      {(&Header{Context: 1}).Append(nil), false},
		"nothing":         {nil, false},
		"a report":        {(&Report{}).Append(nil), false},
		"a reset's token": {(&Reset{}).Append(nil), false},
	} {
		if got := IsOwnProbe(test.record); got != test.want {
			t.Errorf("%s: %v", name, got)
		}
	}
}
