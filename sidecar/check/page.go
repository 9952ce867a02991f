package check

import (
	_ "embed"
	"fmt"
	"html/template"
	"io"
	"time"
)

//go:embed page.html
var pageText string

var page = template.Must(template.New("page").Funcs(template.FuncMap{
	"ms":      func(d time.Duration) string { return fmt.Sprintf("%.1f ms", float64(d)/float64(time.Millisecond)) },
	"percent": func(f float64) string { return fmt.Sprintf("%.1f %%", 100*f) },
	"short":   short,
	"rows":    func(w *Way) []Row { return w.Rows() },
}).Parse(pageText))

func short(d time.Duration) string {
	if d < 10*time.Second {
		return d.Round(time.Millisecond).String()
	}
	return d.Round(100 * time.Millisecond).String()
}

// A Row is one line of a table of figures.
type Row struct {
	What string // "audio up"
	Figures
	Grade Grade // of both directions
}

// Rows are the figures of a way, line by line.
func (w *Way) Rows() []Row {
	return []Row{
		{"audio up", w.Audio.Up, w.Audio.Grade}, {"audio down", w.Audio.Down, w.Audio.Grade},
		{"video up", w.Video.Up, w.Video.Grade}, {"video down", w.Video.Down, w.Video.Grade},
	}
}

// WritePage writes the report as one page of HTML that needs nothing else.
func (r *Report) WritePage(w io.Writer) error { return page.Execute(w, r) }
