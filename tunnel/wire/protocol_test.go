package wire

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"os"
	"strings"
	"testing"
)

// examples returns the fenced blocks of PROTOCOL.md by their kind.
func examples(t *testing.T) map[string][][]string {
	t.Helper()
	f, err := os.Open("PROTOCOL.md")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	all := map[string][][]string{}
	kind, block := "", []string(nil)
	for sc := bufio.NewScanner(f); sc.Scan(); {
		line := sc.Text()
		switch {
		case kind == "" && strings.HasPrefix(line, "```"):
			kind, block = strings.TrimPrefix(line, "```"), nil
		case strings.HasPrefix(line, "```"):
			all[kind] = append(all[kind], block)
			kind = ""
		case kind != "":
			block = append(block, line)
		}
	}
	return all
}

// bytesOf reads the hex of an example; "-" stands for an empty payload.
func bytesOf(t *testing.T, line string) []byte {
	t.Helper()
	b, err := hex.DecodeString(strings.NewReplacer(" ", "", "-", "").Replace(line))
	if err != nil {
		t.Fatalf("%q: %v", line, err)
	}
	return b
}

func describe(p []byte) string {
	h, payload, n, isNotice, err := ParseRecord(p)
	switch {
	case err != nil:
		return err.Error()
	case isNotice && n.Ack != 0:
		return fmt.Sprintf("ack context=%d", n.Ack)
	case isNotice && n.Unknown != 0:
		return fmt.Sprintf("unknown context=%d", n.Unknown)
	case n.Report != nil:
		r := n.Report
		return fmt.Sprintf("report use=%d,%s,%s live=%v often=%v time=%d echo=%d sent=%d lost=%d rate=%d delay=%d seen=%d held=%d",
			r.Use.N, r.Use.Way, r.Use.Also, r.Live, r.Often, r.Time, r.Echo, r.Sent, r.Lost, r.Rate, r.Delay, r.Seen, r.Held)
	case n.Probe != nil:
		return fmt.Sprintf("probe use=%d,%s,%s nonce=%x size=%d", n.Probe.Use.N, n.Probe.Use.Way, n.Probe.Use.Also, n.Probe.Nonce, n.Probe.Size)
	case n.Answer != nil:
		return fmt.Sprintf("answer nonce=%x size=%d", n.Answer.Nonce, n.Answer.Size)
	case n.Fragment.Count > 0:
		return fmt.Sprintf("fragment id=%d index=%d count=%d piece=%x", n.Fragment.ID, n.Fragment.Index, n.Fragment.Count, n.Fragment.Piece)
	case n.Reset != nil:
		return fmt.Sprintf("reset epoch=%d token=%x", n.Reset.Epoch, n.Reset.Token)
	case isNotice:
		return fmt.Sprintf("unreachable association=%d code=%s address=%s", n.Association, n.Code, n.Address)
	case h.Full:
		return fmt.Sprintf("full context=%d number=%d association=%d held=%v target=%s payload=%s", h.Context, h.Number, h.Association, h.Held, h.Target, payload)
	}
	return fmt.Sprintf("short context=%d number=%d payload=%s", h.Context, h.Number, payload)
}

// written is a notice as its sender writes it.
func written(n Notice) []byte {
	switch {
	case n.Report != nil:
		return n.Report.Append(nil)
	case n.Probe != nil:
		return n.Probe.Append(nil)
	case n.Answer != nil:
		return n.Answer.Append(nil)
	case n.Fragment.Count > 0:
		return n.Fragment.Append(nil)
	case n.Reset != nil:
		return n.Reset.Append(nil)
	}
	return n.Append(nil)
}

func TestTheDocumentsRecordsAreReadAndWrittenAsItSays(t *testing.T) {
	blocks := examples(t)["record"]
	if len(blocks) < 11 {
		t.Fatalf("PROTOCOL.md has %d examples of records", len(blocks))
	}
	for _, b := range blocks {
		raw := bytesOf(t, b[0])
		if got := describe(raw); got != b[1] {
			t.Errorf("%s\n is  %s\n not %s", b[0], got, b[1])
		}
		h, payload, n, isNotice, _ := ParseRecord(raw)
		again := append(h.Append(nil), payload...)
		if isNotice {
			again = written(n)
		}
		if !bytes.Equal(again, raw) {
			t.Errorf("%s is written as %x", b[0], again)
		}
	}
}

func TestTheDocumentsMessagesAreReadAndWrittenAsItSays(t *testing.T) {
	seen := map[string]bool{}
	for _, b := range examples(t)["message"] {
		body := strings.Join(b, "")
		m, err := decode([]byte(body), Version{})
		if err != nil {
			t.Errorf("%s: %v", body, err)
			continue
		}
		var out bytes.Buffer
		if err := Write(&out, m); err != nil {
			t.Fatal(err)
		}
		if got := out.String()[2:]; got != body {
			t.Errorf("%s\nis written as\n%s", body, got)
		}
		for name := range mustObject(t, body) {
			seen[name] = true
		}
	}
	// Every message there is stands in the document.
	for _, name := range []string{"open", "join", "welcome", "redirect", "refused", "control", "stream", "opened", "resume", "resumed", "closed", "go_away", "renew", "renewed", "end"} {
		if !seen[name] {
			t.Errorf("PROTOCOL.md has no example of %q", name)
		}
	}
}

func mustObject(t *testing.T, s string) map[string]any {
	t.Helper()
	var o map[string]any
	if err := json.Unmarshal([]byte(s), &o); err != nil {
		t.Fatal(err)
	}
	return o
}

func TestTheDocumentsLaneRecordsHaveTheLengthTheySay(t *testing.T) {
	blocks := examples(t)["lane"]
	if len(blocks) == 0 {
		t.Fatal("PROTOCOL.md has no example of a lane record")
	}
	for _, b := range blocks {
		raw := bytesOf(t, b[0])
		if n := int(binary.BigEndian.Uint16(raw)); n != len(raw)-2 {
			t.Errorf("%s declares %d bytes and has %d", b[0], n, len(raw)-2)
		}
		if got := fmt.Sprintf("time=%d record=%x", binary.BigEndian.Uint16(raw[2:]), raw[4:]); got != b[1] {
			t.Errorf("%s is %s", b[0], got)
		}
	}
}
