package main

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"culvert/scripts/bench/internal/chart"
	"culvert/scripts/bench/internal/measure"
)

// report is results.json.
type report struct {
	Rows []rowReport `json:"rows"`
}

// rowReport is one row with all that is needed to repeat it. Rows of different
// runs may stand in one report, so each has its own date; what is compared is always of one row.
type rowReport struct {
	ID       string    `json:"row"`
	Title    string    `json:"title"`
	Date     time.Time `json:"date"`
	Machine  string    `json:"machine"`
	Version  string    `json:"version"` // of this tree
	Quick    bool      `json:"quick"`
	Link     string    `json:"link,omitempty"`
	Load     string    `json:"load"`
	Entries  []entry   `json:"entries"`
	Verdicts []verdict `json:"verdicts"`
}

// number is f with so many digits after the point; -1: as many as it has.
func number(f float64, digits int) string { return strconv.FormatFloat(f, 'f', digits, 64) }

// merge puts a row in its place, instead of an older one.
func (r *report) merge(next rowReport) {
	r.Rows = slices.DeleteFunc(r.Rows, func(old rowReport) bool { return old.ID == next.ID })
	r.Rows = append(r.Rows, next)
	place := func(id string) int { return slices.IndexFunc(rows, func(r row) bool { return r.id == id }) }
	slices.SortStableFunc(r.Rows, func(a, b rowReport) int { return place(a.ID) - place(b.ID) })
}

// load reads a report that may not be there yet.
func load(file string) (report, error) {
	var r report
	b, err := os.ReadFile(file)
	if os.IsNotExist(err) {
		return r, nil
	}
	if err != nil {
		return r, err
	}
	if err := json.Unmarshal(b, &r); err != nil {
		return r, fmt.Errorf("%s: %w", file, err)
	}
	// A row that is no longer measured is of no use.
	r.Rows = slices.DeleteFunc(r.Rows, func(old rowReport) bool { _, ok := find(old.ID); return !ok })
	return r, nil
}

// save writes results.json without the series, which the pictures show.
func (r report) save(dir string) error {
	lean := report{Rows: slices.Clone(r.Rows)}
	for i := range lean.Rows {
		lean.Rows[i].Entries = slices.Clone(lean.Rows[i].Entries)
		for j, e := range lean.Rows[i].Entries {
			lean.Rows[i].Entries[j].Result = withoutSeries(e.Result)
		}
	}
	b, err := json.MarshalIndent(lean, "", " ")
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dir, "results.json"), append(b, '\n'), 0o644)
}

func withoutSeries(r *measure.Result) *measure.Result {
	if r == nil {
		return nil
	}
	lean := *r
	lean.Series = nil
	return &lean
}

// picture draws a row; "" where it has no delays over time.
func picture(r row, entries []entry) string {
	c := chart.Chart{Title: r.title}
	for _, e := range r.events {
		until := e.until
		if until == 0 {
			until = r.dur
		}
		c.Spans = append(c.Spans, [2]int{int(e.at / measure.Bin), int(until / measure.Bin)})
		c.Marks = append(c.Marks, e.what)
	}
	for _, e := range entries {
		if e.Result == nil || e.Result.Series == nil {
			continue
		}
		c.Budget = e.Result.BudgetMs
		c.Strips = append(c.Strips, chart.Strip{Name: e.Subject, Note: number(e.Result.OnTime, 1) + " % on time", Series: e.Result.Series})
	}
	if len(c.Strips) == 0 {
		return ""
	}
	return c.SVG()
}

// bars is the table of bars of all rows, and how many of them are passed.
func (r report) bars() string {
	var b strings.Builder
	passed, all := 0, 0
	fmt.Fprintf(&b, "| row | who | must reach | reached | limit | compared with | ratio | |\n|---|---|---|---|---|---|---|---|\n")
	for _, row := range r.Rows {
		for _, v := range row.Verdicts {
			all++
			if v.Outcome == "pass" {
				passed++
			}
			digits := max(v.digits, 1)
			rival, ratio := "", ""
			if v.Rival != "" {
				rival = v.Rival + " " + number(v.Theirs, digits)
				if v.Theirs > 0 {
					ratio = number(v.Figure/v.Theirs, 2)
				}
			} else if v.Limit > 0 {
				ratio = number(v.Figure/v.Limit, 2)
			}
			fmt.Fprintf(&b, "| %s | %s | %s | %s | %s | %s | %s | %s |\n", row.ID, v.Subject, v.Bar, number(v.Figure, digits), number(v.Limit, digits), rival, ratio, v.Outcome)
		}
	}
	fmt.Fprintf(&b, "\n%d of %d bars are passed.\n", passed, all)
	return b.String()
}

// table is one row's figures, all subjects. pictures is the folder of its picture; "": none.
func (row rowReport) table(pictures string) string {
	def, ok := find(row.ID)
	if !ok {
		return ""
	}
	var b strings.Builder
	fmt.Fprintf(&b, "### %s: %s\n\n", row.ID, row.Title)
	heads := []string{""}
	for _, c := range def.columns {
		heads = append(heads, c.head)
	}
	fmt.Fprintf(&b, "| %s |\n|%s\n", strings.Join(heads, " | "), strings.Repeat("---|", len(heads)))
	for _, e := range row.Entries {
		cells := []string{e.Subject}
		for _, c := range def.columns {
			cell := "–"
			if f, ok := c.of(e); ok {
				cell = number(f, c.digits)
			}
			cells = append(cells, cell)
		}
		if e.Error != "" {
			cells[1] = "failed"
		}
		fmt.Fprintf(&b, "| %s |\n", strings.Join(cells, " | "))
	}
	quick := ""
	if row.Quick {
		quick = ", quick"
	}
	fmt.Fprintf(&b, "\n%s, %s, %s%s\n", row.Date.Format("2 January 2006 15:04"), row.Version, row.Machine, quick)
	if pictures != "" && def.picture() {
		fmt.Fprintf(&b, "\n![delay over time](%s/%s.svg)\n", pictures, row.ID)
	}
	return b.String()
}

// markdown is the whole report.
func (r report) markdown(pictures string) string {
	var b strings.Builder
	b.WriteString(r.bars())
	for _, row := range r.Rows {
		b.WriteString("\n" + row.table(pictures))
	}
	return b.String()
}

// marks stand in the README around what is published.
type marks struct{ begin, end string }

var (
	figuresMarks = marks{"<!-- figures: go run . -publish -->\n", "<!-- end of figures -->\n"}
	faultsMarks  = marks{"<!-- faults: go run . -faults 20 -publish -->\n", "<!-- end of faults -->\n"}
)

// publish puts text between the marks of the README.
func publish(readme string, m marks, text string) (string, error) {
	before, rest, ok := strings.Cut(readme, m.begin)
	_, after, ok2 := strings.Cut(rest, m.end)
	if !ok || !ok2 {
		return "", fmt.Errorf("the README lacks the lines %q and %q", strings.TrimSpace(m.begin), strings.TrimSpace(m.end))
	}
	return before + m.begin + "\n" + text + "\n" + m.end + after, nil
}

func publishIn(file string, m marks, text string) error {
	readme, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	next, err := publish(string(readme), m, text)
	if err != nil {
		return err
	}
	return os.WriteFile(file, []byte(next), 0o644)
}
