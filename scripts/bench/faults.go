package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"culvert/scripts/bench/internal/measure"
)

// Faults are what a call must outlive. The project's own tests measure it,
// between namespaces of their own; here they are repeated.

// faultsTests are the tests that log figures.
const faultsTests = "Outlives"

// figureLine is what package netcall of the project logs.
var figureLine = regexp.MustCompile(`figure: (.+): (\S+); 95 % at most (\S+), all at most (\S+)\s*$`)

// faults is faults.json.
type faults struct {
	Rows []fault `json:"rows"`

	measured string // how, when and on what; of the rows that are being measured
}

// fault is one figure of all runs.
type fault struct {
	Test     string    `json:"test"`
	Measured string    `json:"measured"`
	What     string    `json:"what"`
	Ms       []float64 `json:"ms"`
	Usual    float64   `json:"usual_ms"` // bound on 95 % of them
	Most     float64   `json:"most_ms"`  // bound on each
	Failed   int       `json:"failed"`   // runs in which the test failed, for whatever reason
}

// reading is one line of a test's log.
type reading struct {
	what               string
	value, usual, most time.Duration
}

// readFigure reads a line; false: it holds no figure.
func readFigure(line string) (f reading, ok bool) {
	m := figureLine.FindStringSubmatch(line)
	if m == nil {
		return f, false
	}
	f.what = m[1]
	for i, to := range []*time.Duration{&f.value, &f.usual, &f.most} {
		d, err := time.ParseDuration(m[2+i])
		if err != nil {
			return f, false
		}
		*to = d
	}
	return f, true
}

// row is the row of a figure, made anew where it is of an earlier measurement.
func (r *faults) row(test, what string) *fault {
	i := slices.IndexFunc(r.Rows, func(o fault) bool { return o.Test == test && o.What == what })
	if i < 0 {
		i = len(r.Rows)
		r.Rows = append(r.Rows, fault{})
	}
	if row := &r.Rows[i]; row.Measured != r.measured || row.Test == "" {
		*row = fault{Test: test, What: what, Measured: r.measured}
	}
	return &r.Rows[i]
}

// add takes a figure of a test.
func (r *faults) add(test string, f reading) {
	row := r.row(test, f.what)
	row.Ms, row.Usual, row.Most = append(row.Ms, measure.Ms(f.value)), measure.Ms(f.usual), measure.Ms(f.most)
}

// fail counts a test that has failed; where it has no figure, because of that,
// it gets a row without one.
func (r *faults) fail(test string) {
	found := false
	for i := range r.Rows {
		if r.Rows[i].Test == test && r.Rows[i].Measured == r.measured {
			r.Rows[i].Failed++
			found = true
		}
	}
	if !found && strings.Contains(test, "/") {
		r.row(test, "").Failed++
	}
}

func (f fault) quantiles() measure.Delays {
	var v []time.Duration
	for _, ms := range f.Ms {
		v = append(v, time.Duration(ms*float64(time.Millisecond)))
	}
	return measure.Quantiles(v)
}

func (f fault) outcome() string {
	switch q := f.quantiles(); {
	case f.Failed > 0:
		return fmt.Sprintf("FAIL, %d of %d runs", f.Failed, len(f.Ms))
	case q.P95 > f.Usual || q.Max > f.Most:
		return "FAIL"
	}
	return "pass"
}

// markdown is the table.
func (r faults) markdown() string {
	var b strings.Builder
	fmt.Fprintf(&b, "| fault | figure | runs | median, ms | 95 %%, ms | must reach | longest, ms | must reach | |\n|---|---|---|---|---|---|---|---|---|\n")
	for _, f := range r.Rows {
		q := f.quantiles()
		_, name, _ := strings.Cut(f.Test, "/")
		fmt.Fprintf(&b, "| %s | %s | %d | %.0f | %.0f | ≤ %.0f | %.0f | ≤ %.0f | %s |\n",
			strings.ReplaceAll(name, "_", " "), f.What, len(f.Ms), q.P50, q.P95, f.Usual, q.Max, f.Most, f.outcome())
	}
	var how []string
	for _, f := range r.Rows {
		if !slices.Contains(how, f.Measured) {
			how = append(how, f.Measured)
		}
	}
	fmt.Fprintf(&b, "\n%s\n", strings.Join(how, "\n"))
	return b.String()
}

// faults repeats the tests, all of them or those that match only, and writes
// what has been measured after each run.
func (b *bench) faults(runs int, only string) error {
	if os.Getuid() != 0 {
		return errors.New("faults are measured between network namespaces and need root")
	}
	if err := os.MkdirAll(b.out, 0o755); err != nil {
		return err
	}
	b.watchStop()
	name := faultsTests
	if only != "" {
		name += "/(" + only + ")"
	}
	file := filepath.Join(b.out, "faults.json")
	var all faults
	if text, err := os.ReadFile(file); err == nil {
		if err := json.Unmarshal(text, &all); err != nil {
			return fmt.Errorf("%s: %w", file, err)
		}
	}
	all.measured = fmt.Sprintf("%s, %s, %s", time.Now().Format("2 January 2006 15:04"), version(), machine())
	if b.quick {
		all.measured += ", quick"
	}
	for run := range runs {
		if b.stopped.Load() {
			return errStopped
		}
		fmt.Fprintf(os.Stderr, "faults %d/%d …\n", run+1, runs)
		if err := all.run(name, b.quick); err != nil {
			return err
		}
		if len(all.Rows) == 0 {
			return fmt.Errorf("no test that matches %q has logged a figure", name)
		}
		text, err := json.MarshalIndent(all, "", " ")
		if err != nil {
			return err
		}
		if err := errors.Join(os.WriteFile(file, append(text, '\n'), 0o644), os.WriteFile(filepath.Join(b.out, "faults.md"), []byte(all.markdown()), 0o644)); err != nil {
			return err
		}
	}
	fmt.Println(all.markdown())
	if !b.publish {
		return nil
	}
	return publishIn("README.md", faultsMarks, all.markdown())
}

// run runs the tests once.
func (r *faults) run(name string, quick bool) error {
	cmd := exec.Command("go", "test", "-json", "-count", "1", "-timeout", "30m", "-run", name, "./cmd/...")
	cmd.Dir = "../.."
	cmd.Env = append(os.Environ(), "CI=true") // nothing is left out
	if !quick {
		cmd.Env = append(cmd.Env, "CULVERT_FAULTS_LONG=1") // or cut short
	}
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	var failed []string
	lines := bufio.NewScanner(out)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		var e struct{ Action, Test, Output string }
		if err := json.Unmarshal(lines.Bytes(), &e); err != nil {
			continue // the go command's own words
		}
		switch f, ok := readFigure(e.Output); {
		case e.Action == "output" && ok:
			r.add(e.Test, f)
		case e.Action == "output" && strings.Contains(e.Output, "_test.go:"):
			fmt.Fprint(os.Stderr, e.Output)
		case e.Action == "fail" && e.Test != "":
			failed = append(failed, e.Test)
		}
	}
	if err := cmd.Wait(); err != nil && len(failed) == 0 {
		return fmt.Errorf("go test: %w", err)
	}
	for _, test := range failed {
		r.fail(test)
	}
	return lines.Err()
}
