package chart

import (
	"encoding/xml"
	"errors"
	"io"
	"strings"
	"testing"
	"time"

	"culvert/scripts/bench/internal/measure"
)

func TestPictureIsWellFormed(t *testing.T) {
	ms := time.Millisecond
	series := measure.NewSeries(time.Second, []time.Duration{0, 500 * ms, 900 * ms}, []measure.Sample{{Sent: 0, Up: 20 * ms, Down: 4 * time.Second}, {Sent: 900 * ms}})
	c := Chart{Title: `loss & "delay" <now>`, Budget: 100, Spans: [][2]int{{3, 6}}, Marks: []string{"down"}, Strips: []Strip{
		{Name: "direct", Note: "99 %", Series: series},
		{Name: "none", Series: measure.NewSeries(0, nil, nil)},
	}}
	for name, c := range map[string]Chart{"full": c, "empty": {}} {
		t.Run(name, func(t *testing.T) {
			svg := c.SVG()
			d := xml.NewDecoder(strings.NewReader(svg))
			for {
				_, err := d.Token()
				if errors.Is(err, io.EOF) {
					break
				}
				if err != nil {
					t.Fatalf("%v in\n%s", err, svg)
				}
			}
			for _, bad := range []string{"NaN", "Inf"} {
				if strings.Contains(svg, bad) {
					t.Errorf("it holds %s", bad)
				}
			}
		})
	}
	if svg := c.SVG(); !strings.Contains(svg, "<polyline") || !strings.Contains(svg, red) {
		t.Errorf("no line or no loss in\n%s", svg)
	}
}
