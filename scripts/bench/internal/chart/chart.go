// Package chart draws delay over time as SVG: one strip for each subject, with
// the way up at the left and the way down at the right.
//
// A strip shows the median of each tenth of a second as a line, the worst as a
// shade above it, and packets that never came back in red below. The scale is
// logarithmic, so that 20 ms and 4 s can both be read. Colours are mid-tones
// without a background: they stand on white and on black.
package chart

import (
	"fmt"
	"html"
	"math"
	"strings"

	"culvert/scripts/bench/internal/measure"
)

// Strip is one subject's run.
type Strip struct {
	Name   string
	Note   string // below the name
	Series *measure.Series
}

// Chart is a picture.
type Chart struct {
	Title  string
	Budget float64    // ms; a line is drawn there
	Spans  [][2]int   // bins between which something happened to the link
	Marks  []string   // what, one for each span
	Strips []Strip    // from top to bottom
	scale  [2]float64 // ms at the bottom and the top
}

// In pixels.
const (
	width   = 900
	head    = 46
	label   = 150
	gap     = 40
	strip   = 72
	space   = 16
	foot    = 30
	panel   = (width - label - gap - 10) / 2
	lossBar = 4
)

// Colours.
const (
	text   = "#7d8590"
	line   = "#2f81f7"
	red    = "#e5534b"
	amber  = "#b08800"
	family = "system-ui,sans-serif"
)

// SVG draws it.
func (c Chart) SVG() string {
	c.scale = [2]float64{10, 1000}
	longest := 0
	for _, s := range c.Strips {
		for i := range s.Series.Sent {
			c.scale[1] = max(c.scale[1], s.Series.UpMax[i], s.Series.DownMax[i])
		}
		longest = max(longest, len(s.Series.Sent))
	}
	height := head + len(c.Strips)*(strip+space) + foot
	var b strings.Builder
	fmt.Fprintf(&b, `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %d %d" font-family="%s" font-size="11" fill="%s">`+"\n", width, height, family, text)
	write(&b, 0, 16, "start", 14, c.Title)
	write(&b, label, 38, "start", 11, "up: app to far end, ms")
	write(&b, label+panel+gap, 38, "start", 11, "down: far end to app, ms")
	for i, s := range c.Strips {
		top := head + i*(strip+space)
		write(&b, 0, top+strip/2, "start", 13, s.Name)
		write(&b, 0, top+strip/2+16, "start", 11, s.Note)
		c.panel(&b, label, top, longest, s.Series, s.Series.UpP50, s.Series.UpMax)
		c.panel(&b, label+panel+gap, top, longest, s.Series, s.Series.DownP50, s.Series.DownMax)
	}
	write(&b, label, height-12, "start", 11, fmt.Sprintf("0 to %.0f s by the time of sending; line: median of 0.1 s; shade: worst; red: never came back; dashes: %.0f ms", float64(longest)*measure.Bin.Seconds(), c.Budget))
	b.WriteString("</svg>\n")
	return b.String()
}

func write(b *strings.Builder, x, y int, anchor string, size int, s string) {
	fmt.Fprintf(b, `<text x="%d" y="%d" text-anchor="%s" font-size="%d">%s</text>`+"\n", x, y, anchor, size, html.EscapeString(s))
}

// y is how far below a panel's top a delay stands.
func (c Chart) y(ms float64) float64 {
	low, high := math.Log(c.scale[0]), math.Log(c.scale[1])
	at := (math.Log(max(ms, c.scale[0])) - low) / (high - low)
	return float64(strip-lossBar) * (1 - at)
}

func (c Chart) panel(b *strings.Builder, left, top, bins int, s *measure.Series, median, worst []float64) {
	if bins == 0 {
		return
	}
	fmt.Fprintf(b, `<g transform="translate(%d %d)">`+"\n", left, top)
	x := func(bin float64) float64 { return bin * panel / float64(bins) }
	for i, span := range c.Spans {
		fmt.Fprintf(b, `<rect x="%.1f" y="0" width="%.1f" height="%d" fill="%s" fill-opacity=".15"><title>%s</title></rect>`+"\n",
			x(float64(span[0])), x(float64(span[1]-span[0])), strip, text, html.EscapeString(c.Marks[i]))
	}
	for ms := c.scale[0]; ms <= c.scale[1]; ms *= 10 {
		fmt.Fprintf(b, `<path d="M0 %.1fH%d" stroke="%s" stroke-opacity=".3"/>`, c.y(ms), panel, text)
		fmt.Fprintf(b, `<text x="-4" y="%.1f" text-anchor="end" font-size="9">%.0f</text>`+"\n", c.y(ms)+3, ms)
	}
	fmt.Fprintf(b, `<path d="M0 %.1fH%d" stroke="%s" stroke-dasharray="4 3"/>`+"\n", c.y(c.Budget), panel, amber)
	// A run of bins with packets is one shape; where none came back there is a hole.
	for from := 0; from < len(median); {
		to := from
		for to < len(median) && s.Back[to] > 0 {
			to++
		}
		if to > from {
			var shade, over strings.Builder
			for i := from; i < to; i++ {
				fmt.Fprintf(&over, "%.1f %.1f ", x(float64(i)+.5), c.y(median[i]))
				fmt.Fprintf(&shade, "%.1f %.1f ", x(float64(i)+.5), c.y(worst[i]))
			}
			for i := to - 1; i >= from; i-- {
				fmt.Fprintf(&shade, "%.1f %.1f ", x(float64(i)+.5), c.y(median[i]))
			}
			fmt.Fprintf(b, `<polygon points="%s" fill="%s" fill-opacity=".3"/><polyline points="%s" fill="none" stroke="%s" stroke-width="1.3"/>`+"\n",
				strings.TrimSpace(shade.String()), line, strings.TrimSpace(over.String()), line)
		}
		from = to + 1
	}
	for i, sent := range s.Sent {
		if lost := sent - s.Back[i]; lost > 0 {
			fmt.Fprintf(b, `<rect x="%.1f" y="%d" width="%.2f" height="%d" fill="%s" fill-opacity="%.2f"/>`,
				x(float64(i)), strip-lossBar, x(1), lossBar, red, .25+.75*float64(lost)/float64(sent))
		}
	}
	b.WriteString("</g>\n")
}
