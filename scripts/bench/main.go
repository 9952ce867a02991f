// Bench measures Culvert the way calls use it, beside nothing at all, plain
// yardsticks, and those of its peers that are on PATH, all in one run.
//
//	cd scripts/bench && go run . [-quick] [-only cpu,loss3] [-rounds 3] [-out DIR]
//	cd scripts/bench && go run . -faults 20 [-only SUBTEST] [-out DIR]
//
// It builds this tree, and prints a table of what must be reached and of what
// was. DIR gets it as table.md, all figures as results.json, and a picture of
// delay over time for each row with a link. Rows with a link need root, as they
// are measured between two network namespaces.
//
// It promises ratios, not figures: compare what one run says.
package main

import (
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"log"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"culvert/scripts/bench/internal/lab"
	"culvert/scripts/bench/internal/measure"
)

func main() {
	log.SetFlags(0)
	log.SetPrefix("bench: ")
	quick := flag.Bool("quick", false, "a third of the time: a look, no figures to publish; of faults, the lengths that CI has time for")
	only := flag.String("only", "", "these `rows` alone, separated by commas")
	who := flag.String("who", "", "these `subjects` alone, separated by commas")
	rounds := flag.Int("rounds", 1, "measure each row so often, in turns, and take the middle")
	out := flag.String("out", "", "the `folder` for results.json, table.md and pictures; rows that are there already stay (default: bench-results)")
	publish := flag.Bool("publish", false, "write to last/ and put the figures into README.md")
	faults := flag.Int("faults", 0, "repeat the project's tests of what a call outlives so `often`, instead of all rows; -only then names a subtest")
	list := flag.Bool("list", false, "say what rows there are")
	flag.Parse()
	if *list {
		for _, r := range rows {
			fmt.Printf("%-9s %s\n", r.id, r.title)
		}
		return
	}
	if *out == "" {
		*out = "bench-results"
		if *publish {
			*out = "last"
		}
	}
	b := bench{quick: *quick, rounds: max(*rounds, 1), out: *out, publish: *publish}
	var err error
	if *faults > 0 {
		err = b.faults(*faults, *only)
	} else {
		err = b.run(words(*only), words(*who))
	}
	if err != nil {
		log.Fatal(err)
	}
}

func words(list string) []string {
	return strings.FieldsFunc(list, func(r rune) bool { return r == ',' })
}

type bench struct {
	quick   bool
	rounds  int
	out     string
	publish bool

	bin, dir string
	machine  string
	version  string
	stopped  atomic.Bool
}

var errStopped = errors.New("stopped")

func (b *bench) run(only, who []string) error {
	chosen, err := choose(only, who)
	if err != nil {
		return err
	}
	if err := possible(chosen); err != nil {
		return err
	}
	// What is started dies with the thread that started it, so that nothing is left should this program be killed.
	runtime.LockOSThread()
	if err := os.MkdirAll(b.out, 0o755); err != nil {
		return err
	}
	all, err := load(filepath.Join(b.out, "results.json"))
	if err != nil {
		return err
	}
	if b.dir, err = os.MkdirTemp("", "culvert-bench-"); err != nil {
		return err
	}
	defer os.RemoveAll(b.dir)
	if err := b.build(); err != nil {
		return err
	}
	b.machine, b.version = machine(), version()
	b.watchStop()
	for _, r := range chosen {
		if b.quick {
			r = r.quick()
		}
		next, err := b.row(r)
		if err != nil {
			return fmt.Errorf("row %s: %w", r.id, err)
		}
		all.merge(next)
		fmt.Println("\n" + next.table(""))
		if err := b.save(r, all, next); err != nil {
			return err
		}
	}
	fmt.Println(all.bars())
	return nil
}

// watchStop lets a signal end the run after what is being measured.
func (b *bench) watchStop() {
	stop := make(chan os.Signal, 1)
	signal.Notify(stop, os.Interrupt, syscall.SIGTERM)
	go func() { <-stop; b.stopped.Store(true) }()
}

// choose returns the rows to measure, with the subjects that can be.
func choose(only, who []string) ([]row, error) {
	for _, id := range only {
		if _, ok := find(id); !ok {
			return nil, fmt.Errorf("there is no row %q; -list says which there are", id)
		}
	}
	for _, name := range who {
		if _, ok := subjects[name]; !ok {
			return nil, fmt.Errorf("there is no subject %q", name)
		}
	}
	var chosen []row
	for _, r := range rows {
		if len(only) > 0 && !slices.Contains(only, r.id) {
			continue
		}
		r.subjects = slices.DeleteFunc(slices.Clone(r.subjects), func(name string) bool {
			if len(who) > 0 && !slices.Contains(who, name) {
				return true
			}
			return subjects[name].needs != "" && !onPath(subjects[name].needs)
		})
		chosen = append(chosen, r)
	}
	return chosen, nil
}

func onPath(program string) bool {
	_, err := exec.LookPath(program)
	return err == nil
}

func find(id string) (row, bool) {
	i := slices.IndexFunc(rows, func(r row) bool { return r.id == id })
	if i < 0 {
		return row{}, false
	}
	return rows[i], true
}

// possible says what is missing for the rows.
func possible(chosen []row) error {
	var linked []string
	for _, r := range chosen {
		if r.link != "" {
			linked = append(linked, r.id)
		}
	}
	if len(linked) == 0 {
		return nil
	}
	missing := ""
	if os.Getuid() != 0 {
		missing = "root"
	} else if !onPath("ip") {
		missing = "the program ip (iproute2)"
	} else if _, err := os.Stat("/dev/net/tun"); err != nil {
		missing = "/dev/net/tun"
	}
	if missing == "" {
		return nil
	}
	return fmt.Errorf("the rows %s are measured between network namespaces and need %s; -only cpu,closed,delay,idle,bulk needs nothing", strings.Join(linked, ","), missing)
}

// build builds the two ends of this tree, and our own programs.
func (b *bench) build() error {
	b.bin = filepath.Join(b.dir, "bin")
	root, err := filepath.Abs("../..")
	if err != nil {
		return err
	}
	for _, part := range []struct{ dir, what string }{
		{root, "./cmd/culvert ./cmd/culvert-cloudproxy"},
		{".", "./link ./load ./bare ./relay ./nobbr"},
	} {
		cmd := exec.Command("go", append([]string{"build", "-trimpath", "-buildvcs=false", "-o", b.bin + "/"}, strings.Fields(part.what)...)...)
		cmd.Dir = part.dir
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0") // as scripts/build.sh does
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("building in %s: %w\n%s", part.dir, err, out)
		}
	}
	return nil
}

// row measures all subjects of a row, in turns.
func (b *bench) row(r row) (rowReport, error) {
	report := rowReport{ID: r.id, Title: r.title, Date: time.Now(), Machine: b.machine, Version: b.version, Quick: b.quick, Link: r.link, Load: strings.Join(r.load, " ")}
	measured := make([][]entry, len(r.subjects))
	for round := range b.rounds {
		for i, name := range r.subjects {
			if b.stopped.Load() {
				return report, errStopped
			}
			fmt.Fprintf(os.Stderr, "%s %s %d/%d …\n", r.id, name, round+1, b.rounds)
			e := entry{Subject: name}
			var err error
			if e.Result, e.OwnMs, err = b.measure(r, subjects[name]); err != nil {
				e.Error = err.Error()
				fmt.Fprintf(os.Stderr, "%s %s: %v\n", r.id, name, err)
			}
			measured[i] = append(measured[i], e)
		}
	}
	for _, entries := range measured {
		report.Entries = append(report.Entries, middle(entries, r.columns[0]))
	}
	report.Verdicts = judge(r, report.Entries)
	return report, nil
}

// middle is the entry whose figure is the median of all; those that failed count as below all others.
func middle(rounds []entry, c column) entry {
	order := slices.Clone(rounds)
	slices.SortStableFunc(order, func(a, b entry) int {
		x, _ := c.of(a)
		y, _ := c.of(b)
		switch {
		case x < y:
			return -1
		case x > y:
			return 1
		}
		return 0
	})
	e := order[len(order)/2]
	if len(rounds) > 1 {
		for _, r := range rounds {
			if r.Result != nil {
				e.Rounds = append(e.Rounds, *withoutSeries(r.Result))
			}
		}
	}
	return e
}

// save writes everything again after each row, so that a run that is stopped keeps what it has.
func (b *bench) save(r row, all report, next rowReport) error {
	if svg := picture(r, next.Entries); svg != "" {
		if err := os.WriteFile(filepath.Join(b.out, r.id+".svg"), []byte(svg), 0o644); err != nil {
			return err
		}
	}
	if err := all.save(b.out); err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(b.out, "table.md"), []byte(all.markdown(".")), 0o644); err != nil {
		return err
	}
	if !b.publish {
		return nil
	}
	return publishIn("README.md", figuresMarks, all.markdown(filepath.ToSlash(b.out)))
}

// quick is the row in about a third of its time; what happens to the link happens sooner.
func (r row) quick() row {
	r.dur /= 3
	r.events = slices.Clone(r.events)
	for i := range r.events {
		e := &r.events[i]
		length := e.until - e.at // an outage stays as long as it is
		e.at /= 3
		if e.until > 0 {
			e.until = e.at + length
			r.dur += length * 2 / 3
		}
	}
	return r
}

// picture says whether the row has delays over time worth drawing.
func (r row) picture() bool { return r.link != "" && r.load[0] == "paced" }

// measure measures one subject.
func (b *bench) measure(r row, who subject) (_ *measure.Result, ownMs float64, err error) {
	s := &scene{bin: b.bin, host: "127.0.0.1", restrict: r.cubic}
	if s.dir, err = os.MkdirTemp(b.dir, r.id+"-"); err != nil {
		return nil, 0, err
	}
	far := []string{s.inner()}
	if r.link != "" {
		if s.link, err = lab.NewLink(s.program("link"), s.file("link.log"), r.link); err != nil {
			return nil, 0, err
		}
		defer s.link.Close()
		s.near, s.far, s.host = lab.Near, lab.Far, lab.FarAddr
		algorithm := "bbr"
		if r.cubic {
			algorithm = "cubic"
		}
		if err := s.link.Congestion(algorithm); err != nil {
			return nil, 0, fmt.Errorf("%s is not to be had (the kernel's module is tcp_%[1]s): %w", algorithm, err)
		}
		far = append(far, s.direct())
	}
	end, err := s.far.Start(s.file("far.log"), s.program("load"), "serve", "-addr", strings.Join(far, ","))
	if err != nil {
		return nil, 0, err
	}
	defer end.Stop()
	if _, err := end.Line(); err != nil {
		return nil, 0, err
	}
	defer s.clear()
	if who.start != nil {
		if err := who.start(s); err != nil {
			return nil, 0, err
		}
	}
	if who.bare != "" {
		result, err := s.bare(who.bare, r.dur)
		return result, 0, err
	}
	return s.load(r, who)
}

// bare measures a transport with the program bare, which has its own far end.
func (s *scene) bare(kind string, dur time.Duration) (*measure.Result, error) {
	deadline := time.Now().Add(5 * time.Second) // for its far end to listen
	for {
		out, err := s.near.Run(s.program("bare"), "load", "-addr", s.tunnel(), "-kind", kind, "-dur", dur.String())
		if err != nil && time.Now().Before(deadline) {
			time.Sleep(100 * time.Millisecond)
			continue
		}
		if err != nil {
			return nil, err
		}
		var found struct {
			Rate float64 `json:"mbit_per_s"`
		}
		if err := json.Unmarshal(out, &found); err != nil {
			return nil, err
		}
		return &measure.Result{Mode: "bare " + kind, Duration: dur.Seconds(), Bulk: found.Rate}, nil
	}
}

// load runs the row's load and changes the link while it runs.
func (s *scene) load(r row, who subject) (*measure.Result, float64, error) {
	args := append([]string{s.program("load")}, r.load...)
	args = append(args, "-dur", r.dur.String(), "-far", s.direct())
	if who.plain != nil {
		args = append(args, "-target", who.plain(s))
	} else {
		if err := s.settle(); err != nil {
			return nil, 0, err
		}
		args = append(args, "-target", s.inner(), "-socks", s.socks())
	}
	switch r.load[0] {
	case "paced":
		args = append(args, "-pids", s.pids())
		if r.picture() {
			args = append(args, "-series")
		}
	case "closed", "bulk", "idle":
		args = append(args, "-pids", s.pids())
	}
	process, err := s.near.Start(s.file("load.log"), args...)
	if err != nil {
		return nil, 0, err
	}
	defer process.Stop()
	line, err := process.Line()
	if err != nil {
		return nil, 0, err
	}
	held := lab.Queued(0)
	if line == "begin" {
		if held, err = s.script(r.events); err != nil {
			return nil, 0, err
		}
		if line, err = process.Line(); err != nil {
			return nil, 0, err
		}
	}
	if s.link != nil {
		last, err := s.link.Set("")
		if err != nil {
			return nil, 0, err
		}
		held = max(held, last)
	}
	if err := process.Wait(); err != nil {
		return nil, 0, err
	}
	var result measure.Result
	if err := json.Unmarshal([]byte(line), &result); err != nil {
		return nil, 0, fmt.Errorf("the load program said %q: %w", line, err)
	}
	return &result, ownQueues(r, result, held), nil
}

// script tells the link the events in their time, from now on. It returns
// how long the link's rate held a packet until then.
func (s *scene) script(events []event) (lab.Queued, error) {
	if s.link == nil {
		return 0, nil
	}
	if _, err := s.link.Set(""); err != nil { // forget what was before the load began
		return 0, err
	}
	held := lab.Queued(0)
	start := time.Now()
	for _, e := range events {
		for _, change := range []struct {
			at  time.Duration
			set string
		}{{e.at, e.set}, {e.until, e.back}} {
			if change.set == "" {
				continue
			}
			time.Sleep(time.Until(start.Add(change.at)))
			more, err := s.link.Set(change.set)
			if err != nil {
				return 0, err
			}
			held = max(held, more)
		}
	}
	return held, nil
}

// ownQueues is what the oldest packet waited elsewhere than on the link: beyond the
// link's delay, and the longest that its rate held any packet.
func ownQueues(r row, result measure.Result, held lab.Queued) float64 {
	var delay time.Duration
	for _, word := range strings.Fields(r.link) {
		if value, ok := strings.CutPrefix(word, "delay="); ok {
			// The link has taken it, so it is a duration.
			delay, _ = time.ParseDuration(value)
		}
	}
	return max(0, result.Oldest-measure.Ms(delay)-float64(held))
}
