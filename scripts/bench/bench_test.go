package main

import (
	"encoding/json"
	"encoding/pem"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"culvert/scripts/bench/internal/measure"
)

func TestRowsAreWhole(t *testing.T) {
	seen := map[string]bool{}
	for _, r := range rows {
		if seen[r.id] || len(r.columns) == 0 || len(r.load) == 0 || r.dur == 0 {
			t.Errorf("row %q is there twice, or lacks something", r.id)
		}
		seen[r.id] = true
		for _, name := range r.subjects {
			if s, ok := subjects[name]; !ok || s.name != name {
				t.Errorf("row %s: there is no subject %q", r.id, name)
			}
		}
		for _, b := range r.bars {
			for _, name := range append([]string{b.subject}, b.others...) {
				if !slices.Contains(r.subjects, name) {
					t.Errorf("row %s: the bar %q is about %s, which is not measured", r.id, b, name)
				}
			}
		}
		for _, e := range r.events {
			if r.link == "" || e.at >= r.dur || e.until >= r.dur {
				t.Errorf("row %s: %s comes too late, or has no link", r.id, e.what)
			}
		}
		if q := r.quick(); q.dur >= r.dur || len(q.events) > 0 && q.events[0].at >= q.dur {
			t.Errorf("row %s: quick is %v", r.id, q.dur)
		}
	}
}

// result has this rate of bulk.
func result(rate float64) *measure.Result { return &measure.Result{Bulk: rate} }

func TestVerdicts(t *testing.T) {
	entries := []entry{{Subject: "we", Result: result(80)}, {Subject: "slow", Result: result(50)}, {Subject: "fast", Result: result(100)}, {Subject: "broken", Error: "x"}}
	tests := map[string]struct {
		bar   bar
		want  string
		limit float64
		rival string
	}{
		"at least, reached":    {bar{subject: "we", plus: 80}, "pass", 80, ""},
		"at least, missed":     {bar{subject: "we", plus: 81}, "FAIL", 81, ""},
		"at most, reached":     {bar{subject: "we", plus: 80, most: true}, "pass", 80, ""},
		"at most, missed":      {bar{subject: "we", plus: 79, most: true}, "FAIL", 79, ""},
		"times the best":       {bar{subject: "we", times: .8, others: []string{"slow", "fast"}}, "pass", 80, "fast"},
		"times the least":      {bar{subject: "we", times: 1, others: []string{"fast", "slow"}, most: true}, "FAIL", 50, "slow"},
		"less than another":    {bar{subject: "we", times: 1, plus: -20, others: []string{"fast"}}, "pass", 80, "fast"},
		"a rival that failed":  {bar{subject: "we", times: 1, others: []string{"broken", "slow"}}, "pass", 50, "slow"},
		"no rival":             {bar{subject: "we", times: 1, others: []string{"broken", "absent"}}, "nothing to compare with", 0, ""},
		"itself not measured":  {bar{subject: "broken", plus: 1, most: true}, "not measured", 1, ""},
		"itself not even here": {bar{subject: "absent", plus: 1}, "not measured", 1, ""},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			test.bar.column = bulk
			v := judge(row{bars: []bar{test.bar}}, entries)[0]
			if v.Outcome != test.want || v.Limit != test.limit || v.Rival != test.rival {
				t.Errorf("got %+v", v)
			}
		})
	}
}

func TestBarsInWords(t *testing.T) {
	for want, b := range map[string]bar{
		"bulk, Mbit/s ≥ 250":                         atLeast(bulk, 250, "x")[0],
		"on time, % ≥ direct − 0.5":                  asDirect(onTime, 0.5, "x")[0],
		"p99, ms ≤ direct + 2":                       overDirect(p99, 2, "x")[0],
		"CPU, µs a packet ≤ 0.6 × the best of a, b":  atMostTimes(cpu, "x", 0.6, "a", "b")[0],
		"bulk, Mbit/s ≥ 0.8 × xray":                  atLeastTimes(bulk, "x", 0.8, "xray")[0],
		"CPU, µs a packet ≤ 1.9 × relay":             atMostTimes(cpu, "x", 1.9, "relay")[0],
		"own queues, ms ≤ 150":                       atMost(own, 150, "x")[0],
		"bulk, Mbit/s ≥ the best of hysteria, hy2":   atLeastTimes(bulk, "x", 1, "hysteria", "hy2")[0],
		"KB an association ≤ 24":                     atMost(memory, 24, "x")[0],
		"audio on time, % ≥ 95":                      atLeast(audio, 95, "x")[0],
		"median down, ms ≤ 45":                       atMost(downward, 45, "x")[0],
		"CPU, µs a packet ≤ 0.6 × the best of a, bc": atMostTimes(cpu, "x", 0.6, "a", "bc")[0],
	} {
		if got := b.String(); got != want {
			t.Errorf("got %q, want %q", got, want)
		}
	}
}

func TestMiddleOfRounds(t *testing.T) {
	e := middle([]entry{{Result: result(30)}, {Error: "x"}, {Result: result(10)}, {Result: result(20)}, {Result: result(40)}}, bulk)
	if e.Result == nil || e.Result.Bulk != 20 || len(e.Rounds) != 4 {
		t.Errorf("got %+v", e)
	}
	if e := middle([]entry{{Result: result(7)}}, bulk); e.Result.Bulk != 7 || e.Rounds != nil {
		t.Errorf("of one: %+v", e)
	}
}

func TestReportMergesSavesAndPublishes(t *testing.T) {
	dir := t.TempDir()
	var r report
	series := measure.NewSeries(time.Second, []time.Duration{0}, []measure.Sample{{Up: time.Millisecond}})
	put := func(id string, rate float64) {
		def, _ := find(id)
		e := entry{Subject: "culvert auto", Result: &measure.Result{Bulk: rate, Up: &measure.Delays{}, Down: &measure.Delays{}, Series: series}}
		r.merge(rowReport{ID: id, Title: def.title, Entries: []entry{e}, Verdicts: judge(def, []entry{e})})
	}
	put("bulkloss", 1)
	put("loss1", 2)
	put("bulkloss", 300)
	if err := r.save(dir); err != nil {
		t.Fatal(err)
	}
	got, err := load(dir + "/results.json")
	if err != nil {
		t.Fatal(err)
	}
	if len(got.Rows) != 2 || got.Rows[0].ID != "loss1" || got.Rows[1].Entries[0].Result.Bulk != 300 {
		t.Errorf("rows are not merged in order: %+v", got.Rows)
	}
	if got.Rows[0].Entries[0].Result.Series != nil || r.Rows[0].Entries[0].Result.Series == nil {
		t.Error("the series was saved, or lost")
	}
	text := got.markdown("last")
	for _, want := range []string{"| bulkloss | culvert auto | bulk, Mbit/s ≥ 250 | 300.0 | 250.0 |  | 1.20 | pass |", "](last/loss1.svg)", "1 of 4 bars are passed"} {
		if !strings.Contains(text, want) {
			t.Errorf("%q is not in\n%s", want, text)
		}
	}
	if strings.Contains(text, "bulkloss.svg") {
		t.Error("a row without delays has a picture")
	}
	readme, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	once, err := publish(string(readme), figuresMarks, text)
	if err != nil {
		t.Fatal(err)
	}
	if twice, err := publish(once, figuresMarks, text); err != nil || twice != once || !strings.Contains(once, text) {
		t.Errorf("publishing twice differs: %v", err)
	}
	if _, err := publish("no marks", faultsMarks, text); err == nil {
		t.Error("a README without marks was changed")
	}
}

func TestReportThatIsNotThereIsEmpty(t *testing.T) {
	if r, err := load(t.TempDir() + "/results.json"); err != nil || len(r.Rows) != 0 {
		t.Errorf("got %+v, %v", r, err)
	}
}

func TestPictureShowsTheEvents(t *testing.T) {
	r, _ := find("outage")
	series := measure.NewSeries(r.dur, []time.Duration{0}, nil)
	svg := picture(r, []entry{{Subject: "direct", Result: &measure.Result{Series: series}}, {Subject: "broken"}})
	if !strings.Contains(svg, "<title>down</title>") || strings.Contains(svg, "broken") {
		t.Errorf("got\n%s", svg)
	}
	if svg := picture(r, nil); svg != "" {
		t.Errorf("without figures: %s", svg)
	}
}

func TestOwnQueuesAreWhatTheLinkDidNotDo(t *testing.T) {
	r := row{link: "rate=10 delay=20ms"}
	if got := ownQueues(r, measure.Result{Oldest: 300}, 200); got != 80 {
		t.Errorf("got %v", got)
	}
	if got := ownQueues(r, measure.Result{Oldest: 30}, 200); got != 0 {
		t.Errorf("less than the link's: %v", got)
	}
}

func TestPeersConfigurationsAreJSON(t *testing.T) {
	s := &scene{dir: t.TempDir(), host: "198.18.64.2"}
	if _, err := s.certificate(); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(s.file("cert.pem"))
	if err != nil {
		t.Fatal(err)
	}
	if block, _ := pem.Decode(b); block == nil || block.Type != "CERTIFICATE" {
		t.Error("the certificate is no PEM")
	}
	for name, protocol := range map[string][2]string{"hysteria 2": {hy2In, hy2Out}, "TUIC": {tuicIn, tuicOut}, "trojan": {trojanIn, trojanOut}} {
		server, client := singBoxConfigs(s, protocol[0], protocol[1])
		for _, c := range []string{server, client} {
			if !json.Valid([]byte(c)) || strings.Contains(c, "SECRET") {
				t.Errorf("%s: %s", name, c)
			}
		}
	}
	server, client := xrayConfigs(s, "00")
	for _, c := range []string{server, client} {
		if !json.Valid([]byte(c)) {
			t.Errorf("xray: %s", c)
		}
	}
}
